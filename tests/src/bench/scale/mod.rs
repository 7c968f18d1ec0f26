//! 64 apiservers and a million clients: an agent's parts measured at that size and around it, and the whole simulated.
//!
//! Job: say what grows how with the number of apiservers, what a rebalancing costs there, and where it breaks.
//! Output: [`Figures`]. Must never take a figure from one size to another: each is measured at its own.

mod page;
mod part;
mod simulated;
mod talk;

use std::process::{Command, Stdio};

use anyhow::Context as _;
use serde_json::{Value, json};

pub use part::{Part, part};
use simulated::Outcome;

/// How many apiservers the parts are measured with.
const SIZES: [usize; 5] = [3, 16, 64, 128, 256];

/// Clients of all apiservers.
const CLIENTS: u64 = 1_000_000;

/// The same in a quick run.
const FEW_CLIENTS: u64 = 64_000;

/// How often an agent asks each of its peers, a second (`agent/peers/mod.rs`).
const ASKED: f64 = 2.0;

/// Decisions a day at the default interval, when there is nothing to do.
const DECISIONS_A_DAY: f64 = 86_400.0 / 5.0;

/// The figures.
#[derive(Debug)]
pub struct Figures {
    /// Clients of all apiservers.
    clients: u64,
    /// For how many seconds the agents' talk was watched.
    seconds: u64,
    parts: Vec<Part>,
    runs: Vec<Outcome>,
}

/// Measures and simulates; `say` hears what is being done.
///
/// # Errors
///
/// A part cannot be measured.
pub fn run(quick: bool, say: impl Fn(&str)) -> anyhow::Result<Figures> {
    let (clients, seconds) = if quick { (FEW_CLIENTS, 3) } else { (CLIENTS, 10) };
    let mut parts = Vec::new();
    for apiservers in SIZES {
        say(&format!("one agent among {apiservers} apiservers"));
        parts.push(apart(apiservers, clients, seconds)?);
    }
    let runs = simulated::run(clients as usize, quick, &say);
    Ok(Figures {
        clients,
        seconds,
        parts,
        runs,
    })
}

/// In a process of its own: what memory it holds is seen from outside, and nothing is left of the size before.
fn apart(apiservers: usize, clients: u64, seconds: u64) -> anyhow::Result<Part> {
    let binary = std::env::current_exe().context("this program does not know its own file")?;
    let mut command = Command::new(binary);
    command.arg("scale-part");
    for (flag, value) in [
        ("--apiservers", apiservers as u64),
        ("--clients", clients),
        ("--seconds", seconds),
    ] {
        command.arg(flag).arg(value.to_string());
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("the part's process cannot be started")?;
    anyhow::ensure!(output.status.success(), "the part of {apiservers} apiservers failed");
    serde_json::from_slice(&output.stdout).context("the part's process did not say its figures")
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        json!({
            "clients": self.clients,
            "parts": self.parts,
            "runs": self.runs,
        })
    }
}
