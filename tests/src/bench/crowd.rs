//! What an agent costs that has many connections and nothing to do.
//!
//! Job: hold a crowd of connections to a watched port, and read the agent's memory and processor time.
//! Must never hold them in this process's own table of descriptors, which is smaller than the crowd on many machines.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    sync::Arc,
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
    node::ask,
    process::{Process, wait_for},
};

/// How many connections.
const CROWD: usize = 20_000;

/// How many one thread holds.
const GROUP: usize = 5_000;

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
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        json!({
            "connections": self.connections,
            "mib": (self.mib * 10.0).round() / 10.0,
            "core_share": (self.core_share * 1e5).round() / 1e5,
        })
    }

    /// The table, as Markdown.
    pub fn page(&self) -> String {
        format!(
            "An agent with {} connections that all offered h2 and then did nothing for {} s, deciding every 5 s.\n\n\
             | what | figure | bound |\n|---|--:|--:|\n\
             | memory (PSS), MiB | {:.1} | 64 |\n\
             | processor time, share of a core | {:.2} % | 1 % |\n",
            self.connections,
            QUIET.as_secs(),
            self.mib,
            self.core_share * 100.0
        )
    }
}

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// Not root, or the agent does not see them all.
pub fn run(rebalancer: &Path, directory: &Path, say: impl Fn(&str)) -> anyhow::Result<Figures> {
    let network = Network::new(1)?;
    let node = &network.nodes[0];
    let address = SocketAddr::new(Network::node_address(0), PORT);
    let _listener = listen(node, address)?;
    let socket = directory.join("crowd-agent.sock");
    let mut command = Command::new(rebalancer);
    command
        .args(["agent", "--node-name=crowd"])
        .arg(format!("--apiserver-port={PORT}"))
        .arg(format!("--api=unix:{}", socket.display()));
    let mut agent = Process::start("crowd-agent", command, Some(node.fd()), directory)?;
    wait_for(PATIENCE, || ask(&socket, "/v1/status").ok()).context("the agent does not answer")?;

    say(&format!("{CROWD} connections are opened and held"));
    let hello: Arc<[u8]> = client_hello()?.into();
    let holders = (0..CROWD / GROUP).map(|_| Holder::start(&network.hub, address, Arc::clone(&hello)));
    let holders = holders.collect::<anyhow::Result<Vec<_>>>()?;
    let all = |answer: &Value| answer["total"] == CROWD;
    wait_for(PATIENCE, || {
        ask(&socket, "/v1/connections?protocol=offered&limit=1")
            .ok()
            .filter(all)
    })
    .context("the agent does not see them all")?;

    say(&format!("nothing happens for {} s", QUIET.as_secs()));
    let (began, before) = (Instant::now(), cpu_ns(agent.id())?);
    thread::sleep(QUIET);
    let spent = cpu_ns(agent.id())? - before;
    let figures = Figures {
        connections: CROWD,
        mib: pss_kib(agent.id())? as f64 / 1024.0,
        core_share: spent as f64 / began.elapsed().as_nanos() as f64,
    };
    agent.is_running()?;
    drop(holders);
    Ok(figures)
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
    fn start(hub: &Namespace, address: SocketAddr, hello: Arc<[u8]>) -> anyhow::Result<Self> {
        let hub = hub.clone();
        let (opened, outcome) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let opening = || -> anyhow::Result<Vec<TcpStream>> {
                hub.enter()?;
                // SAFETY: unshare takes an integer and changes this thread alone, which owns what it opens from here on.
                if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
                    return Err(std::io::Error::last_os_error()).context("cannot have descriptors of its own");
                }
                (0..GROUP)
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
            Some(why) => anyhow::bail!("cannot open {GROUP} connections: {why}"),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.thread.thread().unpark();
    }
}
