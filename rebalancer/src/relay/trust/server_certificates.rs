//! The apiserver's certificate, judged as its other clients judge it, which are Go's: by crypto/x509's rules.
//!
//! Input: what it shows. Output: whether it is the apiserver. Must never take a certificate that client-go would not, nor
//! refuse one that it takes: behind the relay nothing may work otherwise than without it.

use std::{fmt, net::IpAddr, sync::Arc};

use rebalancer_core::wire::x509::{Certificate, Pool, PublicKey, Purpose, Refused, verify};
use rustls::{
    CertificateError, DigitallySignedStruct, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::{
    AwsLc,
    client_certificates::{MAX_RSA_BITS, SCHEMES, check, scheme},
};

/// Judges by the authorities of `--upstream-ca`.
pub struct ServerCertificates(Pool);

impl ServerCertificates {
    /// Who vouches for the apiserver.
    pub fn new(authorities: Pool) -> Arc<Self> {
        Arc::new(Self(authorities))
    }
}

impl fmt::Debug for ServerCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerCertificates({})", self.0.certificates().len())
    }
}

/// Why it is not the apiserver's.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// Go ends the handshake there.
    #[error("the apiserver's certificate cannot be used: {0}")]
    Malformed(String),
    /// Nobody vouches for it.
    #[error("the apiserver's certificate: {0} (--upstream-ca)")]
    Refused(Refused),
    /// It is another host's.
    #[error("the apiserver's certificate is for {0:?}, not for {1} (--upstream-server-name)")]
    Host(Vec<String>, String),
}

fn refused(why: Refusal) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

fn parse(der: &CertificateDer<'_>) -> Result<Certificate, rustls::Error> {
    let parsed = Certificate::parse(der, &AwsLc).map_err(|error| refused(Refusal::Malformed(error.to_string())))?;
    if parsed.key().rsa_bits() > Some(MAX_RSA_BITS) {
        let why = "an RSA key of more than 8192 bits".to_owned();
        return Err(refused(Refusal::Malformed(why)));
    }
    Ok(parsed)
}

impl ServerCertVerifier for ServerCertificates {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let leaf = parse(leaf)?;
        let others = others.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        if matches!(leaf.key(), PublicKey::Dsa | PublicKey::Unknown) {
            let why = "a key of a kind that TLS does not use".to_owned();
            return Err(refused(Refusal::Malformed(why)));
        }
        let now = i128::from(now.as_secs()) * 1_000_000_000;
        let verified = verify(&leaf, &Pool::new(others), &self.0, Purpose::Server, now, &AwsLc);
        verified.map_err(|why| refused(Refusal::Refused(why)))?;
        let is_its = match name {
            ServerName::IpAddress(address) => leaf.is_for_address(IpAddr::from(*address)),
            _ => leaf.is_for_host(&name.to_str()),
        };
        if !is_its {
            return Err(refused(Refusal::Host(
                leaf.dns_names().to_vec(),
                name.to_str().into_owned(),
            )));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check(message, certificate, signed, scheme(signed.scheme, true))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check(message, certificate, signed, scheme(signed.scheme, false))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}
