//! Both sides' TLS: the apiserver's certificate towards clients, the front-proxy certificate towards the apiserver.
//!
//! Input: PEM files. Output: rustls configurations, made anew when a file changes.
//! Must never use the front-proxy certificate for a client that brought no valid certificate of its own.

use std::{
    collections::HashMap,
    fmt, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use anyhow::Context as _;
use rustls::{
    ClientConfig, ConfigBuilder, ServerConfig, WantsVerifier,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};

use super::{
    identity::sha256,
    renewal::FrontProxy,
    request_headers::RequestHeaders,
    sni::{ByName, SniFiles},
    trust::{self, Authorities, ClientCertificates, PROXY_CA, ServerCertificates, certificates},
};

/// The protocols of the front door, best first.
pub const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

const CLIENT_CA: &str = "--client-ca";
const PROXY_CERTIFICATE: &str = "--proxy-client-cert";
const PROXY_KEY: &str = "--proxy-client-key";
const UPSTREAM_CA: &str = "--upstream-ca";

/// The PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The serving certificate and its chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// More serving certificates, by name.
    pub sni: Vec<SniFiles>,
    /// Who signs client certificates.
    pub client_ca: PathBuf,
    /// Who signs the certificates of front proxies, if any are believed.
    pub proxy_ca: Option<PathBuf>,
    /// The front-proxy client certificate.
    pub proxy_certificate: PathBuf,
    /// Its key.
    pub proxy_key: PathBuf,
    /// Who signs the apiserver's certificate.
    pub upstream_ca: PathBuf,
}

impl Files {
    /// Whether a relay would start with them.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what is wrong with it.
    pub fn check(&self, headers: &RequestHeaders) -> anyhow::Result<()> {
        Tls::load(self, &Arc::new(headers.clone()), 0).map(drop)
    }

    /// The first certificate that clients are shown, as it is (DER).
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn shown(&self) -> anyhow::Result<CertificateDer<'static>> {
        // The chain has at least one.
        Ok(certificates(&self.certificate, "--tls-cert")?.swap_remove(0))
    }

    /// Each with its flag.
    fn all(&self) -> Vec<(&'static str, &Path)> {
        let sni = self.sni.iter().flat_map(|files| [&files.certificate, &files.key]);
        let mut all: Vec<(&str, &Path)> = sni.map(|path| ("--tls-sni-cert-key", path.as_path())).collect();
        all.extend([
            ("--tls-cert", self.certificate.as_path()),
            ("--tls-key", self.key.as_path()),
            (CLIENT_CA, self.client_ca.as_path()),
            (PROXY_CERTIFICATE, self.proxy_certificate.as_path()),
            (PROXY_KEY, self.proxy_key.as_path()),
            (UPSTREAM_CA, self.upstream_ca.as_path()),
        ]);
        all.extend(self.proxy_ca.as_deref().map(|path| (PROXY_CA, path)));
        all
    }
}

/// Configurations that belong together.
pub struct Tls {
    /// Towards clients.
    server: Arc<ServerConfig>,
    /// The same for clients that come to an address which a certificate is named for.
    by_address: HashMap<IpAddr, Arc<ServerConfig>>,
    /// Towards the apiserver, for a client whose certificate named somebody.
    pub front_proxy: Arc<ClientConfig>,
    /// Which certificate that shows.
    pub front_proxy_certificate: FrontProxy,
    /// Towards the apiserver, for everybody else.
    pub anonymous: Arc<ClientConfig>,
    /// Who vouches for clients.
    pub authorities: Authorities,
    /// Counts the changes of [`Self::authorities`].
    pub generation: u64,
}

impl Tls {
    /// Towards a client that came to that address.
    pub fn server(&self, local: IpAddr) -> Arc<ServerConfig> {
        Arc::clone(self.by_address.get(&local.to_canonical()).unwrap_or(&self.server))
    }

    fn load(files: &Files, headers: &Arc<RequestHeaders>, generation: u64) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let authorities = Authorities::load(&files.client_ca, files.proxy_ca.as_deref(), Arc::clone(headers))?;
        let serving = serving(files, &provider)?;
        let by_address: Vec<(IpAddr, ByName)> = serving.by_address().collect();
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(Arc::new(ClientCertificates::new(&authorities)))
            .with_cert_resolver(Arc::new(serving));
        server.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
        let at = |(address, serving): (IpAddr, ByName)| {
            let mut server = server.clone();
            server.cert_resolver = Arc::new(serving);
            (address.to_canonical(), Arc::new(server))
        };
        let by_address = by_address.into_iter().map(at).collect();

        let upstream = ServerCertificates::new(trust::readable_bundle(&files.upstream_ca, UPSTREAM_CA)?);
        let towards_upstream = || {
            let builder = ClientConfig::builder_with_provider(Arc::clone(&provider));
            // As client-go judges it: see there.
            let judged = |builder: ConfigBuilder<ClientConfig, WantsVerifier>| {
                builder.dangerous().with_custom_certificate_verifier(upstream.clone())
            };
            builder.with_safe_default_protocol_versions().map(judged)
        };
        let proxy_chain = certificates(&files.proxy_certificate, PROXY_CERTIFICATE)?;
        let front_proxy_certificate = FrontProxy::of(&proxy_chain);
        let front_proxy = towards_upstream()?
            .with_client_auth_cert(proxy_chain, key(&files.proxy_key, PROXY_KEY)?)
            .with_context(|| {
                format!(
                    "--proxy-client-cert {} and --proxy-client-key {} do not belong together",
                    files.proxy_certificate.display(),
                    files.proxy_key.display()
                )
            })?;
        Ok(Self {
            server: Arc::new(server),
            by_address,
            front_proxy: Arc::new(front_proxy),
            front_proxy_certificate,
            anonymous: Arc::new(towards_upstream()?.with_no_client_auth()),
            authorities,
            generation,
        })
    }
}

/// The serving certificates.
fn serving(files: &Files, provider: &CryptoProvider) -> anyhow::Result<ByName> {
    let certified = |certificate: &Path, private: &Path, flags: [&str; 2]| {
        CertifiedKey::from_der(certificates(certificate, flags[0])?, key(private, flags[1])?, provider).with_context(
            || {
                let both = match flags {
                    [same, other] if same == other => same.to_owned(),
                    [first, second] => format!("{first}, {second}"),
                };
                format!(
                    "{both}: {} and {} do not belong together",
                    certificate.display(),
                    private.display()
                )
            },
        )
    };
    let mut by_name = ByName::new(certified(&files.certificate, &files.key, ["--tls-cert", "--tls-key"])?);
    for sni in &files.sni {
        let key = certified(&sni.certificate, &sni.key, ["--tls-sni-cert-key"; 2])?;
        by_name.add(&sni.names, key);
    }
    Ok(by_name)
}

/// The configurations in use, and what they were made from.
pub struct Reloader {
    files: Files,
    headers: Arc<RequestHeaders>,
    /// With the hash of each file: nobody keeps a key that could be printed.
    current: RwLock<(Arc<Tls>, Vec<Vec<u8>>)>,
}

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloader")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl Reloader {
    /// Loads all files.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what is wrong with it.
    pub fn new(files: Files, headers: Arc<RequestHeaders>) -> anyhow::Result<Self> {
        let hashes = hash_all(&files)?;
        let tls = Tls::load(&files, &headers, 0)?;
        Ok(Self {
            files,
            headers,
            current: RwLock::new((Arc::new(tls), hashes)),
        })
    }

    fn in_use(&self) -> (Arc<Tls>, Vec<Vec<u8>>) {
        self.current
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }

    /// The configurations for a new connection.
    pub fn current(&self) -> Arc<Tls> {
        Arc::clone(&self.current.read().unwrap_or_else(|poisoned| poisoned.into_inner()).0)
    }

    /// Loads the files again when one has changed; nothing uses them yet.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn look(&self) -> anyhow::Result<Option<Loaded>> {
        let hashes = hash_all(&self.files)?;
        let (current, before) = self.in_use();
        if before == hashes {
            return Ok(None);
        }
        let all = self.files.all();
        let mut files = all.iter().zip(before.iter().zip(&hashes));
        let authorities =
            files.any(|((flag, _), (before, after))| [CLIENT_CA, PROXY_CA].contains(flag) && before != after);
        let tls = Tls::load(&self.files, &self.headers, current.generation + u64::from(authorities))?;
        let is_renewed = tls.front_proxy_certificate.issue != current.front_proxy_certificate.issue;
        Ok(Some(Loaded {
            is_renewed,
            tls,
            hashes,
            authorities,
        }))
    }

    /// New connections use them from now on; connections that are open stay.
    pub fn adopt(&self, loaded: Loaded) -> Changed {
        let Loaded {
            tls,
            hashes,
            authorities,
            ..
        } = loaded;
        *self.current.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = (Arc::new(tls), hashes);
        if authorities {
            Changed::Authorities
        } else {
            Changed::Certificates
        }
    }

    /// The same, but the front proxy's certificate in use stays in use: the next look finds the new one again.
    pub fn adopt_others(&self, mut loaded: Loaded) -> Changed {
        let (current, before) = self.in_use();
        let hashes = loaded.hashes.iter_mut().zip(&before);
        for ((flag, _), (hash, before)) in self.files.all().iter().zip(hashes) {
            if [PROXY_CERTIFICATE, PROXY_KEY].contains(flag) {
                hash.clone_from(before);
            }
        }
        if loaded.hashes == before {
            return Changed::Nothing;
        }
        // Who signs the apiserver's certificate may be among the others.
        let mut front_proxy = ClientConfig::clone(&loaded.tls.front_proxy);
        front_proxy.client_auth_cert_resolver = Arc::clone(&current.front_proxy.client_auth_cert_resolver);
        loaded.tls.front_proxy = Arc::new(front_proxy);
        loaded.tls.front_proxy_certificate = current.front_proxy_certificate;
        self.adopt(loaded)
    }
}

/// What the files say by now.
pub struct Loaded {
    tls: Tls,
    hashes: Vec<Vec<u8>>,
    /// Who vouches for clients has changed.
    authorities: bool,
    /// The front proxy's certificate is another one.
    is_renewed: bool,
}

impl Loaded {
    /// Towards the apiserver, with the front proxy's certificate, if that is a new one.
    pub fn renewed(&self) -> Option<&Arc<ClientConfig>> {
        self.is_renewed.then_some(&self.tls.front_proxy)
    }

    /// Which front proxy's certificate it says.
    pub fn issue(&self) -> u64 {
        self.tls.front_proxy_certificate.issue
    }
}

/// What a look at the files found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// They are as they were.
    Nothing,
    /// Certificates or keys of this side's own.
    Certificates,
    /// Who vouches for clients, too: what rests on it is to be judged again.
    Authorities,
}

fn hash_all(files: &Files) -> anyhow::Result<Vec<Vec<u8>>> {
    let hash = |(flag, path): (&str, &Path)| {
        let read = fs::read(path).with_context(|| format!("{flag} {}: cannot read it", path.display()))?;
        Ok(sha256(&read))
    };
    files.all().into_iter().map(hash).collect()
}

fn key(path: &Path, flag: &str) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path)
        .with_context(|| format!("{flag} {}: cannot read a private key (PEM)", path.display()))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use tempfile::TempDir;

    use super::*;

    /// A directory in which one authority's certificate stands for all.
    fn directory() -> (TempDir, Reloader) {
        let directory = tempfile::tempdir().expect("a directory");
        let mut params = CertificateParams::new(["localhost".to_owned()]).expect("a name");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let ours = CertifiedIssuer::self_signed(params, &key).expect("a certificate");
        let at = |name: &str| directory.path().join(name);
        for name in ["ca.crt", "proxy.crt"] {
            fs::write(at(name), ours.pem()).expect("a file");
        }
        for name in ["tls.key", "proxy.key"] {
            fs::write(at(name), key.serialize_pem()).expect("a file");
        }
        let files = Files {
            certificate: at("ca.crt"),
            key: at("tls.key"),
            sni: Vec::new(),
            client_ca: at("ca.crt"),
            proxy_ca: None,
            proxy_certificate: at("proxy.crt"),
            proxy_key: at("proxy.key"),
            upstream_ca: at("ca.crt"),
        };
        let reloader = Reloader::new(files, Arc::default()).expect("readable files");
        (directory, reloader)
    }

    /// What is in use after the front proxy's files say that; whether the apiserver was to be asked about it.
    fn renewed(directory: &TempDir, reloader: &Reloader, certificate: &str, key: &str) -> (u64, bool) {
        fs::write(directory.path().join("proxy.crt"), certificate).expect("a file");
        fs::write(directory.path().join("proxy.key"), key).expect("a file");
        let loaded = reloader.look().expect("readable files").expect("another file");
        let is_asked = loaded.renewed().is_some();
        reloader.adopt(loaded);
        (reloader.current().front_proxy_certificate.issue, is_asked)
    }

    /// The apiserver does not take the new one yet; whoever signs the apiserver's own certificate is another matter.
    #[test]
    fn a_certificate_that_waits_goes_on_waiting_when_another_file_changes() {
        let (directory, reloader) = directory();
        let first = reloader.current();
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        fs::write(directory.path().join("proxy.crt"), other.cert.pem()).expect("a file");
        fs::write(directory.path().join("proxy.key"), other.signing_key.serialize_pem()).expect("a file");
        for looks in 0..3 {
            let loaded = reloader.look().expect("readable files").expect("another file");
            assert!(loaded.renewed().is_some(), "it is asked about after {looks} looks");
            assert_ne!(loaded.issue(), first.front_proxy_certificate.issue);
            let changed = reloader.adopt_others(loaded);
            let now = reloader.current();
            assert_eq!(now.front_proxy_certificate, first.front_proxy_certificate);
            assert!(
                Arc::ptr_eq(
                    &now.front_proxy.client_auth_cert_resolver,
                    &first.front_proxy.client_auth_cert_resolver
                ),
                "the key goes with its certificate"
            );
            assert_eq!(
                changed == Changed::Nothing,
                looks != 1,
                "the bundle changed before the second look"
            );
            if looks == 0 {
                let bundle = directory.path().join("ca.crt");
                let text = fs::read_to_string(&bundle).expect("a file");
                fs::write(&bundle, format!("# of the cluster\n{text}")).expect("a file");
            }
        }
    }

    /// Nobody is moved because a file was touched: tools that distribute files write comments and line ends of their own.
    #[test]
    fn a_front_proxys_certificate_that_is_written_anew_or_put_back_is_no_other() {
        let (directory, reloader) = directory();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).expect("a file");
        let (certificate, key) = (read("proxy.crt"), read("proxy.key"));
        let first = reloader.current().front_proxy_certificate.issue;
        let commented = format!("# of the front proxy\n{}", certificate.replace('\n', "\r\n"));
        assert_eq!(renewed(&directory, &reloader, &commented, &key), (first, false));

        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let (second, is_asked) = renewed(
            &directory,
            &reloader,
            &other.cert.pem(),
            &other.signing_key.serialize_pem(),
        );
        assert!(second != first && is_asked);
        let chain = other.cert.pem() + &certificate;
        let (third, is_asked) = renewed(&directory, &reloader, &chain, &other.signing_key.serialize_pem());
        assert!(
            third != second && third != first && is_asked,
            "its chain is a part of it"
        );
        assert_eq!(renewed(&directory, &reloader, &certificate, &key), (first, true));
    }
}
