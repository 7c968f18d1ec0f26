//! Keys and signatures of client certificates, by AWS-LC, which TLS here rests on already.
//!
//! Job: [`Crypto`] for the core's path checks, and for what a client signs in its handshake. aws-lc-rs's safe interface
//! leaves out what Go takes and clusters have: P-224, PSS and SHA-384 with RSA keys below 2048 bits, and RSA keys above
//! 8192; so the few functions of the C interface that know them are called here, and nowhere else.
//! Must never be asked about a key or a scheme that [`PublicKey::fits`] does not let pass.

use std::{ffi::c_int, ptr};

use aws_lc_sys as c;
use rebalancer_core::wire::x509::{Crypto, Curve, Hash, PublicKey, Scheme};

/// AWS-LC.
#[derive(Clone, Copy, Debug, Default)]
pub struct AwsLc;

impl Crypto for AwsLc {
    fn is_on_curve(&self, curve: Curve, point: &[u8]) -> bool {
        Key::parse(&ecdsa(curve, point)).is_some()
    }

    fn is_signed(&self, key: &PublicKey, scheme: Scheme, message: &[u8], signature: &[u8]) -> bool {
        debug_assert!(key.fits(scheme), "an unfit key was not refused before");
        let spki = match key {
            PublicKey::Rsa { modulus, exponent } => rsa(modulus, *exponent),
            PublicKey::Ecdsa { curve, point } => ecdsa(*curve, point),
            PublicKey::Ed25519(key) => spki(&sequence(&[6, 3, 0x2b, 0x65, 0x70]), key),
            PublicKey::Dsa | PublicKey::Unknown => return false,
        };
        Key::parse(&spki).is_some_and(|key| key.verify(scheme, message, signature))
    }
}

/// A parsed key, freed when dropped.
struct Key(*mut c::EVP_PKEY);

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: the pointer came from EVP_parse_public_key, is not null, and nobody else has it.
        unsafe { c::EVP_PKEY_free(self.0) }
    }
}

/// What one verification needs, freed when dropped.
struct Context(*mut c::EVP_MD_CTX);

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the pointer came from EVP_MD_CTX_new, is not null, and nobody else has it.
        unsafe { c::EVP_MD_CTX_free(self.0) }
    }
}

impl Key {
    fn parse(spki: &[u8]) -> Option<Self> {
        let mut input = c::CBS {
            data: spki.as_ptr(),
            len: spki.len(),
        };
        // SAFETY: the CBS points to `spki`, which outlives the call; the function reads no more than `len` octets of
        // it, keeps none, and answers null or a key that is the caller's.
        let key = unsafe { c::EVP_parse_public_key(&raw mut input) };
        if key.is_null() {
            forget_errors();
            return None;
        }
        let key = Self(key);
        (input.len == 0).then_some(key)
    }

    fn verify(&self, scheme: Scheme, message: &[u8], signature: &[u8]) -> bool {
        // SAFETY: it has no arguments, and answers null or a context that is the caller's.
        let context = unsafe { c::EVP_MD_CTX_new() };
        if context.is_null() {
            return false;
        }
        let context = Context(context);
        let mut parameters: *mut c::EVP_PKEY_CTX = ptr::null_mut();
        // SAFETY: context and key are live; the hash function is a static or null, which Ed25519 asks for; there is no
        // engine; `parameters` is set to what belongs to the context.
        let begun =
            unsafe { c::EVP_DigestVerifyInit(context.0, &raw mut parameters, hash(scheme), ptr::null_mut(), self.0) };
        let good = begun == 1
            && is_padded_as(scheme, parameters)
            // SAFETY: the context was begun above; both slices are read for their lengths only, and not kept.
            && unsafe {
                c::EVP_DigestVerify(
                    context.0,
                    signature.as_ptr(),
                    signature.len(),
                    message.as_ptr(),
                    message.len(),
                )
            } == 1;
        if !good {
            forget_errors();
        }
        good
    }
}

/// Asks for PSS where the scheme is PSS.
fn is_padded_as(scheme: Scheme, parameters: *mut c::EVP_PKEY_CTX) -> bool {
    const AS_LONG_AS_THE_HASH: c_int = c::RSA_PSS_SALTLEN_DIGEST;
    if !matches!(scheme, Scheme::RsaPss(_)) {
        return true;
    }
    // SAFETY: `parameters` belongs to a live context that was begun with an RSA key. MGF1's hash is the message's when
    // none is set.
    unsafe {
        c::EVP_PKEY_CTX_set_rsa_padding(parameters, c::RSA_PKCS1_PSS_PADDING) == 1
            && c::EVP_PKEY_CTX_set_rsa_pss_saltlen(parameters, AS_LONG_AS_THE_HASH) == 1
    }
}

fn hash(scheme: Scheme) -> *const c::EVP_MD {
    let (Scheme::RsaPkcs1(hash) | Scheme::RsaPss(hash) | Scheme::Ecdsa(hash)) = scheme else {
        return ptr::null();
    };
    // SAFETY: each has no arguments and answers a static.
    unsafe {
        match hash {
            Hash::Sha256 => c::EVP_sha256(),
            Hash::Sha384 => c::EVP_sha384(),
            Hash::Sha512 => c::EVP_sha512(),
        }
    }
}

/// What a failed call leaves for this thread would be somebody else's error later.
fn forget_errors() {
    // SAFETY: it has no arguments, and touches this thread's own queue alone.
    unsafe { c::ERR_clear_error() }
}

fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let zeroes = length.iter().take_while(|octet| **octet == 0).count();
    let mut out = vec![tag];
    if content.len() < 128 {
        out.push(content.len() as u8);
    } else {
        out.push(0x80 | (length.len() - zeroes) as u8);
        out.extend_from_slice(&length[zeroes..]);
    }
    out.extend_from_slice(content);
    out
}

fn sequence(content: &[u8]) -> Vec<u8> {
    element(0x30, content)
}

fn integer(magnitude: &[u8]) -> Vec<u8> {
    let zeroes = magnitude.iter().take_while(|octet| **octet == 0).count();
    let mut octets = magnitude[zeroes..].to_vec();
    if octets.first().is_none_or(|first| first & 0x80 != 0) {
        octets.insert(0, 0);
    }
    element(2, &octets)
}

/// A SubjectPublicKeyInfo as it must be: what came may have had more behind it, which Go passes over.
fn spki(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    let bits = [&[0], key].concat();
    sequence(&[algorithm, &element(3, &bits)].concat())
}

fn rsa(modulus: &[u8], exponent: i64) -> Vec<u8> {
    const RSA: [u8; 13] = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
    let pair = [integer(modulus), integer(&exponent.to_be_bytes())].concat();
    spki(&sequence(&RSA), &sequence(&pair))
}

fn ecdsa(curve: Curve, point: &[u8]) -> Vec<u8> {
    const ECDSA: [u8; 9] = [6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
    let curve: &[u8] = match curve {
        Curve::P224 => &[6, 5, 0x2b, 0x81, 4, 0, 33],
        Curve::P256 => &[6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7],
        Curve::P384 => &[6, 5, 0x2b, 0x81, 4, 0, 34],
        Curve::P521 => &[6, 5, 0x2b, 0x81, 4, 0, 35],
    };
    spki(&sequence(&[&ECDSA, curve].concat()), point)
}
