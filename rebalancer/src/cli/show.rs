//! The agent's answers as tables for people.
//!
//! Input: the API's JSON. Output: text. Must never show a number the API does not.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::table::{Table, clean};
use crate::span::Short;

pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

pub fn percent(value: &Value) -> String {
    value
        .as_f64()
        .map_or_else(|| "-".to_owned(), |share| format!("{:+.1} %", share * 100.0))
}

pub fn seconds(value: &Value) -> String {
    value.as_u64().map_or_else(
        || "-".to_owned(),
        |seconds| Short(std::time::Duration::from_secs(seconds)).to_string(),
    )
}

pub fn list(value: &Value) -> &[Value] {
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

pub fn status(answer: &Value) -> String {
    let mut out = String::new();
    let paused = paused(answer);
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
    let _ = writeln!(
        out,
        "{} connections are not known to speak HTTP/2 or not",
        text(&answer["unknown"]),
    );
    for warning in list(&answer["warnings"]) {
        let _ = writeln!(out, "warning: {}", text(warning));
    }
    let now = answer["hold"]["message"]
        .as_str()
        .map_or_else(|| "a plan would start".to_owned(), |message| format!("hold: {message}"));
    let since = match answer["hold_since_s"].as_u64() {
        Some(_) => format!(" (for this reason since {})", seconds(&answer["hold_since_s"])),
        None => String::new(),
    };
    let _ = writeln!(out, "{now}{since}\n");
    if let Some(proposal) = answer["proposal"].as_u64() {
        let _ = writeln!(out, "a rebalancing waits for `rebalancer approve {proposal}`\n");
    }
    if answer["evacuation"].is_object() {
        out += &evacuation(&answer["evacuation"]);
        out.push('\n');
    }
    out += &view(list(&answer["view"]), &answer["mean"]);
    let faults: Vec<&Value> = list(&answer["peers"])
        .iter()
        .filter(|peer| !peer["fault"].is_null())
        .collect();
    for peer in faults {
        let heard = if peer["age_ms"].is_null() { "never heard: " } else { "" };
        let _ = writeln!(out, "{}: {heard}{}", text(&peer["apiserver"]), text(&peer["fault"]));
    }
    if answer["membership"]["set_from"] == "agents" {
        let _ = writeln!(out, "the set of apiservers is from {BY_AGENTS}");
    }
    out
}

/// Of a set of apiservers that no identity Leases name.
const BY_AGENTS: &str = "the agents' Leases alone: an apiserver without an agent is not known";

/// Whether it is paused, for how long yet, and what for.
fn paused(answer: &Value) -> String {
    if answer["paused"] != true {
        return String::new();
    }
    let shown = |who: String, pause: &Value, left: Option<u64>| {
        let left = left.map(|left| format!(" for {} yet", Short(std::time::Duration::from_secs(left))));
        let reason = match pause["reason"].as_str() {
            None | Some("") => String::new(),
            Some(reason) => format!(" ({})", clean(reason)),
        };
        format!(", PAUSED{who}{}{reason}", left.unwrap_or_default())
    };
    let mut words = String::new();
    let (pause, switch) = (&answer["pause"], &answer["switch"]);
    if pause.is_object() {
        words += &shown(String::new(), pause, pause["left_s"].as_u64());
    }
    if switch["pause"].is_object() {
        let left = switch["pause"]["left_ms"].as_u64().map(|left| left / 1_000);
        let who = format!(" with all agents, on {}", clean(&text(&switch["by"])));
        words += &shown(who, &switch["pause"], left);
    }
    words
}

/// How old what is known of a peer is.
fn age(peer: &Value) -> String {
    match peer["age_ms"].as_u64() {
        Some(age) => Short(std::time::Duration::from_millis(age)).to_string(),
        None => "never heard".to_owned(),
    }
}

/// What is known of each peer.
pub fn peers(answer: &Value) -> String {
    let mut table = Table::new(&["APISERVER", "STATE", "CONNECTIONS", "LOAD", "DRAINING", "AGE", "FAULT"]);
    for peer in list(&answer["peers"]) {
        table.row([
            text(&peer["apiserver"]),
            text(&peer["state"]),
            text(&peer["connections"]),
            text(&peer["load"]),
            text(&peer["draining"]),
            age(peer),
            text(&peer["fault"]),
        ]);
    }
    table.to_string() + &membership(answer)
}

/// What an order came to: the decision with each victim, and who was left out.
pub fn order(answer: &Value) -> String {
    let mut out = decision(&answer["decision"]);
    let left_out = list(&answer["left_out"]);
    if !left_out.is_empty() {
        let mut table = Table::new(&["LEFT OUT", "CLIENT", "USER", "WHY"]);
        for one in left_out {
            table.row([
                text(&one["connection"]),
                text(&one["client"]),
                text(&one["user"]),
                text(&one["why"]).replace('_', " "),
            ]);
        }
        // Writing to a String cannot fail.
        let _ = write!(out, "\n{table}");
    }
    out
}

/// What a decision's numbers follow from.
pub fn derivation(answer: &Value) -> String {
    let mut table = Table::new(&["NUMBER", "VALUE"]);
    let fields = ["weight", "mean", "skew", "threshold", "noise_floor", "rho", "quota"];
    let own = fields.iter().map(|field| ((*field).to_owned(), &answer[*field]));
    let more = answer["derivation"].as_object().into_iter().flatten();
    for (field, value) in own.chain(more.map(|(field, value)| (field.clone(), value))) {
        let shown = match value {
            Value::Array(names) => names.iter().map(text).collect::<Vec<_>>().join(", "),
            value => text(value),
        };
        table.row([field.replace('_', " "), shown]);
    }
    table.to_string()
}

/// One decision as a line, for those who follow.
pub fn line(decision: &Value) -> String {
    let victims = list(&decision["victims"]).len();
    let outcomes = &decision["outcomes"];
    let is_settled = victims > 0 && outcomes["pending"] == 0 && outcomes["draining"] == 0;
    let why = match decision["hold"]["message"].as_str() {
        Some(hold) => format!("hold: {hold}"),
        None if is_settled => format!(
            "settled: {} moved, {} returned, {} lost",
            outcomes["moved"], outcomes["returned"], outcomes["lost"]
        ),
        None => text(&decision["explanation"]),
    };
    let at: String = text(&decision["at"]).chars().take(19).collect();
    let line = format!(
        "{:>6}  {at}  {:<8}  {:>9}  {victims:>5}  {}",
        text(&decision["id"]),
        text(&decision["mode"]),
        percent(&decision["skew"]),
        clean(&why)
    );
    line + "\n"
}

pub fn connections(answer: &Value) -> String {
    let shown = list(&answer["connections"]).len();
    format!(
        "{}{shown} of {} connections\n",
        connection_table(answer),
        text(&answer["total"])
    )
}

/// One line for each connection, without a head.
pub fn connection_rows(answer: &Value) -> String {
    let table = connection_table(answer).to_string();
    table
        .split_once('\n')
        .map_or_else(String::new, |(_, rows)| rows.to_owned())
}

fn connection_table(answer: &Value) -> Table {
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
    table
}

pub fn decision(answer: &Value) -> String {
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
        let mut table = Table::new(&["CONNECTION", "CLIENT", "LOAD", "AGE", "USER", "FATE", "WHY"]);
        for victim in victims {
            table.row([
                text(&victim["connection"]),
                text(&victim["client"]),
                text(&victim["load"]),
                seconds(&victim["age_s"]),
                text(&victim["user"]),
                text(&victim["fate"]).replace('_', " "),
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

pub fn decisions(answer: &Value) -> String {
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

/// What a pause came to.
pub fn pause(answer: &Value) -> String {
    let until = match answer["left_s"].as_u64() {
        Some(_) => format!("for {}, or ", seconds(&answer["left_s"])),
        None => String::new(),
    };
    let kept = not_kept(answer, "a restart of the agent would end the pause");
    let (who, how) = if answer["cluster"] == true {
        (", all agents", " --cluster")
    } else {
        ("", "")
    };
    format!(
        "paused{who}: nothing is decided {until}until `rebalancer resume{how}`\n{kept}{}",
        not_heard(answer)
    )
}

/// What the end of a pause came to.
pub fn resume(answer: &Value) -> String {
    let rest = match (answer["paused"] == true, answer["cluster"] == true) {
        (false, _) => "resumed\n",
        (true, true) => "resumed for all agents; this one is paused by itself still: `rebalancer resume`\n",
        (true, false) => "resumed; all agents are paused still: `rebalancer resume --cluster`\n",
    };
    let kept = not_kept(answer, "a restart of the agent would pause it again");
    rest.to_owned() + &kept + &not_heard(answer)
}

/// That the state file is behind, and what that would do; nothing where it is not.
fn not_kept(answer: &Value, then: &str) -> String {
    if answer["kept"] == false {
        format!("the state file (--state) cannot be written now, see the agent's log: {then}\n")
    } else {
        String::new()
    }
}

/// Who has not heard of a word to all.
fn not_heard(answer: &Value) -> String {
    list(&answer["not_heard_by"])
        .iter()
        .map(|name| {
            format!(
                "{} has not heard of it yet: it does when it answers again\n",
                text(name)
            )
        })
        .collect()
}

/// What all agents do, and who the apiservers are.
pub fn cluster(answer: &Value) -> String {
    let mut table = Table::new(&["APISERVER", "STATE", "CONNECTIONS", "DRAINING", "AGENT", "AGE", "FAULT"]);
    for peer in list(&answer["peers"]) {
        table.row([
            text(&peer["apiserver"]),
            text(&peer["state"]),
            text(&peer["connections"]),
            text(&peer["draining"]),
            text(&peer["part"]),
            age(peer),
            text(&peer["fault"]),
        ]);
    }
    let own = &answer["node"];
    let view = list(&answer["view"]).iter().find(|entry| entry["apiserver"] == *own);
    if let Some(entry) = view {
        table.row([
            text(own),
            text(&entry["state"]),
            text(&entry["connections"]),
            text(&entry["draining"]),
            "this one".to_owned(),
            "now".to_owned(),
            String::new(),
        ]);
    }
    let mut out = table.to_string();
    let pause = &answer["switch"]["pause"];
    if !pause.is_null() {
        let reason = match pause["reason"].as_str() {
            Some(reason) if !reason.is_empty() => format!(": {}", clean(reason)),
            _ => String::new(),
        };
        let left = match pause["left_ms"].as_u64() {
            Some(left) => format!(" for {} yet", Short(std::time::Duration::from_millis(left))),
            None => String::new(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "all agents are paused{left}, on {}{reason}",
            clean(&text(&answer["switch"]["by"]))
        );
        for peer in list(&answer["peers"]).iter().filter(|peer| {
            let said = |switch: &Value| (switch["stamp"].clone(), switch["by"].clone());
            said(&peer["switch"]) != said(&answer["switch"])
        }) {
            let _ = writeln!(out, "{} has not heard of it yet", text(&peer["apiserver"]));
        }
    }
    out + &membership(answer)
}

/// Who the apiservers are by the cluster's Leases; nothing where peers are named by flags.
fn membership(answer: &Value) -> String {
    let membership = &answer["membership"];
    if !membership.is_object() {
        return String::new();
    }
    let from = match membership["set_from"].as_str() {
        Some("identity_leases") => "the apiservers' identity Leases",
        _ => BY_AGENTS,
    };
    let mut out = format!("the set of apiservers is from {from}\n");
    // Writing to a String cannot fail.
    for (name, agent) in membership["agents"].as_object().into_iter().flatten() {
        let key = text(&agent["key_sha256"]);
        let _ = writeln!(
            out,
            "{}: its agent is at {}, key {}",
            clean(name),
            text(&agent["address"]),
            key.get(..16).unwrap_or(&key)
        );
    }
    for name in list(&membership["gone"]) {
        let _ = writeln!(out, "{} is gone", text(name));
    }
    for why in [&membership["doubt"], &membership["blind"]]
        .into_iter()
        .filter(|why| !why.is_null())
        .chain(list(&membership["refused"]))
    {
        let _ = writeln!(out, "{}", text(why));
    }
    out
}

/// How far an evacuation is.
pub fn evacuation(evacuation: &Value) -> String {
    let number = |name: &str| evacuation[name].as_u64().unwrap_or_default();
    let mut out = format!(
        "{}: {} told, {} to go, {} draining with {} streams\n",
        text(&evacuation["state"]),
        number("told"),
        number("to_go"),
        number("draining"),
        number("draining_streams"),
    );
    // Writing to a String cannot fail.
    if number("at_next_answer") > 0 {
        let _ = writeln!(
            out,
            "{} over HTTP/1.1 are told with their next answer",
            number("at_next_answer")
        );
    }
    if number("stay") > 0 {
        let _ = writeln!(
            out,
            "{} cannot be told ({}), and break when the apiserver stops:",
            number("stay"),
            text(&evacuation["stay_why"])
        );
        let named = list(&evacuation["staying"]);
        for one in named {
            let user = one["user"].as_str().map(|user| format!(" {}", clean(user)));
            let _ = writeln!(
                out,
                "  {}{}: {}",
                text(&one["client"]),
                user.unwrap_or_default(),
                text(&one["why"])
            );
        }
        let rest = number("stay").saturating_sub(named.len() as u64);
        if rest > 0 {
            let _ = writeln!(out, "  and {rest} more");
        }
    }
    if let Some(stuck) = evacuation["stuck"].as_str() {
        let _ = writeln!(out, "stuck: {stuck}");
    }
    out
}

/// What the end of an evacuation came to.
pub fn returned(answer: &Value) -> String {
    let kept = not_kept(answer, "a restart of the agent would evacuate again");
    let what = if answer["was_evacuated"] == true {
        "returned: clients are welcome here"
    } else {
        "it was not evacuated"
    };
    format!("{what}\n{kept}")
}

/// What the order to evacuate came to.
pub fn evacuate(answer: &Value) -> String {
    let kept = not_kept(answer, "a restart of the agent would end the evacuation");
    kept + &evacuation(&answer["evacuation"])
}
