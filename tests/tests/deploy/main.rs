//! What is installed: judged by systemd, Prometheus, Helm and kubeconform, and run with what a unit or a pod leaves it.

mod chart;
mod docs;
mod kubeadm;
mod mixin;
mod picture;

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixDatagram,
    path::Path,
    process::Command,
    time::Duration,
};

use rebalancer_tests::{
    binary, kube,
    pki::Pki,
    process::{Process, log_directory, wait_for},
    skip,
};
use serde_json::Value;

/// Whether a program is there, else a counted skip.
fn has(program: &str) -> bool {
    let is_there = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|output| output.status.success());
    if !is_there {
        skip(&format!("there is no {program}"));
    }
    is_there
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// The units of a topology in a directory; their program is the one under test, which need not be installed.
fn units(directory: &Path) {
    succeeds(
        Command::new(binary())
            .args(["manifest", "systemd", "--directory"])
            .arg(directory),
    );
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let text = fs::read_to_string(entry.path()).expect("a unit");
        let here = binary().display().to_string();
        fs::write(entry.path(), text.replace("/usr/bin/rebalancer", &here)).expect("a unit");
    }
}

#[test]
fn systemd_takes_the_units_and_calls_them_confined() {
    if !has("systemd-analyze") {
        return;
    }
    let directory = log_directory("units").expect("a directory");
    units(&directory);
    // In tenths, as `--threshold` takes them: how exposed a service is, from 0 to 10.
    for (name, most) in [("rebalancer-agent.service", 20), ("rebalancer-relay@.service", 30)] {
        let unit = directory.join(name);
        let said = succeeds(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit));
        assert_eq!(said.trim(), "", "{name}");
        succeeds(
            Command::new("systemd-analyze")
                .args([
                    "security",
                    "--no-pager",
                    "--offline=true",
                    &format!("--threshold={most}"),
                ])
                .arg(&unit),
        );
    }
    fs::remove_dir_all(directory).expect("it is there");
}

/// A process of the program that has these capabilities at most, no more privileges ever, and sees of /proc what
/// `ProcSubset=pid` and `ProtectProc=invisible` leave.
fn confined(capabilities: &str) -> Command {
    let bounds = if capabilities.is_empty() {
        "-all".to_owned()
    } else {
        format!("-all,{capabilities}")
    };
    let script = format!(
        "mount -t proc -o subset=pid,hidepid=invisible proc /proc && exec setpriv --no-new-privs --bounding-set={bounds} \
         --inh-caps={bounds} \"$0\" \"$@\""
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(binary());
    command
}

/// What `system-info` finds in such a process.
fn features(capabilities: &str) -> Value {
    let output = confined(capabilities)
        .args(["system-info", "--output", "json"])
        .output()
        .expect("unshare starts");
    assert!(
        output.status.success(),
        "{capabilities}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The capabilities of the agent's unit.
const OF_UNIT: &str = "+bpf,+net_admin,+perfmon";

#[test]
fn the_agent_counts_with_just_the_capabilities_of_its_unit_and_not_with_fewer() {
    if !has("unshare") || !has("setpriv") {
        return;
    }
    let works = |found: &Value, feature: &str| found[feature]["ok"] == true;
    if !works(&features("+bpf,+perfmon,+net_admin,+sys_admin"), "source-ebpf") {
        skip("this kernel takes no programs");
        return;
    }
    let found = features(OF_UNIT);
    for feature in ["source-ebpf", "client-hellos", "source-sockdiag", "intercept"] {
        assert!(works(&found, feature), "{feature}: {found:#}");
    }
    for (fewer, lost) in [
        ("+net_admin,+perfmon", "source-ebpf"),
        ("+bpf,+net_admin", "source-ebpf"),
        ("+bpf,+perfmon", "intercept"),
    ] {
        let found = features(fewer);
        assert!(!works(&found, lost), "{lost} with {fewer}: {found:#}");
        let why = found[lost]["why"].as_str().expect("a reason");
        assert!(why.contains("CAP_"), "{lost} with {fewer}: {why}");
    }
    // The socket list wants one only.
    assert!(works(&features("+net_admin"), "source-sockdiag"));
}

#[test]
fn an_agent_that_finds_its_peers_by_leases_starts_with_what_its_unit_leaves_it() {
    if !has("unshare") || !has("setpriv") {
        return;
    }
    let directory = log_directory("confined").expect("a directory");
    let pki = Pki::new(&[]).expect("certificates");
    // Nobody is there: what it asks of the cluster is not this test's.
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let kubeconfig = kube::kubeconfig(&pki, "node-1", nowhere).expect("a kubeconfig");
    let socket = directory.join("agent.sock");
    // A port that is free now: its number goes into a Lease, so the agent takes none that the kernel chooses.
    let free = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port");
    let mut command = confined(OF_UNIT);
    command
        .args([
            "agent",
            "--source=sockdiag",
            "--apiserver-port=1",
            "--metrics=127.0.0.1:0",
            "--peers=kubernetes",
        ])
        .args(["--peer-advertise=192.0.2.1"])
        .arg(format!("--peer-listen={free}"))
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .arg(format!("--api=unix:{}", socket.display()));
    let mut agent = Process::start("agent", command, None, &directory).expect("it starts");
    let name = Command::new("uname").arg("-n").output().expect("uname");
    let name = format!("rebalancer-{}", String::from_utf8_lossy(&name.stdout).trim());
    // The socket is there before the agent says who it is.
    let is_said = wait_for(Duration::from_secs(60), || {
        let is_said = socket.exists() && agent.log().contains(&name);
        (is_said || agent.is_running().is_err()).then_some(is_said)
    });
    assert_eq!(
        is_said,
        Some(true),
        "no Lease named by the host, {name}: {}",
        agent.log()
    );
    agent.is_running().expect("it runs on");
    fs::remove_dir_all(directory).expect("it is there");
}

#[test]
fn what_contradicts_itself_is_refused_in_a_sentence() {
    for (arguments, expected) in [
        (&["daemonset", "--agent-flag=--peer=a=https://h:1"][..], "--peer"),
        (&["static-pod", "--agent-flag=--no-such-flag"], "--no-such-flag"),
        (
            &[
                "static-pod",
                "--agent-flag=--shim=none",
                "--relay-flag=--listen=[::1]:1",
            ],
            "--relay-flag",
        ),
        (
            &["static-pod", "--relay-flag=--tls-cert=server.crt"],
            "--tls-cert server.crt",
        ),
        (&["static-pod", "--topology=elsewhere"], "kubeadm"),
        (
            &["daemonset", "--relay-flag=--metrics=127.0.0.1:9470"],
            "both port 9470",
        ),
        (
            &["systemd", "--relay-flag=--control=unix:/run/r/o.sock"],
            "/run/r/o.sock",
        ),
        (&["static-pod", "--agent-flag=--intercept=false"], "no --intercept"),
        (&["static-pod", "--agent-flag=--cgroup-root=/mnt"], "--cgroup-root"),
        (&["systemd", "--directory=/no/such/directory"], "/no/such/directory"),
    ] {
        let output = Command::new(binary())
            .arg("manifest")
            .args(arguments)
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains(expected),
            "{arguments:?}: {said}"
        );
        assert_eq!(output.stdout, b"", "{arguments:?}");
    }
}

#[test]
fn the_service_manager_hears_that_the_agent_is_ready_alive_and_ending() {
    let directory = log_directory("notify").expect("a directory");
    let socket = directory.join("notify");
    let heard = UnixDatagram::bind(&socket).expect("a socket");
    heard
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a time limit");
    let mut command = Command::new(binary());
    command
        .args([
            "agent",
            "--source=sockdiag",
            "--apiserver-port=1",
            "--metrics=127.0.0.1:0",
        ])
        .arg(format!("--api=unix:{}", directory.join("agent.sock").display()))
        .env("NOTIFY_SOCKET", &socket)
        .env("WATCHDOG_USEC", "30000000");
    let mut agent = Process::start("agent", command, None, &directory).expect("it starts");
    let hears = |expected: &str| {
        let mut octets = [0; 256];
        loop {
            let length = heard
                .recv(&mut octets)
                .unwrap_or_else(|error| panic!("no {expected}: {error}"));
            let said = String::from_utf8_lossy(&octets[..length]).trim().to_owned();
            if said == expected {
                return;
            }
            assert!(["READY=1", "WATCHDOG=1"].contains(&said.as_str()), "{said}");
        }
    };
    hears("READY=1");
    hears("WATCHDOG=1");
    hears("WATCHDOG=1");
    agent.signal(libc::SIGTERM);
    hears("STOPPING=1");
    assert!(
        agent
            .terminate(Duration::from_secs(60))
            .is_some_and(|status| status.success())
    );
    fs::remove_dir_all(directory).expect("it is there");
}

/// What the doctor says and ends with.
fn doctor(directory: &Path, more: &[&str]) -> (Option<i32>, Value) {
    let socket = |name: &str| format!("unix:{}", directory.join(name).display());
    let output = Command::new(binary())
        .args(["doctor", "--output=json", "--apiserver-port=1"])
        .arg(format!("--api={}", socket("agent.sock")))
        .arg(format!("--control={}", socket("relay.sock")))
        .args(more)
        .output()
        .expect("it starts");
    let said = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), said)
}

/// The finding of a name.
fn finding<'a>(said: &'a Value, what: &str) -> &'a Value {
    let mut findings = said["findings"].as_array().expect("findings").iter();
    findings
        .find(|finding| finding["what"].as_str().is_some_and(|name| name.starts_with(what)))
        .unwrap_or_else(|| panic!("no {what}: {said:#}"))
}

#[test]
fn the_doctor_says_what_to_do_before_and_after_the_agent_runs() {
    let directory = log_directory("doctor").expect("a directory");
    let none = directory.join("none.crt").display().to_string();
    let (code, said) = doctor(&directory, &["--certificate", &none]);
    assert_eq!(code, Some(1), "{said:#}");
    for what in ["agent", "certificate"] {
        let found = finding(&said, what);
        assert!(found["gravity"] == "wrong" && found["fix"].is_string(), "{found:#}");
    }

    let mut command = Command::new(binary());
    command
        .args([
            "agent",
            "--source=sockdiag",
            "--dry-run",
            "--apiserver-port=1",
            "--metrics=127.0.0.1:0",
        ])
        .arg(format!("--api=unix:{}", directory.join("agent.sock").display()));
    let _agent = Process::start("agent", command, None, &directory).expect("it starts");
    wait_for(Duration::from_secs(60), || {
        directory.join("agent.sock").exists().then_some(())
    })
    .expect("its socket");
    let bundle = directory.join("bundle.json");
    let (_, said) = doctor(&directory, &["--bundle", &bundle.display().to_string()]);
    assert_eq!(finding(&said, "agent")["gravity"], "good", "{said:#}");
    assert_eq!(finding(&said, "dry run")["gravity"], "note");
    let bundle: Value = serde_json::from_slice(&fs::read(&bundle).expect("a bundle")).expect("JSON");
    assert_eq!(bundle["status"]["Ok"]["mode"], "dry-run", "{bundle:#}");
    fs::remove_dir_all(directory).expect("it is there");
}
