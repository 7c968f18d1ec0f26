//! Whom the relay believes: client certificates, judged as the apiserver judges them.
//!
//! Job: say of a chain whom it names, or that its owner may name others, and until when; and ask again when that ends or
//! when the authorities change. Input: chains, PEM bundles. Output: [`Claim`]s and [`Trust`].
//! Must never believe a certificate longer than the path that vouched for it lasts.

mod aws_lc;
mod client_certificates;
mod server_certificates;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use rebalancer_core::wire::x509::{Certificate, Pool, Purpose, Refused, verify};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

pub use aws_lc::AwsLc;
pub use client_certificates::ClientCertificates;
pub use server_certificates::ServerCertificates;

use super::{
    identity::{Claim, Identity},
    request_headers::RequestHeaders,
    tls::Reloader,
};

/// Whose certificates those of front proxies are.
pub const PROXY_CA: &str = "--requestheader-client-ca-file";

/// Milliseconds of a second.
const SECOND: i64 = 1000;

/// How many octets of what came with a client's own certificate are kept to judge it by again. Whoever sends more, and is
/// vouched for by what came late, is asked for all of it on its next connection.
const MAX_KEPT: usize = 16 * 1024;

/// Whether a chain is longer than whoever proves nothing may have one kept.
pub fn is_long(chain: &[CertificateDer<'_>]) -> bool {
    chain.iter().map(|one| one.len()).sum::<usize>() > MAX_KEPT
}

/// Who may vouch for whom.
pub struct Authorities {
    /// For users: `--client-ca`.
    users: Pool,
    /// For those who name users: `--requestheader-client-ca-file`.
    proxies: Pool,
    headers: Arc<RequestHeaders>,
}

/// What a chain is worth.
#[derive(Debug)]
pub struct Judgement {
    /// Whom it names.
    pub claim: Claim,
    /// The last millisecond since 1970 for which that is so.
    pub until: i64,
    /// When its own certificate ends, in seconds since 1970.
    pub leaf_ends: i64,
    /// Why it is not accepted.
    pub why: Option<String>,
}

impl Authorities {
    /// Reads both bundles; the second one is not asked for by everybody.
    ///
    /// # Errors
    ///
    /// Names flag, file and what is wrong: kube-apiserver does not start either with a bundle that does not parse.
    pub fn load(users: &Path, proxies: Option<&Path>, headers: Arc<RequestHeaders>) -> anyhow::Result<Self> {
        Ok(Self {
            users: bundle(users, "--client-ca")?,
            proxies: match proxies {
                Some(path) => bundle(path, PROXY_CA)?,
                None => Pool::default(),
            },
            headers,
        })
    }

    /// The certificates of both bundles, each with its flag.
    pub fn certificates(&self) -> impl Iterator<Item = (&'static str, &Certificate)> {
        let flagged = [("--client-ca", &self.users), (PROXY_CA, &self.proxies)];
        flagged
            .into_iter()
            .flat_map(|(flag, pool)| pool.certificates().iter().map(move |one| (flag, one)))
    }

    /// Judges a chain, as kube-apiserver's authenticators do one after the other: the front proxy's first.
    pub fn judge(&self, chain: &[CertificateDer<'_>], now: i128) -> Judgement {
        let rejected = |why: String| Judgement {
            claim: Claim::Rejected,
            until: i64::MIN,
            leaf_ends: i64::MIN,
            why: Some(why),
        };
        let parsed: Result<Vec<Certificate>, _> = chain.iter().map(|der| Certificate::parse(der, &AwsLc)).collect();
        let mut parsed = match parsed {
            Ok(parsed) if parsed.is_empty() => return rejected("there is none".to_owned()),
            Ok(parsed) => parsed,
            Err(error) => return rejected(error.to_string()),
        };
        let leaf = parsed.remove(0);
        let others = Pool::new(parsed);
        let user = verify(&leaf, &others, &self.users, Purpose::Client, now, &AwsLc)
            .map_err(|refused| refused.to_string())
            .and_then(|verified| {
                let identity = Identity::of(&leaf, &self.headers).map_err(|error| error.to_string())?;
                let identity = identity.ok_or_else(|| "it has no common name".to_owned())?;
                Ok((identity, verified.until))
            });
        if let Ok(until) = self.proxy(&leaf, &others, now) {
            return Judgement {
                claim: Claim::Proxy(user.ok().map(|(identity, _)| identity)),
                until: until.saturating_mul(SECOND),
                leaf_ends: leaf.validity().1,
                why: None,
            };
        }
        match user {
            Ok((identity, until)) => Judgement {
                claim: Claim::Accepted(identity),
                until: until.saturating_mul(SECOND),
                leaf_ends: leaf.validity().1,
                why: None,
            },
            Err(why) => rejected(why),
        }
    }

    /// Until when the owner may name users (k8s.io/apiserver/pkg/authentication/request/x509/x509.go, `Verifier`).
    fn proxy(&self, leaf: &Certificate, others: &Pool, now: i128) -> Result<i64, Refused> {
        // A search costs signatures, which strangers choose.
        if self.proxies.certificates().is_empty() {
            return Err(Refused::UnknownAuthority);
        }
        let verified = verify(leaf, others, &self.proxies, Purpose::Client, now, &AwsLc)?;
        if !self.headers.allows(leaf.name().common_name()) {
            return Err(Refused::NotAllowed);
        }
        Ok(verified.until)
    }
}

/// What a connection's identity rests on, shared by all who ask before a request whether it still does.
///
/// kube-apiserver judges the certificate at each request; here it is judged when its path ends and when the authorities
/// change, which comes to the same.
pub struct Trust {
    chain: Box<[CertificateDer<'static>]>,
    is_proxy: bool,
    leaf_ends: i64,
    /// The last millisecond since 1970; [`i64::MIN`] when it has ended for good.
    until: AtomicI64,
    tls: Arc<Reloader>,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trust")
            .field("until", &self.until)
            .finish_non_exhaustive()
    }
}

/// How many certificates of a chain are kept: the client's own, and what came next of them.
fn kept(chain: &[CertificateDer<'_>]) -> usize {
    let mut octets = 0;
    let others = chain.iter().skip(1);
    let fits = others.take_while(|one| {
        octets += one.len();
        octets <= MAX_KEPT
    });
    (1 + fits.count()).min(chain.len())
}

impl Trust {
    /// Of a judgement that was given with the authorities in use.
    pub fn new(chain: &[CertificateDer<'_>], judgement: &Judgement, tls: Arc<Reloader>) -> Self {
        Self {
            chain: chain[..kept(chain)]
                .iter()
                .map(|one| one.clone().into_owned())
                .collect(),
            is_proxy: matches!(judgement.claim, Claim::Proxy(_)),
            leaf_ends: judgement.leaf_ends,
            until: AtomicI64::new(judgement.until),
            tls,
        }
    }

    /// Whether it is a user's own certificate, and no front proxy's.
    pub fn is_users(&self) -> bool {
        !self.is_proxy
    }

    /// When that certificate ends, in seconds since 1970.
    pub fn leaf_ends(&self) -> i64 {
        self.leaf_ends
    }

    /// Whether it still holds, now. Once it does not, it never does again.
    pub fn holds(&self) -> bool {
        let until = self.until.load(Relaxed);
        until != i64::MIN && (now_ms() <= until || self.review())
    }

    /// Asks the authorities in use again; whether it still holds.
    pub fn review(&self) -> bool {
        let judgement = self.tls.current().authorities.judge(&self.chain, now_ns());
        let same = match judgement.claim {
            Claim::Proxy(_) => self.is_proxy,
            Claim::Accepted(_) => !self.is_proxy,
            Claim::Absent | Claim::Rejected => false,
        };
        let until = if same { judgement.until } else { i64::MIN };
        // Whoever finds it ended ends it: nobody sets it back.
        let ended = self
            .until
            .fetch_update(Relaxed, Relaxed, |before| (before != i64::MIN).then_some(until));
        same && ended.is_ok()
    }
}

/// Nanoseconds since 1970.
pub fn now_ns() -> i128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos() as i128)
}

fn now_ms() -> i64 {
    (now_ns() / 1_000_000) as i64
}

/// Reads a bundle of authorities as kube-apiserver reads its own: what cannot be read refuses all of it.
pub(super) fn bundle(path: &Path, flag: &str) -> anyhow::Result<Pool> {
    let mut readable = Vec::new();
    for (index, der) in certificates(path, flag)?.iter().enumerate() {
        let parsed = Certificate::parse(der, &AwsLc);
        readable.push(parsed.with_context(|| format!("{flag} {}: certificate {} in it", path.display(), index + 1))?);
    }
    Ok(pool(readable, path, flag))
}

/// The same as client-go reads it (crypto/x509, `CertPool.AppendCertsFromPEM`): what cannot be read vouches for nobody, and
/// the others do.
pub(super) fn readable_bundle(path: &Path, flag: &str) -> anyhow::Result<Pool> {
    let mut readable = Vec::new();
    for (index, der) in certificates(path, flag)?.iter().enumerate() {
        match Certificate::parse(der, &AwsLc) {
            Ok(certificate) => readable.push(certificate),
            Err(error) => tracing::warn!(
                file = %path.display(),
                number = index + 1,
                %error,
                "{flag}: a certificate in it cannot be read: as for Go's programs, it vouches for nobody"
            ),
        }
    }
    anyhow::ensure!(
        !readable.is_empty(),
        "{flag} {}: no certificate in it can be read",
        path.display()
    );
    Ok(pool(readable, path, flag))
}

/// The certificates of a file, at least one.
///
/// # Errors
///
/// Names the flag and the file.
pub(super) fn certificates(path: &Path, flag: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let ders: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .with_context(|| format!("{flag} {}: cannot read certificates (PEM)", path.display()))?;
    anyhow::ensure!(
        !ders.is_empty(),
        "{flag} {}: there is no certificate (PEM) in it",
        path.display()
    );
    Ok(ders)
}

fn pool(certificates: Vec<Certificate>, path: &Path, flag: &str) -> Pool {
    let pool = Pool::new(certificates);
    for certificate in pool.certificates() {
        if let Some(why) = useless(certificate) {
            tracing::warn!(
                file = %path.display(),
                subject = certificate.name().common_name(),
                "{flag}: a certificate in it {why}: as for Go's programs, it vouches for nobody"
            );
        }
    }
    pool
}

/// Why an authority vouches for nobody.
fn useless(authority: &Certificate) -> Option<&'static str> {
    let (from, until) = authority.validity();
    let now = now_ms() / SECOND;
    if now > until {
        Some("has expired")
    } else if now < from {
        Some("is not valid yet")
    } else if !authority.may_sign() {
        Some("may not sign certificates")
    } else {
        None
    }
}
