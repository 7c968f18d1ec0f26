//! Both sides' TLS: the apiserver's certificate towards clients, the front-proxy certificate towards the apiserver.
//!
//! Input: PEM files. Output: rustls configurations, made anew when a file changes.
//! Must never use the front-proxy certificate for a client that brought no valid certificate of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use anyhow::Context as _;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};

use super::sni::{self, ByName, SniFiles};

/// The protocols of the front door, best first.
pub const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

const CLIENT_CA: &str = "--client-ca";

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
    /// The front-proxy client certificate.
    pub proxy_certificate: PathBuf,
    /// Its key.
    pub proxy_key: PathBuf,
    /// Who signs the apiserver's certificate.
    pub upstream_ca: PathBuf,
}

impl Files {
    /// Each with its flag.
    fn all(&self) -> Vec<(&'static str, &Path)> {
        let sni = self.sni.iter().flat_map(|files| [&files.certificate, &files.key]);
        let mut all: Vec<(&str, &Path)> = sni.map(|path| ("--tls-sni-cert-key", path.as_path())).collect();
        all.extend([
            ("--tls-cert", self.certificate.as_path()),
            ("--tls-key", self.key.as_path()),
            (CLIENT_CA, self.client_ca.as_path()),
            ("--proxy-client-cert", self.proxy_certificate.as_path()),
            ("--proxy-client-key", self.proxy_key.as_path()),
            ("--upstream-ca", self.upstream_ca.as_path()),
        ]);
        all
    }
}

/// Configurations that belong together.
#[derive(Debug)]
pub struct Tls {
    /// Towards clients.
    pub server: Arc<ServerConfig>,
    /// Towards the apiserver, for a client whose certificate named somebody.
    pub front_proxy: Arc<ClientConfig>,
    /// Towards the apiserver, for everybody else.
    pub anonymous: Arc<ClientConfig>,
    /// Counts the changes of the client CA.
    pub generation: u64,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Tls {
    /// Whether the cluster's CA vouches for this chain, now.
    pub fn verify(&self, chain: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        self.verifier
            .verify_client_cert(leaf, intermediates, UnixTime::now())
            .map(|_| ())
    }

    fn load(files: &Files, generation: u64) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots(&files.client_ca, "--client-ca")?),
            Arc::clone(&provider),
        )
        .build()
        .with_context(|| format!("--client-ca {}: not usable", files.client_ca.display()))?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(Arc::new(LateVerifier(Arc::clone(&verifier))))
            .with_cert_resolver(Arc::new(serving(files, &provider)?));
        server.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();

        let upstream = Arc::new(roots(&files.upstream_ca, "--upstream-ca")?);
        let towards_upstream = || {
            ClientConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()
                .map(|builder| builder.with_root_certificates(Arc::clone(&upstream)))
        };
        let front_proxy = towards_upstream()?
            .with_client_auth_cert(
                chain(&files.proxy_certificate, "--proxy-client-cert")?,
                key(&files.proxy_key, "--proxy-client-key")?,
            )
            .with_context(|| {
                format!(
                    "--proxy-client-cert {} and --proxy-client-key {} do not belong together",
                    files.proxy_certificate.display(),
                    files.proxy_key.display()
                )
            })?;
        Ok(Self {
            server: Arc::new(server),
            front_proxy: Arc::new(front_proxy),
            anonymous: Arc::new(towards_upstream()?.with_no_client_auth()),
            generation,
            verifier,
        })
    }
}

/// The serving certificates.
fn serving(files: &Files, provider: &CryptoProvider) -> anyhow::Result<ByName> {
    let certified = |certificate: &Path, private: &Path, flags: [&str; 2]| {
        CertifiedKey::from_der(chain(certificate, flags[0])?, key(private, flags[1])?, provider).with_context(|| {
            let both = match flags {
                [same, other] if same == other => same.to_owned(),
                [first, second] => format!("{first}, {second}"),
            };
            format!(
                "{both}: {} and {} do not belong together",
                certificate.display(),
                private.display()
            )
        })
    };
    let mut by_name = ByName::new(certified(&files.certificate, &files.key, ["--tls-cert", "--tls-key"])?);
    for sni in &files.sni {
        let key = certified(&sni.certificate, &sni.key, ["--tls-sni-cert-key"; 2])?;
        let names = if sni.names.is_empty() {
            sni::names_of(&key.cert[0])
        } else {
            sni.names.clone()
        };
        anyhow::ensure!(
            !names.is_empty(),
            "--tls-sni-cert-key {}: it holds no name; give the names after a colon",
            sni.certificate.display()
        );
        by_name.add(names, key);
    }
    Ok(by_name)
}

/// The configurations in use, and what they were made from.
#[derive(Debug)]
pub struct Reloader {
    files: Files,
    current: RwLock<(Arc<Tls>, Vec<Vec<u8>>)>,
}

impl Reloader {
    /// Loads all files.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what is wrong with it.
    pub fn new(files: Files) -> anyhow::Result<Self> {
        let contents = read_all(&files)?;
        let tls = Tls::load(&files, 0)?;
        Ok(Self {
            files,
            current: RwLock::new((Arc::new(tls), contents)),
        })
    }

    /// The configurations for a new connection.
    pub fn current(&self) -> Arc<Tls> {
        Arc::clone(&self.current.read().unwrap_or_else(|poisoned| poisoned.into_inner()).0)
    }

    /// Loads the files again when one has changed, and says whether it did; connections that are open stay.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; the configurations in use stay.
    pub fn reload(&self) -> anyhow::Result<bool> {
        let contents = read_all(&self.files)?;
        let generation = {
            let (current, before) = &*self.current.read().unwrap_or_else(|poisoned| poisoned.into_inner());
            if *before == contents {
                return Ok(false);
            }
            let files = self.files.all();
            let of_client_ca = files.iter().position(|(flag, _)| *flag == CLIENT_CA);
            let changed = of_client_ca.is_none_or(|index| before[index] != contents[index]);
            current.generation + u64::from(changed)
        };
        let tls = Arc::new(Tls::load(&self.files, generation)?);
        *self.current.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = (tls, contents);
        Ok(true)
    }
}

fn read_all(files: &Files) -> anyhow::Result<Vec<Vec<u8>>> {
    let read = |(flag, path): (&str, &Path)| {
        fs::read(path).with_context(|| format!("{flag} {}: cannot read it", path.display()))
    };
    files.all().into_iter().map(read).collect()
}

fn chain(path: &Path, flag: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .with_context(|| format!("{flag} {}: cannot read certificates (PEM)", path.display()))?;
    anyhow::ensure!(
        !certificates.is_empty(),
        "{flag} {}: there is no certificate (PEM) in it",
        path.display()
    );
    Ok(certificates)
}

fn key(path: &Path, flag: &str) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path)
        .with_context(|| format!("{flag} {}: cannot read a private key (PEM)", path.display()))
}

fn roots(path: &Path, flag: &str) -> anyhow::Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    for certificate in chain(path, flag)? {
        store
            .add(certificate)
            .with_context(|| format!("{flag} {}: a certificate in it cannot be a root", path.display()))?;
    }
    Ok(store)
}

/// Asks for a client certificate, checks that the client holds its key, and leaves the chain to [`Tls::verify`].
///
/// The apiserver asks the same way (`tls.RequestClientCert`): a client with a token and a certificate of another CA
/// must get through.
#[derive(Debug)]
struct LateVerifier(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for LateVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
