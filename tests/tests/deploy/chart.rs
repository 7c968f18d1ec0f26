//! The Helm chart: rendered by Helm's own packages, taken by kubeconform, and the same as what `rebalancer manifest daemonset` prints.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use rebalancer_tests::{binary, fixture, process::log_directory, skip};
use serde_json::{Value, json};

use crate::docs::root;

/// A tool; a counted skip where there is no Go to build it with.
fn tool(program: &str) -> Option<PathBuf> {
    if !fixture::has_go() {
        skip("there is no `go` on PATH to build what looks at the chart with: install Go 1.26 or later");
        return None;
    }
    Some(fixture::tool(program).unwrap_or_else(|error| panic!("{error:#}")))
}

fn chart() -> PathBuf {
    root().join("deploy/helm/rebalancer")
}

/// Everything a chart may have besides.
const ALL: [&str; 9] = [
    "namespace.create=true",
    "podMonitor.enabled=true",
    "agent.metrics=0.0.0.0:9470",
    "relay.metrics=0.0.0.0:9471",
    "prometheusRule.enabled=true",
    "dashboard.enabled=true",
    "networkPolicy.enabled=true",
    "networkPolicy.peerCIDRs={10.0.0.0/24}",
    "networkPolicy.metricsCIDRs={10.0.1.0/24}",
];

fn template(helm: &Path, namespace: &str, values: &[&str]) -> Output {
    Command::new(helm)
        .arg(chart())
        .arg(namespace)
        .args(values)
        .output()
        .expect("it starts")
}

/// What Helm makes of the values.
fn rendered(helm: &Path, values: &[&str]) -> String {
    let output = template(helm, "rebalancer", values);
    assert!(
        output.status.success(),
        "{values:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// Its objects by kind, namespace and name; lists whose order says nothing are sorted.
fn objects(text: &str) -> BTreeMap<String, Value> {
    let documents = text.split("\n---").map(|part| part.trim_start_matches("---"));
    let values = documents.map(|part| serde_yaml_ng::from_str::<Value>(part).expect("YAML"));
    let mut objects = BTreeMap::new();
    for mut object in values.filter(|value| !value.is_null()) {
        let field = |path: &str| {
            object
                .pointer(path)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let name = format!(
            "{} {}/{}",
            field("/kind"),
            field("/metadata/namespace"),
            field("/metadata/name")
        );
        let spec = object.pointer_mut("/spec/template/spec");
        if let Some(spec) = spec {
            sort(&mut spec["volumes"], 0);
            for container in spec["containers"].as_array_mut().into_iter().flatten() {
                sort(&mut container["volumeMounts"], 0);
                // The first is the subcommand.
                sort(&mut container["args"], 1);
            }
        }
        assert!(objects.insert(name.clone(), object).is_none(), "twice: {name}");
    }
    objects
}

fn sort(list: &mut Value, from: usize) {
    if let Some(list) = list.as_array_mut() {
        list[from..].sort_by_key(Value::to_string);
    }
}

#[test]
fn the_chart_is_of_this_release() {
    let text = fs::read_to_string(chart().join("Chart.yaml")).expect("a chart");
    let said: Value = serde_yaml_ng::from_str(&text).expect("YAML");
    for key in ["version", "appVersion"] {
        assert_eq!(said[key], env!("CARGO_PKG_VERSION"), "{key}");
    }
}

#[test]
fn what_may_be_there_besides_is_there_when_it_is_asked_for() {
    let Some(helm) = tool("chart") else { return };
    let besides = |values: &[&str]| -> Vec<String> {
        let objects = objects(&rendered(&helm, values));
        let kinds = [
            "PodMonitor",
            "PrometheusRule",
            "ConfigMap",
            "NetworkPolicy",
            "Namespace",
        ];
        let is_besides = |name: &&String| kinds.iter().any(|kind| name.starts_with(kind));
        objects.keys().filter(is_besides).cloned().collect()
    };
    assert_eq!(besides(&[]), Vec::<String>::new());
    assert_eq!(
        besides(&ALL),
        [
            "ConfigMap rebalancer/rebalancer-dashboard",
            "Namespace /rebalancer",
            "NetworkPolicy rebalancer/rebalancer",
            "PodMonitor rebalancer/rebalancer",
            "PrometheusRule rebalancer/rebalancer",
        ]
    );
    let all = objects(&rendered(&helm, &ALL));
    // The rules and the dashboard are the mixin's, whole.
    let rules = fs::read_to_string(root().join("deploy/mixin/rules.yaml")).expect("rules");
    let rules: Value = serde_yaml_ng::from_str(&rules).expect("YAML");
    assert_eq!(all["PrometheusRule rebalancer/rebalancer"]["spec"], rules);
    let dashboard = fs::read_to_string(root().join("deploy/mixin/dashboard.json")).expect("a dashboard");
    let map = &all["ConfigMap rebalancer/rebalancer-dashboard"]["data"]["rebalancer.json"];
    assert_eq!(*map, dashboard);
}

#[test]
fn the_chart_makes_what_the_program_prints_for_the_same_flags() {
    let Some(helm) = tool("chart") else { return };
    for (values, flags) in [
        (&[][..], &["--agent-flag=--mode=dry-run"][..]),
        (
            &["shim=steer", "mode=active"],
            &["--agent-flag=--shim=steer:auto", "--agent-flag=--mode=active"],
        ),
        (
            &["shim=none", "source=sockdiag"],
            &[
                "--agent-flag=--shim=none",
                "--agent-flag=--source=sockdiag",
                "--agent-flag=--mode=dry-run",
            ],
        ),
        (
            &[
                "mode=propose",
                "image.repository=registry.example/r",
                "image.tag=2",
                "agent.settings.skew-threshold=0.2",
                "agent.settings.state=/var/lib/Re-Balancer/agent.state",
                "agent.settings.cgroup-root=/sys/fs/cgroup/unified",
                "agent.settings.exclude-user={system:admin,system:node:a}",
                "agent.settings.exclude-user-agent={/no/file,unix:/no/socket}",
                "agent.metrics=[::]:9999",
                "relay.settings.tls-cert=/etc/other/server.crt",
                "relay.settings.tls-sni-cert-key=/sni/b.crt\\,/keys/b.key:x.example",
                "relay.settings.watch-handover=null",
                "relay.settings.max-connections=1000000",
            ],
            &[
                "--image=registry.example/r:2",
                "--agent-flag=--mode=propose",
                "--agent-flag=--skew-threshold=0.2",
                "--agent-flag=--state=/var/lib/Re-Balancer/agent.state",
                "--agent-flag=--cgroup-root=/sys/fs/cgroup/unified",
                "--agent-flag=--exclude-user=system:admin",
                "--agent-flag=--exclude-user=system:node:a",
                "--agent-flag=--exclude-user-agent=/no/file",
                "--agent-flag=--exclude-user-agent=unix:/no/socket",
                "--agent-flag=--metrics=[::]:9999",
                "--relay-flag=--tls-cert=/etc/other/server.crt",
                "--relay-flag=--tls-sni-cert-key=/sni/b.crt,/keys/b.key:x.example",
                "--relay-flag=--max-connections=1000000",
            ],
        ),
    ] {
        let printed = Command::new(binary())
            .args(["manifest", "daemonset"])
            .args(flags)
            .output()
            .expect("it starts");
        assert!(
            printed.status.success(),
            "{flags:?}: {}",
            String::from_utf8_lossy(&printed.stderr)
        );
        let mut printed = String::from_utf8(printed.stdout).expect("text");
        if values.contains(&"relay.settings.watch-handover=null") {
            // A topology's flag cannot be taken away on the command line.
            printed = printed.replace("            - \"--watch-handover=5s\"\n", "");
        }
        let mut of_program = objects(&printed);
        let mut with_namespace = vec!["namespace.create=true"];
        with_namespace.extend(values);
        let of_chart = objects(&rendered(&helm, &with_namespace));
        assert_eq!(
            of_chart.keys().collect::<Vec<_>>(),
            of_program.keys().collect::<Vec<_>>(),
            "{values:?}"
        );
        for (name, object) in &of_chart {
            assert_eq!(*object, of_program[name], "{name} with {values:?}");
        }
        // Helm makes the release's namespace itself.
        of_program.remove("Namespace /rebalancer");
        let without = objects(&rendered(&helm, values));
        assert_eq!(
            without.keys().collect::<Vec<_>>(),
            of_program.keys().collect::<Vec<_>>(),
            "{values:?}"
        );
    }
}

#[test]
fn the_chart_takes_for_files_what_agent_and_relay_do() {
    let text = fs::read_to_string(chart().join("templates/_helpers.tpl")).expect("a template");
    let listed = |name: &str| -> Vec<String> {
        let (_, list) = text.split_once(&format!("${name} := list ")).expect("a list");
        let (list, _) = list.split_once(" -}}").expect("its end");
        list.split(' ').map(|word| word.trim_matches('"').to_owned()).collect()
    };
    let mut listed = [listed("read"), listed("made")].concat();
    listed.sort();
    let mut said = Vec::new();
    for part in ["agent", "relay"] {
        let output = Command::new(binary())
            .args([part, "--help"])
            .output()
            .expect("it starts");
        let help = String::from_utf8(output.stdout).expect("text");
        let lines = help.lines().filter_map(|line| line.trim().strip_prefix("--"));
        let flags = lines.filter_map(|line| line.split_once(' '));
        let of_files = flags.filter(|(_, value)| {
            ["<FILE>", "<unix:PATH>", "<CERT,"]
                .iter()
                .any(|kind| value.starts_with(kind))
        });
        // The chart refuses it: what that file names would not be there.
        said.extend(
            of_files
                .map(|(name, _)| name.to_owned())
                .filter(|name| name != "config"),
        );
    }
    said.sort();
    assert!(said.len() > 12, "{said:?}");
    assert_eq!(listed, said);
}

#[test]
fn values_that_contradict_each_other_are_refused_in_a_sentence() {
    let Some(helm) = tool("chart") else { return };
    for (namespace, values, expected) in [
        ("kube-system", &[][..], "the namespace is kube-system"),
        (
            "r",
            &["podMonitor.enabled=true"],
            "agent.metrics is 127.0.0.1:9470, which Prometheus does not reach",
        ),
        (
            "r",
            &["podMonitor.enabled=true", "agent.metrics=0.0.0.0:9470"],
            "relay.metrics is 127.0.0.1:9471",
        ),
        ("r", &["networkPolicy.enabled=true"], "networkPolicy.peerCIDRs is empty"),
        (
            "r",
            &[
                "podMonitor.enabled=true",
                "agent.metrics=0.0.0.0:9470",
                "relay.metrics=0.0.0.0:9471",
                "networkPolicy.enabled=true",
                "networkPolicy.peerCIDRs={10.0.0.0/24}",
            ],
            "networkPolicy.metricsCIDRs is empty",
        ),
        ("r", &["shim=none", "mode=active"], "nothing that could say GOAWAY"),
        ("r", &["relay.metrics=[::1]:9470"], "give them two ports"),
        ("r", &["relay.intercept=false"], "no client would reach the relay"),
        ("r", &["agent.settings.shim=none"], "set shim"),
        (
            "r",
            &["relay.settings.control=unix:/run/r/other.sock"],
            "the agent asks unix:/run/rebalancer/relay.sock",
        ),
        ("r", &["relay.settings.listen=127.0.0.1:9443"], "are both port 9443"),
        ("r", &["agent.settings.lb-agent=0.0.0.0:9470"], "are both port 9470"),
        (
            "r",
            &["agent.settings.cgroup-root=/mnt/cgroup2"],
            "the host's cgroups at /sys/fs/cgroup",
        ),
        ("r", &["agent.settings.dry-run=true"], "set mode"),
        (
            "r",
            &["agent.settings.peer=a=https://h:1"],
            "they find each other by Leases",
        ),
        (
            "r",
            &["agent.settings.config=/etc/r/agent.yaml"],
            "give its keys as settings",
        ),
        ("r", &["relay.settings.metrics=127.0.0.1:1"], "set relay.metrics"),
        ("r", &["relay.settings.tls-cert=/a.crt"], "a directory of its own"),
        ("r", &["relay.settings.tls-cert=a.crt"], "an absolute path"),
        ("r", &["mode=sometimes"], "mode"),
        ("r", &["relay.intercepts=true"], "intercepts"),
        ("r", &["agent.metrics=9470"], "agent"),
        ("r", &["networkPolicy.peerCIDRs={10.0.0.1}"], "networkPolicy"),
    ] {
        let output = template(&helm, namespace, values);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains(expected),
            "{values:?}: {said}"
        );
        assert_eq!(output.stdout, b"", "{values:?}");
    }
}

/// kube-apiserver's own word of its objects as kubeconform wants it: a strict JSON schema a kind.
fn schemas(directory: &Path) {
    let openapi = fixture::openapi().expect("kube-apiserver's module is fetched for its build");
    let mut definitions = strict(&openapi["definitions"]);
    for (name, kinds) in [
        ("io.k8s.apimachinery.pkg.util.intstr.IntOrString", ["string", "integer"]),
        ("io.k8s.apimachinery.pkg.api.resource.Quantity", ["string", "number"]),
    ] {
        definitions[name] = json!({"type": kinds});
    }
    for (name, definition) in openapi["definitions"].as_object().expect("definitions") {
        let Some([kind]) = definition["x-kubernetes-group-version-kind"]
            .as_array()
            .map(Vec::as_slice)
        else {
            continue;
        };
        let part = |key: &str| kind[key].as_str().unwrap_or_default().to_lowercase();
        let group = part("group");
        let group = group.split('.').next().unwrap_or_default();
        let words = [part("kind"), group.to_owned(), part("version")];
        let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
        let schema = definitions[name].to_string();
        fs::write(directory.join(format!("{}.json", words.join("-"))), schema).expect("a file");
    }
    let all = json!({"definitions": definitions});
    fs::write(directory.join("_definitions.json"), all.to_string()).expect("a file");
}

/// References lead to one file, and fields that are not named are refused.
fn strict(value: &Value) -> Value {
    match value {
        Value::Array(list) => list.iter().map(strict).collect(),
        Value::Object(object) => {
            if let Some(reference) = object.get("$ref").and_then(Value::as_str) {
                return json!({"$ref": format!("_definitions.json{reference}")});
            }
            let mut made: serde_json::Map<String, Value> = object
                .iter()
                .filter(|(key, _)| !key.starts_with("x-kubernetes"))
                .map(|(key, value)| (key.clone(), strict(value)))
                .collect();
            let names_fields = made.get("properties").is_some_and(Value::is_object);
            if names_fields && made.get("type").is_some_and(|kind| kind == "object") {
                made.entry("additionalProperties").or_insert(false.into());
            }
            made.into()
        }
        other => other.clone(),
    }
}

#[test]
fn kubeconform_takes_chart_and_manifests() {
    let (Some(helm), Some(kubeconform)) = (tool("chart"), tool("kubeconform")) else {
        return;
    };
    let directory = log_directory("kubeconform").expect("a directory");
    schemas(&directory);
    let judge = |name: &str, text: &str| -> (bool, Value) {
        let path = directory.join(format!("{name}.yaml"));
        fs::write(&path, text).expect("a file");
        let output = Command::new(&kubeconform)
            .args(["-strict", "-summary", "-output", "json", "-schema-location"])
            // Beside kubeconform's own names for kinds: kind, first word of the group, version.
            .arg(format!(
                "{}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json",
                directory.display()
            ))
            // The operator's own, of which the apiserver knows nothing.
            .args(["-skip", "PodMonitor,PrometheusRule"])
            .arg(&path)
            .output()
            .expect("kubeconform starts");
        let said = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        (output.status.success(), said)
    };
    let printed = |kind: &str| {
        let output = Command::new(binary())
            .args(["manifest", kind])
            .output()
            .expect("it starts");
        String::from_utf8(output.stdout).expect("text")
    };
    let daemonset = printed("daemonset");
    for (name, text, least) in [
        ("chart", rendered(&helm, &ALL), 12),
        ("daemonset", daemonset.clone(), 10),
        ("static-pod", printed("static-pod"), 1),
    ] {
        let (good, said) = judge(name, &text);
        assert!(good, "{name}: {said:#}");
        assert!(said["summary"]["valid"].as_u64() >= Some(least), "{name}: {said:#}");
    }
    // And it would see what is wrong.
    let (good, said) = judge("wrong", &daemonset.replace("hostNetwork: true", "hostNetwrok: true"));
    assert!(!good && said.to_string().contains("hostNetwrok"), "{said:#}");
    fs::remove_dir_all(directory).expect("it is there");
}
