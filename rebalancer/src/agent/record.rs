//! Writing decisions down: the decision log, the process's log, and whoever listens.
//!
//! Input: the core's decisions. Must never let a full disk or a slow reader stop the agent.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rebalancer_core::decision::Decision;

use super::{handle::Clock, wire};

/// Where decisions are written.
pub struct Recorder {
    log: Option<(PathBuf, File)>,
    failing: bool,
    last_hold: Option<&'static str>,
}

impl Recorder {
    /// Opens the decision log for appending, if one is wanted.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what the system says.
    pub fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let log = path
            .map(|path| {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .with_context(|| format!("--decision-log {}: cannot append to it", path.display()))?;
                anyhow::Ok((path.to_owned(), file))
            })
            .transpose()?;
        Ok(Self {
            log,
            failing: false,
            last_hold: None,
        })
    }

    /// A decision was made.
    pub fn record(&mut self, decision: &Decision, clock: &Clock) {
        match &decision.hold {
            None => {
                self.last_hold = None;
                tracing::info!(
                    id = decision.id,
                    generation = decision.generation,
                    mode = wire::mode_name(decision.mode),
                    victims = decision.victims.len(),
                    "{}",
                    decision.explanation
                );
            }
            // The same reason again is in the decision log, not here.
            Some(hold) if self.last_hold == Some(hold.reason()) => {
                tracing::debug!(id = decision.id, reason = hold.reason(), "{hold}");
            }
            Some(hold) => {
                self.last_hold = Some(hold.reason());
                tracing::info!(id = decision.id, reason = hold.reason(), "hold: {hold}");
            }
        }
        self.append(decision, clock);
    }

    /// The outcomes of an earlier decision are known: it is written again, with the same id.
    pub fn settled(&mut self, decision: &Decision, clock: &Clock) {
        tracing::info!(
            id = decision.id,
            generation = decision.generation,
            moved = decision.outcomes.moved,
            returned = decision.outcomes.returned,
            lost = decision.outcomes.lost,
            "the plan has settled"
        );
        self.append(decision, clock);
    }

    fn append(&mut self, decision: &Decision, clock: &Clock) {
        let Some((path, file)) = &mut self.log else {
            return;
        };
        let mut line = wire::decision(decision, clock).to_string();
        line.push('\n');
        match file.write_all(line.as_bytes()) {
            Ok(()) => self.failing = false,
            Err(error) => {
                if !self.failing {
                    tracing::error!(path = %path.display(), %error, "cannot append to the decision log");
                }
                self.failing = true;
            }
        }
    }
}
