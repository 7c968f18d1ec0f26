//! Client certificates in the TLS handshake, as kube-apiserver asks for them (`tls.RequestClientCert`).
//!
//! Job: check that the client holds the key of the certificate it shows, and leave the judgement for later: a client with
//! a token and a certificate of another authority must get through. Must never end a handshake that Go would not end.

use rebalancer_core::wire::x509::{Certificate, Crypto as _, Hash, PublicKey, Scheme};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, PeerMisbehaved, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{Authorities, AwsLc};

/// The longest RSA key in a handshake (crypto/tls, `defaultMaxRSAKeySize`).
pub(super) const MAX_RSA_BITS: usize = 8192;

/// What Go takes, in its order (crypto/tls/defaults.go).
pub(super) const SCHEMES: [SignatureScheme; 10] = [
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA512,
    SignatureScheme::RSA_PKCS1_SHA256,
    SignatureScheme::RSA_PKCS1_SHA384,
    SignatureScheme::RSA_PKCS1_SHA512,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ECDSA_NISTP521_SHA512,
];

/// Asks for a certificate, and says whose are known.
#[derive(Debug)]
pub struct ClientCertificates(Vec<DistinguishedName>);

impl ClientCertificates {
    /// With the names of all authorities: some clients choose their certificate by them.
    pub fn new(authorities: &Authorities) -> Self {
        let names = authorities.certificates().map(|(_, one)| one.subject().to_vec());
        Self(names.map(DistinguishedName::from).collect())
    }
}

fn parse(der: &CertificateDer<'_>) -> Result<Certificate, rustls::Error> {
    Certificate::parse(der, &AwsLc).map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
}

pub(super) fn check(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
    scheme: Option<Scheme>,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let scheme = scheme.ok_or(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)?;
    let certificate = parse(certificate)?;
    let key = certificate.key();
    if key.fits(scheme) && AwsLc.is_signed(key, scheme, message, signed.signature()) {
        Ok(HandshakeSignatureValid::assertion())
    } else {
        Err(rustls::Error::InvalidCertificate(CertificateError::BadSignature))
    }
}

/// The scheme of a signature, which every version of TLS in use takes; RSASSA-PKCS1-v1_5 is TLS 1.2's alone.
pub(super) fn scheme(scheme: SignatureScheme, pkcs1: bool) -> Option<Scheme> {
    match scheme {
        SignatureScheme::RSA_PSS_SHA256 => Some(Scheme::RsaPss(Hash::Sha256)),
        SignatureScheme::RSA_PSS_SHA384 => Some(Scheme::RsaPss(Hash::Sha384)),
        SignatureScheme::RSA_PSS_SHA512 => Some(Scheme::RsaPss(Hash::Sha512)),
        SignatureScheme::ECDSA_NISTP256_SHA256 => Some(Scheme::Ecdsa(Hash::Sha256)),
        SignatureScheme::ECDSA_NISTP384_SHA384 => Some(Scheme::Ecdsa(Hash::Sha384)),
        SignatureScheme::ECDSA_NISTP521_SHA512 => Some(Scheme::Ecdsa(Hash::Sha512)),
        SignatureScheme::ED25519 => Some(Scheme::Ed25519),
        SignatureScheme::RSA_PKCS1_SHA256 if pkcs1 => Some(Scheme::RsaPkcs1(Hash::Sha256)),
        SignatureScheme::RSA_PKCS1_SHA384 if pkcs1 => Some(Scheme::RsaPkcs1(Hash::Sha384)),
        SignatureScheme::RSA_PKCS1_SHA512 if pkcs1 => Some(Scheme::RsaPkcs1(Hash::Sha512)),
        _ => None,
    }
}

impl ClientCertVerifier for ClientCertificates {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.0
    }

    /// What Go's `processCertsFromClient` refuses, and no more.
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let leaf = parse(leaf)?;
        if matches!(leaf.key(), PublicKey::Dsa | PublicKey::Unknown) {
            return Err(rustls::Error::General(
                "a key of a kind that TLS does not use".to_owned(),
            ));
        }
        let is_long = |one: &Certificate| one.key().rsa_bits() > Some(MAX_RSA_BITS);
        let mut long = is_long(&leaf);
        for other in others {
            long |= is_long(&parse(other)?);
        }
        if long {
            return Err(rustls::Error::General("an RSA key of more than 8192 bits".to_owned()));
        }
        Ok(ClientCertVerified::assertion())
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
