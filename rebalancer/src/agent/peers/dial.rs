//! Connecting to a host that has several addresses, some of which lead nowhere (RFC 8305, "Happy Eyeballs").
//!
//! Input: a name and a port. Output: the first connection that works, or a word on every address.
//! Must never let an address that does not answer take the time of the others.

use std::{future::Future, net::SocketAddr, time::Duration};

use rebalancer_core::view::PeerFault;
use tokio::{
    net::lookup_host,
    task::JoinSet,
    time::{Instant, sleep_until, timeout_at},
};

/// How long an attempt is alone before the next address is tried beside it (RFC 8305, section 8).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Addresses that are tried at most.
const MOST: usize = 8;

/// Resolves the host and tries its addresses.
///
/// # Errors
///
/// None works within `patience`: each address, and what became of it.
pub async fn dial<T, F>(
    host: &str,
    port: u16,
    patience: Duration,
    attempt: impl Fn(SocketAddr) -> F,
) -> Result<(SocketAddr, T), PeerFault>
where
    T: Send + 'static,
    F: Future<Output = Result<T, PeerFault>> + Send + 'static,
{
    let deadline = Instant::now() + patience;
    let named = |why: &dyn std::fmt::Display| PeerFault::Unreachable(format!("{host}:{port}: {why}"));
    let found = match timeout_at(deadline, lookup_host((host, port))).await {
        Ok(found) => found.map_err(|error| named(&error))?,
        Err(_) => {
            return Err(named(&format_args!(
                "the name was not resolved within {} s",
                patience.as_secs()
            )));
        }
    };
    let addresses = interleaved(found);
    if addresses.is_empty() {
        return Err(named(&"the name has no address"));
    }
    race(&addresses, deadline, attempt).await.map_err(|fault| match fault {
        PeerFault::Unreachable(why) if !is_address(host) => PeerFault::Unreachable(format!("{host}: {why}")),
        PeerFault::Refused(why) if !is_address(host) => PeerFault::Refused(format!("{host}: {why}")),
        fault => fault,
    })
}

fn is_address(host: &str) -> bool {
    host.parse::<std::net::IpAddr>().is_ok()
}

/// The families by turns, beginning with that of the first (RFC 8305, section 4).
fn interleaved(found: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = Vec::new();
    for address in found {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    let Some(first) = all.first().copied() else {
        return all;
    };
    let (mut ours, mut others): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|address| address.is_ipv6() == first.is_ipv6());
    ours.reverse();
    others.reverse();
    let mut turns = Vec::new();
    while turns.len() < MOST {
        let next = if turns.len() % 2 == 0 {
            ours.pop().or_else(|| others.pop())
        } else {
            others.pop().or_else(|| ours.pop())
        };
        match next {
            Some(address) => turns.push(address),
            None => break,
        }
    }
    turns
}

/// Tries one after the other, a moment apart; the first that works ends the others.
async fn race<T, F>(
    addresses: &[SocketAddr],
    deadline: Instant,
    attempt: impl Fn(SocketAddr) -> F,
) -> Result<(SocketAddr, T), PeerFault>
where
    T: Send + 'static,
    F: Future<Output = Result<T, PeerFault>> + Send + 'static,
{
    let began = Instant::now();
    let mut said: Vec<(SocketAddr, Option<PeerFault>)> = Vec::new();
    let mut attempts = JoinSet::new();
    let mut next = addresses.iter().copied();
    let mut next_at = began;
    loop {
        let waits = said.len() < addresses.len();
        tokio::select! {
            // One that works is taken, although it may be time for the next.
            biased;
            Some(joined) = attempts.join_next() => {
                // One that panicked is one that does not answer.
                let Ok((address, result)) = joined else { continue };
                match result {
                    Ok(connected) => return Ok((address, connected)),
                    Err(fault) => {
                        if let Some(entry) = said.iter_mut().find(|(known, _)| *known == address) {
                            entry.1 = Some(fault);
                        }
                        next_at = Instant::now();
                    }
                }
            }
            () = sleep_until(next_at), if waits => {
                if let Some(address) = next.next() {
                    said.push((address, None));
                    let attempt = attempt(address);
                    attempts.spawn(async move { (address, attempt.await) });
                }
                next_at = Instant::now() + ATTEMPT_DELAY;
            }
            () = sleep_until(deadline) => break,
        }
        if attempts.is_empty() && said.len() == addresses.len() {
            break;
        }
    }
    Err(verdict(&said, deadline - began))
}

/// A word on each address that was tried; who answered and refused says more than who did not answer.
fn verdict(said: &[(SocketAddr, Option<PeerFault>)], patience: Duration) -> PeerFault {
    let words: Vec<String> = said
        .iter()
        .map(|(address, fault)| match fault {
            None => format!("{address} did not answer within {:.0} s", patience.as_secs_f64()),
            Some(PeerFault::Unreachable(why) | PeerFault::Refused(why) | PeerFault::Disagrees(why)) => {
                format!("{address}: {why}")
            }
        })
        .collect();
    let words = words.join("; ");
    if said
        .iter()
        .any(|(_, fault)| matches!(fault, Some(PeerFault::Refused(_))))
    {
        PeerFault::Refused(words)
    } else {
        PeerFault::Unreachable(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn addresses() -> [SocketAddr; 3] {
        ["[2001:db8::2]:9443", "192.0.2.1:9443", "192.0.2.2:9443"].map(address)
    }

    fn soon(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    /// What each of the addresses does, as a network would.
    async fn network(to: SocketAddr) -> Result<u8, PeerFault> {
        match to.to_string().as_str() {
            "[2001:db8::2]:9443" => std::future::pending().await,
            "192.0.2.1:9443" => Err(PeerFault::Unreachable("connection refused".to_owned())),
            _ => Ok(7),
        }
    }

    #[tokio::test]
    async fn an_address_that_leads_nowhere_holds_up_nobody() {
        let won = race(&addresses(), soon(600), network).await;
        assert_eq!(won, Ok((address("192.0.2.2:9443"), 7)));
    }

    #[tokio::test]
    async fn a_failure_names_every_address_and_what_it_did() {
        let fault = race(&addresses()[..2], soon(1), network).await;
        let Err(PeerFault::Unreachable(said)) = fault else {
            panic!("{fault:?}");
        };
        for part in [
            "[2001:db8::2]:9443 did not answer within 1 s",
            "192.0.2.1:9443: connection refused",
        ] {
            assert!(said.contains(part), "{said}");
        }
        let refuses = |to: SocketAddr| async move {
            if to.is_ipv6() {
                return Err::<u8, _>(PeerFault::Refused("unknown CA".to_owned()));
            }
            network(to).await
        };
        let fault = race(&addresses()[..2], soon(600), refuses).await;
        assert!(matches!(&fault, Err(PeerFault::Refused(said)) if said.contains("192.0.2.1") && said.contains("CA")));
    }

    #[test]
    fn families_take_turns() {
        let found = ["[::1]:1", "[::2]:1", "[::2]:1", "[::3]:1", "192.0.2.1:1"].map(address);
        let turns = ["[::1]:1", "192.0.2.1:1", "[::2]:1", "[::3]:1"].map(address);
        assert_eq!(interleaved(found.into_iter()), turns);
    }
}
