//! `steer`: what a probe's answer costs, beside a probe that does nothing, and beside none.
//!
//! Input: the small server with the apiserver's own filter, on a kernel that takes the probe. Everything is measured in
//! one run, in alternation: an emulated machine's figures mean little, their ratios more.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rebalancer::steer::{Attachment, inspect, probe_cost_program};
use serde_json::{Value, json};

use super::machine::{kernel_release, processor};
use crate::{
    h2client::Client,
    netns::Namespace,
    pki::Pki,
    process::{Process, wait_for},
};

const PORT: u16 = 6443;
const PATIENCE: Duration = Duration::from_secs(120);

/// How often each way is measured, in alternation.
const ROUNDS: usize = 7;
/// Calls of the filter in one measurement.
const CALLS: u32 = 20_000;
/// Requests over the wire in one measurement, and how many connections send how many at once.
const REQUESTS: usize = 16_000;
const CONNECTIONS: usize = 8;
const AT_ONCE: usize = 10;

/// How often a binary is looked into.
const LOOKS: usize = 20;

/// What the probe costs.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Requests a second with the probe, over those without.
    pub requests_ratio: f64,
    /// Requests a second without.
    pub requests_per_second: f64,
    /// Nanoseconds of one call of the filter: without a probe, with one that does nothing, with the one that answers.
    pub ns: [f64; 3],
    /// Whether the processor is emulated.
    pub emulated: bool,
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        let [plain, empty, steer] = self.ns;
        json!({
            "requests_ratio": (self.requests_ratio * 1000.0).round() / 1000.0,
            "ns_per_hit": (steer - plain).round(),
            "ns_per_empty_hit": (empty - plain).round(),
            "hit_vs_empty": (self.over_empty() * 100.0).round() / 100.0,
            "emulated": self.emulated,
        })
    }

    /// The table.
    pub fn page(&self) -> String {
        let [plain, empty, steer] = self.ns;
        format!(
            "{}{}, Linux {}; the small server on k8s.io/apiserver's own filter.\nEach figure is the median of {ROUNDS} \
             rounds, in alternation: {CALLS} calls of the filter in the server itself, and {REQUESTS} requests over \
             {CONNECTIONS} connections, {AT_ONCE} at once on each.\n\n\
             | what | figure | bound |\n|---|--:|--:|\n\
             | a call of the filter without a probe, the lottery's own work | {plain:.0} ns | |\n\
             | a probe that does nothing: the trap, and the instruction stepped over | +{:.0} ns | |\n\
             | the probe that answers | +{:.0} ns | 2,000 natively |\n\
             | the probe that answers, over the one that does nothing | {:.2} | |\n\
             | requests a second with the probe, over those without ({:.0}) | {:.3} | at least 0.99 |\n",
            if self.emulated { "Emulated: " } else { "" },
            processor(),
            kernel_release(),
            empty - plain,
            steer - plain,
            self.over_empty(),
            self.requests_per_second,
            self.requests_ratio,
        )
    }

    fn over_empty(&self) -> f64 {
        let [plain, empty, steer] = self.ns;
        (steer - plain) / (empty - plain)
    }
}

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// Not root, or a kernel that refuses the probe.
pub fn run(server: &Path, directory: &Path, say: impl Fn(&str) + Send) -> anyhow::Result<Figures> {
    let namespace = Namespace::new()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let pki = Pki::new(&[address.ip()])?;
    let mut command = Command::new(server);
    command
        .arg(format!("--listen={address}"))
        .arg(format!("--tls-cert-file={}", pki.file("apiserver.crt").display()))
        .arg(format!(
            "--tls-private-key-file={}",
            pki.file("apiserver.key").display()
        ))
        // The lottery is on, and nobody wins.
        .arg("--goaway-chance=0.000000001");
    let server = Process::start("server", command, Some(namespace.fd()), directory)?;
    let up = wait_for(PATIENCE, || Client::try_connect(&pki, &namespace, address).ok());
    up.with_context(|| format!("the server does not answer:\n{}", server.log()))?;

    let inside = namespace.clone();
    let work = move || -> anyhow::Result<Figures> {
        // The probe is put on whoever listens in this thread's namespace.
        inside.enter()?;
        let mut asker = Client::connect(&pki, &inside, address);
        let mut call = || -> anyhow::Result<f64> {
            let answer = asker.get(&format!("/bench?n={CALLS}"));
            answer
                .trim()
                .parse()
                .with_context(|| format!("`{answer}` is no number"))
        };
        let per_second = || requests_per_second(&pki, &inside, address);
        let mut ns: [Vec<f64>; 3] = Default::default();
        let (mut without, mut ratios) = (Vec::new(), Vec::new());
        for round in 1..=ROUNDS {
            say(&format!("round {round} of {ROUNDS}"));
            ns[0].push(call()?);
            let bare = per_second();
            let empty = probe_cost_program(PORT, None)?;
            ns[1].push(call()?);
            drop(empty);
            let steer = Attachment::new(PORT, None)?;
            ns[2].push(call()?);
            let steered = per_second();
            drop(steer);
            // Between two without, so that a machine that slows down is nobody's fault.
            let bare = (bare + per_second()) / 2.0;
            without.push(bare);
            ratios.push(steered / bare);
        }
        Ok(Figures {
            requests_ratio: median(ratios),
            requests_per_second: median(without),
            ns: ns.map(median),
            emulated: processor().contains("QEMU"),
        })
    };
    thread::scope(|scope| scope.spawn(work).join()).map_err(|_| anyhow::anyhow!("the measuring thread panicked"))?
}

fn requests_per_second(pki: &Pki, namespace: &Namespace, address: SocketAddr) -> f64 {
    let mut clients: Vec<Client> = (0..CONNECTIONS)
        .map(|_| Client::connect(pki, namespace, address))
        .collect();
    let began = Instant::now();
    thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| {
                for _ in 0..REQUESTS / CONNECTIONS / AT_ONCE {
                    client.get_at_once("/", AT_ONCE);
                }
            });
        }
    });
    let answered: u64 = clients.iter().map(|client| client.requests).sum();
    answered as f64 / began.elapsed().as_secs_f64()
}

/// What finding the place in a binary costs.
#[derive(Clone, Copy, Debug)]
pub struct Finding {
    binary_mib: f64,
    ms: f64,
    mib: f64,
}

impl Finding {
    /// The object of figures.
    pub fn json(&self) -> Value {
        json!({
            "find_ms": (self.ms * 10.0).round() / 10.0,
            "find_mib": (self.mib * 10.0).round() / 10.0,
            "find_binary_mib": self.binary_mib.round(),
        })
    }

    /// The table.
    pub fn page(&self) -> String {
        format!(
            "{}; the median of {LOOKS} looks into a binary of {:.0} MiB.\n\n\
             | what | figure | bound |\n|---|--:|--:|\n\
             | finding the place | {:.1} ms | 300 |\n\
             | memory beyond the mapped file, at its highest | {:.1} MiB | 32 |\n",
            processor(),
            self.binary_mib,
            self.ms,
            self.mib
        )
    }
}

/// Looks into a binary.
///
/// # Errors
///
/// It cannot be read, or there is no place in it.
pub fn find(binary: &Path) -> anyhow::Result<Finding> {
    let before = anonymous_kib()?;
    let mut times = Vec::new();
    let done = AtomicBool::new(false);
    let highest = thread::scope(|scope| -> anyhow::Result<u64> {
        let watcher = scope.spawn(|| {
            let mut highest = before;
            while !done.load(Relaxed) {
                highest = highest.max(anonymous_kib().unwrap_or(0));
            }
            highest
        });
        for _ in 0..LOOKS {
            let began = Instant::now();
            let found = inspect(binary);
            times.push(began.elapsed().as_secs_f64() * 1000.0);
            if !matches!(found, Ok(Ok(_))) {
                done.store(true, Relaxed);
                found??;
            }
        }
        done.store(true, Relaxed);
        watcher
            .join()
            .map_err(|_| anyhow::anyhow!("the watching thread panicked"))
    })?;
    Ok(Finding {
        binary_mib: std::fs::metadata(binary)?.len() as f64 / f64::from(1 << 20),
        ms: median(times),
        mib: (highest - before) as f64 / 1024.0,
    })
}

/// This process's memory that is no file's.
fn anonymous_kib() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok());
    number.context("/proc/self/status has no RssAnon")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
