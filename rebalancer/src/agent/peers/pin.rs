//! TLS between agents that know each other by their keys: SHA-256 of each public key is in its Lease.
//!
//! Job: make this process's key, and accept nobody else's than those it is told of, whoever asks or answers.
//! Input: the keys of the roll. Output: TLS configurations for both ends. Must never look at a clock or at a name: a
//! certificate here is an envelope for a key, and a key that leaves the roll is refused from then on.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use anyhow::Context as _;
use rebalancer_core::membership::KeyHash;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, ServerConfig,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    version::TLS13,
};

/// The key this process made, in a certificate.
pub struct Identity {
    /// What the others know it by.
    pub hash: KeyHash,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Makes one: an ECDSA key on P-256.
    ///
    /// # Errors
    ///
    /// The system gives no randomness.
    pub fn make() -> anyhow::Result<Self> {
        let pair = rcgen::KeyPair::generate().context("cannot make a key for the agents' talk")?;
        let mut envelope = rcgen::CertificateParams::default();
        envelope
            .distinguished_name
            .push(rcgen::DnType::CommonName, "rebalancer agent");
        let certificate: CertificateDer<'static> = envelope
            .self_signed(&pair)
            .context("cannot make a certificate for the agents' talk")?
            .into();
        Ok(Self {
            hash: hash_of(&certificate)?,
            certificate,
            key: PrivatePkcs8KeyDer::from(pair.serialize_der()).into(),
        })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.hash).finish()
    }
}

/// SHA-256 of the certificate's public key.
fn hash_of(certificate: &CertificateDer<'_>) -> Result<KeyHash, Error> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, parsed.public_key().raw);
    let octets =
        <[u8; 32]>::try_from(digest.as_ref()).map_err(|_| Error::General("SHA-256 has 32 octets".to_owned()))?;
    Ok(KeyHash::new(octets))
}

/// Both ends' TLS.
#[derive(Debug)]
pub struct PinnedTls {
    identity: Identity,
    provider: Arc<CryptoProvider>,
    known: Arc<RwLock<BTreeSet<KeyHash>>>,
    server: Arc<ServerConfig>,
}

impl PinnedTls {
    /// With that key, and nobody known yet.
    ///
    /// # Errors
    ///
    /// The key cannot be used.
    pub fn new(identity: Identity) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let known = Arc::<RwLock<BTreeSet<KeyHash>>>::default();
        let verifier = Pins {
            provider: Arc::clone(&provider),
            known: Arc::clone(&known),
        };
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())
            .context("the key for the agents' talk")?;
        Ok(Self {
            identity,
            provider,
            known,
            server: Arc::new(server),
        })
    }

    /// Lets these ask from now on, and nobody else.
    pub fn know(&self, keys: BTreeSet<KeyHash>) {
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// For who asks.
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For asking the holder of that key.
    ///
    /// # Errors
    ///
    /// The own key cannot be used.
    pub fn client(&self, pin: KeyHash) -> anyhow::Result<Arc<ClientConfig>> {
        let verifier = Pins {
            provider: Arc::clone(&self.provider),
            known: Arc::new(RwLock::new(BTreeSet::from([pin]))),
        };
        let config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(vec![self.identity.certificate.clone()], self.identity.key.clone_key())?;
        Ok(Arc::new(config))
    }

    /// Whether that certificate's key is one of the roll now.
    ///
    /// # Errors
    ///
    /// It is not, in words.
    pub fn admits(&self, certificate: Option<&CertificateDer<'_>>) -> Result<(), String> {
        let certificate = certificate.ok_or("it shows no certificate")?;
        is_known(certificate, &self.known).map_err(|error| error.to_string())
    }
}

/// A key that is in no Lease.
#[derive(thiserror::Error)]
#[error("its key {0:.8} is in no agent's Lease that is believed here")]
struct Unknown(KeyHash);

impl fmt::Debug for Unknown {
    /// In words: rustls shows errors that it does not know like this.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn is_known(certificate: &CertificateDer<'_>, known: &RwLock<BTreeSet<KeyHash>>) -> Result<(), Error> {
    let hash = hash_of(certificate)?;
    if known.read().unwrap_or_else(PoisonError::into_inner).contains(&hash) {
        return Ok(());
    }
    let other = OtherError(Arc::new(Unknown(hash)));
    Err(Error::InvalidCertificate(CertificateError::Other(other)))
}

/// Takes certificates for their keys, and asks for a proof of the key.
#[derive(Debug)]
struct Pins {
    provider: Arc<CryptoProvider>,
    known: Arc<RwLock<BTreeSet<KeyHash>>>,
}

impl Pins {
    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn only_tls13() -> Error {
    Error::General("agents speak TLS 1.3 only".to_owned())
}

impl ServerCertVerifier for Pins {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        is_known(certificate, &self.known).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Pins {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        is_known(certificate, &self.known).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use rustls::{ClientConnection, ServerConnection};

    use super::*;

    fn agent() -> PinnedTls {
        PinnedTls::new(Identity::make().expect("a key")).expect("TLS")
    }

    /// Both ends' handshake in memory, then one octet from the client: whether the server read it.
    fn talk(server: &PinnedTls, client: Arc<ClientConfig>) -> Result<u8, Error> {
        let mut server = ServerConnection::new(server.server()).expect("a server");
        let name = ServerName::try_from("192.0.2.1").expect("a name");
        let mut client = ClientConnection::new(client, name).expect("a client");
        client.writer().write_all(b"x").expect("a buffer");
        let (mut there, mut back) = (Vec::new(), Vec::new());
        for _ in 0..10 {
            there.clear();
            client.write_tls(&mut there).expect("memory");
            server.read_tls(&mut there.as_slice()).expect("memory");
            server.process_new_packets()?;
            back.clear();
            server.write_tls(&mut back).expect("memory");
            client.read_tls(&mut back.as_slice()).expect("memory");
            client.process_new_packets()?;
        }
        let mut octet = [0];
        server.reader().read_exact(&mut octet).expect("an octet");
        Ok(octet[0])
    }

    #[test]
    fn agents_that_know_each_others_keys_talk_and_nobody_else_does() {
        let (a, b, c) = (agent(), agent(), agent());
        let ask = |of: &PinnedTls, pin: &PinnedTls| of.client(pin.identity.hash).expect("TLS");
        assert!(talk(&b, ask(&a, &b)).is_err(), "b knows nobody");
        b.know(BTreeSet::from([a.identity.hash]));
        assert_eq!(talk(&b, ask(&a, &b)), Ok(b'x'));
        assert!(talk(&b, ask(&c, &b)).is_err_and(|error| error.to_string().contains("in no agent's Lease")));
        assert!(talk(&b, ask(&a, &c)).is_err(), "it asked for c, and b answered");
        b.know(BTreeSet::from([c.identity.hash]));
        assert!(talk(&b, ask(&a, &b)).is_err(), "a has left the roll");
        assert!(b.admits(Some(&a.identity.certificate)).is_err());
        assert!(b.admits(Some(&c.identity.certificate)).is_ok());
        assert!(b.admits(None).is_err());
    }

    /// The key's owner is who signs: a certificate alone, which everybody may see, is worth nothing.
    #[test]
    fn a_certificate_without_its_key_is_refused() {
        let (a, b) = (agent(), agent());
        b.know(BTreeSet::from([a.identity.hash]));
        let thief = PinnedTls::new(Identity {
            hash: a.identity.hash,
            certificate: a.identity.certificate.clone(),
            key: b.identity.key.clone_key(),
        });
        assert!(thief.is_err(), "rustls notices that they do not belong together");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = provider
            .key_provider
            .load_private_key(Identity::make().expect("a key").key)
            .expect("a key");
        let chain = rustls::sign::CertifiedKey::new(vec![a.identity.certificate.clone()], key);
        let verifier = Pins {
            provider: Arc::clone(&provider),
            known: Arc::new(RwLock::new(BTreeSet::from([b.identity.hash]))),
        };
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(chain)));
        assert!(talk(&b, Arc::new(client)).is_err());
    }
}
