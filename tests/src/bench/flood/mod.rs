//! The LIST flood: slow readers of large LISTs on a real kube-apiserver, and what holds them.
//!
//! Job: a row for each way of holding them, each with a fresh apiserver, without and with the relay before it: the
//! apiserver's memory at its highest, and what bystanders wait. Output: figures, and docs/flood.md.
//! Must never compare rows of different runs, nor flood anything outside a network namespace of its own.

mod clients;
mod report;
mod world;

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use clap::Args;

use self::{
    clients::{Flood, flood},
    world::World,
};
use super::machine::{Highest, rss_kib};

/// Who floods: a DaemonSet's service account, a pod a node, each with the account's token.
pub const FLOODER: &str = "system:serviceaccount:d8-cni-cilium:agent";

/// Its namespace and name.
const ACCOUNT: (&str, &str) = ("d8-cni-cilium", "agent");

/// How large, and for how long.
#[derive(Args, Clone, Debug)]
pub struct Effort {
    /// Clients that flood
    #[arg(long, default_value_t = 60)]
    pub clients: usize,
    /// Octets a second that each reads
    #[arg(long, default_value_t = 400_000)]
    pub pace: usize,
    /// Objects in the list; each has about 3 kB
    #[arg(long, default_value_t = 1_700)]
    pub objects: usize,
    /// Seconds of each flood
    #[arg(long, default_value_t = 40)]
    pub seconds: u64,
}

/// What holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Kubernetes' own levels, as they come.
    Nothing,
    /// A level with few shares, as published before levels borrowed.
    Article,
    /// What `rebalancer advise` prints.
    Advised,
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What held them.
    pub way: Way,
    /// Whether the relay stood before the apiserver.
    pub relayed: bool,
    /// The apiserver's memory before the flood, in KiB.
    pub before_kib: u64,
    /// At its highest.
    pub peak_kib: u64,
    /// What the relay took more at its highest than before, in KiB.
    pub relay_kib: Option<u64>,
    /// What the clients saw.
    pub flood: Flood,
    /// Who the relay says asked for most.
    pub heaviest: Option<Heaviest>,
}

/// The line of `flows` with the most octets.
#[derive(Clone, Debug)]
pub struct Heaviest {
    /// The user that a certificate names.
    pub user: Option<String>,
    /// The user agent.
    pub user_agent: String,
    /// The FlowSchema's name.
    pub schema: String,
    /// Octets of answers, in MB.
    pub megabytes: f64,
}

impl Row {
    /// What the flood took, in KiB.
    pub fn growth_kib(&self) -> u64 {
        self.peak_kib.saturating_sub(self.before_kib)
    }
}

/// All rows.
#[derive(Debug)]
pub struct Figures {
    effort: Effort,
    rows: Vec<Row>,
    advice: String,
}

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// Not root, no apiserver, or it is not what the clients expect.
pub fn run(rebalancer: &Path, effort: &Effort, directory: &Path, say: impl Fn(&str) + Copy) -> anyhow::Result<Figures> {
    let world = World::make(rebalancer, effort, directory, say)?;
    let advice = world.advice()?;
    let mut rows = Vec::new();
    for way in [Way::Nothing, Way::Article, Way::Advised] {
        for relayed in [false, true] {
            rows.push(row(&world, way, relayed, &advice, effort, say)?);
        }
    }
    Ok(Figures {
        effort: effort.clone(),
        rows,
        advice,
    })
}

fn row(
    world: &World,
    way: Way,
    relayed: bool,
    advice: &str,
    effort: &Effort,
    say: impl Fn(&str) + Copy,
) -> anyhow::Result<Row> {
    let manifest = match way {
        Way::Nothing => "",
        Way::Article => world::ARTICLE,
        Way::Advised => advice,
    };
    let name = format!("{way:?}{}", if relayed { "-relayed" } else { "" }).to_lowercase();
    let running = world.start(&name, relayed, manifest)?;
    let apiserver = running.apiserver.id();
    let relay = running.relay.as_ref().map(crate::process::Process::id);
    let rss = |process: u32| rss_kib(process).context("the process is gone");
    let mut begun = None;
    let duration = Duration::from_secs(effort.seconds);
    let seen = flood(world, running.address(), effort, duration, || {
        // The clients are connected, and nobody has asked for anything large.
        let before = (rss(apiserver)?, relay.map(rss).transpose()?);
        begun = Some((before, Highest::of(apiserver), relay.map(Highest::of)));
        Ok(())
    })?;
    let ((before_kib, relay_before), highest, relay_highest) = begun.context("the flood has begun")?;
    let row = Row {
        way,
        relayed,
        before_kib,
        peak_kib: highest.kib(),
        relay_kib: relay_highest.map(|highest| highest.kib().saturating_sub(relay_before.unwrap_or_default())),
        heaviest: if relayed { running.heaviest()? } else { None },
        flood: seen,
    };
    say(&format!(
        "{name}: {} MiB before, {} MiB at the peak; bystanders' P99 {:.0} ms; answers {:?}",
        row.before_kib / 1024,
        row.peak_kib / 1024,
        row.flood.p99_ms(),
        row.flood.statuses,
    ));
    running.end()?;
    Ok(row)
}
