//! What the kernel programs cost, from the kernel's own statistics of them.
//!
//! Job: an agent in a network namespace of its own, a bounded storm of connections and a bounded exchange of packets
//! there, and what its programs ran meanwhile.
//! Must never leave the statistics switched on, nor count other programs' packets as the storm's.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustls::{ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};
use serde_json::{Value, json};

use super::{
    bpf::{Ran, descriptors, field, ran, statistics},
    machine::{kernel_release, processor},
};
use crate::{
    cgroup::Cgroup,
    netns::{Namespace, Network},
    node::ask,
    process::{Process, wait_for},
};

const WATCHED: u16 = 6443;
/// A port that the agent is not told of: what all the machine's other connections pay.
const OTHER: u16 = 6444;

/// How often everything is measured. What else the machine does only adds: the least of the rounds is the figure.
const ROUNDS: usize = 15;

/// Connections of one storm: with those of all rounds fewer than there are ports.
const STORM: u64 = 1500;

/// Packets of one exchange, each way.
const EXCHANGE: u64 = 20_000;

/// Young connections, and packets on each of them: with its hello fewer than the segments after which one is old.
const YOUNG: u64 = 20;
const YOUNG_PACKETS: u64 = 100;

/// How long the agent may take to see something.
const PATIENCE: Duration = Duration::from_secs(30);

/// The figures, each the least of the rounds, in nanoseconds, the kernel's two clock readings around each run included.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// An open or close of a watched connection, told to the agent.
    pub state_event: f64,
    /// Any other state change of a TCP socket of the machine: the program looks at the port and ends.
    pub other_state_change: f64,
    /// A packet of a watched connection whose ClientHello is known.
    pub classified_packet: f64,
    /// The same while less has come than the longest hello.
    pub young_packet: f64,
    /// Any other packet of the machine, when the program is at the root of all cgroups: it looks at the port and ends.
    pub other_packet_at_root: f64,
    /// How often the program ran for other packets when it is at the apiserver's own cgroup, of [`EXCHANGE`] each round.
    pub runs_for_others: u64,
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        let rounded = |ns: f64| json!((ns * 10.0).round() / 10.0);
        json!({
            "ns_per_state_event": rounded(self.state_event),
            "ns_per_classified_packet": rounded(self.classified_packet),
            "ns_per_young_classified_packet": rounded(self.young_packet),
            "ns_per_other_state_change": rounded(self.other_state_change),
            "ns_per_other_packet_at_root": rounded(self.other_packet_at_root),
            "runs_for_other_packets_at_own_cgroup": self.runs_for_others,
        })
    }

    /// The table, as Markdown: readable on a terminal too.
    pub fn page(&self) -> String {
        let Self {
            state_event,
            other_state_change,
            classified_packet,
            young_packet,
            other_packet_at_root,
            runs_for_others,
        } = *self;
        format!(
            "{}, Linux {}.\nEach figure is the least of {ROUNDS} rounds of {STORM} connections and {EXCHANGE} packets \
             each way, the kernel's own clock readings included; beside it what is left without what the same program \
             takes, in the same run, to find that a socket is none of its business.\n\n\
             | what | ns | less the least it can be | bound on the latter |\n|---|--:|--:|--:|\n\
             | an open or close of a watched connection, told to the agent | {state_event:.0} | {:.0} | 250 |\n\
             | any other state change of a TCP socket of the machine | {other_state_change:.0} | | |\n\
             | a packet of a watched connection whose ClientHello is known | {classified_packet:.0} | {:.0} | 60 |\n\
             | the same, of its first {YOUNG_PACKETS} packets | {young_packet:.0} | {:.0} | 60 |\n\
             | any other packet of the machine, the program at the root of all cgroups | {other_packet_at_root:.0} | | |\n\
             | the same, the program at the apiserver's own cgroup: runs in {} packets | {runs_for_others} | | 0 |\n",
            processor(),
            kernel_release(),
            state_event - other_state_change,
            classified_packet - other_packet_at_root,
            young_packet - other_packet_at_root,
            ROUNDS as u64 * EXCHANGE,
        )
    }
}

/// The agent's two programs that run at others' doings.
struct Programs {
    agent: u32,
    state: String,
    hello: String,
}

impl Programs {
    /// Finds them by what they are linked to.
    fn of(agent: u32) -> anyhow::Result<Self> {
        let texts = descriptors(agent)?;
        let linked = |kind: &str| {
            texts
                .iter()
                .find(|text| field(text, "link_type") == Some(kind))
                .and_then(|text| field(text, "prog_id"))
                .map(str::to_owned)
        };
        match (linked("raw_tracepoint"), linked("cgroup")) {
            (Some(state), Some(hello)) => Ok(Self { agent, state, hello }),
            _ => bail!(
                "the agent's programs are not found among its descriptors:\n{}",
                texts.join("\n")
            ),
        }
    }

    /// Whether the program that looks at packets is at that cgroup and nowhere else.
    fn is_only_at(&self, cgroup: &str) -> bool {
        let texts = descriptors(self.agent).unwrap_or_default();
        let mut links = texts.iter().filter(|text| field(text, "link_type") == Some("cgroup"));
        links.clone().count() == 1 && links.all(|link| field(link, "cgroup_id") == Some(cgroup))
    }

    /// What a program runs while something is done.
    fn during(&self, program: &str, doing: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Ran> {
        let before = ran(self.agent, program)?;
        doing()?;
        Ok(ran(self.agent, program)?.since(before))
    }
}

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// Not root, no kernel programs in the binary, or a kernel that refuses them.
pub fn run(rebalancer: &Path, directory: &Path, say: impl Fn(&str) + Send) -> anyhow::Result<Figures> {
    // The agent leaves a node's own connections out: clients are on another host.
    let network = Network::new(1)?;
    let node = &network.nodes[0];
    let socket = directory.join("agent.sock");
    let mut command = Command::new(rebalancer);
    command
        .args(["agent", "--node-name=bench", "--source=ebpf"])
        .arg(format!("--apiserver-port={WATCHED}"))
        .arg(format!("--api=unix:{}", socket.display()));
    let mut agent = Process::start("agent", command, Some(node.fd()), directory)?;
    let mut trouble = None;
    let up = wait_for(PATIENCE, || {
        trouble = agent.is_running().err();
        (trouble.is_some() || ask(&socket, "/v1/status").is_ok()).then_some(())
    });
    if let Some(error) = trouble {
        return Err(error);
    }
    up.context("the agent does not answer")?;

    let _statistics = statistics()?;
    // It answers before it has attached them.
    let mut found = Err(anyhow::anyhow!("nobody looked"));
    wait_for(PATIENCE, || {
        found = Programs::of(agent.id());
        found.is_ok().then_some(())
    });
    let programs = found?;
    let hello: Arc<[u8]> = client_hello()?.into();
    let other = Echo::listen(node, OTHER)?;
    let cgroup = Cgroup::new("bench")?.context("no cgroup2 is mounted, which is where packets are looked at")?;
    let within = &cgroup;
    let hub = &network.hub;
    let work = move || -> anyhow::Result<Figures> {
        hub.enter()?;
        say("the program at the root of all cgroups, where it is while nobody listens");
        let mut others_at_root = Vec::new();
        for _ in 0..ROUNDS {
            let mut stream = other.connect(&hello)?;
            others_at_root.push(
                programs
                    .during(&programs.hello, || exchange(&mut stream, EXCHANGE))?
                    .each(),
            );
        }
        // Its socket is made within: the program follows it there.
        let watched = within.within(|| Echo::listen(node, WATCHED))??;
        let id = within.id()?.to_string();
        wait_for(PATIENCE, || programs.is_only_at(&id).then_some(()))
            .context("the agent's program does not follow the server into its cgroup")?;
        let mut rounds: [Vec<f64>; 2] = Default::default();
        let (mut unwatched, mut both) = (Vec::new(), Vec::new());
        let mut runs_for_others = 0;
        for round in 1..=ROUNDS {
            say(&format!("round {round} of {ROUNDS}"));
            unwatched.push(programs.during(&programs.state, || other.storm(&hello))?.each());
            both.push(programs.during(&programs.state, || watched.storm(&hello))?);

            let mut stream = other.connect(&hello)?;
            runs_for_others += programs
                .during(&programs.hello, || exchange(&mut stream, EXCHANGE))?
                .times;
            // One after the other: the server answers one at a time.
            let mut young = Ran::default();
            for _ in 1..YOUNG {
                let mut stream = watched.connect(&hello)?;
                young = young.and(programs.during(&programs.hello, || exchange(&mut stream, YOUNG_PACKETS))?);
            }
            let mut stream = watched.connect(&hello)?;
            wait_for(PATIENCE, || is_classified(&socket).then_some(()))
                .context("the agent does not see that the connection offers h2")?;
            young = young.and(programs.during(&programs.hello, || exchange(&mut stream, YOUNG_PACKETS))?);
            // The rest of what is young, which is not measured.
            exchange(&mut stream, 18_000)?;
            let known = programs.during(&programs.hello, || exchange(&mut stream, EXCHANGE))?;
            for (ran, packets, figures) in [(young, YOUNG * YOUNG_PACKETS, 0), (known, EXCHANGE, 1)] {
                anyhow::ensure!(
                    ran.times >= packets,
                    "the program ran {} times for {packets} packets",
                    ran.times
                );
                rounds[figures].push(ran.each());
            }
        }
        let [young_packet, classified_packet] = rounds.map(least);
        let other_state_change = least(unwatched);
        Ok(Figures {
            // Each connection opens and closes once; all the rest is as without the agent's interest.
            state_event: share(&both, 2 * STORM, other_state_change)?,
            other_state_change,
            classified_packet,
            young_packet,
            other_packet_at_root: least(others_at_root),
            runs_for_others,
        })
    };
    thread::scope(|scope| scope.spawn(work).join()).map_err(|_| anyhow::anyhow!("the measuring thread panicked"))?
}

fn least(values: Vec<f64>) -> f64 {
    values.into_iter().fold(f64::INFINITY, f64::min)
}

/// The time of each of `ours` runs in the least of the rounds, when every other run took `other_ns` in the least of its.
/// A round's own neighbour is no measure of it: one that was disturbed would make what it is taken from look cheap.
fn share(rounds: &[Ran], ours: u64, other_ns: f64) -> anyhow::Result<f64> {
    let mut shares = Vec::new();
    for all in rounds {
        let others = all
            .times
            .checked_sub(ours)
            .with_context(|| format!("the program ran {} times where {ours} were caused", all.times))?;
        shares.push((all.ns as f64 - others as f64 * other_ns) / ours as f64);
    }
    Ok(least(shares))
}

fn is_classified(agent: &Path) -> bool {
    let Ok(answer) = ask(agent, "/v1/connections?limit=10") else {
        return false;
    };
    let list = answer["connections"].as_array().map_or(&[][..], Vec::as_slice);
    list.iter().any(|connection| connection["protocol"] == "offered")
}

/// A port whose connections are answered octet by octet.
struct Echo {
    address: SocketAddr,
}

impl Echo {
    fn listen(node: &Namespace, port: u16) -> anyhow::Result<Self> {
        let address = SocketAddr::from((Network::node_address(0), port));
        let node = node.clone();
        let listen = move || -> anyhow::Result<TcpListener> {
            node.enter()?;
            Ok(TcpListener::bind(address)?)
        };
        let listener = thread::spawn(listen)
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // The client sees a failure as its own.
                let _ = answer(stream);
            }
        });
        Ok(Self { address })
    }

    /// A connection that has said hello and was answered.
    fn connect(&self, hello: &[u8]) -> anyhow::Result<TcpStream> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.write_all(hello)?;
        stream.read_exact(&mut [0])?;
        Ok(stream)
    }

    /// Connections that come, say hello and go, one after the other.
    fn storm(&self, hello: &[u8]) -> anyhow::Result<()> {
        for _ in 0..STORM {
            let mut stream = self.connect(hello)?;
            stream.shutdown(std::net::Shutdown::Write)?;
            // The other end has closed as well: every state change has happened.
            anyhow::ensure!(stream.read(&mut [0])? == 0, "more than one octet came back");
        }
        Ok(())
    }
}

/// Packets back and forth on a connection that has said hello.
fn exchange(stream: &mut TcpStream, packets: u64) -> anyhow::Result<()> {
    for _ in 0..packets {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
    }
    Ok(())
}

/// Reads the hello, then sends an octet for it and for each that comes.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // The record's header ends with its length (RFC 8446, section 5.1).
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    stream.read_exact(&mut vec![0; usize::from(u16::from_be_bytes([header[3], header[4]]))])?;
    let mut octet = [0];
    loop {
        stream.write_all(&octet)?;
        if stream.read(&mut octet)? == 0 {
            return Ok(());
        }
    }
}

/// A ClientHello as rustls sends it, with a post-quantum key share.
pub(super) fn client_hello() -> anyhow::Result<Vec<u8>> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut client = ClientConnection::new(Arc::new(config), ServerName::try_from("kubernetes")?)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    Ok(hello)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_cost_is_taken_out() {
        let rounds = [Ran { ns: 1500, times: 11 }, Ran { ns: 1300, times: 11 }];
        let each = share(&rounds, 1, 30.0).expect("more runs than ours");
        assert!((each - 1000.0).abs() < 1e-9);
        assert!(share(&rounds, 12, 30.0).is_err());
    }
}
