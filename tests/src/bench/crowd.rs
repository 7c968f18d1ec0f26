//! What an agent costs that has many connections: with nothing to do, and when most of them never finish their hello.
//!
//! Job: hold a crowd of connections to a watched port, and read the agent's memory and processor time.
//! Must never hold them in this process's own table of descriptors, which is smaller than the crowd on many machines.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use super::{
    kernel::client_hello,
    machine::{cpu_ns, pss_kib},
};
use crate::{
    netns::{Namespace, Network},
    node::{ask, ask_text},
    process::{Process, wait_for},
};

/// How many connections.
const CROWD: usize = 20_000;

/// How many one thread holds.
const GROUP: usize = 5_000;

/// How many of them send all of their hello but its last octets, when strangers are among them.
const UNFINISHED: usize = 16_384;

const PORT: u16 = 6443;

/// How long the agent may take to see all of them.
const PATIENCE: Duration = Duration::from_secs(120);

/// For how long nothing changes.
const QUIET: Duration = Duration::from_secs(30);

/// The figures.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    connections: usize,
    mib: f64,
    core_share: f64,
    /// The most that was seen while strangers began their hellos and until these were given up.
    unfinished_mib: f64,
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        json!({
            "connections": self.connections,
            "mib": (self.mib * 10.0).round() / 10.0,
            "core_share": (self.core_share * 1e5).round() / 1e5,
            "unfinished_hellos": UNFINISHED,
            "mib_with_unfinished_hellos": (self.unfinished_mib * 10.0).round() / 10.0,
        })
    }

    /// The table, as Markdown.
    pub fn page(&self) -> String {
        format!(
            "An agent with {} connections that all offered h2 and then did nothing for {} s, deciding every 5 s.\n\n\
             | what | figure | bound |\n|---|--:|--:|\n\
             | memory (PSS), MiB | {:.1} | 64 |\n\
             | processor time, share of a core | {:.2} % | 1 % |\n\
             | memory (PSS) at its highest when {UNFINISHED} of them never finish their hello, MiB | {:.1} | 64 |\n",
            self.connections,
            QUIET.as_secs(),
            self.mib,
            self.core_share * 100.0,
            self.unfinished_mib,
        )
    }
}

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// Not root, or the agent does not see them all.
pub fn run(rebalancer: &Path, directory: &Path, say: impl Fn(&str)) -> anyhow::Result<Figures> {
    let hello: Arc<[u8]> = client_hello()?.into();
    let mut figures = quiet(rebalancer, directory, &hello, &say)?;
    figures.unfinished_mib = unfinished(rebalancer, directory, &hello, &say)?;
    Ok(figures)
}

/// An agent, and a port on which connections are established that nobody accepts.
struct Crowded {
    network: Network,
    agent: Process,
    socket: PathBuf,
    address: SocketAddr,
    _listener: Socket,
}

impl Crowded {
    fn start(name: &str, rebalancer: &Path, directory: &Path) -> anyhow::Result<Self> {
        let network = Network::new(1)?;
        let node = &network.nodes[0];
        let address = SocketAddr::new(Network::node_address(0), PORT);
        let listener = listen(node, address)?;
        widen(&network.hub)?;
        let socket = directory.join(format!("{name}.sock"));
        let mut command = Command::new(rebalancer);
        command
            .args(["agent", "--node-name=crowd", "--source=ebpf"])
            .arg(format!("--apiserver-port={PORT}"))
            .arg(format!("--api=unix:{}", socket.display()));
        let agent = Process::start(name, command, Some(node.fd()), directory)?;
        wait_for(PATIENCE, || ask(&socket, "/v1/status").ok()).context("the agent does not answer")?;
        Ok(Self {
            network,
            agent,
            socket,
            address,
            _listener: listener,
        })
    }

    fn hold(&self, count: usize, hello: &Arc<[u8]>) -> anyhow::Result<Vec<Holder>> {
        let groups = (0..count.div_ceil(GROUP)).map(|group| GROUP.min(count - group * GROUP));
        groups
            .map(|group| Holder::start(&self.network.hub, self.address, Arc::clone(hello), group))
            .collect()
    }

    /// How many connections the agent knows, of those whose protocol is that.
    fn known(&self, protocol: &str) -> Option<usize> {
        let answer = ask(&self.socket, &format!("/v1/connections?protocol={protocol}&limit=1")).ok()?;
        usize::try_from(answer["total"].as_u64()?).ok()
    }
}

fn quiet(rebalancer: &Path, directory: &Path, hello: &Arc<[u8]>, say: impl Fn(&str)) -> anyhow::Result<Figures> {
    let mut crowded = Crowded::start("crowd-agent", rebalancer, directory)?;
    say(&format!("{CROWD} connections are opened and held"));
    let holders = crowded.hold(CROWD, hello)?;
    wait_for(PATIENCE, || (crowded.known("offered")? == CROWD).then_some(()))
        .context("the agent does not see them all")?;

    say(&format!("nothing happens for {} s", QUIET.as_secs()));
    let agent = crowded.agent.id();
    let (began, before) = (Instant::now(), cpu_ns(agent)?);
    thread::sleep(QUIET);
    let spent = cpu_ns(agent)? - before;
    let figures = Figures {
        connections: CROWD,
        mib: pss_kib(agent)? as f64 / 1024.0,
        core_share: spent as f64 / began.elapsed().as_nanos() as f64,
        unfinished_mib: f64::NAN,
    };
    crowded.agent.is_running()?;
    drop(holders);
    Ok(figures)
}

/// The most an agent holds in memory while strangers begin their hellos, and until these were given up, in MiB.
fn unfinished(rebalancer: &Path, directory: &Path, hello: &Arc<[u8]>, say: impl Fn(&str)) -> anyhow::Result<f64> {
    let mut crowded = Crowded::start("stranger-agent", rebalancer, directory)?;
    say(&format!("{UNFINISHED} of {CROWD} connections never finish their hello"));
    let over = AtomicBool::new(false);
    let agent = crowded.agent.id();
    let most = thread::scope(|scope| -> anyhow::Result<u64> {
        let watch = scope.spawn(|| -> anyhow::Result<u64> {
            let mut most = 0;
            while !over.load(Relaxed) {
                most = most.max(pss_kib(agent)?);
                thread::park_timeout(Duration::from_millis(20));
            }
            Ok(most)
        });
        let held = || -> anyhow::Result<()> {
            let whole = crowded.hold(CROWD - UNFINISHED, hello)?;
            let strangers = crowded.hold(UNFINISHED, &hello[..hello.len() - 7].into())?;
            let counted = |metric: &str| -> Option<u64> {
                let text = ask_text(&crowded.socket, "/metrics").ok()?;
                let line = text
                    .lines()
                    .find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '))?;
                line.parse().ok()
            };
            // Each is given up, for its age or for want of room, and counted.
            wait_for(PATIENCE, || {
                let given_up = counted("rebalancer_bpf_hellos_lost_total{kind=\"unfinished\"}")?;
                let known = (crowded.known("offered")?, crowded.known("unknown")?);
                (given_up == UNFINISHED as u64 && known == (CROWD - UNFINISHED, UNFINISHED)).then_some(())
            })
            .with_context(|| {
                format!(
                    "the agent does not see them all: {:?} offered, {:?} unknown, {:?} given up",
                    crowded.known("offered"),
                    crowded.known("unknown"),
                    counted("rebalancer_bpf_hellos_lost_total{kind=\"unfinished\"}")
                )
            })?;
            drop((whole, strangers));
            Ok(())
        };
        let held = held();
        over.store(true, Relaxed);
        let most = watch
            .join()
            .map_err(|_| anyhow::anyhow!("the watching thread panicked"))?;
        held?;
        most
    })?;
    crowded.agent.is_running()?;
    Ok(most as f64 / 1024.0)
}

/// Gives a client more ports: once half of them are taken the kernel searches long for each one more.
fn widen(hub: &Namespace) -> anyhow::Result<()> {
    let hub = hub.clone();
    let widen = move || -> anyhow::Result<()> {
        hub.enter()?;
        let path = "/proc/sys/net/ipv4/ip_local_port_range";
        fs::write(path, "1024 65535").with_context(|| format!("cannot write {path}"))
    };
    thread::spawn(widen)
        .join()
        .map_err(|_| anyhow::anyhow!("the thread panicked"))?
}

/// Listens where connections are established without being accepted: nobody needs a descriptor for them.
fn listen(node: &Namespace, address: SocketAddr) -> anyhow::Result<Socket> {
    let node = node.clone();
    let listen = move || -> anyhow::Result<Socket> {
        node.enter()?;
        for name in ["core/somaxconn", "ipv4/tcp_max_syn_backlog"] {
            let path = format!("/proc/sys/net/{name}");
            fs::write(&path, "65535").with_context(|| format!("cannot write {path}"))?;
        }
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind(&address.into())?;
        socket.listen(65_535)?;
        Ok(socket)
    };
    thread::spawn(listen)
        .join()
        .map_err(|_| anyhow::anyhow!("the thread panicked"))?
}

/// A thread with a table of descriptors of its own, full of connections, until this goes.
struct Holder {
    thread: thread::JoinHandle<()>,
}

impl Holder {
    fn start(hub: &Namespace, address: SocketAddr, hello: Arc<[u8]>, count: usize) -> anyhow::Result<Self> {
        let hub = hub.clone();
        let (opened, outcome) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let opening = || -> anyhow::Result<Vec<TcpStream>> {
                hub.enter()?;
                // SAFETY: unshare takes an integer and changes this thread alone, which owns what it opens from here on.
                if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
                    return Err(std::io::Error::last_os_error()).context("cannot have descriptors of its own");
                }
                (0..count)
                    .map(|_| {
                        let mut stream = TcpStream::connect(address)?;
                        stream.write_all(&hello)?;
                        Ok(stream)
                    })
                    .collect()
            };
            let held = opening();
            let failed = held.as_ref().err().map(|error| format!("{error:#}"));
            if opened.send(failed).is_ok() {
                thread::park();
            }
            drop(held);
        });
        let failed = outcome.recv().context("a thread that opens connections panicked")?;
        match failed {
            None => Ok(Self { thread }),
            Some(why) => anyhow::bail!("cannot open {count} connections: {why}"),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.thread.thread().unpark();
    }
}
