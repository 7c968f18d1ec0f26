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
        for (index, node) in cluster.nodes.iter().enumerate() {
            held.push(held_by(&format!("{}'s agent", node.name), node.agent_id(), 0)?);
            if let Some(id) = node.relay_id() {
                // A client's socket, and the apiserver's for it; by the kernel's word, which forgets none of them.
                let of_clients = 2 * clients(cluster, index)?.len() as i64;
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
        pairs
            .filter_map(|(now, before)| now.grown(before, FILES, MEMORY, "before"))
            .collect()
    }
}

impl Held {
    /// More of something than that may come.
    fn grown(&self, before: &Self, most_files: i64, most_memory: i64, when: &str) -> Option<String> {
        let (files, memory) = (self.files - before.files, self.memory - before.memory);
        (files > most_files || memory > most_memory).then(|| {
            let mib = memory / (1 << 20);
            format!("{}: {files:+} files and {mib:+} MiB since {when}", self.what)
        })
    }
}

/// What each process held when it was looked at first: what leaks a little with each fault is found in the end.
#[derive(Debug, Default)]
pub struct First(BTreeMap<u32, Held>);

impl First {
    /// Those that are new.
    pub fn know(&mut self, look: &Look) {
        for held in &look.0 {
            self.0.entry(held.id).or_insert_with(|| held.clone());
        }
    }

    /// What has grown since by more than an allocator keeps and chance opens.
    pub fn grown_to(&self, now: &Look) -> Vec<String> {
        let grown = |held: &Held| held.grown(self.0.get(&held.id)?, 2 * FILES, 2 * MEMORY, "its beginning");
        now.0.iter().filter_map(grown).collect()
    }
}

/// Relays that were taken over and do not end, although the kernel knows no client of theirs any more: watches over HTTP/1.1
/// keep one for as long as they last.
///
/// # Errors
///
/// There is no `ss`.
pub fn left_over(cluster: &mut Cluster) -> anyhow::Result<Vec<String>> {
    let mut left = Vec::new();
    for index in 0..cluster.nodes.len() {
        for id in cluster.nodes[index].draining() {
            let list = cluster.namespace(index).output("ss", "-Htnp state established")?;
            let of_its = format!("pid={id},");
            let clients = list
                .lines()
                .filter(|line| line.contains(&of_its))
                .collect::<Vec<_>>()
                .join("\n");
            if peers(&clients).is_empty() {
                let name = &cluster.nodes[index].name;
                left.push(format!(
                    "{name}: the relay {id} was taken over, has no client, and still runs"
                ));
            }
        }
    }
    Ok(left)
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
        let before = clients(cluster, index)?;
        let table = table(node)?;
        let after = clients(cluster, index)?;
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

/// A node's clients, by the kernel's list.
fn clients(cluster: &Cluster, index: usize) -> anyhow::Result<BTreeSet<String>> {
    let list = cluster.namespace(index).output("ss", "-Htn state established")?;
    Ok(peers(&list))
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
    fn what_leaks_a_little_each_time_is_found_in_the_end() {
        let look = |id, files| {
            Look(vec![Held {
                what: "a relay".to_owned(),
                id,
                files,
                memory: 0,
            }])
        };
        let mut first = First::default();
        for files in [10, 30, 50, 70] {
            first.know(&look(1, files));
        }
        assert_eq!(first.grown_to(&look(1, 58)), [""; 0]);
        assert_eq!(
            first.grown_to(&look(1, 59)),
            ["a relay: +49 files and +0 MiB since its beginning"]
        );
        assert_eq!(first.grown_to(&look(2, 90)), [""; 0], "another process");
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
