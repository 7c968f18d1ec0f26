//! Running agents, seen from outside: what they tell each other, write down, and answer. No privilege is needed, since they
//! count by the socket list; their apiserver is a port that somebody listens on.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// Waits for a state, for as long as a busy machine may take.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        thread::park_timeout(Duration::from_millis(50));
    }
}

/// A CA and whom it signs for.
struct Authority {
    directory: TempDir,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut authority = rcgen::CertificateParams::new(vec![]).expect("parameters");
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().expect("a key");
        let pem = authority.self_signed(&key).expect("a certificate").pem();
        fs::write(directory.path().join("ca.crt"), pem).expect("a file");
        Self {
            directory,
            issuer: rcgen::Issuer::new(authority, key),
        }
    }

    /// Writes certificate and key of a host, in place of those there were.
    fn sign(&self, stem: &str, host: &str, expires_in_year: i32) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut parameters = rcgen::CertificateParams::new(vec![host.to_owned()]).expect("parameters");
        parameters.not_after = rcgen::date_time_ymd(expires_in_year, 1, 1);
        let certificate = parameters.signed_by(&key, &self.issuer).expect("a certificate");
        // The key first: between the two writes they do not belong together, which is what happens to everybody.
        fs::write(self.path(&format!("{stem}.key")), key.serialize_pem()).expect("a file");
        fs::write(self.path(&format!("{stem}.crt")), certificate.pem()).expect("a file");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// A node: a port that is listened on, addresses, and a directory.
struct Node {
    name: &'static str,
    host: IpAddr,
    peer_port: u16,
    apiserver: TcpListener,
    directory: TempDir,
}

impl Node {
    fn new(name: &'static str, last: u8) -> Self {
        let host = IpAddr::from([127, 0, 0, last]);
        let free = TcpListener::bind((host, 0)).expect("a port");
        Self {
            name,
            host,
            peer_port: free.local_addr().expect("its address").port(),
            apiserver: TcpListener::bind("127.0.0.1:0").expect("a port"),
            directory: tempfile::tempdir().expect("a directory"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn peer(&self) -> String {
        format!("--peer={}=https://{}:{}", self.name, self.host, self.peer_port)
    }

    /// The flags of an agent with these peers and that certificate.
    fn peered(&self, authority: &Authority, stem: &str, peers: &[&Node]) -> Vec<String> {
        let file = |name: &str| authority.path(name).display().to_string();
        let mut flags: Vec<String> = peers.iter().map(|peer| peer.peer()).collect();
        flags.push(format!("--peer-listen={}:{}", self.host, self.peer_port));
        flags.push(format!("--peer-cert={}", file(&format!("{stem}.crt"))));
        flags.push(format!("--peer-key={}", file(&format!("{stem}.key"))));
        flags.push(format!("--peer-ca={}", file("ca.crt")));
        flags
    }

    fn start(&self, flags: &[String]) -> Agent {
        self.start_by(Command::new(env!("CARGO_BIN_EXE_rebalancer")), flags)
    }

    fn start_by(&self, mut program: Command, flags: &[String]) -> Agent {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let metrics = free.local_addr().expect("its address");
        drop(free);
        let port = self.apiserver.local_addr().expect("its address").port();
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .expect("a file");
        program
            .args(["agent", "--source=sockdiag", "--interval=200ms"])
            .arg(format!("--node-name={}", self.name))
            .arg(format!("--apiserver-port={port}"))
            .arg(format!("--metrics={metrics}"))
            .arg(format!("--api=unix:{}", self.path("agent.sock").display()))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut agent = Agent {
            child: program.spawn().expect("the binary starts"),
            socket: self.path("agent.sock"),
            metrics: metrics.to_string(),
            log: self.path("log"),
        };
        until("an answer", || {
            let ended = agent.child.try_wait().expect("a child");
            assert!(ended.is_none(), "the agent ended: {}", agent.log());
            try_ask(&agent.socket, "GET", "/livez", "").filter(|answer| answer.ends_with("ok\n"))
        });
        agent
    }
}

/// A running agent; it is killed when this goes.
struct Agent {
    child: Child,
    socket: PathBuf,
    metrics: String,
    log: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The whole answer of a local API.
fn try_ask(socket: &Path, method: &str, path: &str, body: &str) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

impl Agent {
    fn ask(&self, method: &str, path: &str, body: &str) -> Value {
        let answer = try_ask(&self.socket, method, path, body).expect("the agent answers");
        let (_, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"))
    }

    fn get(&self, path: &str) -> Value {
        self.ask("GET", path, "")
    }

    /// What it says of a peer.
    fn fault_of(&self, peer: &str) -> Option<String> {
        let peers = self.get("/v1/peers");
        let list = peers["peers"].as_array().expect("a list");
        let entry = list.iter().find(|entry| entry["apiserver"] == peer).expect("the peer");
        entry["fault"].as_str().map(str::to_owned)
    }

    /// Waits until it says that of a peer.
    fn says_of(&self, peer: &str, part: &str) {
        until(part, || self.fault_of(peer).filter(|fault| fault.contains(part)));
    }

    fn understands(&self, peer: &str) {
        until("an understanding", || {
            let peers = self.get("/v1/peers");
            let list = peers["peers"].as_array().expect("a list");
            let entry = list.iter().find(|entry| entry["apiserver"] == peer).expect("the peer");
            (entry["fault"].is_null() && entry["state"].is_string()).then_some(())
        });
    }

    /// The value of a series.
    fn metric(&self, series: &str) -> Option<f64> {
        let mut stream = TcpStream::connect(&self.metrics).expect("the metrics' port");
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let mut lines = answer.lines();
        lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How many lines of its log say that.
    fn said(&self, part: &str) -> usize {
        self.log().lines().filter(|line| line.contains(part)).count()
    }
}

#[test]
fn agents_understand_each_other_or_name_what_differs() {
    let authority = Authority::new();
    let (a, b) = (Node::new("a", 1), Node::new("b", 2));
    authority.sign("a", "127.0.0.1", 2040);
    authority.sign("b", "127.0.0.2", 2040);
    let of_a = a.start(&a.peered(&authority, "a", &[&b]));
    assert!(
        of_a.metric("rebalancer_skew_ratio").expect("a series").is_nan(),
        "b was never heard"
    );
    of_a.says_of("b", &format!("127.0.0.2:{}", b.peer_port));
    let of_b = b.start(&b.peered(&authority, "b", &[&a]));
    of_a.understands("b");
    of_b.understands("a");
    let peers = of_a.get("/v1/peers");
    assert_eq!(peers["peers"][0]["release"], env!("CARGO_PKG_VERSION"), "{peers:#}");
    assert_eq!(peers["peers"][0]["clock_ahead_s"], 0, "it is this machine's");
    until("a skew", || {
        of_a.metric("rebalancer_skew_ratio").filter(|skew| *skew == 0.0)
    });
    drop(of_b);
    let mut other = b.peered(&authority, "b", &[&a]);
    other.push("--skew-target=0.05".to_owned());
    let of_b = b.start(&other);
    of_a.says_of("b", "--skew-target is 0.05, this agent's is 0.03");
    of_b.says_of("a", "--skew-target is 0.03, this agent's is 0.05");
    until("a hold", || {
        let hold = &of_a.get("/v1/plan")["hold"];
        (hold["reason"] == "peer_unknown" && hold["message"].as_str()?.contains("--skew-target")).then_some(())
    });
    // What may differ.
    drop(of_b);
    let mut other = b.peered(&authority, "b", &[&a]);
    other.push("--dry-run".to_owned());
    let of_b = b.start(&other);
    of_a.understands("b");
    drop(of_b);
    // A third apiserver that one of them does not know of.
    let c = Node::new("c", 3);
    let of_b = b.start(&b.peered(&authority, "b", &[&a, &c]));
    of_a.says_of("b", "--peer c=URL");
    of_b.says_of("a", "does not know the apiserver c");
}

#[test]
fn answers_have_the_members_that_are_documented() {
    let authority = Authority::new();
    let (a, b) = (Node::new("a", 8), Node::new("b", 9));
    authority.sign("a", "127.0.0.8", 2040);
    let agent = a.start(&a.peered(&authority, "a", &[&b]));
    let document = agent.get("/openapi.json");
    let names = |value: &Value| -> Vec<String> {
        let members = value.as_object().unwrap_or_else(|| panic!("no members: {value}"));
        members.keys().cloned().collect()
    };
    let client = a.apiserver.local_addr().and_then(TcpStream::connect).expect("a client");
    until("its connection", || {
        (agent.get("/v1/connections")["total"] == 1).then_some(())
    });
    until("a decision", || {
        let decisions = agent.get("/v1/decisions");
        (!decisions["decisions"].as_array()?.is_empty()).then_some(())
    });
    for (path, list) in [
        ("/v1/status", Some("peers")),
        ("/v1/connections", Some("connections")),
        ("/v1/peers", Some("peers")),
        ("/v1/plan", None),
        ("/v1/decisions", Some("decisions")),
    ] {
        let answer = agent.get(path);
        let schema = &document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"];
        let resolved = |schema: &Value| match schema["$ref"].as_str() {
            Some(name) => document["components"]["schemas"][name.trim_start_matches("#/components/schemas/")].clone(),
            None => schema.clone(),
        };
        let schema = resolved(schema);
        assert_eq!(names(&schema["properties"]), names(&answer), "{path}");
        if let Some(list) = list {
            let item = resolved(&schema["properties"][list]["items"]);
            assert_eq!(names(&item["properties"]), names(&answer[list][0]), "{path}: {list}");
        }
    }
    drop(client);
}

#[test]
fn who_has_a_certificate_of_that_ca_but_is_no_peer_reads_nothing() {
    let authority = Authority::new();
    let (a, b) = (Node::new("a", 1), Node::new("b", 2));
    authority.sign("a", "127.0.0.1", 2040);
    // As any kubelet of the cluster has one.
    authority.sign("kubelet", "worker-7.example.test", 2040);
    let of_a = a.start(&a.peered(&authority, "a", &[&b]));
    let of_b = b.start(&b.peered(&authority, "kubelet", &[&a]));
    of_b.says_of("a", "for none of this agent's peers (127.0.0.2)");
    // Strangers without a certificate: each is counted, few are said.
    for _ in 0..20 {
        let mut stranger = TcpStream::connect((a.host, a.peer_port)).expect("the port is open");
        stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("it reads");
    }
    until("20 refusals", || {
        let refused = of_a.metric("rebalancer_peer_handshakes_refused_total")?;
        (refused >= 20.0).then_some(())
    });
    let lines = of_a.said("refused on the peers' port");
    assert!((1..20).contains(&lines), "{lines} lines");
    // One that says nothing holds up nobody.
    let _silent: Vec<_> = (0..8)
        .map(|_| TcpStream::connect((a.host, a.peer_port)).expect("open"))
        .collect();
    drop(of_b);
    authority.sign("b", "127.0.0.2", 2040);
    let of_b = b.start(&b.peered(&authority, "b", &[&a]));
    of_b.understands("a");
}

#[test]
fn renewed_certificates_are_used_without_a_restart() {
    const EXPIRY: &str = "rebalancer_peer_certificate_expiry_timestamp_seconds";
    let authority = Authority::new();
    let (a, b) = (Node::new("a", 1), Node::new("b", 2));
    authority.sign("a", "127.0.0.1", 2040);
    // It answers under a name that is not its own: nobody believes it.
    authority.sign("b", "192.0.2.9", 2040);
    let of_a = a.start(&a.peered(&authority, "a", &[&b]));
    let of_b = b.start(&b.peered(&authority, "b", &[&a]));
    of_a.says_of("b", "not valid for name");
    let year = |year| time::Date::from_calendar_date(year, time::Month::January, 1).expect("a date");
    let unix = |date: time::Date| date.midnight().assume_utc().unix_timestamp() as f64;
    until("a first expiry", || {
        of_b.metric(EXPIRY).filter(|expiry| *expiry == unix(year(2040)))
    });
    authority.sign("b", "127.0.0.2", 2041);
    until("another expiry", || {
        of_b.metric(EXPIRY).filter(|expiry| *expiry == unix(year(2041)))
    });
    of_a.understands("b");
    of_b.understands("a");
    // What cannot be used is said, and changes nothing.
    fs::write(authority.path("b.crt"), "this is no PEM").expect("a file");
    until("a word on it", || (of_b.said("those in use stay") > 0).then_some(()));
    of_a.understands("b");
}

#[test]
fn a_full_disk_leaves_whole_lines_and_a_running_agent() {
    let node = Node::new("a", 1);
    let path = node.path("decisions.jsonl");
    // A file that may not grow above 16 KiB is a disk that is full in the middle of a line.
    let mut program = Command::new("prlimit");
    program.args(["--fsize=16384", env!("CARGO_BIN_EXE_rebalancer")]);
    // The process's own log would be too large as well.
    program.env("REBALANCER_LOG", "error");
    let agent = node.start_by(program, &[format!("--decision-log={}", path.display())]);
    until("a full disk", || {
        (agent.said("cannot append to the decision log") > 0).then_some(())
    });
    let full = fs::read_to_string(&path).expect("a file");
    assert_eq!(full.len(), 16_384, "a part of a line was written");
    let newest = || {
        let decisions = agent.get("/v1/decisions?limit=1");
        decisions["decisions"][0]["id"].as_u64().expect("a decision")
    };
    let then = newest();
    until("more decisions", || (newest() > then + 3).then_some(()));
    // Somebody makes room, as logrotate does.
    fs::rename(&path, node.path("decisions.jsonl.1")).expect("a file");
    let written = until("lines in a new file", || {
        let text = fs::read_to_string(&path).ok()?;
        (text.lines().count() > 5).then_some(text)
    });
    let whole = |line: &str| serde_json::from_str::<Value>(line).ok()?["id"].as_u64();
    let (lines, last) = full.rsplit_once('\n').expect("lines");
    let before: Vec<u64> = lines.lines().map(|line| whole(line).expect("a whole line")).collect();
    let after: Vec<u64> = written
        .lines()
        .take(5)
        .map(|line| whole(line).expect("a whole line"))
        .collect();
    assert_eq!(whole(last), None, "the line that was cut is in the new file, whole");
    assert_eq!(after[0], before.last().expect("a line") + 1, "none is missing");
    assert!(after.is_sorted() && before.is_sorted());
}

#[test]
fn decisions_come_as_they_are_made() {
    let node = Node::new("a", 1);
    let agent = node.start(&[]);
    let mut stream = UnixStream::connect(&agent.socket).expect("a socket");
    write!(stream, "GET /v1/decisions/stream HTTP/1.0\r\n\r\n").expect("it reads");
    let mut text = String::new();
    let mut octets = [0; 4096];
    while text.matches("\n\n").count() < 3 {
        let read = stream.read(&mut octets).expect("an event");
        assert!(read > 0, "the stream ended: {text}");
        text.push_str(&String::from_utf8_lossy(&octets[..read]));
    }
    assert!(text.contains("text/event-stream"), "{text}");
    let (_, body) = text.split_once("\r\n\r\n").expect("a head");
    let events: Vec<Value> = body
        .split("\n\n")
        .take(2)
        .map(|event| {
            let data = event
                .lines()
                .find_map(|line| line.strip_prefix("data: "))
                .expect("data");
            serde_json::from_str(data).expect("a decision")
        })
        .collect();
    let id = |event: &Value| event["id"].as_u64().expect("an id");
    assert_eq!(id(&events[0]) + 1, id(&events[1]), "none is left out: {body}");
}

#[test]
fn a_pause_and_the_decisions_numbers_outlive_an_agent_that_is_killed() {
    let node = Node::new("a", 1);
    let mut agent = node.start(&[]);
    let newest = |agent: &Agent| {
        until("a decision", || {
            let decisions = agent.get("/v1/decisions?limit=1");
            decisions["decisions"][0]["id"].as_u64()
        })
    };
    let answer = agent.ask("POST", "/v1/pause", "{\"reason\":\"by hand\",\"for_s\":7200}");
    assert_eq!(answer["kept"], true, "it is on the disk when it is answered: {answer}");
    let mut last = newest(&agent);
    for _ in 0..2 {
        drop(agent);
        agent = node.start(&[]);
        let status = agent.get("/v1/status");
        assert_eq!(status["paused"], true, "{status}");
        assert_eq!(status["pause"]["reason"], "by hand");
        let left = status["pause"]["left_s"].as_u64().expect("seconds");
        assert!((1..=7_200).contains(&left), "{left}");
        let now = newest(&agent);
        assert!(now > last, "numbers are given once: {now} after {last}");
        last = now;
        assert_eq!(agent.metric("rebalancer_paused"), Some(1.0));
    }
    agent.ask("POST", "/v1/resume", "");
    drop(agent);
    let agent = node.start(&[]);
    assert_eq!(agent.get("/v1/status")["paused"], false);
    for (body, part) in [
        ("{\"for_s\":0}", "for_s is 0"),
        ("{\"for_s\":1e9}", "at most"),
        ("{\"for\":\"2h\"}", "for_s"),
    ] {
        let answer = agent.ask("POST", "/v1/pause", body);
        assert_eq!(answer["status"], 400, "{body}: {answer}");
        assert!(
            answer["detail"].as_str().expect("a detail").contains(part),
            "{body}: {answer}"
        );
    }
    // One that ends by itself.
    agent.ask("POST", "/v1/pause", "{\"for_s\":0.5}");
    until("the end of a pause", || {
        (agent.get("/v1/status")["paused"] == false).then_some(())
    });
    drop(agent);
    // What is damaged is told of, and stops nobody.
    fs::write(node.path("agent.state"), "{\"version\":1,").expect("a file");
    let agent = node.start(&[]);
    assert_eq!(agent.said("the state file is ignored"), 1);
    assert_eq!(agent.get("/v1/status")["paused"], false);
}

#[test]
fn orders_that_cannot_be_carried_out_say_why() {
    let node = Node::new("a", 1);
    let agent = node.start(&[]);
    for (body, status, part) in [
        ("{}", 400, "say who"),
        ("{\"count\":1,\"usr\":\"x\"}", 422, "usr"),
        ("{\"cidr\":\"10.0.0.0/99\"}", 400, "10.0.0.0/99"),
        ("{\"count\":1,\"over_s\":-1}", 400, "over_s"),
        ("{\"idle\":true}", 400, "--shim relay"),
        ("{\"user\":\"nobody\"}", 404, "no active connection"),
    ] {
        let answer = agent.ask("POST", "/v1/goaway", body);
        assert_eq!(answer["status"], status, "{body}: {answer}");
        assert!(
            answer["detail"].as_str().expect("a detail").contains(part),
            "{body}: {answer}"
        );
    }
    let answer = agent.ask("POST", "/v1/approve/7", "");
    assert_eq!(answer["status"], 404, "{answer}");
}
