//! Who a client certificate names, as the apiserver's own x509 authenticator would say
//! (k8s.io/apiserver/pkg/authentication/request/x509/x509.go, `CommonNameUserConversion`).
//!
//! Input: a verified certificate. Output: header fields for the front-proxy authenticator
//! (.../authenticatorfactory, `--requestheader-*`). Must never name anyone for a certificate that was not verified.

use std::{borrow::Cow, fmt::Write as _, net::IpAddr, sync::Arc};

use http::{HeaderName, HeaderValue};
use rebalancer_core::h2::policy::{IdentityNames, Policy};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The subject attribute that carries a user's UID (KEP-5284, feature AllowParsingUserUIDFromCertAuth).
const UID_OID: &str = "1.3.6.1.4.1.57683.2";

const COMMON_NAME_OID: &str = "2.5.4.3";
const ORGANIZATION_OID: &str = "2.5.4.10";

/// What the client's certificate says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It brought none.
    Absent,
    /// The CA vouches for it and it names somebody.
    Accepted(Identity),
    /// The apiserver would not take it either: without a token of its own the client's requests are answered 401.
    Rejected,
}

/// What a rejected certificate's requests carry when they bring no token: the apiserver then answers 401, as it answers
/// such a certificate. Without it they would pass as anonymous.
pub const REJECTED: &str = "Bearer rebalancer-relay-client-certificate-not-accepted";

impl Claim {
    /// The user's name.
    pub fn user(&self) -> Option<&str> {
        match self {
            Self::Accepted(identity) => Some(&identity.user),
            Self::Absent | Self::Rejected => None,
        }
    }

    /// What is done to the client's requests.
    pub fn policy(&self, names: Arc<IdentityNames>, client: IpAddr) -> Policy {
        let policy = Policy::new(names, client);
        match self {
            Self::Absent => policy,
            Self::Accepted(identity) => policy.with_identity(identity.fields()),
            Self::Rejected => policy.with_authorization_unless_token(REJECTED),
        }
    }
}

/// A user, as header fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user's name.
    pub user: String,
    fields: Vec<(&'static str, String)>,
}

/// Why a verified certificate names nobody.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoIdentity {
    /// It is not X.509.
    #[error("the client certificate cannot be parsed")]
    Unreadable,
    /// A name that no header can carry.
    #[error("the client certificate's {0} holds characters that no HTTP header can carry")]
    NotAHeaderValue(&'static str),
}

impl Identity {
    /// Reads the subject; `None` without a common name, which names nobody.
    ///
    /// # Errors
    ///
    /// See [`NoIdentity`].
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Option<Self>, NoIdentity> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| NoIdentity::Unreadable)?;
        let mut user = String::new();
        let mut uid = None;
        let mut groups = Vec::new();
        for attribute in parsed.subject().iter_attributes() {
            let text = || {
                attribute
                    .as_str()
                    .map(str::to_owned)
                    .map_err(|_| NoIdentity::Unreadable)
            };
            match attribute.attr_type().to_id_string().as_str() {
                // Go keeps the last common name it meets (crypto/x509/pkix, FillFromRDNSequence).
                COMMON_NAME_OID => user = text()?,
                ORGANIZATION_OID => groups.push(text()?),
                UID_OID => uid = Some(text()?),
                _ => {}
            }
        }
        if user.is_empty() {
            return Ok(None);
        }
        let mut fields = vec![("x-remote-user", user.clone())];
        fields.extend(groups.into_iter().map(|group| ("x-remote-group", group)));
        fields.extend(uid.map(|uid| ("x-remote-uid", uid)));
        // The key `authentication.kubernetes.io/credential-id`, escaped as the front-proxy authenticator unescapes it.
        fields.push((
            "x-remote-extra-authentication.kubernetes.io%2fcredential-id",
            credential_id(certificate),
        ));
        fields.retain(|(_, value)| !value.is_empty());
        for (name, value) in &fields {
            // HTTP takes white space around a value away, and with it what sets this name apart from another one.
            if value.trim_ascii() != value || HeaderValue::from_bytes(value.as_bytes()).is_err() {
                return Err(NoIdentity::NotAHeaderValue(match *name {
                    "x-remote-user" => "common name",
                    "x-remote-group" => "organization",
                    _ => "UID",
                }));
            }
        }
        Ok(Some(Self { user, fields }))
    }

    /// The fields, names in lower case.
    fn fields(&self) -> impl Iterator<Item = (Cow<'static, str>, String)> + '_ {
        let fields = self.fields.iter();
        fields.map(|(name, value)| (Cow::Borrowed(*name), value.clone()))
    }

    /// The fields for an HTTP/1.1 request.
    pub fn headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> + '_ {
        self.fields.iter().filter_map(|(name, value)| {
            // Every value was checked when the identity was made.
            Some((
                HeaderName::from_static(name),
                HeaderValue::from_bytes(value.as_bytes()).ok()?,
            ))
        })
    }
}

/// The end of a chain's validity, in seconds since 1970; what cannot be read is over.
pub fn valid_until(chain: &[CertificateDer<'_>]) -> u64 {
    let of = |certificate: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        u64::try_from(parsed.validity().not_after.timestamp()).ok()
    };
    // A certificate is valid through the second it names (RFC 5280, section 4.1.2.5).
    chain
        .iter()
        .map(|certificate| of(certificate).unwrap_or(0))
        .min()
        .unwrap_or(0)
        + 1
}

/// `X509SHA256=` and the certificate's hash, as the apiserver's audit log names the credential.
fn credential_id(certificate: &CertificateDer<'_>) -> String {
    let mut text = String::from("X509SHA256=");
    if let rustls::SupportedCipherSuite::Tls13(suite) =
        rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
    {
        for octet in suite.common.hash_provider.hash(certificate).as_ref() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{octet:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn certificate(names: &[(DnType, &str)]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        let key = KeyPair::generate().expect("a key");
        params.self_signed(&key).expect("a certificate").der().clone()
    }

    #[test]
    fn a_certificate_names_user_groups_uid_and_credential() {
        let uid = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 57683, 2]);
        let der = certificate(&[
            (DnType::CommonName, "alice"),
            (DnType::OrganizationName, "dev"),
            (uid, "7"),
        ]);
        let identity = Identity::of(&der).expect("it parses").expect("it names somebody");
        assert_eq!(identity.user, "alice");
        let names: Vec<_> = identity
            .fields
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        assert_eq!(
            names[..3],
            [
                ("x-remote-user", "alice"),
                ("x-remote-group", "dev"),
                ("x-remote-uid", "7")
            ]
        );
        assert!(names[3].1.starts_with("X509SHA256=") && names[3].1.len() == 11 + 64);
        assert_eq!(identity.headers().count(), 4);
    }

    #[test]
    fn nobody_is_named_without_a_common_name_or_with_one_no_header_can_carry() {
        assert_eq!(
            Identity::of(&certificate(&[(DnType::OrganizationName, "dev")])),
            Ok(None)
        );
        let forged = certificate(&[(DnType::CommonName, "a\r\nx-remote-group: system:masters")]);
        assert_eq!(Identity::of(&forged), Err(NoIdentity::NotAHeaderValue("common name")));
        for padded in [" alice", "alice ", "\talice"] {
            let padded = certificate(&[(DnType::CommonName, padded)]);
            assert_eq!(Identity::of(&padded), Err(NoIdentity::NotAHeaderValue("common name")));
        }
        assert_eq!(
            Identity::of(&CertificateDer::from(vec![1, 2, 3])),
            Err(NoIdentity::Unreadable)
        );
    }
}
