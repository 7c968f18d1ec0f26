//! Tables: what Leases and answers come to.

use super::*;

const HOUR: Duration = Duration::from_secs(3_600);

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_millis(seconds * 1_000)
}

fn key(of: u8) -> KeyHash {
    KeyHash::new([of; 32])
}

fn endpoint(last: u8, of: u8) -> Endpoint {
    Endpoint {
        address: SocketAddr::from(([192, 0, 2, last], 9443)),
        key: key(of),
    }
}

fn agent(node: &str, last: u8, of: u8) -> AgentLease {
    AgentLease {
        node: ApiserverName::new(node),
        host: node.to_owned(),
        endpoint: endpoint(last, of),
        release: "0.1.0".to_owned(),
        policy: "p".to_owned(),
        holder: format!("{node}-{of}"),
    }
}

use std::net::SocketAddr;

/// Leases as the API shows them, and an observer, the agent `a`, who looks every ten seconds.
struct World {
    now: u64,
    membership: Membership,
    agents: BTreeMap<String, (u64, Result<AgentLease, String>)>,
    apiservers: BTreeMap<String, u64>,
    /// Whose Leases are renewed.
    renewing: BTreeSet<String>,
    /// Who answers, where, and whether its apiserver is down.
    answering: BTreeMap<String, (Endpoint, bool)>,
    is_readable: bool,
    forbids_writing: bool,
    writes: u64,
}

impl World {
    /// Three nodes, all well.
    fn new() -> Self {
        let mut world = Self::of(&["a", "b", "c"]);
        for name in ["a", "b", "c"] {
            world.identity(name);
        }
        world
    }

    fn of(names: &[&str]) -> Self {
        let mut world = Self {
            now: 0,
            membership: Membership::new(agent("a", 1, 1)),
            agents: BTreeMap::new(),
            apiservers: BTreeMap::new(),
            renewing: BTreeSet::new(),
            answering: BTreeMap::new(),
            is_readable: true,
            forbids_writing: false,
            writes: 0,
        };
        for (index, name) in (1_u8..).zip(names) {
            world.joins(agent(name, index, index));
        }
        world
    }

    fn joins(&mut self, lease: AgentLease) {
        let name = lease.node.to_string();
        if name != "a" {
            self.answering.insert(name.clone(), (lease.endpoint, false));
        }
        self.claims(lease);
        self.renewing.insert(format!("agent {name}"));
    }

    fn claims(&mut self, lease: AgentLease) {
        self.writes += 1;
        self.agents.insert(lease_name(&lease.node), (self.writes, Ok(lease)));
    }

    fn identity(&mut self, host: &str) {
        self.writes += 1;
        self.apiservers.insert(host.to_owned(), self.writes);
        self.renewing.insert(format!("apiserver {host}"));
    }

    /// Power is cut: no renewal, no answer.
    fn dies(&mut self, name: &str) {
        self.renewing.remove(&format!("agent {name}"));
        self.renewing.remove(&format!("apiserver {name}"));
        self.answering.remove(name);
    }

    /// Time passes, with a look every two seconds, renewals every ten.
    fn runs(&mut self, seconds: u64) -> Roll {
        for _ in 0..seconds.div_ceil(2) {
            self.now += 2;
            let now = at(self.now);
            if self.is_readable {
                if self.now.is_multiple_of(10) {
                    for (name, (version, says)) in &mut self.agents {
                        let node = name.trim_start_matches("rebalancer-");
                        if self.renewing.contains(&format!("agent {node}")) && says.is_ok() {
                            self.writes += 1;
                            *version = self.writes;
                        }
                    }
                    for (host, version) in &mut self.apiservers {
                        if self.renewing.contains(&format!("apiserver {host}")) {
                            self.writes += 1;
                            *version = self.writes;
                        }
                    }
                    let is_forbidden = self.forbids_writing;
                    let forbidden = || "forbidden".to_owned();
                    self.membership
                        .renewed(now, if is_forbidden { Err(forbidden()) } else { Ok(()) });
                }
                let seen = |(name, (version, says)): (&String, &(u64, Result<AgentLease, String>))| Seen {
                    name: name.clone(),
                    version: version.to_string(),
                    says: says.clone(),
                };
                self.membership.agents(now, self.agents.iter().map(seen).collect());
                let seen = |(host, version): (&String, &u64)| Seen {
                    name: format!("apiserver-{host}"),
                    version: version.to_string(),
                    says: Ok(ApiserverLease { host: host.clone() }),
                };
                self.membership
                    .apiservers(now, self.apiservers.iter().map(seen).collect());
            }
            for (name, (endpoint, is_down)) in &self.answering {
                self.membership
                    .answered(now, &ApiserverName::new(name.as_str()), *endpoint, *is_down);
            }
            let roll = self.membership.roll(now);
            // What is asked follows the roll at once.
            for (name, asked) in &roll.ask {
                let there = self.answering.get(name.as_str());
                if there.is_some_and(|(endpoint, _)| endpoint == asked) {
                    self.membership
                        .answered(now, name, *asked, there.is_some_and(|(_, down)| *down));
                }
            }
        }
        self.membership.roll(at(self.now))
    }

    fn unreadable(&mut self) {
        self.is_readable = false;
        self.membership.agents_failed("forbidden".to_owned());
        self.membership.apiservers_failed("forbidden".to_owned());
    }
}

fn members(roll: &Roll) -> Vec<&str> {
    roll.members.keys().map(ApiserverName::as_str).collect()
}

fn gone(roll: &Roll) -> Vec<&str> {
    roll.gone.iter().map(ApiserverName::as_str).collect()
}

fn fault<'a>(roll: &'a Roll, name: &str) -> Option<&'a str> {
    roll.members[&ApiserverName::new(name)].fault.as_deref()
}

/// All is well: nobody is doubted.
fn is_well(roll: &Roll) -> bool {
    roll.doubt.is_none()
        && roll.blind.is_none()
        && roll.refused.is_empty()
        && roll.members.values().all(|one| one.fault.is_none())
}

#[test]
fn three_that_are_there_are_members_for_days() {
    let mut world = World::new();
    let roll = world.runs(20);
    assert_eq!(members(&roll), ["b", "c"]);
    assert_eq!(roll.basis, Basis::Identities);
    assert!(is_well(&roll), "{roll:?}");
    assert_eq!(roll.may_ask, BTreeSet::from([key(2), key(3)]));
    assert_eq!(world.runs(7_200), roll, "nothing changes");
}

#[test]
fn nothing_is_done_before_both_kinds_are_read_and_the_own_lease_is_written() {
    let mut membership = Membership::new(agent("a", 1, 1));
    assert!(membership.roll(at(0)).doubt.is_some());
    assert_eq!(membership.own_lease(), OwnLease::Unread);
    membership.agents(at(1), Vec::new());
    assert_eq!(membership.own_lease(), OwnLease::Create);
    assert!(membership.roll(at(1)).doubt.is_some(), "identities are not read");
    membership.apiservers(at(1), Vec::new());
    assert!(membership.roll(at(1)).doubt.is_some(), "nobody knows of this agent");
    membership.renewed(at(2), Err("forbidden: grant create".to_owned()));
    let doubt = membership.roll(at(2)).doubt.expect("a doubt");
    assert!(doubt.contains("grant create"), "{doubt}");
    membership.renewed(at(3), Ok(()));
    assert_eq!(membership.roll(at(3)).doubt, None);
}

#[test]
fn a_dead_node_is_gone_after_sixty_seconds_and_comes_back_by_itself() {
    let mut world = World::new();
    world.runs(20);
    world.dies("c");
    assert_eq!(members(&world.runs(58)), ["b", "c"], "not yet");
    let roll = world.runs(14);
    assert_eq!((members(&roll), gone(&roll)), (vec!["b"], vec!["c"]));
    assert!(is_well(&roll), "{roll:?}");
    assert!(roll.ask.contains_key(&ApiserverName::new("c")), "it is still asked");
    let later = world.runs(3_600);
    assert_eq!(gone(&later), ["c"], "its identity Lease stays for an hour or longer");
    world.joins(agent("c", 3, 33));
    world.identity("c");
    let roll = world.runs(12);
    assert_eq!((members(&roll), gone(&roll)), (vec!["b", "c"], vec![]));
    assert_eq!(roll.ask[&ApiserverName::new("c")], endpoint(3, 33), "with its new key");
}

/// One that is dead already when the observer starts: its Leases are an hour old by their own times, which nobody reads.
#[test]
fn leases_that_are_stale_from_the_start_are_gone_after_sixty_seconds_of_looking() {
    let mut world = World::new();
    world.dies("c");
    assert_eq!(members(&world.runs(20)), ["b", "c"]);
    assert_eq!(gone(&world.runs(60)), ["c"]);
}

#[test]
fn each_sign_of_life_alone_keeps_a_node() {
    for (what, lives) in [("agent c", "renewal"), ("apiserver c", "renewal"), ("", "answer")] {
        let mut world = World::new();
        world.runs(20);
        let answering = world.answering["c"];
        world.dies("c");
        if lives == "renewal" {
            world.renewing.insert(what.to_owned());
        } else {
            world.answering.insert("c".to_owned(), answering);
        }
        let roll = world.runs(300);
        assert_eq!(members(&roll), ["b", "c"], "{what} {lives}");
    }
}

#[test]
fn an_apiserver_without_an_agent_is_named_and_waited_for() {
    let mut world = World::of(&["a", "b"]);
    for host in ["a", "b", "c"] {
        world.identity(host);
    }
    let roll = world.runs(600);
    let said = fault(&roll, "c").expect("a fault");
    assert!(
        said.contains("apiserver runs on c") && said.contains("start one"),
        "{said}"
    );
    assert_eq!(roll.members[&ApiserverName::new("c")].endpoint, None);
    // It is stopped for good, and takes its Lease with it.
    world.apiservers.remove("c");
    assert_eq!(members(&world.runs(2)), ["b"]);
}

#[test]
fn without_identity_leases_the_set_is_the_agents() {
    let mut world = World::of(&["a", "b", "c"]);
    let roll = world.runs(20);
    assert_eq!(roll.basis, Basis::Agents);
    assert_eq!(members(&roll), ["b", "c"]);
    assert!(is_well(&roll), "{roll:?}");
    world.dies("b");
    let roll = world.runs(80);
    assert_eq!((members(&roll), gone(&roll)), (vec!["c"], vec!["b"]));
}

/// An apiserver that ends takes its identity Lease with it; its agent says that it is down.
#[test]
fn an_apiserver_that_restarts_stays_a_member() {
    let mut world = World::new();
    world.runs(20);
    world.apiservers.remove("c");
    // The observer's own does so too.
    world.apiservers.remove("a");
    world.answering.insert("c".to_owned(), (endpoint(3, 3), true));
    let roll = world.runs(300);
    assert_eq!(members(&roll), ["b", "c"]);
    assert!(is_well(&roll), "{roll:?}");
    world.identity("c");
    world.identity("a");
    world.answering.insert("c".to_owned(), (endpoint(3, 3), false));
    assert!(is_well(&world.runs(10)));
}

#[test]
fn while_the_api_cannot_be_read_nobody_leaves_and_time_begins_anew_afterwards() {
    let mut world = World::new();
    let before = world.runs(20);
    world.unreadable();
    world.dies("c");
    let roll = world.runs(600);
    assert_eq!(members(&roll), members(&before));
    assert_eq!(roll.blind.as_deref(), Some("forbidden"));
    assert_eq!(roll.doubt, None, "peers that answer are believed");
    world.is_readable = true;
    assert_eq!(members(&world.runs(50)), ["b", "c"], "nobody could renew meanwhile");
    assert_eq!(gone(&world.runs(20)), ["c"]);
}

#[test]
fn a_lease_that_cannot_be_written_while_others_can_be_read_is_a_doubt() {
    let mut world = World::new();
    world.runs(20);
    world.forbids_writing = true;
    assert_eq!(world.runs(40).doubt, None, "a few renewals may fail");
    let doubt = world.runs(20).doubt.expect("a doubt");
    assert!(
        doubt.contains("forbidden") && doubt.contains("take it for gone"),
        "{doubt}"
    );
    world.forbids_writing = false;
    assert!(is_well(&world.runs(10)));
}

/// A read that hangs is no failure that anybody reports.
#[test]
fn silence_of_the_api_is_blindness_too() {
    let mut world = World::new();
    world.runs(20);
    world.is_readable = false;
    for _ in 0..20 {
        let roll = world.runs(2);
        assert_eq!((roll.blind, roll.doubt), (None, None));
    }
    let roll = world.runs(20);
    assert!(roll.blind.is_some_and(|why| why.contains("ago last")));
    assert_eq!(roll.doubt, None, "that it cannot write either is no trouble of its own");
    world.dies("b");
    assert_eq!(members(&world.runs(600)), ["b", "c"]);
}

#[test]
fn a_restarted_agent_is_known_by_its_new_key_as_soon_as_the_old_one_is_silent() {
    let mut world = World::new();
    world.runs(20);
    world.joins(agent("b", 2, 22));
    let roll = world.runs(10);
    assert!(is_well(&roll), "{roll:?}");
    assert_eq!(roll.ask[&ApiserverName::new("b")], endpoint(2, 22));
    assert_eq!(roll.may_ask, BTreeSet::from([key(22), key(3)]));
}

/// Somebody writes b's Lease while b is alive: its key gets in nowhere.
#[test]
fn a_key_that_is_written_over_a_living_agents_is_refused_for_as_long_as_that_answers() {
    let mut world = World::new();
    world.runs(20);
    for forged in [endpoint(9, 99), endpoint(2, 99)] {
        let mut lease = agent("b", 2, 99);
        lease.endpoint = forged;
        world.claims(lease);
        let roll = world.runs(600);
        let said = fault(&roll, "b").expect("a fault");
        assert!(
            said.contains("still answers") && said.contains(&format!("{:.8}", key(99))),
            "{said}"
        );
        assert!(
            !roll.may_ask.contains(&key(99)) && roll.may_ask.contains(&key(2)),
            "{roll:?}"
        );
        assert_eq!(roll.ask[&ApiserverName::new("b")], endpoint(2, 2));
        world.joins(agent("b", 2, 2));
        assert!(is_well(&world.runs(10)));
    }
}

#[test]
fn the_own_lease_in_other_hands_is_a_doubt_and_is_left_to_them_while_they_renew_it() {
    let mut world = World::new();
    world.runs(20);
    let mut other = agent("a", 9, 99);
    other.holder = "another".to_owned();
    world.claims(other);
    let roll = world.runs(300);
    let said = roll.doubt.expect("a doubt");
    assert!(
        said.contains("two agents have the name a") && said.contains("192.0.2.9"),
        "{said}"
    );
    world.renewing.remove("agent a");
    world.runs(62);
    assert!(
        matches!(world.membership.own_lease(), OwnLease::Write(_)),
        "it was written once, and nobody renews it"
    );
}

#[test]
fn the_lease_of_the_process_before_is_taken_over_at_once() {
    let mut world = World::new();
    let mut before = agent("a", 1, 11);
    before.holder = "before".to_owned();
    world.claims(before);
    world.runs(2);
    assert!(
        matches!(world.membership.own_lease(), OwnLease::Write(_)),
        "nobody else can have its port"
    );
}

#[test]
fn a_forged_lease_of_no_apiserver_holds_up_nobody_and_is_named() {
    let mut world = World::new();
    world.runs(20);
    world.claims(agent("evil", 66, 66));
    world.renewing.insert("agent evil".to_owned());
    let roll = world.runs(300);
    assert_eq!(members(&roll), ["b", "c"]);
    assert_eq!(roll.doubt, None);
    assert!(
        roll.refused.iter().any(|why| why.contains("rebalancer-evil")),
        "{roll:?}"
    );
    assert!(!roll.may_ask.contains(&key(66)));
    // With an agent behind it, that says it is an apiserver: nobody knows who is right.
    world.answering.insert("evil".to_owned(), (endpoint(66, 66), false));
    let roll = world.runs(10);
    assert!(
        roll.doubt
            .is_some_and(|why| why.contains("evil") && why.contains("--node-name"))
    );
    assert!(!roll.may_ask.contains(&key(66)));
}

#[test]
fn a_lease_that_takes_anothers_host_is_refused() {
    let mut world = World::new();
    let mut thief = agent("thief", 66, 66);
    thief.host = "b".to_owned();
    world.claims(thief);
    let roll = world.runs(20);
    assert_eq!(members(&roll), ["b", "c"]);
    assert!(
        roll.refused.iter().any(|why| why.contains("rebalancer-thief")),
        "{roll:?}"
    );
}

#[test]
fn an_agent_is_matched_by_its_host_when_its_node_has_another_name() {
    let mut world = World::of(&["a", "b"]);
    world.identity("a");
    world.identity("ip-192-0-2-2");
    let mut lease = agent("b", 2, 2);
    lease.host = "ip-192-0-2-2".to_owned();
    world.claims(lease);
    let roll = world.runs(20);
    assert_eq!(members(&roll), ["b"]);
    assert!(is_well(&roll), "{roll:?}");
    // Two on one host are one too many.
    let mut twin = agent("b2", 7, 7);
    twin.host = "ip-192-0-2-2".to_owned();
    world.claims(twin);
    let said = world.runs(10).doubt.expect("a doubt");
    assert!(said.contains("b, b2"), "{said}");
}

#[test]
fn a_wrong_node_name_is_told_with_the_right_ones() {
    let mut world = World::of(&["a", "b"]);
    world.identity("cp-1");
    world.identity("b");
    let said = world.runs(20).doubt.expect("a doubt");
    assert!(said.contains("--node-name") && said.contains("b, cp-1"), "{said}");
}

#[test]
fn there_is_a_bound_to_what_is_read() {
    let mut world = World::new();
    for index in 0..2 * MOST {
        world.claims(agent(&format!("n{index}"), 9, 9));
    }
    let roll = world.runs(20);
    assert!(world.membership.agents.kept.len() <= MOST && world.membership.spokesmen.len() <= MOST);
    assert!(roll.doubt.is_some_and(|why| why.contains("more than")));
}

/// Clocks an hour apart: two observers whose clocks differ see the same, since neither reads the other's.
#[test]
fn what_is_seen_does_not_depend_on_when_the_clock_began() {
    let play = |origin: u64| {
        let mut world = World::new();
        world.now = origin;
        world.runs(20);
        world.dies("c");
        world.runs(70)
    };
    assert_eq!(play(0), play(HOUR.as_secs()));
}

#[test]
fn a_lease_is_read_as_it_was_written_and_nothing_else_is() {
    let lease = agent("cp-1.example.test", 1, 0xab);
    let annotations = lease.annotations();
    let labels = BTreeMap::new();
    let read = |name: &str, annotations: &BTreeMap<String, String>, holder: &str| {
        AgentLease::read(Shown {
            name,
            labels: &labels,
            annotations,
            holder,
        })
    };
    let name = "rebalancer-cp-1.example.test";
    assert_eq!(read(name, &annotations, &lease.holder), Ok(lease.clone()));
    assert!(read("rebalancer-cp-2", &annotations, "x").is_err_and(|why| why.contains("somebody else")));
    assert!(read("cp-1.example.test", &annotations, "x").is_err());
    assert!(read(name, &annotations, "").is_err());
    for missing in annotations.keys() {
        let mut fewer = annotations.clone();
        fewer.remove(missing);
        assert!(
            read(name, &fewer, "x").is_err_and(|why| why.contains(missing)),
            "{missing}"
        );
    }
    let long = "9".repeat(300);
    for (name_of, wrong) in [
        ("rebalancer/address", "192.0.2.1"),
        ("rebalancer/address", "0.0.0.0:9443"),
        ("rebalancer/address", "192.0.2.1:0"),
        ("rebalancer/address", "cp-1:9443"),
        ("rebalancer/key-sha256", "ab"),
        ("rebalancer/key-sha256", &"é".repeat(32)),
        ("rebalancer/key-sha256", &format!("+{}", "a".repeat(63))),
        ("rebalancer/version", &long),
    ] {
        let mut changed = annotations.clone();
        changed.insert(name_of.to_owned(), wrong.to_owned());
        assert!(read(name, &changed, "x").is_err(), "{name_of}: {wrong}");
    }
    assert_eq!(key(0xab).to_string().parse(), Ok(key(0xab)));
    assert_eq!(format!("{:.4}", KeyHash::new([0x12; 32])), "1212");
}

#[test]
fn names_that_no_lease_can_have_are_known() {
    for (name, can) in [
        ("cp-1", true),
        ("cp-1.example.test", true),
        ("CP-1", false),
        ("cp_1", false),
        ("-cp", false),
        ("cp.", false),
        ("", false),
        (&"a".repeat(242), true),
        (&"a".repeat(243), false),
    ] {
        assert_eq!(can_have_a_lease(&ApiserverName::new(name)), can, "{name}");
    }
}
