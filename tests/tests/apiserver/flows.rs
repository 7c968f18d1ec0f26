//! Who asks for what, by the flows a real kube-apiserver names, and what holds them, as it takes it.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use rebalancer_tests::{
    binary,
    h2wire::{END_STREAM, Peer, request},
    kube::{granted_in_cluster, kubeconfig},
    kubectl::{Kubectl, Who},
    node::ask,
    pki::Pair,
    process::{Process, wait_for},
};
use serde_json::{Value, json};

use crate::{PATIENCE, World};

/// An agent that asks the API by `--kubeconfig`, and this world's relay.
struct Agent {
    _process: Process,
    socket: PathBuf,
}

impl Agent {
    fn start(world: &World, node: &str, port: u16) -> Self {
        let kubeconfig = kubeconfig(&world.pki, node, world.apiserver).expect("credentials");
        let socket = world.logs.join(format!("{node}.sock"));
        let mut agent = Command::new(binary());
        agent
            .args([
                "agent",
                "--source=sockdiag",
                "--peers=kubernetes",
                "--apiserver-port=6443",
            ])
            .arg(format!("--node-name={node}"))
            .arg(format!("--shim=relay:unix:{}", world.control.display()))
            .arg(format!("--api=unix:{}", socket.display()))
            .arg(format!("--metrics=127.0.0.1:{port}"))
            .arg(format!("--peer-listen=127.0.0.1:{}", port + 1))
            .arg("--peer-advertise=127.0.0.1")
            .arg("--kubeconfig")
            .arg(kubeconfig);
        let process = Process::start(node, agent, None, &world.logs).expect("an agent");
        wait_for(PATIENCE, || ask(&socket, "/v1/flows").ok())
            .unwrap_or_else(|| panic!("the agent answers:\n{}", process.log()));
        Self {
            _process: process,
            socket,
        }
    }

    /// A command of the product that asks it.
    fn run(&self, arguments: &[&str]) -> Result<String, String> {
        run(&[arguments, &["--api", &format!("unix:{}", self.socket.display())]].concat())
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.run(&[arguments, &["--output=json"]].concat()).expect("an answer");
        serde_json::from_str(&text).expect("JSON")
    }
}

fn run(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(binary()).args(arguments).output().expect("it starts");
    let text = |octets| String::from_utf8_lossy(octets).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        let code = output.status.code().expect("it ends by itself");
        Err(format!("exit {code}: {}", text(&output.stderr)))
    }
}

/// One request over HTTP/2, on a connection that stays.
pub(crate) fn asks(world: &World, who: &Pair, path: &str) -> Peer {
    let mut client = Peer::connect(&world.pki, world.relay, Some(who), b"h2").expect("a handshake");
    client.begin_client(&[]);
    asks_again(&mut client, 1, path);
    client
}

fn asks_again(client: &mut Peer, stream: u32, path: &str) {
    client.send(&request(stream, path));
    while !matches!(client.receive(), frame if frame.stream == stream && frame.flags & END_STREAM != 0) {}
}

/// The rows of a user, as FlowSchema, level and requests.
fn rows(flows: &Value, user: &str) -> BTreeSet<(String, String, u64)> {
    let of = |row: &Value, field: &str| row[field].as_str().unwrap_or("-").to_owned();
    let all = flows["flows"].as_array().expect("rows");
    all.iter()
        .filter(|row| row["user"] == user)
        .map(|row| {
            let requests = row["requests"].as_u64().expect("a count");
            (of(row, "flow_schema"), of(row, "priority_level"), requests)
        })
        .collect()
}

fn row(schema: &str, level: &str, requests: u64) -> (String, String, u64) {
    (schema.to_owned(), level.to_owned(), requests)
}

#[test]
fn users_and_their_flows_are_named_as_the_apiserver_names_them() {
    let Some(world) = World::get() else { return };
    let admin = Kubectl::new(&world.pki, world.apiserver, &Who::Certificate(world.pki.pair("admin"))).expect("kubectl");
    let carol = world.pki.client("carol", "carol", &[]).expect("a certificate");
    let kubelet = world
        .pki
        .client("kubelet-x", "system:node:x", &["system:nodes"])
        .expect("a certificate");
    let mut open = asks(world, &carol, "/api/v1/namespaces/default/configmaps");
    asks_again(&mut open, 3, "/readyz");
    let _node = asks(world, &kubelet, "/api/v1/nodes/x");

    let agent = Agent::start(world, "flows-without", 9480);
    let flows = agent.json(&["flows", "--over=10ms"]);
    let fault = flows["names_fault"].as_str().expect("why there are no names");
    assert!(
        fault.contains("grant this agent list on flowschemas.flowcontrol.apiserver.k8s.io in the whole cluster"),
        "{fault}"
    );
    let refused = agent.run(&["advise", "--user=carol"]).expect_err("no levels are known");
    assert!(
        refused.starts_with("exit 1: ") && refused.contains("--levels FILE"),
        "{refused}"
    );
    // UIDs are those of the API's objects.
    let uid = |kind: &str, name: &str| {
        let asked = admin
            .run(&["get", kind, name, "-o", "jsonpath={.metadata.uid}"])
            .expect("kubectl runs");
        asked.expect("an object")
    };
    let own = flows["flows"]
        .as_array()
        .expect("rows")
        .iter()
        .find(|row| row["user"] == "carol");
    let schemas = [uid("flowschema", "global-default"), uid("flowschema", "probes")];
    let shown = own.expect("a row")["flow_schema_uid"]
        .as_str()
        .expect("a UID")
        .to_owned();
    assert!(schemas.contains(&shown), "{shown} {schemas:?}");
    drop(agent);

    let user = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "rebalancer:flows-with"});
    let rule = json!({"apiGroups": ["flowcontrol.apiserver.k8s.io"],
        "resources": ["flowschemas", "prioritylevelconfigurations"], "verbs": ["list"]});
    granted_in_cluster(&world.admin(), "flows-with", &[rule], &user).expect("rights");
    let agent = Agent::start(world, "flows-with", 9490);
    let flows = wait_for(PATIENCE, || {
        let flows = agent.json(&["flows", "--over=10ms"]);
        flows["names_fault"].is_null().then_some(flows)
    });
    let flows = flows.expect("names, once the rights are there");
    assert_eq!(
        rows(&flows, "carol"),
        BTreeSet::from([row("global-default", "global-default", 1), row("probes", "exempt", 1)])
    );
    assert_eq!(
        rows(&flows, "system:node:x"),
        BTreeSet::from([row("system-node-high", "node-high", 1)])
    );
    // HTTP/1.1, and a token, whose user is the apiserver's to know.
    let token = Kubectl::new(&world.pki, world.relay, &Who::Token("token-7".into())).expect("kubectl");
    token
        .run(&["get", "--raw", "/version"])
        .expect("kubectl runs")
        .expect("an answer");
    let via = world.admin_by(world.relay);
    assert_eq!(
        via.ask_text("GET", "/api/v1/namespaces/default/secrets", None)
            .expect("an answer")
            .0,
        200
    );
    let flows = agent.json(&["flows", "--over=10ms", "--limit=1000"]);
    assert!(
        rows(&flows, "admin")
            .iter()
            .any(|(schema, level, _)| (schema.as_str(), level.as_str()) == ("exempt", "exempt"))
    );
    assert!(!flows.to_string().contains("token-user-7"), "{flows}");
    let table = agent.run(&["flows", "--over=10ms", "--limit=1000"]).expect("a table");
    assert!(
        table.contains("system-node-high") && table.contains("kubectl"),
        "{table}"
    );

    // Whose it is the operator says.
    let all = flows["flows"].as_array().expect("rows");
    let mut agents = all
        .iter()
        .filter(|row| row["user"].is_null())
        .filter_map(|row| row["user_agent"].as_str());
    let kubectl = agents
        .find(|agent| agent.contains("kubectl"))
        .expect("kubectl, of nobody");
    let advised = agent.json(&["advise", "--group=swarm-clients", "--user-agent", kubectl]);
    let why = advised["reason"][0].as_str().expect("a sentence");
    assert!(
        why.starts_with(&format!("user agent {kubectl:?}: ")) && why.contains(" watches are open now"),
        "{advised}"
    );

    let users = agent.json(&["connections", "--by=user"]);
    let of_carol = users["users"]
        .as_array()
        .expect("users")
        .iter()
        .find(|one| one["user"] == "carol");
    assert_eq!(
        of_carol.map(|one| (&one["connections"], &one["requests"])),
        Some((&json!(1), &json!(2))),
        "{users}"
    );
    assert!(
        agent
            .run(&["connections", "--by=user"])
            .expect("a table")
            .contains("carol")
    );

    is_held_by_what_is_advised(world, &agent, &admin, &carol);
}

/// What `advise` prints is taken, and does what it says.
fn is_held_by_what_is_advised(world: &World, agent: &Agent, admin: &Kubectl, carol: &Pair) {
    let advised = agent.json(&["advise", "--user=carol", "--lists=3"]);
    let name = advised["name"].as_str().expect("a name");
    let text = agent.run(&["advise", "--user=carol", "--lists=3"]).expect("an advice");
    assert!(text.contains("global-default"), "{text}");
    let file = |text: &str| {
        let path = world.logs.join("advice.yaml");
        fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let apply = |text: &str, dry: bool| {
        let path = file(text);
        let mut arguments = vec!["apply", "--validate=strict", "-f", &path];
        if dry {
            arguments.push("--dry-run=server");
        }
        admin.run(&arguments).expect("kubectl runs")
    };
    for who in [
        "--user=system:serviceaccount:a:b",
        "--user=ü\"'\\: #{x}",
        "--user=- ~ null",
        "--group=dev",
        "--group=true",
    ] {
        let text = agent.run(&["advise", who]).expect("an advice");
        apply(&text, true).unwrap_or_else(|error| panic!("{who}: {error}\n{text}"));
    }
    apply(&text, true).expect("the apiserver takes it");
    apply(&text, false).expect("the apiserver takes it");
    let before = rows(&agent.json(&["flows", "--over=10ms"]), "carol");
    let seats = wait_for(PATIENCE, || {
        let (_, metrics) = world.admin().ask_text("GET", "/metrics", None).ok()?;
        let line = format!("apiserver_flowcontrol_nominal_limit_seats{{priority_level=\"{name}\"}} ");
        metrics
            .lines()
            .find_map(|text| text.strip_prefix(&line)?.trim().parse::<u64>().ok())
    });
    assert_eq!(seats, advised["seats"].as_u64(), "the seats are those it says");
    // The next LIST is held, and what is none is not. A reading of names is good for half a minute: the UID is compared.
    let mut client = asks(world, carol, "/api/v1/namespaces/default/configmaps");
    asks_again(&mut client, 3, "/api/v1/namespaces/default/configmaps/none");
    let schema = admin
        .run(&["get", "flowschema", name, "-o", "jsonpath={.metadata.uid}"])
        .expect("kubectl runs");
    let schema = schema.expect("an object");
    let flows = agent.json(&["flows", "--over=10ms"]);
    let all = flows["flows"].as_array().expect("rows");
    let held = all
        .iter()
        .find(|row| row["flow_schema_uid"] == schema.as_str())
        .expect("a row of the new schema");
    assert_eq!((&held["user"], &held["requests"]), (&json!("carol"), &json!(1)));
    let left = |rows: &BTreeSet<(String, String, u64)>| {
        let plain = rows.iter().find(|row| row.0 == "global-default");
        plain.map_or(0, |row| row.2)
    };
    assert_eq!(
        left(&rows(&flows, "carol")),
        left(&before) + 1,
        "a GET stays where it was"
    );
    let path = file(&text);
    admin
        .run(&["delete", "-f", &path])
        .expect("kubectl runs")
        .expect("it is there");

    for (arguments, part) in [
        (
            &["advise", "--user=", "--levels=/dev/null"][..],
            "/dev/null: it is no list",
        ),
        (&["advise", "--group=system:masters"], "exempt"),
        (&["advise", "--group=system:authenticated"], "nearly everybody"),
        (
            &["advise", "--user=carol", "--lists=0"],
            "--lists 0: allowed is 1 to 50",
        ),
        (&["advise", "--user=carol", "--verb=lst"], "allowed is"),
        (&["advise", "--user=carol", "--group=dev"], "cannot be used with"),
        (&["advise"], "required"),
        (&["advise", "--user=carol", "--levels=/no/such/file"], "/no/such/file"),
    ] {
        let said = agent.run(arguments).expect_err("a refusal");
        assert!(
            said.starts_with("exit 2: ") && said.contains(part),
            "{arguments:?}: {said}"
        );
    }
}
