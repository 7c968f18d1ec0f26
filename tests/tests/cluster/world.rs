//! Three real apiservers with an agent each, found by Leases, and the means to trouble them.

use std::{collections::BTreeSet, fs, net::SocketAddr, path::PathBuf, process::Command, thread, time::Duration};

use rebalancer_tests::{
    apiserver::{Settings, start_apiserver, start_etcd},
    binary,
    fixture::Fixture,
    kube::{Admin, kubeconfig},
    netns::{Namespace, Network},
    node::{PORT, ask},
    pki::Pki,
    process::{Process, log_directory, on_host, wait_for},
};
use serde_json::{Value, json};

/// A busy machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Agents ask each other here.
const PEERS: u16 = 9443;

pub const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";

pub struct Agent {
    pub process: Process,
    pub socket: PathBuf,
    metrics: SocketAddr,
}

pub struct World {
    fixture: Fixture,
    pub pki: Pki,
    pub network: Network,
    pub directory: PathBuf,
    pub etcd: Process,
    pub apiservers: Vec<Option<Process>>,
    pub agents: Vec<Agent>,
}

pub fn name(index: usize) -> String {
    format!("node-{}", index + 1)
}

pub fn apiserver_address(index: usize) -> SocketAddr {
    SocketAddr::new(Network::node_address(index), PORT)
}

impl World {
    pub fn new(fixture: Fixture) -> Self {
        let network = Network::new(3).expect("root may make namespaces");
        let addresses: Vec<_> = (0..3).map(Network::node_address).collect();
        let pki = Pki::new(&[&addresses[..], &[Network::HUB]].concat()).expect("certificates");
        let directory = log_directory("rebalancer-membership-").expect("a directory");
        let at = |port| SocketAddr::new(Network::HUB, port);
        let etcd = start_etcd(&fixture, at(2379), at(2380), &directory, Some(&network.hub)).expect("etcd");
        let mut world = Self {
            fixture,
            pki,
            network,
            directory,
            etcd,
            apiservers: Vec::new(),
            agents: Vec::new(),
        };
        let policy = world.directory.join("audit-policy.yaml");
        fs::write(
            &policy,
            "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata, omitStages: [RequestReceived]}]\n",
        )
        .expect("a file");
        for index in 0..3 {
            let apiserver = world.start_apiserver(index);
            world.apiservers.push(Some(apiserver));
        }
        let admin = world.admin(0);
        wait_for(PATIENCE, || {
            let (status, _) = admin.ask_text("GET", "/readyz", None).ok()?;
            (status == 200).then_some(())
        })
        .expect("an apiserver that is ready");
        admin.let_agents(&["node-1", "node-2", "node-3"]).expect("rights");
        for index in 0..3 {
            let agent = world.start_agent(index);
            world.agents.push(agent);
        }
        world
    }

    pub fn admin(&self, index: usize) -> Admin {
        Admin::new(&self.pki, &self.network.hub, apiserver_address(index)).expect("an administrator")
    }

    pub fn start_apiserver(&self, index: usize) -> Process {
        let host = name(index);
        let audit = self.directory.join(format!("audit-{host}.log"));
        start_apiserver(
            &Settings {
                fixture: &self.fixture,
                pki: &self.pki,
                etcd: SocketAddr::new(Network::HUB, 2379),
                listen: apiserver_address(index),
                advertise: Network::node_address(index),
                count: 3,
                directory: &self.directory,
                name: &format!("apiserver-{host}"),
                goaway_chance: 0.0,
                host: Some(&host),
                extra: &[
                    format!(
                        "--audit-policy-file={}",
                        self.directory.join("audit-policy.yaml").display()
                    ),
                    format!("--audit-log-path={}", audit.display()),
                    "--audit-log-mode=blocking".to_owned(),
                ],
            },
            Some(self.network.nodes[index].fd()),
        )
        .expect("an apiserver")
    }

    /// The agent of a node; the way to the cluster is another apiserver than the local one.
    pub fn start_agent(&self, index: usize) -> Agent {
        let kubeconfig = kubeconfig(&self.pki, &name(index), apiserver_address((index + 1) % 3)).expect("credentials");
        self.start(&self.network.nodes[index], &name(index), index, &kubeconfig, &[])
    }

    pub fn start_another(&self, called: &str, kubeconfig: &PathBuf, more: &[&str]) -> Agent {
        self.start(&self.network.hub, called, 9, kubeconfig, more)
    }

    pub fn start(
        &self,
        namespace: &Namespace,
        called: &str,
        index: usize,
        kubeconfig: &PathBuf,
        more: &[&str],
    ) -> Agent {
        let address = if index < 3 {
            Network::node_address(index)
        } else {
            Network::HUB
        };
        let socket = self.directory.join(format!("agent-{index}-{called}.sock"));
        let metrics = SocketAddr::new(address, 9470);
        let mut agent = Command::new(binary());
        agent
            .args([
                "agent",
                "--shim=none",
                "--source=sockdiag",
                "--interval=1s",
                "--peers=kubernetes",
            ])
            .arg(format!("--node-name={called}"))
            .arg(format!("--apiserver-port={PORT}"))
            .arg(format!("--api=unix:{}", socket.display()))
            .arg(format!("--metrics={metrics}"))
            .arg(format!("--peer-listen={address}:{PEERS}"))
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(more);
        on_host(&mut agent, called);
        let log = format!("agent-{index}-{called}");
        Agent {
            process: Process::start(&log, agent, Some(namespace.fd()), &self.directory).expect("an agent"),
            socket,
            metrics,
        }
    }

    pub fn lease(&self, of: &str) -> Value {
        let (status, lease) = self
            .admin(0)
            .ask("GET", &format!("{LEASES}/rebalancer-{of}"), None)
            .expect("an answer");
        assert_eq!(status, 200, "{lease}");
        lease
    }

    /// Waits until all three agents are certain of each other.
    pub fn is_well(&self) {
        for agent in &self.agents {
            agent.until("certainty of all three", |status| {
                let membership = &status["membership"];
                let reason = status["hold"]["reason"].as_str().unwrap_or("none");
                let view = status["view"].as_array()?;
                let doubtful = [
                    "membership_unknown",
                    "peer_unknown",
                    "snapshot_stale",
                    "apiserver_starting",
                    "apiserver_overloaded",
                ];
                (view.len() == 3
                    && membership["set_from"] == "identity_leases"
                    && membership["doubt"].is_null()
                    && membership["blind"].is_null()
                    && membership["gone"] == json!([])
                    && !doubtful.contains(&reason))
                .then_some(())
            });
        }
    }

    /// Waits until no agent has another peer than the two others.
    pub fn is_alone(&self) {
        for agent in &self.agents {
            let alone = wait_for(PATIENCE, || {
                let answer = ask(&agent.socket, "/v1/peers").ok()?;
                (answer["peers"].as_array()?.len() == 2).then_some(())
            });
            alone.expect("the two others alone");
        }
    }

    /// Waits until so long has passed by each agent's own clock.
    pub fn lets_pass(&self, time: Duration) {
        for agent in &self.agents {
            let age = |status: &Value| status["uptime_s"].as_u64();
            let began = agent.until("its age", age);
            agent.until("that time has passed", |status| {
                (age(status)? >= began + time.as_secs()).then_some(())
            });
        }
    }

    /// Credentials of that user, by the first apiserver.
    pub fn credentials(&self, user: &str) -> PathBuf {
        let file = user.replace(':', "-");
        let pair = self.pki.client(&file, user, &["nobody"]).expect("a certificate");
        let path = self.directory.join(format!("{file}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {
                "server": format!("https://{}", apiserver_address(0)), "certificate-authority": self.pki.file("ca.crt"),
            }}],
            "users": [{"name": "u", "user": {"client-certificate": pair.certificate, "client-key": pair.key}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        fs::write(&path, config.to_string()).expect("a file");
        path
    }

    /// Takes an agent's Lease away, where there is one.
    pub fn forget(&self, node: &str) {
        let path = format!("{LEASES}/rebalancer-{node}");
        let (status, answer) = self.admin(0).ask("DELETE", &path, None).expect("an answer");
        assert!(matches!(status, 200 | 404), "{answer}");
    }

    /// What the three agents have asked for so far, verb and resource, by the apiservers' own audit logs; all of it was
    /// allowed.
    pub fn asked(&self) -> BTreeSet<(String, String)> {
        let mut asked = BTreeSet::new();
        for event in self.audited() {
            let user = event["user"]["username"].as_str().unwrap_or_default();
            let is_ours = ["rebalancer:node-1", "rebalancer:node-2", "rebalancer:node-3"].contains(&user);
            // A watch is logged once when it begins and once when it ends.
            if is_ours {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                assert_ne!(event["responseStatus"]["code"], 403, "{event}");
                asked.insert((text(&event["verb"]), text(&event["objectRef"]["resource"])));
            }
        }
        asked
    }

    fn audited(&self) -> impl Iterator<Item = Value> {
        let logs: Vec<String> = (0..3)
            .map(|index| {
                let path = self.directory.join(format!("audit-{}.log", name(index)));
                fs::read_to_string(&path).expect("an audit log")
            })
            .collect();
        let events =
            |log: &String| -> Vec<Value> { log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect() };
        logs.iter().flat_map(events).collect::<Vec<_>>().into_iter()
    }

    /// Requests of agents so far, each once, by the apiservers' own audit logs.
    pub fn requests(&self) -> BTreeSet<String> {
        let mut ids = BTreeSet::new();
        for event in self.audited() {
            let user = event["user"]["username"].as_str().unwrap_or_default();
            if user.starts_with("rebalancer:node-") {
                ids.insert(event["auditID"].as_str().unwrap_or_default().to_owned());
            }
        }
        ids
    }
}

impl Agent {
    pub fn status(&self) -> Option<Value> {
        ask(&self.socket, "/v1/status").ok()
    }

    /// Waits until its status shows that.
    pub fn until<T>(&self, what: &str, look: impl Fn(&Value) -> Option<T>) -> T {
        let mut last = Value::Null;
        let found = wait_for(PATIENCE, || {
            last = self.status()?;
            look(&last)
        });
        let log = self.process.log();
        found.unwrap_or_else(|| {
            panic!(
                "{what} did not come: hold {}, membership {}\n{}",
                last["hold"],
                last["membership"],
                rebalancer_tests::process::tail(&log)
            )
        })
    }

    /// Waits until its hold is for that reason, and its words have those parts.
    pub fn holds(&self, reason: &str, parts: &[&str]) {
        self.until(&format!("hold {reason} with {parts:?}"), |status| {
            let hold = &status["hold"];
            let words = hold["message"].as_str()?;
            (hold["reason"] == reason && parts.iter().all(|part| words.contains(part))).then_some(())
        });
    }

    /// One line of its metrics.
    pub fn metric(&self, namespace: &Namespace, line: &str) -> Option<f64> {
        let (at, namespace) = (self.metrics, namespace.clone());
        let text = thread::spawn(move || -> Option<String> {
            use std::io::{Read as _, Write as _};
            namespace.enter().ok()?;
            let mut stream = std::net::TcpStream::connect(at).ok()?;
            write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        });
        let text = text.join().ok()??;
        let value = text.lines().find_map(|one| one.strip_prefix(line))?;
        value.trim().parse().ok()
    }
}
