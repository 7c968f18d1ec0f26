//! The relay before a real kube-apiserver: the same answers as directly, for every kind of client.

mod conformance;
mod differential;
mod doctor;
mod flows;
mod handover;
mod holds;
mod identity;
mod manifests;
mod names;
mod overload;
mod renewal;
mod streams;
mod streams_clients;
mod world;

use std::time::Duration;

use rebalancer_tests::{
    kubectl::{Kubectl, Who},
    process::wait_for,
};
use world::World;

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn kubectl_gets_the_same_answers_through_the_relay_as_directly() {
    let Some(world) = World::get() else { return };
    let alice = world
        .pki
        .client("alice", "alice", &["dev", "ops"])
        .expect("a certificate");
    let nobody = world
        .pki
        .client("nobody", "", &["system:masters"])
        .expect("a certificate");
    let clients = [
        ("administrator", Who::Certificate(world.pki.pair("admin"))),
        ("certificate with groups", Who::Certificate(alice)),
        ("certificate without a name", Who::Certificate(nobody)),
        ("token of an administrator", Who::Token("the-admins-token".into())),
        ("token", Who::Token("token-3".into())),
        ("wrong token", Who::Token("no-such-token".into())),
        ("anonymous", Who::Anonymous),
    ];
    for (name, who) in clients {
        let direct = Kubectl::new(&world.pki, world.apiserver, &who).expect("a kubeconfig");
        let relayed = Kubectl::new(&world.pki, world.relay, &who).expect("a kubeconfig");
        // Nothing that changes with what others write: a list's resourceVersion is the whole store's, and apiservers renew
        // Leases of their own.
        let questions: [&[&str]; 4] = [
            &["get", "namespaces", "-o", "name"],
            &["get", "configmaps", "-n", "kube-system", "--chunk-size=1", "-o", "name"],
            &[
                "get",
                "--raw",
                "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication?pretty=true",
            ],
            &["auth", "whoami", "-o", "jsonpath={.status.userInfo}"],
        ];
        for question in questions {
            let answer = |kubectl: &Kubectl| kubectl.run(question).expect("kubectl runs");
            let expected = answer(&direct);
            let got = answer(&relayed);
            let without_address = |answer: Result<String, String>| answer.map_err(|text| world.neutral(&text));
            assert_eq!(
                without_address(got),
                without_address(expected),
                "{name}: kubectl {question:?}"
            );
        }
    }
}

#[test]
fn a_kubectl_watch_survives_its_goaway_and_misses_nothing() {
    let Some(world) = World::get() else { return };
    let admin =
        Kubectl::new(&world.pki, world.relay, &Who::Certificate(world.pki.pair("admin"))).expect("a kubeconfig");
    let watch = admin
        .start(
            "watch",
            &["get", "configmaps", "-n", "default", "-w", "-o", "name"],
            None,
            &world.logs,
        )
        .expect("kubectl starts");
    wait_for(PATIENCE, || watch.log().contains("kube-root-ca.crt").then_some(()))
        .or_else(|| {
            // No controller manager runs here: the list may be empty, and the watch is there all the same.
            world
                .connections()
                .iter()
                .any(|connection| connection["open_watches"] == 1)
                .then_some(())
        })
        .expect("the watch is open");
    let connection = wait_for(PATIENCE, || {
        world
            .connections()
            .into_iter()
            .find(|connection| connection["open_watches"] == 1)
    })
    .expect("the relay knows of the watch");
    assert_eq!(connection["user"], "admin");
    assert_eq!(connection["protocol"], "h2");

    let id = connection["id"].as_str().expect("an id").to_owned();
    let answer = world.control(
        "POST /v1/goaway",
        &format!(r#"{{"generation": 1, "expires_in_ms": 10000, "victims": ["{id}", "ffffffff"]}}"#),
    );
    assert_eq!(answer["results"][0]["result"], "sent");
    assert_eq!(answer["results"][1]["result"], "unknown");
    wait_for(PATIENCE, || {
        let outcomes = world.control("GET /v1/outcomes?since=0", "");
        outcomes["outcomes"]
            .as_array()?
            .iter()
            .any(|outcome| outcome["id"] == id.as_str() && outcome["outcome"] == "draining")
            .then_some(())
    })
    .expect("GOAWAY goes out");

    // The watch is still served on the draining connection, and other requests go elsewhere.
    let created = admin
        .run(&["create", "configmap", "-n", "default", "seen-after-goaway"])
        .expect("kubectl runs");
    assert!(created.is_ok(), "{created:?}");
    wait_for(PATIENCE, || {
        watch.log().contains("configmap/seen-after-goaway").then_some(())
    })
    .expect("the watch still carries events");
    let draining = world
        .connections()
        .into_iter()
        .find(|connection| connection["id"] == id.as_str())
        .expect("a watch keeps its connection");
    assert_eq!(draining["state"], "draining");
    let refused = world.control_raw(
        "POST /v1/goaway",
        r#"{"generation": 0, "expires_in_ms": 1, "victims": []}"#,
    );
    assert!(
        refused.contains("409 Conflict") && refused.contains("generation 0 is lower than 1"),
        "{refused}"
    );
}
