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
    report::median,
};
use crate::{
    netns::{Namespace, Network},
    node::ask,
    process::{Process, wait_for},
};

const WATCHED: u16 = 6443;
/// A port that the agent is not told of: what all the machine's other connections pay.
const OTHER: u16 = 6444;

/// How often everything is measured.
const ROUNDS: usize = 5;

/// Connections of one storm: with those of all rounds fewer than there are ports.
const STORM: u64 = 4000;

/// Packets of one exchange, each way.
const EXCHANGE: u64 = 100_000;

/// How long the agent may take to see something.
const PATIENCE: Duration = Duration::from_secs(30);

/// The figures, each the median of the rounds, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// An open or close of a watched connection, told to the agent.
    pub state_event: f64,
    /// Any other state change of a TCP socket of the machine.
    pub other_state_change: f64,
    /// A packet of a watched connection whose ClientHello is known.
    pub classified_packet: f64,
    /// Any other packet of the machine.
    pub other_packet: f64,
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        let rounded = |ns: f64| json!((ns * 10.0).round() / 10.0);
        json!({
            "ns_per_state_event": rounded(self.state_event),
            "ns_per_classified_packet": rounded(self.classified_packet),
            "ns_per_other_state_change": rounded(self.other_state_change),
            "ns_per_other_packet": rounded(self.other_packet),
        })
    }

    /// The table, as Markdown: readable on a terminal too.
    pub fn page(&self) -> String {
        format!(
            "{}, Linux {}.\nEach figure is the median of {ROUNDS} rounds of {STORM} connections and {EXCHANGE} packets \
             each way, the kernel's own clock readings included.\n\n\
             | what | ns | bound |\n|---|--:|--:|\n\
             | an open or close of a watched connection, told to the agent | {:.0} | 400 |\n\
             | any other state change of a TCP socket of the machine | {:.0} | |\n\
             | a packet of a watched connection whose ClientHello is known | {:.0} | 120 |\n\
             | any other packet of the machine | {:.0} | |\n",
            processor(),
            kernel_release(),
            self.state_event,
            self.other_state_change,
            self.classified_packet,
            self.other_packet,
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
    let programs = Programs::of(agent.id())?;
    let hello: Arc<[u8]> = client_hello()?.into();
    let watched = Echo::listen(node, WATCHED)?;
    let other = Echo::listen(node, OTHER)?;
    let hub = &network.hub;
    let work = move || -> anyhow::Result<Figures> {
        hub.enter()?;
        let mut rounds: [Vec<f64>; 4] = Default::default();
        for round in 1..=ROUNDS {
            say(&format!("round {round} of {ROUNDS}"));
            let unwatched = programs.during(&programs.state, || other.storm(&hello))?;
            let both = programs.during(&programs.state, || watched.storm(&hello))?;
            // Each connection opens and closes once; all the rest is as without the agent's interest.
            let told = 2 * STORM;
            rounds[0].push(share(both, told, unwatched.each())?);
            rounds[1].push(unwatched.each());

            let mut stream = other.connect(&hello)?;
            let unwatched = programs.during(&programs.hello, || exchange(&mut stream))?;
            let mut stream = watched.connect(&hello)?;
            wait_for(PATIENCE, || is_classified(&socket).then_some(()))
                .context("the agent does not see that the connection offers h2")?;
            let both = programs.during(&programs.hello, || exchange(&mut stream))?;
            rounds[2].push(share(both, EXCHANGE, unwatched.each())?);
            rounds[3].push(unwatched.each());
        }
        let [state_event, other_state_change, classified_packet, other_packet] = rounds.map(median);
        Ok(Figures {
            state_event,
            other_state_change,
            classified_packet,
            other_packet,
        })
    };
    thread::scope(|scope| scope.spawn(work).join()).map_err(|_| anyhow::anyhow!("the measuring thread panicked"))?
}

/// The time of each of `ours` runs, when every other run took `other_ns`.
fn share(all: Ran, ours: u64, other_ns: f64) -> anyhow::Result<f64> {
    let others = all
        .times
        .checked_sub(ours)
        .with_context(|| format!("the program ran {} times where {ours} were caused", all.times))?;
    Ok((all.ns as f64 - others as f64 * other_ns) / ours as f64)
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
fn exchange(stream: &mut TcpStream) -> anyhow::Result<()> {
    for _ in 0..EXCHANGE {
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
        let all = Ran { ns: 1300, times: 11 };
        let each = share(all, 1, 30.0).expect("more runs than ours");
        assert!((each - 1000.0).abs() < 1e-9);
        assert!(share(all, 12, 30.0).is_err());
    }
}
