//! What `--bundle` packs for a report.
//!
//! Input: findings, and what agent and relay say. Output: one JSON object in a new file that only its owner may read.
//! Must never say who a client is, neither in a field of its own nor in a sentence that names it.

use std::{
    collections::BTreeSet, fs::OpenOptions, io::Write as _, net::SocketAddr, os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use serde_json::{Value, json};

use super::{Answers, as_json, ask};
use crate::{cli::LONG_VERSION, doctor::Finding};

/// How many past decisions it has.
const DECISIONS: usize = 100;

/// Everything a report needs.
pub async fn make(agent: &Path, answers: &Answers, findings: &[Finding]) -> Value {
    let decisions = ask(agent, &format!("/v1/decisions?limit={DECISIONS}")).await;
    let peers = ask(agent, "/v1/peers").await;
    let mut bundle = json!({
        "version": LONG_VERSION.lines().collect::<Vec<_>>(),
        "doctor": as_json(findings)["findings"],
        "status": answers.status,
        "relay": answers.relay.as_ref().map(|listing| listing.as_ref().map(|listing| listing["upstream"].clone())),
        "peers": peers,
        "decisions": decisions,
    });
    let mut names = BTreeSet::new();
    collect(&bundle, &mut names);
    // The longest first: one may be a part of another.
    let mut names: Vec<String> = names.into_iter().collect();
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    leave_out(&mut bundle, &names);
    bundle
}

/// Members that say who a client is.
const PERSONAL: [&str; 5] = ["client", "user", "user_agent", "groups", "address"];

/// Its number says nothing, and is in no sentence.
const CONNECTION: &str = "connection";

const LEFT_OUT: &str = "left out";

/// What such members say, which sentences elsewhere may say too.
fn collect(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| collect(item, names)),
        Value::Object(members) => {
            for (name, member) in members {
                if PERSONAL.contains(&name.as_str()) {
                    texts(member, names);
                } else {
                    collect(member, names);
                }
            }
        }
        _ => {}
    }
}

fn texts(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| texts(item, names)),
        Value::String(text) if !text.is_empty() => {
            if let Ok(address) = text.parse::<SocketAddr>() {
                names.insert(address.ip().to_string());
            }
            names.insert(text.clone());
        }
        _ => {}
    }
}

fn leave_out(value: &mut Value, names: &[String]) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| leave_out(item, names)),
        Value::String(text) => {
            for name in names {
                *text = without(text, name);
            }
        }
        Value::Object(members) => {
            for (name, member) in members {
                if (PERSONAL.contains(&name.as_str()) || name == CONNECTION) && !member.is_null() {
                    *member = json!(LEFT_OUT);
                } else {
                    leave_out(member, names);
                }
            }
        }
        _ => {}
    }
}

/// A text without a name, where that stands by itself: `bob` is not in `bobbin`.
fn without(text: &str, name: &str) -> String {
    let mut made = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(name) {
        let (before, found) = rest.split_at(at);
        let (_, after) = found.split_at(name.len());
        let is_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        // What is before it may have been taken over already.
        let ends = before.chars().next_back().or_else(|| made.chars().next_back());
        made += before;
        made += if is_word(ends) || is_word(after.chars().next()) {
            name
        } else {
            LEFT_OUT
        };
        rest = after;
    }
    made + rest
}

/// A new file that only its owner may read.
pub fn write(path: &Path, bundle: &Value) -> anyhow::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec_pretty(bundle)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bundle_does_not_say_who_a_client_is() {
        let message =
            "whoever could be moved is heavier than there is to move; the heaviest, 192.0.2.7:4711, weighs 9.0";
        let status = json!({
            "hold": {"reason": "unmovable", "client": "192.0.2.7:4711", "message": message},
            "explanation": "nothing is done: system:node:n1 of 192.0.2.7 is too heavy",
            "victims": [{"client": "[2001:db8::7]:4711", "user": "system:node:n1", "groups": ["bob"],
                "user_agent": null, "load": 1.0, "connection": "9"}],
            "note": "bobbin and bob, 2001:db8::7",
        });
        let answers = Answers {
            status: Ok(status),
            relay: None,
        };
        let found = Finding::note("hold", message);
        let bundle = make(Path::new("/no/such/socket"), &answers, &[found]).await;
        let text = bundle.to_string();
        for name in ["192.0.2.7", "2001:db8::7", "system:node", "bob,", "4711"] {
            assert!(!text.contains(name), "{name}: {text}");
        }
        let status = &bundle["status"]["Ok"];
        assert_eq!(status["note"], "bobbin and left out, left out");
        assert_eq!(status["victims"][0]["load"], 1.0);
        assert_eq!(status["victims"][0]["user_agent"], Value::Null);
        let said = bundle["doctor"][0]["found"].as_str().expect("a finding");
        assert!(said.ends_with("the heaviest, left out, weighs 9.0"), "{said}");
    }
}
