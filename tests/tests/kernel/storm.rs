//! Any storm: opens and ends of every kind in any order, with the agent stopped meanwhile so that events are lost; and one
//! reconciliation later the table is the kernel's own list, to the last client and what it said.
//!
//! Each storm is drawn from a seed, which is printed: `REBALANCER_SEED` plays it again.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rebalancer_tests::process::wait_for;
use socket2::SockRef;

use crate::{
    ends::{End, crowd, destroy, dual},
    hellos::{lazy, says_at_once},
    world::{Host, PATIENCE, client_hello, ebpf_or_skip, established, has_cgroup2, is_mptcp},
};

/// Connections that open and end while nobody takes events: more than there is room for.
pub const FLOOD: usize = 10_000;

/// The same where there are no events: the socket list is polled.
const FLOOD_WITHOUT_EVENTS: usize = 1_000;

/// Of so many clients of a flood one says something: fewer hellos than their ring has room for.
const SPEAKS: usize = 20;

/// Numbers that a seed decides (Steele, Lea, Flood: SplitMix64).
struct Dice(u64);

impl Dice {
    /// Of this run, by the clock unless it is named.
    fn seeded(storm: u64) -> Self {
        let named = env::var("REBALANCER_SEED").ok();
        let seed = named.map_or_else(
            || {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                now.as_nanos() as u64 ^ storm
            },
            |text| text.parse().expect("REBALANCER_SEED is a number"),
        );
        eprintln!("REBALANCER_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// What a client says first, and what is known of it then.
struct Greeting {
    octets: Vec<u8>,
    protocol: &'static str,
}

/// Both ends of a connection that is open, and what is to be known of it.
struct Open {
    client: TcpStream,
    accepted: TcpStream,
    protocol: &'static str,
}

impl Open {
    fn address(&self) -> String {
        let address = self.client.local_addr().expect("an address");
        SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
    }
}

struct Storm {
    host: Host,
    listener: TcpListener,
    addresses: [SocketAddr; 2],
    dice: Dice,
    greetings: Vec<Greeting>,
    open: Vec<Open>,
    opened: usize,
}

impl Storm {
    fn new(source: &'static str, dice: Dice) -> Self {
        let mut host = Host::new(source);
        host.start_agent();
        let (listener, addresses) = dual(&host);
        let h2 = client_hello(&["h2", "http/1.1"]);
        let greeting = |octets: &[u8], protocol| Greeting {
            octets: octets.to_vec(),
            protocol,
        };
        Self {
            greetings: vec![
                greeting(&h2, "offered"),
                greeting(&client_hello(&["h2"]), "offered"),
                greeting(&client_hello(&["http/1.1"]), "http/1.1"),
                greeting(b"GET / HTTP/1.1\r\n\r\n", "http/1.1"),
                greeting(&h2[..60], "unknown"),
                greeting(b"", "unknown"),
            ],
            host,
            listener,
            addresses,
            dice,
            open: Vec::new(),
            opened: 0,
        }
    }

    /// So many clients come, of whom one in `speaks` says something; each that does not stay ends somehow, and so do some
    /// of those that were there.
    fn blow(&mut self, count: usize, speaks: usize, stays: usize) {
        let mut left = count;
        while left > 0 {
            let few = (1 + self.dice.below(250)).min(left);
            left -= few;
            self.opened += few;
            let to = self.addresses[self.dice.below(2)];
            for (mut client, mut accepted) in crowd(&self.host, to, &self.listener, few) {
                let mut protocol = "unknown";
                if self.dice.one_in(speaks) {
                    let said = &self.greetings[self.dice.below(self.greetings.len())];
                    client.write_all(&said.octets).expect("a greeting");
                    accepted
                        .read_exact(&mut vec![0; said.octets.len()])
                        .expect("it arrives");
                    protocol = said.protocol;
                }
                let one = Open {
                    client,
                    accepted,
                    protocol,
                };
                if self.dice.one_in(stays) {
                    self.open.push(one);
                } else {
                    self.end(one);
                }
            }
            for _ in 0..self.dice.below(4) {
                if !self.open.is_empty() {
                    let index = self.dice.below(self.open.len());
                    let one = self.open.swap_remove(index);
                    self.end(one);
                }
            }
        }
    }

    /// Some come whose hello ends the TCP handshake, and stay.
    fn blow_at_once(&mut self, count: usize) {
        for _ in 0..count {
            let said = &self.greetings[self.dice.below(4)];
            let (to, protocol) = (self.addresses[self.dice.below(2)], said.protocol);
            let (client, accepted) = says_at_once(&self.host, &self.listener, &said.octets, move || lazy(to));
            self.opened += 1;
            self.open.push(Open {
                client,
                accepted,
                protocol,
            });
        }
    }

    fn end(&mut self, one: Open) {
        let end = End::ALL[self.dice.below(End::ALL.len())];
        end.carry_out(one.client, one.accepted);
    }

    /// Some die: of the network, and by an administrator, where the kernel lets one.
    fn strike(&mut self) {
        let mut dead = Vec::new();
        while dead.len() < 8 && self.open.len() > 8 {
            let index = self.dice.below(self.open.len());
            dead.push(self.open.swap_remove(index));
        }
        let (cut_off, destroyed) = dead.split_at(dead.len() / 2);
        // What MPTCP has for a socket takes no such option.
        if !is_mptcp() {
            // Nothing is on its way then: a RST that is lost comes no second time.
            let there = self.open.iter().chain(cut_off).chain(destroyed);
            self.expect_in_kernel(&there.map(Open::address).collect());
            for Open { accepted, .. } in cut_off {
                SockRef::from(accepted)
                    .set_tcp_user_timeout(Some(Duration::from_secs(1)))
                    .expect("an option");
            }
            self.host.network.hub.ip("link set n0 down").expect("a link");
            for Open { accepted, .. } in cut_off {
                (&*accepted).write_all(b"into the void").expect("a write");
            }
            self.wait_until_gone(cut_off, "they time out");
            self.host.network.hub.ip("link set n0 up").expect("a link");
        }
        let clients: Vec<SocketAddr> = destroyed
            .iter()
            .map(|one| one.client.local_addr().expect("an address"))
            .collect();
        match destroy(&self.host, &clients) {
            Ok(()) => self.wait_until_gone(destroyed, "they are destroyed"),
            Err(why) => eprintln!("sockets cannot be destroyed here, these end as any other: {why}"),
        }
        drop(dead);
    }

    fn wait_until_gone(&self, whom: &[Open], what: &str) {
        let node = self.host.node().clone();
        wait_for(PATIENCE, || {
            let there = Host::inside(&node, established);
            (!whom.iter().any(|one| there.contains(&one.address()))).then_some(())
        })
        .unwrap_or_else(|| panic!("never: {what}"));
    }

    /// The kernel has these connections, after the moment that what ends takes.
    fn expect_in_kernel(&self, clients: &BTreeSet<String>) {
        let node = self.host.node().clone();
        let mut there = BTreeSet::new();
        let settled = wait_for(PATIENCE, || {
            there = Host::inside(&node, established);
            (there == *clients).then_some(())
        });
        assert!(
            settled.is_some(),
            "the kernel does not have what this test has left open: {:?} too many, {:?} too few",
            there.difference(clients).collect::<Vec<_>>(),
            clients.difference(&there).collect::<Vec<_>>()
        );
    }

    /// How often the agent has read the kernel's list and taken it in.
    fn lists(&self) -> u64 {
        ["resync", "listed"]
            .map(|kind| format!("rebalancer_bpf_events_total{{kind=\"{kind}\"}}"))
            .iter()
            .filter_map(|name| self.host.find_metric(name))
            .sum()
    }

    /// By the time the agent has read a list that began after all this, its table is what the kernel has.
    fn expect_the_truth(&mut self) {
        let books: BTreeMap<String, &'static str> = self.open.iter().map(|one| (one.address(), one.protocol)).collect();
        self.expect_in_kernel(&books.keys().cloned().collect());
        self.host.agent.as_ref().expect("it runs").signal(libc::SIGCONT);
        let is_blind = self.host.source == "sockdiag" || !has_cgroup2();
        let expected: BTreeMap<String, String> = books
            .into_iter()
            .map(|(client, protocol)| (client, if is_blind { "unknown" } else { protocol }.to_owned()))
            .collect();
        // One may have begun before.
        let last = self.lists() + 2;
        let told = wait_for(PATIENCE, || {
            let is_reconciled = self.lists() >= last;
            let answer = self.host.ask("/v1/connections?limit=100000")?;
            let seen: BTreeMap<String, String> = answer["connections"]
                .as_array()?
                .iter()
                .filter_map(|one| Some((one["client"].as_str()?.to_owned(), one["protocol"].as_str()?.to_owned())))
                .collect();
            let is_true = answer["total"] == expected.len() && seen == expected;
            (is_true || is_reconciled).then_some((answer["total"].clone(), seen))
        });
        let (total, seen) = told.expect("another list is read");
        assert_eq!(
            seen, expected,
            "the table and the kernel's list, with {}",
            self.host.source
        );
        assert_eq!(total, expected.len(), "none twice");
    }
}

fn storm(source: &'static str, dice: Dice) {
    let mut storm = Storm::new(source, dice);
    storm.blow(100, 1, 3);
    storm.expect_the_truth();
    for flood in [FLOOD, 0] {
        storm.host.agent.as_ref().expect("it runs").signal(libc::SIGSTOP);
        // What happens first is overwritten: some end whom the agent knows, and some come who stay.
        for _ in 0..storm.open.len() / 2 {
            let one = storm.open.swap_remove(0);
            storm.end(one);
        }
        storm.blow(60, 1, 1);
        storm.blow_at_once(10);
        let flood = if source == "ebpf" {
            flood
        } else {
            flood.min(FLOOD_WITHOUT_EVENTS)
        };
        storm.blow(flood, SPEAKS, 100);
        storm.strike();
        storm.blow(100, 1, 2);
        storm.expect_the_truth();
    }
    let lost = storm.host.figure("/lost_events_total");
    let (opened, open) = (storm.opened, storm.open.len());
    eprintln!("{source}: {opened} connections, {lost} events lost, {open} open in the end: as the kernel has it");
    if source == "ebpf" {
        assert!(lost > 0, "the storm was too small");
        for kind in ["opened", "closed"] {
            let repaired = storm.host.figure(&format!("/table_repairs/{kind}"));
            assert!(repaired > 0, "some of those that {kind} first were lost");
        }
        let lost = storm.host.metric("rebalancer_bpf_hellos_lost_total{kind=\"ring\"}");
        assert_eq!(lost, 0, "there was room for every hello");
    }
    for one in std::mem::take(&mut storm.open) {
        storm.end(one);
    }
    storm.expect_the_truth();
}

#[test]
fn after_any_storm_the_table_is_the_kernels_list() {
    let storms = if env::var_os("REBALANCER_LONG").is_some() {
        20
    } else {
        1
    };
    for number in 0..storms {
        for source in ["ebpf", "sockdiag"] {
            if source == "sockdiag" || ebpf_or_skip() {
                storm(source, Dice::seeded(number));
            }
        }
    }
}
