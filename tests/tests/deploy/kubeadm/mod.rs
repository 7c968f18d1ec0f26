//! docs/walkthrough.md, done line by line on a control plane of three nodes that kubeadm makes, with client-go clients
//! behind a haproxy that count every error.
//!
//! It takes a quarter of an hour, and images: `cargo xtask test deploy --kubeadm` makes them and runs it. With
//! `REBALANCER_HOLD` set, what fails is not the end: it says how to get onto each node, and waits to be told to go on.

mod images;
mod lab;
mod leftovers;
mod walk;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rebalancer_tests::{
    fixture::{self, Fixture},
    netns::Network,
    process::{tail, wait_for},
    swarm::{Driver, Line},
};

use self::{
    images::{Archives, NEXT},
    lab::{Host, Lab, NODES},
    walk::{Section, Step},
};

/// How long a `watch` of the page may take: rebalancings wait for apiservers that just started.
const PATIENCE: Duration = Duration::from_secs(1_200);

/// How long somebody may look at what failed.
const HELD: Duration = Duration::from_secs(4 * 3_600);

/// Clients.
const CLIENTS: usize = 150;

/// How far from the mean an apiserver's part may be when it is level: the threshold of a rebalancing, and what else is
/// connected.
const LEVEL: f64 = 0.2;

/// A lab, its clients, and what was exported on each host.
struct Scene {
    lab: Lab,
    swarm: Driver,
    exports: Vec<String>,
    /// What the kubelets were given before anything was installed.
    manifests: Vec<String>,
}

#[test]
fn the_walk_through_is_as_the_page_says() {
    let Some(image) = env::var_os("REBALANCER_IMAGE").map(PathBuf::from) else {
        // It is a quarter of an hour: whoever asks for it is not given a skip, and who does not is told nothing.
        eprintln!("`cargo xtask test deploy --kubeadm` runs it");
        return;
    };
    let directory = rebalancer_tests::process::log_directory("rebalancer-kubeadm-").expect("a directory");
    eprintln!("logs are in {}", directory.display());
    let say = |text: &str| eprintln!("{text}");
    let fixture = Fixture::get(say).expect("kube-apiserver");
    let programs = fixture::node_programs(say).expect("kubeadm and the kubelet");
    let archives = Archives::make(&fixture, &programs, &image, &directory).expect("images");
    let lab = Lab::start(&programs, &archives, &directory).expect("a control plane");
    let mut scene = Scene::new(lab, &fixture, &archives);
    for section in walk::sections("docs/walkthrough.md") {
        scene.play(&section);
    }
    scene.held(Scene::is_back_to_nothing);
}

impl Scene {
    fn new(lab: Lab, fixture: &Fixture, archives: &Archives) -> Self {
        for host in &lab.hosts {
            for (release, version) in archives.releases.iter().zip([env!("CARGO_PKG_VERSION"), NEXT]) {
                let name = format!("home/rebalancer-{version}.image.tar");
                fs::copy(release, host.directory.join(name)).expect("an archive");
            }
        }
        let manifests = lab.hosts.iter().map(manifests).collect();
        wait_for(PATIENCE, || {
            lab.balancer.healthy().iter().all(|healthy| *healthy).then_some(())
        })
        .expect("haproxy sees three apiservers");
        let swarm = clients(&lab, fixture);
        let mut scene = Self {
            lab,
            swarm,
            exports: Vec::new(),
            manifests,
        };
        scene.held(|scene| scene.until("the clients", |scene| scene.line().ready >= CLIENTS as u64));
        scene
    }

    /// Does what a section says, and looks at what is true after it.
    fn play(&mut self, section: &Section) {
        eprintln!("## {}", section.title);
        self.swarm.reset().expect("the clients run");
        for step in &section.steps {
            self.held(|scene| scene.step(step));
        }
        self.held(|scene| scene.look(section));
    }

    /// Does something that may fail, which is the end unless it is to be held.
    fn held(&mut self, mut act: impl FnMut(&mut Self) -> anyhow::Result<()>) {
        while let Err(error) = act(self) {
            assert!(env::var_os("REBALANCER_HOLD").is_some(), "{error:#}");
            let file = self.lab.directory.join("go-on");
            let ways: Vec<String> = self.lab.hosts.iter().map(Host::way).collect();
            eprintln!(
                "{error:#}\nheld; onto the nodes:\n{}\ngo on: echo again > {1}, or echo over > {1}",
                ways.join("\n"),
                file.display()
            );
            let told = wait_for(HELD, || {
                fs::read_to_string(&file).ok().filter(|told| told.ends_with('\n'))
            });
            // It may be looked at for so long only.
            let told = told.unwrap_or_else(|| panic!("{error:#}"));
            fs::remove_file(&file).expect("a file that was read");
            if told.trim() != "again" {
                return;
            }
        }
    }

    /// What is true after a section.
    fn look(&mut self, section: &Section) -> anyhow::Result<()> {
        self.until("the clients", |scene| scene.line().ready >= CLIENTS as u64)?;
        let balances = section.title.contains("balance");
        if balances || section.title.contains("evacuate") {
            self.is_level()?;
        }
        let line = self.line();
        eprintln!(
            "   {} requests, {} errors, {} relists, {} broken watches, {} dials; sessions {:?}",
            line.requests,
            line.errors,
            line.relists,
            line.watch_breaks,
            line.dials,
            self.lab.balancer.sockets()
        );
        ensure!(
            (line.missed, line.doubled) == (0, 0),
            "{}: missed and doubled events: {line:?}",
            section.title
        );
        // Only the apiserver that went without a word may have cost its clients anything.
        let noticed = (line.errors, line.relists, line.watch_breaks);
        ensure!(
            balances || noticed == (0, 0, 0),
            "{}: errors, relists, broken watches: {line:?}",
            section.title
        );
        Ok(())
    }

    fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        if step.line.starts_with("export ") {
            self.exports.push(step.line.clone());
            return Ok(());
        }
        if step.host == "lb" {
            eprintln!("lb# {}", step.line);
            eprintln!("{}", self.lab.on_balancer(&step.line)?.trim_end());
            return Ok(());
        }
        let names: Vec<String> = match step.host.as_str() {
            "each" => self.lab.hosts.iter().map(|host| host.name.clone()).collect(),
            name => vec![name.to_owned()],
        };
        for name in names {
            eprintln!("{name}# {}", step.line);
            let host = self.lab.host(&name).context("the page names hosts that are there")?;
            let exports = self
                .exports
                .iter()
                .map(|line| format!("{line} && "))
                .collect::<String>();
            let line = exports + &step.line;
            let Some(until) = &step.until else {
                eprintln!("{}", host.done(&line)?.trim_end());
                continue;
            };
            let mut last = String::new();
            let seen = wait_for(PATIENCE, || {
                let output = host.run(&line).ok()?;
                last = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
                Step::is_seen(until, &last).then_some(())
            });
            ensure!(seen.is_some(), "{name}# {}: no {until:?}:\n{}", step.line, tail(&last));
            eprintln!("{}", last.trim_end());
        }
        Ok(())
    }

    fn line(&mut self) -> Line {
        self.swarm.line().expect("the clients run")
    }

    fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) -> anyhow::Result<()> {
        let came = wait_for(PATIENCE, || is_so(self).then_some(()));
        ensure!(came.is_some(), "no {what}: {:?}", self.swarm.line());
        Ok(())
    }

    /// As haproxy counts its sessions, who knows nothing of agents.
    fn is_level(&mut self) -> anyhow::Result<()> {
        self.until("level sessions", |scene| {
            let sessions = scene.lab.balancer.sockets();
            let mean = sessions.iter().sum::<usize>() as f64 / NODES as f64;
            sessions
                .iter()
                .all(|sessions| (*sessions as f64 - mean).abs() <= mean * LEVEL)
        })
    }

    /// What was there before is there as it was, and nothing besides.
    fn is_back_to_nothing(&mut self) -> anyhow::Result<()> {
        let kubectl = "KUBECONFIG=/etc/kubernetes/admin.conf kubectl get namespaces,daemonsets,pods,serviceaccounts,\
                       roles,rolebindings,clusterroles,clusterrolebindings,leases --all-namespaces --output name";
        let named = self.lab.hosts[0].done(kubectl)?;
        let weights = self.lab.balancer.weights();
        ensure!(weights == [100; NODES], "haproxy's weights are {weights:?}");
        let left: Vec<&str> = named.lines().filter(|line| line.contains("rebalancer")).collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        for (host, before) in self.lab.hosts.iter().zip(&self.manifests) {
            let name = &host.name;
            ensure!(
                manifests(host) == *before,
                "{name}: what the kubelet runs is not as it was"
            );
            let running = host.done("ps -eo args")?;
            ensure!(
                !running.contains("rebalancer agent") && !running.contains("rebalancer relay"),
                "{name}: {running}"
            );
            let files =
                "ls -A /run/rebalancer 2>&1 || true; find /etc/kubernetes /var/lib/kubelet -name '*rebalancer*'";
            let files = host.done(files)?;
            ensure!(
                files.contains("No such file") && files.lines().count() == 1,
                "{name}: {files}"
            );
            let images = host.done("ctr --namespace k8s.io images ls -q")?;
            ensure!(!images.contains("rebalancer"), "{name}: {images}");
            // Every client's socket is the apiserver's own; who has just come may not be taken up yet.
            let mut others = Vec::new();
            let own = wait_for(PATIENCE, || {
                let sockets = host.done("ss -Htnp state established sport = :6443").ok()?;
                let taken = |line: &&str| !line.contains("kube-apiserver");
                others = sockets.lines().filter(taken).map(str::to_owned).collect();
                (!sockets.is_empty() && others.is_empty()).then_some(())
            });
            ensure!(own.is_some(), "{name}: {others:?}");
        }
        Ok(())
    }
}

/// What the kubelet of a host runs by itself.
fn manifests(host: &Host) -> String {
    host.done("sha256sum /etc/kubernetes/manifests/* /etc/kubernetes/*.conf")
        .expect("manifests")
}

/// Clients in the hub's network, with a certificate that kubeadm gives them.
fn clients(lab: &Lab, fixture: &Fixture) -> Driver {
    let first = &lab.hosts[0];
    let kubeconfig = "kubeadm kubeconfig user --client-name swarm --org swarm-clients --config <(KUBECONFIG=/etc/kubernetes/admin.conf \
                      kubectl --namespace kube-system get configmap kubeadm-config --output 'jsonpath={.data.ClusterConfiguration}')";
    let (cert, key) = identity(&first.done(kubeconfig).expect("a certificate"), "swarm", &lab.directory);
    let admin = fs::read_to_string(first.own("/etc/kubernetes/super-admin.conf")).expect("the admin's");
    let (admin_cert, admin_key) = identity(&admin, "admin", &lab.directory);
    let mut command = Command::new(&fixture.swarm);
    command
        .arg(format!("--server=https://{}:6443", Network::HUB))
        .arg("--ca")
        .arg(first.own("/etc/kubernetes/pki/ca.crt"))
        .arg("--admin-cert")
        .arg(admin_cert)
        .arg("--admin-key")
        .arg(admin_key)
        .arg("--client-cert")
        .arg(cert)
        .arg("--client-key")
        .arg(key)
        .arg(format!("--clients={CLIENTS}"));
    Driver::start(
        "swarm",
        command,
        Some(lab.network.hub.fd()),
        &lab.directory.join("logs"),
    )
    .expect("the clients start")
}

/// The certificate and key of a kubeconfig, as files.
fn identity(kubeconfig: &str, name: &str, directory: &Path) -> (PathBuf, PathBuf) {
    let write = |field: &str| {
        let line = kubeconfig.lines().find_map(|line| line.trim().strip_prefix(field));
        let text = line.unwrap_or_else(|| panic!("no {field} in {kubeconfig}")).trim();
        let path = directory.join(format!("{name}-{}", field.trim_end_matches("-data:")));
        let decoded = format!("base64 -d <<< '{text}' > {}", path.display());
        crate::succeeds(Command::new("bash").args(["-c", &decoded]));
        path
    };
    (write("client-certificate-data:"), write("client-key-data:"))
}
