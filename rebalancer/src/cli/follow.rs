//! `rebalancer decisions --follow`: the agent's server-sent events, as they come.
//!
//! Must never leave a decision out that was made while the past was read.

use std::fmt::Write as _;

use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt as _;
use serde_json::Value;

use super::{
    Failure,
    client::{Common, Output},
    show,
};
use crate::local::client;

/// The path of past decisions.
pub fn past(limit: usize, since: Option<u64>) -> String {
    let mut path = format!("/v1/decisions?limit={limit}");
    if let Some(since) = since {
        // Writing to a String cannot fail.
        let _ = write!(path, "&since={since}");
    }
    path
}

/// Shows past decisions, then each as it comes, until the agent ends.
pub async fn run(common: &Common, limit: usize, since: Option<u64>) -> Result<(), Failure> {
    let socket = common.api.path();
    let shown = |decision: &Value| match common.output {
        Output::Table => show::line(decision),
        Output::Json => super::escaped(&decision.to_string()) + "\n",
    };
    // The stream first: what is made while the past is read waits in it.
    let answer = client::send(socket, Method::GET, "/v1/decisions/stream", Bytes::new()).await?;
    if !answer.status().is_success() {
        return Err(anyhow::anyhow!("/v1/decisions/stream: {}", answer.status()).into());
    }
    let known: Value = client::get(socket, &past(limit, since)).await?;
    let mut text = String::new();
    let mut last = since.unwrap_or(0);
    for decision in show::list(&known["decisions"]) {
        last = last.max(decision["id"].as_u64().unwrap_or(0));
        text += &shown(decision);
    }
    super::print(&text)?;
    let mut events = Events::default();
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(anyhow::Error::new)?;
        let Some(octets) = frame.data_ref() else { continue };
        for event in events.take(octets) {
            match event {
                Event::Decision(decision) => {
                    // A plan that has settled comes again, with its own id: that is news.
                    let is_news = decision["id"].as_u64().is_some_and(|id| id > last)
                        || decision["hold"].is_null() && decision["outcomes"]["pending"] == 0;
                    if is_news {
                        super::print(&shown(&decision))?;
                    }
                }
                Event::Missed(count) => eprintln!("rebalancer: {count} decisions were missed: too slow"),
            }
        }
    }
    Err(anyhow::anyhow!("the agent has ended").into())
}

/// One server-sent event.
#[derive(Debug, PartialEq)]
enum Event {
    Decision(Value),
    Missed(String),
}

/// Puts events together from whatever pieces come.
#[derive(Debug, Default)]
struct Events {
    rest: Vec<u8>,
}

impl Events {
    fn take(&mut self, octets: &[u8]) -> Vec<Event> {
        self.rest.extend_from_slice(octets);
        let mut events = Vec::new();
        while let Some(end) = self.rest.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.rest.drain(..end + 2).collect();
            events.extend(parsed(&String::from_utf8_lossy(&event)));
        }
        events
    }
}

fn parsed(text: &str) -> Option<Event> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let data = field("data: ")?;
    match field("event: ")? {
        "decision" => serde_json::from_str(data).ok().map(Event::Decision),
        "missed" => Some(Event::Missed(data.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_come_whole_from_any_pieces() {
        let text = "id: 7\nevent: decision\ndata: {\"id\":7}\n\nevent: missed\ndata: 3\n\nevent: other\ndata: 1\n\nid: 8\nevent: decision\ndata: {\"id\":8}\n\n";
        let expected = [
            Event::Decision(json!({"id": 7})),
            Event::Missed("3".to_owned()),
            Event::Decision(json!({"id": 8})),
        ];
        for piece in [1, 2, 7, text.len()] {
            let mut events = Events::default();
            let found: Vec<_> = text
                .as_bytes()
                .chunks(piece)
                .flat_map(|piece| events.take(piece))
                .collect();
            assert_eq!(found, expected, "pieces of {piece}");
            assert!(events.rest.is_empty());
        }
    }
}
