//! What it takes to hold the table against the kernel's list: the core alone, in this process.
//!
//! Must never measure how the list is read: that is the kernel's time.

use std::{net::SocketAddr, time::Duration};

use rebalancer_core::{
    ids::{ConnectionId, Timestamp},
    observation::{Observation, Socket},
    policy::NodeLocal,
    table::ConnectionTable,
};
use serde_json::{Value, json};

use super::machine::processor;

/// Connections in the table, and in the list.
const CONNECTIONS: u64 = 100_000;

/// So many of a thousand differ, each way, where something was missed.
const MISSED: u64 = 100;

/// How often: the least is the figure.
const ROUNDS: usize = 15;

/// The figures, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// A list that says what the table says.
    same: f64,
    /// One that differs: what is doubted is noted.
    doubt: f64,
    /// The next one, which confirms the doubts: the table is put right.
    repair: f64,
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        let rounded = |ms: f64| json!((ms * 100.0).round() / 100.0);
        json!({
            "connections": CONNECTIONS,
            "same_ms": rounded(self.same),
            "doubt_ms": rounded(self.doubt),
            "repair_ms": rounded(self.repair),
        })
    }

    /// The table, as Markdown.
    pub fn page(&self) -> String {
        let missed = CONNECTIONS * MISSED / 1000;
        format!(
            "{}, one core. The table of {CONNECTIONS} connections held against the kernel's list, in processor time; the least of \
             {ROUNDS} rounds.\n\n\
             | what | ms | bound |\n|---|--:|--:|\n\
             | nothing was missed | {:.1} | 50 |\n\
             | {missed} opens and {missed} closes were missed: they are doubted | {:.1} | 50 |\n\
             | the next list says so too: the table is put right | {:.1} | 50 |\n",
            processor(),
            self.same,
            self.doubt,
            self.repair,
        )
    }
}

fn socket(id: u64) -> Socket {
    Socket {
        // As the kernel gives them out: not one after the other.
        id: ConnectionId(id * 4096 + id % 7),
        local: SocketAddr::from(([10, 0, 0, 1], 6443)),
        remote: SocketAddr::from((
            [10, 1 + (id >> 16) as u8, (id >> 8) as u8, id as u8],
            1024 + (id % 60_000) as u16,
        )),
        bytes_in: 1_000 + id,
        bytes_out: 2_000 + id,
        start: 0,
    }
}

/// What this thread has had of a processor: a machine that is busy with others does not change it much.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives through the call, which fills it in; every thread has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Measures.
///
/// # Errors
///
/// The table does not become what the list says.
pub fn run() -> anyhow::Result<Figures> {
    let listener = Some(ConnectionId(1));
    let list = |ids: std::ops::Range<u64>| -> Vec<Socket> {
        // In the order of the kernel's hash table, which is none.
        let count = ids.end - ids.start;
        (0..count).map(|at| socket(ids.start + at * 7_919 % count)).collect()
    };
    let mut figures = Figures {
        same: f64::INFINITY,
        doubt: f64::INFINITY,
        repair: f64::INFINITY,
    };
    for _ in 0..ROUNDS {
        let mut table = ConnectionTable::new(NodeLocal::Exclude, Duration::ZERO);
        let sockets = list(0..CONNECTIONS);
        table.observe(Observation::Resync { sockets, listener }, Timestamp::from_millis(0));
        let mut timed = |ms: u64, sockets: Vec<Socket>| {
            let began = processor_time();
            table.observe(Observation::Listed { sockets, listener }, Timestamp::from_millis(ms));
            (processor_time() - began).as_secs_f64() * 1e3
        };
        let missed = CONNECTIONS * MISSED / 1000;
        figures.same = figures.same.min(timed(5_000, list(0..CONNECTIONS)));
        figures.doubt = figures.doubt.min(timed(10_000, list(missed..CONNECTIONS + missed)));
        figures.repair = figures.repair.min(timed(15_000, list(missed..CONNECTIONS + missed)));
        let repairs = table.repairs();
        anyhow::ensure!(
            repairs.opened == missed && repairs.closed == missed && table.iter().count() as u64 == CONNECTIONS,
            "the table was not put right: {repairs:?}, {} connections",
            table.iter().count()
        );
    }
    Ok(figures)
}
