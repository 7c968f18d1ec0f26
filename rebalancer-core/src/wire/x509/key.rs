//! Public keys and signature algorithms: what Go's crypto/x509 parses, and what it takes.
//!
//! Must never take MD5 or SHA-1 in a signature, DSA, or an RSA key below 1024 bits.

use super::{
    Crypto,
    der::{Der, tag},
};

/// An elliptic curve (RFC 5480, section 2.1.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// secp224r1.
    P224,
    /// secp256r1.
    P256,
    /// secp384r1.
    P384,
    /// secp521r1.
    P521,
}

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

/// How something is signed; other ways are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// RSASSA-PKCS1-v1_5.
    RsaPkcs1(Hash),
    /// RSASSA-PSS with a salt as long as the hash.
    RsaPss(Hash),
    /// ECDSA, its signature in DER.
    Ecdsa(Hash),
    /// Ed25519.
    Ed25519,
}

/// A certificate's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicKey {
    /// RSA: modulus without leading zeroes, and exponent.
    Rsa {
        /// The modulus, big-endian.
        modulus: Vec<u8>,
        /// The exponent.
        exponent: i64,
    },
    /// ECDSA: an uncompressed point.
    Ecdsa {
        /// Its curve.
        curve: Curve,
        /// The point.
        point: Vec<u8>,
    },
    /// Ed25519.
    Ed25519([u8; 32]),
    /// DSA, which signs nothing that is believed.
    Dsa,
    /// An algorithm that Go does not know.
    Unknown,
}

const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
const DSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x38, 4, 1];
const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
const NULL: &[u8] = &[5, 0];

/// The smallest RSA key that Go verifies with (crypto/rsa, "Minimum key size").
const MIN_RSA_BITS: usize = 1024;

impl PublicKey {
    /// The modulus's bits, of an RSA key.
    pub fn rsa_bits(&self) -> Option<usize> {
        let Self::Rsa { modulus, .. } = self else { return None };
        let first = modulus.first().copied().unwrap_or(0);
        Some(modulus.len() * 8 - first.leading_zeros() as usize)
    }

    /// Whether that key may verify such a signature at all; the arithmetic is [`Crypto`]'s.
    pub fn fits(&self, scheme: Scheme) -> bool {
        match (self, scheme) {
            (Self::Rsa { modulus, exponent }, Scheme::RsaPkcs1(_) | Scheme::RsaPss(_)) => {
                let odd = modulus.last().is_some_and(|last| last & 1 == 1) && exponent & 1 == 1;
                odd && self.rsa_bits() >= Some(MIN_RSA_BITS) && (2..=i64::from(i32::MAX)).contains(exponent)
            }
            (Self::Ecdsa { .. }, Scheme::Ecdsa(_)) | (Self::Ed25519(_), Scheme::Ed25519) => true,
            _ => false,
        }
    }

    /// Reads a SubjectPublicKeyInfo's algorithm and key.
    pub(super) fn read(algorithm: Der<'_>, key: &[u8], crypto: &dyn Crypto) -> Option<Self> {
        let (oid, parameters) = read_algorithm(algorithm)?;
        match oid {
            RSA => {
                if parameters != NULL {
                    return None;
                }
                let mut pair = Der(key).read(tag::SEQUENCE)?;
                let modulus = pair.integer(tag::INTEGER)?;
                let exponent = pair.number(tag::INTEGER)?;
                if !is_positive(modulus) || exponent <= 0 {
                    return None;
                }
                let zeroes = usize::from(modulus[0] == 0);
                Some(Self::Rsa {
                    modulus: modulus[zeroes..].to_vec(),
                    exponent,
                })
            }
            ECDSA => {
                let curve = match Der(parameters).identifier()? {
                    [0x2b, 0x81, 4, 0, 33] => Curve::P224,
                    [0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7] => Curve::P256,
                    [0x2b, 0x81, 4, 0, 34] => Curve::P384,
                    [0x2b, 0x81, 4, 0, 35] => Curve::P521,
                    _ => return None,
                };
                let uncompressed = key.first() == Some(&4);
                (uncompressed && crypto.is_on_curve(curve, key)).then(|| Self::Ecdsa {
                    curve,
                    point: key.to_vec(),
                })
            }
            ED25519 => {
                let key = key.try_into().ok().filter(|_| parameters.is_empty())?;
                Some(Self::Ed25519(key))
            }
            DSA => {
                let mut numbers = Der(parameters).read(tag::SEQUENCE)?;
                let y = Der(key).integer(tag::INTEGER)?;
                for _ in 0..3 {
                    numbers.integer(tag::INTEGER).filter(|number| is_positive(number))?;
                }
                is_positive(y).then_some(Self::Dsa)
            }
            _ => Some(Self::Unknown),
        }
    }
}

fn is_positive(number: &[u8]) -> bool {
    number[0] & 0x80 == 0 && number != [0]
}

/// An AlgorithmIdentifier's content: its object identifier, and its parameters as one element.
pub(super) fn read_algorithm(mut content: Der<'_>) -> Option<(&[u8], &[u8])> {
    let oid = content.identifier()?;
    if content.is_empty() {
        return Some((oid, &[]));
    }
    Some((oid, content.any()?.whole))
}

/// Which way of signing an algorithm identifier names; `None` for those that are not taken.
pub(super) fn scheme(oid: &[u8], parameters: &[u8]) -> Option<Scheme> {
    match oid {
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, last] => match last {
            10 => pss(parameters),
            11 => Some(Scheme::RsaPkcs1(Hash::Sha256)),
            12 => Some(Scheme::RsaPkcs1(Hash::Sha384)),
            13 => Some(Scheme::RsaPkcs1(Hash::Sha512)),
            _ => None,
        },
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, last] => match last {
            2 => Some(Scheme::Ecdsa(Hash::Sha256)),
            3 => Some(Scheme::Ecdsa(Hash::Sha384)),
            4 => Some(Scheme::Ecdsa(Hash::Sha512)),
            _ => None,
        },
        // Parameters must be absent (RFC 8410, section 3).
        ED25519 if parameters.is_empty() => Some(Scheme::Ed25519),
        _ => None,
    }
}

/// PSS in one of the three ways Go takes: one hash function throughout, a salt of its length.
fn pss(parameters: &[u8]) -> Option<Scheme> {
    const MGF1: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 8];
    let mut fields = Der(parameters).read(tag::SEQUENCE)?;
    let mut algorithm = |number| read_algorithm(fields.read(tag::explicit(number))?.read(tag::SEQUENCE)?);
    let (hash, nothing) = algorithm(0)?;
    let (generator, inner) = algorithm(1)?;
    let salt = fields.read(tag::explicit(2))?.number(tag::INTEGER)?;
    let trailer = match fields.optional(tag::explicit(3))? {
        Some(mut trailer) => trailer.number(tag::INTEGER)?,
        None => 1,
    };
    let (inner, nothing_either) = read_algorithm(Der(inner).read(tag::SEQUENCE)?)?;
    let absent = |parameters: &[u8]| parameters.is_empty() || parameters == NULL;
    if generator != MGF1 || inner != hash || !absent(nothing) || !absent(nothing_either) || trailer != 1 {
        return None;
    }
    match (hash, salt) {
        ([0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1], 32) => Some(Scheme::RsaPss(Hash::Sha256)),
        ([0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 2], 48) => Some(Scheme::RsaPss(Hash::Sha384)),
        ([0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3], 64) => Some(Scheme::RsaPss(Hash::Sha512)),
        _ => None,
    }
}
