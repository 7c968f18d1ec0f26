//! `steer`: what a probe's answer costs, beside a probe that does nothing, and beside none.
//!
//! Input: the small server with the apiserver's own filter, and kube-apiserver where it is at hand. Everything is measured
//! in one run, in alternation: an emulated machine's figures mean little, their ratios more.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rebalancer::steer::{Part, cost_program, inspect};
use serde_json::{Value, json};

use super::{
    bpf,
    machine::{kernel_release, processor},
    report::median,
};
use crate::{
    apiserver::{Settings, start_apiserver, start_etcd},
    fixture::Fixture,
    h2client::Client,
    netns::Namespace,
    pki::Pki,
    process::{Process, tail, wait_for},
};

const PATIENCE: Duration = Duration::from_secs(300);

/// How often each way is measured, in alternation.
const ROUNDS: usize = 7;
/// Calls of the filter in one measurement.
const CALLS: u32 = 20_000;
/// How many connections send how many requests at once.
const CONNECTIONS: usize = 8;
const AT_ONCE: usize = 10;
/// Requests of each connection before anything is measured; and for how long one measurement then is to ask.
const WARM_UP: usize = 200;
const WINDOW: Duration = Duration::from_secs(4);

/// Whose requests are counted.
#[derive(Clone, Copy, Debug)]
struct Target {
    name: &'static str,
    port: u16,
    path: &'static str,
}

/// The small server: it has nothing to do but to answer.
const SMALL: Target = Target {
    name: "the small server",
    port: 6443,
    path: "/",
};

/// The apiserver, asked for one object.
const REAL: Target = Target {
    name: "kube-apiserver",
    port: 6445,
    path: "/api/v1/namespaces/default",
};

/// How often a binary is looked into.
const LOOKS: usize = 20;

/// What the probe costs.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Whether it is the program without its answer.
    pub silent: bool,
    /// Instructions of that program, in the kernel's form; there is no loop in it.
    pub instructions: u32,
    /// Nanoseconds of one run of that program, as the kernel counts them.
    pub program_ns: f64,
    /// Whose requests were counted.
    pub asked: &'static str,
    /// Requests a second without a probe.
    pub requests_per_second: f64,
    /// Requests a second over those without: with a probe that does nothing, with the measured one.
    pub requests_ratios: [f64; 2],
    /// Nanoseconds of one call of the filter: without a probe, with one that does nothing, with the measured one.
    pub ns: [f64; 3],
    /// Whether the processor is emulated.
    pub emulated: bool,
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        let [plain, empty, probe] = self.ns;
        let [with_empty, with_probe] = self.requests_ratios.map(rounded_down);
        json!({
            "requests_ratio": with_probe,
            "requests_ratio_with_empty": with_empty,
            "ns_per_hit": (probe - plain).round(),
            "ns_per_empty_hit": (empty - plain).round(),
            "hit_vs_empty": (self.over_empty() * 100.0).round() / 100.0,
            "ns_of_program": self.program_ns.round(),
            "instructions": self.instructions,
            "requests_of": self.asked,
            "answers": !self.silent,
            "emulated": self.emulated,
        })
    }

    /// The table.
    pub fn page(&self) -> String {
        let [plain, empty, probe] = self.ns;
        let [with_empty, with_probe] = self.requests_ratios.map(rounded_down);
        let what = if self.silent {
            "the probe without its answer, and the instruction stepped over"
        } else {
            "the probe that answers"
        };
        format!(
            "{}{}, Linux {}.\nEach figure is the median of {ROUNDS} rounds, in alternation: {CALLS} calls of \
             k8s.io/apiserver's own filter in a small server, and requests over {CONNECTIONS} connections, {AT_ONCE} at \
             once on each, to {asked}.\n\n\
             | what | figure | bound |\n|---|--:|--:|\n\
             | a call of the filter without a probe, the lottery's own work | {plain:.0} ns | |\n\
             | a probe that does nothing: the trap, and the instruction stepped over | +{:.0} ns | |\n\
             | {what} | +{:.0} ns | 2,000 natively |\n\
             | of that the program itself, {} instructions, by the kernel's count | {:.0} ns | |\n\
             | {what}, over the one that does nothing | {:.2} | |\n\
             | requests a second of {asked} with a probe that does nothing, over those without ({:.0}) | {with_empty:.3} | |\n\
             | requests a second of {asked} with {what}, over those without | {with_probe:.3} | at least 0.99 |\n",
            if self.emulated { "Emulated: " } else { "" },
            processor(),
            kernel_release(),
            empty - plain,
            probe - plain,
            self.instructions,
            self.program_ns,
            self.over_empty(),
            self.requests_per_second,
            asked = self.asked,
        )
    }

    fn over_empty(&self) -> f64 {
        let [plain, empty, probe] = self.ns;
        (probe - plain) / (empty - plain)
    }
}

/// Three figures behind the point, never more than there is: the bound is a least one.
fn rounded_down(ratio: f64) -> f64 {
    (ratio * 1000.0).floor() / 1000.0
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    /// The small server on the apiserver's own filter.
    pub server: &'a Path,
    /// kube-apiserver and etcd, where they are at hand.
    pub real: Option<(&'a Path, &'a Path)>,
    /// Whether it is the program without its answer that is measured.
    pub silent: bool,
}

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// Not root, or a kernel that refuses the probe.
pub fn run(measured: Measured<'_>, directory: &Path, say: impl Fn(&str) + Send) -> anyhow::Result<Figures> {
    let namespace = Namespace::new()?;
    let pki = Pki::new(&[Ipv4Addr::LOCALHOST.into()])?;
    let mut servers = vec![start_small(measured.server, &pki, &namespace, directory)?];
    if let Some((apiserver, etcd)) = measured.real {
        say("starting kube-apiserver");
        servers.extend(start_real(apiserver, etcd, &pki, &namespace, directory)?);
    }
    let target = if measured.real.is_some() { REAL } else { SMALL };
    let bench = Bench {
        pki,
        namespace,
        target,
        silent: measured.silent,
    };
    thread::scope(|scope| scope.spawn(|| bench.measure(say)).join())
        .map_err(|_| anyhow::anyhow!("the measuring thread panicked"))?
}

/// The lottery is on, and nobody wins: the filter is asked at each request.
const CHANCE: f64 = 1e-9;

fn start_small(server: &Path, pki: &Pki, namespace: &Namespace, directory: &Path) -> anyhow::Result<Process> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, SMALL.port));
    let mut command = Command::new(server);
    command
        .arg(format!("--listen={address}"))
        .arg(format!("--tls-cert-file={}", pki.file("apiserver.crt").display()))
        .arg(format!(
            "--tls-private-key-file={}",
            pki.file("apiserver.key").display()
        ))
        .arg(format!("--goaway-chance={CHANCE:.9}"));
    let server = Process::start("server", command, Some(namespace.fd()), directory)?;
    let up = wait_for(PATIENCE, || Client::try_connect(pki, namespace, address).ok());
    up.with_context(|| format!("the server does not answer:\n{}", server.log()))?;
    Ok(server)
}

fn start_real(
    apiserver: &Path,
    etcd: &Path,
    pki: &Pki,
    namespace: &Namespace,
    directory: &Path,
) -> anyhow::Result<[Process; 2]> {
    let fixture = Fixture {
        apiserver: apiserver.to_owned(),
        etcd: etcd.to_owned(),
        swarm: PathBuf::new(),
    };
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let etcd = start_etcd(&fixture, at(2379), at(2380), directory, Some(namespace))?;
    let settings = Settings {
        fixture: &fixture,
        pki,
        etcd: at(2379),
        listen: at(REAL.port),
        // Not loopback, which it refuses; nobody goes there.
        advertise: Ipv4Addr::new(192, 0, 2, 1).into(),
        count: 1,
        directory,
        name: "kube-apiserver",
        goaway_chance: CHANCE,
        host: None,
        extra: &[],
    };
    let apiserver = start_apiserver(&settings, Some(namespace.fd()))?;
    let ready = wait_for(PATIENCE, || {
        let mut client = Client::try_connect(pki, namespace, settings.listen).ok()?;
        (client.try_get("/readyz") && client.try_get(REAL.path)).then_some(())
    });
    ready.with_context(|| format!("kube-apiserver is not ready:\n{}", tail(&apiserver.log())))?;
    Ok([etcd, apiserver])
}

struct Bench {
    pki: Pki,
    namespace: Namespace,
    target: Target,
    silent: bool,
}

impl Bench {
    fn measure(&self, say: impl Fn(&str)) -> anyhow::Result<Figures> {
        // The probe is put on whoever listens in this thread's namespace.
        self.namespace.enter()?;
        let mut asker = Client::connect(
            &self.pki,
            &self.namespace,
            SocketAddr::from((Ipv4Addr::LOCALHOST, SMALL.port)),
        );
        let mut call = || -> anyhow::Result<f64> {
            let answer = asker.get(&format!("/bench?n={CALLS}"));
            answer
                .trim()
                .parse()
                .with_context(|| format!("`{answer}` is no number"))
        };
        let measured = if self.silent { Part::SILENT } else { Part::STEER };
        let mut ns: [Vec<f64>; 3] = Default::default();
        let mut program_ns = Vec::new();
        let mut instructions = 0;
        let (mut without, mut ratios): (_, [Vec<f64>; 2]) = (Vec::new(), Default::default());
        // The first requests of a server are dearer than those that come later.
        let rate = self.requests_per_second(WARM_UP);
        let each = (rate * WINDOW.as_secs_f64()) as usize / CONNECTIONS;
        for round in 1..=ROUNDS {
            say(&format!("round {round} of {ROUNDS}"));
            ns[0].push(call()?);
            let mut bare = self.requests_per_second(each);
            for (index, part) in [Part::EMPTY, measured].into_iter().enumerate() {
                let mut probe = cost_program(part, SMALL.port)?;
                ns[index + 1].push(call()?);
                if index == 1 {
                    let (id, size) = probe.size()?;
                    instructions = size;
                    let _statistics = bpf::statistics()?;
                    call()?;
                    program_ns.push(bpf::ran(process::id(), &id.to_string())?.each());
                }
                drop(probe);
                let probe = cost_program(part, self.target.port)?;
                let probed = self.requests_per_second(each);
                drop(probe);
                // Between two without, so that a machine that slows down is nobody's fault.
                let after = self.requests_per_second(each);
                without.push(bare);
                ratios[index].push(probed / f64::midpoint(bare, after));
                bare = after;
            }
        }
        Ok(Figures {
            silent: self.silent,
            instructions,
            program_ns: median(program_ns),
            asked: self.target.name,
            requests_ratios: ratios.map(median),
            requests_per_second: median(without),
            ns: ns.map(median),
            emulated: processor().contains("QEMU"),
        })
    }

    /// With so many requests of each connection, and of all connections together.
    fn requests_per_second(&self, each: usize) -> f64 {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.target.port));
        let mut clients: Vec<Client> = (0..CONNECTIONS)
            .map(|_| Client::connect(&self.pki, &self.namespace, address))
            .collect();
        let began = Instant::now();
        thread::scope(|scope| {
            for client in &mut clients {
                scope.spawn(|| {
                    for _ in 0..each.div_ceil(AT_ONCE) {
                        client.get_at_once(self.target.path, AT_ONCE);
                    }
                });
            }
        });
        let answered: u64 = clients.iter().map(|client| client.requests).sum();
        answered as f64 / began.elapsed().as_secs_f64()
    }
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
