//! Which FlowSchema a real kube-apiserver serves a request by, once what `advise` prints is applied.

use std::{fs, process::Command};

use rebalancer_tests::{
    binary,
    h2wire::{Peer, kind, request},
    kube::granted_in_cluster,
    kubectl::{Kubectl, Who},
    pki::Pair,
    process::wait_for,
};
use serde_json::json;

use crate::{PATIENCE, World, flows::asks};

const LIST: &str = "/api/v1/namespaces/default/configmaps";

/// As an informer of client-go 1.35 begins.
const WATCH_LIST: &str = "/api/v1/namespaces/default/configmaps?watch=true&sendInitialEvents=true&allowWatchBookmarks=true\
                          &resourceVersionMatch=NotOlderThan";

/// Another level and schema, such as somebody made for a part of what they ask.
const NARROW: &str = r#"
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {name: narrow}
spec:
  matchingPrecedence: 1000
  priorityLevelConfiguration: {name: workload-high}
  rules:
  - subjects: [{kind: Group, group: {name: held}}]
    resourceRules: [{verbs: [list], apiGroups: [""], resources: ["*"], namespaces: ["*"], clusterScope: true}]
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {name: narrow-user}
spec:
  matchingPrecedence: 2000
  priorityLevelConfiguration: {name: workload-high}
  rules:
  - subjects: [{kind: User, user: {name: dave}}]
    resourceRules: [{verbs: [list], apiGroups: [""], resources: [configmaps], namespaces: ["*"], clusterScope: true}]
"#;

struct Cluster<'w> {
    world: &'w World,
    admin: Kubectl,
}

impl Cluster<'_> {
    fn kubectl(&self, arguments: &[&str]) -> String {
        self.admin
            .run(arguments)
            .expect("kubectl runs")
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
    }

    /// Applies it.
    fn apply(&self, name: &str, text: &str) -> String {
        let path = self.world.logs.join(format!("{name}.yaml"));
        fs::write(&path, text).expect("a file");
        let path = path.display().to_string();
        self.kubectl(&["apply", "--validate=strict", "-f", &path]);
        path
    }

    /// What is advised by the levels and schemas there are now.
    fn advised(&self, who: &str) -> String {
        let levels = self.world.logs.join("holds-levels.json");
        let read = self.kubectl(&["get", "prioritylevelconfigurations,flowschemas", "-o", "json"]);
        fs::write(&levels, read).expect("a file");
        let output = Command::new(binary())
            .args(["advise", who, "--levels"])
            .arg(levels)
            .output()
            .expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// The FlowSchema by which the last request of a user came, by what the relay saw of all: the one whose figure grew.
    fn schema_of(&self, ask: impl Fn()) -> String {
        let requests = || {
            let flows = self.world.control("GET /v1/flows", "");
            let rows = flows["rows"].as_array().cloned().unwrap_or_default();
            let of_dave = rows.into_iter().filter(|row| row["user"] == "dave");
            let figure = |row: serde_json::Value| {
                let uid = row["flow_schema"].as_str().unwrap_or_default().to_owned();
                (uid, row["requests"].as_u64().unwrap_or_default())
            };
            of_dave.map(figure).collect::<std::collections::BTreeMap<_, _>>()
        };
        let before = requests();
        ask();
        let grown = wait_for(PATIENCE, || {
            let grown = |(uid, count): &(String, u64)| before.get(uid).copied().unwrap_or_default() < *count;
            requests().into_iter().find(grown)
        });
        let (uid, _) = grown.expect("the relay has seen the answer");
        let names = self.kubectl(&["get", "flowschemas", "-o", "json"]);
        let names: serde_json::Value = serde_json::from_str(&names).expect("JSON");
        let items = names["items"].as_array().expect("schemas");
        let schema = items.iter().find(|one| one["metadata"]["uid"] == uid.as_str());
        schema.expect("a schema of that UID")["metadata"]["name"]
            .as_str()
            .expect("a name")
            .to_owned()
    }

    /// Waits until requests of that kind come by a schema of such a name.
    fn comes_by(&self, dave: &Pair, path: &str, begin: &str) {
        let mut last = String::new();
        wait_for(PATIENCE, || {
            last = self.schema_of(|| drop(asks(self.world, dave, path)));
            last.starts_with(begin).then_some(())
        })
        .unwrap_or_else(|| panic!("{path} comes by {last}, not by {begin}"));
    }
}

#[test]
fn a_hold_takes_lists_and_watch_lists_from_narrower_schemas_and_a_users_hold_from_his_groups() {
    let Some(world) = World::get() else { return };
    let admin = Kubectl::new(&world.pki, world.apiserver, &Who::Certificate(world.pki.pair("admin"))).expect("kubectl");
    let cluster = Cluster { world, admin };
    let dave = world.pki.client("dave", "dave", &["held"]).expect("a certificate");
    let subject = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "dave"});
    let rule = json!({"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]});
    granted_in_cluster(&world.admin(), "held", &[rule], &subject).expect("rights");
    let narrow = cluster.apply("narrow", NARROW);
    cluster.comes_by(&dave, LIST, "narrow");

    // By his name alone only one of the two schemas is known to take his requests, and it says so.
    let advice = cluster.advised("--user=dave");
    for part in [
        "presumably match FlowSchema narrow-user with a part of it",
        "should it be in \"held\" or ",
        "exempt",
    ] {
        assert!(advice.contains(part), "{part}:\n{advice}");
    }
    let group = cluster.advised("--group=held");
    assert!(
        group.contains("this comes before FlowSchemas narrow, global-default, catch-all"),
        "{group}"
    );
    let group = cluster.apply("held-group", &group);
    let of_group = "rebalancer-hold-users-of-held-";
    cluster.comes_by(&dave, LIST, of_group);
    let timed = format!("{WATCH_LIST}&timeoutSeconds=1");
    cluster.comes_by(&dave, &timed, of_group);
    cluster.comes_by(&dave, "/api/v1/namespaces/default/configmaps/none", "global-default");

    cluster.kubectl(&["delete", "flowschema", "narrow"]);
    cluster.kubectl(&["delete", "-f", &group]);
    // Whichever is asked for first, his own hold comes before his group's.
    let user = cluster.apply("held-user", &cluster.advised("--user=dave"));
    let of_user = "rebalancer-hold-user-dave-";
    cluster.comes_by(&dave, LIST, of_user);
    let group = cluster.apply("held-group", &cluster.advised("--group=held"));
    for path in [LIST, &timed] {
        cluster.comes_by(&dave, path, of_user);
    }
    cluster.kubectl(&["delete", "-f", &user]);
    cluster.comes_by(&dave, &timed, of_group);
    let user = cluster.apply("held-user", &cluster.advised("--user=dave"));
    cluster.comes_by(&dave, LIST, of_user);

    // A watch that has sent what there is takes no seat, however long it lasts.
    let mut watch = Peer::connect(&world.pki, world.relay, Some(&dave), b"h2").expect("a handshake");
    watch.begin_client(&[]);
    watch.send(&request(1, WATCH_LIST));
    while watch.receive().kind != kind::DATA {}
    let seats = wait_for(PATIENCE, || {
        let (_, metrics) = world.admin().ask_text("GET", "/metrics", None).ok()?;
        let mut lines = metrics.lines();
        let line = lines.find(|line| {
            line.starts_with("apiserver_flowcontrol_current_executing_seats{") && line.contains(of_user)
        })?;
        line.ends_with(" 0").then(|| line.to_owned())
    });
    assert!(seats.is_some(), "the watch keeps its seat");
    let flows = world.control("GET /v1/flows", "");
    let rows = flows["rows"].as_array().expect("rows");
    let open = rows
        .iter()
        .filter(|row| row["user"] == "dave")
        .filter_map(|row| row["open_watches"].as_u64());
    assert_eq!(open.sum::<u64>(), 1, "{flows}");
    drop(watch);
    for path in [user, group, narrow] {
        cluster.kubectl(&["delete", "--ignore-not-found", "-f", &path]);
    }
}
