//! A load balancer's health checks and the kubelet's probes are no clients: they are neither load nor landings.

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rebalancer_tests::{
    binary,
    netns::{Namespace, Network},
    node::{PORT, ask},
    pki::Pki,
    process::{Process, log_directory, wait_for},
    skip, standin,
};
use serde_json::Value;

/// A busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// For how long it is looked, and how often load balancer and kubelet come meanwhile: as in the field by
/// `REBALANCER_LONG`, else for a short while and so often that as many come.
struct Pace {
    span: Duration,
    /// haproxy's `inter`.
    checks: &'static str,
    probes: Duration,
}

impl Pace {
    fn chosen() -> Self {
        if env::var_os("REBALANCER_LONG").is_some() {
            Self {
                span: Duration::from_secs(180),
                checks: "1s",
                probes: Duration::from_secs(1),
            }
        } else {
            eprintln!(
                "the short form, of 20 s: REBALANCER_LONG=1 looks for three minutes, with a check and a probe a second"
            );
            Self {
                span: Duration::from_secs(20),
                checks: "100ms",
                probes: Duration::from_millis(200),
            }
        }
    }
}

/// haproxy, as Debian packages it: `HAPROXY`, else on PATH.
fn haproxy() -> Option<String> {
    let name = env::var("HAPROXY").unwrap_or_else(|_| "haproxy".to_owned());
    let runs = Command::new(&name)
        .arg("-v")
        .output()
        .is_ok_and(|output| output.status.success());
    if !runs {
        skip("haproxy is not here: `apt-get install haproxy`, or name one by HAPROXY");
    }
    runs.then_some(name)
}

/// What kubeadm's documentation has for a load balancer before the apiservers, with checks every `inter`.
fn configuration(directory: &Path, inter: &str, servers: &[SocketAddr]) -> String {
    let mut text = format!(
        "global\n  maxconn 1000\n  stats socket {}/haproxy.sock\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  \
         timeout server 1h\nfrontend apiserver\n  bind 10.77.0.1:{PORT}\n  default_backend apiservers\nbackend \
         apiservers\n  option httpchk GET /healthz\n  balance roundrobin\n",
        directory.display()
    );
    for (index, server) in servers.iter().enumerate() {
        text += &format!("  server cp-{index} {server} check check-ssl verify none inter {inter}\n");
    }
    text
}

struct Standin {
    agent: Process,
    _server: Process,
    socket: std::path::PathBuf,
}

fn standin(index: usize, node: &Namespace, pki: &Pki, directory: &Path) -> Standin {
    let directory = directory.join(format!("cp-{index}"));
    fs::create_dir_all(&directory).expect("a directory");
    let listen = SocketAddr::new(Network::node_address(index), PORT);
    let origin = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_millis();
    let server = standin::command(listen, origin, pki);
    let server = Process::start("apiserver", server, Some(node.fd()), &directory).expect("an apiserver");
    let socket = directory.join("agent.sock");
    let mut agent = Command::new(binary());
    agent
        .args(["agent", "--shim=none", "--interval=1s", "--metrics=127.0.0.1:0"])
        .arg(format!("--node-name=cp-{index}"))
        .arg(format!("--apiserver-port={PORT}"))
        .arg(format!("--api=unix:{}", socket.display()));
    let agent = Process::start("agent", agent, Some(node.fd()), &directory).expect("an agent");
    Standin {
        agent,
        _server: server,
        socket,
    }
}

impl Standin {
    fn status(&mut self) -> Value {
        if let Err(ended) = self.agent.is_running() {
            panic!("{ended:#}");
        }
        wait_for(PATIENCE, || ask(&self.socket, "/v1/status").ok()).expect("the agent answers")
    }
}

/// Runs something on a thread inside a namespace.
fn inside<T: Send + 'static>(namespace: &Namespace, job: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    let namespace = namespace.clone();
    thread::spawn(move || {
        namespace.enter().expect("its own namespace");
        job()
    })
}

/// A TLS handshake that offers HTTP/2 as the kubelet's prober does, a look, and the end.
fn probe(to: SocketAddr) {
    let output = Command::new("curl")
        .args([
            "--silent",
            "--insecure",
            "--http2",
            "--max-time",
            "5",
            "--output",
            "/dev/null",
        ])
        .arg(format!("https://{to}/readyz"))
        .output();
    // One that fails is one that came and went all the same.
    let _ = output;
}

#[test]
fn health_checks_by_reset_and_probes_from_the_node_are_no_landings() {
    const NODES: usize = 2;
    let Some(haproxy) = haproxy() else { return };
    if !Command::new("curl")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
    {
        skip("curl is not here: `apt-get install curl`");
        return;
    }
    let network = Network::new(NODES).expect("namespaces need root");
    let directory = log_directory("rebalancer-checks-").expect("a directory");
    let addresses: Vec<_> = (0..NODES).map(Network::node_address).collect();
    let pki = Pki::new(&addresses).expect("certificates");
    let mut nodes: Vec<_> = (0..NODES)
        .map(|index| standin(index, &network.nodes[index], &pki, &directory))
        .collect();
    for node in &mut nodes {
        wait_for(PATIENCE, || {
            (node.status()["view"][0]["state"] == "ready").then_some(())
        })
        .expect("it listens");
    }
    let servers: Vec<_> = addresses
        .iter()
        .map(|address| SocketAddr::new(*address, PORT))
        .collect();
    let pace = Pace::chosen();
    let file = directory.join("haproxy.cfg");
    fs::write(&file, configuration(&directory, pace.checks, &servers)).expect("a file");
    let mut command = Command::new(haproxy);
    command.arg("-db").arg("-f").arg(&file);
    let mut balancer = Process::start("haproxy", command, Some(network.hub.fd()), &directory).expect("haproxy");

    // The kubelet's probes: each second, from the node's own address.
    let until = Instant::now() + pace.span;
    let probes: Vec<_> = servers
        .iter()
        .zip(&network.nodes)
        .map(|(to, node)| {
            let to = *to;
            inside(node, move || {
                let mut made = 0;
                while Instant::now() < until {
                    probe(to);
                    made += 1;
                    thread::park_timeout(pace.probes);
                }
                made
            })
        })
        .collect();
    let made: Vec<u64> = probes
        .into_iter()
        .map(|probe| probe.join().expect("it ends well"))
        .collect();
    balancer.is_running().expect("haproxy runs");
    for (index, node) in nodes.iter_mut().enumerate() {
        let status = node.status();
        let metrics = rebalancer_tests::node::ask_text(&node.socket, "/metrics").expect("metrics");
        let events = metrics
            .lines()
            .find_map(|line| line.strip_prefix("rebalancer_bpf_events_total{kind=\"opened\"} "));
        // The checks came: with the kernel programs each was seen. haproxy makes ten a second, or one.
        if status["source"] == "ebpf" {
            let seen: u64 = events.expect("checks were seen").parse().expect("a number");
            eprintln!(
                "cp-{index} in {:?}: {seen} opened, {} by probes, the rest by checks",
                pace.span, made[index]
            );
            assert!(
                seen > made[index] + 10,
                "{seen} opened, of which {} are probes",
                made[index]
            );
        }
        assert_eq!(status["landings_total"], 0, "cp-{index}: {status:#}");
        assert_eq!(status["view"][0]["connections"], 0, "cp-{index}: {status:#}");
        assert_eq!(status["table_repairs"]["closed"], 0, "each end is an event: {status:#}");
    }
    // Nothing is left of them, once nobody checks.
    balancer.kill();
    for (index, node) in nodes.iter_mut().enumerate() {
        let empty = wait_for(PATIENCE, || {
            let answer = ask(&node.socket, "/v1/connections").ok()?;
            (answer["total"] == 0).then_some(())
        });
        assert!(
            empty.is_some(),
            "cp-{index} holds {:#}",
            ask(&node.socket, "/v1/connections").unwrap_or_default()
        );
    }
}
