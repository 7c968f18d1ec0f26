//! The commands that ask a running agent: `status`, `connections`, `plan`, `decisions`, `goaway`, `pause`, `resume`.
//!
//! Output: a table for people, or the API's own JSON.

use std::fmt::Write as _;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{Failure, table::Table};
use crate::{
    local::{SocketPath, client},
    span::Short,
};

/// Where the agent answers, and how the answer is shown.
#[derive(Debug, Args)]
pub struct Common {
    /// The agent's local API
    #[arg(
        long,
        env = "REBALANCER_API",
        default_value = "unix:/run/rebalancer/agent.sock",
        value_name = "unix:PATH"
    )]
    api: SocketPath,
    /// For people, or the API's own JSON
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// The API's own JSON
    Json,
}

/// What is asked.
#[derive(Debug, Subcommand)]
pub enum Question {
    /// Show how the agent is, all apiservers side by side, and what it would do now
    Status(Common),
    /// List the connections of the local apiserver
    Connections {
        /// Only these
        #[arg(long, value_parser = ["active", "draining"])]
        state: Option<String>,
        /// Only these
        #[arg(long, value_parser = ["h2", "offered", "http/1.1", "unknown"])]
        protocol: Option<String>,
        /// The largest first
        #[arg(long, value_parser = ["age", "requests", "streams", "watches", "bytes"], default_value = "age")]
        sort: String,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        common: Common,
    },
    /// Show the decision that would be made now, and why; nothing is done
    Plan(Common),
    /// Show past decisions, holds included
    Decisions {
        /// One decision in full
        id: Option<u64>,
        /// The newest so many
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// Only with a higher id
        #[arg(long)]
        since: Option<u64>,
        #[command(flatten)]
        common: Common,
    },
    /// Tell connections to go, at the budget's rate
    #[command(group = clap::ArgGroup::new("who").required(true))]
    Goaway {
        /// One connection by its id
        #[arg(long, group = "who", value_name = "ID")]
        connection: Option<String>,
        /// All connections of a client, by ADDRESS or ADDRESS:PORT
        #[arg(long, group = "who")]
        client: Option<String>,
        /// The oldest so many
        #[arg(long, group = "who")]
        count: Option<usize>,
        #[command(flatten)]
        common: Common,
    },
    /// Decide nothing until resumed; what is under way is dropped
    Pause(Common),
    /// Decide again
    Resume(Common),
}

impl Question {
    fn common(&self) -> &Common {
        match self {
            Self::Status(common) | Self::Plan(common) | Self::Pause(common) | Self::Resume(common) => common,
            Self::Connections { common, .. } | Self::Decisions { common, .. } | Self::Goaway { common, .. } => common,
        }
    }
}

/// Asks and shows.
pub async fn run(question: Question) -> Result<(), Failure> {
    let common = question.common();
    let socket = &common.api.0;
    let answer: Value = match &question {
        Question::Status(_) => client::get(socket, "/v1/status").await?,
        Question::Connections {
            state,
            protocol,
            sort,
            limit,
            ..
        } => {
            let mut path = format!("/v1/connections?sort={sort}&limit={limit}");
            for (key, value) in [("state", state), ("protocol", protocol)] {
                if let Some(value) = value {
                    // Writing to a String cannot fail.
                    let _ = write!(path, "&{key}={}", value.replace('/', "%2F"));
                }
            }
            client::get(socket, &path).await?
        }
        Question::Plan(_) => client::get(socket, "/v1/plan").await?,
        Question::Decisions { id: Some(id), .. } => client::get(socket, &format!("/v1/decisions/{id}")).await?,
        Question::Decisions { limit, since, .. } => {
            let since = since.map(|since| format!("&since={since}")).unwrap_or_default();
            client::get(socket, &format!("/v1/decisions?limit={limit}{since}")).await?
        }
        Question::Goaway {
            connection,
            client: address,
            count,
            ..
        } => {
            let body = if let Some(connection) = connection {
                json!({"connection": connection})
            } else if let Some(address) = address {
                json!({"client": address})
            } else {
                json!({"count": count})
            };
            client::post(socket, "/v1/goaway", &body).await?
        }
        Question::Pause(_) => client::post(socket, "/v1/pause", &json!({})).await?,
        Question::Resume(_) => client::post(socket, "/v1/resume", &json!({})).await?,
    };
    let text = match common.output {
        Output::Json => serde_json::to_string_pretty(&answer).map_err(anyhow::Error::from)? + "\n",
        Output::Table => match question {
            Question::Status(_) => status(&answer),
            Question::Connections { .. } => connections(&answer),
            Question::Plan(_) | Question::Decisions { id: Some(_), .. } => decision(&answer),
            Question::Decisions { .. } => decisions(&answer),
            Question::Goaway { .. } => decision(&answer["decision"]),
            Question::Pause(_) => "paused: nothing is decided until `rebalancer resume`\n".to_owned(),
            Question::Resume(_) => "resumed\n".to_owned(),
        },
    };
    super::print(&text)
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn percent(value: &Value) -> String {
    value
        .as_f64()
        .map_or_else(|| "-".to_owned(), |share| format!("{:+.1} %", share * 100.0))
}

fn seconds(value: &Value) -> String {
    value.as_u64().map_or_else(
        || "-".to_owned(),
        |seconds| Short(std::time::Duration::from_secs(seconds)).to_string(),
    )
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// All apiservers side by side, with a bar.
fn view(entries: &[Value], mean: &Value) -> String {
    const BAR: f64 = 30.0;
    let largest = entries
        .iter()
        .filter_map(|entry| entry["load"].as_f64())
        .fold(f64::MIN_POSITIVE, f64::max);
    let mean = mean.as_f64().unwrap_or(0.0);
    let mut table = Table::new(&[
        "APISERVER",
        "STATE",
        "CONNECTIONS",
        "LOAD",
        "SKEW",
        "NODE-LOCAL",
        "DRAINING",
        "AGE",
        "",
    ]);
    for entry in entries {
        let load = entry["load"].as_f64().unwrap_or(0.0);
        let skew = if mean > 0.0 {
            json!(load / mean - 1.0)
        } else {
            Value::Null
        };
        table.row([
            text(&entry["apiserver"]),
            text(&entry["state"]),
            text(&entry["connections"]),
            format!("{load:.0}"),
            percent(&skew),
            text(&entry["node_local"]),
            text(&entry["draining"]),
            format!("{} ms", text(&entry["age_ms"])),
            "█".repeat((load / largest * BAR).round() as usize),
        ]);
    }
    table.to_string()
}

fn status(answer: &Value) -> String {
    let mut out = String::new();
    let paused = if answer["paused"] == true { ", PAUSED" } else { "" };
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{} · up {} · {}{paused} · source {} · shim {} · weight {}",
        text(&answer["node"]),
        seconds(&answer["uptime_s"]),
        text(&answer["mode"]),
        text(&answer["source"]),
        text(&answer["shim"]),
        text(&answer["weight"]),
    );
    let _ = writeln!(
        out,
        "skew {} (starts above {}, stops at {}) · {} GOAWAYs sent · {:.1} tokens · rho {}",
        percent(&answer["skew"]),
        percent(&answer["trigger"]),
        percent(&answer["skew_target"]),
        text(&answer["goaways_total"]),
        answer["budget_tokens"].as_f64().unwrap_or(0.0),
        text(&answer["rho"]),
    );
    let now = answer["hold"]["message"]
        .as_str()
        .map_or_else(|| "a plan would start".to_owned(), |message| format!("hold: {message}"));
    let _ = writeln!(
        out,
        "{} connections are not known to speak HTTP/2 or not",
        text(&answer["unknown"]),
    );
    for warning in list(&answer["warnings"]) {
        let _ = writeln!(out, "warning: {}", text(warning));
    }
    let _ = writeln!(out, "{now}\n");
    out + &view(list(&answer["view"]), &answer["mean"])
}

fn connections(answer: &Value) -> String {
    let mut table = Table::new(&[
        "CONNECTION",
        "CLIENT",
        "PROTOCOL",
        "STATE",
        "NODE-LOCAL",
        "AGE",
        "REQUESTS",
        "STREAMS",
        "WATCHES",
        "USER",
        "USER AGENT",
    ]);
    let shown = list(&answer["connections"]);
    for connection in shown {
        table.row([
            text(&connection["connection"]),
            text(&connection["client"]),
            text(&connection["protocol"]),
            text(&connection["state"]),
            if connection["node_local"] == true { "yes" } else { "" }.to_owned(),
            seconds(&connection["age_s"]),
            text(&connection["requests"]),
            text(&connection["open_streams"]),
            text(&connection["open_watches"]),
            text(&connection["user"]),
            text(&connection["user_agent"]),
        ]);
    }
    format!("{table}{} of {} connections\n", shown.len(), text(&answer["total"]))
}

fn decision(answer: &Value) -> String {
    let mut out = String::new();
    let id = match answer["id"].as_u64() {
        None | Some(0) => "now".to_owned(),
        Some(id) => format!("decision {id}"),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{id} · {} · {} · generation {}\n{}\n",
        text(&answer["at"]),
        text(&answer["mode"]),
        text(&answer["generation"]),
        text(&answer["explanation"]),
    );
    out += &view(list(&answer["view"]), &answer["mean"]);
    let victims = list(&answer["victims"]);
    if !victims.is_empty() {
        let mut table = Table::new(&["CONNECTION", "CLIENT", "LOAD", "AGE", "USER", "WHY"]);
        for victim in victims {
            table.row([
                text(&victim["connection"]),
                text(&victim["client"]),
                text(&victim["load"]),
                seconds(&victim["age_s"]),
                text(&victim["user"]),
                text(&victim["why"]),
            ]);
        }
        let outcomes = &answer["outcomes"];
        let _ = writeln!(
            out,
            "\n{table}{} pending, {} draining, {} moved, {} returned, {} lost",
            outcomes["pending"], outcomes["draining"], outcomes["moved"], outcomes["returned"], outcomes["lost"]
        );
    }
    let heaviest = list(&answer["heaviest"]);
    if !heaviest.is_empty() {
        let mut table = Table::new(&[
            "HEAVIEST",
            "CLIENT",
            "REQUESTS/S",
            "BYTES/S",
            "WATCHES",
            "MOVABLE",
            "USER",
            "USER AGENT",
        ]);
        for heavy in heaviest {
            table.row([
                text(&heavy["connection"]),
                text(&heavy["client"]),
                text(&heavy["requests_per_second"]),
                text(&heavy["bytes_per_second"]),
                text(&heavy["open_watches"]),
                if heavy["unmovable"] == true { "no" } else { "yes" }.to_owned(),
                text(&heavy["user"]),
                text(&heavy["user_agent"]),
            ]);
        }
        let _ = write!(out, "\n{table}");
    }
    out
}

fn decisions(answer: &Value) -> String {
    let mut table = Table::new(&[
        "ID", "AT", "MODE", "SKEW", "VICTIMS", "MOVED", "RETURNED", "LOST", "WHY",
    ]);
    for decision in list(&answer["decisions"]) {
        let why = decision["hold"]["message"].as_str().unwrap_or("plan");
        table.row([
            text(&decision["id"]),
            text(&decision["at"]).chars().take(19).collect(),
            text(&decision["mode"]),
            percent(&decision["skew"]),
            list(&decision["victims"]).len().to_string(),
            text(&decision["outcomes"]["moved"]),
            text(&decision["outcomes"]["returned"]),
            text(&decision["outcomes"]["lost"]),
            why.to_owned(),
        ]);
    }
    table.to_string()
}
