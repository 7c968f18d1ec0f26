//! The demo, and the two programs it starts itself: the stand-in apiserver and its clients.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use rebalancer_tests::{
    balancer::{Admission, Front, Policy},
    binary, chaos,
    demo::{
        cluster::{Cluster, Kind, Options},
        interrupts,
        report::Report,
        scene::{Event, Rolling, Scene},
        screen::Screen,
    },
    fixture::{self, Fixture},
    node::{Finding, Shim},
    pki::Pair,
    process::{is_emulated, log_directory, open_files},
    soak, standin,
    swarm::clients,
};

#[derive(Parser)]
#[command(
    name = "cargo xtask demo",
    about = "The main job, end to end, in network namespaces of its own"
)]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    demo: Demo,
}

#[derive(Subcommand)]
enum Part {
    /// The stand-in apiserver
    #[command(hide = true)]
    Standin(Standin),
    /// The stand-in's clients
    #[command(hide = true)]
    Swarm(Swarm),
    /// Builds kube-apiserver, etcd and the client-go clients where they are not at hand, and ends
    #[command(hide = true)]
    Prepare {
        /// For this processor, by Go's name for it, and only kube-apiserver and etcd
        #[arg(long)]
        processor: Option<String>,
    },
    /// Faults on live clusters, and what clients notice of each
    #[command(hide = true)]
    Chaos(chaos::command::Arguments),
    /// Hour after hour of what happens to a cluster
    #[command(hide = true)]
    Soak(soak::command::Arguments),
}

#[derive(Args)]
struct Demo {
    /// Control-plane nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=9))]
    nodes: u8,
    /// Clients that list and watch
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u16).range(1..=5000))]
    clients: u16,
    /// What sends the GOAWAY
    #[arg(long, value_enum, default_value = "relay")]
    shim: Shim,
    /// How agents find each other
    #[arg(long, value_enum, default_value = "static")]
    peers: Finding,
    /// The load balancer: `haproxy`, or the demo's own by how it chooses
    #[arg(long, value_enum, default_value = "roundrobin")]
    lb: Lb,
    /// How haproxy chooses [default: roundrobin]
    #[arg(long, value_enum, value_name = "HOW")]
    balance: Option<Policy>,
    /// Options of haproxy's servers, for example 'inter 15s rise 3'
    #[arg(long, value_name = "OPTIONS")]
    lb_options: Option<String>,
    /// haproxy asks each agent how many to send there (--lb-agent of the agents)
    #[arg(long)]
    lb_agent: bool,
    /// What happens
    #[arg(long, value_enum, default_value = "crash", value_name = "SCENE")]
    scene: Play,
    /// With --scene rolling-restart: `rebalancer evacuate` before each restart
    #[arg(long)]
    evacuate: bool,
    /// With --scene rolling-restart: apiservers are killed, as a machine that is reset does, and not ended by SIGTERM
    #[arg(long)]
    kill: bool,
    /// So many seconds the demo's own load balancer takes to admit an apiserver that came back
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=170))]
    lb_admission: u16,
    /// So many seconds its weight then takes to grow to the full one
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=600))]
    lb_slow_start: u16,
    /// Which apiserver
    #[arg(long, value_enum, default_value = "auto")]
    apiserver: Kind,
    /// The load must be level so many seconds after the load balancer has admitted the apiserver that came back
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u16).range(10..=3600))]
    seconds: u16,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// The relays end the watches of draining connections, spread over so long; `none` leaves them where they are
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    watch_handover: String,
    /// For so many seconds nothing more may happen when the load is level
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u16).range(5..=3600))]
    quiet: u16,
    /// A flag for every agent, for example --agent-flag=--source=sockdiag
    #[arg(long)]
    agent_flag: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Lb {
    /// One after the other
    Roundrobin,
    /// The one with the fewest sockets
    Leastconn,
    /// Any
    Random,
    /// haproxy, in TCP mode
    Haproxy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Play {
    /// One apiserver is killed and comes back empty
    Crash,
    /// Every apiserver is restarted, one after the other
    RollingRestart,
}

/// Where agents answer the load balancer, in the namespaces of their nodes.
const LB_PORT: u16 = 9480;

impl Demo {
    /// Which load balancer, and how it chooses.
    fn front(&self) -> anyhow::Result<(Front, Policy)> {
        let own = match self.lb {
            Lb::Haproxy => {
                anyhow::ensure!(
                    self.lb_admission == 0 && self.lb_slow_start == 0,
                    "--lb-admission and --lb-slow-start are for the demo's own load balancer: tell haproxy by                      --lb-options, for example 'inter 15s rise 3 slowstart 60s'"
                );
                let mut options = self.lb_options.clone().unwrap_or_default();
                if self.lb_agent {
                    // A share of a weight of 1 would be nothing.
                    let asks = format!("weight 100 agent-check agent-inter 1s agent-port {LB_PORT}");
                    options = format!("{options} {asks}").trim_start().to_owned();
                }
                return Ok((Front::Haproxy(options), self.balance.unwrap_or(Policy::Roundrobin)));
            }
            Lb::Roundrobin => Policy::Roundrobin,
            Lb::Leastconn => Policy::Leastconn,
            Lb::Random => Policy::Random,
        };
        anyhow::ensure!(
            self.balance.is_none() && self.lb_options.is_none() && !self.lb_agent,
            "--balance, --lb-options and --lb-agent are for --lb haproxy"
        );
        let admission = Admission {
            lag: Duration::from_secs(self.lb_admission.into()),
            slow_start: Duration::from_secs(self.lb_slow_start.into()),
        };
        Ok((Front::Own(admission), own))
    }
}

#[derive(Args)]
struct Standin {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    certificate: PathBuf,
    #[arg(long)]
    key: PathBuf,
    #[arg(long)]
    client_ca: Vec<PathBuf>,
    #[arg(long)]
    origin_ms: u64,
    #[arg(long, default_value_t = 1000)]
    period_ms: u64,
    #[arg(long, default_value_t = 0.0)]
    goaway_chance: f64,
}

#[derive(Args)]
struct Swarm {
    #[arg(long)]
    server: SocketAddr,
    #[arg(long)]
    ca: PathBuf,
    #[arg(long)]
    identities: PathBuf,
    #[arg(long)]
    clients: usize,
    #[arg(long, default_value_t = 2000)]
    period_ms: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.part {
        Some(Part::Standin(options)) => run_standin(options).map(|()| ExitCode::SUCCESS),
        Some(Part::Swarm(options)) => run_swarm(options).map(|()| ExitCode::SUCCESS),
        Some(Part::Prepare { processor }) => {
            let say = |step: &str| eprintln!("{step}");
            let built = match processor {
                Some(processor) => fixture::control_plane_for(&processor, say),
                None => Fixture::get(say).map(drop),
            };
            built.map(|()| ExitCode::SUCCESS)
        }
        Some(Part::Chaos(options)) => chaos::command::run(&options),
        Some(Part::Soak(options)) => soak::command::run(&options),
        None => run_demo(&arguments.demo),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_standin(options: Standin) -> anyhow::Result<()> {
    let options = standin::Options {
        listen: options.listen,
        certificate: options.certificate,
        key: options.key,
        client_cas: options.client_ca,
        origin_ms: options.origin_ms,
        period: Duration::from_millis(options.period_ms),
        goaway_chance: options.goaway_chance,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(standin::run(options))
}

fn run_swarm(options: Swarm) -> anyhow::Result<()> {
    let pair = |index: usize| Pair {
        certificate: options.identities.join(format!("client-{index}.crt")),
        key: options.identities.join(format!("client-{index}.key")),
    };
    let options = clients::Options {
        server: options.server,
        ca: options.ca.clone(),
        identities: (0..options.clients).map(pair).collect(),
        period: Duration::from_millis(options.period_ms),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(clients::run(options))
}

/// Which apiserver, with a word on it.
fn fixture(kind: Kind) -> anyhow::Result<Option<Fixture>> {
    let say = |line: &str| eprintln!("{line}");
    match kind {
        Kind::Standin => Ok(None),
        Kind::Real => Fixture::get(say).map(Some),
        // An emulated processor has no time for three of the real ones.
        Kind::Auto if is_emulated() => Ok(None),
        Kind::Auto => {
            let found = Fixture::at_hand();
            if found.is_none() {
                say(
                    "using the stand-in apiserver; `cargo xtask demo --apiserver real` builds and uses kube-apiserver (needs Go)",
                );
            }
            Ok(found)
        }
    }
}

fn run_demo(demo: &Demo) -> anyhow::Result<ExitCode> {
    if demo.shim == Shim::Steer {
        takes_the_probe()?;
    }
    let (front, policy) = demo.front()?;
    anyhow::ensure!(
        !(demo.evacuate || demo.kill) || demo.scene == Play::RollingRestart,
        "--evacuate and --kill are for --scene rolling-restart"
    );
    let fixture = fixture(demo.apiserver)?;
    anyhow::ensure!(
        demo.peers == Finding::Static || fixture.is_some(),
        "--peers kubernetes needs Leases, which the stand-in does not have: give --apiserver real"
    );
    // The load balancer, the clients and the relays hold two descriptors a connection, draining ones included.
    open_files().context("cannot ask how many files may be open")?;
    let directory = log_directory("rebalancer-demo-")?;
    let interrupts = interrupts()?;
    let mut screen = Screen::new(usize::from(demo.nodes), usize::from(demo.clients)).context("the terminal")?;
    let mut agent_flags = demo.agent_flag.clone();
    if demo.lb_agent {
        agent_flags.push(format!("--lb-agent=0.0.0.0:{LB_PORT}"));
    }
    let handover = Some(&demo.watch_handover).filter(|over| *over != "none");
    let report = Report {
        apiserver: if fixture.is_some() { "real" } else { "standin" },
        shim: demo.shim.name(),
        lb: policy.name(),
        lb_kind: match &front {
            Front::Own(_) => "own".to_owned(),
            Front::Haproxy(options) => format!("haproxy {options}").trim_end().to_owned(),
        },
        nodes: usize::from(demo.nodes),
        clients: usize::from(demo.clients),
        watch_handover: handover.is_some() && demo.shim == Shim::Relay,
        ..Report::default()
    };
    let options = Options {
        nodes: usize::from(demo.nodes),
        clients: usize::from(demo.clients),
        policy,
        front,
        fixture,
        shim: demo.shim,
        peers: demo.peers,
        rebalancer: binary(),
        agent_flags,
        client_flags: Vec::new(),
        relay_flags: handover.iter().map(|over| format!("--watch-handover={over}")).collect(),
        directory: directory.clone(),
        etcd_members: 1,
        own_disk: false,
    };
    // A balancer that is told sends nobody to those who have too many: as one does that counts.
    let foreseen = if demo.lb_agent { Policy::Leastconn } else { policy };
    let played = Cluster::start(options, &|step| eprintln!("{step}")).and_then(|mut cluster| {
        let limit = Duration::from_secs(demo.seconds.into());
        let mut tell = |event: Event<'_>| screen.show(&event);
        let mut scene =
            Scene::new(&mut cluster, foreseen, limit, &mut tell).quiet(Duration::from_secs(demo.quiet.into()));
        let played = match demo.scene {
            Play::Crash => scene.play(report).map(Played::Crash),
            Play::RollingRestart => scene.roll(rolling(demo, &report)).map(Played::Rolling),
        };
        cluster.end();
        played
    });
    screen.end();
    drop(interrupts);
    match played {
        Ok(played) => {
            played.show(demo.json)?;
            if played.is_success() {
                // Logs are worth keeping only when something went wrong; what cannot be removed stays in /tmp.
                let _ = std::fs::remove_dir_all(&directory);
                return Ok(ExitCode::SUCCESS);
            }
            eprintln!("logs and decisions: {}", directory.display());
            Ok(ExitCode::FAILURE)
        }
        Err(error) => Err(error.context(format!("logs: {}", directory.display()))),
    }
}

/// What is known of the other scene before it is played.
fn rolling(demo: &Demo, report: &Report) -> Rolling {
    Rolling {
        apiserver: report.apiserver,
        lb: format!("{} ({})", report.lb, report.lb_kind),
        nodes: report.nodes,
        clients: report.clients,
        evacuate: demo.evacuate,
        kill: demo.kill,
        ..Rolling::default()
    }
}

/// What was played, and measured.
enum Played {
    Crash(Report),
    Rolling(Rolling),
}

impl Played {
    fn show(&self, json: bool) -> anyhow::Result<()> {
        let text = match self {
            Self::Crash(report) => {
                eprintln!("{report}");
                serde_json::to_string(report)?
            }
            Self::Rolling(rolling) => {
                eprintln!("{rolling}");
                for text in &rolling.error_texts {
                    eprintln!("  a client saw: {text}");
                }
                serde_json::to_string(rolling)?
            }
        };
        if json {
            println!("{text}");
        }
        Ok(())
    }

    /// Restarts that nobody prepared for are noticed: that is what they are shown for.
    fn is_success(&self) -> bool {
        match self {
            Self::Crash(report) => report.is_success(),
            Self::Rolling(rolling) => {
                rolling.seconds_to_level.is_some() && (!rolling.evacuate || rolling.is_unnoticed())
            }
        }
    }
}

/// Refuses where this kernel does.
fn takes_the_probe() -> anyhow::Result<()> {
    let output = std::process::Command::new(binary())
        .args(["system-info", "--output=json"])
        .output()
        .context("the product does not run")?;
    let features: serde_json::Value = serde_json::from_slice(&output.stdout).context("what system-info says")?;
    let kernel = &features["steer-kernel"];
    anyhow::ensure!(
        kernel["ok"] == true,
        "--shim steer cannot be shown on this machine: {}. `--vm 6.18` shows it in a virtual machine with Debian's \
         kernel 6.18, and without --shim the demo runs with the relay",
        kernel["why"].as_str().unwrap_or("it does not say why")
    );
    Ok(())
}
