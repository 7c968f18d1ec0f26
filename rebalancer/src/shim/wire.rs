//! The control socket's JSON, as docs/relay.md describes it: others can write a shim.
//!
//! Input and output: serde values. Must never be used inside the core.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A connection's id: the socket cookie in lower-case hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(pub u64);

impl Serialize for Id {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map(Self).map_err(|_| {
            serde::de::Error::custom(format_args!(
                "`{text}` is not a connection id (a hexadecimal socket cookie)"
            ))
        })
    }
}

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// Still in its TLS handshake.
    #[serde(rename = "unknown")]
    Unknown,
    /// HTTP/2.
    #[serde(rename = "h2")]
    H2,
    /// HTTP/1.1: told, where it can be, by `Connection: close` in its next answer.
    #[serde(rename = "http/1.1")]
    Http1,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// New streams are welcome.
    Active,
    /// GOAWAY is sent, or `Connection: close`.
    Draining,
}

/// The server behind the shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upstream {
    /// Not asked yet.
    Unknown,
    /// It accepts connections and says `/readyz`.
    Ready,
    /// It accepts connections, but does not say that it is ready.
    Starting,
    /// It answers later than a check waits, or says that it has too much to do.
    Overloaded,
    /// No client's request would get through: TLS with it fails, it does not believe the shim, or the shim stands still.
    Unusable,
    /// It accepts no connection.
    Unreachable,
}

impl Upstream {
    /// For an operator.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Unknown => "the apiserver has not answered",
            Self::Ready => "the apiserver is ready",
            Self::Starting => "the apiserver says that it is not ready",
            Self::Overloaded => "the apiserver answers too late, or that it is not ready",
            Self::Unusable => "the apiserver cannot be used: see the log",
            Self::Unreachable => "the apiserver accepts no connection",
        }
    }
}

/// Figures of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Streams (HTTP/2) or requests (HTTP/1.1) so far.
    pub requests: u64,
    /// Streams open now.
    pub open_streams: u32,
    /// Of these, watches.
    pub open_watches: u32,
    /// Octets from the client, TLS taken off.
    pub bytes_in: u64,
    /// Octets to the client, TLS taken off.
    pub bytes_out: u64,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Which.
    pub id: Id,
    /// The client's address.
    pub client: SocketAddr,
    /// The address it was accepted on.
    pub local: SocketAddr,
    /// What it speaks.
    pub protocol: Protocol,
    /// Whether it can be told to go; a shim that leaves it out can tell those that speak HTTP/2.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub can_be_told: Option<bool>,
    /// How far it is.
    pub state: State,
    /// Milliseconds since it was accepted.
    pub age_ms: u64,
    /// The user of its client certificate.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user: Option<String>,
    /// The user agent of its last request.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user_agent: Option<String>,
    /// Its figures.
    #[serde(flatten)]
    pub counters: Counters,
}

impl Connection {
    /// Whether it can be told to go.
    pub fn can_be_told(&self) -> bool {
        self.can_be_told.unwrap_or(self.protocol == Protocol::H2)
    }
}

/// Newer figures of a connection that did not otherwise change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Which.
    pub id: Id,
    /// Its figures.
    #[serde(flatten)]
    pub counters: Counters,
}

/// `GET /v1/connections`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// `relay`, or another shim's name.
    pub shim: String,
    /// Names the process.
    pub instance: String,
    /// Give it back as `since=INSTANCE:CURSOR` to hear only what changed.
    pub cursor: u64,
    /// Whether this is the whole list: the asker forgets what is not in it.
    pub full: bool,
    /// The highest generation carried out.
    pub generation: u64,
    /// The server behind it.
    pub upstream: Upstream,
    /// What the server calls its version, as far as the shim has heard it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_version: Option<String>,
    /// The cookie of the server's listening socket, where that is on this host: another one is another process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_listener: Option<Id>,
    /// Requests that the server refused for overload since the shim started; absent when the shim does not see answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_total: Option<u64>,
    /// Connections, or those that changed.
    pub connections: Vec<Connection>,
    /// Those that ended since.
    pub closed: Vec<Id>,
    /// Figures that changed, with `counters=true`.
    pub counters: Vec<Counted>,
}

/// `POST /v1/goaway`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoawayRequest {
    /// Of the plan; lower ones than seen are refused.
    pub generation: u64,
    /// Not to be carried out later than this.
    pub expires_in_ms: u64,
    /// Who.
    pub victims: Vec<Id>,
}

/// What became of one victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoawayResult {
    /// GOAWAY goes out now.
    Sent,
    /// It goes out with the answer to its next request, or not at all when the order expires before that.
    Pending,
    /// It had one before.
    AlreadyDraining,
    /// No such connection.
    Unknown,
    /// The order had expired when it came.
    Expired,
    /// It cannot be told: HTTP/1.1 that was upgraded.
    NotH2,
}

/// One victim's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// Which.
    pub id: Id,
    /// What.
    pub result: GoawayResult,
}

/// The answer to `POST /v1/goaway`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoawayAnswer {
    /// The order's generation.
    pub generation: u64,
    /// One for each victim, in its order.
    pub results: Vec<Answered>,
}

/// How a connection that was told to go is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// GOAWAY is written, or `Connection: close`.
    Draining,
    /// It is closed.
    Closed,
    /// It was pending when its order expired, and was not told.
    Expired,
}

/// One line of `GET /v1/outcomes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutcomeEntry {
    /// Counts up.
    pub seq: u64,
    /// Which connection.
    pub id: Id,
    /// Of the order that named it; 0 when it was the shim's own shutdown.
    pub generation: u64,
    /// What.
    pub outcome: Outcome,
    /// Why it closed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// `GET /v1/outcomes?since=SEQ`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcomes {
    /// Names the process.
    pub instance: String,
    /// Give it back as `since`.
    pub next: u64,
    /// Those from `since` on that are still kept.
    pub outcomes: Vec<OutcomeEntry>,
}

/// Sums of some requests since the shim started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowFigures {
    /// Open connections that have made some of them.
    pub connections: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Octets of their answers' bodies.
    pub bytes: u64,
    /// Of them, refused for overload.
    pub refused: u64,
    /// Streams open now; without a flow, those too that wait for their answer.
    pub open_streams: u64,
    /// Of them, watches.
    #[serde(default)]
    pub open_watches: u64,
}

/// Requests of one user with one user agent and of one flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowRow {
    /// The user of the client certificate; nobody knows whose a token is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user: Option<String>,
    /// The user agent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user_agent: Option<String>,
    /// The UID of the FlowSchema that the apiserver named; absent where it named none, or has not answered.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub flow_schema: Option<String>,
    /// The UID of the PriorityLevelConfiguration.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub priority_level: Option<String>,
    /// What they come to.
    #[serde(flatten)]
    pub figures: FlowFigures,
}

/// `GET /v1/flows`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flows {
    /// Names the process: another one counts anew.
    pub instance: String,
    /// Those with the most octets first.
    pub rows: Vec<FlowRow>,
    /// Whether there are rows that are not here, for want of room: which these are may be others the next time.
    #[serde(default)]
    pub cut: bool,
    /// What has no row, for want of room.
    pub others: FlowFigures,
    /// Answers that are counted without their flow: their connections had too many.
    pub unplaced_total: u64,
}
