//! The source of observations, opened again when it has failed.
//!
//! Job: pass observations on; after a failure open the source again at a deadline that nothing else postpones.
//! Must never lose its place when the loop drops the future, as it does for every other event, nor stop the loop while a
//! source is opened: loading kernel programs takes a while.

use std::{sync::Arc, time::Duration};

use rebalancer_core::observation::Observation;
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};

use crate::kernel::{Source, SourceError};

/// How long after a failure the source is opened again; twice as long after each further one.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What is watched: a [`Source`], or a test's.
pub trait Observe: Send + 'static {
    /// What happened since the last call. Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// It has failed for good.
    fn next(&mut self) -> impl Future<Output = Result<Vec<Observation>, SourceError>> + Send;

    /// Makes the next observation a complete list.
    fn resync(&mut self);

    /// Lists once more soon, beside the events.
    fn confirm(&mut self) {}
}

impl Observe for Source {
    async fn next(&mut self) -> Result<Vec<Observation>, SourceError> {
        Source::next(self).await
    }

    fn resync(&mut self) {
        Source::resync(self);
    }

    fn confirm(&mut self) {
        Source::confirm(self);
    }
}

type Open<S> = Arc<dyn Fn() -> Result<S, SourceError> + Send + Sync>;

/// A source, in whatever state it is.
pub struct Watch<S> {
    open: Open<S>,
    state: State<S>,
    wait: Duration,
    /// What was said last of a source that cannot be opened: the same again is not.
    said: String,
}

enum State<S> {
    Open(S),
    Failed { again_at: Instant },
    Opening(JoinHandle<Result<S, SourceError>>),
}

impl<S: Observe> Watch<S> {
    /// Watches an open source; `open` is how it is opened again.
    pub fn new(source: S, open: impl Fn() -> Result<S, SourceError> + Send + Sync + 'static) -> Self {
        Self {
            open: Arc::new(open),
            state: State::Open(source),
            wait: FIRST_WAIT,
            said: String::new(),
        }
    }

    /// What happened since the last call; dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// The source that was open has failed. The next call opens it again, when it is time.
    pub async fn next(&mut self) -> Result<Vec<Observation>, SourceError> {
        loop {
            let failed = match &mut self.state {
                State::Open(source) => match source.next().await {
                    Ok(observations) => {
                        self.wait = FIRST_WAIT;
                        return Ok(observations);
                    }
                    Err(error) => {
                        self.fail();
                        return Err(error);
                    }
                },
                State::Failed { again_at } => {
                    sleep_until(*again_at).await;
                    let open = Arc::clone(&self.open);
                    self.state = State::Opening(spawn_blocking(move || open()));
                    continue;
                }
                State::Opening(opening) => match opening.await {
                    Ok(Ok(source)) => {
                        tracing::info!("the source is open again");
                        self.said.clear();
                        self.state = State::Open(source);
                        continue;
                    }
                    Ok(Err(error)) => error.to_string(),
                    Err(panicked) => panicked.to_string(),
                },
            };
            self.fail();
            if failed != self.said {
                tracing::error!(error = %failed, again_in = ?self.wait, "the source cannot be opened again");
                self.said = failed;
            }
        }
    }

    /// Lists once more soon, beside the events.
    pub fn confirm(&mut self) {
        if let State::Open(source) = &mut self.state {
            source.confirm();
        }
    }

    /// Makes the next observation a complete list; what a source tells first after it was opened is one anyway.
    pub fn resync(&mut self) {
        if let State::Open(source) = &mut self.state {
            source.resync();
        }
    }

    fn fail(&mut self) {
        self.state = State::Failed {
            again_at: Instant::now() + self.wait,
        };
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{sync::mpsc, task::yield_now, time::timeout};

    use super::*;

    /// Fails at its first look, or lists nothing for ever.
    struct Fragile {
        fails: bool,
        has_waited: bool,
    }

    fn fragile(fails: bool) -> Fragile {
        Fragile {
            fails,
            has_waited: false,
        }
    }

    impl Observe for Fragile {
        async fn next(&mut self) -> Result<Vec<Observation>, SourceError> {
            if self.fails {
                return Err(SourceError::Sockdiag("netlink is gone".into()));
            }
            // As a real source does: there is something to wait for, the future may be dropped meanwhile, and nothing is lost.
            if !std::mem::replace(&mut self.has_waited, true) {
                yield_now().await;
            }
            Ok(vec![Observation::Resync {
                sockets: Vec::new(),
                listener: None,
            }])
        }

        fn resync(&mut self) {}
    }

    /// As the agent's loop does: whatever comes first drops the other.
    #[tokio::test]
    async fn a_source_that_failed_is_opened_again_while_the_channel_is_never_empty() {
        let (sender, mut inputs) = mpsc::channel(4);
        let busy = tokio::spawn(async move { while sender.send(()).await.is_ok() {} });
        let opened = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&opened);
        let mut watch = Watch::new(fragile(true), move || {
            // The second attempt fails too, and the third one does not.
            match counted.fetch_add(1, Ordering::SeqCst) {
                0 => Err(SourceError::Sockdiag("still gone".into())),
                _ => Ok(fragile(false)),
            }
        });
        let (mut failures, mut events) = (0, 0_u64);
        let listed = timeout(Duration::from_secs(120), async {
            loop {
                tokio::select! {
                    seen = watch.next() => match seen {
                        Err(_) => failures += 1,
                        Ok(observations) => return observations,
                    },
                    Some(()) = inputs.recv() => events += 1,
                }
                // Between two waits for the deadline there are always other events.
                yield_now().await;
            }
        })
        .await
        .expect("the source is opened again");
        assert!(matches!(listed[..], [Observation::Resync { .. }]));
        assert_eq!(failures, 1, "a source that is not open cannot fail again");
        assert_eq!(opened.load(Ordering::SeqCst), 2);
        assert!(events > 1_000, "the channel was busy: {events}");
        busy.abort();
    }
}
