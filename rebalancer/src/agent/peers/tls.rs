//! Certificate, key and CA of the agents' talk, read again when the files change.
//!
//! Input: the files of `--peer-cert`, `--peer-key` and `--peer-ca`. Output: both ends' TLS configurations.
//! Must never go on without a certificate: new files that cannot be used leave the old ones in use, and the log says so.

use std::{
    fs,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context as _;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};

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

/// The files, and what was made of them.
pub struct PeerTls {
    files: PeerConfig,
    current: RwLock<(Arc<Both>, Contents)>,
}

/// The files' octets, to notice a change whatever the clock and the file system say.
type Contents = [Vec<u8>; 3];

impl PeerTls {
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
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said = String::new();
    loop {
        ticks.tick().await;
        let shared = Arc::clone(&tls);
        // A file system may hang.
        let reloaded = spawn_blocking(move || shared.reload()).await;
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
        expiry.set(tls.current().expires as f64);
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
