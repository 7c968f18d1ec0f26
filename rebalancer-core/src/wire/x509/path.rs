//! Paths from a client's or a server's certificate to a trusted one (crypto/x509/verify.go, `Certificate.Verify`).
//!
//! Input: the leaf, what came with it, whom one trusts, the time. Output: how long the verified path lasts, or why
//! there is none. Must never check more than [`MAX_SIGNATURES`] signatures, whatever a stranger sends.

use std::collections::{HashMap, HashSet};

use super::{Crypto, certificate::Certificate, certificate_policies, extension::KEY_CERT_SIGN};

/// How many candidates are tried in one search (verify.go, `maxChainSignatureChecks`).
pub const MAX_SIGNATURES: usize = 100;

/// Certificates by their subjects, each once.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    all: Vec<Certificate>,
    by_subject: HashMap<Vec<u8>, Vec<usize>>,
    have: HashSet<Vec<u8>>,
}

impl Pool {
    /// Of these, in their order.
    pub fn new(certificates: impl IntoIterator<Item = Certificate>) -> Self {
        let mut pool = Self::default();
        for certificate in certificates {
            if pool.have.insert(certificate.raw().to_vec()) {
                let same = pool.by_subject.entry(certificate.subject().to_vec()).or_default();
                same.push(pool.all.len());
                pool.all.push(certificate);
            }
        }
        pool
    }

    /// All of them.
    pub fn certificates(&self) -> &[Certificate] {
        &self.all
    }

    /// Who may have signed it, the likeliest first.
    fn parents(&self, child: &Certificate) -> Vec<&Certificate> {
        let same = self.by_subject.get(child.issuer()).map_or(&[][..], Vec::as_slice);
        let mut parents: Vec<&Certificate> = same.iter().map(|index| &self.all[*index]).collect();
        let wanted = &child.extensions.authority_key_id;
        parents.sort_by_key(|parent| {
            let has = &parent.extensions.subject_key_id;
            // Sorting keeps the order within each kind.
            match (has == wanted, has.is_empty() != wanted.is_empty()) {
                (true, _) => 0,
                (false, true) => 1,
                (false, false) => 2,
            }
        });
        parents
    }
}

/// A certificate that is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The last second of the path that lasts longest, its own members' alone; seconds since 1970.
    pub until: i64,
}

/// Why a certificate is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Before its validity or after.
    #[error("the certificate is expired or not valid yet")]
    Expired,
    /// Something critical in it is not understood.
    #[error("the certificate has a critical extension that is not known")]
    CriticalExtension,
    /// Nobody trusted has signed it, directly or through what came with it.
    #[error("no certificate authority that is trusted here vouches for it")]
    UnknownAuthority,
    /// There are paths, and none is for this use, within name constraints, with the policies demanded.
    #[error(
        "its path is not for this use (extended key usage), or breaks a name constraint or a policy of an authority"
    )]
    NotAllowed,
    /// The search ended early.
    #[error("too many certificates came with it")]
    TooMany,
}

/// Where a certificate stands in a chain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Leaf,
    Intermediate,
    Root,
}

/// Nanoseconds of a second.
const SECOND: i128 = 1_000_000_000;

impl Certificate {
    /// Whether it may take that place after `below` others at that time (nanoseconds since 1970); its issuer's name is
    /// compared when candidates are chosen.
    fn stands(&self, place: Place, below: usize, now: i128) -> Result<(), Refused> {
        if self.extensions.unhandled {
            return Err(Refused::CriticalExtension);
        }
        if now < i128::from(self.not_before) * SECOND || now > i128::from(self.not_after) * SECOND {
            return Err(Refused::Expired);
        }
        let basic = self.extensions.basic;
        if place == Place::Intermediate && !basic.is_some_and(|basic| basic.is_ca) {
            return Err(Refused::UnknownAuthority);
        }
        let intermediates = below.saturating_sub(1) as u64;
        let longest = basic.and_then(|basic| basic.max_path);
        if longest.is_some_and(|longest| intermediates > longest) {
            return Err(Refused::UnknownAuthority);
        }
        Ok(())
    }

    /// Whether it may sign certificates at all.
    pub fn may_sign(&self) -> bool {
        let is_ca = match self.extensions.basic {
            Some(basic) => basic.is_ca,
            // Versions before 3 cannot say it.
            None => self.version < 3,
        };
        let usage = self.extensions.key_usage;
        is_ca && (usage == 0 || usage & KEY_CERT_SIGN != 0)
    }

    fn is_signed_by(&self, parent: &Self, crypto: &dyn Crypto) -> bool {
        if !parent.may_sign() {
            return false;
        }
        self.scheme.is_some_and(|scheme| {
            parent.key().fits(scheme) && crypto.is_signed(parent.key(), scheme, self.signed(), &self.signature)
        })
    }

    /// Whether it is one of the chain by another signature: subject, key and alternative names count.
    fn is_among(&self, chain: &[&Self]) -> bool {
        for other in chain {
            if self.subject() != other.subject() || self.spki() != other.spki() {
                continue;
            }
            match (&self.extensions.names_raw, &other.extensions.names_raw) {
                (None, None) => return true,
                (Some(ours), Some(theirs)) if ours == theirs => return true,
                (Some(_), Some(_)) => {}
                // Go ends its search here.
                _ => return false,
            }
        }
        false
    }
}

struct Search<'a> {
    intermediates: &'a Pool,
    roots: &'a Pool,
    now: i128,
    crypto: &'a dyn Crypto,
    tried: usize,
    found: Vec<Vec<&'a Certificate>>,
}

impl<'a> Search<'a> {
    /// Finds every path on from the chain's last; `false` when the bound is reached.
    fn extend(&mut self, chain: &[&'a Certificate]) -> bool {
        let Some(last) = chain.last() else { return true };
        let (roots, intermediates) = (self.roots, self.intermediates);
        let roots = roots.parents(last).into_iter().map(|parent| (Place::Root, parent));
        let others = intermediates
            .parents(last)
            .into_iter()
            .map(|parent| (Place::Intermediate, parent));
        for (place, parent) in roots.chain(others) {
            self.tried += 1;
            if self.tried > MAX_SIGNATURES {
                return false;
            }
            if parent.key() == &super::PublicKey::Unknown
                || parent.is_among(chain)
                || !last.is_signed_by(parent, self.crypto)
                || parent.stands(place, chain.len(), self.now).is_err()
            {
                continue;
            }
            let longer: Vec<&Certificate> = chain.iter().copied().chain([parent]).collect();
            if place == Place::Root {
                self.found.push(longer);
            } else if !self.extend(&longer) {
                return false;
            }
        }
        true
    }
}

/// What a certificate is shown for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To say who a client is.
    Client,
    /// To say who a server is.
    Server,
}

/// Nested through the chain: an authority that names usages allows no others below it.
fn is_for(purpose: Purpose, chain: &[&Certificate]) -> bool {
    chain.iter().all(|certificate| {
        let usages = certificate.extensions.usages;
        let named = match purpose {
            Purpose::Client => usages.client,
            Purpose::Server => usages.server,
        };
        !usages.named || usages.any || named
    })
}

fn keeps_names(chain: &[&Certificate]) -> bool {
    chain.iter().enumerate().all(|(at, certificate)| {
        let mut above = chain[at + 1..]
            .iter()
            .filter_map(|authority| authority.extensions.constraints.as_ref());
        certificate.extensions.names_raw.is_none()
            || above.all(|constraints| constraints.permit(&certificate.extensions.names))
    })
}

/// Judges a certificate that is shown for that purpose at a time in nanoseconds since 1970; whether it is for a host is
/// another question ([`Certificate::is_for_host`]).
///
/// # Errors
///
/// Why it is not good.
pub fn verify(
    leaf: &Certificate,
    intermediates: &Pool,
    roots: &Pool,
    purpose: Purpose,
    now: i128,
    crypto: &dyn Crypto,
) -> Result<Verified, Refused> {
    leaf.stands(Place::Leaf, 0, now)?;
    let mut search = Search {
        intermediates,
        roots,
        now,
        crypto,
        tried: 0,
        found: Vec::new(),
    };
    let mut whole = true;
    if roots.have.contains(leaf.raw()) {
        search.found.push(vec![leaf]);
    } else {
        whole = search.extend(&[leaf]);
    }
    if search.found.is_empty() {
        return Err(if whole {
            Refused::UnknownAuthority
        } else {
            Refused::TooMany
        });
    }
    let good = search
        .found
        .iter()
        .filter(|chain| certificate_policies::are_valid(chain) && is_for(purpose, chain) && keeps_names(chain));
    let ends = good.filter_map(|chain| chain.iter().map(|certificate| certificate.not_after).min());
    let until = ends.max().ok_or(Refused::NotAllowed)?;
    debug_assert!(now <= i128::from(until) * SECOND, "a path that is over was taken");
    Ok(Verified { until })
}
