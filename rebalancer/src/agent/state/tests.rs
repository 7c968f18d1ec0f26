//! The state file on real disks, whole, torn, too large, and on one that takes nothing.

use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _};

use rebalancer_core::{
    agent::{
        RememberedEvacuation, RememberedPause, RememberedStrangers, RememberedTransit, RememberedTries, Switch,
        SwitchPause, Totals,
    },
    ids::{ApiserverName, ConnectionId},
    planner::Resting,
    table::ClientKey,
};

use super::*;

fn memory() -> Memory {
    let resting = |client| Resting {
        client,
        left: Duration::from_secs(599),
        told: 1,
        allowed: 2,
    };
    Memory {
        pause: Some(RememberedPause {
            reason: "upgrade of cp-2, \"by hand\"".to_owned(),
            left: Some(Duration::from_secs(7_200)),
        }),
        switch: Switch {
            stamp: 3,
            by: Some(ApiserverName::new("b")),
            pause: Some(SwitchPause {
                reason: "all of them".to_owned(),
                left: None,
            }),
        },
        evacuation: Some(RememberedEvacuation {
            lasts: Duration::from_secs(90),
            over: Duration::from_secs(60),
            listener: Some(7),
            upstream: Some(8),
            was_gone: true,
            is_over: false,
        }),
        cooldowns: vec![
            resting(ClientKey::User("system:node:a".into())),
            resting(ClientKey::Address("[2001:db8::1]:5".parse().expect("an address"))),
        ],
        tries: RememberedTries {
            wait: Duration::from_secs(60),
            left: Duration::from_secs(30),
            in_vain: 20,
            limit: 48,
            changed: Some(Duration::from_secs(900)),
            admitted: Some(Duration::from_secs(12)),
            takes_all: true,
            is_slow: true,
        },
        ready: vec![ApiserverName::new("a"), ApiserverName::new("b")],
        draining: vec![ConnectionId(7), ConnectionId(1 << 40)],
        next_decision: 1_001,
        strangers: RememberedStrangers {
            departures: vec![
                BTreeMap::from([(ApiserverName::new("a"), 0.5), (ApiserverName::new("b"), 2.0)]),
                BTreeMap::new(),
            ],
            landings: vec![BTreeMap::from([(ApiserverName::new("b"), 1.25)])],
        },
        transit: RememberedTransit {
            told: 50,
            landed: 12,
            told_load: 50.5,
            seen: vec![(
                ApiserverName::new("b"),
                Totals {
                    instance: u64::MAX,
                    goaways: 50,
                    left: 1,
                    accepted: 12,
                    told_load: 50.5,
                    each: 1.01,
                    connections: 100,
                    departed: 40,
                },
            )],
        },
    }
}

#[tokio::test]
async fn what_is_written_is_read_by_the_next_process() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("agent.state");
    assert_eq!(read(&path, "a"), None, "there is none at the first start");
    let mut file = StateFile::start(path.clone()).expect("a thread");
    for next_decision in [1, 1_001] {
        file.write(
            "a",
            Memory {
                next_decision,
                ..memory()
            },
        );
    }
    assert!(file.ticket().is_written().await);
    let (remembered, _) = read(&path, "a").expect("a memory");
    assert_eq!(remembered, memory());
    assert_eq!(fs::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o600);
    // What is given last is written although the agent ends at once.
    file.write("a", Memory::default());
    drop(file);
    assert_eq!(read(&path, "a").expect("a memory").0, Memory::default());
}

/// A large cluster's file is megabytes: written, it is not written again at once unless that is pressing.
#[tokio::test]
async fn the_larger_the_file_the_less_often_it_is_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("agent.state");
    let mut file = StateFile::start(path.clone()).expect("a thread");
    file.write("a", memory());
    assert!(file.ticket().is_written().await);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !file.is_ready() {
        assert!(Instant::now() < deadline, "a small one rests for a moment");
        thread::park_timeout(Duration::from_millis(1));
    }
    let of_many = |count: usize| Memory {
        cooldowns: (0..count)
            .map(|client| Resting {
                client: ClientKey::User(format!("{client:01000}").into()),
                left: Duration::from_secs(client as u64),
                told: 1,
                allowed: 1,
            })
            .collect(),
        ..memory()
    };
    // With names of a thousand octets these are more than what is read of a file.
    file.write("a", of_many(80_000));
    assert!(!file.is_ready(), "it waits, or is being written");
    let deadline = Instant::now() + Duration::from_secs(300);
    while *file.written.borrow() < 2 {
        assert!(Instant::now() < deadline, "it is written");
        thread::park_timeout(Duration::from_millis(10));
    }
    assert!(!file.is_ready(), "forty megabytes are not written again at once");
    let kept = read(&path, "a").expect("what is written can be read").0;
    assert_eq!((kept.cooldowns.len(), kept.pause), (40_000, memory().pause));
    let shortest = kept.cooldowns.iter().map(|resting| resting.left.as_secs()).min();
    assert_eq!(shortest, Some(40_000), "those that end first are left out");
    // What presses is.
    file.write("a", memory());
    assert!(file.ticket().is_written().await);
    assert_eq!(read(&path, "a").expect("a memory").0, memory());
}

#[test]
fn what_cannot_be_read_is_left_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("agent.state");
    let whole = serde_json::to_string(&Written::of("a", 1, 1, &memory())).expect("JSON");
    let another = serde_json::to_string(&Written::of("b", 1, 1, &memory())).expect("JSON");
    let newer = whole.replacen("\"version\":1", "\"version\":2", 1);
    for useless in [
        "",
        "{}",
        "[]",
        &whole[..whole.len() / 2],
        &newer,
        &another,
        "\u{0}\u{0}",
    ] {
        fs::write(&path, useless).expect("a file");
        assert_eq!(read(&path, "a"), None, "{useless}");
    }
    // The wall clock was wrong then, or is now: the machine's other clock has gone on.
    fs::write(&path, &whole).expect("a file");
    let (remembered, ago) = read(&path, "a").expect("a memory");
    assert!(
        ago <= sys::since_boot(),
        "it was written after the machine was started: {ago:?}"
    );
    let is_over = remembered.evacuation.expect("it was on").is_over;
    assert_eq!((is_over, remembered.draining.len()), (false, 2));
    // The machine was started again since, also where it is up for longer than it was then.
    for (member, value) in [("up_ms", u64::MAX.into()), ("boot", "another".into())] {
        let mut rebooted: serde_json::Value = serde_json::from_str(&whole).expect("JSON");
        rebooted[member] = value;
        fs::write(&path, rebooted.to_string()).expect("a file");
        let (remembered, ago) = read(&path, "a").expect("a memory");
        let is_over = remembered.evacuation.expect("it was on").is_over;
        assert_eq!((is_over, remembered.switch.stamp), (true, 3), "{member}");
        assert_eq!(remembered.draining, [], "cookies begin anew with the machine: {member}");
        let half_a_century = Duration::from_secs(50 * 365 * 86_400);
        assert!(
            ago > half_a_century,
            "it was written in 1970 by the wall clock: {ago:?}"
        );
        // That clock was set back since.
        rebooted["at_unix_ms"] = u64::MAX.into();
        fs::write(&path, rebooted.to_string()).expect("a file");
        assert_eq!(read(&path, "a").expect("a memory").1, Duration::ZERO, "{member}");
    }
    // A file of before, which has neither.
    let mut old: serde_json::Value = serde_json::from_str(&whole).expect("JSON");
    for member in ["up_ms", "boot"] {
        old.as_object_mut().expect("an object").remove(member);
    }
    fs::write(&path, old.to_string()).expect("a file");
    let (remembered, ago) = read(&path, "a").expect("a memory");
    assert!(
        remembered.draining.len() == 2 && ago > Duration::from_secs(86_400),
        "{ago:?}"
    );
}

#[tokio::test]
async fn a_disk_that_takes_nothing_stops_nobody() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("no/such/directory/agent.state");
    let mut file = StateFile::start(path.clone()).expect("a thread");
    file.write("a", memory());
    assert!(!file.ticket().is_written().await, "and whoever asks is told");
    fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
    file.write("a", memory());
    assert!(file.ticket().is_written().await);
}
