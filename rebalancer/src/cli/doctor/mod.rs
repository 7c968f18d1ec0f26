//! `rebalancer doctor`: looks at everything on this node, says what to do, and packs it for a report.

use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::{Failure, client::Common, client::Output, print, runtime, system_info, table::Table};
use crate::{
    doctor::{self, Finding, Gravity},
    local::{SocketPath, client},
};
use node::Node;

mod bundle;
mod node;
mod settings;

/// Say what is missing, wrong or about to end on this node, each with what to do; exit code 0 when nothing is, 1 when
/// something does not work, 3 when something should be done
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// The relay's control socket, where the agent's shim is a relay
    #[arg(
        long,
        env = "REBALANCER_CONTROL",
        default_value = "unix:/run/rebalancer/relay.sock",
        value_name = "unix:PATH"
    )]
    control: SocketPath,
    /// Port clients connect to
    #[arg(long, env = "REBALANCER_APISERVER_PORT", default_value_t = 6443, value_name = "PORT")]
    apiserver_port: u16,
    /// A file of certificates to look at; may be given several times [default: those that agent and relay read; kubeadm's
    /// where nobody runs]
    #[arg(long, value_name = "FILE")]
    certificate: Vec<PathBuf>,
    /// Write all that was found, and what agent and relay say, into this file: for a report, without names and addresses
    /// of clients
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
}

/// What agent and relay answered.
struct Answers {
    status: Result<Value, String>,
    relay: Option<Result<Value, String>>,
}

/// Looks, shows, and ends with what it comes to.
pub fn run(arguments: &Arguments) -> Result<u8, Failure> {
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let agent = arguments.common.api.path();
    let answers = runtime.block_on(async {
        let status = ask(agent, "/v1/status").await;
        let relayed = status.as_ref().is_ok_and(|status| status["shim"] == "relay");
        let relay = if relayed || arguments.control.0.exists() {
            Some(ask(&arguments.control.0, "/v1/connections").await)
        } else {
            None
        };
        Answers { status, relay }
    });
    let node = runtime.block_on(Node::look(arguments, answers.relay.is_some()));
    let findings = look(arguments, &answers, &node);
    if let Some(path) = &arguments.bundle {
        let bundle = runtime.block_on(bundle::make(agent, &answers, &findings));
        bundle::write(path, &bundle).with_context(|| format!("--bundle {}", path.display()))?;
    }
    let worst = findings.iter().map(|finding| finding.gravity).max();
    let text = match arguments.common.output {
        Output::Json => super::json(&as_json(&findings))?,
        Output::Table => as_table(&findings),
    };
    print(&text)?;
    Ok(match worst {
        Some(Gravity::Wrong) => 1,
        Some(Gravity::Soon) => 3,
        _ => 0,
    })
}

async fn ask(socket: &Path, path: &str) -> Result<Value, String> {
    client::get(socket, path).await.map_err(|error| format!("{error:#}"))
}

fn look(arguments: &Arguments, answers: &Answers, node: &Node) -> Vec<Finding> {
    let shim = answers.status.as_ref().ok().and_then(|status| status["shim"].as_str());
    let mut findings = doctor::agent(&answers.status);
    findings.extend(answers.relay.as_ref().map(doctor::relay));
    findings.extend(node.apiserver(arguments.apiserver_port, shim));
    findings.extend(node.trust());
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let named = &arguments.certificate;
    let files = if named.is_empty() {
        node.certificates()
    } else {
        named.clone()
    };
    findings.extend(files.iter().map(|path| doctor::certificate(path, now)));
    findings.extend(node.ports());
    findings.extend(node.steering());
    let own = arguments.common.api.path().parent().map(Path::to_owned);
    findings.extend(node.directories(own).iter().map(|path| doctor::room(path)));
    findings.extend(doctor::features(system_info::checks(arguments.apiserver_port), shim));
    findings
}

fn as_json(findings: &[Finding]) -> Value {
    let findings = findings.iter().map(|finding| {
        json!({
            "what": finding.what,
            "gravity": finding.gravity.name(),
            "found": finding.found,
            "fix": finding.fix,
        })
    });
    json!({ "findings": findings.collect::<Vec<_>>() })
}

/// What is worst comes last, where a terminal shows it.
fn as_table(findings: &[Finding]) -> String {
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|finding| finding.gravity);
    let mut table = Table::new(&["", "WHAT", "FOUND"]);
    for finding in &sorted {
        table.row([
            finding.gravity.name().to_owned(),
            finding.what.clone(),
            finding.found.clone(),
        ]);
    }
    let mut text = table.to_string();
    let mut to_do = sorted
        .iter()
        .filter_map(|finding| Some((finding, finding.fix.as_ref()?)))
        .peekable();
    if to_do.peek().is_none() {
        return text + "\nnothing to do\n";
    }
    text += "\nto do:\n";
    for (finding, fix) in to_do {
        text += &format!("- {}: {fix}\n", finding.what);
    }
    text
}
