//! A node with a server and an agent, and a hub its clients connect from.

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use rebalancer_tests::{
    binary,
    fixture::goaway_server,
    h2client::Client,
    netns::{Namespace, Network},
    node::ask,
    pki::Pki,
    process::{Process, log_directory, wait_for},
    skip,
};
use serde_json::Value;

pub const PORT: u16 = 6443;
/// The agent's own API.
const SOCKET: &str = "agent.sock";
/// How many agents were refused: each has a log of its own.
static REFUSED: AtomicUsize = AtomicUsize::new(0);
/// An emulated machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Everything a test stands on.
pub struct World {
    pub network: Network,
    pub pki: Pki,
    pub directory: PathBuf,
    pub agent: Option<Process>,
    pub server: Option<Process>,
    /// What is run as the server.
    pub program: PathBuf,
    /// More flags of the server's.
    pub server_flags: Vec<String>,
}

/// What `rebalancer system-info` says of a feature.
pub fn feature(name: &str, arguments: &[&str]) -> Value {
    let output = Command::new(binary())
        .args(["system-info", "--output=json"])
        .args(arguments)
        .output()
        .expect("the binary runs");
    let features: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    features[name].clone()
}

/// Whether this kernel takes the program; when not, the reason is a counted skip, but a failure in a VM, which was booted
/// for this.
pub fn kernel_takes_it() -> bool {
    // Once: an emulated machine takes half a minute for it.
    static KERNEL: OnceLock<Value> = OnceLock::new();
    let kernel = KERNEL.get_or_init(|| feature("steer-kernel", &[]));
    if kernel["ok"] != true {
        assert!(env::var_os("REBALANCER_VM").is_none(), "{}", kernel["why"]);
        skip(&format!("no probe can be tried here: {}", kernel["why"]));
    }
    kernel["ok"] == true
}

impl World {
    /// A world without a process; `None`, and a counted skip, where the kernel or the server is missing.
    pub fn get() -> Option<Self> {
        if !kernel_takes_it() {
            return None;
        }
        let server = match goaway_server() {
            Ok(server) => server,
            Err(missing) => {
                skip(&missing.to_string());
                return None;
            }
        };
        Some(Self::with(server))
    }

    pub fn with(program: PathBuf) -> Self {
        let network = Network::new(1).expect("namespaces need root");
        let addresses = [Network::node_address(0), Network::HUB, [127, 0, 0, 1].into()];
        Self {
            network,
            pki: Pki::new(&addresses).expect("certificates"),
            directory: log_directory("rebalancer-steer-").expect("a directory"),
            agent: None,
            server: None,
            program,
            server_flags: Vec::new(),
        }
    }

    pub fn node(&self) -> &Namespace {
        &self.network.nodes[0]
    }

    pub fn hub(&self) -> &Namespace {
        &self.network.hub
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(Network::node_address(0), PORT)
    }

    /// The command that runs the server, with that `--goaway-chance`.
    pub fn server_command(&self, listen: impl std::fmt::Display, chance: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(format!("--listen={listen}"))
            .arg(format!("--tls-cert-file={}", self.pki.file("apiserver.crt").display()))
            .arg(format!(
                "--tls-private-key-file={}",
                self.pki.file("apiserver.key").display()
            ))
            .arg(format!("--goaway-chance={chance}"))
            .args(&self.server_flags);
        command
    }

    /// Starts the server on every address, and waits until it answers.
    pub fn start_server(&mut self, chance: &str) {
        self.start_server_on(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT), chance);
    }

    /// Starts the server on one address, and waits until it answers.
    pub fn start_server_on(&mut self, listen: SocketAddr, chance: &str) {
        let command = self.server_command(listen, chance);
        let server = Process::start("server", command, Some(self.node().fd()), &self.directory).expect("a server");
        self.server = Some(server);
        let version = wait_for(PATIENCE, || {
            let mut client = Client::try_connect(&self.pki, self.hub(), self.address()).ok()?;
            Some(client.get("/version"))
        })
        .unwrap_or_else(|| panic!("the server does not answer:\n{}", self.server_log()));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        eprintln!(
            "kernel {}, binary {}, {}, --goaway-chance={chance}",
            kernel.trim(),
            self.program.display(),
            version.trim()
        );
    }

    pub fn server_log(&self) -> String {
        self.server.as_ref().map(Process::log).unwrap_or_default()
    }

    fn agent_command(&self, shim: &str, socket: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command
            .args([
                "agent",
                "--node-name=node-1",
                "--interval=200ms",
                "--settle=1s",
                "--goaway-rate=1000",
            ])
            .args([
                "--metrics=127.0.0.1:0",
                "--min-connection-age=0s",
                "--client-cooldown=1s",
            ])
            .arg(format!("--shim={shim}"))
            .arg(format!("--apiserver-port={PORT}"))
            .arg(format!("--api=unix:{}", self.directory.join(socket).display()))
            .args(flags);
        command
    }

    /// Starts the agent, and waits until its probe is in place.
    pub fn start_agent(&mut self, shim: &str, flags: &[&str]) {
        let command = self.agent_command(shim, SOCKET, flags);
        let agent = Process::start("agent", command, Some(self.node().fd()), &self.directory).expect("an agent");
        self.agent = Some(agent);
        self.wait("the agent answers", |world| world.ask("/v1/status"));
    }

    /// Runs an agent that is to refuse, and answers with its exit code and what it says.
    pub fn refused(&self, shim: &str) -> (Option<i32>, String) {
        self.refused_at(shim, SOCKET)
    }

    /// The same with a socket of that name.
    pub fn refused_at(&self, shim: &str, socket: &str) -> (Option<i32>, String) {
        let command = self.agent_command(shim, socket, &[]);
        let refused = REFUSED.fetch_add(1, Relaxed);
        let mut agent = Process::start(
            &format!("refused-{refused}"),
            command,
            Some(self.node().fd()),
            &self.directory,
        )
        .expect("an agent");
        let text = wait_for(PATIENCE, || agent.is_running().err().map(|_| agent.log()));
        let text = text.unwrap_or_else(|| panic!("the agent runs on:\n{}", agent.log()));
        (agent.terminate(Duration::ZERO).and_then(|status| status.code()), text)
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    pub fn ask(&mut self, path: &str) -> Option<Value> {
        if let Some(Err(error)) = self.agent.as_mut().map(Process::is_running) {
            panic!("{error:#}");
        }
        ask(&self.socket(), path).ok()
    }

    /// Waits until something is seen.
    pub fn wait<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let found = wait_for(PATIENCE, || look(self));
        found.unwrap_or_else(|| {
            let agent = self.agent.as_ref().map(Process::log).unwrap_or_default();
            panic!(
                "{what}: never seen; agent:\n{}\nserver:\n{}",
                rebalancer_tests::process::tail(&agent),
                rebalancer_tests::process::tail(&self.server_log())
            )
        })
    }

    /// Clients from the hub, each of which has asked once.
    pub fn clients(&self, count: usize) -> Vec<Client> {
        let mut clients: Vec<Client> = (0..count)
            .map(|_| Client::connect(&self.pki, self.hub(), self.address()))
            .collect();
        for client in &mut clients {
            client.get("/");
        }
        clients
    }

    /// Waits until the agent has seen each client ask.
    pub fn wait_until_known(&mut self, clients: &[Client]) {
        let wanted: Vec<String> = clients.iter().map(|client| client.address.to_string()).collect();
        self.wait("the agent knows each client as HTTP/2", |world| {
            let list = world.ask("/v1/connections?limit=100000")?;
            let list = list["connections"].as_array()?;
            let known = |client: &String| {
                list.iter()
                    .any(|known| known["client"] == *client && known["protocol"] == "h2")
            };
            wanted.iter().all(known).then_some(())
        });
    }

    /// Waits until the agent would act, were there another apiserver to compare with.
    pub fn wait_until_ready(&mut self) {
        self.wait("the agent is ready", |world| {
            let plan = world.ask("/v1/status")?;
            (plan["hold"]["reason"] == "fewer_than_two_apiservers").then_some(())
        });
    }

    /// Has the agent tell a client to go, and waits until the shim has it: the victim is pending.
    pub fn order(&mut self, client: SocketAddr) {
        // The newest decision of which somebody is pending.
        let newest = |world: &mut Self| -> Option<u64> {
            let decisions = world.ask("/v1/decisions?limit=1000")?;
            let pending = decisions["decisions"]
                .as_array()?
                .iter()
                .filter(|decision| decision["outcomes"]["pending"].as_u64() > Some(0));
            pending.filter_map(|decision| decision["id"].as_u64()).max()
        };
        self.wait_until_ready();
        let before = newest(self);
        let body = format!(r#"{{"client": "{client}"}}"#);
        self.wait("the victim is pending", |world| {
            if newest(world) > before {
                return Some(());
            }
            match world.post("/v1/goaway", &body) {
                // Taken, or a plan is in flight, or the connection is not known yet.
                (200 | 404 | 409, _) => None,
                (status, answer) => panic!("{client}: {status} {answer}"),
            }
        });
    }

    /// Posts JSON to the agent; the status and the answer.
    pub fn post(&self, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(self.socket()).expect("the agent listens");
        write!(
            stream,
            "POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("the agent reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the agent answers");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("an HTTP status"), answer)
    }

    /// A figure of the agent's metrics, summed over its labels that contain `label`.
    pub fn metric(&mut self, name: &str, label: &str) -> Option<f64> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let lines = text
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        Some(
            lines
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum(),
        )
    }

    /// Asks until the server's own lottery says GOAWAY, at most `most` times; whether it did.
    pub fn lottery(&self, most: u64) -> bool {
        let mut asked = 0;
        while asked < most {
            let mut client = Client::connect(&self.pki, self.hub(), self.address());
            while asked < most && client.goaways.is_empty() {
                // Its answer and its GOAWAY may come in either order: the next request would tell.
                let answered = client.get_at_once("/", 1);
                asked += u64::from(answered[0].is_some());
            }
            if !client.goaways.is_empty() {
                eprintln!("the lottery said GOAWAY after {asked} requests");
                return true;
            }
        }
        false
    }
}
