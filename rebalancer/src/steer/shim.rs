//! The agent's end of the probe, as `shim::link` is of a relay: reports and results as inputs of the core.
//!
//! Job: keep the probe on the apiserver, mark victims, say when they were told, pass requests on.
//! Must never leave a mark behind for a connection that is gone: another one may get its address.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use rebalancer_common::steer::{ANSWER_HITS, ANSWER_LEFT, ANSWER_NO, ANSWER_UNREADABLE, ANSWER_YES, ClientKey, Victim};
use rebalancer_core::{
    agent::{Agent, Input},
    ids::{ConnectionId, Protocol},
    shim::{ConnectionState, Counters, GoawayOrder, GoawayResult, ShimConnection, ShimReport},
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::{Attachment, SteerError, address};
use crate::{agent::handle::AgentHandle, random, sys};

/// How often is looked for victims that were told and for connections that are gone.
const LOOK: Duration = Duration::from_millis(200);

/// Every so many looks the requests are read and the process is looked at.
const REPORT_EVERY: u32 = 5;

/// How long after its expiry a victim is given up: the kernel program itself refuses it from the expiry on.
const GRACE: Duration = Duration::from_millis(100);

/// One connection of the agent's table.
#[derive(Clone, Debug)]
struct Known {
    client: SocketAddr,
    local: SocketAddr,
    protocol: Protocol,
    counters: Counters,
    state: ConnectionState,
}

type Table = BTreeMap<ConnectionId, Known>;

/// A victim that was marked.
#[derive(Clone, Debug)]
struct Marked {
    keys: Vec<ClientKey>,
    expires: Duration,
    told: bool,
}

/// The shim.
pub struct Steer {
    port: u16,
    path: Option<PathBuf>,
    attached: Option<Attachment>,
    /// Why there is no attachment.
    fault: String,
    instance: u64,
    generation: u64,
    marked: BTreeMap<ConnectionId, Marked>,
    /// The connections of the last report, whose requests are to be forgotten when they are gone.
    seen: BTreeMap<ConnectionId, SocketAddr>,
    /// This network namespace's interfaces, for link-local clients.
    zones: Vec<String>,
}

impl Steer {
    /// Puts the probe on the apiserver that listens on the port; one that is not up yet, as when the node boots, is waited
    /// for.
    ///
    /// # Errors
    ///
    /// Whatever is not certain, and does not pass by itself.
    pub fn start(port: u16, path: Option<PathBuf>) -> Result<Self, SteerError> {
        // First what no restart of the apiserver mends.
        super::trial_load()?;
        let (attachment, fault) = match Attachment::new(port, path.as_deref()) {
            Ok(attachment) => (Some(attachment), String::new()),
            Err(error) if error.is_passing() => (None, error.to_string()),
            Err(error) => return Err(error),
        };
        let mut steer = Self {
            port,
            path,
            attached: None,
            fault,
            instance: random::u64(),
            generation: 0,
            marked: BTreeMap::new(),
            seen: BTreeMap::new(),
            zones: address::zones(),
        };
        match attachment {
            Some(attachment) => steer.attach(attachment),
            None => tracing::info!("no probe for now: {}", steer.fault),
        }
        Ok(steer)
    }

    /// Carries out orders until the agent ends.
    pub async fn run(
        mut self,
        agent: AgentHandle,
        mut orders: mpsc::Receiver<GoawayOrder>,
        inputs: mpsc::Sender<Input>,
    ) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = 0;
        loop {
            let order = tokio::select! {
                _ = looks.tick() => None,
                order = orders.recv() => match order {
                    None => return,
                    order => order,
                },
            };
            let Ok(table) = agent.read(|agent, _| connections(agent)).await else {
                return;
            };
            let said = match order {
                Some(order) => vec![self.carry_out(order, &table)],
                None => {
                    look += 1;
                    self.look(&table, look % REPORT_EVERY == 0)
                }
            };
            for input in said {
                if inputs.send(input).await.is_err() {
                    return;
                }
            }
        }
    }

    fn attach(&mut self, attachment: Attachment) {
        let Attachment { process, point, .. } = &attachment;
        tracing::info!(
            pid = process.pid,
            binary = %process.executable.display(),
            go = %point.build.version.text,
            apiserver = point.build.apiserver.as_deref().unwrap_or("unknown"),
            offset = format_args!("{:#x}", point.file_offset),
            "the probe is on the apiserver"
        );
        self.attached = Some(attachment);
        self.zones = address::zones();
        self.fault.clear();
        self.instance += 1;
        self.seen.clear();
    }

    /// Whether the probe is still where it belongs; a new apiserver gets one of its own.
    fn keep_attached(&mut self) -> Vec<Input> {
        let mut said = Vec::new();
        if let Some(attachment) = &self.attached {
            if attachment.holds() {
                return said;
            }
            tracing::warn!(
                pid = attachment.process.pid,
                "another process listens, or none: the probe is taken off, and put on the next apiserver"
            );
            self.attached = None;
            let given_up = std::mem::take(&mut self.marked).into_iter();
            let results: Vec<_> = given_up
                .filter(|(_, marked)| !marked.told)
                .map(|(id, _)| (id, GoawayResult::Unknown))
                .collect();
            if !results.is_empty() {
                said.push(Input::GoawayAnswered(results));
            }
        }
        // Scanning /proc takes some milliseconds: the runtime's other tasks go on meanwhile.
        match tokio::task::block_in_place(|| Attachment::new(self.port, self.path.as_deref())) {
            Ok(attachment) => self.attach(attachment),
            Err(error) => {
                let fault = error.to_string();
                if fault != self.fault {
                    if error.is_passing() {
                        tracing::info!("no probe for now: {fault}");
                    } else {
                        tracing::error!("no probe, so nothing is told to go: {fault}");
                    }
                    self.fault = fault;
                }
            }
        }
        said
    }

    fn look(&mut self, table: &Table, report: bool) -> Vec<Input> {
        let mut said = if report { self.keep_attached() } else { Vec::new() };
        match self.follow(table) {
            Ok(results) if results.is_empty() => {}
            Ok(results) => said.push(Input::GoawayAnswered(results)),
            Err(error) => said.push(Input::ShimFailed(error.to_string())),
        }
        if report {
            said.push(match self.report(table) {
                Ok(report) => Input::Shim(report),
                Err(why) => Input::ShimFailed(why),
            });
        }
        said
    }

    /// Who was told, who expired, who is gone.
    fn follow(&mut self, table: &Table) -> Result<Vec<(ConnectionId, GoawayResult)>, SteerError> {
        let mut results = Vec::new();
        let Some(Attachment { program, .. }) = &mut self.attached else {
            return Ok(results);
        };
        let now = sys::monotonic();
        let mut over = Vec::new();
        for (id, marked) in &mut self.marked {
            for key in &marked.keys {
                if !marked.told && program.told(key)?.is_some_and(|told| told > 0) {
                    marked.told = true;
                    results.push((*id, GoawayResult::Sent));
                }
            }
            let result = if !table.contains_key(id) {
                GoawayResult::Unknown
            } else if !marked.told && now > marked.expires + GRACE {
                GoawayResult::Expired
            } else {
                continue;
            };
            for key in &marked.keys {
                program.unmark(key)?;
            }
            over.push(*id);
            if !marked.told {
                results.push((*id, result));
            }
        }
        for id in over {
            self.marked.remove(&id);
        }
        Ok(results)
    }

    fn carry_out(&mut self, order: GoawayOrder, table: &Table) -> Input {
        let GoawayOrder {
            generation,
            expires_in,
            victims,
        } = order;
        if generation < self.generation {
            let why = format!(
                "generation {generation} is lower than {}, which was carried out before",
                self.generation
            );
            return Input::GoawayFailed(victims, why);
        }
        self.generation = generation;
        let Some(Attachment { program, .. }) = &mut self.attached else {
            return Input::GoawayFailed(victims, self.fault.clone());
        };
        let ambiguous = ambiguous(table);
        let expires = sys::monotonic() + expires_in;
        let mut results = Vec::new();
        for id in &victims {
            let result = match table.get(id) {
                None => GoawayResult::Unknown,
                // An apiserver's own client, and addresses that two connections have: never victims.
                Some(known) if known.client.ip().is_loopback() || ambiguous.contains(&known.client) => {
                    GoawayResult::Unknown
                }
                Some(known) if known.state == ConnectionState::Draining => GoawayResult::AlreadyDraining,
                Some(known) => {
                    let victim = Victim {
                        generation,
                        expires_ns: u64::try_from(expires.as_nanos()).unwrap_or(u64::MAX),
                        told: 0,
                    };
                    let keys = address::forms(known.client, &self.zones);
                    let marking = keys.iter().try_for_each(|key| program.mark(key, victim));
                    let told = false;
                    // What was marked is unmarked when it is over, whatever the answer.
                    self.marked.insert(*id, Marked { keys, expires, told });
                    match marking {
                        Ok(()) => GoawayResult::Pending,
                        Err(error) => {
                            tracing::error!(%error, "a victim could not be marked");
                            GoawayResult::Unknown
                        }
                    }
                }
            };
            results.push((*id, result));
        }
        Input::GoawayAnswered(results)
    }

    /// What changed since the last report.
    fn report(&mut self, table: &Table) -> Result<ShimReport, String> {
        let Some(Attachment { program, process, .. }) = &mut self.attached else {
            return Err(self.fault.clone());
        };
        let mut report = ShimReport {
            instance: format!("steer-{:x}", self.instance),
            generation: self.generation,
            ..ShimReport::default()
        };
        for (id, known) in table {
            let mut requests = 0;
            for key in address::forms(known.client, &self.zones) {
                requests += program.requests(&key).map_err(|error| error.to_string())?;
            }
            let told = self.marked.get(id).is_some_and(|marked| marked.told);
            self.seen.insert(*id, known.client);
            let counters = Counters {
                requests,
                ..known.counters
            };
            // What the table has is what was said: a table that was made anew is told anew.
            let is_news = (requests > 0 && known.protocol != Protocol::H2Selected)
                || (told && known.state != ConnectionState::Draining);
            if is_news {
                report.connections.push(ShimConnection {
                    id: *id,
                    client: known.client,
                    local: known.local,
                    // The apiserver asks for HTTP/2 only.
                    protocol: if requests > 0 {
                        Protocol::H2Selected
                    } else {
                        known.protocol
                    },
                    can_be_told: requests > 0 || known.protocol != Protocol::Http1,
                    state: if told { ConnectionState::Draining } else { known.state },
                    user: None,
                    user_agent: None,
                    counters,
                });
            } else if requests != known.counters.requests {
                report.counters.push((*id, counters));
            }
        }
        let live: BTreeSet<SocketAddr> = table.values().map(|known| known.client).collect();
        let gone: Vec<_> = self.seen.extract_if(.., |id, _| !table.contains_key(id)).collect();
        for (id, client) in gone {
            report.closed.push(id);
            if live.contains(&client) {
                continue;
            }
            for key in address::forms(client, &self.zones) {
                program.forget(&key).map_err(|error| error.to_string())?;
            }
        }
        let answered = program.answered().map_err(|error| error.to_string())?;
        tracing::debug!(
            pid = process.pid,
            hits = answered[ANSWER_HITS as usize],
            yes = answered[ANSWER_YES as usize],
            no = answered[ANSWER_NO as usize],
            left = answered[ANSWER_LEFT as usize],
            unreadable = answered[ANSWER_UNREADABLE as usize],
            "the probe's answers so far"
        );
        Ok(report)
    }
}

fn connections(agent: &Agent) -> Table {
    let known = |connection: &rebalancer_core::table::Connection| Known {
        client: connection.client(),
        local: connection.local(),
        protocol: connection.protocol,
        counters: connection.counters,
        state: connection.state,
    };
    agent
        .table()
        .iter()
        .map(|(id, connection)| (id, known(connection)))
        .collect()
}

/// Addresses that more than one connection has: a client may use one for two addresses of this node, or in two zones.
fn ambiguous(table: &Table) -> BTreeSet<SocketAddr> {
    let mut seen = BTreeSet::new();
    table
        .values()
        .map(|known| known.client)
        .filter(|client| !seen.insert(*client))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_two_connections_is_ambiguous() {
        let known = |client: &str, local: &str| Known {
            client: client.parse().expect("an address"),
            local: local.parse().expect("an address"),
            protocol: Protocol::H2Offered,
            counters: Counters::default(),
            state: ConnectionState::Active,
        };
        let table: Table = [
            known("10.0.0.1:5000", "10.0.0.9:6443"),
            known("10.0.0.1:5001", "10.0.0.9:6443"),
            known("10.0.0.1:5000", "10.0.0.10:6443"),
        ]
        .into_iter()
        .zip(1..)
        .map(|(known, id)| (ConnectionId(id), known))
        .collect();
        let twice = "10.0.0.1:5000".parse().expect("an address");
        assert_eq!(ambiguous(&table), BTreeSet::from([twice]));
    }
}
