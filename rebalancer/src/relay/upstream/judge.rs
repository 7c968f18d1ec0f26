//! What a check says of the apiserver, and which state follows from it.
//!
//! Input: answers and errors, and when they came. Output: a state, and why in words. Must never close the port for a
//! single failure, as long as somebody listens, nor take this process's own want of something for the apiserver's state.

use std::{
    io,
    time::{Duration, Instant},
};

use crate::shim::wire::Upstream;

/// So many checks in a row must fail before a port that is open closes.
const FAILURES: u32 = 2;

/// An apiserver that has begun to listen lets nobody do anything before it knows its rules (RBAC), and one whose rules let
/// nobody ask for `/readyz` answers the same for ever: so long after the first such answer it is the latter. One that has
/// no rules by then ends itself (pkg/registry/rbac/rest/storage_rbac.go, `EnsureRBACPolicy`).
pub const RULES: Duration = Duration::from_secs(30);

/// What a check found, and in what words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A client's request would find this.
    State(Upstream, String),
    /// It says that it is not ready: one that starts, or one that was ready and whose etcd is overloaded or away.
    NotReady(String),
    /// It was reached and ended the connection: it starts, or a packet was lost.
    Broken(String),
    /// Nobody listens there, by the kernel's own list.
    Gone(String),
    /// It knows who asks, and does not let him: its rules are like that, or are not there yet.
    Forbidden(String),
    /// Nothing was learned: the relay itself lacks something.
    Ours(String),
}

impl Found {
    fn is_bad(&self) -> bool {
        matches!(self, Self::State(Upstream::Unreachable | Upstream::Unusable, _))
    }
}

/// Whether the port is open in that state: a client sees an apiserver that starts, or is slow, as it is.
pub fn is_open(state: Upstream) -> bool {
    matches!(state, Upstream::Ready | Upstream::Starting | Upstream::Overloaded)
}

/// Which state follows a check: one failure closes nothing.
#[derive(Debug)]
pub struct Judge {
    /// As it is now.
    pub state: Upstream,
    /// Failures in a row.
    pub failures: u32,
    /// Since when it lets nobody ask.
    forbidden: Option<Instant>,
    /// Which listening socket the one had that was ready last, where that is known.
    was_ready: Option<Option<u64>>,
    /// Whether it ended the last check's connection.
    is_broken: bool,
}

impl Judge {
    /// Nothing has been asked.
    pub fn new() -> Self {
        Self {
            state: Upstream::Unknown,
            failures: 0,
            forbidden: None,
            was_ready: None,
            is_broken: false,
        }
    }

    /// Takes in what was found, and on which socket the apiserver listened when it was connected to last.
    pub fn take(&mut self, found: &Found, listener: Option<u64>, now: Instant) -> Upstream {
        let was_broken = std::mem::replace(&mut self.is_broken, matches!(found, Found::Broken(_)));
        match found {
            Found::Ours(_) => {}
            // Its clients are where they were, and so is what it knows: only what it needs does not answer in time.
            Found::NotReady(_) => {
                self.failures = 0;
                self.state = if self.was_ready == Some(listener) {
                    Upstream::Overloaded
                } else {
                    Upstream::Starting
                };
                if self.state == Upstream::Starting {
                    self.forbidden = None;
                }
            }
            Found::Forbidden(_) => {
                let since = *self.forbidden.get_or_insert(now);
                self.failures = 0;
                self.state = if now.saturating_duration_since(since) < RULES {
                    Upstream::Starting
                } else {
                    Upstream::Ready
                };
            }
            Found::Broken(_) => {
                self.failures = 0;
                self.state = Upstream::Starting;
                self.forbidden = None;
            }
            // A client that is let in would fail, and a load balancer that is refused goes elsewhere.
            Found::Gone(_) => {
                self.failures = FAILURES;
                self.state = Upstream::Unreachable;
                self.forbidden = None;
            }
            Found::State(state, _) => {
                self.failures = if found.is_bad() { self.failures + 1 } else { 0 };
                if self.failures == 0 || self.failures >= FAILURES || !is_open(self.state) {
                    self.state = *state;
                }
                // One that is slow for a moment is the same with the same rules.
                if *state != Upstream::Overloaded {
                    self.forbidden = None;
                }
            }
        }
        match self.state {
            Upstream::Ready => self.was_ready = Some(listener),
            Upstream::Overloaded | Upstream::Unknown => {}
            // One connection that ends is no other apiserver.
            Upstream::Starting if self.is_broken && !was_broken => {}
            // Whoever comes back has begun anew.
            Upstream::Starting | Upstream::Unreachable | Upstream::Unusable => self.was_ready = None,
        }
        self.state
    }
}

/// What an apiserver answers to `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    status: http::StatusCode,
    /// It ends: that is one of the checks it names when one fails (k8s.io/apiserver/pkg/server/healthz, `shutdownCheck`).
    ends: bool,
}

impl Readiness {
    /// Whether it was given to who the front proxy says that asks.
    pub fn believes(&self) -> bool {
        self.status != http::StatusCode::UNAUTHORIZED
    }

    /// Of an answer.
    pub fn new(status: http::StatusCode, text: &[u8]) -> Self {
        let mark = b"[-]shutdown failed";
        Self {
            status,
            ends: text.windows(mark.len()).any(|window| window == mark),
        }
    }
}

/// What TLS says is for good; a connection that ends may be an apiserver that starts.
pub fn failed(error: &(dyn std::error::Error + 'static), what: &str) -> Found {
    let mut cause = Some(error);
    let mut tls = false;
    let mut why = what.to_owned();
    while let Some(error) = cause {
        why = format!("{why}: {error}");
        if let Some(error) = error.downcast_ref::<io::Error>() {
            tls |= error.kind() == io::ErrorKind::InvalidData;
        }
        cause = error.source();
    }
    if tls {
        Found::State(Upstream::Unusable, why)
    } else {
        Found::Broken(why)
    }
}

/// What the answer to `/readyz` means.
pub fn judged(readiness: &Readiness) -> Found {
    let status = readiness.status;
    let state = match status {
        http::StatusCode::UNAUTHORIZED => {
            let why = "it answers 401 to the front proxy's certificate (--proxy-client-cert): has it expired, is it signed \
                       by the apiserver's --requestheader-client-ca-file, is its name allowed, and is the first name of \
                       --requestheader-username-headers one that the apiserver reads?";
            return Found::State(Upstream::Unusable, why.to_owned());
        }
        http::StatusCode::FORBIDDEN => {
            let why = "/readyz says 403: its rules are not loaded yet, or let nobody ask (system:public-info-viewer)";
            return Found::Forbidden(why.to_owned());
        }
        http::StatusCode::TOO_MANY_REQUESTS => Upstream::Overloaded,
        // Another server than kube-apiserver, which has no such path.
        status if status.is_success() || status.is_client_error() => Upstream::Ready,
        status if status.is_server_error() && !readiness.ends => {
            return Found::NotReady(format!("/readyz says {status}"));
        }
        _ => Upstream::Starting,
    };
    Found::State(state, format!("/readyz says {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_closes_nothing_and_want_of_our_own_says_nothing() {
        let found = |state| Found::State(state, String::new());
        let ours = Found::Ours(String::new());
        let mut judge = Judge::new();
        for (found, expected) in [
            (ours.clone(), Upstream::Unknown),
            (found(Upstream::Unreachable), Upstream::Unreachable),
            (found(Upstream::Ready), Upstream::Ready),
            (found(Upstream::Unreachable), Upstream::Ready),
            (found(Upstream::Ready), Upstream::Ready),
            (found(Upstream::Unusable), Upstream::Ready),
            (ours.clone(), Upstream::Ready),
            (found(Upstream::Unreachable), Upstream::Unreachable),
            (found(Upstream::Unusable), Upstream::Unusable),
            (found(Upstream::Overloaded), Upstream::Overloaded),
            (found(Upstream::Starting), Upstream::Starting),
        ] {
            assert_eq!(judge.take(&found, None, Instant::now()), expected);
        }
    }

    #[test]
    fn who_lets_nobody_ask_starts_and_is_ready_when_that_is_how_it_stays() {
        let found = |state| Found::State(state, String::new());
        let forbidden = Found::Forbidden(String::new());
        let began = Instant::now();
        let mut judge = Judge::new();
        let mut takes = |found: &Found, seconds| judge.take(found, Some(1), began + Duration::from_secs(seconds));
        // An apiserver that starts: 403 before its rules are there, and then what it says.
        assert_eq!(takes(&forbidden, 0), Upstream::Starting);
        assert_eq!(takes(&found(Upstream::Starting), 5), Upstream::Starting);
        assert_eq!(takes(&forbidden, 29), Upstream::Starting);
        assert_eq!(takes(&found(Upstream::Ready), 30), Upstream::Ready);
        // Another one behind the same address, and nobody has seen the first one end.
        assert_eq!(takes(&forbidden, 40), Upstream::Starting);
        // It stays like that: it is a cluster that lets nobody ask.
        assert_eq!(takes(&forbidden, 69), Upstream::Starting);
        assert_eq!(takes(&forbidden, 70), Upstream::Ready);
        assert_eq!(takes(&found(Upstream::Overloaded), 80), Upstream::Overloaded);
        assert_eq!(takes(&Found::Ours(String::new()), 81), Upstream::Overloaded);
        assert_eq!(takes(&forbidden, 82), Upstream::Ready);
        // It ends, and begins anew.
        assert_eq!(
            takes(&found(Upstream::Unreachable), 83),
            Upstream::Ready,
            "once is no failure"
        );
        assert_eq!(takes(&found(Upstream::Unreachable), 84), Upstream::Unreachable);
        assert_eq!(takes(&forbidden, 85), Upstream::Starting);
    }

    #[test]
    fn nobody_who_listens_is_no_single_failure() {
        let mut judge = Judge::new();
        let now = Instant::now();
        assert_eq!(
            judge.take(&Found::State(Upstream::Ready, String::new()), Some(1), now),
            Upstream::Ready
        );
        assert_eq!(
            judge.take(&Found::Broken(String::new()), Some(1), now),
            Upstream::Starting
        );
        assert_eq!(
            judge.take(&Found::Gone(String::new()), Some(1), now),
            Upstream::Unreachable
        );
        assert_eq!(
            judge.take(&Found::NotReady(String::new()), Some(1), now),
            Upstream::Starting,
            "whoever comes back has begun anew"
        );
    }

    #[test]
    fn what_an_answer_says_of_the_apiserver() {
        let judged = |status: u16, text: &str| {
            let status = http::StatusCode::from_u16(status).expect("a status");
            judged(&Readiness::new(status, text.as_bytes()))
        };
        let state = |status: u16| match judged(status, "ok") {
            Found::State(state, _) => state,
            other => panic!("{other:?}"),
        };
        assert_eq!([200, 404].map(state), [Upstream::Ready; 2]);
        assert!(matches!(judged(403, ""), Found::Forbidden(_)));
        assert_eq!(state(401), Upstream::Unusable);
        assert_eq!(state(429), Upstream::Overloaded);
        // As kube-apiserver 1.36 words it.
        let etcd = "[+]ping ok\n[-]etcd failed: reason withheld\n[+]shutdown ok\nreadyz check failed\n";
        assert!(matches!(judged(500, etcd), Found::NotReady(_)));
        assert!(matches!(judged(503, ""), Found::NotReady(_)));
        let ends = judged(
            500,
            "[+]etcd ok\n[-]shutdown failed: reason withheld\nreadyz check failed\n",
        );
        assert!(matches!(ends, Found::State(Upstream::Starting, _)));
    }

    #[test]
    fn one_that_was_ready_and_is_the_same_is_overloaded_and_does_not_start() {
        let ready = Found::State(Upstream::Ready, String::new());
        let slow = Found::State(Upstream::Overloaded, String::new());
        let gone = Found::State(Upstream::Unreachable, String::new());
        let ends = Found::State(Upstream::Starting, String::new());
        let broken = Found::Broken(String::new());
        let not_ready = Found::NotReady(String::new());
        for (before, listener, expected) in [
            (&[][..], Some(1), Upstream::Starting),
            (&[&ready], Some(1), Upstream::Overloaded),
            (&[&ready], Some(2), Upstream::Starting),
            (&[&ready, &slow], Some(1), Upstream::Overloaded),
            (&[&slow], Some(1), Upstream::Starting),
            (&[&ready, &not_ready, &slow, &not_ready], Some(1), Upstream::Overloaded),
            (&[&ready, &gone], Some(1), Upstream::Overloaded),
            (&[&ready, &gone, &gone], Some(1), Upstream::Starting),
            (&[&ready, &ends], Some(1), Upstream::Starting),
            (&[&ready, &broken], Some(1), Upstream::Overloaded),
            (&[&ready, &broken], Some(2), Upstream::Starting),
            (&[&ready, &broken, &broken], Some(1), Upstream::Starting),
            (&[&ready, &broken, &not_ready, &broken], Some(1), Upstream::Overloaded),
        ] {
            let mut judge = Judge::new();
            for found in before {
                judge.take(found, Some(1), Instant::now());
            }
            let state = judge.take(&not_ready, listener, Instant::now());
            assert_eq!(state, expected, "{before:?} and then on {listener:?}");
        }
    }
}
