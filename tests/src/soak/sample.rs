//! What the cluster's processes of ours hold at one moment.

use std::time::Duration;

use serde::Serialize;

use crate::{
    chaos::limits::{descriptors, resident},
    demo::cluster::Cluster,
};

/// One process.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Process {
    /// `node-3's relay`.
    pub what: String,
    pub id: u32,
    /// MiB that are resident.
    pub memory: f64,
    /// Open files without those of client connections.
    pub files: i64,
    pub threads: u64,
}

/// All of them.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Seconds since the beginning.
    pub at: f64,
    pub processes: Vec<Process>,
    /// Clients of each apiserver that are load.
    pub loads: Vec<u64>,
    /// Since the beginning.
    pub goaways: u64,
}

impl Sample {
    /// # Errors
    ///
    /// A process is gone, or does not answer.
    pub fn at(at: Duration, cluster: &Cluster, goaways: u64) -> anyhow::Result<Self> {
        let mut processes = Vec::new();
        for node in &cluster.nodes {
            processes.push(held(&format!("{}'s agent", node.name), node.agent_id(), 0)?);
            if let Some(id) = node.relay_id() {
                // A client's socket, and the apiserver's for it.
                let of_clients = 2 * node.work()?.len() as i64;
                processes.push(held(&format!("{}'s relay", node.name), id, of_clients)?);
            }
        }
        Ok(Self {
            at: at.as_secs_f64(),
            processes,
            loads: cluster.loads()?,
            goaways,
        })
    }
}

fn held(what: &str, id: u32, of_clients: i64) -> anyhow::Result<Process> {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task"))?;
    Ok(Process {
        what: what.to_owned(),
        id,
        memory: resident(id)? as f64 / f64::from(1 << 20),
        files: descriptors(id)?.len() as i64 - of_clients,
        threads: tasks.count() as u64,
    })
}
