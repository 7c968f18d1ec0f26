//! Membership by Leases on three real apiservers: who is there, who is gone, and whose word is refused.
//!
//! One cluster, several scenes after one another; those that wait for a minute or more play with `REBALANCER_LONG`. What
//! time alone decides is in the tables of the core's `membership`.

use std::{
    collections::BTreeSet,
    env, fs,
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rebalancer_tests::{
    apiserver::{Settings, start_apiserver, start_etcd},
    binary,
    fixture::Fixture,
    kube::{Admin, kubeconfig},
    netns::{Namespace, Network},
    node::{PORT, ask},
    pki::Pki,
    process::{Process, log_directory, on_host, wait_for},
    skip,
};
use serde_json::{Value, json};

/// A busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(180);

/// By then a node whose Leases stand still and whose agent is silent is gone: it takes a minute.
const AFTER_PATIENCE: Duration = Duration::from_secs(75);

/// Agents ask each other here.
const PEERS: u16 = 9443;

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";

struct Agent {
    process: Process,
    socket: PathBuf,
    metrics: SocketAddr,
}

struct World {
    fixture: Fixture,
    pki: Pki,
    network: Network,
    directory: PathBuf,
    etcd: Process,
    apiservers: Vec<Option<Process>>,
    agents: Vec<Agent>,
}

fn name(index: usize) -> String {
    format!("node-{}", index + 1)
}

fn apiserver_address(index: usize) -> SocketAddr {
    SocketAddr::new(Network::node_address(index), PORT)
}

impl World {
    fn new(fixture: Fixture) -> Self {
        let network = Network::new(3).expect("root may make namespaces");
        let addresses: Vec<_> = (0..3).map(Network::node_address).collect();
        let pki = Pki::new(&[&addresses[..], &[Network::HUB]].concat()).expect("certificates");
        let directory = log_directory("rebalancer-membership-").expect("a directory");
        let at = |port| SocketAddr::new(Network::HUB, port);
        let etcd = start_etcd(&fixture, at(2379), at(2380), &directory, Some(network.hub.fd())).expect("etcd");
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

    fn admin(&self, index: usize) -> Admin {
        Admin::new(&self.pki, &self.network.hub, apiserver_address(index)).expect("an administrator")
    }

    fn start_apiserver(&self, index: usize) -> Process {
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
    fn start_agent(&self, index: usize) -> Agent {
        let kubeconfig = kubeconfig(&self.pki, &name(index), apiserver_address((index + 1) % 3)).expect("credentials");
        self.start(&self.network.nodes[index], &name(index), index, &kubeconfig, &[])
    }

    fn start_another(&self, called: &str, kubeconfig: &PathBuf, more: &[&str]) -> Agent {
        self.start(&self.network.hub, called, 9, kubeconfig, more)
    }

    fn start(&self, namespace: &Namespace, called: &str, index: usize, kubeconfig: &PathBuf, more: &[&str]) -> Agent {
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

    fn lease(&self, of: &str) -> Value {
        let (status, lease) = self
            .admin(0)
            .ask("GET", &format!("{LEASES}/rebalancer-{of}"), None)
            .expect("an answer");
        assert_eq!(status, 200, "{lease}");
        lease
    }

    /// Waits until all three agents are certain of each other.
    fn is_well(&self) {
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

    /// Waits until so long has passed by each agent's own clock.
    fn lets_pass(&self, time: Duration) {
        for agent in &self.agents {
            let age = |status: &Value| status["uptime_s"].as_u64();
            let began = agent.until("its age", age);
            agent.until("that time has passed", |status| {
                (age(status)? >= began + time.as_secs()).then_some(())
            });
        }
    }

    /// Requests of agents so far, each once, by the apiservers' own audit logs.
    fn requests(&self) -> BTreeSet<String> {
        let mut ids = BTreeSet::new();
        for index in 0..3 {
            let path = self.directory.join(format!("audit-{}.log", name(index)));
            let log = fs::read_to_string(&path).expect("an audit log");
            for event in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
                let user = event["user"]["username"].as_str().unwrap_or_default();
                if user.starts_with("rebalancer:") {
                    ids.insert(event["auditID"].as_str().unwrap_or_default().to_owned());
                }
            }
        }
        ids
    }
}

impl Agent {
    fn status(&self) -> Option<Value> {
        ask(&self.socket, "/v1/status").ok()
    }

    /// Waits until its status shows that.
    fn until<T>(&self, what: &str, look: impl Fn(&Value) -> Option<T>) -> T {
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
    fn holds(&self, reason: &str, parts: &[&str]) {
        self.until(&format!("hold {reason} with {parts:?}"), |status| {
            let hold = &status["hold"];
            let words = hold["message"].as_str()?;
            (hold["reason"] == reason && parts.iter().all(|part| words.contains(part))).then_some(())
        });
    }

    /// One line of its metrics.
    fn metric(&self, namespace: &Namespace, line: &str) -> Option<f64> {
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

fn long() -> bool {
    env::var_os("REBALANCER_LONG").is_some()
}

#[test]
fn leases_say_who_is_there_who_is_gone_and_whose_word_is_refused() {
    let fixture = match Fixture::get(|line| eprintln!("{line}")) {
        Ok(fixture) => fixture,
        Err(error) => {
            skip(&format!("{error:#}"));
            return;
        }
    };
    let mut world = World::new(fixture);
    let scene = |what: &str| eprintln!("scene: {what}");
    scene("three find each other with no flag for any of them");
    world.is_well();

    scene("each has written one Event of its start on its Node");
    let started = || {
        let (_, list) = world
            .admin(0)
            .ask("GET", "/apis/events.k8s.io/v1/namespaces/default/events", None)
            .ok()?;
        let of_start = |event: &&Value| event["reason"] == "RebalancerStarted";
        let events = list["items"].as_array()?.iter().filter(of_start);
        let mut nodes: Vec<_> = events
            .filter(|event| event["regarding"]["kind"] == "Node" && event["reportingController"] == "rebalancer")
            .filter_map(|event| event["regarding"]["name"].as_str().map(str::to_owned))
            .collect();
        nodes.sort();
        (nodes == ["node-1", "node-2", "node-3"]).then_some(())
    };
    wait_for(PATIENCE, started).expect("three Events");

    scene("a forged Lease of no apiserver is named and holds up nobody");
    let mut forged = world.lease("node-2");
    forged["metadata"] = json!({
        "name": "rebalancer-evil",
        "labels": forged["metadata"]["labels"],
        "annotations": forged["metadata"]["annotations"],
    });
    world.admin(0).make(LEASES, &forged).expect("a Lease");
    for agent in &world.agents {
        agent.until("a refusal", |status| {
            let refused = status["membership"]["refused"].as_array()?;
            let names = |why: &Value| why.as_str().is_some_and(|why| why.contains("rebalancer-evil"));
            refused.iter().any(names).then_some(())
        });
    }
    world.is_well();
    let refused = wait_for(PATIENCE, || {
        let metric = world.agents[0].metric(
            &world.network.nodes[0],
            "rebalancer_membership_troubles{kind=\"refused\"}",
        );
        metric.filter(|count| *count == 1.0)
    });
    assert_eq!(refused, Some(1.0));
    let (status, _) = world
        .admin(0)
        .ask("DELETE", &format!("{LEASES}/rebalancer-evil"), None)
        .expect("an answer");
    assert_eq!(status, 200);

    scene("a key written over a living agent's is refused by all, and by the one that was robbed");
    let before = world.lease("node-2");
    let mut hijacked = before.clone();
    hijacked["metadata"]["annotations"]["rebalancer/key-sha256"] = json!("ab".repeat(32));
    hijacked["metadata"]["annotations"]["rebalancer/address"] = json!("10.77.0.1:9443");
    hijacked["spec"]["holderIdentity"] = json!("somebody-else");
    let (status, answer) = wait_for(PATIENCE, || {
        hijacked["metadata"]["resourceVersion"] = world.lease("node-2")["metadata"]["resourceVersion"].clone();
        let path = format!("{LEASES}/rebalancer-node-2");
        let answer = world.admin(0).ask("PUT", &path, Some(&hijacked)).ok()?;
        (answer.0 != 409).then_some(answer)
    })
    .expect("an answer");
    assert_eq!(status, 200, "{answer}");
    world.agents[1].holds(
        "membership_unknown",
        &["two agents have the name node-2", "10.77.0.1:9443"],
    );
    world.agents[0].holds("peer_unknown", &["node-2", "abababab", "still answers"]);
    let (status, _) = world
        .admin(0)
        .ask("DELETE", &format!("{LEASES}/rebalancer-node-2"), None)
        .expect("an answer");
    assert_eq!(status, 200);
    world.is_well();
    assert_eq!(
        world.lease("node-2")["metadata"]["annotations"]["rebalancer/key-sha256"],
        before["metadata"]["annotations"]["rebalancer/key-sha256"],
        "it made its Lease anew"
    );

    scene("a second agent of one name holds, and the first goes on");
    let credentials = kubeconfig(&world.pki, "node-3-again", apiserver_address(0)).expect("credentials");
    let second = world.start_another("node-3", &credentials, &[]);
    second.holds("membership_unknown", &["two agents have the name node-3"]);
    world.is_well();
    drop(second);

    scene("no rights, no namespace, no address: each is one sentence with what to do");
    let stranger = world
        .pki
        .client("stranger", "rebalancer:stranger", &["nobody"])
        .expect("a certificate");
    let mut nobody: Value = serde_json::from_str(&fs::read_to_string(&credentials).expect("a file")).expect("JSON");
    nobody["users"][0]["user"] = json!({"client-certificate": stranger.certificate, "client-key": stranger.key});
    let path = world.directory.join("nobody.kubeconfig");
    fs::write(&path, nobody.to_string()).expect("a file");
    let agent = world.start_another("node-9", &path, &[]);
    agent.holds(
        "membership_unknown",
        &["forbids it: grant this agent list on leases", "kube-system"],
    );
    drop(agent);
    nobody["users"][0]["user"] = json!({"token": "expired"});
    fs::write(&path, nobody.to_string()).expect("a file");
    let agent = world.start_another("node-9", &path, &[]);
    agent.holds("membership_unknown", &["401", "token or certificate has expired"]);
    drop(agent);
    nobody["users"][0]["user"] = json!({"token": "the-admins-token"});
    fs::write(&path, nobody.to_string()).expect("a file");
    let agent = world.start_another("node-9", &path, &["--lease-namespace=nowhere"]);
    agent.holds("membership_unknown", &["namespace nowhere does not exist"]);
    drop(agent);
    let agent = world.start_another("node-9", &path, &[]);
    agent.holds("membership_unknown", &["--node-name", "node-1, node-2, node-3"]);
    drop(agent);
    nobody["clusters"][0]["cluster"]["server"] = json!("https://10.77.0.1:1");
    fs::write(&path, nobody.to_string()).expect("a file");
    let agent = world.start_another("node-9", &path, &[]);
    agent.holds(
        "membership_unknown",
        &["cannot be reached at https://10.77.0.1:1", "onnection refused"],
    );
    drop(agent);
    let (status, _) = world
        .admin(0)
        .ask("DELETE", &format!("{LEASES}/rebalancer-node-9"), None)
        .expect("an answer");
    assert!(matches!(status, 200 | 404));

    scene("the rights are taken away: the last membership holds while peers answer, and the way back is said");
    let binding = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings/rebalancer";
    let (status, _) = world.admin(0).ask("DELETE", binding, None).expect("an answer");
    assert_eq!(status, 200);
    // Watches that are open go on; renewals do not.
    world.agents[0].until("a request that is forbidden", |_| {
        let forbidden = "rebalancer_kubernetes_requests_total{verb=\"update\",result=\"forbidden\"}";
        world.agents[0]
            .metric(&world.network.nodes[0], forbidden)
            .filter(|count| *count >= 1.0)
    });
    let status = world.agents[0].status().expect("an answer");
    assert_eq!(status["view"].as_array().map(Vec::len), Some(3), "{status}");
    world
        .admin(0)
        .let_agents(&["node-1", "node-2", "node-3"])
        .expect("rights");
    world.is_well();

    if !long() {
        eprintln!("the scenes of a dead node, of partitions and of a lost API play with REBALANCER_LONG=1");
        return;
    }

    scene("what the agents ask of the apiservers, by the audit logs");
    const WINDOW: Duration = Duration::from_secs(120);
    let (began, before) = (Instant::now(), world.requests());
    world.lets_pass(WINDOW);
    let asked = world.requests().difference(&before).count();
    let rate = asked as f64 / began.elapsed().as_secs_f64() / 3.0;
    eprintln!("{asked} requests of three agents in {WINDOW:?}: {rate:.3} a second and agent");
    assert!(rate <= 0.2, "{rate}");
    assert!(asked >= 3 * 9, "they renew: {asked}");

    scene("a partition between two agents only: they hold, the third goes on, and nobody is gone");
    let cut = format!("route add blackhole {}/32", Network::node_address(1));
    world.network.nodes[0].ip(&cut).expect("a route");
    world.agents[0].holds("snapshot_stale", &["node-2"]);
    world.agents[1].holds("snapshot_stale", &["node-1"]);
    world.lets_pass(AFTER_PATIENCE);
    for agent in &world.agents {
        let status = agent.status().expect("an answer");
        assert_eq!(status["membership"]["gone"], json!([]), "{status}");
    }
    let third = world.agents[2].status().expect("an answer");
    assert_ne!(third["hold"]["reason"], "snapshot_stale", "{third}");
    world.network.nodes[0].ip(&cut.replace("add", "del")).expect("a route");
    world.is_well();

    scene("a node dies: apiserver and agent; the others say so and go on");
    world.apiservers[2] = None;
    world.agents[2].process.kill();
    for agent in &world.agents[..2] {
        agent.until("node-3 is gone", |status| {
            (status["membership"]["gone"] == json!(["node-3"]) && status["view"].as_array()?.len() == 2).then_some(())
        });
        let decided = ask(&agent.socket, "/v1/decisions?limit=1000").expect("decisions");
        let is_it = |decision: &&Value| decision["hold"]["reason"] == "apiserver_gone";
        let gone: Vec<_> = decided["decisions"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(is_it)
            .collect();
        assert_eq!(gone.len(), 1, "one decision");
        assert_eq!(gone[0]["hold"]["apiserver"], "node-3");
        agent.until("the others go on", |status| {
            let reason = status["hold"]["reason"].as_str().unwrap_or("none");
            ["below_threshold", "noise", "shim_unavailable", "none"]
                .contains(&reason)
                .then_some(())
        });
    }
    scene("it comes back by itself");
    world.apiservers[2] = Some(world.start_apiserver(2));
    world.agents[2] = world.start_agent(2);
    world.is_well();

    scene("the API is lost altogether: the last membership holds while all answer, then a hold says what to repair");
    world.etcd.kill();
    for agent in &world.agents {
        let blind = agent.until("blindness", |status| {
            status["membership"]["blind"].as_str().map(str::to_owned)
        });
        eprintln!("blind: {blind}");
    }
    world.lets_pass(AFTER_PATIENCE);
    for agent in &world.agents {
        let status = agent.status().expect("an answer");
        assert_eq!(status["membership"]["gone"], json!([]), "{status}");
        assert_eq!(status["view"].as_array().map(Vec::len), Some(3), "{status}");
        assert_ne!(status["hold"]["reason"], "membership_unknown", "{status}");
    }
    world.agents[2].process.kill();
    for agent in &world.agents[..2] {
        agent.holds("membership_unknown", &["as it was", "node-3"]);
    }
    let directory = world.directory.clone();
    drop(world);
    // Kept when the test fails.
    let _ = fs::remove_dir_all(directory);
}
