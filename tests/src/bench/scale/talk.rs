//! The agents' talk as it is really sent: the agents' own port, TLS and asking, over loopback.
//!
//! Job: count the octets of a handshake and of an answer, and the processor time of an agent that asks all its peers and is
//! asked by all of them. All peers are this process: it asks itself as many times as there are peers, so what it spends is
//! what one agent spends.
//! Must never go by another way than an agent does: what is measured is `rebalancer::agent::peers`.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context as _;
use rebalancer::agent::{
    config::{PeerAddress, PeerConfig},
    handle::{AgentHandle, Clock, Request},
    peers::{
        self, Answer, Manners, Target, TlsListener,
        tls::{FileTls, PeerTls},
    },
    wire,
};
use rebalancer_core::{
    agent::{Agent, Input},
    ids::{ApiserverName, Timestamp},
    view::Snapshot,
};
use rustls::client::Resumption;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;

use super::super::{machine::cpu_ns, planner::resident_mib};
use crate::pki::Pki;

/// Answers whose octets are counted, and handshakes whose processor time is.
const COUNTED: u64 = 8;
const HANDSHAKES: u64 = 100;

/// Longer than all agents take to reach each other.
const PATIENCE: Duration = Duration::from_secs(60);

/// The figures.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Talk {
    /// A question, in octets of TCP's payload.
    pub question_octets: u64,
    /// An answer, with its head and TLS.
    pub answer_octets: u64,
    /// A handshake of both ends, in octets both ways.
    pub handshake_octets: u64,
    /// The processor time of a handshake, both ends together, in microseconds.
    pub handshake_us: f64,
    /// What an agent that asks all its peers, and is asked by all, spends of a core while nothing happens.
    pub share: f64,
    /// All that the process holds then, in MiB.
    #[serde(skip)]
    pub process_mib: f64,
    /// What `/v1/peers` answers then, in octets.
    #[serde(skip)]
    pub peers_octets: u64,
}

/// Measures with that agent, whose clock begins at `from`.
pub(super) fn measure(agent: Agent, names: &[ApiserverName], from: u64, seconds: u64) -> anyhow::Result<Talk> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the threads of the agents' talk")?;
    runtime.block_on(talk(agent, names, from, Duration::from_secs(seconds)))
}

async fn talk(agent: Agent, names: &[ApiserverName], from: u64, window: Duration) -> anyhow::Result<Talk> {
    let here = std::net::IpAddr::from(Ipv4Addr::LOCALHOST);
    let pki = Pki::new(&[here])?;
    let pair = pki.peer("agent", here)?;
    // The system chooses a port that is free.
    let listen = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?;
    // One's own certificate is for one of many hosts: each question is held against half of them.
    let host = |index: usize| {
        if index == names.len() / 2 {
            "127.0.0.1".to_owned()
        } else {
            format!("10.9.{}.{}", index / 256, index % 256)
        }
    };
    let address = |name: &ApiserverName, host: &str, port: u16| {
        let text = format!("{name}=https://{host}:{port}");
        text.parse::<PeerAddress>().map_err(anyhow::Error::msg)
    };
    let config = PeerConfig {
        addresses: (1..names.len())
            .map(|index| address(&names[index], &host(index), 9_443))
            .collect::<anyhow::Result<_>>()?,
        listen,
        certificate: pair.certificate,
        key: pair.key,
        ca: pki.file("ca.crt"),
    };
    let tls = Arc::new(PeerTls::Files(FileTls::load(&config)?));
    let policy = Arc::new(agent.policy().clone());
    let (handle, requests) = AgentHandle::new(Clock::start());
    let (answers, answered) = mpsc::channel(64);
    let heard = Arc::new(AtomicU64::new(0));
    tokio::spawn(agents_loop(agent, from, requests, answered, Arc::clone(&heard)));
    let listener = TlsListener::bind(listen, Arc::clone(&tls), Default::default()).await?;
    tokio::spawn(peers::serve(listener, handle.clone(), Arc::clone(&tls)));

    // Octets, by a peer that asks through a door that counts.
    let counted = Counted::default();
    let door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let through = door.local_addr()?.port();
    let opened = tokio::spawn(count(door, listen, counted.clone()));
    let (one, mut its_answers) = mpsc::channel(1);
    let target = |port| -> anyhow::Result<Target> {
        let at = address(&names[0], "127.0.0.1", port)?;
        Ok(Target { at, pin: None })
    };
    let asking = tokio::spawn(peers::follow(
        target(through)?,
        Arc::clone(&tls),
        Arc::clone(&policy),
        Manners::default(),
        one,
    ));
    next(&mut its_answers).await?;
    let first = counted.now();
    for _ in 0..COUNTED {
        next(&mut its_answers).await?;
    }
    let all = counted.now();
    let [question_octets, answer_octets] = [0, 1].map(|way| (all[way] - first[way]) / COUNTED);
    let handshake_octets = first[0] + first[1] - question_octets - answer_octets;
    asking.abort();
    opened.abort();

    let handshake_us = handshakes(&tls, listen).await?;

    // All peers.
    for name in &names[1..] {
        let at = PeerAddress {
            name: name.clone(),
            ..target(listen.port())?.at
        };
        let (tls, policy) = (Arc::clone(&tls), Arc::clone(&policy));
        tokio::spawn(peers::follow(
            Target { at, pin: None },
            tls,
            policy,
            Manners::default(),
            answers.clone(),
        ));
    }
    let began = Instant::now();
    loop {
        let are_there = handle
            .read(|agent, _| agent.peers().iter().all(|(_, peer)| peer.fault.is_none()))
            .await?;
        if are_there && heard.load(Relaxed) >= 2 * (names.len() as u64 - 1) {
            break;
        }
        anyhow::ensure!(began.elapsed() < PATIENCE, "not all agents hear each other");
        sleep(Duration::from_millis(100)).await;
    }
    let process = std::process::id();
    let (before, began) = (cpu_ns(process)?, Instant::now());
    sleep(window).await;
    let share = (cpu_ns(process)? - before) as f64 / began.elapsed().as_nanos() as f64;
    let peers_octets = handle
        .read(|agent, now| wire::peers(agent, now).to_string().len() as u64)
        .await?;
    Ok(Talk {
        question_octets,
        answer_octets,
        handshake_octets,
        handshake_us,
        share,
        process_mib: resident_mib()?,
        peers_octets,
    })
}

/// What an agent's loop does of the talk: it answers, and tells the core what it hears. Each peer is this agent, under another
/// name.
async fn agents_loop(
    mut agent: Agent,
    from: u64,
    mut requests: mpsc::Receiver<Request>,
    mut answers: mpsc::Receiver<Answer>,
    heard: Arc<AtomicU64>,
) {
    let began = Instant::now();
    let now = || Timestamp::from_millis(from) + began.elapsed();
    loop {
        tokio::select! {
            Some(request) = requests.recv() => match request {
                Request::Read(look) => look(&agent, now()),
                Request::Command(..) => {}
            },
            Some(Answer { target, said, .. }) = answers.recv() => {
                let name = target.at.name;
                let said = said.map(|snapshot| Snapshot { apiserver: name.clone(), ..snapshot });
                heard.fetch_add(u64::from(said.is_ok()), Relaxed);
                let _ = agent.handle(now(), Input::Peer(name, said));
            }
            else => return,
        }
    }
}

async fn next(answers: &mut mpsc::Receiver<Answer>) -> anyhow::Result<()> {
    let answer = timeout(PATIENCE, answers.recv()).await.context("no answer came")?;
    let answer = answer.context("nobody asks any more")?;
    answer.said.map(|_| ()).map_err(|fault| anyhow::anyhow!("{fault}"))
}

/// Handshakes without a session to go on with, one after the other: what one takes, both ends together.
async fn handshakes(tls: &PeerTls, to: SocketAddr) -> anyhow::Result<f64> {
    let (config, _) = tls.client(None)?;
    let mut config = (*config).clone();
    config.resumption = Resumption::disabled();
    let connector = TlsConnector::from(Arc::new(config));
    let name = rustls_pki_types::ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
    let process = std::process::id();
    let before = cpu_ns(process)?;
    for _ in 0..HANDSHAKES {
        let mut stream = connector
            .connect(name.clone(), TcpStream::connect(to).await?)
            .await
            .context("a handshake")?;
        // The server is done as well when it answers.
        let question = b"GET / HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n";
        stream.write_all(question).await.context("a question")?;
        // Nothing there: any answer will do, and so will an end without one.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    Ok((cpu_ns(process)? - before) as f64 / 1e3 / HANDSHAKES as f64)
}

/// Octets from who asks, and to him.
#[derive(Clone, Default)]
struct Counted([Arc<AtomicU64>; 2]);

impl Counted {
    fn now(&self) -> [u64; 2] {
        [0, 1].map(|way: usize| self.0[way].load(Relaxed))
    }
}

/// Passes on what comes, and counts it.
async fn count(door: TcpListener, to: SocketAddr, counted: Counted) -> io::Result<()> {
    loop {
        let (client, _) = door.accept().await?;
        let server = TcpStream::connect(to).await?;
        let ((client_reads, client_writes), (server_reads, server_writes)) = (client.into_split(), server.into_split());
        let [there, back] = counted.0.clone();
        tokio::spawn(pass(client_reads, server_writes, there));
        tokio::spawn(pass(server_reads, client_writes, back));
    }
}

async fn pass(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, octets: Arc<AtomicU64>) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(()),
            count => {
                octets.fetch_add(count as u64, Relaxed);
                to.write_all(&buffer[..count]).await?;
            }
        }
    }
}
