//! What clients have open when they are told to go twice: copies, logs, exec, port-forward, watches, and clients of other
//! kinds than client-go. Nothing of it fails.
//!
//! A kubelet of the tests' own (tests/go/kubelet) answers behind the real kube-apiserver.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::{self, JoinHandle},
    time::Duration,
};

use rebalancer_tests::{
    fixture,
    kubectl::{Kubectl, Who},
    pki::{Pair, Pki},
    process::{Process, wait_for},
    skip,
};
use serde_json::Value;

use super::{
    streams_clients::{Hyper, LargeWindows},
    world::{World, control, start_relay},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Objects of 900 KB in the list that the client with large windows reads slowly: more than its windows hold.
const LARGE: usize = 20;

/// What passes before a copy waits to be let on, in octets.
const HEAD_START: usize = 4 << 20;

/// The scene: a relay of its own, whose clients may all be told, before a node with one pod.
struct Scene<'a> {
    world: &'a World,
    address: SocketAddr,
    control: PathBuf,
    /// The pod's container: a directory.
    root: PathBuf,
    _processes: [Process; 2],
}

impl<'a> Scene<'a> {
    fn start(world: &'a World, kubelet: &Path) -> Self {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let root = world.logs.join("container");
        fs::create_dir_all(root.join("bin")).expect("a directory");
        fs::write(root.join("log"), "line 0\n").expect("a log");
        // What the container calls tar: it stands still in the middle, until it is let on.
        let halt = format!("while [ ! -e {}/on ]; do sleep 0.05; done", root.display());
        let script = format!(
            "#!/bin/sh\ncase $1 in\n\
             c*) /bin/tar \"$@\" | {{ dd bs=65536 count={} iflag=fullblock 2>/dev/null; {halt}; cat; }} ;;\n\
             *) {halt}; exec /bin/tar \"$@\" ;;\nesac\n",
            HEAD_START / 65_536
        );
        let tar = root.join("bin/tar");
        fs::write(&tar, script).expect("a script");
        let mut permissions = fs::metadata(&tar).expect("a script").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
        fs::set_permissions(&tar, permissions).expect("a script");

        let serving = world.pki.pair("apiserver");
        let mut command = Command::new(kubelet);
        command
            .arg("-listen=127.0.0.1:10250")
            .arg("-cert")
            .arg(serving.certificate)
            .arg("-key")
            .arg(serving.key)
            .arg("-client-ca")
            .arg(world.pki.file("ca.crt"))
            .arg("-root")
            .arg(&root);
        let path = env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", root.join("bin").display()));
        let kubelet = Process::start("kubelet", command, None, &world.logs).expect("the kubelet starts");
        let control = world.logs.join("streams.sock");
        let relay = start_relay("relay-of-streams", at(6445), &control, &world.pki, &world.logs).expect("a relay");
        let scene = Self {
            world,
            address: at(6445),
            control,
            root,
            _processes: [kubelet, relay],
        };
        let up = wait_for(PATIENCE, || {
            let ports = [scene.address, at(10_250)];
            ports.iter().all(|port| TcpStream::connect(port).is_ok()).then_some(())
        });
        up.expect("kubelet and relay listen");
        scene.register();
        scene
    }

    /// The node, and a pod that is bound to it and runs.
    fn register(&self) {
        let objects = self.world.logs.join("objects.yaml");
        fs::write(
            &objects,
            "apiVersion: v1\nkind: Node\nmetadata: {name: node}\n\
             status:\n  addresses: [{type: InternalIP, address: 127.0.0.1}]\n  \
             daemonEndpoints: {kubeletEndpoint: {Port: 10250}}\n---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {name: streams}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: default, namespace: streams}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: streams}\n\
             spec:\n  nodeName: node\n  automountServiceAccountToken: false\n  \
             containers: [{name: web, image: web}]\n",
        )
        .expect("a file");
        let admin = self.kubectl(&Who::Certificate(self.world.pki.pair("admin")));
        done(&admin, &["apply", "-f", objects.to_str().expect("a path of letters")]);
        let running = r#"{"status": {"phase": "Running"}}"#;
        done(
            &admin,
            &[
                "patch",
                "pod",
                "web",
                "-n",
                "streams",
                "--subresource=status",
                "-p",
                running,
            ],
        );
        let data = self.world.logs.join("data");
        fs::write(&data, "x".repeat(900_000)).expect("a file");
        let from = format!("--from-file=data={}", data.display());
        for index in 0..LARGE {
            done(
                &admin,
                &["create", "configmap", "-n", "streams", &format!("large-{index}"), &from],
            );
        }
    }

    fn kubectl(&self, who: &Who) -> Kubectl {
        Kubectl::new(&self.world.pki, self.address, who).expect("a kubeconfig")
    }

    fn connections(&self) -> Vec<Value> {
        match control(&self.control, "GET /v1/connections", "")["connections"].take() {
            Value::Array(list) => list,
            other => panic!("connections are {other}"),
        }
    }

    /// The connections of each user that is named, by id.
    fn of_users(&self, users: &[&str]) -> BTreeMap<String, String> {
        let named = |entry: &Value| {
            let user = entry["user"].as_str().filter(|user| users.contains(user))?;
            Some((entry["id"].as_str()?.to_owned(), user.to_owned()))
        };
        self.connections().iter().filter_map(named).collect()
    }

    /// Tells everybody who is connected to go, and answers with how many heard it or will.
    fn tell_everybody(&self, generation: u64) -> usize {
        let ids: Vec<_> = self.connections().iter().map(|entry| entry["id"].clone()).collect();
        let order = serde_json::json!({"generation": generation, "expires_in_ms": 60_000, "victims": ids});
        let answer = control(&self.control, "POST /v1/goaway", &order.to_string());
        let results = answer["results"].as_array().expect("results");
        let told = |result: &&Value| result["result"] == "sent" || result["result"] == "pending";
        results.iter().filter(told).count()
    }
}

/// Runs kubectl, which must do as it is told.
fn done(kubectl: &Kubectl, arguments: &[&str]) -> String {
    kubectl
        .run(arguments)
        .expect("kubectl runs")
        .unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
}

/// Runs kubectl in a thread: it takes as long as it takes.
fn begun(kubectl: &Kubectl, arguments: &[&str], websockets: bool) -> JoinHandle<Output> {
    let mut command = kubectl.command(arguments);
    for protocol in ["KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "KUBECTL_PORT_FORWARD_WEBSOCKETS"] {
        command.env(protocol, websockets.to_string());
    }
    command.stdin(Stdio::null());
    thread::spawn(move || command.output().expect("kubectl runs"))
}

fn is_well(name: &str, thread: JoinHandle<Output>) -> String {
    let output = thread.join().expect("the thread ends well");
    assert!(output.status.success(), "{name}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Octets that no compression and no luck makes equal to others.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut octets = Vec::with_capacity(length + 8);
    while octets.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        octets.extend((state ^ (state >> 29)).to_le_bytes());
    }
    octets.truncate(length);
    octets
}

/// `kubectl exec` of a command that answers each line with the same one.
struct Echo {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Echo {
    fn start(kubectl: &Kubectl, websockets: bool) -> Self {
        let mut command = kubectl.command(&["exec", "-i", "-n", "streams", "web", "--", "sh", "-c", "cat; exit 7"]);
        command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets.to_string());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, answers }
    }

    fn says(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        writeln!(stdin, "{line}").expect("kubectl runs");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("kubectl runs");
        assert_eq!(answer.trim_end(), line);
    }

    fn ends(mut self) {
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output().expect("kubectl ends");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "{error}");
    }
}

/// `kubectl port-forward` to a server of the test that answers with what it gets.
struct Forward {
    process: Process,
    server: SocketAddr,
    open: TcpStream,
}

impl Forward {
    fn start(kubectl: &Kubectl, world: &World, websockets: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let target = listener.local_addr().expect("a port").port();
        thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                thread::spawn(move || std::io::copy(&mut &socket, &mut &socket));
            }
        });
        let ports = format!(":{target}");
        let mut command = kubectl.command(&["port-forward", "-n", "streams", "pod/web", &ports]);
        command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets.to_string());
        let name = format!("port-forward-{websockets}");
        let process = Process::start(&name, command, None, &world.logs).expect("kubectl starts");
        let port = wait_for(PATIENCE, || {
            let log = process.log();
            let rest = log.split_once("127.0.0.1:")?.1;
            rest.split(' ').next()?.parse().ok()
        });
        let server = SocketAddr::from(([127, 0, 0, 1], port.expect("kubectl says its port")));
        let open = TcpStream::connect(server).expect("kubectl listens");
        Self { process, server, open }
    }

    /// Over the connection that was there at the start, and over a new one.
    fn carries(&mut self, octets: &[u8]) {
        let mut new = TcpStream::connect(self.server).expect("kubectl listens");
        for socket in [&mut self.open, &mut new] {
            socket.set_read_timeout(Some(PATIENCE)).expect("a socket option");
            socket.write_all(octets).expect("kubectl forwards");
            let mut back = vec![0; octets.len()];
            socket
                .read_exact(&mut back)
                .unwrap_or_else(|error| panic!("{error}: {}", self.process.log()));
            assert!(back == octets, "what came back is not what was sent");
        }
    }
}

fn python(pki: &Pki, port: u16, who: &Pair, stop: &Path) -> Option<JoinHandle<Output>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apiserver/client.py");
    let mut command = Command::new("python3");
    command.arg("--version");
    command.output().ok()?;
    let mut command = Command::new("python3");
    command
        .arg(script)
        .arg(port.to_string())
        .args([&pki.file("ca.crt"), &who.certificate, &who.key])
        .arg(stop)
        .arg("/api/v1/namespaces/default/configmaps?limit=1");
    Some(thread::spawn(move || command.output().expect("python3 runs")))
}

#[test]
fn nothing_that_clients_have_open_fails_when_they_are_told_to_go_twice() {
    let Some(world) = World::get() else { return };
    let kubelet = match fixture::kubelet() {
        Ok(kubelet) => kubelet,
        Err(error) => return skip(&format!("{error:#}")),
    };
    let scene = Scene::start(world, &kubelet);
    let pki = &world.pki;
    let admin = scene.kubectl(&Who::Certificate(pki.pair("admin")));
    let token = scene.kubectl(&Who::Token("the-admins-token".into()));

    // A copy each way, by both of kubectl's protocols, that stands still in the middle.
    let size = if env::var_os("REBALANCER_LONG").is_some() {
        200 << 20
    } else {
        16 << 20
    };
    let data = noise(size, 1);
    fs::write(scene.root.join("large"), &data).expect("a file");
    let local = world.logs.join("copies");
    fs::create_dir_all(&local).expect("a directory");
    fs::write(local.join("large"), &data).expect("a file");
    let mut copies = Vec::new();
    for websockets in [true, false] {
        let to = local.join(format!("from-pod-{websockets}"));
        let from_pod = ["cp", "-n", "streams", "web:large", to.to_str().expect("letters")];
        let copy = begun(&admin, &from_pod, websockets);
        copies.push((to, copy));
        let into = scene.root.join(format!("to-pod-{websockets}"));
        fs::create_dir_all(&into).expect("a directory");
        let source = local.join("large");
        let target = format!("web:{}", into.display());
        let to_pod = ["cp", "-n", "streams", source.to_str().expect("letters"), &target];
        copies.push((into.join("large"), begun(&token, &to_pod, websockets)));
    }
    // Logs, over HTTP/2.
    let logs = begun(&admin, &["logs", "-f", "-n", "streams", "web"], true);
    let mut echoes = [Echo::start(&admin, true), Echo::start(&token, false)];
    let mut forwards = [true, false].map(|websockets| Forward::start(&admin, world, websockets));
    // Watches by each kind of client.
    let as_carol = ["--as=carol", "--as-group=system:masters"];
    let watches: Vec<_> = [
        ("certificate", &admin, &[][..]),
        ("token", &token, &[]),
        ("as", &admin, &as_carol),
    ]
    .into_iter()
    .map(|(name, kubectl, more)| {
        let arguments = [&["get", "configmaps", "-n", "default", "-w", "-o", "name"], more].concat();
        let name = format!("watch-{name}");
        kubectl
            .start(&name, &arguments, None, &world.logs)
            .expect("kubectl starts")
    })
    .collect();
    // Clients that go on asking.
    let users = ["python", "kube-rs", "fabric8"];
    let identities = users.map(|user| pki.client(user, user, &["system:masters"]).expect("a certificate"));
    let stop = world.logs.join("stop");
    let python = python(pki, scene.address.port(), &identities[0], &stop);
    if python.is_none() {
        skip("there is no python3 on PATH");
    }
    let hyper = Hyper::start(pki, scene.address, &identities[1], stop.clone());
    let large = LargeWindows::start(pki, scene.address, &identities[2], LARGE);

    for echo in &mut echoes {
        echo.says("before");
    }
    for forward in &mut forwards {
        forward.carries(b"before");
    }
    let is_open = || {
        (scene
            .connections()
            .iter()
            .filter(|entry| entry["open_watches"] == 1)
            .count()
            == 3)
            .then_some(())
    };
    wait_for(PATIENCE, is_open).expect("three watches are open");
    let copying = || {
        let entries = scene.connections();
        let moved = |octets: &str| {
            entries
                .iter()
                .filter(|entry| entry[octets].as_u64() > Some(1 << 20))
                .count()
        };
        (moved("bytes_out") >= 2 && moved("bytes_in") >= 2).then_some(())
    };
    wait_for(PATIENCE, copying).expect("the copies have begun");

    let asking = users.len() - usize::from(python.is_none());
    for round in 1..=2 {
        large.waits_in_list(round);
        let before = wait_for(PATIENCE, || {
            Some(scene.of_users(&users)).filter(|all| all.len() == asking)
        });
        let before = before.expect("who goes on asking is connected once");
        let told = scene.tell_everybody(round as u64);
        assert!(told >= asking, "{told} were told");
        let log = fs::OpenOptions::new().append(true).open(scene.root.join("log"));
        writeln!(log.expect("the log"), "line {round}").expect("the log");
        for echo in &mut echoes {
            echo.says(&format!("after {round}"));
        }
        for forward in &mut forwards {
            forward.carries(&noise(100_000, round as u64));
        }
        let name = format!("after-{round}");
        done(&admin, &["create", "configmap", "-n", "default", &name]);
        for watch in &watches {
            let seen = wait_for(PATIENCE, || {
                watch.log().contains(&format!("configmap/{name}\n")).then_some(())
            });
            assert!(seen.is_some(), "the watch ends with {}", watch.log());
        }
        large.goes_on(round);
        let moved = wait_for(PATIENCE, || {
            let now = scene.of_users(&users);
            (now.len() == asking && now.keys().all(|id| !before.contains_key(id))).then_some(())
        });
        assert!(moved.is_some(), "before {before:?}, now {:?}", scene.of_users(&users));
    }

    fs::write(scene.root.join("on"), "").expect("a file");
    for (file, copy) in copies {
        is_well("kubectl cp", copy);
        assert!(
            fs::read(&file).expect("a copy") == data,
            "{} is another",
            file.display()
        );
    }
    let log = fs::OpenOptions::new().append(true).open(scene.root.join("log"));
    writeln!(log.expect("the log"), "end").expect("the log");
    assert_eq!(is_well("kubectl logs", logs), "line 0\nline 1\nline 2\nend\n");
    for echo in echoes {
        echo.ends();
    }
    for mut watch in watches {
        watch.is_running().expect("the watch goes on");
    }
    large.ends();
    fs::write(&stop, "").expect("a file");
    if let Some(python) = python {
        let answer: Value = serde_json::from_str(&is_well("python3", python)).expect("its counts");
        assert_eq!(answer["opened"], 3, "{answer}");
        eprintln!("python: {answer}");
    }
    let (asked, opened) = hyper.ends();
    assert_eq!(opened, 3, "after {asked} requests");
    eprintln!("hyper: {asked} requests over {opened} connections");
}
