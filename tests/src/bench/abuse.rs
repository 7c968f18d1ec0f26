//! How long other clients wait while somebody does harm, and what memory that costs the relay.
//!
//! Each way to do harm has its turns: others' requests without it, and with it, through the same relay, in alternation; and
//! once more at the server itself, which is what the same harm does where there is no relay; and through a relay that copies
//! octets, at the rate at which this one has taken it, which is what any hop makes of it. A relay has one processor to
//! itself. Those who do harm share the other with the server and the others, and run only while neither wants to
//! (`SCHED_IDLE`): what is measured is not their own time.
//!
//! Input: programs. Output: [`Abused`]. Must never keep a time of a request that failed.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::{Value, json};

use super::{
    load::Load,
    machine::{Cores, Highest, kernel_release, pin_thread, processor, rss_kib},
    peers::{BACKEND, FIGURES, Peer, Programs, Start},
    report::{median, rounded},
};
use crate::{
    abuse::{ABUSES, Abuse, Attack, Done},
    h2wire::{self, END_STREAM, frame, kind, request},
    pki::{Pair, Pki},
    process::{Process, open_files, wait_for},
};

/// How much longer others may wait: the number of times.
const BOUND: f64 = 2.0;

/// How many MiB more than idle.
const BOUND_MIB: f64 = 64.0;

/// Connections of those who do harm.
const ATTACKERS: usize = 50;

/// Connections of others: half of them with a certificate.
const OTHERS: usize = 4;

/// Between two requests of one of them.
const PAUSE: Duration = Duration::from_millis(2);

/// From its beginning on: what it costs for as long as it lasts is measured, and not its first moment.
const SWING: Duration = Duration::from_secs(1);

/// How long an abuse may take to begin, and to be over.
const PATIENCE: Duration = Duration::from_secs(20);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Turns of each.
    pub rounds: usize,
    /// How long one is.
    pub window: Duration,
}

impl Effort {
    /// Twelve minutes.
    pub const FULL: Self = Self {
        rounds: 3,
        window: Duration::from_millis(800),
    };

    /// Three minutes and a half.
    pub const QUICK: Self = Self {
        rounds: 1,
        window: Duration::from_millis(500),
    };
}

/// What others waited, in microseconds, without and with the abuse.
#[derive(Clone, Copy, Debug)]
struct Pair99 {
    without: f64,
    with: f64,
}

/// One abuse's figures.
#[derive(Debug, Default)]
struct Figure {
    name: &'static str,
    done: Done,
    relay: Vec<Pair99>,
    direct: Vec<Pair99>,
    floor: Vec<Pair99>,
    mib: f64,
}

fn ratio(pairs: &[Pair99]) -> f64 {
    median(pairs.iter().map(|pair| pair.with / pair.without).collect())
}

impl Figure {
    fn without(&self) -> f64 {
        median(self.relay.iter().map(|pair| pair.without).collect())
    }

    fn with(&self) -> f64 {
        median(self.relay.iter().map(|pair| pair.with).collect())
    }

    fn ratio(&self) -> f64 {
        ratio(&self.relay)
    }

    fn direct(&self) -> f64 {
        ratio(&self.direct)
    }

    fn floor(&self) -> f64 {
        ratio(&self.floor)
    }
}

/// Everything that was measured.
#[derive(Debug)]
pub struct Abused {
    figures: Vec<Figure>,
    idle_mib: f64,
    requests: usize,
    effort: Effort,
}

/// Measures every abuse whose name holds `only`; `say` hears what is being done.
///
/// # Errors
///
/// A program cannot be started or ends early, another client's request fails, or an abuse does not come about.
pub fn run(
    programs: &Programs,
    effort: Effort,
    only: &str,
    directory: &Path,
    say: impl Fn(&str),
) -> anyhow::Result<Abused> {
    let cores = Cores::pick()?;
    let pki = Pki::new(&[BACKEND.ip()])?;
    let start = Start {
        programs,
        pki: &pki,
        directory,
        cores,
        open_files: open_files().context("cannot ask how many files may be open")?,
    };
    let load = Load {
        program: &programs.h2load,
        libraries: &programs.libraries,
        figures: FIGURES,
        cores,
        directory,
    };
    let _backend = start.backend()?;
    let relay = start.peer(Peer::Relay)?;
    let mut through = Others::begin(&pki, Peer::Relay.address(), cores)?;
    let mut straight = Others::begin(&pki, BACKEND, cores)?;
    let _floor = start.peer(Peer::Floor)?;
    let mut copied = Others::begin(&pki, Peer::Floor.address(), cores)?;
    through.window(effort.window)?;
    let mut abused = Abused {
        figures: Vec::new(),
        idle_mib: resident_mib(&relay)?,
        requests: 0,
        effort,
    };
    let base = load.served()?.connections;
    for abuse in ABUSES.iter().filter(|abuse| abuse.name.contains(only)) {
        let mut figure = Figure {
            name: abuse.name,
            ..Figure::default()
        };
        for _ in 0..effort.rounds {
            let highest = Highest::of(relay.id());
            let turned = turn(abuse, &pki, &mut through, cores, effort, None)?;
            figure.mib = figure.mib.max(highest.kib() as f64 / 1024.0 - abused.idle_mib);
            quiet(&load, base)?;
            figure.relay.push(turned.times);
            figure.done = turned.done;
            let copied = turn(abuse, &pki, &mut copied, cores, effort, Some(turned.rate))?;
            quiet(&load, base)?;
            figure.floor.push(copied.times);
            let direct = turn(abuse, &pki, &mut straight, cores, effort, None)?;
            quiet(&load, base)?;
            figure.direct.push(direct.times);
        }
        say(&format!(
            "{}: {:.0} µs without, {:.0} µs with, {:.2} x (octets copied {:.2} x, directly {:.2} x); {:+.1} MiB; {:?}",
            figure.name,
            figure.without(),
            figure.with(),
            figure.ratio(),
            figure.floor(),
            figure.direct(),
            figure.mib,
            figure.done
        ));
        abused.figures.push(figure);
    }
    abused.requests = through.asked;
    through.end()?;
    straight.end()?;
    copied.end()?;
    Ok(abused)
}

/// What one turn came to.
struct Turned {
    times: Pair99,
    done: Done,
    /// Deeds a second while others were measured.
    rate: f64,
}

/// Others' times without and with the abuse, which does so many deeds a second or as many as it can.
fn turn(
    abuse: &Abuse,
    pki: &Pki,
    others: &mut Others,
    cores: Cores,
    effort: Effort,
    rate: Option<f64>,
) -> anyhow::Result<Turned> {
    let without = p99_us(others.window(effort.window)?);
    let attack = Attack::start(abuse, pki, others.server, ATTACKERS, Some(cores.others), rate)?;
    let began = || {
        let done = attack.done();
        // Whoever is ended at once makes many.
        (done.connections >= ATTACKERS as u64 / 2 && done.acts.max(done.ended) > 0
            || done.connections >= ATTACKERS as u64)
            .then_some(())
    };
    wait_for(PATIENCE, began).with_context(|| format!("{}: it does not come about", abuse.name))?;
    thread::sleep(SWING);
    let (before, from) = (attack.done(), Instant::now());
    let with = p99_us(others.window(effort.window)?);
    let rate = (attack.done().deeds() - before.deeds()) as f64 / from.elapsed().as_secs_f64();
    Ok(Turned {
        times: Pair99 { without, with },
        done: attack.stop(),
        rate,
    })
}

/// Waits until the server has only the others' connections.
fn quiet(load: &Load<'_>, connections: u64) -> anyhow::Result<()> {
    wait_for(PATIENCE, || {
        (load.served().ok()?.connections <= connections).then_some(())
    })
    .context("connections of those who did harm are still open at the server")
}

fn p99_us(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times
        .get(times.len() * 99 / 100)
        .map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}

fn resident_mib(process: &Process) -> anyhow::Result<f64> {
    let kib = rss_kib(process.id()).context("the relay has ended")?;
    Ok(kib as f64 / 1024.0)
}

/// A word to one of the others: how long to ask.
type Ask = std::sync::mpsc::Sender<Duration>;

/// Clients that mean well, each a thread with a connection of its own and one request at a time.
struct Others {
    server: SocketAddr,
    threads: Vec<(Ask, thread::JoinHandle<anyhow::Result<()>>)>,
    told: std::sync::mpsc::Receiver<Vec<Duration>>,
    asked: usize,
}

impl Others {
    fn begin(pki: &Pki, server: SocketAddr, cores: Cores) -> anyhow::Result<Self> {
        let alice = pki.client("alice", "alice", &[])?;
        let (tell, told) = std::sync::mpsc::channel();
        let mut threads = Vec::new();
        for index in 0..OTHERS {
            let (ask, asked) = std::sync::mpsc::channel::<Duration>();
            let tell = tell.clone();
            let mut client = Other::connect(pki, server, (index % 2 == 0).then_some(&alice))?;
            let thread = thread::spawn(move || {
                pin_thread(cores.others);
                for length in asked {
                    // Whoever asked may have given up.
                    let _ = tell.send(client.times(length)?);
                }
                Ok(())
            });
            threads.push((ask, thread));
        }
        Ok(Self {
            server,
            threads,
            told,
            asked: 0,
        })
    }

    /// All of them ask for so long: how long each request took.
    fn window(&mut self, length: Duration) -> anyhow::Result<Vec<Duration>> {
        for (ask, _) in &self.threads {
            ask.send(length).ok().context("another client's request failed")?;
        }
        let mut all = Vec::new();
        for _ in &self.threads {
            let times = self.told.recv_timeout(length + h2wire::PATIENCE * 2);
            all.extend(times.ok().context("another client's request failed")?);
        }
        self.asked += all.len();
        Ok(all)
    }

    fn end(self) -> anyhow::Result<()> {
        for (ask, thread) in self.threads {
            drop(ask);
            thread.join().expect("errors are values")?;
        }
        Ok(())
    }
}

struct Other {
    peer: h2wire::Peer,
    stream: u32,
}

impl Other {
    fn connect(pki: &Pki, server: SocketAddr, identity: Option<&Pair>) -> anyhow::Result<Self> {
        let mut peer = h2wire::Peer::connect(pki, server, identity, b"h2")?;
        peer.try_begin_client(&[])?;
        peer.try_send(&frame(kind::WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()))?;
        Ok(Self { peer, stream: 1 })
    }

    fn times(&mut self, length: Duration) -> anyhow::Result<Vec<Duration>> {
        let until = Instant::now() + length;
        let mut times = Vec::new();
        while Instant::now() < until {
            thread::sleep(PAUSE);
            let began = Instant::now();
            self.asks()?;
            times.push(began.elapsed());
        }
        Ok(times)
    }

    fn asks(&mut self) -> anyhow::Result<()> {
        self.peer
            .try_send(&request(self.stream, "/api/v1/namespaces/default/pods/web-0"))?;
        let mut seen = false;
        loop {
            let got = self.peer.try_next()?.context("the connection has ended")?;
            anyhow::ensure!(got.kind != kind::GOAWAY, "the connection is told to go: {got:?}");
            if got.stream != self.stream {
                continue;
            }
            // `:status: 200` of the static table.
            seen |= got.kind == kind::HEADERS && got.payload.first() == Some(&0x88);
            if got.flags & END_STREAM != 0 {
                break;
            }
        }
        anyhow::ensure!(seen, "a request is not answered with 200");
        self.stream += 2;
        Ok(())
    }
}

impl Abused {
    /// The figures as one object.
    pub fn json(&self) -> Value {
        let by_name = |figure: &dyn Fn(&Figure) -> f64| -> Value {
            self.figures
                .iter()
                .map(|one| (one.name.to_owned(), json!(rounded(figure(one)))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        json!({
            "p99_ratio": by_name(&Figure::ratio),
            "p99_ratio_floor": by_name(&Figure::floor),
            "p99_ratio_direct": by_name(&Figure::direct),
            "p99_us_without": by_name(&Figure::without),
            "p99_us_with": by_name(&Figure::with),
            "mib_above_idle": by_name(&|one| one.mib),
        })
    }

    /// The table, as Markdown.
    pub fn page(&self) -> String {
        let mut page = String::new();
        self.write(&mut page)
            .expect("writing to a string fails only when memory does");
        page
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "{}, Linux {}.", processor(), kernel_release())?;
        writeln!(
            page,
            "{ATTACKERS} connections do harm; {OTHERS} others made {} requests meanwhile and between, all of them answered. The \
             idle relay has {:.1} MiB. Each ratio is the median of {} turns of {} ms with the abuse, each to the turn without \
             it right before.\n",
            self.requests,
            self.idle_mib,
            self.effort.rounds,
            self.effort.window.as_millis()
        )?;
        writeln!(
            page,
            "| abuse | connections | pieces | MB sent | others' p99 without, µs | with | ratio | bound | octets copied | without a relay | MiB above idle | bound |"
        )?;
        writeln!(page, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        for one in &self.figures {
            writeln!(
                page,
                "| {} | {} | {} | {:.1} | {:.0} | {:.0} | {:.2} | {BOUND} | {:.2} | {:.2} | {:.1} | {BOUND_MIB} |",
                one.name,
                one.done.connections,
                one.done.acts,
                one.done.octets as f64 / 1e6,
                one.without(),
                one.with(),
                one.ratio(),
                one.floor(),
                one.direct(),
                one.mib
            )?;
        }
        Ok(())
    }
}
