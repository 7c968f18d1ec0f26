//! The relay beside haproxy, Envoy and the floor, in one run against the same backend.
//!
//! Input: programs. Output: [`Figures`]. Must never keep a figure of a run in which a client failed.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use anyhow::Context as _;

use super::{
    counts::{Counters, Tracepoints},
    load::{Load, Running, Served, Shape, Transfer},
    machine::{self, Busy, Cores, cpu_ns, pss_kib, sleeps},
    peers::{BACKEND, FIGURES, Peer, Programs, Start},
};
use crate::{
    pki::Pki,
    process::{Process, open_files},
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How often everything takes its turn.
    pub rounds: usize,
    /// How long one turn is measured.
    pub window: Duration,
    /// Clients with an open watch, for each proxy.
    pub watching: u64,
    /// The same for the relay once more, while others work.
    pub watching_relay: u64,
}

impl Effort {
    /// Five to six minutes.
    pub const FULL: Self = Self {
        rounds: 3,
        window: Duration::from_millis(2500),
        watching: 2000,
        watching_relay: 10_000,
    };

    /// Under two minutes.
    pub const QUICK: Self = Self {
        rounds: 1,
        window: Duration::from_millis(1500),
        watching: 500,
        watching_relay: 2000,
    };
}

/// Connections with one watch each, while events are counted.
const WATCHES: u64 = 50;

/// Between two events of one watch: 10,000 events a second in all.
const EVENT_PERIOD: Duration = Duration::from_millis(5);

/// How long system calls and timers are counted, once for each shape and proxy.
const COUNTED: Duration = Duration::from_millis(500);

/// Descriptors that the relay keeps beside its connections: for those that are not finished, and for everything else.
const SPARE_FILES: u64 = 2_048 + 512 + 64;

/// Connections of those who work while others watch, with room to spare.
const WORKING: u64 = 64;

/// What one turn of one proxy spent.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Requests, events or MiB.
    pub count: u64,
    /// The proxy's processor time for each, in microseconds.
    pub proxy_us: f64,
    /// The backend's.
    pub backend_us: f64,
    /// How often the proxy slept for each: what a wake-up costs is the machine's, how many there are is not.
    pub sleeps: f64,
}

/// What a proxy did for each request.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// System calls.
    pub calls: f64,
    /// Timers of the kernel.
    pub timers: f64,
}

/// What a proxy held for each client with an open watch.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// How many clients.
    pub clients: u64,
    /// KiB for each, both of its sides counted.
    pub kib_per_client: f64,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Figures {
    /// By shape and proxy.
    pub requests: BTreeMap<(&'static str, Peer), Vec<Sample>>,
    /// By shape and proxy; empty where the kernel does not count for us.
    pub counted: BTreeMap<(&'static str, Peer), Counted>,
    /// By direction and proxy, for each MiB.
    pub transfers: BTreeMap<(&'static str, Peer), Vec<Sample>>,
    /// By proxy.
    pub events: BTreeMap<Peer, Vec<Sample>>,
    /// The median of sequential response times in microseconds; `None` is directly.
    pub latency: BTreeMap<Option<Peer>, Vec<f64>>,
    /// By proxy.
    pub held: BTreeMap<Peer, Held>,
    /// The relay, with as many as descriptors allow.
    pub held_relay: Option<Held>,
    /// Requests of other clients while those were held: how many, and the relay's time for each in microseconds.
    pub while_held: Option<Sample>,
    /// Each turn's share of the two processors that others had.
    pub others: Vec<f64>,
    /// The versions of what was compared.
    pub versions: Vec<String>,
}

/// One run.
struct Bench<'a> {
    start: Start<'a>,
    load: Load<'a>,
    backend: Process,
    effort: Effort,
    figures: Figures,
    open_files: u64,
    tracepoints: Option<Tracepoints>,
}

/// A moment of a turn.
struct Moment {
    proxy_ns: u64,
    proxy_sleeps: u64,
    backend_ns: u64,
    client_ns: u64,
    served: Served,
    busy: Busy,
}

/// Measures everything; `say` hears what is being done.
///
/// # Errors
///
/// A program cannot be started, ends early, or a client does not get through.
pub fn run(programs: &Programs, effort: Effort, directory: &Path, say: impl Fn(&str)) -> anyhow::Result<Figures> {
    let cores = Cores::pick()?;
    let open_files = open_files().context("cannot ask how many files may be open")?;
    let pki = Pki::new(&[BACKEND.ip()])?;
    let start = Start {
        programs,
        pki: &pki,
        directory,
        cores,
        open_files,
    };
    let load = Load {
        program: &programs.h2load,
        libraries: &programs.libraries,
        figures: FIGURES,
        cores,
        directory,
    };
    let mut bench = Bench {
        backend: start.backend()?,
        start,
        load,
        effort,
        figures: Figures::default(),
        open_files,
        tracepoints: Tracepoints::find()
            .inspect_err(|error| say(&format!("system calls and timers are not counted: {error:#}")))
            .ok(),
    };
    let libraries = Some(&*programs.libraries);
    bench.figures.versions = vec![
        format!("haproxy {}", machine::version_of(&programs.haproxy, "-v", libraries)),
        format!("Envoy {}", machine::version_of(&programs.envoy, "--version", None)),
        format!(
            "h2load {}",
            machine::version_of(&programs.h2load, "--version", libraries)
        ),
    ];
    for peer in Peer::ALL {
        say(&format!("{}: memory of {} open watches", peer.name(), effort.watching));
        let held = bench.hold(peer, effort.watching, |_, _| Ok(()))?;
        bench.figures.held.insert(peer, held);
    }
    // Each client costs the relay two descriptors, and a fifth of the places are for clients with a certificate.
    let places = bench.open_files.saturating_sub(SPARE_FILES) / 2;
    let clients = effort.watching_relay.min(places / 5 * 4 - WORKING);
    say(&format!("relay: {clients} open watches, while other clients work"));
    bench.hold_while_working(clients)?;

    let mut proxies = Vec::new();
    for peer in Peer::ALL {
        proxies.push((peer, bench.start.peer(peer)?));
    }
    for round in 0..effort.rounds {
        say(&format!("round {} of {}", round + 1, effort.rounds));
        // Nobody is always the first after a pause.
        proxies.rotate_left(1);
        for shape in Shape::ALL {
            for (peer, proxy) in &proxies {
                bench.requests(*peer, proxy, shape)?;
            }
        }
        let direct = bench.load.requests(BACKEND.port(), Shape::Sequential)?;
        thread::sleep(effort.window);
        bench.latency(None, direct)?;
        for (peer, proxy) in &proxies {
            bench.events(*peer, proxy)?;
        }
        for transfer in Transfer::ALL {
            for (peer, proxy) in &proxies {
                bench.transfers(*peer, proxy, transfer)?;
            }
        }
    }
    Ok(bench.figures)
}

impl Bench<'_> {
    fn now(&self, proxy: &Process, client: &Running) -> anyhow::Result<Moment> {
        Ok(Moment {
            served: self.load.served()?,
            proxy_ns: cpu_ns(proxy.id())?,
            proxy_sleeps: sleeps(proxy.id())?,
            backend_ns: cpu_ns(self.backend.id())?,
            client_ns: cpu_ns(client.id())?,
            busy: Busy::now(self.start.cores)?,
        })
    }

    /// Watches a running client for one window.
    fn turn(&mut self, proxy: &Process, client: &mut Running, count: impl Fn(Served) -> u64) -> anyhow::Result<Sample> {
        let before = self.now(proxy, client)?;
        thread::sleep(self.effort.window);
        let after = self.now(proxy, client)?;
        client.check()?;
        let (proxy_ns, backend_ns) = (after.proxy_ns - before.proxy_ns, after.backend_ns - before.backend_ns);
        let ours = proxy_ns + backend_ns + after.client_ns - before.client_ns;
        self.figures.others.push(after.busy.others_share(before.busy, ours));
        let count = count(after.served) - count(before.served);
        anyhow::ensure!(count > 0, "nothing came through:\n{}", proxy.log());
        let each = |ns: u64| ns as f64 / 1000.0 / count as f64;
        Ok(Sample {
            count,
            proxy_us: each(proxy_ns),
            backend_us: each(backend_ns),
            sleeps: (after.proxy_sleeps - before.proxy_sleeps) as f64 / count as f64,
        })
    }

    fn requests(&mut self, peer: Peer, proxy: &Process, shape: Shape) -> anyhow::Result<()> {
        let mut client = self.load.requests(peer.port(), shape)?;
        let sample = self.turn(proxy, &mut client, |served| served.requests)?;
        let key = (shape.name(), peer);
        self.figures.requests.entry(key).or_default().push(sample);
        if let (Some(tracepoints), false) = (self.tracepoints, self.figures.counted.contains_key(&key)) {
            // A window of its own: to be counted costs something.
            let mut counters = Counters::start(proxy.id(), tracepoints)?;
            let (before, began) = (counters.read()?, self.load.served()?.requests);
            thread::sleep(COUNTED);
            let (after, ended) = (counters.read()?, self.load.served()?.requests);
            let each = |count: u64| count as f64 / (ended - began).max(1) as f64;
            let counted = Counted {
                calls: each(after.calls - before.calls),
                timers: each(after.timers - before.timers),
            };
            self.figures.counted.insert(key, counted);
        }
        if shape == Shape::Sequential {
            self.latency(Some(peer), client)?;
        } else {
            client.stop();
        }
        Ok(())
    }

    fn transfers(&mut self, peer: Peer, proxy: &Process, transfer: Transfer) -> anyhow::Result<()> {
        let mut client = self.load.transfers(peer.port(), transfer)?;
        let sample = self.turn(proxy, &mut client, |served| served.octets >> 20)?;
        let key = (transfer.name(), peer);
        self.figures.transfers.entry(key).or_default().push(sample);
        client.stop();
        Ok(())
    }

    fn latency(&mut self, peer: Option<Peer>, client: Running) -> anyhow::Result<()> {
        client.stop();
        let median = self.load.median_us()?;
        self.figures.latency.entry(peer).or_default().push(median);
        Ok(())
    }

    fn events(&mut self, peer: Peer, proxy: &Process) -> anyhow::Result<()> {
        let mut client = self.load.watches(peer.port(), WATCHES, Some(EVENT_PERIOD))?;
        let sample = self.turn(proxy, &mut client, |served| served.events)?;
        self.figures.events.entry(peer).or_default().push(sample);
        client.stop();
        Ok(())
    }

    /// Opens watches through a fresh proxy, and weighs it.
    fn hold(
        &mut self,
        peer: Peer,
        clients: u64,
        meanwhile: impl FnOnce(&mut Self, &Process) -> anyhow::Result<()>,
    ) -> anyhow::Result<Held> {
        let proxy = self.start.peer(peer)?;
        let before = pss_kib(proxy.id())?;
        let mut client = self.load.watches(peer.port(), clients, None)?;
        let after = pss_kib(proxy.id())?;
        meanwhile(self, &proxy)?;
        client.check()?;
        let open = self.load.served()?.watches;
        anyhow::ensure!(open == clients, "{} of {clients} watches are still open", open);
        client.stop();
        Ok(Held {
            clients,
            kib_per_client: after.saturating_sub(before) as f64 / clients as f64,
        })
    }

    fn hold_while_working(&mut self, clients: u64) -> anyhow::Result<()> {
        let mut worked = None;
        let held = self.hold(Peer::Relay, clients, |bench, proxy| {
            let mut working = bench.load.requests(Peer::Relay.port(), Shape::Batched)?;
            worked = Some(bench.turn(proxy, &mut working, |served| served.requests)?);
            working.stop();
            Ok(())
        })?;
        self.figures.held_relay = Some(held);
        self.figures.while_held = worked;
        Ok(())
    }
}
