//! The task that keeps the roll: it reads Leases, renews this agent's own, and has everybody on the roll asked.
//!
//! Input: readings of Leases, the peers' answers, time. Output: [`Input::Roll`] when it has changed, [`Input::Peer`] for each
//! answer, and the keys that may ask. Must never decide who is a member: the core's `membership` does.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use rebalancer_core::{
    agent::Input,
    ids::ApiserverName,
    membership::{
        AGENT_LABEL, AgentLease, ApiserverLease, Endpoint, IDENTITY_LABEL, Membership, OwnLease, Roll, Seen, Shown,
        can_be_reached, lease_name,
    },
    policy::Policy,
    view::{PeerFault, ServerState},
};
use rustls::pki_types::ServerName;
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

use super::{
    access::{self, Access, Asked, Failed, LEASES},
    events,
    leases::{self, Kind, Reading, Wanted},
    parts::Parts,
};
use crate::{
    agent::{
        config::PeerAddress,
        handle::Clock,
        peers::{self, Answer, Manners, Target, tls::PeerTls},
        wire,
    },
    sys,
};

/// How often the own Lease is renewed.
const RENEWAL: Duration = Duration::from_secs(10);

/// How often time alone may change the roll.
const LOOK: Duration = Duration::from_secs(1);

/// The field manager and the last part of the user agent.
const MANAGER: &str = "rebalancer";

/// Where identity Leases are (kubernetes, pkg/controlplane/apiserver/server.go).
const SYSTEM: &str = "kube-system";

/// Checks what an operator can mend, and starts the task; answers with the way to the API.
///
/// # Errors
///
/// There are no credentials, or this node has no address that others reach it by.
pub async fn start(parts: Parts) -> anyhow::Result<Access> {
    let config = &parts.config;
    let cluster = access::cluster_url(config.kubeconfig.as_deref()).await?;
    let address = match config.advertise {
        Some(address) => address,
        None if can_be_reached(config.listen.ip()) => config.listen.ip(),
        None => outgoing(&cluster)
            .context("--peer-advertise is not given, and the address that others reach this node by is not found")?,
    };
    let host = sys::host_name();
    let local = [IpAddr::from([127, 0, 0, 1]), address]
        .map(|address| (address, parts.apiserver_port))
        .to_vec();
    let access = Access::open(config.kubeconfig.clone(), local, parts.requests.clone()).await?;
    let own = AgentLease {
        node: parts.policy.node.clone(),
        host,
        endpoint: Endpoint {
            address: SocketAddr::new(address, config.listen.port()),
            key: parts.key,
        },
        release: env!("CARGO_PKG_VERSION").to_owned(),
        policy: wire::agreement_hash(&parts.policy),
        holder: format!("{}_{:016x}", parts.policy.node, parts.instance),
    };
    tracing::info!(
        lease = lease_name(&own.node),
        namespace = config.namespace,
        address = %own.endpoint.address,
        key = %own.endpoint.key,
        "peers are found by Leases"
    );
    events::start(
        access.clone(),
        parts.agent,
        parts.policy.node.clone(),
        own.holder.clone(),
    );
    let task = Task {
        membership: Membership::new(own),
        namespace: config.namespace.clone(),
        access: access.clone(),
        clock: parts.clock,
        policy: parts.policy,
        tls: parts.tls,
        manners: parts.manners,
        inputs: parts.inputs,
        followed: BTreeMap::new(),
        told: None,
    };
    tokio::spawn(task.run());
    Ok(access)
}

/// The address this host speaks from when it speaks to the cluster; nothing is sent.
fn outgoing(to: &http::Uri) -> anyhow::Result<IpAddr> {
    let host = to
        .host()
        .context("the credentials name no host")?
        .trim_matches(['[', ']']);
    let any = if host.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect((host, to.port_u16().unwrap_or(443)))?;
    let address = socket.local_addr()?.ip();
    anyhow::ensure!(!address.is_loopback(), "{host} is reached over the loopback interface");
    Ok(address)
}

struct Task {
    membership: Membership,
    namespace: String,
    access: Access,
    clock: Clock,
    policy: Arc<Policy>,
    tls: Arc<PeerTls>,
    manners: Manners,
    inputs: mpsc::Sender<Input>,
    followed: BTreeMap<ApiserverName, (Endpoint, JoinHandle<()>)>,
    told: Option<Roll>,
}

/// What became of a renewal: the version that was written.
type Renewed = Result<String, Failed>;

impl Task {
    async fn run(mut self) {
        let (readings, mut read) = mpsc::channel(16);
        for (kind, namespace, (label, value)) in [
            (Kind::Agents, self.namespace.as_str(), AGENT_LABEL),
            (Kind::Apiservers, SYSTEM, IDENTITY_LABEL),
        ] {
            let wanted = Wanted {
                kind,
                namespace: namespace.to_owned(),
                selector: format!("{label}={value}"),
            };
            tokio::spawn(leases::follow(self.access.clone(), wanted, readings.clone()));
        }
        let (answers, mut answered) = mpsc::channel::<Answer>(64);
        let (renewals, mut renewed) = mpsc::channel::<Renewed>(1);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due = tokio::time::Instant::now();
        let mut is_renewing = false;
        loop {
            tokio::select! {
                Some(reading) = read.recv() => self.read(reading),
                Some(answer) = answered.recv() => {
                    if self.heard(answer).await.is_err() {
                        return;
                    }
                }
                Some(result) = renewed.recv() => {
                    is_renewing = false;
                    self.written(result);
                }
                _ = looks.tick() => {}
            }
            if !is_renewing && tokio::time::Instant::now() >= due {
                let version = match self.membership.own_lease() {
                    OwnLease::Create => Some(None),
                    OwnLease::Write(version) => Some(Some(version)),
                    OwnLease::Foreign(_) | OwnLease::Unread => None,
                };
                if let Some(version) = version {
                    due = tokio::time::Instant::now() + RENEWAL;
                    is_renewing = true;
                    let (access, namespace) = (self.access.clone(), self.namespace.clone());
                    let (lease, renewals) = (lease_of(self.membership.own(), &namespace, version), renewals.clone());
                    tokio::spawn(async move {
                        // The task has ended: nobody waits for it.
                        let _ = renewals.send(write(&access, &namespace, lease).await).await;
                    });
                }
            }
            if self.call(&answers).await.is_err() {
                return;
            }
        }
    }

    fn read(&mut self, reading: Reading) {
        let now = self.clock.now();
        match (reading.kind, reading.leases) {
            (Kind::Agents, Ok(leases)) => self.membership.agents(now, seen(&leases, AgentLease::read)),
            (Kind::Apiservers, Ok(leases)) => self.membership.apiservers(now, seen(&leases, ApiserverLease::read)),
            (Kind::Agents, Err(why)) => self.membership.agents_failed(why),
            (Kind::Apiservers, Err(why)) => self.membership.apiservers_failed(why),
        }
    }

    fn written(&mut self, result: Renewed) {
        let now = self.clock.now();
        match result {
            Ok(version) => {
                self.membership.renewed(now, Ok(()));
                self.membership.wrote(now, version);
            }
            // The next reading says who wrote it.
            Err(Failed::Outdated) => {}
            Err(Failed::Because(why)) => self.membership.renewed(now, Err(why)),
        }
    }

    async fn heard(&mut self, answer: Answer) -> Result<(), mpsc::error::SendError<Input>> {
        let name = answer.target.at.name.clone();
        let pin = answer.target.pin;
        let Some((endpoint, _)) = self.followed.get(&name).filter(|(at, _)| Some(at.key) == pin) else {
            return Ok(());
        };
        match &answer.said {
            Ok(snapshot) if snapshot.apiserver == name => {
                // Neither renews the Lease of its apiserver.
                let is_down = matches!(snapshot.state, ServerState::Down | ServerState::Overloaded);
                self.membership.answered(self.clock.now(), &name, *endpoint, is_down);
            }
            // It is there, and of another release or with other flags.
            Err(PeerFault::Disagrees(_)) => self.membership.answered(self.clock.now(), &name, *endpoint, false),
            _ => {}
        }
        for input in answer.inputs() {
            self.inputs.send(input).await?;
        }
        Ok(())
    }

    /// Tells the loop when the roll has changed, and asks whom it names.
    async fn call(&mut self, answers: &mpsc::Sender<Answer>) -> Result<(), mpsc::error::SendError<Input>> {
        let roll = self.membership.roll(self.clock.now());
        if self.told.as_ref() == Some(&roll) {
            return Ok(());
        }
        say(self.told.as_ref(), &roll);
        if let PeerTls::Pinned(pinned) = &*self.tls {
            pinned.know(roll.may_ask.clone());
        }
        self.followed.retain(|name, (endpoint, task)| {
            let stays = roll.ask.get(name) == Some(endpoint);
            if !stays {
                task.abort();
                self.manners.forget(name);
            }
            stays
        });
        for (name, endpoint) in &roll.ask {
            if self.followed.contains_key(name) {
                continue;
            }
            let target = Target {
                at: PeerAddress {
                    name: name.clone(),
                    host: endpoint.address.ip().to_string(),
                    port: endpoint.address.port(),
                    server_name: ServerName::IpAddress(endpoint.address.ip().into()),
                },
                pin: Some(endpoint.key),
            };
            let task = tokio::spawn(peers::follow(
                target,
                Arc::clone(&self.tls),
                Arc::clone(&self.policy),
                self.manners.clone(),
                answers.clone(),
            ));
            self.followed.insert(name.clone(), (*endpoint, task));
        }
        self.told = Some(roll.clone());
        self.inputs.send(Input::Roll(roll)).await
    }
}

/// What has changed, for the log: each once.
fn say(before: Option<&Roll>, now: &Roll) {
    let named = |roll: Option<&Roll>| {
        roll.map(|roll| roll.members.keys().cloned().collect())
            .unwrap_or_default()
    };
    let (old, new): (Vec<ApiserverName>, Vec<ApiserverName>) = (named(before), named(Some(now)));
    if old != new {
        let names: Vec<_> = new.iter().map(ApiserverName::as_str).collect();
        tracing::info!(others = names.join(", "), by = ?now.basis, "the apiservers are others than before");
    }
    let others = |pick: fn(&Roll) -> &Option<String>| {
        let (old, new) = (before.and_then(|roll| pick(roll).as_ref()), pick(now).as_ref());
        (old != new).then_some(new).flatten().cloned()
    };
    if let Some(why) = others(|roll| &roll.doubt) {
        tracing::error!(why, "nothing is decided");
    }
    if let Some(why) = others(|roll| &roll.blind) {
        tracing::warn!(why, "the set of apiservers stays as it is");
    }
    for why in &now.refused {
        if !before.is_some_and(|roll| roll.refused.contains(why)) {
            tracing::error!(why, "a Lease is refused");
        }
    }
}

/// Leases as the core reads them.
fn seen<T>(leases: &[Lease], read: impl Fn(Shown<'_>) -> Result<T, String>) -> Vec<Seen<T>> {
    let none = BTreeMap::new();
    let one = |lease: &Lease| {
        let name = lease.metadata.name.clone().unwrap_or_default();
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        let says = read(Shown {
            name: &name,
            labels: lease.metadata.labels.as_ref().unwrap_or(&none),
            annotations: lease.metadata.annotations.as_ref().unwrap_or(&none),
            holder: holder.unwrap_or_default(),
        });
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        Seen { name, version, says }
    };
    leases.iter().map(one).collect()
}

fn lease_of(own: &AgentLease, namespace: &str, version: Option<String>) -> Lease {
    let (label, value) = AGENT_LABEL;
    Lease {
        metadata: ObjectMeta {
            name: Some(lease_name(&own.node)),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(label.to_owned(), value.to_owned())])),
            annotations: Some(own.annotations()),
            resource_version: version,
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(own.holder.clone()),
            lease_duration_seconds: Some(60),
            // For people; no agent reads it.
            renew_time: Some(MicroTime(jiff::Timestamp::now())),
            ..LeaseSpec::default()
        }),
    }
}

async fn write(access: &Access, namespace: &str, lease: Lease) -> Renewed {
    let is_new = lease.metadata.resource_version.is_none();
    let asked = Asked {
        verb: if is_new { "create" } else { "update" },
        of: LEASES,
        namespace,
    };
    let parameters = PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    };
    let ask = |client: Client| {
        let (api, parameters, lease) = (
            Api::<Lease>::namespaced(client, namespace),
            parameters.clone(),
            lease.clone(),
        );
        async move {
            if is_new {
                api.create(&parameters, &lease).await
            } else {
                let name = lease.metadata.name.clone().unwrap_or_default();
                api.replace(&name, &parameters, &lease).await
            }
        }
    };
    let written = access.ask(asked, ask).await?;
    Ok(written.metadata.resource_version.unwrap_or_default())
}
