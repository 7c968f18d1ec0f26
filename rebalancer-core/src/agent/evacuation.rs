//! An apiserver that is to be restarted: its clients are told to go, all that can be, and it is nobody's recipient meanwhile.
//!
//! Job: tell in waves until nobody is left who can be told; end with an operator's word or the apiserver's restart.
//! Input: the table, what the shim says of the server behind it. Output: plans that are orders, what is left, and why.
//! Must never tell for ever: a load balancer that sends everybody back is named, and left alone.

use std::time::Duration;

use super::{Agent, Effect};
use crate::{
    decision::{Fate, Victim},
    hold::Hold,
    ids::{ConnectionId, Protocol, ShimKind, Timestamp},
    planner::LeftOut,
    policy::{Mode, NodeLocal},
    shim::{ConnectionState, ShimReport},
    table::Connection,
    view::ServerState,
};

/// Between two waves so much time passes at the least: those who were told land meanwhile.
const PAUSE: Duration = Duration::from_secs(1);

/// Within [`WINDOW`] it tells no more than this many times the clients that were there, and [`SLACK`] more: behind a load
/// balancer that sends a share `r` of them back it takes `1 / (1 - r)` times as many, and one that sends all of them back
/// would have it tell for ever.
const MOST: u64 = 4;

/// New clients that come meanwhile are told too.
const SLACK: u64 = 100;

/// See [`MOST`].
const WINDOW: Duration = Duration::from_secs(300);

/// An evacuation that is on.
#[derive(Clone, Debug)]
pub(super) struct Evacuation {
    since: Timestamp,
    /// How long it lasted before this process.
    before: Duration,
    /// The time from its begin in which all are told; who comes later is told at once.
    over: Duration,
    /// When the next one may begin.
    next: Timestamp,
    /// Clients it has told.
    told: u64,
    window: Option<Window>,
    /// The listening socket it began with: another one is another server process, where no shim knows better.
    listener: Option<ConnectionId>,
    /// The same of the server behind a shim.
    upstream: Option<u64>,
    /// The server behind the shim was seen to be gone: when it is back, it was restarted.
    was_gone: bool,
}

/// How much is told in a while.
#[derive(Clone, Copy, Debug)]
struct Window {
    began: Timestamp,
    told: u64,
    most: u64,
}

/// What a restart of the agent must not forget of an evacuation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RememberedEvacuation {
    /// How long it lasts.
    pub lasts: Duration,
    /// The time all are told in.
    pub over: Duration,
    /// The listening socket it began with.
    pub listener: Option<u64>,
    /// The same of the server behind a shim.
    pub upstream: Option<u64>,
    /// Whether the server behind the shim was seen to be gone.
    pub was_gone: bool,
    /// Whether it ended while no agent ran: the machine was started again.
    pub is_over: bool,
}

/// How far an evacuation is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How long it lasts.
    pub lasts: Duration,
    /// Clients that were told, those who came back each time.
    pub told: u64,
    /// Clients that can be told and have not left yet.
    pub to_go: u64,
    /// Those over HTTP/1.1, which hear it with their next answer: while they ask nothing they lose nothing.
    pub at_next_answer: u64,
    /// Connections that were told and still hold streams.
    pub draining: u64,
    /// Streams open on those.
    pub draining_streams: u64,
    /// Those that cannot be told, and why: they break when the apiserver stops.
    pub stay: Vec<(ConnectionId, LeftOut)>,
    /// Why nobody is told although somebody is left, or why it is not known who is left.
    pub stuck: Option<String>,
}

impl Progress {
    /// Whether everybody is off who can be told. Where it is not known who is there, as in an agent that just began, nobody
    /// is known to be off.
    pub fn is_done(&self) -> bool {
        self.to_go == 0 && self.draining == 0 && self.stuck.is_none()
    }
}

/// Why an evacuation cannot begin.
pub(super) fn refusal(agent: &Agent, now: Timestamp) -> Option<Hold> {
    if agent.policy.mode == Mode::DryRun {
        let why = "the agent only rehearses (--dry-run): nobody would be told".to_owned();
        return Some(Hold::ShimUnavailable { why });
    }
    let is_last = agent.refuge(now) != Some(true);
    let last = Hold::FewerThanTwoApiservers { apiservers: 1 };
    agent.order_doubt().or(is_last.then_some(last))
}

impl Agent {
    /// Has everybody told to go who can be; one that is on goes on.
    pub(super) fn evacuate(&mut self, now: Timestamp, over: Duration) {
        if self.evacuation.is_some() {
            return;
        }
        self.drop_unsent();
        self.evacuation = Some(Evacuation {
            since: now,
            before: Duration::ZERO,
            over,
            next: now,
            told: 0,
            window: None,
            listener: self.table.listener(),
            upstream: self.upstream_listener,
            was_gone: false,
        });
        self.memory_changes += 1;
        self.next_decision = now;
    }

    /// Takes clients again: as one that just started.
    pub(super) fn end_evacuation(&mut self, now: Timestamp) {
        if self.evacuation.take().is_none() {
            return;
        }
        self.returned = Some(now);
        self.up_since = Some(now);
        self.drop_unsent();
        self.memory_changes += 1;
        self.next_decision = now;
    }

    /// Goes on with one that another process began.
    pub(super) fn resume_evacuation(&mut self, remembered: &RememberedEvacuation, down: Duration, now: Timestamp) {
        if remembered.is_over {
            self.returned = Some(now);
            return;
        }
        let before = remembered.lasts.saturating_add(down);
        self.evacuation = Some(Evacuation {
            since: now,
            before,
            over: remembered.over,
            next: now,
            told: 0,
            window: None,
            listener: remembered.listener.map(ConnectionId),
            upstream: remembered.upstream,
            was_gone: remembered.was_gone,
        });
    }

    /// What another process needs to go on with it.
    pub(super) fn remembered_evacuation(&self, now: Timestamp) -> Option<RememberedEvacuation> {
        self.evacuation.as_ref().map(|evacuation| RememberedEvacuation {
            lasts: evacuation.lasts(now),
            over: evacuation.over,
            listener: evacuation.listener.map(|id| id.0),
            upstream: evacuation.upstream,
            was_gone: evacuation.was_gone,
            is_over: false,
        })
    }

    /// Another listening socket: the apiserver's own, unless there is a relay before it, whose socket says nothing of it.
    pub(super) fn listener_is(&mut self, now: Timestamp) {
        let Some(evacuation) = &self.evacuation else { return };
        let listener = self.table.listener();
        let is_another = listener.is_some() && evacuation.listener.is_some() && listener != evacuation.listener;
        if is_another && self.policy.shim != ShimKind::Relay {
            self.end_evacuation(now);
        }
    }

    /// What the shim says of the server behind it.
    pub(super) fn upstream_is(&mut self, report: &ShimReport, now: Timestamp) {
        let Some(evacuation) = &mut self.evacuation else { return };
        let (before, listener) = (evacuation.upstream, report.upstream_listener);
        if report.upstream_gone && !evacuation.was_gone {
            evacuation.was_gone = true;
            self.memory_changes += 1;
        } else if report.upstream_ready != Some(true) {
        } else if evacuation.was_gone || before.is_some() && listener.is_some() && listener != before {
            // The second: it was restarted together with the shim, which saw nothing of it.
            self.end_evacuation(now);
        } else if before.is_none() && listener.is_some() {
            evacuation.upstream = listener;
            self.memory_changes += 1;
        }
    }

    /// How far it is, while it is on.
    pub fn evacuation(&self, now: Timestamp) -> Option<Progress> {
        let evacuation = self.evacuation.as_ref()?;
        let (leave, stay) = self.leavers();
        let over_http1 = leave.iter().filter(|id| {
            let connection = self.table.connection(**id);
            connection.is_some_and(|connection| connection.protocol == Protocol::Http1)
        });
        let at_next_answer = over_http1.count() as u64;
        let to_go = leave.len() as u64 - at_next_answer;
        let stuck = if let Some(hold) = self.order_doubt() {
            Some(hold.to_string())
        } else if to_go == 0 {
            None
        } else if self.refuge(now) != Some(true) {
            Some("no other apiserver takes clients, as far as is known".to_owned())
        } else {
            evacuation.is_spent(now).then(|| {
                format!(
                    "{} were told and clients still come: the load balancer must send nobody here (--lb-agent tells it)",
                    evacuation.told
                )
            })
        };
        Some(Progress {
            lasts: evacuation.lasts(now),
            told: evacuation.told,
            to_go,
            at_next_answer,
            draining: self.table.draining() as u64,
            draining_streams: self.table.draining_streams(),
            stay,
            stuck,
        })
    }

    /// Whether one is on.
    pub fn is_evacuating(&self) -> bool {
        self.evacuation.is_some()
    }

    /// When one ended last, by an operator's word or the apiserver's restart.
    pub fn returned(&self) -> Option<Timestamp> {
        self.returned
    }

    /// Whether another apiserver takes clients; `None` where that is not known, because no peer was heard yet or not for a
    /// while. Nobody is sent away from the last one.
    pub(super) fn refuge(&self, now: Timestamp) -> Option<bool> {
        let mut are_all_known = self.peers.iter().next().is_some();
        for (_, peer) in self.peers.iter() {
            match &peer.snapshot {
                Some((at, snapshot)) if now.since(*at) <= self.policy.stale_after() => {
                    match snapshot.state {
                        ServerState::Ready | ServerState::Starting => return Some(true),
                        // Its agent does not know, and so does nobody.
                        ServerState::Unknown => are_all_known = false,
                        ServerState::Down | ServerState::Evacuating | ServerState::Overloaded => {}
                    }
                }
                _ => are_all_known = false,
            }
        }
        are_all_known.then_some(false)
    }

    /// Those who can be told, those over HTTP/2 first and of those who have the fewest watches, and those who cannot.
    fn leavers(&self) -> (Vec<ConnectionId>, Vec<(ConnectionId, LeftOut)>) {
        let mut leave: Vec<(bool, u32, ConnectionId)> = Vec::new();
        let mut stay = Vec::new();
        for connection in self.table.scan() {
            match self.stays(connection) {
                None => {
                    let is_http1 = connection.protocol == Protocol::Http1;
                    leave.push((is_http1, connection.counters.open_watches, connection.id));
                }
                Some(LeftOut::Draining) => {}
                Some(why) => stay.push((connection.id, why)),
            }
        }
        leave.sort_unstable();
        stay.sort_unstable_by_key(|(id, _)| *id);
        (leave.into_iter().map(|(.., id)| id).collect(), stay)
    }

    /// Why a connection stays. What the configuration excludes goes with the others: it would break with the apiserver.
    fn stays(&self, connection: &Connection) -> Option<LeftOut> {
        if connection.state == ConnectionState::Draining {
            return Some(LeftOut::Draining);
        }
        // It was there before the relay, which new connections are steered to.
        if self.policy.shim == ShimKind::Relay && !connection.is_with_shim() {
            return Some(LeftOut::Deaf);
        }
        match connection.protocol {
            Protocol::Http1 if !connection.can_hear() => Some(LeftOut::Deaf),
            // Of one that has not finished its handshake only the offer is known.
            _ if !connection.can_hear() => Some(LeftOut::UnknownProtocol),
            Protocol::Unknown => Some(LeftOut::UnknownProtocol),
            _ if connection.is_node_local() && self.policy.node_local != NodeLocal::Move => Some(LeftOut::NodeLocal),
            Protocol::Http1 | Protocol::H2Offered | Protocol::H2Selected => None,
        }
    }

    /// Begins the next wave when the one before has ended and somebody is left.
    pub(super) fn evacuate_on(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let Some(evacuation) = &self.evacuation else { return };
        if self.plan.is_some() || now < evacuation.next {
            return;
        }
        let may_tell = !evacuation.is_spent(now) && self.order_doubt().is_none() && self.refuge(now) == Some(true);
        let (mut leave, _) = if may_tell { self.leavers() } else { Default::default() };
        let Some(evacuation) = &mut self.evacuation else { return };
        evacuation.next = now + PAUSE;
        let room = evacuation.room(leave.len() as u64, now);
        leave.truncate(usize::try_from(room).unwrap_or(usize::MAX));
        if leave.is_empty() {
            return;
        }
        // What is left of the time, also for the agent that goes on with it.
        let over = evacuation.over.saturating_sub(evacuation.lasts(now));
        let victims: Vec<Victim> = leave.iter().filter_map(|id| self.leaver(*id, now)).collect();
        let explanation = format!("evacuating: telling all {} that can be told", victims.len());
        self.carry_out(now, victims, explanation, Some(over), effects);
        if let Some(plan) = &mut self.plan {
            plan.is_evacuation = true;
        }
    }

    fn leaver(&self, id: ConnectionId, now: Timestamp) -> Option<Victim> {
        let connection = self.table.connection(id)?;
        Some(Victim {
            connection: id,
            client: connection.client(),
            user: connection.user().map(str::to_owned),
            user_agent: connection.user_agent().map(str::to_owned),
            load: connection.load(self.policy.weight),
            age: now.since(connection.opened_at),
            why: "its apiserver is evacuated".to_owned(),
            fate: Fate::Pending,
        })
    }

    /// When it is to be looked for the next wave, if one may come.
    pub(super) fn next_wave(&self) -> Option<Timestamp> {
        let evacuation = self.evacuation.as_ref()?;
        self.plan.is_none().then_some(evacuation.next)
    }
}

impl Evacuation {
    fn lasts(&self, now: Timestamp) -> Duration {
        self.before.saturating_add(now.since(self.since))
    }

    fn is_spent(&self, now: Timestamp) -> bool {
        let window = self.window.filter(|window| now.since(window.began) < WINDOW);
        window.is_some_and(|window| window.told >= window.most)
    }

    /// How many may be told now, of so many who are there.
    fn room(&mut self, there: u64, now: Timestamp) -> u64 {
        let window = self
            .window
            .filter(|window| now.since(window.began) < WINDOW)
            .unwrap_or(Window {
                began: now,
                told: 0,
                most: MOST * there + SLACK,
            });
        self.window = Some(window);
        window.most - window.told.min(window.most)
    }

    /// A client was told: not who was only to be, or a shim that fails for a while would use up what may be told.
    pub(super) fn tells_one(&mut self) {
        self.told += 1;
        if let Some(window) = &mut self.window {
            window.told += 1;
        }
    }
}
