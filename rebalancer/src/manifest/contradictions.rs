//! Flags that are good by themselves and not together.
//!
//! Input: the flags of both parts. Output: a sentence that names both, and what to do.

use std::net::{IpAddr, SocketAddr};

use super::{Flags, ManifestError, Part};

/// Where a relay has its control socket unless told otherwise.
const CONTROL: &str = "unix:/run/rebalancer/relay.sock";

/// Where a relay listens unless told otherwise.
const LISTEN: &str = "[::]:6443";

/// Where pods have the host's cgroups.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// Looks at both together.
///
/// # Errors
///
/// The first contradiction.
pub fn check(agent: &Flags, relay: Option<&Flags>) -> Result<(), ManifestError> {
    if let Some(relay) = relay {
        sockets(agent, relay)?;
        way_in(agent, relay)?;
    }
    ports(agent, relay)
}

/// What a pod cannot have.
///
/// # Errors
///
/// A directory that is not the pod's.
pub fn check_pod(agent: &Flags) -> Result<(), ManifestError> {
    match agent.value("cgroup-root") {
        Some(root) if !std::path::Path::new(root).starts_with(CGROUPS) => Err(refused(format!(
            "--cgroup-root {root}: a pod has the host's cgroups at {CGROUPS}: leave it out"
        ))),
        _ => Ok(()),
    }
}

fn refused(why: String) -> ManifestError {
    ManifestError::Contradiction(why)
}

/// The agent orders about this very relay.
fn sockets(agent: &Flags, relay: &Flags) -> Result<(), ManifestError> {
    let asked = agent.value("shim").and_then(|shim| shim.strip_prefix("relay:"));
    let control = relay.value("control").unwrap_or(CONTROL);
    match asked {
        Some(asked) if asked != control => Err(refused(format!(
            "the agent's --shim asks {asked}, and the relay's --control is {control}: give both the same socket"
        ))),
        _ => Ok(()),
    }
}

/// Clients reach the relay, and the relay the apiserver.
fn way_in(agent: &Flags, relay: &Flags) -> Result<(), ManifestError> {
    let listen = relay.value("listen").unwrap_or(LISTEN);
    let Ok(at) = listen.parse::<SocketAddr>() else {
        return Ok(());
    };
    if at.ip().to_canonical().is_loopback() && !agent.intercepts() {
        return Err(refused(format!(
            "the relay's --listen is {listen}, and the agent has no --intercept: no client would reach the relay: give one \
             of the two another value"
        )));
    }
    match relay.value("upstream").and_then(|upstream| upstream.parse().ok()) {
        Some(upstream) if is_itself(at, upstream) => Err(refused(format!(
            "the relay's --listen is {listen} and its --upstream {upstream}: it would talk to itself, or the apiserver not \
             start: give it another port, or --intercept with a port of its own"
        ))),
        _ => Ok(()),
    }
}

/// Whether who connects to an address of this host may come to a socket that listens on another.
pub fn is_itself(listen: SocketAddr, upstream: SocketAddr) -> bool {
    let (here, there) = (listen.ip().to_canonical(), upstream.ip().to_canonical());
    let is_all = here.is_unspecified() && (there.is_loopback() || there.is_unspecified());
    // An address of IPv4 alone takes no client of IPv6.
    let is_of_family = matches!(here, IpAddr::V6(_)) || there.is_ipv4();
    listen.port() == upstream.port() && (here == there || is_all && is_of_family)
}

/// All are ports of the host.
fn ports(agent: &Flags, relay: Option<&Flags>) -> Result<(), ManifestError> {
    let has_peers = agent.value("peer").or(agent.value("peers")).is_some();
    let wanted = [
        (Part::Agent, "metrics", Some("127.0.0.1:9470")),
        (Part::Agent, "peer-listen", has_peers.then_some("[::]:9443")),
        (Part::Agent, "lb-agent", None),
        (Part::Relay, "listen", Some(LISTEN)),
        (Part::Relay, "metrics", None),
    ];
    let mut taken: Vec<(u16, String)> = Vec::new();
    for (part, flag, default) in wanted {
        let flags = match part {
            Part::Agent => Some(agent),
            Part::Relay => relay,
        };
        let address = flags.and_then(|flags| flags.value(flag).or(default));
        let port = address.and_then(|address| address.rsplit_once(':')?.1.parse::<u16>().ok());
        // 0 is any.
        let Some(port) = port.filter(|port| *port > 0) else {
            continue;
        };
        let name = format!("the {part}'s --{flag}");
        if let Some((_, other)) = taken.iter().find(|(other, _)| *other == port) {
            return Err(refused(format!(
                "{other} and {name} are both port {port} of the host: give them two"
            )));
        }
        taken.push((port, name));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_that_would_come_to_itself_is_seen() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        for (listen, upstream, expected) in [
            ("[::]:6443", "127.0.0.1:6443", true),
            ("[::]:6443", "[::1]:6443", true),
            ("0.0.0.0:6443", "127.0.0.1:6443", true),
            ("0.0.0.0:6443", "[::1]:6443", false),
            ("127.0.0.1:6443", "127.0.0.1:6443", true),
            ("127.0.0.1:6443", "[::ffff:127.0.0.1]:6443", true),
            ("127.0.0.1:6445", "127.0.0.1:6443", false),
            ("10.0.0.1:6443", "127.0.0.1:6443", false),
            // Another host's.
            ("[::]:6443", "10.0.0.2:6443", false),
        ] {
            assert_eq!(is_itself(at(listen), at(upstream)), expected, "{listen} {upstream}");
        }
    }
}
