//! What an operator gets wrong at a start: exit code 2, and one message that names what, where and what to do; and what the
//! machine may have in a moment, such as a port: exit code 1, so that systemd starts it again.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// A directory with what a relay and an agent need, all of it good.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut authority = rcgen::CertificateParams::new(vec![]).expect("parameters");
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().expect("a key");
        let authority_pem = authority.self_signed(&key).expect("a certificate").pem();
        let issuer = rcgen::Issuer::new(authority, key);
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).expect("a file");
        write("ca.crt", &authority_pem);
        for name in ["good", "other"] {
            let key = rcgen::KeyPair::generate().expect("a key");
            let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("parameters");
            let certificate = parameters.signed_by(&key, &issuer).expect("a certificate");
            write(&format!("{name}.crt"), &certificate.pem());
            write(&format!("{name}.key"), &key.serialize_pem());
        }
        write("garbage", "this is no PEM\n");
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, text: &str) -> String {
        let path = self.path("config.yaml");
        fs::write(&path, format!("version: 1\nnode-name: a\n{text}\n")).expect("a file");
        format!("--config={}", path.display())
    }

    fn agent(&self) -> Vec<String> {
        [
            "agent",
            "--node-name=a",
            "--source=sockdiag",
            "--metrics=127.0.0.1:0",
            &format!("--api=unix:{}", self.path("agent.sock").display()),
        ]
        .map(str::to_owned)
        .into()
    }

    fn peered(&self) -> Vec<String> {
        let mut flags = self.agent();
        flags.extend([
            "--peer=b=https://127.0.0.1:1".to_owned(),
            "--peer-listen=127.0.0.1:0".to_owned(),
            format!("--peer-cert={}", self.path("good.crt").display()),
            format!("--peer-key={}", self.path("good.key").display()),
            format!("--peer-ca={}", self.path("ca.crt").display()),
        ]);
        flags
    }

    fn relay(&self) -> Vec<String> {
        let mut flags: Vec<String> = ["relay", "--listen=127.0.0.1:0", "--upstream=127.0.0.1:1"]
            .map(str::to_owned)
            .into();
        for (flag, file) in [
            ("upstream-ca", "ca.crt"),
            ("client-ca", "ca.crt"),
            ("tls-cert", "good.crt"),
            ("tls-key", "good.key"),
            ("proxy-client-cert", "good.crt"),
            ("proxy-client-key", "good.key"),
        ] {
            flags.push(format!("--{flag}={}", self.path(file).display()));
        }
        flags.push(format!("--control=unix:{}", self.path("relay.sock").display()));
        flags
    }
}

/// The flags, with some of them given again: the last one wins nothing, so they are replaced.
fn with(mut flags: Vec<String>, changes: &[String]) -> Vec<String> {
    for change in changes {
        let name = change.split('=').next().expect("a flag");
        flags.retain(|flag| flag.split('=').next() != Some(name));
        flags.push(change.clone());
    }
    flags
}

fn run(program: &mut Command, flags: &[String]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = program.args(flags).output().expect("the binary starts");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

fn check(flags: &[String], parts: &[&str]) {
    ends(2, flags, parts);
}

/// What may be there in a moment, such as a port that another process still has: it is started again.
fn check_passing(flags: &[String], parts: &[&str]) {
    ends(1, flags, parts);
}

fn ends(expected: i32, flags: &[String], parts: &[&str]) {
    let (code, said) = run(&mut Command::new(env!("CARGO_BIN_EXE_rebalancer")), flags);
    assert_eq!(code, Some(expected), "{flags:?} said: {said}");
    for part in parts {
        assert!(said.contains(part), "{flags:?} does not name `{part}`: {said}");
    }
}

fn flag(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

#[test]
fn an_agents_configuration() {
    let files = Files::new();
    let agent = || files.agent();
    check(
        &with(agent(), &[files.config("skew-treshold: 0.2")]),
        &["config.yaml", "skew-treshold", "skew-threshold"],
    );
    check(&with(agent(), &[files.config("peers: []")]), &["config.yaml", "peers"]);
    check(
        &with(agent(), &[flag("--config", &files.path("nowhere.yaml"))]),
        &["--config", "nowhere.yaml", "No such file"],
    );
    let shares = |threshold: &str, target: &str| {
        let changes = [
            format!("--skew-threshold={threshold}"),
            format!("--skew-target={target}"),
        ];
        with(files.agent(), &changes)
    };
    check(&shares("20", "0.1"), &["--skew-threshold is 20", "above 0, at most 10"]);
    check(&shares("0.1", "0.2"), &["--skew-target 0.2", "--skew-threshold 0.1"]);
    check(
        &with(agent(), &["--goaway-share=0".to_owned()]),
        &["--goaway-share is 0", "above 0, at most 1"],
    );
    check(
        &with(agent(), &["--apiserver-port=70000".to_owned()]),
        &["70000", "--apiserver-port"],
    );
    check(
        &with(agent(), &["--shim=relay".to_owned()]),
        &["--shim", "relay:unix:PATH"],
    );
    check(
        &with(agent(), &[flag("--decision-log", &files.path("no/such/directory"))]),
        &["--decision-log", "no/such/directory"],
    );
}

#[test]
fn numbers_that_would_do_harm() {
    let files = Files::new();
    for (flag, parts) in [
        ("--settle=0s", ["--settle is 0s", "1s to 1h"]),
        ("--settle=1ms", ["--settle is 1ms", "1s to 1h"]),
        ("--goaway-rate=1e-20", ["--goaway-rate", "0.01 to 10000"]),
        ("--client-cooldown=0s", ["--client-cooldown is 0s", "1s to 168h"]),
        ("--min-connection-age=25h", ["--min-connection-age", "0s to 24h"]),
        ("--interval=2h", ["--interval", "100ms to 1h"]),
        (
            "--exclude-user-agent=",
            ["--exclude-user-agent is empty", "every client"],
        ),
    ] {
        check(&with(files.agent(), &[flag.to_owned()]), &parts);
    }
}

#[test]
fn a_configuration_is_checked_without_a_start() {
    let files = Files::new();
    let checked = |changes: &[String]| {
        let mut flags = with(files.peered(), changes);
        flags.push("--check-config".to_owned());
        let mut program = Command::new(env!("CARGO_BIN_EXE_rebalancer"));
        let output = program.args(&flags).output().expect("the binary starts");
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), said)
    };
    let (code, said) = checked(&[]);
    assert_eq!(code, Some(0), "{said}");
    for part in ["the configuration is good", "node a", "peers b", "--skew-target 0.03"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!files.path("agent.sock").exists(), "nothing was started");
    let (code, said) = checked(&[flag("--peer-key", &files.path("other.key"))]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("do not belong together"), "{said}");
}

#[test]
fn what_the_environment_says_is_told_as_such() {
    let files = Files::new();
    let agent = |variables: &[(&str, &str)], more: &[&str]| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_rebalancer"));
        program.envs(variables.iter().copied());
        let mut flags = files.agent();
        flags.push("--check-config".to_owned());
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        run(&mut program, &flags)
    };
    // What Kubernetes puts into every container of a namespace with a Service `rebalancer-apiserver`.
    let service = [
        ("REBALANCER_APISERVER_PORT", "tcp://10.96.0.7:6443"),
        ("REBALANCER_APISERVER_PORT_6443_TCP", "tcp://10.96.0.7:6443"),
        ("REBALANCER_APISERVER_SERVICE_HOST", "10.96.0.7"),
    ];
    let (code, said) = agent(&service, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("REBALANCER_APISERVER_PORT is ignored"), "{said}");
    for (variable, value) in [("REBALANCER_INTERVAL", "5"), ("REBALANCER_APISERVER_PORT", "http")] {
        let (code, said) = agent(&[(variable, value)], &[]);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(&format!("{variable}={value}")), "{said}");
    }
    // A flag wins, and is what is wrong then.
    let (code, said) = agent(&[("REBALANCER_INTERVAL", "5s")], &["--interval=7"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(!said.contains("REBALANCER_INTERVAL="), "{said}");
}

#[test]
fn a_log_of_json_is_json() {
    let files = Files::new();
    let mut flags = files.agent();
    flags.extend(["--check-config", "--log-format=json", "-v"].map(str::to_owned));
    let mut program = Command::new(env!("CARGO_BIN_EXE_rebalancer"));
    program.env("REBALANCER_APISERVER_PORT", "tcp://10.96.0.7:6443");
    let (code, said) = run(&mut program, &flags);
    assert_eq!(code, Some(0), "{said}");
    let line = said
        .lines()
        .find(|line| line.contains("is ignored"))
        .expect("a line of the log");
    assert!(line.starts_with('{') && line.contains("\"level\":\"WARN\""), "{line}");
}

#[test]
fn an_agents_peers() {
    let files = Files::new();
    let changed = |changes: &[String]| with(files.peered(), changes);
    check(
        &changed(&[flag("--peer-cert", &files.path("nowhere.crt"))]),
        &["--peer-cert", "nowhere.crt"],
    );
    check(
        &changed(&[flag("--peer-cert", &files.path("garbage"))]),
        &["--peer-cert", "garbage", "certificate"],
    );
    check(
        &changed(&[flag("--peer-key", &files.path("other.key"))]),
        &["--peer-cert", "--peer-key", "do not belong together"],
    );
    check(
        &changed(&["--peer=a=https://127.0.0.1:1".to_owned()]),
        &["--peer a", "--node-name"],
    );
    check(
        &changed(&["--peer=b=http://127.0.0.1:1".to_owned()]),
        &["--peer", "NAME=https://HOST:PORT"],
    );
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    // An address that no interface has yet, as at boot (RFC 5737 keeps it free).
    for address in [address.to_string(), "192.0.2.77:9443".to_owned()] {
        for name in ["--peer-listen", "--metrics", "--lb-agent"] {
            check_passing(&changed(&[format!("{name}={address}")]), &[name, &address]);
        }
    }
}

#[test]
fn a_relays_files_and_addresses() {
    let files = Files::new();
    let changed = |changes: &[String]| with(files.relay(), changes);
    for name in ["--tls-cert", "--client-ca", "--upstream-ca", "--proxy-client-cert"] {
        check(
            &changed(&[flag(name, &files.path("nowhere.crt"))]),
            &[name, "nowhere.crt"],
        );
        check(&changed(&[flag(name, &files.path("garbage"))]), &[name, "garbage"]);
    }
    check(
        &changed(&[flag("--tls-key", &files.path("other.key"))]),
        &["--tls-cert", "--tls-key"],
    );
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    check_passing(
        &changed(&[format!("--listen={address}")]),
        &["--listen", &address.to_string(), "another process listens there"],
    );
    check_passing(
        &changed(&["--listen=192.0.2.77:6443".to_owned()]),
        &["--listen", "192.0.2.77:6443"],
    );
    check(&changed(&["--idle-timeout=5".to_owned()]), &["--idle-timeout", "30s"]);
}

#[test]
fn an_agent_without_capabilities_names_those_it_needs() {
    let files = Files::new();
    let mut flags = vec![env!("CARGO_BIN_EXE_rebalancer").to_owned()];
    flags.extend(with(files.agent(), &["--source=ebpf".to_owned()]));
    // No capability is in reach of a program started so, whoever starts it.
    let mut dropped = Command::new("setpriv");
    dropped.args(["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"]);
    let (code, said) = if nobody_is_root() {
        run(&mut Command::new(env!("CARGO_BIN_EXE_rebalancer")), &flags[1..])
    } else {
        run(&mut dropped, &flags)
    };
    assert_eq!(code, Some(2), "{said}");
    // A build without kernel programs, which needs no privilege to be made, says that first.
    let expected = ["CAP_BPF", "cargo xtask build-ebpf"];
    assert!(expected.iter().any(|part| said.contains(part)), "{said}");
}

fn nobody_is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("a process may read its status");
    !status
        .lines()
        .any(|line| line.starts_with("CapEff:") && line.trim_end().ends_with("ffffff"))
}
