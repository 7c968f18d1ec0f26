//! By what it is seen that a fault was there: what the kernel, or the process that is hit, says of it.
//!
//! Must never take what was ordered for what has happened.

use std::{fs, time::Duration};

use anyhow::{Context as _, ensure};

use super::made::inside;
use crate::{demo::cluster::Cluster, netns::Namespace, node::Node, process::wait_for};

/// How long something may take to be seen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until it is seen.
///
/// # Errors
///
/// It is not, or cannot be looked at.
pub fn eventually(what: &str, mut look: impl FnMut() -> anyhow::Result<Option<String>>) -> anyhow::Result<String> {
    let mut last = None;
    let seen = wait_for(PATIENCE, || match look() {
        Ok(seen) => seen,
        Err(error) => {
            last = Some(error);
            None
        }
    });
    match (seen, last) {
        (Some(seen), _) => Ok(seen),
        (None, Some(error)) => Err(error.context(what.to_owned())),
        (None, None) => anyhow::bail!("{what}"),
    }
}

/// A process that stands still (`T` in proc_pid_stat(5)).
///
/// # Errors
///
/// It runs, or is gone.
pub fn stands_still(id: u32) -> anyhow::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).with_context(|| format!("process {id}"))?;
    // The name before it is in brackets, and may hold any octet.
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().next());
    ensure!(state == Some("T"), "process {id} is in state {state:?}");
    Ok("stopped".to_owned())
}

/// A process that has ended.
///
/// # Errors
///
/// It is there.
pub fn has_ended(id: u32) -> anyhow::Result<String> {
    ensure!(
        fs::metadata(format!("/proc/{id}")).is_err(),
        "process {id} is still there"
    );
    Ok("it has ended".to_owned())
}

/// Packets that rules have dropped in the nodes' namespaces.
///
/// # Errors
///
/// None were.
pub fn dropped(cluster: &Cluster, nodes: &[usize]) -> anyhow::Result<String> {
    let mut all = 0;
    for node in nodes {
        let mut here = 0;
        for chain in ["INPUT", "OUTPUT"] {
            here += dropped_by(
                &cluster
                    .namespace(*node)
                    .output("iptables", &format!("-w -nvxL {chain}"))?,
            );
        }
        ensure!(here > 0, "no packet of node {} was dropped", node + 1);
        all += here;
    }
    Ok(format!("{all} packets dropped"))
}

/// In what `iptables -nvxL` prints: a line a rule, which begins with its packets and its octets.
fn dropped_by(list: &str) -> u64 {
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        let packets: u64 = words.next()?.parse().ok()?;
        (words.nth(1)? == "DROP").then_some(packets)
    };
    list.lines().filter_map(of).sum()
}

/// Packets that had to wait in the node's queue (`overlimits`, tc(8)).
///
/// # Errors
///
/// None had.
pub fn waited(namespace: &Namespace) -> anyhow::Result<String> {
    let text = namespace.output("tc", "-s qdisc show dev eth0")?;
    let number = |name: &str| {
        let after = text.split_once(name)?.1;
        let digits: String = after.trim_start().chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok()
    };
    let (over, lost) = (
        number("overlimits").context("overlimits")?,
        number("dropped").unwrap_or_default(),
    );
    ensure!(over > 0, "no packet waited: {text}");
    Ok(format!("the queue was full {over} times, {lost} packets dropped"))
}

/// Connections from a port of that range on a node, in the kernel's list.
///
/// # Errors
///
/// There are none.
pub fn ports_in(namespace: &Namespace, range: std::ops::RangeInclusive<u16>) -> anyhow::Result<String> {
    let list = namespace.output("ss", "-Htn")?;
    let of = |line: &&str| {
        let local = line.split_whitespace().nth(3)?;
        let port: u16 = local.rsplit_once(':')?.1.parse().ok()?;
        range.contains(&port).then_some(())
    };
    let count = list.lines().filter(|line| of(line).is_some()).count();
    ensure!(count > 0, "no connection is from these ports");
    Ok(format!("{count} connections from them"))
}

/// How often each of the phrases is in a text, together.
pub fn said(text: &str, phrases: &[&str]) -> usize {
    phrases.iter().map(|phrase| text.matches(phrase).count()).sum()
}

/// What all those nodes' logs say more often than before, if they do.
pub fn said_since(
    nodes: &[&Node],
    before: &[usize],
    log: impl Fn(&Node) -> String,
    phrases: &[&str],
) -> Option<String> {
    let all = nodes
        .iter()
        .zip(before)
        .all(|(node, before)| said(&log(node), phrases) > *before);
    all.then(|| format!("\"{}\" in the log", phrases[0]))
}

/// The range of ports that the kernel chooses from in a namespace.
///
/// # Errors
///
/// It cannot be read.
pub fn range_of_ports(namespace: &Namespace) -> anyhow::Result<String> {
    inside(namespace, || {
        fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").context("the range of ports")
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn dropped_packets_are_read_from_the_rules() {
        let list = "Chain INPUT (policy ACCEPT 0 packets, 0 bytes)\n    pkts      bytes target     prot opt in     out     source\n      \
                    12     7200 DROP       0    --  *      *       10.77.0.12           0.0.0.0/0\n       5      300 ACCEPT     0    --  *  \
                    *  0.0.0.0/0  0.0.0.0/0\n       3      180 DROP       0    --  !lo    *       0.0.0.0/0            0.0.0.0/0\n";
        assert_eq!(dropped_by(list), 15);
    }

    #[test]
    fn a_process_is_seen_to_stand_still_and_to_have_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("a process");
        let id = child.id();
        assert!(stands_still(id).is_err() && has_ended(id).is_err());
        // SAFETY: kill takes two integers; the id is of a child that has not been waited for.
        unsafe { libc::kill(id as libc::pid_t, libc::SIGSTOP) };
        eventually("it stands still", || Ok(stands_still(id).ok())).expect("it stands still");
        child.kill().expect("it is there");
        child.wait().expect("it ends");
        has_ended(id).expect("it has ended");
    }
}
