//! The commands that ask a running agent, or tell it something.
//!
//! Output: a table for people, or the API's own JSON.

use std::{fmt::Write as _, path::Path, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{Failure, flows, follow, show, users};
use crate::{
    local::{SocketPath, client},
    span::Span,
};

/// How often an order is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Where the agent answers.
#[derive(Debug, Args)]
pub struct Api {
    /// The agent's local API
    #[arg(
        long,
        env = "REBALANCER_API",
        default_value = "unix:/run/rebalancer/agent.sock",
        value_name = "unix:PATH"
    )]
    api: SocketPath,
}

impl Api {
    /// The socket.
    pub fn path(&self) -> &Path {
        &self.api.0
    }
}

/// Where the agent answers, and how the answer is shown.
#[derive(Debug, Args)]
pub struct Common {
    #[command(flatten)]
    pub api: Api,
    /// For people, or the API's own JSON
    #[arg(long, value_enum, default_value = "table")]
    pub output: Output,
}

/// How an answer is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// The API's own JSON
    Json,
}

/// What is asked.
#[derive(Debug, Subcommand)]
pub enum Question {
    /// Show how the agent is, all apiservers side by side, and what it would do now
    Status {
        /// What all agents do, and who the apiservers are
        #[arg(long)]
        cluster: bool,
        #[command(flatten)]
        common: Common,
    },
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
        /// Summed, those with the most first: of connections, unless --sort says what else
        #[arg(long, value_parser = ["user"])]
        by: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        common: Common,
    },
    /// Show who asks for what: users, their flows and priority levels, by requests, octets, streams and refusals
    Flows {
        /// Rates are over so long
        #[arg(long, default_value = "1s", value_name = "DURATION")]
        over: Span,
        /// The largest first
        #[arg(long, value_enum, default_value = "bytes")]
        sort: flows::Sort,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        common: Common,
    },
    /// Show what is known of each peer, and why nothing is
    Peers(Common),
    /// Show the decision that would be made now, and why; nothing is done
    Plan {
        /// Show the numbers it follows from too
        #[arg(long)]
        explain: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Show past decisions, holds included
    Decisions {
        /// One decision in full
        #[arg(conflicts_with = "follow")]
        id: Option<u64>,
        /// The newest so many
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// Only with a higher id
        #[arg(long)]
        since: Option<u64>,
        /// Go on with each decision as it is made, and with each plan when it has settled
        #[arg(long, short)]
        follow: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Tell connections to go, at the budget's rate, also while paused; exclusions hold unless --force
    Goaway {
        #[command(flatten)]
        who: Who,
        /// Do not wait until each has been told
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Decide nothing until resumed; who has not been told is not told
    Pause {
        /// Resume by itself after this time, for example 2h
        #[arg(long = "for", value_name = "DURATION")]
        length: Option<Span>,
        /// What for: shown by `status` and in each hold
        #[arg(long, default_value = "")]
        reason: String,
        /// All agents: whoever cannot be reached now hears of it when it can
        #[arg(long)]
        cluster: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Decide again
    Resume {
        /// All agents; without it, what was said to this agent alone
        #[arg(long)]
        cluster: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Move every client that can be told off this apiserver, and send nobody there until `rebalancer return` or its restart
    Evacuate {
        /// The time they are told in, one after the other
        #[arg(long, default_value = "60s")]
        over: Span,
        /// Wait until they are off
        #[arg(long)]
        wait: bool,
        /// So long at most [default: --over and three minutes]
        #[arg(long, requires = "wait", value_name = "DURATION")]
        timeout: Option<Span>,
        #[command(flatten)]
        common: Common,
    },
    /// Let this apiserver have clients again after `rebalancer evacuate`
    Return(Common),
    /// Let a rebalancing begin that --mode propose holds
    Approve {
        /// Its number, as `status` and the hold say it
        id: u64,
        #[command(flatten)]
        common: Common,
    },
}

/// Whom an operator means; everything that is given must be true.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("who").required(true).multiple(true))]
pub struct Who {
    /// One connection by its id
    #[arg(long, group = "who", value_name = "ID")]
    connection: Option<String>,
    /// All connections of a client, by ADDRESS or ADDRESS:PORT
    #[arg(long, group = "who")]
    client: Option<String>,
    /// All connections of a user
    #[arg(long, group = "who")]
    user: Option<String>,
    /// Those whose user agent begins like this
    #[arg(long, group = "who", value_name = "PREFIX")]
    user_agent: Option<String>,
    /// Those from a network
    #[arg(long, group = "who", value_name = "ADDRESS/BITS")]
    cidr: Option<String>,
    /// Those without an open stream
    #[arg(long, group = "who")]
    idle: bool,
    /// So many of these who may be told, the oldest
    #[arg(long, group = "who", conflicts_with = "percent")]
    count: Option<usize>,
    /// This share of these who may be told, the oldest
    #[arg(long, group = "who", value_name = "PERCENT")]
    percent: Option<f64>,
    /// Spread over this time, for example 5m
    #[arg(long, value_name = "DURATION")]
    over: Option<Span>,
    /// Those too whom the configuration excludes, or who are on this node
    #[arg(long)]
    force: bool,
}

impl Who {
    /// The API's body.
    fn body(&self) -> Value {
        let mut body = json!({
            "connection": self.connection,
            "client": self.client,
            "user": self.user,
            "user_agent": self.user_agent,
            "cidr": self.cidr,
            "idle": self.idle,
            "count": self.count,
            "percent": self.percent,
            "over_s": self.over.map(|over| over.0.as_secs_f64()),
            "force": self.force,
        });
        if let Some(members) = body.as_object_mut() {
            members.retain(|_, value| !value.is_null() && value != &json!(false));
        }
        body
    }
}

impl Question {
    fn common(&self) -> &Common {
        match self {
            Self::Peers(common) | Self::Return(common) => common,
            Self::Connections { common, .. }
            | Self::Flows { common, .. }
            | Self::Plan { common, .. }
            | Self::Decisions { common, .. }
            | Self::Goaway { common, .. }
            | Self::Pause { common, .. }
            | Self::Resume { common, .. }
            | Self::Status { common, .. }
            | Self::Evacuate { common, .. }
            | Self::Approve { common, .. } => common,
        }
    }
}

/// How long is waited until all agents have heard of a word to all.
const HEARING: Duration = Duration::from_secs(10);

/// A peer that does not answer is waited for so long: one question may fail where the next is answered.
const SILENCE: Duration = Duration::from_secs(3);

/// Waits until all agents have what was said to all, and adds to the answer who has not.
async fn heard_by_all(socket: &std::path::Path, cluster: bool, mut answer: Value) -> Result<Value, Failure> {
    if !cluster {
        return Ok(answer);
    }
    let began = tokio::time::Instant::now();
    let said = |switch: &Value| (switch["stamp"].clone(), switch["by"].clone());
    let word = said(&answer["switch"]);
    loop {
        let peers: Value = client::get(socket, "/v1/peers").await?;
        let here = said(&peers["switch"]);
        if here != word {
            let why = format!(
                "another word to all agents came at the same time, on {}, and counts: see `rebalancer status --cluster`",
                show::text(&here.1)
            );
            return Err(anyhow::anyhow!(why).into());
        }
        let without: Vec<&Value> = show::list(&peers["peers"])
            .iter()
            .filter(|peer| said(&peer["switch"]) != here)
            .collect();
        let do_any_answer = without.iter().any(|peer| peer["fault"].is_null());
        let patience = if do_any_answer { HEARING } else { SILENCE };
        let names: Vec<&Value> = without.iter().map(|peer| &peer["apiserver"]).collect();
        answer["not_heard_by"] = json!(names);
        if without.is_empty() || began.elapsed() >= patience {
            return Ok(answer);
        }
        sleep(LOOK).await;
    }
}

/// Those who were told may hold streams for so long after the last of them was: a relay hands watches over meanwhile.
const EVACUATION: Duration = Duration::from_secs(180);

/// Waits until everybody is off who can be told, says on stderr how far it is, and adds the last look to the answer.
async fn evacuated(socket: &Path, mut answer: Value, patience: Duration) -> Result<Value, Failure> {
    let deadline = tokio::time::Instant::now() + patience;
    let mut said = String::new();
    loop {
        let status: Value = client::get(socket, "/v1/status").await?;
        let evacuation = &status["evacuation"];
        if evacuation.is_null() {
            let why = "it has ended before everybody was off: by `rebalancer return`, or the apiserver was restarted";
            return Err(anyhow::anyhow!(why).into());
        }
        answer["evacuation"] = evacuation.clone();
        if evacuation["state"] == "evacuated" {
            return Ok(answer);
        }
        let text = show::evacuation(evacuation);
        if tokio::time::Instant::now() >= deadline {
            let why = format!("not everybody is off after {} s:\n{text}", patience.as_secs());
            return Err(anyhow::anyhow!(why.trim_end().to_owned()).into());
        }
        let now = text.lines().next().unwrap_or_default().to_owned();
        if now != said {
            eprintln!("{now}");
            said = now;
        }
        sleep(LOOK).await;
    }
}

/// Asks and shows.
pub async fn run(question: Question) -> Result<(), Failure> {
    let common = question.common();
    let socket = common.api.path();
    let answer: Value = match &question {
        Question::Status { .. } => client::get(socket, "/v1/status").await?,
        Question::Connections {
            state,
            protocol,
            sort,
            by,
            limit,
            ..
        } => {
            let mut path = format!("/v1/connections?sort={sort}&limit={limit}");
            for (key, value) in [("state", state), ("protocol", protocol), ("by", by)] {
                if let Some(value) = value {
                    // Writing to a String cannot fail.
                    let _ = write!(path, "&{key}={}", value.replace('/', "%2F"));
                }
            }
            client::get(socket, &path).await?
        }
        Question::Flows { over, sort, limit, .. } => flows::ask(socket, over.0, *sort, *limit).await?,
        Question::Peers(_) => client::get(socket, "/v1/peers").await?,
        Question::Plan { .. } => client::get(socket, "/v1/plan").await?,
        Question::Decisions { id: Some(id), .. } => client::get(socket, &format!("/v1/decisions/{id}")).await?,
        Question::Decisions {
            limit,
            since,
            follow: true,
            ..
        } => return follow::run(common, *limit, *since).await,
        Question::Decisions { limit, since, .. } => client::get(socket, &follow::past(*limit, *since)).await?,
        Question::Goaway { who, no_wait, .. } => {
            let mut answer: Value = client::post(socket, "/v1/goaway", &who.body()).await?;
            if !no_wait {
                let id = answer["decision"]["id"].as_u64().unwrap_or_default();
                while answer["decision"]["outcomes"]["pending"]
                    .as_u64()
                    .is_some_and(|pending| pending > 0)
                {
                    sleep(LOOK).await;
                    answer["decision"] = client::get(socket, &format!("/v1/decisions/{id}")).await?;
                }
            }
            answer
        }
        Question::Pause {
            length,
            reason,
            cluster,
            ..
        } => {
            let mut body = json!({"reason": reason, "cluster": cluster});
            if let Some(length) = length {
                body["for_s"] = json!(length.0.as_secs_f64());
            }
            let answer = client::post(socket, "/v1/pause", &body).await?;
            heard_by_all(socket, *cluster, answer).await?
        }
        Question::Resume { cluster, .. } => {
            let answer = client::post(socket, "/v1/resume", &json!({"cluster": cluster})).await?;
            heard_by_all(socket, *cluster, answer).await?
        }
        Question::Evacuate {
            over, wait, timeout, ..
        } => {
            let body = json!({"over_s": over.0.as_secs_f64()});
            let mut answer: Value = client::post(socket, "/v1/evacuate", &body).await?;
            if *wait {
                let patience = timeout.as_ref().map_or(over.0 + EVACUATION, |timeout| timeout.0);
                answer = evacuated(socket, answer, patience).await?;
            }
            answer
        }
        Question::Return(_) => client::post(socket, "/v1/return", &json!({})).await?,
        Question::Approve { id, .. } => client::post(socket, &format!("/v1/approve/{id}"), &json!({})).await?,
    };
    let text = match common.output {
        Output::Json => super::json(&answer)?,
        Output::Table => match question {
            Question::Status { cluster: true, .. } => show::cluster(&answer),
            Question::Status { .. } => show::status(&answer),
            Question::Connections { by: Some(_), .. } => users::table_of(&answer),
            Question::Connections { .. } => show::connections(&answer),
            Question::Flows { .. } => flows::table(&answer),
            Question::Peers(_) => show::peers(&answer),
            Question::Plan { explain: true, .. } => show::decision(&answer) + "\n" + &show::derivation(&answer),
            Question::Plan { .. } | Question::Decisions { id: Some(_), .. } => show::decision(&answer),
            Question::Decisions { .. } => show::decisions(&answer),
            Question::Goaway { .. } => show::order(&answer),
            Question::Pause { .. } => show::pause(&answer),
            Question::Resume { .. } => show::resume(&answer),
            Question::Evacuate { .. } => show::evacuate(&answer),
            Question::Return(_) => show::returned(&answer),
            Question::Approve { id, .. } => format!("approved: the rebalancing of proposal {id} may begin\n"),
        },
    };
    super::print(&text)
}
