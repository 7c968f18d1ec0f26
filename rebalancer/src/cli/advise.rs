//! `advise`: the FlowSchema and the PriorityLevelConfiguration that hold somebody who floods.
//!
//! Input: who, and the cluster's own levels, from the agent or from what kubectl printed. Output: YAML for kubectl, with why
//! and what it costs as comments. Must never apply it.

use std::{collections::BTreeSet, fs, io::Read as _, path::PathBuf};

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
    /// What they flood with: a verb of Kubernetes, or * for all; may be given several times. Informers read lists by `watch`
    /// too
    #[arg(long = "verb", default_values = ["list", "watch"], value_delimiter = ',', value_name = "VERB")]
    verbs: Vec<String>,
    /// Of what `rebalancer flows` shows: those rows are theirs whose user agent begins so. Whose a token is, no row says
    #[arg(long, value_name = "TEXT", conflicts_with = "levels")]
    user_agent: Option<String>,
    /// The same: those rows are theirs that have this FlowSchema
    #[arg(long, value_name = "NAME", conflicts_with = "levels")]
    flow_schema: Option<String>,
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
            super::json(&shown)?
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
    let seen = Seen {
        // Whose groups are what is not known to the relay, nor whose a token is.
        user: match subject {
            Subject::User(user) if arguments.user_agent.is_none() && arguments.flow_schema.is_none() => Some(user),
            _ => None,
        },
        user_agent: arguments.user_agent.as_deref(),
        flow_schema: arguments.flow_schema.as_deref(),
    };
    Ok((shown.into(), seen.observed(&answer)))
}

/// Which rows are theirs.
struct Seen<'a> {
    user: Option<&'a String>,
    user_agent: Option<&'a str>,
    flow_schema: Option<&'a str>,
}

impl Seen<'_> {
    fn has(&self, row: &Value) -> bool {
        let Self {
            user,
            user_agent,
            flow_schema,
        } = self;
        let text = |field: &str| row[field].as_str().unwrap_or_default();
        user.is_none_or(|user| text("user") == user)
            && user_agent.is_none_or(|begin| text("user_agent").starts_with(begin))
            && flow_schema.is_none_or(|schema| text("flow_schema") == schema || text("flow_schema_uid") == schema)
    }

    fn in_words(&self) -> String {
        let Self {
            user,
            user_agent,
            flow_schema,
        } = self;
        let named = |what: &str, name: Option<&str>| name.map(|name| format!("{what} {name:?}"));
        let names = [
            named("user", user.map(String::as_str)),
            named("user agent", *user_agent),
            named("FlowSchema", *flow_schema),
        ];
        names.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// What was seen of them; `None` when nothing was.
    fn observed(&self, answer: &Value) -> Option<Observed> {
        if self.user.is_none() && self.user_agent.is_none() && self.flow_schema.is_none() {
            return None;
        }
        let rows = show::list(&answer["flows"]);
        let number = |row: &Value, field: &str| row[field].as_u64().unwrap_or_default();
        let own = || rows.iter().filter(|row| self.has(row));
        own().next()?;
        let sum = |field: &str| own().map(|row| number(row, field)).sum::<u64>();
        let watches = sum("open_watches");
        // Only a certificate says whose requests these are; a user agent is what a client calls itself.
        let certain = own().filter(|_| self.user.is_some());
        let schemas: BTreeSet<&str> = certain.filter_map(|row| row["flow_schema"].as_str()).collect();
        Some(Observed {
            whose: self.in_words(),
            open_requests: sum("open_streams").saturating_sub(watches),
            open_watches: watches,
            bytes: sum("bytes"),
            all_bytes: rows.iter().map(|row| number(row, "bytes")).sum::<u64>() + number(&answer["others"], "bytes"),
            schemas: schemas.into_iter().map(str::to_owned).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_theirs_by_user_or_by_what_is_said_of_them() {
        let row = |user: Option<&str>, agent: &str, schema: &str, open: u64, watches: u64| {
            json!({"user": user, "user_agent": agent, "flow_schema": schema, "flow_schema_uid": "1", "open_streams": open,
                "open_watches": watches, "bytes": 100})
        };
        let answer = json!({"others": {"bytes": 100}, "flows": [
            row(Some("a"), "x/1", "s", 9, 4), row(Some("a"), "x/1", "probes", 0, 0), row(None, "x/2", "s", 7, 7),
            row(None, "y", "s", 3, 0),
        ]});
        let of = |user: Option<&str>, user_agent, flow_schema| {
            let user = user.map(str::to_owned);
            let seen = Seen {
                user: user.as_ref(),
                user_agent,
                flow_schema,
            };
            seen.observed(&answer).map(|one| {
                assert_eq!(one.all_bytes, 500);
                (one.whose, one.open_requests, one.open_watches, one.bytes, one.schemas)
            })
        };
        let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(of(None, None, None), None);
        assert_eq!(of(Some("b"), None, None), None);
        assert_eq!(
            of(Some("a"), None, None),
            Some(("user \"a\"".into(), 5, 4, 200, named(&["probes", "s"])))
        );
        assert_eq!(
            of(None, Some("x/"), None),
            Some(("user agent \"x/\"".into(), 5, 11, 300, Vec::new()))
        );
        assert_eq!(
            of(None, Some("x/"), Some("s")),
            Some(("user agent \"x/\", FlowSchema \"s\"".into(), 5, 11, 200, Vec::new()))
        );
        assert_eq!(
            of(None, None, Some("1")),
            Some(("FlowSchema \"1\"".into(), 8, 11, 400, Vec::new()))
        );
    }
}
