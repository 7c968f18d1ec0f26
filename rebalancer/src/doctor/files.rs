//! Certificates that end, and disks that are full.

use std::path::Path;

use super::{Finding, Gravity};
use crate::{relay::earliest_end, sys};

const DAY: i64 = 24 * 3600;

/// A certificate that ends within so many days should be renewed: the relay's log says so from then on, too.
const SOON_DAYS: i64 = 14;

/// Judges the certificates of a file by the one that ends first; `now` in seconds since 1970.
pub fn certificate(path: &Path, now: i64) -> Finding {
    let what = format!("certificate {}", path.display());
    let Some(end) = earliest_end(path) else {
        return Finding::mend(
            &what,
            Gravity::Wrong,
            "it has no certificate in PEM, or cannot be read",
            "name the right file, and run this as who runs the relay",
        );
    };
    let days = (end - now).div_euclid(DAY);
    let renew = "renew it (kubeadm certs renew); relay and agent read it again by themselves";
    if end <= now {
        Finding::mend(&what, Gravity::Wrong, format!("it expired {} days ago", -days), renew)
    } else if days < SOON_DAYS {
        Finding::mend(&what, Gravity::Soon, format!("it expires in {days} days"), renew)
    } else {
        Finding::good(&what, format!("for {days} days yet"))
    }
}

/// The least that a file system must have left, in octets: a state file and some of the decision log.
const ROOM: u64 = 1 << 20;

/// Judges how much a directory's file system has left.
pub fn room(directory: &Path) -> Finding {
    let what = format!("room in {}", directory.display());
    // What is not there yet is made in what is.
    let there = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
    match sys::free_octets(there) {
        Err(error) => Finding::note(&what, format!("not known: {error}")),
        Ok(free) if free < ROOM => Finding::mend(
            &what,
            Gravity::Wrong,
            format!("{free} octets are left"),
            "make room: pause, cool-downs and decisions are not kept",
        ),
        Ok(free) => Finding::good(&what, format!("{} MiB are left", free >> 20)),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn a_certificate_is_judged_by_the_days_it_has() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.crt");
        let mut params = CertificateParams::default();
        params.not_after = date_time_ymd(2030, 1, 31);
        let key = KeyPair::generate().expect("a key");
        std::fs::write(&path, params.self_signed(&key).expect("a certificate").pem()).expect("a file");
        let end = date_time_ymd(2030, 1, 31).unix_timestamp();
        for (left, expected) in [
            (15 * DAY, Gravity::Good),
            (14 * DAY, Gravity::Good),
            (14 * DAY - 1, Gravity::Soon),
            (1, Gravity::Soon),
            (0, Gravity::Wrong),
            (-DAY, Gravity::Wrong),
        ] {
            assert_eq!(
                certificate(&path, end - left).gravity,
                expected,
                "{left} s before its end"
            );
        }
        assert_eq!(certificate(&directory.path().join("none"), 0).gravity, Gravity::Wrong);
    }

    #[test]
    fn a_directory_with_room_is_good() {
        assert_eq!(room(Path::new("/")).gravity, Gravity::Good);
        let made_later = room(Path::new("/no/such/directory"));
        assert_eq!(made_later.gravity, Gravity::Good);
        assert!(made_later.what.ends_with("/no/such/directory"));
    }
}
