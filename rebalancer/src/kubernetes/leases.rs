//! All Leases of one kind, as they are now: listed once, then watched, and listed again when the watch says nothing.
//!
//! Output: the complete set after each change. Must never rest on a watch that is silent: what it does not deliver for half
//! a minute is listed, and one that missed something is replaced.

use std::{
    collections::BTreeMap,
    pin::pin,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api, Client,
    api::{ListParams, WatchEvent, WatchParams},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::access::{Access, Asked, Failed, LEASES};

/// Leases are renewed every ten seconds: a watch that says nothing for so long is looked after.
const SILENCE: Duration = Duration::from_secs(30);

/// How long a watch goes on; the apiserver ends it, and the next goes on where it ended.
const WATCH: Duration = Duration::from_secs(280);

/// After a failure.
const RETRY: Duration = Duration::from_secs(10);

/// A watch that ends sooner was refused, whatever it said.
const SHORT: Duration = Duration::from_secs(5);

/// So many are asked for at once; whoever may write Leases cannot make an answer larger.
const PAGE: u32 = 300;

/// What was read.
#[derive(Debug)]
pub struct Reading {
    /// The kind, as the reader was told.
    pub kind: Kind,
    /// All of them, or why not.
    pub leases: Result<Vec<Lease>, String>,
}

/// Which Leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Agents'.
    Agents,
    /// Apiservers'.
    Apiservers,
}

/// What is read, and where.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The kind.
    pub kind: Kind,
    /// The namespace.
    pub namespace: String,
    /// Those with this label.
    pub selector: String,
}

/// The set as it is known.
#[derive(Default)]
struct Known {
    leases: BTreeMap<String, Lease>,
    version: String,
}

fn version(lease: &Lease) -> &str {
    lease.metadata.resource_version.as_deref().unwrap_or_default()
}

impl Known {
    fn put(&mut self, lease: Lease) {
        version(&lease).clone_into(&mut self.version);
        let name = lease.metadata.name.clone().unwrap_or_default();
        if self.leases.len() < PAGE as usize || self.leases.contains_key(&name) {
            self.leases.insert(name, lease);
        }
    }

    /// Whether the other set has the same Leases in the same versions.
    fn is_as(&self, other: &Self) -> bool {
        let versions = |known: &Self| -> Vec<(String, String)> {
            let named = |(name, lease): (&String, &Lease)| (name.clone(), version(lease).to_owned());
            known.leases.iter().map(named).collect()
        };
        versions(self) == versions(other)
    }
}

/// Reads for as long as somebody listens.
pub async fn follow(access: Access, wanted: Wanted, readings: mpsc::Sender<Reading>) {
    let mut known = Known::default();
    let mut is_listed = false;
    loop {
        let began = Instant::now();
        let went = async {
            if !is_listed {
                known = list(&access, &wanted).await?;
                is_listed = true;
                tell(&wanted, &known, &readings).await?;
            }
            watch(&access, &wanted, &mut known, &readings).await
        }
        .await;
        match went {
            Ok(()) => {}
            Err(Ended::Nobody) => return,
            Err(Ended::Outdated) => is_listed = false,
            Err(Ended::Failed(why)) => {
                is_listed = false;
                tracing::debug!(kind = ?wanted.kind, why, "Leases cannot be read");
                let reading = Reading {
                    kind: wanted.kind,
                    leases: Err(why),
                };
                if readings.send(reading).await.is_err() {
                    return;
                }
                sleep(RETRY).await;
                continue;
            }
        }
        if began.elapsed() < SHORT {
            sleep(RETRY).await;
        }
    }
}

/// Why a watch or a list is over.
enum Ended {
    Nobody,
    Outdated,
    Failed(String),
}

impl From<Failed> for Ended {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Outdated => Self::Outdated,
            Failed::Because(why) => Self::Failed(why),
        }
    }
}

async fn tell(wanted: &Wanted, known: &Known, readings: &mpsc::Sender<Reading>) -> Result<(), Ended> {
    let reading = Reading {
        kind: wanted.kind,
        leases: Ok(known.leases.values().cloned().collect()),
    };
    readings.send(reading).await.map_err(|_| Ended::Nobody)
}

async fn list(access: &Access, wanted: &Wanted) -> Result<Known, Ended> {
    let parameters = ListParams::default().labels(&wanted.selector).limit(PAGE);
    let asked = Asked {
        verb: "list",
        of: LEASES,
        namespace: &wanted.namespace,
    };
    let ask = |client: Client| {
        let (api, parameters) = (Api::<Lease>::namespaced(client, &wanted.namespace), parameters.clone());
        async move { api.list(&parameters).await }
    };
    let answer = access.ask(asked, ask).await?;
    let mut known = Known::default();
    for lease in answer.items {
        known.put(lease);
    }
    known.version = answer.metadata.resource_version.unwrap_or_default();
    Ok(known)
}

/// Watches until the apiserver ends it, which is no failure.
async fn watch(
    access: &Access,
    wanted: &Wanted,
    known: &mut Known,
    readings: &mpsc::Sender<Reading>,
) -> Result<(), Ended> {
    let parameters = WatchParams::default()
        .labels(&wanted.selector)
        .timeout(u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX));
    let asked = Asked {
        verb: "watch",
        of: LEASES,
        namespace: &wanted.namespace,
    };
    let from = known.version.clone();
    let ask = |client: Client| {
        let (api, parameters, from) = (
            Api::<Lease>::namespaced(client, &wanted.namespace),
            parameters.clone(),
            from.clone(),
        );
        async move { api.watch(&parameters, &from).await }
    };
    let mut events = pin!(match access.ask(asked, ask).await {
        Ok(events) => events,
        // Without a watch there is the list, every half minute.
        Err(Failed::Because(why)) => {
            tracing::debug!(why, "Leases cannot be watched: they are listed every half minute");
            sleep(SILENCE).await;
            return Err(Ended::Outdated);
        }
        Err(Failed::Outdated) => return Err(Ended::Outdated),
    });
    let began = Instant::now();
    loop {
        // An apiserver that does not end it is left.
        if began.elapsed() > WATCH + SILENCE {
            return Ok(());
        }
        let Ok(event) = timeout(SILENCE, events.next()).await else {
            let listed = list(access, wanted).await?;
            let is_as_listed = known.is_as(&listed);
            *known = listed;
            tell(wanted, known, readings).await?;
            if is_as_listed {
                continue;
            }
            tracing::warn!(kind = ?wanted.kind, "a watch of Leases has missed something: it is begun anew");
            return Ok(());
        };
        match event {
            None => return Ok(()),
            Some(Ok(WatchEvent::Added(lease) | WatchEvent::Modified(lease))) => known.put(lease),
            Some(Ok(WatchEvent::Deleted(lease))) => {
                version(&lease).clone_into(&mut known.version);
                known.leases.remove(lease.metadata.name.as_deref().unwrap_or_default());
            }
            Some(Ok(WatchEvent::Bookmark(bookmark))) => {
                known.version.clone_from(&bookmark.metadata.resource_version);
                continue;
            }
            // Too old, or the stream is garbled: all of it is read again.
            Some(Ok(WatchEvent::Error(_)) | Err(_)) => return Err(Ended::Outdated),
        }
        tell(wanted, known, readings).await?;
    }
}
