//! Events on the Node (`events.k8s.io/v1`): what has changed, for whoever looks at the cluster and not at this agent.
//!
//! Input: decisions. Output: an Event a change, at a bounded rate. Must never hold anything up: what cannot be written is
//! dropped, and said once.

use std::time::Duration;

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use rebalancer_core::{
    ids::ApiserverName,
    news::{Change, News},
};
use tokio::{sync::broadcast::error::RecvError, time::Instant};

use super::access::{Access, Asked, EVENTS, Failed};
use crate::agent::handle::AgentHandle;

/// So many at once at most.
const BURST: f64 = 10.0;

/// After those, one in so much time.
const EACH: Duration = Duration::from_secs(60);

/// The longest text of an Event, in octets (kubernetes, pkg/apis/core/validation/events.go).
const LONGEST: usize = 1_024;

/// Where Events of objects without a namespace are.
const NAMESPACE: &str = "default";

/// Who says it.
const CONTROLLER: &str = "rebalancer";

/// Tells of every change from now on, until the agent ends.
pub fn start(access: Access, agent: AgentHandle, node: ApiserverName, holder: String) {
    let mut decisions = agent.decisions();
    tokio::spawn(async move {
        let mut teller = Teller {
            access,
            node,
            holder,
            rate: Rate::new(Instant::now()),
            said: String::new(),
        };
        let started = format!(
            "rebalancer {} counts the connections of this apiserver",
            env!("CARGO_PKG_VERSION")
        );
        teller.tell(Change::Started, started).await;
        let mut news = News::default();
        loop {
            match decisions.recv().await {
                Ok(decision) => {
                    if let Some((change, text)) = news.of(&decision) {
                        teller.tell(change, text).await;
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    });
}

struct Teller {
    access: Access,
    node: ApiserverName,
    holder: String,
    rate: Rate,
    /// The last failure that was said.
    said: String,
}

/// How many may be written.
struct Rate {
    left: f64,
    counted: Instant,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            counted: now,
        }
    }

    /// Whether one may be written now, which it then is.
    fn allows(&mut self, now: Instant) -> bool {
        let passed = now.duration_since(self.counted);
        self.counted = now;
        self.left = (self.left + passed.as_secs_f64() / EACH.as_secs_f64()).min(BURST);
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }
}

impl Teller {
    async fn tell(&mut self, change: Change, text: String) {
        if !self.rate.allows(Instant::now()) {
            tracing::warn!(
                reason = change.reason(),
                text,
                "no Event is written of it: there were many just now"
            );
            return;
        }
        let event = event(&self.node, &self.holder, change, &text);
        let asked = Asked {
            verb: "create",
            of: EVENTS,
            namespace: NAMESPACE,
        };
        let ask = |client: Client| {
            let (api, event) = (Api::<Event>::namespaced(client, NAMESPACE), event.clone());
            async move { api.create(&PostParams::default(), &event).await }
        };
        match self.access.ask(asked, ask).await {
            Ok(_) => self.said.clear(),
            // There is one of that name: an attempt that seemed to fail did not.
            Err(Failed::Outdated) => {}
            Err(Failed::Because(why)) if why == self.said => {}
            Err(Failed::Because(why)) => {
                tracing::warn!(why, "no Event can be written");
                self.said = why;
            }
        }
    }
}

fn event(node: &ApiserverName, holder: &str, change: Change, text: &str) -> Event {
    let now = jiff::Timestamp::now();
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Event {
        metadata: ObjectMeta {
            // As client-go names them: the object's name, and a number that no other Event of it has.
            name: Some(format!("{node}.{:x}", now.as_nanosecond())),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_string()),
            // The kubelet's own Events of a Node have its name here, and `kubectl describe node` looks for that.
            uid: Some(node.to_string()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some(CONTROLLER.to_owned()),
        // At most 128 octets.
        reporting_instance: Some(holder.chars().take(128).collect()),
        action: Some("Rebalance".to_owned()),
        reason: Some(change.reason().to_owned()),
        type_: Some(if change.is_warning() { "Warning" } else { "Normal" }.to_owned()),
        note: Some(text[..end].to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_at_once_and_one_a_minute_after_that() {
        let began = Instant::now();
        let mut rate = Rate::new(began);
        let written = |rate: &mut Rate, second: u64| rate.allows(began + Duration::from_secs(second));
        assert_eq!((0..100).filter(|_| written(&mut rate, 0)).count(), 10);
        // Asked for each second of an hour.
        assert_eq!((1..=3_600).filter(|second| written(&mut rate, *second)).count(), 60);
        assert_eq!(
            (0..100).filter(|_| written(&mut rate, 86_400)).count(),
            10,
            "a day of silence saves up no more"
        );
    }

    #[test]
    fn an_events_text_is_cut_between_characters() {
        let node = ApiserverName::new("cp-1");
        let event = event(&node, &"h".repeat(200), Change::Gone, &"\u{e9}".repeat(600));
        let note = event.note.expect("a text");
        assert_eq!((note.len(), note.chars().count()), (1_024, 512));
        assert_eq!(event.reporting_instance.map(|instance| instance.len()), Some(128));
        assert_eq!(event.regarding.and_then(|object| object.uid).as_deref(), Some("cp-1"));
    }
}
