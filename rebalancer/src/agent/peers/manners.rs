//! What peers show of themselves beside their snapshots: which release they are, and what their clocks say.
//!
//! Input: the heads of their answers. Output: for who looks after a node (`rebalancer doctor`).
//! Must never be decided by: no two clocks are compared for anything but to say that they differ.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderValue, header};
use rebalancer_core::ids::ApiserverName;

/// How an agent names itself to its peers.
pub const SERVER: HeaderValue = HeaderValue::from_static(concat!("rebalancer/", env!("CARGO_PKG_VERSION")));

/// What one peer showed last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manner {
    /// The release of its agent.
    pub release: Option<String>,
    /// By how many seconds at least its clock is ahead of this one; below 0 it is behind.
    pub clock_ahead_s: Option<i64>,
}

impl Manner {
    /// From the head of an answer, between two looks at the own clock.
    pub fn of(head: &HeaderMap, asked: SystemTime, answered: SystemTime) -> Self {
        let text = |name| head.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let release = text(header::SERVER).and_then(|server| server.strip_prefix("rebalancer/"));
        let date = text(header::DATE).and_then(|date| httpdate::parse_http_date(date).ok());
        Self {
            // It goes into tables: what is longer is no release.
            release: release.filter(|release| release.len() <= 32).map(str::to_owned),
            clock_ahead_s: date.map(|date| ahead(seconds(date), seconds(asked), seconds(answered))),
        }
    }
}

fn seconds(time: SystemTime) -> f64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_secs_f64(),
        Err(error) => -error.duration().as_secs_f64(),
    }
}

/// A date has whole seconds (RFC 9110, section 5.6.7), and was written at some moment between the two looks.
fn ahead(date: f64, asked: f64, answered: f64) -> i64 {
    let (least, most) = (date - answered, date + 1.0 - asked);
    if least > 0.0 {
        least.floor() as i64
    } else if most < 0.0 {
        most.ceil() as i64
    } else {
        0
    }
}

/// The manners of all who have answered.
#[derive(Clone, Debug, Default)]
pub struct Manners(Arc<Mutex<BTreeMap<ApiserverName, Manner>>>);

impl Manners {
    /// Takes in what a peer showed.
    pub fn note(&self, peer: &ApiserverName, manner: Manner) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(peer.clone(), manner);
    }

    /// That one is followed no more.
    pub fn forget(&self, peer: &ApiserverName) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(peer);
    }

    /// What a peer showed, if anything.
    pub fn of(&self, peer: &str) -> Manner {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.iter().find(|(name, _)| name.as_str() == peer);
        found.map(|(_, manner)| manner.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_clock_is_called_another_when_no_moment_of_the_answer_explains_it() {
        for (date, asked, answered, expected) in [
            // Written within the second that the date names.
            (100.0, 100.2, 100.3, 0),
            (100.0, 99.9, 100.0, 0),
            // The second has just begun, or has just ended, on the other side.
            (100.0, 100.999, 101.001, 0),
            (101.0, 100.9, 100.95, 0),
            // A slow answer says little.
            (103.0, 100.0, 103.0, 0),
            (105.0, 100.0, 100.5, 4),
            (95.0, 100.0, 100.5, -4),
            (3700.0, 100.0, 100.5, 3599),
        ] {
            assert_eq!(
                ahead(date, asked, answered),
                expected,
                "{date} of {asked} to {answered}"
            );
        }
    }

    #[test]
    fn a_head_says_release_and_clock_or_nothing() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777);
        let mut head = HeaderMap::new();
        assert_eq!(Manner::of(&head, now, now), Manner::default());
        head.insert(header::SERVER, SERVER);
        // RFC 9110's own example of that second.
        head.insert(header::DATE, HeaderValue::from_static("Sun, 06 Nov 1994 08:49:37 GMT"));
        let manner = Manner::of(&head, now, now);
        assert_eq!(manner.release.as_deref(), Some(env!("CARGO_PKG_VERSION")));
        assert_eq!(manner.clock_ahead_s, Some(0));
        head.insert(header::SERVER, HeaderValue::from_static("nginx"));
        head.insert(header::DATE, HeaderValue::from_static("yesterday"));
        assert_eq!(Manner::of(&head, now, now), Manner::default());
    }
}
