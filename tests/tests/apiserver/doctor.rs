//! `rebalancer doctor` beside a real kube-apiserver: what fits is called good, and what was exchanged is named.

use std::{fs, net::SocketAddr, path::Path, process::Command};

use rebalancer_tests::{binary, pki::Pki, process::wait_for};
use serde_json::Value;

use crate::{
    PATIENCE,
    world::{World, start_relay},
};

/// The findings, as `WHAT: GRAVITY`, of whether apiserver and relay believe each other.
fn trust(control: &Path) -> Vec<(String, Value)> {
    let output = Command::new(binary())
        .args([
            "doctor",
            "--output=json",
            "--apiserver-port=6444",
            "--api=unix:/no/such/agent.sock",
        ])
        .arg(format!("--control=unix:{}", control.display()))
        .output()
        .expect("it starts");
    let said: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let wanted = [
        "relay's files",
        "serving certificate",
        "relay's flags",
        "front-proxy certificate",
    ];
    let findings = said["findings"].as_array().expect("findings").iter();
    findings
        .filter_map(|finding| {
            let what = finding["what"].as_str()?;
            wanted.contains(&what).then(|| (what.to_owned(), finding.clone()))
        })
        .collect()
}

fn gravities(found: &[(String, Value)]) -> Vec<(&str, &str)> {
    found
        .iter()
        .map(|(what, finding)| (what.as_str(), finding["gravity"].as_str().expect("a gravity")))
        .collect()
}

#[test]
fn the_doctor_says_whether_apiserver_and_relay_believe_each_other() {
    let Some(world) = World::get() else { return };
    let found = trust(&world.control);
    assert_eq!(
        gravities(&found),
        [
            ("relay's files", "good"),
            ("serving certificate", "good"),
            ("relay's flags", "good"),
            ("front-proxy certificate", "good"),
        ],
        "{found:#?}"
    );

    // A relay whose files are exchanged while it runs: what it was told is what is looked at.
    let loopback = world.relay.ip();
    let own = Pki::new(&[loopback]).expect("certificates");
    let copy = |from: &Pki, name: &str| fs::copy(from.file(name), own.file(name)).expect("a file");
    let names = [
        "ca.crt",
        "apiserver.crt",
        "apiserver.key",
        "front-proxy-ca.crt",
        "front-proxy-client.crt",
        "front-proxy-client.key",
    ];
    for name in names {
        copy(&world.pki, name);
    }
    let control = world.logs.join("doctors.sock");
    let mut relay = start_relay(
        "doctors-relay",
        SocketAddr::new(loopback, 6449),
        &control,
        &own,
        &world.logs,
    )
    .expect("it starts");
    wait_for(PATIENCE, || {
        relay.is_running().expect("it runs");
        control.exists().then_some(())
    })
    .expect("its socket");
    assert!(
        gravities(&trust(&control))
            .iter()
            .all(|(_, gravity)| *gravity == "good")
    );

    let stranger = Pki::new(&[loopback]).expect("certificates");
    copy(&stranger, "front-proxy-client.crt");
    let found = trust(&control);
    assert_eq!(
        gravities(&found),
        [
            ("relay's files", "wrong"),
            ("serving certificate", "good"),
            ("relay's flags", "good"),
            ("front-proxy certificate", "wrong"),
        ],
        "{found:#?}"
    );
    for name in names {
        copy(&stranger, name);
    }
    let found = trust(&control);
    assert_eq!(
        gravities(&found),
        [
            ("relay's files", "good"),
            ("serving certificate", "soon"),
            ("relay's flags", "wrong"),
            ("front-proxy certificate", "wrong"),
        ],
        "{found:#?}"
    );
    for (what, finding) in &found {
        assert!(
            finding["gravity"] == "good" || finding["fix"].is_string(),
            "{what}: {finding:#}"
        );
    }
}
