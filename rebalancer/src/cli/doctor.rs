//! `rebalancer doctor`: looks at everything on this node, says what to do, and packs it for a report.

use std::{
    fs::OpenOptions,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::{Failure, client::Common, client::Output, print, runtime, system_info, table::Table};
use crate::{
    doctor::{self, Finding, Gravity, KUBEADM},
    local::{SocketPath, client},
    steer,
};

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
    /// A file of certificates to look at; may be given several times [default: kubeadm's, where they are]
    #[arg(long, value_name = "FILE")]
    certificate: Vec<PathBuf>,
    /// Write all that was found, and what agent and relay say, into this file: for a report, without names and addresses
    /// of clients
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
}

/// How many past decisions a bundle has.
const DECISIONS: usize = 100;

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
    let findings = look(arguments, &answers);
    if let Some(path) = &arguments.bundle {
        let bundle = runtime.block_on(bundle(agent, &answers, &findings));
        write(path, &bundle).with_context(|| format!("--bundle {}", path.display()))?;
    }
    let worst = findings.iter().map(|finding| finding.gravity).max();
    let text = match arguments.common.output {
        Output::Json => serde_json::to_string_pretty(&as_json(&findings)).map_err(anyhow::Error::from)? + "\n",
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

fn look(arguments: &Arguments, answers: &Answers) -> Vec<Finding> {
    let shim = answers.status.as_ref().ok().and_then(|status| status["shim"].as_str());
    let mut findings = doctor::agent(&answers.status);
    findings.extend(answers.relay.as_ref().map(doctor::relay));
    match steer::find_process(arguments.apiserver_port, None) {
        Ok(process) => {
            findings.push(Finding::good(
                "apiserver",
                format!("process {} listens on port {}", process.pid, arguments.apiserver_port),
            ));
            let flag = |name: &str| {
                let said = process.flag(name).map_err(|error| error.to_string())?;
                Ok(said.value)
            };
            findings.extend(doctor::apiserver(flag, shim));
        }
        Err(error) => findings.push(Finding::note("apiserver", error.to_string())),
    }
    let kubeadm = KUBEADM.iter().map(PathBuf::from).filter(|path| path.exists());
    let files: Vec<PathBuf> = if arguments.certificate.is_empty() {
        kubeadm.collect()
    } else {
        arguments.certificate.clone()
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    findings.extend(files.iter().map(|path| doctor::certificate(path, now)));
    findings.extend(arguments.common.api.path().parent().map(doctor::room));
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

/// Everything a report needs.
async fn bundle(agent: &Path, answers: &Answers, findings: &[Finding]) -> Value {
    let decisions = ask(agent, &format!("/v1/decisions?limit={DECISIONS}")).await;
    let peers = ask(agent, "/v1/peers").await;
    let mut bundle = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "doctor": as_json(findings)["findings"],
        "status": answers.status,
        "relay": answers.relay.as_ref().map(|listing| listing.as_ref().map(|listing| listing["upstream"].clone())),
        "peers": peers,
        "decisions": decisions,
    });
    leave_out(&mut bundle);
    bundle
}

/// Members that say who a client is.
const PERSONAL: [&str; 6] = ["client", "user", "user_agent", "groups", "address", "connection"];

fn leave_out(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(leave_out),
        Value::Object(members) => {
            for (name, member) in members {
                if PERSONAL.contains(&name.as_str()) && !member.is_null() {
                    *member = json!("left out");
                } else {
                    leave_out(member);
                }
            }
        }
        _ => {}
    }
}

/// A new file that only its owner may read.
fn write(path: &Path, bundle: &Value) -> anyhow::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec_pretty(bundle)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_does_not_say_who_a_client_is() {
        let mut bundle = json!({"decisions": [{"id": 7, "victims": [
            {"client": "192.0.2.7:4711", "user": "alice", "user_agent": null, "load": 1.0}]}]});
        leave_out(&mut bundle);
        let text = bundle.to_string();
        assert!(!text.contains("alice") && !text.contains("192.0.2.7"), "{text}");
        assert_eq!(bundle["decisions"][0]["victims"][0]["load"], 1.0);
        assert_eq!(bundle["decisions"][0]["victims"][0]["user_agent"], Value::Null);
    }
}
