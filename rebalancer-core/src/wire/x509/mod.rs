//! Certificates as Go's crypto/x509 reads and judges them, since that is who judges them behind the relay.
//!
//! Job: parse a certificate, and say whether a chain leads to a trusted one. Every rule follows Go 1.26's
//! crypto/x509 (parser.go, verify.go, constraints.go), also where RFC 5280 asks for more or for less: a client must be
//! to the relay who it is to the apiserver.
//! Input: DER, the time, and [`Crypto`], which the caller brings. Output: names, and until when they are good.
//! Must never name a certificate good that Go refuses.

mod certificate;
mod certificate_policies;
mod constraints;
mod der;
mod extension;
mod key;
mod name;
mod path;
mod uri;

pub use certificate::{Certificate, Malformed};
pub use key::{Curve, Hash, PublicKey, Scheme};
pub use name::Name;
pub use path::{Pool, Purpose, Refused, Verified, verify};

/// The arithmetic of keys and signatures.
pub trait Crypto {
    /// Whether an uncompressed point (SEC 1, section 2.3.3) is on the curve, and not its infinity.
    fn is_on_curve(&self, curve: Curve, point: &[u8]) -> bool;

    /// Whether the key's owner has signed the message.
    fn is_signed(&self, key: &PublicKey, scheme: Scheme, message: &[u8], signature: &[u8]) -> bool;
}
