//! Who a client certificate names, as the apiserver's own x509 authenticator would say
//! (k8s.io/apiserver/pkg/authentication/request/x509/x509.go, `CommonNameUserConversion`).
//!
//! Input: a verified certificate. Output: header fields for the front-proxy authenticator
//! (.../authenticatorfactory, `--requestheader-*`). Must never name anyone for a certificate that was not verified.

use std::{borrow::Cow, fmt::Write as _, net::IpAddr, sync::Arc};

use http::HeaderValue;
use rebalancer_core::{
    wire::rewrite::{IdentityNames, Policy},
    wire::x509::Certificate,
};

use super::request_headers::RequestHeaders;

/// What the client's certificate says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It brought none.
    Absent,
    /// The CA vouches for it and it names somebody.
    Accepted(Identity),
    /// Its owner is a front proxy itself, and names a user with each request; what it is called where it names none.
    Proxy(Option<Identity>),
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
            Self::Accepted(identity) | Self::Proxy(Some(identity)) => Some(&identity.user),
            Self::Absent | Self::Proxy(None) | Self::Rejected => None,
        }
    }

    /// Whether its requests go over a connection with the front-proxy certificate.
    pub fn is_believed(&self) -> bool {
        matches!(self, Self::Accepted(_) | Self::Proxy(_))
    }

    /// What is done to the client's requests.
    pub fn policy(&self, names: Arc<IdentityNames>, client: IpAddr) -> Policy {
        let policy = Policy::new(names, client);
        match self {
            Self::Absent => policy,
            Self::Accepted(identity) => policy.with_identity(identity.fields()),
            Self::Proxy(identity) => policy.of_proxy(identity.iter().flat_map(Identity::fields)),
            Self::Rejected => policy.with_authorization_unless_token(REJECTED),
        }
    }
}

/// A user, as header fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user's name.
    pub user: String,
    /// Names in lower case.
    fields: Vec<(String, String)>,
}

/// Why a verified certificate names nobody.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoIdentity {
    /// A name that no header can carry.
    #[error("the client certificate's {0} holds characters that no HTTP header can carry")]
    NotAHeaderValue(&'static str),
    /// More than one, or an empty one.
    #[error("the client certificate must have one UID that is not empty, or none")]
    Uid,
}

impl Identity {
    /// Reads the subject; `None` without a common name, which names nobody.
    ///
    /// # Errors
    ///
    /// See [`NoIdentity`].
    pub fn of(certificate: &Certificate, headers: &RequestHeaders) -> Result<Option<Self>, NoIdentity> {
        let name = certificate.name();
        let user = name.common_name().to_owned();
        if user.is_empty() {
            return Ok(None);
        }
        let uids: Vec<&str> = name.uids().collect();
        if uids.len() > 1 || uids.first().is_some_and(|uid| uid.is_empty()) {
            return Err(NoIdentity::Uid);
        }
        let [of_user, of_group, of_uid, of_credential] = headers.written();
        // The apiserver passes empty groups over, where a header names them.
        let groups = name.organizations().filter(|group| !group.is_empty());
        let groups = groups.map(|group| (&of_group, group.to_owned(), "organization"));
        let uid = uids.into_iter().map(|uid| (&of_uid, uid.to_owned(), "UID"));
        let credential = (&of_credential, credential_id(certificate.raw()), "hash");
        let all = [(&of_user, user.clone(), "common name")]
            .into_iter()
            .chain(groups)
            .chain(uid)
            .chain([credential]);
        let mut fields = Vec::new();
        for (name, value, what) in all {
            // HTTP takes white space around a value away, and with it what sets this name apart from another one.
            if value.trim_ascii() != value || HeaderValue::from_bytes(value.as_bytes()).is_err() {
                return Err(NoIdentity::NotAHeaderValue(what));
            }
            fields.push((name.clone(), value));
        }
        Ok(Some(Self { user, fields }))
    }

    /// The fields, names in lower case.
    pub fn fields(&self) -> impl Iterator<Item = (Cow<'static, str>, String)> + '_ {
        self.fields
            .iter()
            .map(|(name, value)| (Cow::Owned(name.clone()), value.clone()))
    }
}

/// `X509SHA256=` and the certificate's hash, as the apiserver's audit log names the credential.
fn credential_id(certificate: &[u8]) -> String {
    let mut text = String::from("X509SHA256=");
    for octet in sha256(certificate) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{octet:02x}");
    }
    text
}

/// SHA-256.
pub fn sha256(message: &[u8]) -> Vec<u8> {
    let rustls::SupportedCipherSuite::Tls13(suite) = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
    else {
        // That suite is TLS 1.3's.
        return Vec::new();
    };
    suite.common.hash_provider.hash(message).as_ref().to_vec()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;
    use crate::relay::trust::AwsLc;

    fn of(names: &[(DnType, &str)]) -> Result<Option<Identity>, NoIdentity> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let parsed = Certificate::parse(certificate.der(), &AwsLc).expect("it is well-formed");
        Identity::of(&parsed, &RequestHeaders::default())
    }

    #[test]
    fn a_certificate_names_user_groups_uid_and_credential() {
        let uid = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 57683, 2]);
        let identity = of(&[
            (DnType::CommonName, "alice"),
            (DnType::OrganizationName, "dev"),
            (uid, "7"),
        ])
        .expect("headers can carry it")
        .expect("it names somebody");
        assert_eq!(identity.user, "alice");
        let names: Vec<_> = identity
            .fields
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
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
        assert_eq!(names.len(), 4);
    }

    #[test]
    fn nobody_is_named_without_a_common_name_or_with_one_no_header_can_carry() {
        assert_eq!(of(&[(DnType::OrganizationName, "dev")]), Ok(None));
        for odd in ["a\r\nx-remote-group: system:masters", " alice", "alice ", "\talice"] {
            let refused = of(&[(DnType::CommonName, odd)]);
            assert_eq!(refused, Err(NoIdentity::NotAHeaderValue("common name")), "{odd:?}");
        }
        let uid = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 57683, 2]);
        assert_eq!(of(&[(DnType::CommonName, "alice"), (uid, "")]), Err(NoIdentity::Uid));
    }
}
