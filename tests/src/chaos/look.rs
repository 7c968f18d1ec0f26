//! What a cluster holds when it is at rest: its tables beside the kernel's list, its processes' files and memory.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;

use super::limits;
use crate::{
    demo::cluster::Cluster,
    node::{Node, PORT, ask},
};

/// Files beyond this are a leak: health checks and peers come and go.
const FILES: i64 = 24;

/// Memory beyond this is a leak: allocators keep what they had once.
const MEMORY: i64 = 32 << 20;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    what: String,
    id: u32,
    /// Open files, without those of client connections.
    files: i64,
    memory: i64,
}

/// All processes of ours.
pub struct Look(Vec<Held>);

impl Look {
    /// # Errors
    ///
    /// A process is gone, or does not answer.
    pub fn at(cluster: &Cluster) -> anyhow::Result<Self> {
        let mut held = Vec::new();
        for node in &cluster.nodes {
            held.push(held_by(&format!("{}'s agent", node.name), node.agent_id(), 0)?);
            if let Some(id) = node.relay_id() {
                // A client's socket, and the apiserver's for it.
                let of_clients = 2 * node.work()?.len() as i64;
                held.push(held_by(&format!("{}'s relay", node.name), id, of_clients)?);
            }
        }
        Ok(Self(held))
    }

    /// What each has in RAM, in MiB.
    pub fn memory(&self) -> BTreeMap<String, i64> {
        let mib = |held: &Held| (held.what.clone(), held.memory / (1 << 20));
        self.0.iter().map(mib).collect()
    }

    /// What grew more than chance makes it; a process that was started anew is compared with its predecessor all the same.
    pub fn grown_since(&self, before: &Self) -> Vec<String> {
        let pairs = self.0.iter().zip(&before.0);
        let grown = pairs.filter_map(|(now, before)| {
            let (files, memory) = (now.files - before.files, now.memory - before.memory);
            (files > FILES || memory > MEMORY).then(|| {
                format!(
                    "{}: {files:+} files and {:+} MiB since before",
                    now.what,
                    memory / (1 << 20)
                )
            })
        });
        grown.collect()
    }
}

fn held_by(what: &str, id: u32, of_clients: i64) -> anyhow::Result<Held> {
    Ok(Held {
        what: what.to_owned(),
        id,
        files: limits::descriptors(id)?.len() as i64 - of_clients,
        memory: limits::resident(id)? as i64,
    })
}

/// Connections that an agent's table has and the kernel does not, or the other way round; whatever opened or closed while
/// it was looked at is neither.
///
/// # Errors
///
/// An agent does not answer, or there is no `ss`.
pub fn wrong_connections(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let mut wrong = Vec::new();
    for (index, node) in cluster.nodes.iter().enumerate() {
        let kernel = || -> anyhow::Result<BTreeSet<String>> {
            let list = cluster.namespace(index).output("ss", "-Htn state established")?;
            Ok(peers(&list))
        };
        let before = kernel()?;
        let table = table(node)?;
        let after = kernel()?;
        let known: BTreeSet<_> = before.union(&after).cloned().collect();
        let stayed: BTreeSet<_> = before.intersection(&after).cloned().collect();
        let gone = table
            .difference(&known)
            .map(|client| format!("{}: {client} is gone", node.name));
        let unknown = stayed
            .difference(&table)
            .map(|client| format!("{}: {client} is not known", node.name));
        wrong.extend(gone.chain(unknown));
    }
    Ok(wrong)
}

/// Clients of the port, in what `ss -Htn` prints: two queues, the local address, the peer's.
fn peers(list: &str) -> BTreeSet<String> {
    let of = |line: &str| {
        let mut words = line.split_whitespace().skip(2);
        let (local, peer) = (words.next()?, words.next()?);
        local.ends_with(&format!(":{PORT}")).then(|| peer.to_owned())
    };
    list.lines().filter_map(of).collect()
}

fn table(node: &Node) -> anyhow::Result<BTreeSet<String>> {
    let answer = ask(&node.api(), "/v1/connections?limit=100000")?;
    let list = answer["connections"].as_array().context("connections")?;
    Ok(list
        .iter()
        .filter_map(|one| one["client"].as_str().map(str::to_owned))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_read_from_the_kernels_list() {
        let list = "0      0        10.77.0.11:6443     10.77.0.1:40544\n\
                    0      0         127.0.0.1:40000    127.0.0.1:6444 \n\
                    0      0        10.77.0.11:33120    10.77.0.12:6443\n";
        assert_eq!(peers(list), BTreeSet::from(["10.77.0.1:40544".to_owned()]));
    }

    #[test]
    fn what_grew_is_named() {
        let look = |files, memory| {
            Look(vec![Held {
                what: "a relay".to_owned(),
                id: 1,
                files,
                memory,
            }])
        };
        assert!(look(20, 1 << 20).grown_since(&look(10, 1 << 20)).is_empty());
        assert_eq!(
            look(50, 64 << 20).grown_since(&look(10, 1 << 20)),
            ["a relay: +40 files and +63 MiB since before"]
        );
    }
}
