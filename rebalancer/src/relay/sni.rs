//! More serving certificates, chosen by the name a client asks for (SNI), as kube-apiserver's `--tls-sni-cert-key` has it
//! (k8s.io/apiserver/pkg/server/dynamiccertificates/named_certificates.go).
//!
//! Input: the flag and the certificates. Output: one certificate a handshake.
//! Must never leave a client without a certificate: whoever asks for an unknown name gets the default one.

use std::{collections::HashMap, path::PathBuf, str::FromStr, sync::Arc};

use rustls::{
    pki_types::CertificateDer,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

/// `CERT,KEY[:NAME,...]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SniFiles {
    /// The certificate and its chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The names it is shown for, `*.` for any label; none means those the certificate holds.
    pub names: Vec<String>,
}

impl FromStr for SniFiles {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |what: &str| format!("`{text}` is not CERT,KEY[:NAME,...]: {what}");
        let (files, names) = text.split_once(':').unwrap_or((text, ""));
        let (certificate, key) = files.split_once(',').ok_or_else(|| wrong("there is no key"))?;
        if certificate.is_empty() || key.is_empty() || key.contains(',') {
            return Err(wrong("there must be one certificate and one key before the names"));
        }
        let names: Vec<String> = names
            .split(',')
            .filter(|name| !name.is_empty())
            .map(str::to_ascii_lowercase)
            .collect();
        if let Some(name) = names.iter().find(|name| !is_pattern(name)) {
            return Err(wrong(&format!(
                "`{name}` is neither a DNS name nor one with `*.` in front"
            )));
        }
        Ok(Self {
            certificate: certificate.into(),
            key: key.into(),
            names,
        })
    }
}

fn is_pattern(name: &str) -> bool {
    let rest = name.strip_prefix("*.").unwrap_or(name);
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_'))
    };
    rest.split('.').all(label)
}

/// The DNS names of a certificate; its common name when it holds none.
pub fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let alternative = parsed.subject_alternative_name().ok().flatten();
    let mut names: Vec<String> = alternative
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        let common = parsed
            .subject()
            .iter_common_name()
            .filter_map(|name| name.as_str().ok());
        names.extend(common.filter(|name| is_pattern(name)).map(str::to_ascii_lowercase));
    }
    names
}

/// Chooses by name.
#[derive(Debug)]
pub struct ByName {
    default: Arc<CertifiedKey>,
    named: HashMap<String, Arc<CertifiedKey>>,
}

impl ByName {
    /// With the certificate for every other name.
    pub fn new(default: CertifiedKey) -> Self {
        Self {
            default: Arc::new(default),
            named: HashMap::new(),
        }
    }

    /// Shows that certificate for those names; where two have the same, the first stays.
    pub fn add(&mut self, names: impl IntoIterator<Item = String>, key: CertifiedKey) {
        let key = Arc::new(key);
        for name in names {
            self.named.entry(name).or_insert_with(|| Arc::clone(&key));
        }
    }

    fn find(&self, name: Option<&str>) -> &Arc<CertifiedKey> {
        let found = name.and_then(|name| {
            let name = name.to_ascii_lowercase();
            let any = name.split_once('.').map(|(_, rest)| format!("*.{rest}"));
            self.named
                .get(&name)
                .or_else(|| any.and_then(|any| self.named.get(&any)))
        });
        found.unwrap_or(&self.default)
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(self.find(hello.server_name())))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certified(names: &[&str]) -> CertifiedKey {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, "common.example");
        let certificate = params.self_signed(&key).expect("a certificate");
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        CertifiedKey::from_der(vec![certificate.der().clone()], private, &provider).expect("they belong together")
    }

    #[test]
    fn the_flag_is_read_as_the_apiservers() {
        let read = |text: &str| text.parse::<SniFiles>();
        let files = read("/a.crt,/a.key:foo.example,*.Bar.example").expect("it is well-formed");
        assert_eq!((files.certificate, files.key), ("/a.crt".into(), "/a.key".into()));
        assert_eq!(files.names, ["foo.example", "*.bar.example"]);
        assert_eq!(read("/a.crt,/a.key").expect("no names").names, [""; 0]);
        for wrong in [
            "/a.crt",
            "/a.crt,",
            ",/a.key",
            "/a,/b,/c",
            "/a.crt,/a.key:a.*.b",
            "/a.crt,/a.key:..",
            "/a.crt,/a.key:x y",
        ] {
            assert!(read(wrong).is_err_and(|said| said.contains("CERT,KEY")), "{wrong}");
        }
    }

    #[test]
    fn names_come_from_the_certificate_and_the_best_match_wins() {
        assert_eq!(
            names_of(&certified(&["A.example", "*.b.example"]).cert[0]),
            ["a.example", "*.b.example"]
        );
        assert_eq!(names_of(&certified(&[]).cert[0]), ["common.example"]);
        let mut chooser = ByName::new(certified(&["default"]));
        chooser.add(["*.b.example".to_owned()], certified(&["wild.b.example"]));
        chooser.add(
            ["a.b.example".to_owned(), "*.b.example".to_owned()],
            certified(&["a.b.example"]),
        );
        let shown = |name: Option<&str>| names_of(&chooser.find(name).cert[0]).remove(0);
        assert_eq!(shown(Some("a.b.example")), "a.b.example");
        assert_eq!(shown(Some("A.B.example")), "a.b.example");
        assert_eq!(shown(Some("c.b.example")), "wild.b.example");
        assert_eq!(shown(Some("d.c.b.example")), "default");
        assert_eq!(shown(Some("other")), "default");
        assert_eq!(shown(None), "default");
    }
}
