//! Requests that the apiserver refuses for overload, as the relay counts them for its agent.

use std::fs;

use rebalancer_core::wire::h2::hpack::Decoder;
use rebalancer_tests::{
    h2wire::{END_STREAM, Peer, kind, request},
    kubectl::{Kubectl, Who},
    pki::Pair,
    process::wait_for,
};

use crate::{PATIENCE, World};

/// A priority level without seats: one request is served at a time, and whoever comes meanwhile is refused, by API
/// Priority and Fairness itself (k8s.io/apiserver/pkg/util/flowcontrol/fairqueuing/queueset, `canAccommodateSeatsLocked`).
const CLOSED: &str = r#"
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: PriorityLevelConfiguration
metadata: {name: closed}
spec:
  type: Limited
  limited: {nominalConcurrencyShares: 0, lendablePercent: 0, borrowingLimitPercent: 0, limitResponse: {type: Reject}}
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {name: closed}
spec:
  priorityLevelConfiguration: {name: closed}
  matchingPrecedence: 2
  rules:
  - subjects: [{kind: User, user: {name: flood}}]
    resourceRules:
    - {verbs: ["*"], apiGroups: ["*"], resources: ["*"], namespaces: ["*"], clusterScope: true}
"#;

/// Requests of one connection, all at once.
const REQUESTS: u32 = 100;

#[test]
fn refusals_of_priority_and_fairness_are_counted() {
    let Some(world) = World::get() else { return };
    let admin = Kubectl::new(&world.pki, world.relay, &Who::Certificate(world.pki.pair("admin"))).expect("kubectl");
    let manifest = world.logs.join("closed.yaml");
    fs::write(&manifest, CLOSED).expect("a manifest");
    let path = manifest.display().to_string();
    let applied = admin.run(&["apply", "-f", &path]).expect("kubectl runs");
    assert!(applied.is_ok(), "{applied:?}");
    let flood = world.pki.client("flood", "flood", &[]).expect("a certificate");
    // Until the apiserver has heard of the level, all requests of that user are let in.
    let refused = wait_for(PATIENCE, || {
        let before = refused_total(world);
        let count = ask(world, &flood);
        // No other test's clients are refused.
        assert_eq!(refused_total(world) - before, u64::from(count > 0), "each client once");
        (count > 0).then_some(count)
    });
    assert!(refused.is_some(), "nothing was refused");
    let removed = admin.run(&["delete", "-f", &path]).expect("kubectl runs");
    assert!(removed.is_ok(), "{removed:?}");
}

fn refused_total(world: &World) -> u64 {
    let total = &world.control("GET /v1/connections", "")["refused_total"];
    total.as_u64().expect("the relay counts refusals")
}

/// Asks on one connection; how many answers were 429 with Retry-After.
fn ask(world: &World, who: &Pair) -> u32 {
    let mut client = Peer::connect(&world.pki, world.relay, Some(who), b"h2").expect("a handshake");
    client.begin_client(&[]);
    let all = (0..REQUESTS).flat_map(|at| request(2 * at + 1, "/api/v1/namespaces/default/configmaps"));
    client.send(&all.collect::<Vec<u8>>());
    let mut answers = Decoder::default();
    let (mut refused, mut ended) = (0, 0);
    while ended < REQUESTS {
        let got = client.receive();
        if got.kind == kind::HEADERS {
            let list = answers.decode(&got.payload, 1 << 16).expect("an answer");
            refused += u32::from(list.get(b":status") == Some(b"429") && list.get(b"retry-after").is_some());
        }
        ended += u32::from(matches!(got.kind, kind::HEADERS | kind::DATA) && got.flags & END_STREAM != 0);
    }
    refused
}
