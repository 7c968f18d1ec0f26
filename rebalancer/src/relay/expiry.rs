//! When certificates expire: as a metric, and in the log before it is too late.
//!
//! Input: the files of the flags, and clients' certificates. Must never fail: what cannot be read is somebody else's to say.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::time::{MissedTickBehavior, interval};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Files, metrics::Metrics, registry::Registry, trust::PROXY_CA, unix_now};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(60);

/// From so long before the end on it is said, once a day.
const SOON: i64 = 14 * 24 * 3600;
const DAY: i64 = 24 * 3600;

/// The earliest end of a certificate in a file, in seconds since 1970.
pub fn earliest(path: &Path) -> Option<i64> {
    earliest_of(CertificateDer::pem_file_iter(path).ok()?.flatten())
}

/// The earliest end of those that can be read, in seconds since 1970.
pub fn earliest_of<T: AsRef<[u8]>>(certificates: impl IntoIterator<Item = T>) -> Option<i64> {
    let ends = certificates.into_iter().filter_map(|der| {
        let (_, parsed) = X509Certificate::from_der(der.as_ref()).ok()?;
        Some(parsed.validity().not_after.timestamp())
    });
    ends.min()
}

/// Runs as long as the relay.
pub async fn run(files: Files, registry: Arc<Registry>, metrics: Arc<Metrics>) {
    let sni = files
        .sni
        .into_iter()
        .map(|files| ("--tls-sni-cert-key", files.certificate));
    let proxy_ca = files.proxy_ca.map(|file| (PROXY_CA, file));
    let watched: Vec<(&'static str, PathBuf)> = [
        ("--tls-cert", files.certificate),
        ("--proxy-client-cert", files.proxy_certificate),
        ("--client-ca", files.client_ca),
        ("--upstream-ca", files.upstream_ca),
    ]
    .into_iter()
    .chain(proxy_ca)
    .chain(sni)
    .collect();
    let mut said: Vec<Option<(i64, i64)>> = vec![None; watched.len()];
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = i64::try_from(unix_now()).unwrap_or(i64::MAX);
        // Several files may have one flag: the metric is of the one that ends first.
        let mut ends: BTreeMap<&'static str, i64> = BTreeMap::new();
        for ((file, path), said) in watched.iter().zip(&mut said) {
            let Some(end) = earliest(path) else { continue };
            ends.entry(file)
                .and_modify(|first| *first = end.min(*first))
                .or_insert(end);
            let today = (end, (end - now).div_euclid(DAY));
            if end - now > SOON || *said == Some(today) {
                continue;
            }
            *said = Some(today);
            if end <= now {
                tracing::error!(file, path = %path.display(), "a certificate in it has expired");
            } else {
                tracing::warn!(file, path = %path.display(), days = today.1, "a certificate in it expires soon");
            }
        }
        for (file, end) in ends {
            metrics.expires(file, end);
        }
        // Clients stay for days: their certificates are counted again, so that a rate over minutes sees all that are in use.
        for end in registry.certificate_ends() {
            metrics.client_certificate_ends(end, unix_now());
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn the_earliest_of_a_file_counts() {
        let mut pem = String::new();
        for year in [2031, 2029, 2030] {
            let mut params = CertificateParams::default();
            params.not_after = date_time_ymd(year, 1, 1);
            let key = KeyPair::generate().expect("a key");
            pem.push_str(&params.self_signed(&key).expect("a certificate").pem());
        }
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("ca.crt");
        std::fs::write(&path, pem).expect("a file");
        assert_eq!(earliest(&path), Some(date_time_ymd(2029, 1, 1).unix_timestamp()));
        assert_eq!(earliest(&directory.path().join("none")), None);
    }
}
