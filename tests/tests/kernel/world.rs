//! A node with an agent and a server that only accepts, and a hub its clients connect from.

use std::{
    collections::BTreeSet,
    env, fs,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use rebalancer_tests::{
    binary,
    netns::{Namespace, Network},
    node::{ask, ask_text},
    process::{Process, log_directory, wait_for},
    skip,
};
use rustls::{ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};
use serde_json::Value;

pub const PORT: u16 = 6443;
/// An emulated machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A node with an agent, and a server that only accepts.
pub struct Host {
    pub network: Network,
    pub directory: PathBuf,
    pub agent: Option<Process>,
    pub source: &'static str,
    pub kernel_log: &'static str,
    /// More of the agent's.
    pub flags: Vec<String>,
}

impl Host {
    pub fn new(source: &'static str) -> Self {
        let network = Network::new(1).expect("namespaces need root");
        Self {
            network,
            directory: log_directory("rebalancer-kernel-").expect("a directory"),
            agent: None,
            source,
            kernel_log: "off",
            flags: Vec::new(),
        }
    }

    pub fn node(&self) -> &Namespace {
        &self.network.nodes[0]
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(Network::node_address(0), PORT)
    }

    pub fn start_agent(&mut self) {
        self.start_agent_by(Command::new(binary()));
    }

    /// Starts the agent by a command that lacks nothing but its arguments.
    pub fn start_agent_by(&mut self, mut command: Command) {
        command
            .args(["agent", "--node-name=node-1", "--interval=200ms"])
            .arg(format!("--source={}", self.source))
            .arg(format!("--kernel-log={}", self.kernel_log))
            .arg(format!("--apiserver-port={PORT}"))
            .arg(format!("--api=unix:{}", self.directory.join("agent.sock").display()))
            .args(&self.flags);
        let agent = Process::start("agent", command, Some(self.node().fd()), &self.directory).expect("an agent");
        self.agent = Some(agent);
        // It answers before its programs are in place, and is ready once they are.
        let socket = self.directory.join("agent.sock");
        let ready = wait_for(PATIENCE, || {
            if let Some(Err(error)) = self.agent.as_mut().map(Process::is_running) {
                panic!("{error:#}");
            }
            ask_text(&socket, "/readyz").ok().filter(|said| said == "ok\n")
        });
        ready.unwrap_or_else(|| panic!("the agent is never ready with {}", self.source));
    }

    pub fn ask(&mut self, path: &str) -> Option<Value> {
        if let Some(Err(error)) = self.agent.as_mut().map(Process::is_running) {
            panic!("{error:#}");
        }
        ask(&self.directory.join("agent.sock"), path).ok()
    }

    /// Waits until the connections are as expected, and gives them.
    pub fn expect(&mut self, what: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let mut last = None;
        let found = wait_for(PATIENCE, || {
            let answer = self.ask("/v1/connections?limit=100000")?;
            let list = answer["connections"].as_array()?.clone();
            let done = wanted(&list);
            last = Some(list);
            done.then(|| last.clone()).flatten()
        });
        found.unwrap_or_else(|| panic!("{what}: never seen with {}; the last was {last:#?}", self.source))
    }

    /// Waits until the agent's connections are the kernel's own list, and gives them.
    pub fn expect_the_truth(&mut self, what: &str) -> Vec<Value> {
        let node = self.node().clone();
        let mut truth = BTreeSet::new();
        let found = wait_for(PATIENCE, || {
            let answer = self.ask("/v1/connections?limit=100000")?;
            let list = answer["connections"].as_array()?.clone();
            let seen: BTreeSet<String> = list
                .iter()
                .filter_map(|one| one["client"].as_str().map(str::to_owned))
                .collect();
            truth = Self::inside(&node, established);
            (seen == truth && seen.len() == list.len()).then_some(list)
        });
        let list = self.ask("/v1/connections?limit=20").unwrap_or_default();
        let log = self.agent.as_ref().map(|agent| agent.log()).unwrap_or_default();
        found.unwrap_or_else(|| {
            panic!(
                "{what}: with {} the table is never the kernel's, of {}; it has {list:#}\n{log}",
                self.source,
                truth.len()
            )
        })
    }

    /// A figure of the agent's status, by its path.
    pub fn figure(&mut self, pointer: &str) -> u64 {
        let status = self.ask("/v1/status").expect("a status");
        status
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("no {pointer} in {status:#}"))
    }

    /// One of the agent's metrics, by its name and labels.
    pub fn metric(&self, name: &str) -> u64 {
        self.find_metric(name)
            .unwrap_or_else(|| panic!("there is no metric {name}"))
    }

    /// The same; `None` for one that was never counted.
    pub fn find_metric(&self, name: &str) -> Option<u64> {
        let text = ask_text(&self.directory.join("agent.sock"), "/metrics").expect("metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(|value| value.parse().expect("a number"))
    }

    /// Runs something on a thread inside a namespace.
    pub fn inside<T: Send + 'static>(namespace: &Namespace, job: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = namespace.clone();
        thread::spawn(move || {
            namespace.enter().expect("its own namespace");
            job()
        })
        .join()
        .expect("the thread ends well")
    }

    /// Listens on the node, on that address.
    pub fn listen(&self, address: &str) -> TcpListener {
        let address: SocketAddr = format!("{address}:{PORT}").parse().expect("an address");
        Self::inside(self.node(), move || {
            if !is_mptcp() {
                return TcpListener::bind(address).expect("the port is free");
            }
            let socket = mptcp_socket(address);
            socket.set_reuse_address(true).expect("an option");
            socket.bind(&address.into()).expect("the port is free");
            socket.listen(128).expect("it listens");
            socket.into()
        })
    }

    /// Connects from the hub.
    pub fn connect(&self, to: SocketAddr, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = Self::inside(&self.network.hub, move || dial(to));
        let (accepted, _) = listener.accept().expect("a connection");
        (client, accepted)
    }
}

/// Whether this machine is one where listeners are for MPTCP, as Go's are since Go 1.24.
pub fn is_mptcp() -> bool {
    env::var_os("REBALANCER_VM_MODE").is_some_and(|mode| mode == "mptcp")
}

/// Whether ClientHellos can be read: that takes a cgroup2 filesystem somewhere.
pub fn has_cgroup2() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("a list of mounts");
    mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2"))
}

/// A socket for MPTCP, of the address's family.
pub fn mptcp_socket(address: SocketAddr) -> socket2::Socket {
    const IPPROTO_MPTCP: i32 = 262;
    let domain = socket2::Domain::for_address(address);
    socket2::Socket::new(domain, socket2::Type::STREAM, Some(IPPROTO_MPTCP.into())).expect("a kernel with MPTCP")
}

/// Connects; where listeners are for MPTCP every other client speaks it too, and the others do not.
pub fn dial(to: SocketAddr) -> TcpStream {
    static DIALLED: AtomicUsize = AtomicUsize::new(0);
    if !is_mptcp() || DIALLED.fetch_add(1, Relaxed).is_multiple_of(2) {
        return TcpStream::connect(to).expect("the node answers");
    }
    let socket = mptcp_socket(to);
    socket.connect(&to.into()).expect("the node answers");
    socket.into()
}

/// A ClientHello as rustls sends it, with a post-quantum key share: more than one segment long.
pub fn client_hello(alpn: &[&str]) -> Vec<u8> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from("kubernetes").expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("a hello");
    hello
}

pub fn protocols(list: &[Value]) -> Vec<&str> {
    let mut found: Vec<_> = list
        .iter()
        .filter_map(|connection| connection["protocol"].as_str())
        .collect();
    found.sort_unstable();
    found
}

/// What the binary finds by trying, once: an emulated machine takes half a minute for it.
pub fn features() -> &'static Value {
    static FEATURES: OnceLock<Value> = OnceLock::new();
    FEATURES.get_or_init(|| {
        let output = Command::new(binary())
            .args(["system-info", "--output=json"])
            .output()
            .expect("the binary runs");
        serde_json::from_slice(&output.stdout).expect("JSON")
    })
}

/// Whether the kernel takes the programs; when not, the reason is a counted skip, but a failure in a VM, which was booted
/// for this.
pub fn ebpf_or_skip() -> bool {
    let ebpf = &features()["source-ebpf"];
    if ebpf["ok"] != true {
        assert!(env::var_os("REBALANCER_VM").is_none(), "{}", ebpf["why"]);
        skip(&format!("the kernel programs do not load here: {}", ebpf["why"]));
    }
    ebpf["ok"] == true
}

/// The first octets of what the kernel says of a socket by that option; `None` where it refuses.
pub fn option<const OCTETS: usize>(socket: &TcpStream, level: i32, name: i32) -> Option<[u8; OCTETS]> {
    let mut value = [0; OCTETS];
    let mut length = OCTETS as libc::socklen_t;
    // SAFETY: the pointers are to values that live through the call, of which it fills as much as it is told.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    (failed == 0).then_some(value)
}

/// A command in the node's network namespace.
pub trait InNamespace {
    fn in_namespace(&mut self, host: &Host) -> &mut Self;
}

impl InNamespace for Command {
    fn in_namespace(&mut self, host: &Host) -> &mut Self {
        let namespace = host.node().clone();
        // SAFETY: the closure makes one system call; the descriptor is open in the forked child.
        unsafe { self.pre_exec(move || namespace.enter().map_err(std::io::Error::other)) }
    }
}

/// The clients of the established connections on the port in this thread's network namespace, as the kernel prints them
/// (proc_net(5)): another way than any source's.
pub fn established() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (file, words) in [("tcp", 1), ("tcp6", 4)] {
        let Ok(text) = fs::read_to_string(format!("/proc/thread-self/net/{file}")) else {
            continue;
        };
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (local, remote) = (end(fields[1], words), end(fields[2], words));
            if fields[3] == "01" && local.port() == PORT {
                found.insert(remote.to_string());
            }
        }
    }
    found
}

/// `ADDRESS:PORT`, each word of the address in the machine's order.
fn end(text: &str, words: usize) -> SocketAddr {
    let (address, port) = text.split_once(':').expect("a colon");
    let mut octets = Vec::new();
    for word in 0..words {
        let word = u32::from_str_radix(&address[8 * word..8 * word + 8], 16).expect("a word");
        octets.extend(word.to_ne_bytes());
    }
    let ip = match <[u8; 4]>::try_from(&octets[..]) {
        Ok(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(&octets[..]).expect("four words"))).to_canonical(),
    };
    SocketAddr::new(ip, u16::from_str_radix(port, 16).expect("a port"))
}
