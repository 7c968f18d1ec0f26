use clap::{Arg, Command};
use serde_json::Value;

use super::*;

/// As the parts' parsers are, with a flag of each kind.
fn parser() -> Command {
    let flag = |name: &'static str, value: &'static str| Arg::new(name).long(name).value_name(value);
    Command::new("")
        .arg(flag("shim", "SHIM"))
        .arg(flag("api", "unix:PATH"))
        .arg(flag("tls-cert", "FILE"))
        .arg(flag("state", "FILE"))
        .arg(flag("config", "FILE"))
        .arg(flag("peer", "NAME=URL"))
        .arg(flag("source", "SOURCE"))
        .arg(flag("metrics", "ADDRESS"))
        .arg(flag("listen", "ADDRESS"))
        .arg(flag("upstream", "ADDRESS"))
        .arg(flag("control", "unix:PATH"))
        .arg(flag("peer-listen", "ADDRESS"))
        .arg(flag("cgroup-root", "PATH"))
        .arg(flag("intercept", "BOOL").num_args(0..=1).default_missing_value("true"))
        .arg(flag("tls-sni-cert-key", "CERT,KEY[:NAME,...]"))
}

fn flags(part: Part, line: &str) -> Result<Flags, ManifestError> {
    Flags::parse(part, parser(), line.split_whitespace().map(str::to_owned).collect())
}

fn mounts(line: &str) -> Vec<(String, bool)> {
    let flags = flags(Part::Relay, line).expect("good flags");
    let shown = |mount: &Mount| (mount.path.to_string_lossy().into_owned(), mount.written);
    flags.mounts().iter().map(shown).collect()
}

#[test]
fn what_is_mounted_follows_from_the_flags() {
    let run = ("/run/rebalancer".to_owned(), true);
    assert_eq!(mounts(""), std::slice::from_ref(&run));
    assert_eq!(
        mounts("--tls-cert=/pki/a.crt --tls-sni-cert-key /sni/b.crt,/keys/b.key:x.example --state /var/lib/r/state"),
        [
            run.clone(),
            ("/pki".to_owned(), false),
            ("/var/lib/r".to_owned(), true),
            ("/sni".to_owned(), false),
            ("/keys".to_owned(), false),
        ]
    );
    // What is written in a directory makes all of it writable, in whatever order they are named.
    for line in ["--tls-cert /d/a --state /d/b", "--state /d/b --tls-cert /d/a"] {
        assert_eq!(mounts(line), [run.clone(), ("/d".to_owned(), true)]);
    }
    assert_eq!(mounts("--shim relay:unix:/run/other/relay.sock").len(), 2);
}

#[test]
fn what_cannot_be_mounted_is_refused_by_name() {
    let why = |line: &str| flags(Part::Agent, line).expect_err("refused").to_string();
    assert!(why("--tls-cert a.crt").contains("--tls-cert a.crt"));
    assert!(why("--tls-cert /a.crt").contains("--tls-cert /a.crt"));
    assert!(why("--tls-cert /pki/../etc/shadow").contains("absolute path"));
    assert!(why("--config /etc/rebalancer/agent.yaml").contains("--config"));
    let unknown = why("--no-such-flag");
    assert!(unknown.contains("agent") && unknown.contains("--no-such-flag") && !unknown.contains("Usage"));
}

#[test]
fn capabilities_are_those_that_the_flags_need() {
    let of = |part, line| flags(part, line).expect("good flags").capabilities();
    assert_eq!(of(Part::Relay, ""), Vec::<&str>::new());
    assert_eq!(of(Part::Agent, ""), ["BPF", "NET_ADMIN", "PERFMON"]);
    assert_eq!(of(Part::Agent, "--source sockdiag"), ["NET_ADMIN"]);
    assert_eq!(
        of(Part::Agent, "--shim steer:auto"),
        ["BPF", "NET_ADMIN", "PERFMON", "SYS_PTRACE"]
    );
}

fn pods(agent: &str, relay: Option<&str>) -> Pods {
    Pods {
        image: "registry.example/rebalancer:1".to_owned(),
        namespace: "rebalancer".to_owned(),
        agent: flags(Part::Agent, agent).expect("good flags"),
        relay: relay.map(|relay| flags(Part::Relay, relay).expect("good flags")),
    }
}

fn documents(text: &str) -> Vec<Value> {
    let documents = text.split("\n---\n").filter(|part| !part.trim().is_empty());
    documents
        .map(|text| serde_yaml_ng::from_str(text).expect("YAML"))
        .collect()
}

#[test]
fn every_container_mounts_what_the_pod_has() {
    let text = static_pod(&pods(
        "--shim relay:unix:/run/rebalancer/relay.sock",
        Some("--tls-cert /etc/kubernetes/pki/a.crt --metrics 127.0.0.1:9471"),
    ))
    .expect("a pod");
    let pod = &documents(&text)[0];
    let names = |list: &Value, key: &str| -> Vec<String> {
        let list = list.as_array().expect("a list");
        list.iter()
            .map(|item| item[key].as_str().expect("a name").to_owned())
            .collect()
    };
    let volumes = names(&pod["spec"]["volumes"], "name");
    assert_eq!(volumes, ["run-rebalancer", "sys-fs-cgroup", "etc-kubernetes-pki"]);
    for container in pod["spec"]["containers"].as_array().expect("containers") {
        for name in names(&container["volumeMounts"], "name") {
            assert!(volumes.contains(&name), "{name}");
        }
        assert_eq!(container["securityContext"]["capabilities"]["drop"][0], "ALL");
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    }
    let relay = &pod["spec"]["containers"][1];
    assert_eq!(relay["livenessProbe"]["httpGet"]["port"], 9471);
    assert_eq!(
        relay["readinessProbe"],
        Value::Null,
        "a relay without an apiserver closes its port itself"
    );
    assert_eq!(relay["securityContext"]["capabilities"]["add"], Value::Null);
    // The certificates' directory is read by the relay alone.
    assert_eq!(names(&pod["spec"]["containers"][0]["volumeMounts"], "name").len(), 2);
}

#[test]
fn a_pod_sees_the_hosts_processes_only_to_steer() {
    let host_pid =
        |agent: &str| documents(&static_pod(&pods(agent, None)).expect("a pod"))[0]["spec"]["hostPID"].clone();
    assert_eq!(host_pid("--shim steer:auto"), true);
    assert_eq!(host_pid(""), Value::Null);
}

#[test]
fn a_daemonset_has_no_flag_of_one_node() {
    let error = daemonset(&pods("--peer cp-2=https://10.0.0.2:9443", None)).expect_err("refused");
    assert!(error.to_string().contains("--peer"));
    let text = daemonset(&pods("", Some(""))).expect("a DaemonSet");
    let kinds: Vec<_> = documents(&text)
        .iter()
        .map(|document| document["kind"].clone())
        .collect();
    assert_eq!(
        kinds,
        [
            "Namespace",
            "ServiceAccount",
            "Role",
            "RoleBinding",
            "Role",
            "RoleBinding",
            "Role",
            "RoleBinding",
            "RoleBinding",
            "ClusterRole",
            "ClusterRoleBinding",
            "DaemonSet"
        ]
    );
    let of_others = pods("", None);
    let error = daemonset(&Pods {
        namespace: "kube-system".to_owned(),
        ..of_others
    });
    assert!(error.expect_err("refused").to_string().contains("--namespace"));
}

#[test]
fn words_reach_the_process_as_they_were_given() {
    let agent = Flags::parse(
        Part::Agent,
        parser(),
        vec!["--api=unix:/run/r/50%\"$x y.sock".to_owned()],
    )
    .expect("good flags");
    let unit = &units(&agent, None)[0].text;
    assert!(
        unit.contains("ExecStart=/usr/bin/rebalancer agent \"--api=unix:/run/r/50%%\\\"$$x y.sock\"\n"),
        "{unit}"
    );
    let text = static_pod(&Pods {
        agent,
        ..pods("", None)
    })
    .expect("a pod");
    assert_eq!(
        documents(&text)[0]["spec"]["containers"][0]["args"][1],
        "--api=unix:/run/r/50%\"$x y.sock"
    );
}

#[test]
fn what_is_good_by_itself_and_not_together_is_refused_by_both_names() {
    let shim = "--shim relay:unix:/run/rebalancer/relay.sock";
    let intercepts = format!("{shim} --intercept");
    for (agent, relay, expected) in [
        (
            &*intercepts,
            Some("--listen 127.0.0.1:6445 --upstream 127.0.0.1:6443"),
            None,
        ),
        (shim, Some("--listen [::]:6443 --upstream 127.0.0.1:6444"), None),
        (shim, Some("--listen 127.0.0.1:6445"), Some("no --intercept")),
        (
            "--shim relay:unix:/run/r/other.sock",
            Some("--listen [::]:1"),
            Some("/run/r/other.sock"),
        ),
        (
            shim,
            Some("--listen [::]:6443 --upstream 127.0.0.1:6443"),
            Some("talk to itself"),
        ),
        (
            shim,
            Some("--listen [::]:6443 --metrics 127.0.0.1:9470"),
            Some("both port 9470"),
        ),
        (
            shim,
            Some("--listen [::]:9470"),
            Some("the agent's --metrics and the relay's --listen"),
        ),
        (
            "--peer a=https://h:1 --peer-listen [::]:9470",
            None,
            Some("both port 9470"),
        ),
        ("--metrics 127.0.0.1:9443", None, None),
        (
            "--metrics 127.0.0.1:9443 --peer a=https://h:1",
            None,
            Some("both port 9443"),
        ),
    ] {
        let agent = flags(Part::Agent, agent).expect("good flags");
        let relay = relay.map(|relay| flags(Part::Relay, relay).expect("good flags"));
        let said = check(&agent, relay.as_ref()).map_err(|error| error.to_string());
        match expected {
            None => assert_eq!(said, Ok(())),
            Some(part) => assert!(said.as_ref().is_err_and(|said| said.contains(part)), "{part}: {said:?}"),
        }
    }
    let elsewhere = static_pod(&pods("--cgroup-root /mnt/cgroup2", None));
    assert!(elsewhere.expect_err("refused").to_string().contains("--cgroup-root"));
    static_pod(&pods("--cgroup-root /sys/fs/cgroup/unified", None)).expect("it is there");
}

#[test]
fn two_directories_have_two_names_and_one_has_one() {
    let names = |agent: &str, relay: &str| -> Vec<String> {
        let pod = static_pod(&pods(agent, Some(relay))).expect("a pod");
        let documents = documents(&pod);
        let volumes = documents[0]["spec"]["volumes"].as_array().expect("volumes");
        let names: Vec<String> = volumes
            .iter()
            .map(|volume| volume["name"].as_str().expect("a name").to_owned())
            .collect();
        for container in documents[0]["spec"]["containers"].as_array().expect("containers") {
            for mount in container["volumeMounts"].as_array().expect("mounts") {
                assert!(names.iter().any(|name| mount["name"] == name.as_str()), "{mount}");
            }
        }
        names
    };
    let mut found = names("--state /a/b-c/s", "--tls-cert /a-b/c/t");
    assert_eq!(found.len(), 4);
    found.sort();
    found.dedup();
    assert_eq!(found.len(), 4, "{found:?}");
    assert_eq!(
        names("--state /d//e/s", "--tls-cert /d/e/t"),
        ["run-rebalancer", "d-e", "sys-fs-cgroup"]
    );
    let long = format!("--state /{}/s", "x".repeat(80));
    assert!(names(&long, "").iter().all(|name| name.len() <= 63));
}
