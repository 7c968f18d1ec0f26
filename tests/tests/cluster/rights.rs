//! What agents need to be allowed, verb by verb, by the apiservers' own RBAC and audit logs.

use std::collections::BTreeSet;

use rebalancer_tests::{
    kube::{Admin, granted},
    process::wait_for,
};
use serde_json::json;

use super::{
    membership::scene,
    world::{PATIENCE, World},
};

/// A verb, and what of: as RBAC and the audit log name them.
type Right = (&'static str, &'static str);

/// All that is granted.
const RIGHTS: [Right; 5] = [
    ("list", "leases"),
    ("watch", "leases"),
    ("create", "leases"),
    ("update", "leases"),
    ("create", "events"),
];

/// Each right is needed, and no other one is.
pub fn are_the_smallest(world: &World) {
    scene("what is granted is what is used, and nothing else was asked for");
    let used = wait_for(PATIENCE, || {
        let used = world.asked();
        (used.len() >= RIGHTS.len()).then_some(used)
    });
    let wanted: BTreeSet<(String, String)> = RIGHTS.map(|(verb, of)| (verb.to_owned(), of.to_owned())).into();
    assert_eq!(used.unwrap_or_else(|| world.asked()), wanted);

    for lacks in RIGHTS {
        scene(&format!("without {} of {}", lacks.0, lacks.1));
        let user = format!("rebalancer:without-{}-{}", lacks.0, lacks.1);
        grant(&world.admin(0), &user, lacks);
        let agent = world.start_another("node-9", &world.credentials(&user), &[]);
        let metric = |verb: &str| {
            let line = format!("rebalancer_kubernetes_requests_total{{verb=\"{verb}\",result=\"forbidden\"}}");
            agent.metric(&world.network.hub, &line).filter(|count| *count >= 1.0)
        };
        match lacks {
            ("list" | "create", "leases") => {
                let what = format!(
                    "grant this agent {} on leases.coordination.k8s.io in the namespace kube-system",
                    lacks.0
                );
                agent.holds("membership_unknown", &[&what]);
            }
            // It goes on without: with lists in place of watches, with no Events, and until its Lease is old.
            ("update", _) => {
                wait_for(PATIENCE, || metric("update")).expect("a renewal that is forbidden");
            }
            ("watch", _) => {
                wait_for(PATIENCE, || metric("watch")).expect("a watch that is forbidden");
                agent.holds("membership_unknown", &["node-1, node-2, node-3"]);
            }
            _ => {
                let what = "grant this agent create on events.events.k8s.io in the namespace default";
                wait_for(PATIENCE, || agent.process.log().contains(what).then_some(())).expect("a word on it");
            }
        }
        drop(agent);
        world.forget("node-9");
    }
}

/// All rights but one, for that user.
fn grant(admin: &Admin, user: &str, lacks: Right) {
    for (namespace, group, of) in [
        ("kube-system", "coordination.k8s.io", "leases"),
        ("default", "events.k8s.io", "events"),
    ] {
        let verbs = RIGHTS.iter().filter(|right| **right != lacks && right.1 == of);
        let verbs: Vec<&str> = verbs.map(|(verb, _)| *verb).collect();
        if verbs.is_empty() {
            continue;
        }
        let rule = json!({"apiGroups": [group], "resources": [of], "verbs": verbs});
        let subject = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user});
        granted(admin, namespace, &user.replace(':', "-"), &[rule], &subject).expect("rights");
    }
}

/// While the rights are gone the last membership holds, and with them everything goes on.
pub fn are_taken_away(world: &World) {
    scene("the rights are taken away: the last membership holds while peers answer, and the way back is said");
    let binding = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings/rebalancer";
    let (status, _) = world.admin(0).ask("DELETE", binding, None).expect("an answer");
    assert_eq!(status, 200);
    // Watches that are open go on; renewals do not.
    world.agents[0].until("a request that is forbidden", |_| {
        let forbidden = "rebalancer_kubernetes_requests_total{verb=\"update\",result=\"forbidden\"}";
        world.agents[0]
            .metric(&world.network.nodes[0], forbidden)
            .filter(|count| *count >= 1.0)
    });
    let status = world.agents[0].status().expect("an answer");
    assert_eq!(status["view"].as_array().map(Vec::len), Some(3), "{status}");
    world
        .admin(0)
        .let_agents(&["node-1", "node-2", "node-3"])
        .expect("rights");
    world.is_well();
}
