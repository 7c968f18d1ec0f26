//! The agent's end of the probe, as `shim::link` is of a relay: reports and results as inputs of the core.
//!
//! Job: keep the probe on the apiserver, mark victims, say when they were told, pass requests on.
//! Must never leave a mark behind for a connection that is gone: another one may get its address.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use rebalancer_common::steer::{AGAIN_NS, ANSWER_HITS, ANSWER_RETURN_PROBE, ANSWER_TAKEN, ANSWERS, ClientKey, Victim};
use rebalancer_core::{
    agent::Input,
    ids::ConnectionId,
    shim::{Abilities, ConnectionState, GoawayOrder, GoawayResult, ShimReport},
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::{
    Attachment, SteerError, address,
    answers::Answers,
    comparison::{Candidate, Seen, candidates, compared},
};
use crate::{agent::handle::AgentHandle, random, sys};

/// How often is looked for victims that were told and for connections that are gone.
const LOOK: Duration = Duration::from_millis(200);

/// Every so many looks the requests are read and the process is looked at.
const REPORT_EVERY: u32 = 5;

/// How long after its expiry a victim is given up: the kernel program itself refuses it from the expiry on.
const GRACE: Duration = Duration::from_millis(100);

/// How long a victim that was told is told again.
const AGAIN: Duration = Duration::from_nanos(AGAIN_NS);

/// How long what somebody has left that has just ended may take to go.
const PREDECESSOR: Duration = Duration::from_secs(3);

/// After so many reports without its connection an address is forgotten.
const GONE: u32 = 5;

/// Clients that sent so many octets beyond their handshakes have asked for something.
const SURELY_ASKED: u64 = 64 * 1024;

/// A victim that was marked.
#[derive(Clone, Debug)]
struct Marked {
    client: SocketAddr,
    keys: Vec<ClientKey>,
    expires: Duration,
    told: bool,
}

/// The shim.
pub struct Steer {
    port: u16,
    path: Option<PathBuf>,
    /// Nobody is to be told: the apiserver's own lottery goes on.
    rehearses: bool,
    attached: Option<Attachment>,
    /// Why there is no attachment.
    fault: String,
    instance: u64,
    generation: u64,
    marked: BTreeMap<ConnectionId, Marked>,
    /// Connections that were told, as long as the table has them.
    told: BTreeSet<ConnectionId>,
    /// Addresses that were counted and belong to nobody the table knows, with the looks since: a connection may be younger
    /// than the table.
    strangers: HashMap<SocketAddr, u32>,
    /// This network namespace's interfaces, for link-local clients.
    zones: Vec<String>,
    answers: Answers,
    answered: [u64; ANSWERS as usize],
    /// The octets of clients when there were fewest since the probe was put there.
    octets_before: Option<u64>,
}

impl Steer {
    /// Puts the probe on the apiserver that listens on the port, or waits for one that does. In a rehearsal it answers nothing.
    ///
    /// # Errors
    ///
    /// Whatever is not certain, now, at the start: later it is waited for.
    pub fn start(port: u16, path: Option<PathBuf>, rehearses: bool, answers: Answers) -> Result<Self, SteerError> {
        // First what no restart of the apiserver mends.
        super::trial_load()?;
        let mut steer = Self {
            port,
            path,
            rehearses,
            attached: None,
            fault: String::new(),
            instance: random::u64(),
            generation: 0,
            marked: BTreeMap::new(),
            told: BTreeSet::new(),
            strangers: HashMap::new(),
            zones: address::zones(),
            answers,
            answered: [0; ANSWERS as usize],
            octets_before: None,
        };
        let patience = Instant::now() + PREDECESSOR;
        loop {
            match Attachment::new(port, steer.path.as_deref(), rehearses) {
                Ok(attachment) => steer.attach(attachment),
                Err(error) if error.is_passing() => {
                    tracing::info!("no probe for now: {error}");
                    steer.fault = error.to_string();
                }
                Err(error) if error.may_be_left_over() && Instant::now() < patience => {
                    thread::sleep(LOOK);
                    continue;
                }
                Err(error) => return Err(error),
            }
            return Ok(steer);
        }
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
        let mut look = 0_u32;
        loop {
            let order = tokio::select! {
                _ = looks.tick() => None,
                order = orders.recv() => match order {
                    None => return,
                    order => order,
                },
            };
            let said = match order {
                Some(order) => self.order(order, &agent).await,
                None => {
                    look = look.wrapping_add(1);
                    self.look(&agent, look.is_multiple_of(REPORT_EVERY)).await
                }
            };
            let Some(said) = said else { return };
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
            address = format_args!("{:#x}", attachment.address),
            "the probe is on the apiserver"
        );
        self.attached = Some(attachment);
        self.zones = address::zones();
        self.fault.clear();
        self.instance += 1;
        self.told.clear();
        self.strangers.clear();
        self.answered = [0; ANSWERS as usize];
        self.octets_before = None;
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
        match tokio::task::block_in_place(|| Attachment::new(self.port, self.path.as_deref(), self.rehearses)) {
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

    /// What there is to say now; `None` when the agent has ended.
    async fn look(&mut self, agent: &AgentHandle, report: bool) -> Option<Vec<Input>> {
        let mut said = if report { self.keep_attached() } else { Vec::new() };
        if !self.marked.is_empty() {
            let marked: Vec<ConnectionId> = self.marked.keys().copied().collect();
            let live: BTreeSet<ConnectionId> = agent
                .read(move |agent, _| {
                    let is_there = |id: &ConnectionId| agent.table().connection(*id).is_some();
                    marked.into_iter().filter(is_there).collect()
                })
                .await
                .ok()?;
            let mut results = Vec::new();
            let followed = self.follow(&live, &mut results);
            // Also when it has failed halfway: what was found out until then is not said again.
            if !results.is_empty() {
                said.push(Input::GoawayAnswered(results));
            }
            if let Err(error) = followed {
                said.push(Input::ShimFailed(error.to_string()));
            }
        }
        if report {
            said.push(match self.report(agent).await? {
                Ok(report) => Input::Shim(report),
                Err(why) => Input::ShimFailed(why),
            });
        }
        Some(said)
    }

    /// Who was told, who expired, who is gone: `live` are the marked connections that are not. `results` has what was found
    /// out, whether or not the probe's map could be read to the end.
    fn follow(
        &mut self,
        live: &BTreeSet<ConnectionId>,
        results: &mut Vec<(ConnectionId, GoawayResult)>,
    ) -> Result<(), SteerError> {
        let Some(Attachment { program, .. }) = &mut self.attached else {
            return Ok(());
        };
        let now = sys::monotonic();
        let ids: Vec<ConnectionId> = self.marked.keys().copied().collect();
        for id in ids {
            let Some(marked) = self.marked.get_mut(&id) else {
                continue;
            };
            for key in &marked.keys {
                if !marked.told && program.told(key)?.is_some_and(|told| told > 0) {
                    marked.told = true;
                    self.told.insert(id);
                    results.push((id, GoawayResult::Sent));
                }
            }
            let until = marked.expires + if marked.told { AGAIN } else { GRACE };
            let result = if !live.contains(&id) {
                GoawayResult::Unknown
            } else if now > until {
                GoawayResult::Expired
            } else {
                continue;
            };
            for key in &marked.keys {
                program.unmark(key)?;
            }
            if !marked.told {
                results.push((id, result));
            }
            self.marked.remove(&id);
        }
        Ok(())
    }

    async fn order(&mut self, order: GoawayOrder, agent: &AgentHandle) -> Option<Vec<Input>> {
        let ids = order.victims.clone();
        let known = agent.read(move |agent, _| candidates(agent.table(), &ids)).await.ok()?;
        Some(vec![self.carry_out(order, &known)])
    }

    fn carry_out(&mut self, order: GoawayOrder, known: &BTreeMap<ConnectionId, Candidate>) -> Input {
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
        if let Some(fault) = self.fault_now() {
            return Input::GoawayFailed(victims, fault);
        }
        let Some(Attachment { program, .. }) = &mut self.attached else {
            return Input::GoawayFailed(victims, self.fault.clone());
        };
        let expires = sys::monotonic() + expires_in;
        let mut results = Vec::new();
        for id in &victims {
            let result = match known.get(id) {
                None => GoawayResult::Unknown,
                // An apiserver's own client, and addresses that two connections have: never victims.
                Some(known) if known.client.ip().is_loopback() || known.is_ambiguous => GoawayResult::Unknown,
                Some(known) if known.state == ConnectionState::Draining => GoawayResult::AlreadyDraining,
                Some(known) => {
                    let victim = Victim {
                        generation,
                        expires_ns: u64::try_from(expires.as_nanos()).unwrap_or(u64::MAX),
                        told: 0,
                    };
                    let keys = address::forms(known.client, &self.zones);
                    let marking = keys.iter().try_for_each(|key| program.mark(key, victim));
                    // What was marked is unmarked when it is over, whatever the answer.
                    let marked = Marked {
                        client: known.client,
                        keys,
                        expires,
                        told: false,
                    };
                    self.marked.insert(*id, marked);
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

    /// What changed since the last report; `None` when the agent has ended.
    async fn report(&mut self, agent: &AgentHandle) -> Option<Result<ShimReport, String>> {
        let Some(Attachment { program, .. }) = &self.attached else {
            return Some(Err(self.fault.clone()));
        };
        let mut counted = HashMap::new();
        match program.requests() {
            Err(error) => return Some(Err(error.to_string())),
            Ok(requests) => {
                for (key, requests) in requests {
                    // A link-local client's may be counted in several zones.
                    if let Some(client) = address::client(&key) {
                        *counted.entry(client).or_default() += requests;
                    }
                }
            }
        }
        let marked: HashMap<SocketAddr, ConnectionId> =
            self.marked.iter().map(|(id, marked)| (marked.client, *id)).collect();
        let told = self.told.clone();
        let (seen, gone) = agent
            .read(move |agent, _| {
                let gone: Vec<ConnectionId> = told
                    .iter()
                    .filter(|id| agent.table().connection(**id).is_none())
                    .copied()
                    .collect();
                (compared(agent.table(), &counted, &marked, &told), gone)
            })
            .await
            .ok()?;
        for id in gone {
            self.told.remove(&id);
        }
        Some(
            self.reported(seen)
                .map_err(|error| error.to_string())
                .and_then(|report| match self.fault_now() {
                    None => Ok(report),
                    Some(fault) => Err(fault),
                }),
        )
    }

    /// Takes out who is gone, and reads what was answered.
    fn reported(&mut self, seen: Seen) -> Result<ShimReport, SteerError> {
        let report = ShimReport {
            release: self
                .attached
                .as_ref()
                .and_then(|attached| attached.point.build.release()),
            instance: format!("steer-{:x}", self.instance),
            generation: self.generation,
            abilities: Abilities::AT_REQUEST,
            connections: seen.connections,
            counters: seen.counters,
            ..ShimReport::default()
        };
        let Some(Attachment { program, process, .. }) = &mut self.attached else {
            return Ok(report);
        };
        for id in seen.shared {
            if let Some(marked) = self.marked.get(&id) {
                for key in &marked.keys {
                    program.unmark(key)?;
                }
            }
        }
        let mut strangers = HashMap::new();
        for client in seen.strangers {
            let looks = self.strangers.get(&client).map_or(1, |looks| looks + 1);
            if looks < GONE {
                strangers.insert(client, looks);
                continue;
            }
            for key in address::forms(client, &self.zones) {
                program.forget(&key)?;
            }
        }
        self.strangers = strangers;
        let answered = program.answered()?;
        let before = std::mem::replace(&mut self.answered, answered);
        let mut newly = [0; ANSWERS as usize];
        for (newly, (now, before)) in newly.iter_mut().zip(answered.iter().zip(before)) {
            *newly = now.saturating_sub(before);
        }
        self.answers.add(&newly);
        let pid = process.pid;
        let octets = seen
            .octets
            .saturating_sub(*self.octets_before.get_or_insert(seen.octets));
        self.octets_before = self.octets_before.map(|before| before.min(seen.octets));
        let fault = if newly[ANSWER_TAKEN as usize] > 0 {
            format!(
                "another program answers for process {pid} before the probe does ({} of {} requests): another agent, \
                 which must end before this one tells anybody",
                newly[ANSWER_TAKEN as usize], newly[ANSWER_HITS as usize]
            )
        } else if newly[ANSWER_RETURN_PROBE as usize] > 0 {
            format!(
                "another tool has a probe on the return of the decider of process {pid}: as long as it is there nothing is \
                 answered, and the apiserver's own lottery runs"
            )
        } else if answered[ANSWER_HITS as usize] == 0 && octets >= SURELY_ASKED {
            format!(
                "the probe on process {pid} was never reached, although clients sent {} KiB since it is there: the \
                 apiserver decides elsewhere (a build with a profile, another filter), or nobody speaks HTTP/2",
                octets / 1024
            )
        } else {
            String::new()
        };
        if !fault.is_empty() && self.fault.is_empty() {
            tracing::error!("nothing is told to go: {fault}");
        }
        self.fault = fault;
        Ok(report)
    }

    /// Why nothing can be told although the probe is in place.
    fn fault_now(&self) -> Option<String> {
        (!self.fault.is_empty()).then(|| self.fault.clone())
    }
}
