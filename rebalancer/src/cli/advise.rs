//! `advise`: the FlowSchema and the PriorityLevelConfiguration that hold somebody who floods.
//!
//! Input: who, and the cluster's own levels, from the agent or from what kubectl printed. Output: YAML for kubectl, with why
//! and what it costs as comments. Must never apply it.

use std::{fs, io::Read as _, path::PathBuf};

use clap::{Args, ValueEnum};
use rebalancer_core::fairness::{self, Observed, Question, Subject};
use serde_json::{Value, json};

use super::{Failure, client::Api, show};
use crate::{
    kubernetes::{FlowControl, Shown},
    local::client,
};

/// Print the FlowSchema and the PriorityLevelConfiguration that hold a user or a group that floods, why, and what it costs
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    api: Api,
    #[command(flatten)]
    who: Who,
    /// How many large LISTs of theirs may run at once on an apiserver
    #[arg(long, default_value_t = 4, value_name = "COUNT")]
    lists: u32,
    /// Of a group: how many of its users may flood at once
    #[arg(long, default_value_t = 4, value_name = "COUNT", conflicts_with = "user")]
    heavy: u32,
    /// What they flood with: a verb of Kubernetes, or * for all; may be given several times
    #[arg(long = "verb", default_value = "list", value_name = "VERB")]
    verbs: Vec<String>,
    /// kube-apiserver's own flag, as it is set
    #[arg(long, default_value_t = 400, value_name = "COUNT")]
    max_requests_inflight: u32,
    /// kube-apiserver's own flag, as it is set
    #[arg(long, default_value_t = 200, value_name = "COUNT")]
    max_mutating_requests_inflight: u32,
    /// Read the cluster's levels from what `kubectl get prioritylevelconfigurations,flowschemas -o json` printed, `-` for
    /// stdin, and ask no agent
    #[arg(long, value_name = "FILE")]
    levels: Option<PathBuf>,
    /// YAML for kubectl, or reason, cost and YAML as JSON
    #[arg(long, value_enum, default_value = "yaml")]
    output: Output,
}

/// Whom it is about.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Who {
    /// The user that floods; a service account is system:serviceaccount:NAMESPACE:NAME
    #[arg(long)]
    user: Option<String>,
    /// The group whose users flood
    #[arg(long)]
    group: Option<String>,
}

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For kubectl
    Yaml,
    /// For programs
    Json,
}

/// Answers.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let subject = match (&arguments.who.user, &arguments.who.group) {
        (Some(user), _) => Subject::User(user.clone()),
        (None, group) => Subject::Group(group.clone().unwrap_or_default()),
    };
    let (control, observed) = match &arguments.levels {
        Some(file) => (from_file(file).map_err(Failure::Configuration)?, None),
        None => from_agent(&arguments, &subject).await?,
    };
    let question = Question {
        subject,
        verbs: arguments.verbs,
        lists: arguments.lists,
        heavy: arguments.heavy,
        server_seats: arguments
            .max_requests_inflight
            .saturating_add(arguments.max_mutating_requests_inflight),
        levels: control.levels,
        schemas: control.schemas,
        observed,
    };
    let advice = fairness::advise(&question).map_err(|refused| Failure::Configuration(refused.into()))?;
    let text = match arguments.output {
        Output::Yaml => advice.text(),
        Output::Json => {
            let shown = json!({
                "name": advice.name,
                "seats": advice.seats,
                "lists_at_once": advice.lists_at_once,
                "reason": advice.reason,
                "cost": advice.cost,
                "manifest": advice.manifest,
            });
            serde_json::to_string_pretty(&shown).map_err(anyhow::Error::from)? + "\n"
        }
    };
    super::print(&text)
}

fn from_file(file: &std::path::Path) -> anyhow::Result<FlowControl> {
    let name = file.display();
    let text = if file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        fs::read_to_string(file)
    };
    let text = text.map_err(|error| anyhow::anyhow!("--levels {name}: cannot read it: {error}"))?;
    FlowControl::from_kubectl(&text).map_err(|why| anyhow::anyhow!("--levels {name}: {why}"))
}

async fn from_agent(arguments: &Arguments, subject: &Subject) -> Result<(FlowControl, Option<Observed>), Failure> {
    let answer: Value = client::get(arguments.api.path(), "/v1/flows").await?;
    if let Some(why) = answer["names_fault"].as_str() {
        let how = "give --levels FILE, from `kubectl get prioritylevelconfigurations,flowschemas -o json`";
        return Err(anyhow::anyhow!("the cluster's levels are not known: {why}; {how}").into());
    }
    let shown: Shown = serde_json::from_value(answer["flow_control"].clone()).map_err(anyhow::Error::from)?;
    let observed = match subject {
        Subject::User(user) => observed(show::list(&answer["flows"]), user),
        // Whose groups are what is not known to the relay.
        Subject::Group(_) => None,
    };
    Ok((shown.into(), observed))
}

/// What was seen of a user; `None` when nothing was.
fn observed(rows: &[Value], user: &str) -> Option<Observed> {
    let bytes = |row: &&Value| row["bytes"].as_u64().unwrap_or_default();
    let own = || rows.iter().filter(|row| row["user"] == user);
    let heaviest = own().filter(|row| row["flow_schema"].is_string()).max_by_key(bytes)?;
    Some(Observed {
        open_streams: own().filter_map(|row| row["open_streams"].as_u64()).sum(),
        bytes: own().map(|row| bytes(&row)).sum(),
        all_bytes: rows.iter().map(|row| bytes(&row)).sum(),
        schema: heaviest["flow_schema"].as_str().map(str::to_owned),
    })
}
