//! How agents know each other: by certificates of a CA, in files that are read again when they change, or by keys.
//!
//! Input: the files of `--peer-cert`, `--peer-key` and `--peer-ca`, or the keys of the Leases. Output: both ends' TLS
//! configurations, and whether who asks is a peer.
//! Must never go on without a certificate: new files that cannot be used leave the old ones in use, and the log says so.

use std::{
    fs,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context as _;
use rebalancer_core::membership::KeyHash;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::verify_server_name,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::{ParsedCertificate, WebPkiClientVerifier},
};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};

use super::pin::PinnedTls;
use crate::agent::{config::PeerConfig, metrics::Amount};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// Both ends' TLS, as of one content of the files.
pub struct Both {
    /// For who asks.
    pub server: Arc<ServerConfig>,
    /// For asking.
    pub client: Arc<ClientConfig>,
    /// Counts up with each change.
    pub generation: u64,
    /// When the certificate expires, in Unix time.
    pub expires: i64,
}

/// How agents know each other.
pub enum PeerTls {
    /// By certificates for the peers' hosts.
    Files(FileTls),
    /// By keys.
    Pinned(PinnedTls),
}

impl PeerTls {
    /// For who asks.
    pub fn server(&self) -> Arc<ServerConfig> {
        match self {
            Self::Files(files) => Arc::clone(&files.current().server),
            Self::Pinned(pinned) => pinned.server(),
        }
    }

    /// For asking, with a number that is another one when it is to be asked anew.
    ///
    /// # Errors
    ///
    /// There is nothing to know that peer by.
    pub fn client(&self, pin: Option<KeyHash>) -> anyhow::Result<(Arc<ClientConfig>, u64)> {
        match (self, pin) {
            (Self::Files(files), _) => {
                let current = files.current();
                Ok((Arc::clone(&current.client), current.generation))
            }
            (Self::Pinned(pinned), Some(pin)) => Ok((pinned.client(pin)?, 0)),
            (Self::Pinned(_), None) => anyhow::bail!("its key is not known"),
        }
    }

    /// Another value when connections are to be made anew.
    pub fn generation(&self) -> u64 {
        match self {
            Self::Files(files) => files.current().generation,
            Self::Pinned(_) => 0,
        }
    }

    /// Whether who shows that certificate may ask now.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn admits(&self, certificate: Option<&CertificateDer<'_>>) -> Result<(), String> {
        match self {
            Self::Files(files) => is_a_peer(certificate, &files.hosts),
            Self::Pinned(pinned) => pinned.admits(certificate),
        }
    }
}

/// Whether the certificate is for one of the hosts: the one an agent answers with is the one it asks with.
fn is_a_peer(certificate: Option<&CertificateDer<'_>>, hosts: &[ServerName<'_>]) -> Result<(), String> {
    let certificate = certificate.ok_or("it shows no certificate")?;
    let parsed = ParsedCertificate::try_from(certificate).map_err(|error| error.to_string())?;
    if hosts.iter().any(|host| verify_server_name(&parsed, host).is_ok()) {
        return Ok(());
    }
    let hosts: Vec<_> = hosts.iter().map(ServerName::to_str).collect();
    Err(format!(
        "the client's certificate is for none of this agent's peers ({}): each agent's certificate names the host its \
         peers reach it by",
        hosts.join(", ")
    ))
}

/// The files, and what was made of them.
pub struct FileTls {
    files: PeerConfig,
    hosts: Vec<ServerName<'static>>,
    current: RwLock<(Arc<Both>, Contents)>,
}

/// The files' octets, to notice a change whatever the clock and the file system say.
type Contents = [Vec<u8>; 3];

impl FileTls {
    /// Loads certificate, key and CA.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what is wrong.
    pub fn load(files: &PeerConfig) -> anyhow::Result<Self> {
        let contents = read(files)?;
        let both = Arc::new(make(files, &contents, 0)?);
        Ok(Self {
            files: files.clone(),
            hosts: files.addresses.iter().map(|peer| peer.server_name.clone()).collect(),
            current: RwLock::new((both, contents)),
        })
    }

    /// What new connections use.
    pub fn current(&self) -> Arc<Both> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Loads the files again when they have changed, and says whether they have.
    ///
    /// # Errors
    ///
    /// As [`Self::load`]; what is in use stays.
    pub fn reload(&self) -> anyhow::Result<bool> {
        let contents = read(&self.files)?;
        let generation = {
            let (both, before) = &*self.current.read().unwrap_or_else(PoisonError::into_inner);
            if *before == contents {
                return Ok(false);
            }
            both.generation + 1
        };
        let both = Arc::new(make(&self.files, &contents, generation)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = (both, contents);
        Ok(true)
    }
}

/// Looks at the files for as long as the agent runs.
pub async fn keep_fresh(tls: Arc<PeerTls>, expiry: Amount) {
    if matches!(*tls, PeerTls::Pinned(_)) {
        return;
    }
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said = String::new();
    loop {
        ticks.tick().await;
        let shared = Arc::clone(&tls);
        // A file system may hang.
        let reloaded = spawn_blocking(move || match &*shared {
            PeerTls::Files(files) => files.reload(),
            PeerTls::Pinned(_) => Ok(false),
        })
        .await;
        match reloaded.unwrap_or_else(|panicked| Err(panicked.into())) {
            Ok(changed) => {
                if changed {
                    tracing::info!("the agents' certificates have changed: new connections use them");
                }
                said.clear();
            }
            Err(error) => {
                let error = format!("{error:#}");
                if error != said {
                    tracing::error!(error, "changed certificates cannot be used: those in use stay");
                    said = error;
                }
            }
        }
        if let PeerTls::Files(files) = &*tls {
            expiry.set(files.current().expires as f64);
        }
    }
}

fn read(files: &PeerConfig) -> anyhow::Result<Contents> {
    let read =
        |flag: &str, path: &Path| fs::read(path).with_context(|| format!("{flag} {}: cannot read it", path.display()));
    Ok([
        read("--peer-cert", &files.certificate)?,
        read("--peer-key", &files.key)?,
        read("--peer-ca", &files.ca)?,
    ])
}

fn make(files: &PeerConfig, [certificate, key, ca]: &Contents, generation: u64) -> anyhow::Result<Both> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = certificates(certificate, &files.certificate, "--peer-cert")?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .with_context(|| format!("--peer-key {}: cannot read a private key (PEM)", files.key.display()))?;
    let mismatch = || {
        format!(
            "--peer-cert {} and --peer-key {} do not belong together",
            files.certificate.display(),
            files.key.display()
        )
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca, &files.ca, "--peer-ca")? {
        roots
            .add(certificate)
            .with_context(|| format!("--peer-ca {}: not a CA certificate", files.ca.display()))?;
    }
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
        .build()
        .with_context(|| format!("--peer-ca {}: not usable", files.ca.display()))?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&chain[0])
        .with_context(|| format!("--peer-cert {}: not an X.509 certificate", files.certificate.display()))?;
    let expires = parsed.validity().not_after.timestamp();
    Ok(Both {
        server: Arc::new(
            ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()?
                .with_client_cert_verifier(verifier)
                .with_single_cert(chain.clone(), key.clone_key())
                .with_context(mismatch)?,
        ),
        client: Arc::new(
            ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_client_auth_cert(chain, key)
                .with_context(mismatch)?,
        ),
        generation,
        expires,
    })
}

fn certificates(pem: &[u8], path: &Path, flag: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .with_context(|| format!("{flag} {}: cannot read certificates (PEM)", path.display()))?;
    anyhow::ensure!(
        !found.is_empty(),
        "{flag} {}: there is no certificate in it",
        path.display()
    );
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_a_peers_when_it_names_a_peers_host() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let names = vec!["cp-2.example.test".to_owned(), "192.0.2.2".to_owned()];
        let parameters = rcgen::CertificateParams::new(names).expect("parameters");
        let certificate = parameters.self_signed(&key).expect("a certificate");
        let host = |text: &str| ServerName::try_from(text.to_owned()).expect("a host");
        let check = |hosts: &[ServerName<'_>]| is_a_peer(Some(certificate.der()), hosts);
        assert_eq!(check(&[host("192.0.2.3"), host("192.0.2.2")]), Ok(()));
        assert_eq!(check(&[host("cp-2.example.test")]), Ok(()));
        let said = check(&[host("cp-3.example.test"), host("2001:db8::1")]).expect_err("a kubelet's");
        assert!(said.contains("cp-3.example.test, 2001:db8::1"), "{said}");
        assert!(is_a_peer(None, &[host("cp-2.example.test")]).is_err());
    }
}
