//! The agent's one event loop: it alone owns the core.
//!
//! Input: observations, the shim's and the peers' answers, operators' commands, time, signals.
//! Output: the core's effects, carried out. Must never decide anything itself, nor wait for a peer, shim or disk.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rebalancer_core::{
    agent::{Agent, Effect, Input},
    membership::Roll,
    observation::Observation,
    policy::Mode,
    shim::GoawayOrder,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc::{self, error::TrySendError},
    time::{MissedTickBehavior, interval, sleep_until},
};

use super::{
    api::{self, Context as ApiContext, FlowSource},
    config::{Config, Peering, Shim},
    handle::{AgentHandle, Clock, Request},
    heart::{BEAT, Heart},
    lb::LbPort,
    metrics::Metrics,
    peers::{
        self, Manners, TlsListener,
        tls::{FileTls, PeerTls},
    },
    record::Recorder,
    state::{self, StateFile},
    watch::{Observe, Watch},
};
use crate::{
    intercept::Intercept,
    kernel::Source,
    kubernetes,
    local::{self, SocketFile},
    random,
    relay::takeover,
    service,
    shim::link,
    span::Short,
    steer::Steer,
};

/// A shim that has said nothing for so long has died or stands still: its end asks once a second, and gives an answer ten
/// seconds.
const SHIM_SILENCE: Duration = Duration::from_secs(30);

/// An agent that has everything it needs.
pub struct Running {
    agent: Loop,
    source: Watch<Source>,
    inputs: mpsc::Receiver<Input>,
    requests: mpsc::Receiver<Request>,
    /// The local API's socket; its file goes when this goes.
    _file: SocketFile,
}

/// Opens everything an agent needs and starts what goes on beside its loop.
///
/// # Errors
///
/// A start that cannot succeed: what, where, and what to do.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    // Kernel types and a binary's symbols are some thirty megabytes for a moment, each time an apiserver starts.
    crate::heap::give_back();
    let clock = Clock::start();
    let (handle, requests) = AgentHandle::new(clock);
    let (inputs_sender, inputs) = mpsc::channel(256);
    let recorder = Recorder::open(config.decision_log.as_deref())?;
    let mut metrics = Metrics::new();
    // What another agent on this host has as well, first: nothing is attached that would have to go again at once.
    let peers = match &config.peers {
        None => None,
        Some(peers) => {
            let (tls, key) = match peers {
                Peering::Static(files) => (PeerTls::Files(FileTls::load(files)?), None),
                Peering::Kubernetes(_) => {
                    let (tls, key) = kubernetes::identity()?;
                    (tls, Some(key))
                }
            };
            let tls = Arc::new(tls);
            let refused = metrics.refused_handshakes();
            let listener = TlsListener::bind(peers.listen(), Arc::clone(&tls), refused).await?;
            Some((peers, tls, key, listener))
        }
    };
    let metrics_listener = TcpListener::bind(config.metrics)
        .await
        .with_context(|| format!("--metrics {}: cannot listen there", config.metrics))?;
    let lb_port = match config.lb_agent {
        Some(address) => Some(LbPort::bind(address, metrics.lb_answers())?),
        None => None,
    };
    let socket = local::bind(&config.api.0).context("--api")?;

    let watch = config.watch.clone();
    let source = Source::open(&watch)?;
    let source_name = source.name();
    if config.shim != Shim::None {
        metrics.with_shim();
    }
    let orders = start_shim(&config, &handle, &inputs_sender, &mut metrics)?;
    if let (true, Shim::Relay(socket)) = (config.intercept, &config.shim) {
        let intercept = Intercept::open(config.apiserver_port, metrics.intercepting()).context("--intercept")?;
        tokio::spawn(intercept.run(takeover::path_beside(&socket.0)));
    }
    let metrics = Arc::new(Mutex::new(metrics));
    let heart = Heart::start().context("cannot start the watchdog's thread")?;
    let remembered = state::read(&config.state, config.policy.node.as_str());
    let state = Arc::new(Mutex::new(StateFile::start(config.state.clone())?));
    let manners = Manners::default();
    let context = ApiContext {
        heart: Arc::clone(&heart),
        agent: handle.clone(),
        metrics: Arc::clone(&metrics),
        source: source_name,
        state: Arc::clone(&state),
        intercepts: config.intercept,
        flows: FlowSource {
            relay: match &config.shim {
                Shim::Relay(socket) => Some(socket.0.clone()),
                Shim::Steer(_) | Shim::None => None,
            },
            ..FlowSource::default()
        },
        manners: manners.clone(),
    };

    let (policy, instance) = (config.policy.clone(), random::u64());
    let mut roll = None;
    if let Some((peers, tls, key, listener)) = peers {
        tokio::spawn(peers::serve(listener, handle.clone(), Arc::clone(&tls)));
        let policy = Arc::new(policy.clone());
        match (peers, key) {
            (Peering::Kubernetes(kubernetes), Some(key)) => {
                roll = Some(Roll::unread("the Leases have not been read yet"));
                let requests = metrics
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .kubernetes_requests();
                let access = kubernetes::start(kubernetes::Parts {
                    policy,
                    apiserver_port: config.apiserver_port,
                    config: kubernetes.clone(),
                    clock,
                    requests,
                    tls,
                    manners,
                    key,
                    instance,
                    inputs: inputs_sender.clone(),
                    agent: handle.clone(),
                })
                .await?;
                context.flows.names.open(access);
            }
            (Peering::Static(files), _) => {
                let expiry = metrics
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .certificate_expiry();
                tokio::spawn(peers::tls::keep_fresh(Arc::clone(&tls), expiry));
                peers::ask_all(&files.addresses, &tls, &policy, &manners, &inputs_sender);
            }
            (Peering::Kubernetes(_), None) => anyhow::bail!("--peers kubernetes has no key"),
        }
    }
    if let Some(port) = lb_port {
        port.serve(handle.clone());
    }
    serve(
        "the metrics' port",
        metrics_listener,
        api::metrics_router(context.clone()),
    );
    serve("the local API", socket.listener, api::router(context));

    tracing::info!(
        node = %config.policy.node,
        port = config.apiserver_port,
        source = source_name,
        shim = super::wire::shim_name(config.policy.shim),
        mode = super::wire::mode_name(config.policy.mode),
        peers = %match &config.peers {
            Some(Peering::Kubernetes(_)) => "by Leases".to_owned(),
            _ => policy.peers.len().to_string(),
        },
        api = %config.api.0.display(),
        "watching"
    );
    let now = clock.now();
    let mut agent = match remembered {
        None => Agent::new(policy, instance, now),
        Some((memory, ago)) => {
            tracing::info!(
                path = %config.state.display(),
                written = %format_args!("{} ago", Short(ago)),
                cooldowns = memory.cooldowns.len(),
                paused = memory.pause.is_some(),
                "going on where the agent before this one ended"
            );
            Agent::with_memory(policy, instance, now, &memory, ago)
        }
    };
    if let Some(roll) = roll {
        agent.call_first(roll);
    }
    let saved = agent.memory_version();
    Ok(Running {
        agent: Loop {
            agent,
            clock,
            handle,
            recorder,
            metrics,
            orders,
            heart,
            state,
            saved,
            intercepts: config.intercept,
            said_node_local: false,
        },
        source: Watch::new(source, move || Source::open(&watch)),
        inputs,
        requests,
        _file: socket.guard,
    })
}

impl Running {
    /// Runs until SIGTERM or SIGINT.
    ///
    /// # Errors
    ///
    /// The system does not let it hear signals.
    pub async fn run(self) -> anyhow::Result<()> {
        self.agent.run(self.source, self.inputs, self.requests).await
    }
}

/// Starts the shim's link; its receiving end goes when the agent ends.
fn start_shim(
    config: &Config,
    agent: &AgentHandle,
    inputs: &mpsc::Sender<Input>,
    metrics: &mut Metrics,
) -> anyhow::Result<Option<mpsc::Sender<GoawayOrder>>> {
    match &config.shim {
        Shim::None => Ok(None),
        Shim::Relay(socket) => {
            let (orders, receiver) = mpsc::channel(16);
            // With --intercept clients reach the apiserver itself while the relay does not answer.
            let is_front_door = !config.intercept;
            tokio::spawn(link::run(socket.0.clone(), is_front_door, receiver, inputs.clone()));
            Ok(Some(orders))
        }
        Shim::Steer(path) => {
            let given = path.as_ref().map_or("auto".into(), |path| path.display().to_string());
            let answers = metrics.steer_answers();
            let rehearses = config.policy.mode == Mode::DryRun;
            let steer = Steer::start(config.apiserver_port, path.clone(), rehearses, answers).map_err(|error| {
                anyhow::anyhow!(
                    "--shim steer:{given} cannot be used: {error}. The alternative that needs nothing of kernel and \
                     binary: run `rebalancer relay` before the apiserver, and the agent with --shim relay:unix:PATH"
                )
            })?;
            let (orders, receiver) = mpsc::channel(16);
            tokio::spawn(steer.run(agent.clone(), receiver, inputs.clone()));
            Ok(Some(orders))
        }
    }
}

fn serve<L>(what: &'static str, listener: L, routes: axum::Router)
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::error!(%error, "{what} failed");
        }
    });
}

struct Loop {
    agent: Agent,
    clock: Clock,
    handle: AgentHandle,
    recorder: Recorder,
    metrics: Arc<Mutex<Metrics>>,
    orders: Option<mpsc::Sender<GoawayOrder>>,
    heart: Arc<Heart>,
    state: Arc<Mutex<StateFile>>,
    /// The version of the memory that was given to the state file.
    saved: u64,
    /// Whether connections are steered to a relay, which then reaches the apiserver from this node for each of them.
    intercepts: bool,
    said_node_local: bool,
}

impl Loop {
    async fn run<S: Observe>(
        mut self,
        mut source: Watch<S>,
        mut inputs: mpsc::Receiver<Input>,
        mut requests: mpsc::Receiver<Request>,
    ) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let mut hang_up = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The numbers this process gives are kept for it from the start: whoever comes after it goes on above them.
        self.save();
        let silence = || tokio::time::Instant::now() + SHIM_SILENCE;
        let mut shim_silent_at = silence();
        loop {
            self.heart.beat();
            let wake = self.clock.deadline(self.agent.next_wakeup(self.clock.now()));
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hang_up.recv() => self.recorder.reopen(),
                _ = beats.tick() => {
                    self.metrics().logged(self.recorder.counts());
                    self.remember(false);
                }
                seen = source.next() => match seen {
                    Ok(observations) => self.observed(observations, &mut source),
                    Err(error) => {
                        tracing::error!(%error, "the source failed: nothing is decided until it is back");
                        self.turn(Input::Observations(vec![Observation::Lost { events: 1 }]), &mut source);
                    }
                },
                Some(input) = inputs.recv() => {
                    if matches!(input, Input::Shim(_) | Input::ShimFailed(_) | Input::ShimStalled(_)) {
                        shim_silent_at = silence();
                    }
                    self.heard(input, &mut source);
                }
                Some(request) = requests.recv() => match request {
                    Request::Read(look) => look(&self.agent, self.clock.now()),
                    Request::Command(command, done) => {
                        let (answer, effects) = self.agent.command(self.clock.now(), command);
                        self.carry_out(effects, &mut source);
                        // Written before it is answered, or an operator would rely on what a restart forgets.
                        self.remember(true);
                        // The asker may have gone away.
                        let _ = done.send(answer);
                    }
                },
                () = sleep_until(shim_silent_at), if self.orders.is_some() => {
                    let why = format!("it has said nothing for {} s: its task has died or stands still", SHIM_SILENCE.as_secs());
                    tracing::error!("the shim: {why}");
                    shim_silent_at = silence();
                    self.turn(Input::ShimFailed(why), &mut source);
                }
                () = sleep_until(wake) => self.turn(Input::Tick, &mut source),
            }
        }
        service::stopping();
        self.save();
        tracing::info!("ending: nothing more is sent; clients that were told are on their way");
        Ok(())
    }

    /// Something that another task says.
    fn heard<S: Observe>(&mut self, input: Input, source: &mut Watch<S>) {
        match &input {
            Input::GoawayAnswered(results) => {
                let metrics = self.metrics();
                for (_, result) in results {
                    metrics.told(&self.agent, *result);
                }
            }
            Input::GoawayFailed(victims, why) => {
                tracing::error!(why, victims = victims.len(), "the shim did not carry out an order");
                self.metrics().goaway(&self.agent, "failed", victims.len());
            }
            _ => {}
        }
        self.turn(input, source);
    }

    /// Has written what a restart must not forget, when it has changed; at once where that is pressing, else when the file
    /// was written long enough ago.
    fn remember(&mut self, is_pressing: bool) {
        let version = self.agent.memory_version();
        let may = is_pressing || self.state.lock().unwrap_or_else(PoisonError::into_inner).is_ready();
        if may && std::mem::replace(&mut self.saved, version) != version {
            self.save();
        }
    }

    fn save(&self) {
        let memory = self.agent.memory(self.clock.now());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.write(self.agent.policy().node.as_str(), memory);
    }

    fn metrics(&self) -> std::sync::MutexGuard<'_, Metrics> {
        self.metrics.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn observed<S: Observe>(&mut self, observations: Vec<Observation>, source: &mut Watch<S>) {
        {
            let metrics = self.metrics();
            for observation in &observations {
                metrics.observed(match observation {
                    Observation::Opened(_) => "opened",
                    Observation::Classified { .. } => "classified",
                    Observation::Closed { .. } => "closed",
                    Observation::Listed { .. } => "listed",
                    Observation::Addresses(_) => "addresses",
                    Observation::HellosLost { .. } => "hellos_lost",
                    Observation::Blind(_) => "blind",
                    Observation::SharedPort(_) => "shared_port",
                    Observation::Lost { .. } => "lost",
                    Observation::Resync { .. } => "resync",
                });
            }
        }
        let listening = self.agent.table().is_listening();
        let trusted = self.agent.table().is_trusted();
        let repairs = self.agent.table().repairs();
        self.turn(Input::Observations(observations), source);
        let now = self.agent.table().repairs();
        if now != repairs {
            tracing::warn!(
                opened = now.opened - repairs.opened,
                closed = now.closed - repairs.closed,
                listener = now.listener - repairs.listener,
                "the kernel's list has put right what socket events did not tell"
            );
        }
        self.say_node_local();
        let now_listening = self.agent.table().is_listening();
        if listening != now_listening || !trusted {
            if now_listening {
                tracing::info!("the apiserver's port is open");
            } else {
                tracing::warn!("nobody listens on the apiserver's port in this network namespace");
            }
        }
    }

    /// Says once when most clients turn out to be on this node, where a load balancer is.
    fn say_node_local(&mut self) {
        let mostly = self.agent.table().is_mostly_node_local() && !self.intercepts;
        if mostly && !std::mem::replace(&mut self.said_node_local, true) {
            tracing::warn!("{}", super::wire::node_local_warning(self.agent.table()));
        }
    }

    fn turn<S: Observe>(&mut self, input: Input, source: &mut Watch<S>) {
        let began = Instant::now();
        let effects = self.agent.handle(self.clock.now(), input);
        self.metrics().turned(began.elapsed());
        self.carry_out(effects, source);
    }

    fn carry_out<S: Observe>(&mut self, effects: Vec<Effect>, source: &mut Watch<S>) {
        for effect in effects {
            match effect {
                Effect::SendGoaway(order) => self.send(order, source),
                Effect::Record(decision) => {
                    self.metrics().decided(&decision, &self.agent);
                    if decision.hold.is_none() && self.agent.policy().mode == Mode::DryRun {
                        self.metrics().goaway(&self.agent, "not_sent", decision.victims.len());
                    }
                    self.recorder.record(&decision, &self.clock);
                    self.handle.decided(&decision);
                }
                Effect::Settled(decision) => {
                    self.recorder.settled(&decision, &self.clock);
                    self.handle.publish(&decision);
                }
                Effect::Resync => source.resync(),
                Effect::Confirm => source.confirm(),
            }
        }
    }

    fn send<S: Observe>(&mut self, order: GoawayOrder, source: &mut Watch<S>) {
        let failed = match &self.orders {
            None => Some((order.victims, "there is no shim".to_owned())),
            Some(orders) => orders.try_send(order).err().map(|error| match error {
                // The link carries out one order at a time; a queue of them means that the shim hangs.
                TrySendError::Full(order) => (order.victims, "it is too slow: orders queue up".to_owned()),
                TrySendError::Closed(order) => (order.victims, "its task has died: restart the agent".to_owned()),
            }),
        };
        if let Some((victims, why)) = failed {
            self.heard(Input::GoawayFailed(victims, why), source);
        }
    }
}
