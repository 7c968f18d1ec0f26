//! One etcd, one kube-apiserver and one relay on loopback in a namespace of their own, started once.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
    time::Duration,
};

use rebalancer_tests::{
    apiserver::{Settings, start_apiserver, start_etcd},
    binary,
    fixture::Fixture,
    kube::Admin,
    kubectl::{self, Kubectl, Who},
    netns::Namespace,
    pki::Pki,
    process::{Process, log_directory, tail, wait_for},
    skip,
};

pub const START: Duration = Duration::from_secs(120);

pub struct World {
    pub pki: Pki,
    pub apiserver: SocketAddr,
    pub relay: SocketAddr,
    pub logs: PathBuf,
    /// The apiserver's audit log: one event a line.
    pub audit: PathBuf,
    pub control: PathBuf,
    pub namespace: &'static Namespace,
    processes: Mutex<Vec<Process>>,
}

static WORLD: OnceLock<Option<World>> = OnceLock::new();

impl World {
    /// The world, with the calling thread in its namespace; `None` when it cannot be made here, which is counted.
    pub fn get() -> Option<&'static Self> {
        static NAMESPACE: OnceLock<Namespace> = OnceLock::new();
        let fixture = match Fixture::get(|line| eprintln!("{line}")) {
            Ok(fixture) if kubectl::is_installed() => fixture,
            Ok(_) => {
                skip("there is no kubectl on PATH");
                return None;
            }
            Err(error) => {
                skip(&format!("{error:#}"));
                return None;
            }
        };
        let namespace = NAMESPACE.get_or_init(|| Namespace::new().expect("a network namespace"));
        namespace.enter().expect("its own namespace");
        WORLD
            .get_or_init(|| Some(Self::start(&fixture, namespace).expect("a kube-apiserver behind a relay")))
            .as_ref()
    }

    fn start(fixture: &Fixture, namespace: &'static Namespace) -> anyhow::Result<Self> {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let at = |port| SocketAddr::new(loopback, port);
        let logs = log_directory("rebalancer-apiserver-")?;
        let pki = Pki::new(&[loopback])?;
        // One authority has expired, as after a rotation; its clients' certificates have not.
        pki.of_expired_authority("ghost", &["system:masters"])?;
        let mut authorities = std::fs::read(pki.file("ca.crt"))?;
        authorities.extend(std::fs::read(pki.file("ghost-ca.crt"))?);
        std::fs::write(pki.file("ca.crt"), authorities)?;
        let audit = logs.join("audit.log");
        let policy = logs.join("audit-policy.yaml");
        std::fs::write(
            &policy,
            "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata, omitStages: [RequestReceived]}]\n",
        )?;
        let mut processes = vec![start_etcd(fixture, at(2379), at(2380), &logs, None)?];
        processes.push(start_apiserver(
            &Settings {
                fixture,
                pki: &pki,
                etcd: at(2379),
                listen: at(6444),
                advertise: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
                count: 1,
                directory: &logs,
                name: "kube-apiserver",
                goaway_chance: 0.0,
                host: None,
                extra: &[
                    format!("--audit-policy-file={}", policy.display()),
                    format!("--audit-log-path={}", audit.display()),
                    "--audit-log-mode=blocking".to_owned(),
                    format!("--kubelet-client-certificate={}", pki.file("admin.crt").display()),
                    format!("--kubelet-client-key={}", pki.file("admin.key").display()),
                    format!("--kubelet-certificate-authority={}", pki.file("ca.crt").display()),
                    "--kubelet-preferred-address-types=InternalIP".to_owned(),
                    "--requestheader-group-headers=X-Remote-Group,X-Auth-Group".to_owned(),
                ],
            },
            None,
        )?);
        let control = logs.join("relay.sock");
        processes.push(start_relay("relay", at(6443), &control, &pki, &logs)?);
        let world = Self {
            pki,
            apiserver: at(6444),
            relay: at(6443),
            logs,
            audit,
            control,
            namespace,
            processes: Mutex::new(processes),
        };
        let admin = Kubectl::new(&world.pki, world.relay, &Who::Certificate(world.pki.pair("admin")))?;
        let mut processes = world.processes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let ready = wait_for(START, || {
            if let Some(error) = processes.iter_mut().find_map(|process| process.is_running().err()) {
                panic!("{error:#}");
            }
            let answer = admin.run(&["get", "--raw", "/readyz"]).ok()?.ok()?;
            (answer == "ok").then_some(())
        });
        anyhow::ensure!(
            ready.is_some(),
            "kube-apiserver did not become ready behind the relay:\n{}\n{}",
            tail(&std::fs::read_to_string(world.logs.join("kube-apiserver.log"))?),
            tail(&std::fs::read_to_string(world.logs.join("relay.log"))?)
        );
        drop(processes);
        Ok(world)
    }

    /// An answer without the address it came from, and without what changes from request to request.
    pub fn neutral(&self, text: &str) -> String {
        text.replace(&self.relay.to_string(), "ADDRESS")
            .replace(&self.apiserver.to_string(), "ADDRESS")
            .lines()
            // klog lines carry a time and a process id.
            .map(|line| line.split_once("] ").map_or(line, |(_, rest)| rest))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The administrator, at the apiserver itself.
    pub fn admin(&self) -> Admin {
        self.admin_by(self.apiserver)
    }

    /// The same, by HTTP/1.1 at that address.
    pub fn admin_by(&self, address: SocketAddr) -> Admin {
        Admin::new(&self.pki, self.namespace, address).expect("an administrator")
    }

    /// The relay's connections.
    pub fn connections(&self) -> Vec<serde_json::Value> {
        match self.control("GET /v1/connections", "")["connections"].take() {
            serde_json::Value::Array(list) => list,
            other => panic!("connections are {other}"),
        }
    }

    /// Asks the control socket.
    pub fn control(&self, request: &str, body: &str) -> serde_json::Value {
        control(&self.control, request, body)
    }

    /// Asks the control socket: the whole answer.
    pub fn control_raw(&self, request: &str, body: &str) -> String {
        control_raw(&self.control, request, body)
    }
}

/// Starts a relay before the apiserver.
pub fn start_relay(name: &str, listen: SocketAddr, control: &Path, pki: &Pki, logs: &Path) -> anyhow::Result<Process> {
    start_relay_with(name, listen, control, pki, logs, &[])
}

/// The same, with more flags.
pub fn start_relay_with(
    name: &str,
    listen: SocketAddr,
    control: &Path,
    pki: &Pki,
    logs: &Path,
    flags: &[&str],
) -> anyhow::Result<Process> {
    let standard = [
        "--upstream=127.0.0.1:6444",
        "--requestheader-group-headers=X-Remote-Group,X-Auth-Group",
        "--requestheader-allowed-names=front-proxy-client",
    ];
    let ca = pki.file("front-proxy-ca.crt");
    let ca = format!("--requestheader-client-ca-file={}", ca.display());
    let all = [&standard[..], &[&ca], flags].concat();
    Process::start(name, relay_command(listen, control, pki, &all), None, logs)
}

/// A relay that is told nothing but certificates and those flags.
pub fn relay_command(listen: SocketAddr, control: &Path, pki: &Pki, flags: &[&str]) -> Command {
    let mut relay = Command::new(binary());
    relay
        .arg("relay")
        .arg(format!("--listen={listen}"))
        .args(pki.relay_flags())
        .args(flags)
        .arg(format!("--control=unix:{}", control.display()))
        .env("REBALANCER_LOG", "debug");
    relay
}

/// Asks a relay's control socket.
pub fn control(socket: &Path, request: &str, body: &str) -> serde_json::Value {
    let answer = control_raw(socket, request, body);
    let (_, json) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// The same: the whole answer.
fn control_raw(socket: &Path, request: &str, body: &str) -> String {
    let mut socket = UnixStream::connect(socket).expect("the control socket");
    write!(
        socket,
        "{request} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("a request");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    answer
}
