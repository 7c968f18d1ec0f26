//! More serving certificates, chosen as kube-apiserver's `--tls-sni-cert-key` has it: by the name a client asks for (SNI),
//! or without one by the address it came to
//! (k8s.io/apiserver/pkg/server/dynamiccertificates/named_certificates.go, tlsconfig.go; crypto/tls, `getCertificate`).
//!
//! Input: the flag and the certificates. Output: one certificate a handshake.
//! Must never leave a client without a certificate: whoever asks for an unknown name gets the default one.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use rebalancer_core::wire::x509::Certificate;
use rustls::{
    SignatureScheme,
    pki_types::CertificateDer,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

mod flag;

use super::trust::AwsLc;
pub use flag::SniFiles;

/// The names of a certificate for clients that ask: its common name unless that is an address or no name, and its DNS
/// names.
pub fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(parsed) = Certificate::parse(certificate, &AwsLc) else {
        return Vec::new();
    };
    let common = Some(parsed.name().common_name()).filter(|name| !is_address(name) && is_domain(name));
    common
        .into_iter()
        .chain(parsed.dns_names().iter().map(String::as_str))
        .map(str::to_owned)
        .collect()
}

/// As k8s.io/utils/net, `ParseIPSloppy`: numbers of an IPv4 address may begin with zeroes.
fn is_address(name: &str) -> bool {
    let number = |part: &str| (1..=3).contains(&part.len()) && part.parse::<u8>().is_ok();
    name.parse::<IpAddr>().is_ok()
        || name.split('.').count() == Ipv4Addr::BITS as usize / 8 && name.split('.').all(number)
}

/// As k8s.io/apimachinery/pkg/util/validation, `IsDNS1123Subdomain`, after a `*.`; or `*` itself.
fn is_domain(name: &str) -> bool {
    let rest = name.strip_prefix("*.").unwrap_or(name);
    let label = |label: &str| {
        let inner = |octet: u8| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-';
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(inner)
    };
    name == "*" || rest.len() <= 253 && rest.split('.').all(label)
}

/// A certificate and the hosts it is for.
#[derive(Clone, Debug)]
struct Shown {
    key: Arc<CertifiedKey>,
    parsed: Option<Arc<Certificate>>,
}

impl Shown {
    fn new(key: CertifiedKey) -> Self {
        let parsed = key.cert.first().and_then(|leaf| Certificate::parse(leaf, &AwsLc).ok());
        Self {
            key: Arc::new(key),
            parsed: parsed.map(Arc::new),
        }
    }

    fn suits(&self, host: Option<&str>, schemes: &[SignatureScheme]) -> bool {
        let named = host.is_none_or(|host| self.parsed.as_ref().is_some_and(|parsed| parsed.is_for_host(host)));
        named && self.key.key.choose_scheme(schemes).is_some()
    }
}

/// Chooses by name.
#[derive(Clone, Debug)]
pub struct ByName {
    default: Shown,
    /// Those of the flags, in their order.
    others: Vec<Shown>,
    /// Names the flags say, and then those the certificates of the other flags hold; the first flag's count.
    named: HashMap<String, usize>,
    held: HashMap<String, usize>,
    /// Shown to clients that ask for no name.
    nameless: Option<usize>,
}

impl ByName {
    /// With the certificate for every other name.
    pub fn new(default: CertifiedKey) -> Self {
        Self {
            default: Shown::new(default),
            others: Vec::new(),
            named: HashMap::new(),
            held: HashMap::new(),
            nameless: None,
        }
    }

    /// Shows that certificate for the flag's names, or without any for those it holds.
    pub fn add(&mut self, names: &[String], key: CertifiedKey) {
        let index = self.others.len();
        let held = if names.is_empty() {
            names_of(&key.cert[0])
        } else {
            Vec::new()
        };
        self.others.push(Shown::new(key));
        for name in names {
            self.named.entry(name.clone()).or_insert(index);
        }
        for name in held {
            self.held.entry(name).or_insert(index);
        }
    }

    /// The same for clients that come to one of the addresses the flags name, each with its address.
    pub fn by_address(&self) -> impl Iterator<Item = (IpAddr, Self)> + '_ {
        self.named.iter().filter_map(|(name, index)| {
            let address: IpAddr = name.parse().ok()?;
            let shown = Self {
                nameless: Some(*index),
                ..self.clone()
            };
            Some((address, shown))
        })
    }

    fn find(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> &Arc<CertifiedKey> {
        let lower = name.map(str::to_ascii_lowercase);
        let by_name = |name: &str| self.named.get(name).or_else(|| self.held.get(name));
        let index = match &lower {
            Some(name) => by_name(name).or_else(|| {
                let rest = name
                    .split_once('.')
                    .map_or(String::new(), |(_, rest)| format!(".{rest}"));
                by_name(&format!("*{rest}"))
            }),
            None => self.nameless.as_ref(),
        };
        if let Some(shown) = index.and_then(|index| self.others.get(*index)) {
            return &shown.key;
        }
        // Go then takes the first that is for that host and that the client can verify.
        let mut all = [&self.default].into_iter().chain(&self.others);
        let suitable = all.find(|shown| shown.suits(lower.as_deref(), schemes));
        &suitable.unwrap_or(&self.default).key
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(self.find(hello.server_name(), hello.signature_schemes())))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    const SCHEMES: [SignatureScheme; 1] = [SignatureScheme::ECDSA_NISTP256_SHA256];

    fn certified(common: &str, names: &[&str]) -> CertifiedKey {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common);
        let certificate = params.self_signed(&key).expect("a certificate");
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        CertifiedKey::from_der(vec![certificate.der().clone()], private, &provider).expect("they belong together")
    }

    #[test]
    fn names_come_from_the_certificate() {
        let names = |common, names: &[&str]| names_of(&certified(common, names).cert[0]);
        assert_eq!(
            names("common.example", &["a.example", "*.b.example"]),
            ["common.example", "a.example", "*.b.example"]
        );
        assert_eq!(names("*.example", &[]), ["*.example"]);
        assert_eq!(names("*", &[]), ["*"]);
        for no_name in [
            "192.0.2.1",
            "192.000.2.1",
            "2001:db8::1",
            "kube apiserver",
            "Upper.example",
            "a_b",
            "-a",
        ] {
            assert_eq!(names(no_name, &["a"]), ["a"], "{no_name}");
        }
    }

    #[test]
    fn the_best_match_wins_as_at_the_apiserver() {
        let mut chooser = ByName::new(certified("default", &["default.example"]));
        let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        chooser.add(&[], certified("wild", &["*.b.example"]));
        chooser.add(
            &named(&["a.b.example", "*.b.example"]),
            certified("first", &["one.example"]),
        );
        chooser.add(
            &named(&["a.b.example", "192.0.2.1", "2001:db8::1"]),
            certified("second", &["two.example"]),
        );
        chooser.add(&named(&["*"]), certified("single", &[]));
        let common = |key: &Arc<CertifiedKey>| {
            let parsed = Certificate::parse(&key.cert[0], &AwsLc).expect("it parses");
            parsed.name().common_name().to_owned()
        };
        let shown = |name: Option<&str>| common(chooser.find(name, &SCHEMES));
        // What a flag says comes before what a certificate holds, and the first flag before the second.
        assert_eq!(shown(Some("a.b.example")), "first");
        assert_eq!(shown(Some("A.B.example")), "first");
        assert_eq!(shown(Some("c.b.example")), "first");
        assert_eq!(shown(Some("d.c.b.example")), "default");
        assert_eq!(shown(Some("localhost")), "single");
        assert_eq!(shown(Some("other.example")), "default");
        assert_eq!(shown(None), "default");
        // No flag says this name, and a certificate that was given another one is for it.
        assert_eq!(shown(Some("two.example")), "second");
        assert_eq!(shown(Some("default.example")), "default");
        let by_address: HashMap<IpAddr, ByName> = chooser.by_address().collect();
        for address in ["192.0.2.1", "2001:db8::1"] {
            let chooser = &by_address[&address.parse::<IpAddr>().expect("an address")];
            assert_eq!(common(chooser.find(None, &SCHEMES)), "second");
            assert_eq!(common(chooser.find(Some("a.b.example"), &SCHEMES)), "first");
        }
        assert_eq!(by_address.len(), 2);
    }
}
