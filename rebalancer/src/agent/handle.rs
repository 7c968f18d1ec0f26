//! How other tasks talk to the agent's loop, which alone owns the core.
//!
//! Job: carry questions and commands in, decisions out.
//! Must never hold a lock on the core: the loop answers between two turns.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rebalancer_core::{
    agent::{Agent, Answer, Command},
    decision::Decision,
    ids::Timestamp,
};
use tokio::sync::{broadcast, mpsc, oneshot};

/// The clock of the agent's process: monotonic, from an origin.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: std::time::Instant,
}

impl Clock {
    /// Starts now.
    pub fn start() -> Self {
        Self {
            origin: std::time::Instant::now(),
        }
    }

    /// The instant now, for the core.
    pub fn now(&self) -> Timestamp {
        Timestamp::from_millis(u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// The wall time of an instant, for logs and the API: as the wall clock shows now, and counted back. A clock that was
    /// wrong when the agent started, and was set right since, makes no difference.
    pub fn wall(&self, at: Timestamp) -> SystemTime {
        let (now, wall) = (self.now(), SystemTime::now());
        if at > now {
            wall + at.since(now)
        } else {
            wall - now.since(at)
        }
    }

    /// The instant as tokio's timers want it.
    pub fn deadline(&self, at: Timestamp) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.origin + Duration::from_millis(at.as_millis()))
    }
}

/// A look at the core, between two of its turns.
pub type Look = dyn FnOnce(&Agent, Timestamp) + Send;

/// What other tasks ask of the loop.
pub enum Request {
    /// Look at the core.
    Read(Box<Look>),
    /// Tell the core something, and hear when it is done.
    Command(Command, oneshot::Sender<Answer>),
}

/// The loop has ended.
#[derive(Debug, thiserror::Error)]
#[error("the agent is shutting down")]
pub struct Gone;

/// A way to the agent's loop.
#[derive(Clone, Debug)]
pub struct AgentHandle {
    requests: mpsc::Sender<Request>,
    decisions: broadcast::Sender<Arc<Decision>>,
    /// The reason of the holds since the last decision that had another, or none.
    standing: Arc<Mutex<Option<(&'static str, Timestamp)>>>,
    /// The agent's clock.
    pub clock: Clock,
}

impl AgentHandle {
    /// A handle, and the receiving end that the loop keeps.
    pub fn new(clock: Clock) -> (Self, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(64);
        let (decisions, _) = broadcast::channel(64);
        (
            Self {
                requests,
                decisions,
                standing: Arc::default(),
                clock,
            },
            receiver,
        )
    }

    /// Looks at the core between two of its turns.
    ///
    /// # Errors
    ///
    /// [`Gone`] when the loop has ended.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Agent, Timestamp) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let (answer, answered) = oneshot::channel();
        let question = Request::Read(Box::new(move |agent, now| {
            // The asker may have gone away meanwhile: nobody misses the answer.
            let _ = answer.send(look(agent, now));
        }));
        self.requests.send(question).await.map_err(|_| Gone)?;
        answered.await.map_err(|_| Gone)
    }

    /// Tells the core something, and waits for its answer.
    ///
    /// # Errors
    ///
    /// [`Gone`] when the loop has ended.
    pub async fn command(&self, command: Command) -> Result<Answer, Gone> {
        let (done, is_done) = oneshot::channel();
        self.requests
            .send(Request::Command(command, done))
            .await
            .map_err(|_| Gone)?;
        is_done.await.map_err(|_| Gone)
    }

    /// Decisions from now on; a reader that is too slow loses the oldest.
    pub fn decisions(&self) -> broadcast::Receiver<Arc<Decision>> {
        self.decisions.subscribe()
    }

    /// Notes a new decision, and tells every reader of it.
    pub fn decided(&self, decision: &Decision) {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        *standing = decision.hold.as_ref().map(|hold| match *standing {
            Some((reason, since)) if reason == hold.reason() => (reason, since),
            _ => (hold.reason(), decision.at),
        });
        drop(standing);
        self.publish(decision);
    }

    /// Since when decisions have been holds for that reason, without a break.
    pub fn held_since(&self, reason: &str) -> Option<Timestamp> {
        let standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        standing.filter(|(held, _)| *held == reason).map(|(_, since)| since)
    }

    /// Tells every reader of a decision.
    pub fn publish(&self, decision: &Decision) {
        // No reader is no error.
        let _ = self.decisions.send(Arc::new(decision.clone()));
    }
}
