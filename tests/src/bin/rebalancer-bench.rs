//! The benchmarks, and the floor that one of them starts itself; `cargo xtask bench` builds and runs it.
//!
//! Output: one JSON object on stdout, the page's tables in a file, progress on stderr.

use std::{fs, net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use rebalancer_tests::{
    bench::{
        abuse, compare, crowd, flood, floor, kernel, kubemark,
        peers::Programs,
        planner, reconcile,
        relay::{self, Effort},
        scale,
        steer::{self, Measured},
    },
    fixture::{self, Fixture},
    process::log_directory,
};

#[derive(Parser)]
#[command(about = "The benchmarks; `cargo xtask bench` builds and runs this with what it needs")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The relay beside haproxy, Envoy and the floor
    Relay(Relay),
    /// What others wait, and what memory it costs, while somebody does harm to the relay
    Abuse(Abuse),
    /// What the kernel programs cost
    Kernel(Kernel),
    /// What a plan takes, and what the table holds
    Planner(Planner),
    /// 64 apiservers and a million clients: measured parts, and a simulation of the whole
    Scale(Scale),
    /// One agent among so many apiservers, in a process of its own: what it holds is what the process holds
    #[command(hide = true)]
    ScalePart(ScalePart),
    /// What the probe's answer costs
    Steer(Steer),
    /// What finding the place for the probe costs
    SteerFind(SteerFind),
    /// Slow readers of large LISTs on a real kube-apiserver, and what holds them
    Flood(FloodArguments),
    /// Light kubelets on real kube-apiservers
    Kubemark(KubemarkArguments),
    /// Build what a virtual machine carries for light kubelets on real kube-apiservers, and measure nothing
    #[command(hide = true)]
    KubeletsPrograms,
    /// Light kubelets beside hollow ones, by what the apiserver's audit log says that they ask
    Hollow(HollowArguments),
    /// One scene for each way to level apiservers
    Compare(CompareArguments),
    /// The byte-for-byte relay
    #[command(hide = true)]
    Floor(Floor),
}

#[derive(Args)]
struct Relay {
    #[command(flatten)]
    programs: Programs,
    /// Fewer and shorter turns
    #[arg(long)]
    quick: bool,
    /// Where the tables go
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct Abuse {
    #[command(flatten)]
    programs: Programs,
    /// Fewer and shorter turns
    #[arg(long)]
    quick: bool,
    /// Those alone whose name holds this
    #[arg(long, default_value = "")]
    only: String,
    /// Where the table goes
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct Kernel {
    /// The `rebalancer` binary
    #[arg(long)]
    rebalancer: PathBuf,
    /// Where the table goes
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct Planner {
    /// Where the table goes
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct Scale {
    /// 64,000 clients, and shorter looks at the agents' talk
    #[arg(long)]
    quick: bool,
    /// Where the tables go
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct ScalePart {
    /// How many apiservers
    #[arg(long)]
    apiservers: usize,
    /// Clients of all of them
    #[arg(long)]
    clients: u64,
    /// For so many seconds the agents' talk is watched
    #[arg(long)]
    seconds: u64,
}

#[derive(Args)]
struct Steer {
    /// The small server with the apiserver's filter
    #[arg(long)]
    server: PathBuf,
    /// kube-apiserver, whose requests are counted then
    #[arg(long, requires = "etcd")]
    apiserver: Option<PathBuf>,
    /// etcd
    #[arg(long, requires = "apiserver")]
    etcd: Option<PathBuf>,
    /// Without the answer, for kernels that refuse it
    #[arg(long)]
    silent: bool,
    /// Where the table goes
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct SteerFind {
    /// A binary with the apiserver's filter
    #[arg(long)]
    binary: PathBuf,
    /// Where the table goes
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct FloodArguments {
    /// The `rebalancer` binary
    #[arg(long)]
    rebalancer: PathBuf,
    #[command(flatten)]
    effort: flood::Effort,
    /// Where the page goes
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct KubemarkArguments {
    #[command(flatten)]
    programs: kubemark::Programs,
    #[command(flatten)]
    effort: kubemark::Effort,
    /// Where the page goes
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct HollowArguments {
    /// How many of each
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    count: u32,
    /// Where the tables go
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct CompareArguments {
    #[command(flatten)]
    programs: kubemark::Programs,
    #[command(flatten)]
    effort: compare::Effort,
    /// Where the tables go
    #[arg(long)]
    page: PathBuf,
}

#[derive(Args)]
struct Floor {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    upstream: SocketAddr,
    #[arg(long)]
    certificates: Option<PathBuf>,
    /// The server is shown each client's own name, in a certificate that their `ca.key` signs
    #[arg(long, requires = "certificates")]
    as_clients: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let say = |text: &str| eprintln!("bench: {text}");
    let directory = || -> anyhow::Result<PathBuf> {
        let directory = log_directory("rebalancer-bench-")?;
        eprintln!("bench: logs in {}", directory.display());
        Ok(directory)
    };
    let (json, page, path) = match command {
        Command::Floor(floor) => {
            let certificates = floor.certificates.as_deref();
            return floor::run(floor.listen, floor.upstream, certificates, floor.as_clients);
        }
        Command::ScalePart(arguments) => {
            let part = scale::part(arguments.apiservers, arguments.clients, arguments.seconds)?;
            println!("{}", serde_json::to_string(&part).context("a part is JSON")?);
            return Ok(());
        }
        Command::Scale(arguments) => {
            let figures = scale::run(arguments.quick, say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::Relay(arguments) => {
            let effort = if arguments.quick { Effort::QUICK } else { Effort::FULL };
            let figures = relay::run(&arguments.programs, effort, &directory()?, say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::Abuse(arguments) => {
            let effort = if arguments.quick {
                abuse::Effort::QUICK
            } else {
                abuse::Effort::FULL
            };
            let figures = abuse::run(&arguments.programs, effort, &arguments.only, &directory()?, say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::Planner(arguments) => {
            let figures = planner::run(say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::Kernel(arguments) => {
            let directory = directory()?;
            let programs = kernel::run(&arguments.rebalancer, &directory, say)?;
            say("the table is held against lists");
            let table = reconcile::run()?;
            let agent = crowd::run(&arguments.rebalancer, &directory, say)?;
            let mut json = programs.json();
            json["reconciliation"] = table.json();
            json["agent"] = agent.json();
            let page = [programs.page(), table.page(), agent.page()].join("\n");
            (json, page, arguments.page)
        }
        Command::Steer(arguments) => {
            let measured = Measured {
                server: &arguments.server,
                real: arguments.apiserver.as_deref().zip(arguments.etcd.as_deref()),
                silent: arguments.silent,
            };
            let figures = steer::run(measured, &directory()?, say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::Flood(arguments) => {
            let figures = flood::run(&arguments.rebalancer, &arguments.effort, &directory()?, say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::KubeletsPrograms => {
            Fixture::get(say)?;
            fixture::kubelets()?;
            return Ok(());
        }
        Command::Kubemark(arguments) => {
            let figures = kubemark::run(&arguments.programs, &arguments.effort, &directory()?, say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::Hollow(arguments) => {
            let figures = kubemark::hollow::run(arguments.count as usize, &directory()?, say)?;
            (figures.json(), figures.page()?, arguments.page)
        }
        Command::Compare(arguments) => {
            let figures = compare::run(&arguments.programs, &arguments.effort, &directory()?, say)?;
            (figures.json(), figures.page(), arguments.page)
        }
        Command::SteerFind(arguments) => {
            let figures = steer::find(&arguments.binary)?;
            (figures.json(), figures.page(), arguments.page)
        }
    };
    fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{json}");
    Ok(())
}
