//! One certificate, parsed as Go's `x509.ParseCertificate` parses it.
//!
//! Input: DER. Output: what path checks and names need. Must never take what Go calls malformed: a handshake ends
//! there as it does at the apiserver.

use std::{net::IpAddr, ops::Range};

use super::{
    Crypto,
    der::{Der, tag},
    extension::Extensions,
    key::{self, PublicKey, Scheme},
    name::Name,
};

/// A certificate.
#[derive(Clone, Debug)]
pub struct Certificate {
    raw: Vec<u8>,
    signed: Range<usize>,
    issuer: Range<usize>,
    subject: Range<usize>,
    spki: Range<usize>,
    /// Counted from 1.
    pub(super) version: u8,
    /// How it is signed; `None` when in a way that nobody believes.
    pub(super) scheme: Option<Scheme>,
    pub(super) signature: Vec<u8>,
    /// Seconds since 1970.
    pub(super) not_before: i64,
    /// Seconds since 1970.
    pub(super) not_after: i64,
    name: Name,
    key: PublicKey,
    pub(super) extensions: Extensions,
}

/// It is not a certificate, or not one that Go parses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the certificate is malformed: its {0}")]
pub struct Malformed(pub &'static str);

impl Certificate {
    /// Parses exactly one.
    ///
    /// # Errors
    ///
    /// Which part is malformed.
    pub fn parse(der: &[u8], crypto: &dyn Crypto) -> Result<Self, Malformed> {
        const OUTER: Malformed = Malformed("outermost sequence");
        let mut rest = Der(der);
        let mut outer = rest.read(tag::SEQUENCE).ok_or(OUTER)?;
        if !rest.is_empty() {
            return Err(OUTER);
        }
        let signed = outer.element(tag::SEQUENCE).ok_or(Malformed("part that is signed"))?;
        let mut fields = Der(signed.content);
        let version = version(&mut fields).ok_or(Malformed("version"))?;
        let serial = fields.integer(tag::INTEGER);
        if serial.is_none_or(|number| number[0] & 0x80 != 0) {
            return Err(Malformed("serial number"));
        }
        const ALGORITHM: Malformed = Malformed("signature algorithm");
        let inner = fields.read(tag::SEQUENCE).ok_or(ALGORITHM)?;
        let outside = outer.read(tag::SEQUENCE).ok_or(ALGORITHM)?;
        if inner.0 != outside.0 {
            return Err(ALGORITHM);
        }
        let (oid, parameters) = key::read_algorithm(inner).ok_or(ALGORITHM)?;
        let scheme = key::scheme(oid, parameters);
        const ISSUER: Malformed = Malformed("issuer");
        let issuer = fields.element(tag::SEQUENCE).ok_or(ISSUER)?.whole;
        Name::read(issuer).ok_or(ISSUER)?;
        const VALIDITY: Malformed = Malformed("validity");
        let mut validity = fields.read(tag::SEQUENCE).ok_or(VALIDITY)?;
        let not_before = validity.time().ok_or(VALIDITY)?;
        let not_after = validity.time().ok_or(VALIDITY)?;
        const SUBJECT: Malformed = Malformed("subject");
        let subject = fields.element(tag::SEQUENCE).ok_or(SUBJECT)?.whole;
        let name = Name::read(subject).ok_or(SUBJECT)?;
        const KEY: Malformed = Malformed("public key");
        let spki = fields.element(tag::SEQUENCE).ok_or(KEY)?;
        let key = public_key(Der(spki.content), crypto).ok_or(KEY)?;
        let extensions = extensions(version, &mut fields)?;
        let signature = outer.bits().ok_or(Malformed("signature"))?.right_aligned();
        let range = |part: &[u8]| {
            let from = part.as_ptr() as usize - der.as_ptr() as usize;
            from..from + part.len()
        };
        Ok(Self {
            signed: range(signed.whole),
            issuer: range(issuer),
            subject: range(subject),
            spki: range(spki.whole),
            raw: der.to_vec(),
            version,
            scheme,
            signature,
            not_before,
            not_after,
            name,
            key,
            extensions,
        })
    }

    /// The whole certificate, DER.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Whom it names.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Its key.
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// The subject, DER.
    pub fn subject(&self) -> &[u8] {
        &self.raw[self.subject.clone()]
    }

    /// The DNS names it is for.
    pub fn dns_names(&self) -> &[String] {
        &self.extensions.names.dns
    }

    /// Its validity, both ends included, in seconds since 1970.
    pub fn validity(&self) -> (i64, i64) {
        (self.not_before, self.not_after)
    }

    /// Whether it is for that host (crypto/x509/verify.go, `VerifyHostname`, of names alone).
    pub fn is_for_host(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        let plain = host.strip_suffix('.').unwrap_or(&host);
        self.dns_names().iter().any(|name| {
            let name = name.to_ascii_lowercase();
            if !is_host(plain, false) || !is_host(&name, true) {
                return name == host && !matches!(host.as_str(), "" | ".");
            }
            match name.strip_prefix("*.") {
                Some(rest) => plain.split_once('.').is_some_and(|(_, after)| after == rest),
                None => name == plain,
            }
        })
    }

    /// Whether it is for that address: those it names as addresses count alone.
    pub fn is_for_address(&self, address: IpAddr) -> bool {
        let named = self.extensions.names.addresses.iter();
        named
            .map(IpAddr::to_canonical)
            .any(|named| named == address.to_canonical())
    }

    pub(super) fn issuer(&self) -> &[u8] {
        &self.raw[self.issuer.clone()]
    }

    pub(super) fn signed(&self) -> &[u8] {
        &self.raw[self.signed.clone()]
    }

    pub(super) fn spki(&self) -> &[u8] {
        &self.raw[self.spki.clone()]
    }
}

/// Whether a name can be matched label by label (verify.go, `validHostname`).
fn is_host(name: &str, pattern: bool) -> bool {
    let mut labels = name.split('.').enumerate();
    name != "*"
        && labels.all(|(at, label)| {
            let allowed = |octet: u8| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_');
            let plain = !label.is_empty() && !label.starts_with('-') && label.bytes().all(allowed);
            plain || pattern && at == 0 && label == "*"
        })
}

fn version(fields: &mut Der<'_>) -> Option<u8> {
    let Some(mut content) = fields.optional(tag::explicit(0))? else {
        return Some(1);
    };
    let version = content.number(tag::INTEGER)?;
    (content.is_empty() && (0..=2).contains(&version)).then(|| version as u8 + 1)
}

fn public_key(mut spki: Der<'_>, crypto: &dyn Crypto) -> Option<PublicKey> {
    let algorithm = spki.read(tag::SEQUENCE)?;
    let bits = spki.bits()?;
    PublicKey::read(algorithm, &bits.right_aligned(), crypto)
}

/// What follows the key: unique identifiers from version 2 on, extensions in version 3 alone.
fn extensions(version: u8, fields: &mut Der<'_>) -> Result<Extensions, Malformed> {
    const IDENTIFIER: Malformed = Malformed("unique identifier");
    const EXTENSIONS: Malformed = Malformed("extensions");
    if version > 1 {
        fields.optional(tag::context(1)).ok_or(IDENTIFIER)?;
        fields.optional(tag::context(2)).ok_or(IDENTIFIER)?;
    }
    if version < 3 {
        return Ok(Extensions::default());
    }
    match fields.optional(tag::explicit(3)).ok_or(EXTENSIONS)? {
        None => Ok(Extensions::default()),
        Some(mut content) => Extensions::read(content.read(tag::SEQUENCE).ok_or(EXTENSIONS)?),
    }
}
