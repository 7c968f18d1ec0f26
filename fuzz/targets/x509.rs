//! Certificates and chains of any octets: read or refused, judged the same each time, never good for longer than the client's
//! own certificate, and in bounded work. The arithmetic is a double that takes every key and signature: what is fuzzed is
//! what lies around it.
#![no_main]

use std::cell::Cell;

use libfuzzer_sys::fuzz_target;
use rebalancer_core::wire::x509::{Certificate, Crypto, Curve, Pool, PublicKey, Purpose, Scheme, verify};

/// Says yes, and counts how often it is asked.
#[derive(Default)]
struct Gullible {
    signatures: Cell<usize>,
}

impl Crypto for Gullible {
    fn is_on_curve(&self, _: Curve, _: &[u8]) -> bool {
        true
    }

    fn is_signed(&self, _: &PublicKey, _: Scheme, _: &[u8], _: &[u8]) -> bool {
        self.signatures.set(self.signatures.get() + 1);
        true
    }
}

/// Certificates with their length in two octets before them.
fn certificates(mut data: &[u8]) -> Vec<Certificate> {
    let mut found = Vec::new();
    while let [high, low, rest @ ..] = data {
        let (der, after) = rest.split_at(usize::from(u16::from_be_bytes([*high, *low])).min(rest.len()));
        data = after;
        let Ok(certificate) = Certificate::parse(der, &Gullible::default()) else {
            continue;
        };
        assert_eq!(certificate.raw(), der, "nothing is left over");
        let (from, until) = certificate.validity();
        let _ = (
            from,
            until,
            certificate.is_for_host("a.example"),
            certificate.name().common_name(),
        );
        found.push(certificate);
    }
    found
}

fuzz_target!(|data: &[u8]| {
    let [day_high, day_low, split, data @ ..] = data else {
        return;
    };
    // Any day from 1970 to 2149.
    let now = i128::from(u16::from_be_bytes([*day_high, *day_low])) * 86_400_000_000_000;
    let mut all = certificates(data);
    if all.is_empty() {
        return;
    }
    let leaf = all.remove(0);
    let roots = all.split_off(usize::from(*split).min(all.len()));
    let (intermediates, roots) = (Pool::new(all), Pool::new(roots));
    let crypto = Gullible::default();
    let purpose = if data.len() % 2 == 0 {
        Purpose::Client
    } else {
        Purpose::Server
    };
    let verdict = verify(&leaf, &intermediates, &roots, purpose, now, &crypto);
    assert!(crypto.signatures.get() <= 1000, "a bounded search");
    let again = verify(&leaf, &intermediates, &roots, purpose, now, &Gullible::default());
    match (verdict, again) {
        (Ok(verified), Ok(again)) => {
            assert_eq!(verified.until, again.until);
            assert!(verified.until <= leaf.validity().1);
            assert!(i128::from(verified.until) * 1_000_000_000 + 999_999_999 >= now);
        }
        (Err(_), Err(_)) => {}
        _ => panic!("the verdict depends on something else"),
    }
});
