//! What is an upgrade and what is not, step by step.

use std::collections::BTreeSet;

use super::*;
use crate::{agent::Agent, policy::Policy, view::Entry};

const PATIENCE: Duration = Duration::from_secs(900);

/// Apiservers as they show themselves, and what an agent makes of it.
struct Cluster {
    shown: Vec<Snapshot>,
    upgrade: Upgrade,
    seconds: u64,
}

impl Cluster {
    fn new(count: usize) -> Self {
        let shown = (0..count).map(|index| {
            let name = ApiserverName::new(format!("n{index}"));
            let agent = Agent::new(Policy::new(name, BTreeSet::new()), 1, Timestamp::default());
            Snapshot {
                state: ServerState::Ready,
                release: Release::new("v1.35.0"),
                ..agent.snapshot(Timestamp::default())
            }
        });
        let mut cluster = Self {
            shown: shown.collect(),
            upgrade: Upgrade::default(),
            seconds: 0,
        };
        cluster.after(1);
        cluster
    }

    /// What holds after so many seconds with a look each.
    fn after(&mut self, seconds: u64) -> Option<Hold> {
        for _ in 0..seconds {
            self.seconds += 1;
            let entries = self.shown.iter().map(|snapshot| {
                let entry = Entry {
                    snapshot: snapshot.clone(),
                    age: Duration::ZERO,
                };
                (snapshot.apiserver.clone(), entry)
            });
            let view = View {
                entries: entries.collect(),
            };
            self.upgrade.look(&view, PATIENCE, self.now());
        }
        self.upgrade.hold(PATIENCE, self.now())
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_000 * self.seconds)
    }

    fn state(&mut self, index: usize, state: ServerState) {
        self.shown[index].state = state;
    }

    /// Down for half a minute, then up as that release.
    fn restart(&mut self, index: usize, release: &str) -> Option<Hold> {
        self.state(index, ServerState::Down);
        self.shown[index].restarts += 1;
        self.after(30);
        self.shown[index].release = Release::new(release);
        self.state(index, ServerState::Starting);
        self.after(5);
        self.state(index, ServerState::Ready);
        self.after(1)
    }

    fn evacuate(&mut self, index: usize) -> Option<Hold> {
        self.state(index, ServerState::Evacuating);
        self.after(60)
    }
}

const OLD: &str = "v1.35.0";
const NEW: &str = "v1.36.2";

#[test]
fn a_single_restart_is_none_however_often() {
    let mut cluster = Cluster::new(3);
    for _ in 0..5 {
        assert_eq!(cluster.restart(1, OLD), None);
    }
}

#[test]
fn one_that_is_slow_or_begins_for_the_first_time_is_none() {
    let mut cluster = Cluster::new(3);
    for index in 0..3 {
        cluster.state(index, ServerState::Down);
        cluster.after(5);
        cluster.state(index, ServerState::Ready);
        assert_eq!(cluster.after(5), None, "its agent did not see it end");
    }
    let mut cluster = Cluster::new(3);
    cluster.upgrade = Upgrade::default();
    for index in 0..2 {
        cluster.state(index, ServerState::Down);
    }
    cluster.after(1);
    for index in 0..2 {
        assert_eq!(cluster.restart(index, OLD), None, "the cluster begins");
    }
}

#[test]
fn releases_that_differ_are_one_until_the_last_has_the_new_one() {
    let mut cluster = Cluster::new(3);
    let said = cluster.restart(0, NEW).expect("a hold").to_string();
    assert!(said.contains("n0 is v1.36.2, n1 is v1.35.0"), "{said}");
    assert!(cluster.after(600).is_some());
    assert!(cluster.restart(1, NEW).is_some());
    assert!(cluster.after(600).is_some(), "each step begins the patience anew");
    cluster.state(2, ServerState::Down);
    cluster.shown[2].release = None;
    assert!(cluster.after(60).is_some(), "what it was is known while it is down");
    assert_eq!(cluster.restart(2, NEW), None, "over with the last");
    assert_eq!(cluster.restart(2, NEW), None, "and it is forgotten");
}

#[test]
fn one_that_is_not_gone_on_with_ends_with_the_patience_and_a_crash_loop_is_no_step() {
    let mut cluster = Cluster::new(3);
    assert!(cluster.restart(0, NEW).is_some());
    assert!(cluster.after(890).is_some());
    assert_eq!(cluster.after(10), None);
    for _ in 0..10 {
        assert_eq!(cluster.restart(0, NEW), None, "it had its turn");
        assert_eq!(cluster.after(300), None);
    }
    assert!(cluster.restart(1, NEW).is_some(), "it is gone on with");
}

#[test]
fn restarts_one_after_the_other_are_one_for_a_shorter_time() {
    let mut cluster = Cluster::new(3);
    assert_eq!(cluster.restart(0, OLD), None);
    cluster.after(200);
    let said = cluster.restart(1, OLD).expect("a hold").to_string();
    assert!(
        said.contains("n0, n1 restarted one after the other, n2 not yet"),
        "{said}"
    );
    assert_eq!(cluster.restart(2, OLD), None, "all had their turn");

    let mut cluster = Cluster::new(3);
    cluster.restart(0, OLD);
    assert!(cluster.restart(1, OLD).is_some());
    assert_eq!(cluster.after(300), None);
    cluster.restart(0, OLD);
    assert_eq!(
        cluster.restart(1, OLD),
        None,
        "two that crash again and again are not believed twice"
    );

    let mut cluster = Cluster::new(3);
    cluster.restart(0, OLD);
    cluster.after(310);
    assert_eq!(cluster.restart(1, OLD), None, "so long after each other they are two");
}

#[test]
fn an_evacuation_is_one_and_waits_for_the_next() {
    let mut cluster = Cluster::new(3);
    assert!(cluster.evacuate(0).is_some());
    let said = cluster.restart(0, OLD).expect("a hold").to_string();
    assert!(said.contains("n0 restarted"), "{said}");
    assert!(cluster.evacuate(1).is_some());
    assert!(cluster.restart(1, OLD).is_some());
    assert!(cluster.evacuate(2).is_some());
    assert_eq!(cluster.restart(2, OLD), None);

    let mut cluster = Cluster::new(3);
    cluster.evacuate(0);
    cluster.state(0, ServerState::Ready);
    assert_eq!(cluster.after(1), None, "it was returned, and nothing was restarted");
    cluster.evacuate(0);
    assert_eq!(cluster.after(900), None, "it stays evacuated");
    let mut cluster = Cluster::new(3);
    cluster.evacuate(0);
    cluster.restart(0, OLD);
    assert_eq!(cluster.after(300), None, "no other follows");
}

#[test]
fn what_an_agent_finds_when_it_begins_is_no_step_but_what_still_goes_on() {
    let mut cluster = Cluster::new(3);
    for snapshot in &mut cluster.shown {
        snapshot.restarts = 7;
    }
    cluster.upgrade = Upgrade::default();
    assert_eq!(cluster.after(1), None);
    cluster.shown[0].release = Release::new(NEW);
    cluster.upgrade = Upgrade::default();
    assert!(cluster.after(1).is_some());
    // Agents that are replaced restart no apiserver.
    let mut cluster = Cluster::new(3);
    for index in 0..3 {
        cluster.state(index, ServerState::Unknown);
        cluster.after(2);
        cluster.shown[index].instance += 1;
        cluster.shown[index].restarts = 0;
        cluster.shown[index].release = None;
        cluster.state(index, ServerState::Ready);
        assert_eq!(cluster.after(2), None);
    }
    // A machine that was: its agent was there before its apiserver.
    cluster.restart(0, OLD);
    cluster.shown[1].instance += 1;
    cluster.shown[1].restarts = 1;
    assert!(cluster.after(1).is_some());
}

#[test]
fn an_apiserver_that_is_new_or_left_counts_by_its_release() {
    let mut cluster = Cluster::new(3);
    let mut joined = cluster.shown[0].clone();
    joined.apiserver = ApiserverName::new("n3");
    joined.release = Release::new(NEW);
    cluster.shown.push(joined);
    assert!(cluster.after(1).is_some());
    cluster.shown.drain(..2);
    assert!(cluster.after(1).is_some());
    cluster.shown.remove(0);
    assert_eq!(cluster.after(1), None, "the old ones have left");
}

#[test]
fn without_patience_nothing_is_waited_for() {
    let mut cluster = Cluster::new(3);
    cluster.restart(0, NEW);
    assert_eq!(cluster.upgrade.hold(Duration::ZERO, cluster.now()), None);
}
