//! `flows`: who asks for what now, by user, user agent, FlowSchema and priority level.
//!
//! Input: two answers of the agent, a moment apart. Output: a table, or the second answer with what happened between them.
//! Must never show a rate across a restart of the relay, whose figures begin anew, nor one of a row that the first answer had
//! no room for: it may have been there all along.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
    path::Path,
    time::Duration,
};

use clap::ValueEnum;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    Failure, show,
    table::{Table, clean},
};
use crate::local::client;

/// What is largest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// Octets of answers a second, then in all
    Bytes,
    /// Requests a second, then in all
    Requests,
    /// Open streams
    Streams,
    /// Refusals a second, then in all
    Refused,
}

/// Looks twice.
pub async fn ask(socket: &Path, over: Duration, sort: Sort, limit: usize) -> Result<Value, Failure> {
    let first: Value = client::get(socket, "/v1/flows").await?;
    let began = Instant::now();
    sleep(over).await;
    let second: Value = client::get(socket, "/v1/flows").await?;
    Ok(with_rates(&first, second, began.elapsed(), sort, limit))
}

/// What tells rows apart.
fn key(row: &Value) -> [String; 4] {
    ["user", "user_agent", "flow_schema_uid", "priority_level_uid"].map(|field| row[field].to_string())
}

fn with_rates(first: &Value, mut second: Value, over: Duration, sort: Sort, limit: usize) -> Value {
    let is_same = first["instance"] == second["instance"];
    let was_cut = first["cut"] == true;
    let before: HashMap<_, &Value> = show::list(&first["flows"]).iter().map(|row| (key(row), row)).collect();
    let seconds = over.as_secs_f64().max(0.001);
    second["over_s"] = json!(seconds);
    let Some(rows) = second["flows"].as_array_mut() else {
        return second;
    };
    for row in rows.iter_mut() {
        let old = before.get(&key(row));
        for field in ["requests", "bytes", "refused"] {
            let count = |row: &Value| row[field].as_u64().unwrap_or_default();
            // What was not there then has happened since, unless there was no room for it.
            let new = count(row).saturating_sub(old.map_or(0, |old| count(old)));
            let is_known = is_same && (old.is_some() || !was_cut);
            let rate = is_known.then(|| (new as f64 / seconds * 10.0).round() / 10.0);
            row[format!("{field}_per_second")] = json!(rate);
        }
    }
    let size = |row: &Value| {
        let (rate, total) = match sort {
            Sort::Bytes => ("bytes_per_second", "bytes"),
            Sort::Requests => ("requests_per_second", "requests"),
            Sort::Streams => ("open_streams", "bytes"),
            Sort::Refused => ("refused_per_second", "refused"),
        };
        let number = |field: &str| row[field].as_f64().unwrap_or_default();
        (number(rate), number(total))
    };
    rows.sort_by(|a, b| {
        let ((rate_a, total_a), (rate_b, total_b)) = (size(a), size(b));
        rate_b.total_cmp(&rate_a).then(total_b.total_cmp(&total_a))
    });
    keep_leaders(rows, limit);
    second
}

/// At most so many rows, the first; but whoever leads by another measure stays: who is refused everything has no octets.
fn keep_leaders(rows: &mut Vec<Value>, limit: usize) {
    let measures = [
        "refused_per_second",
        "open_streams",
        "bytes_per_second",
        "requests_per_second",
    ];
    let leaders: BTreeSet<usize> = measures
        .into_iter()
        .filter_map(|field| {
            let size = |row: &Value| row[field].as_f64().unwrap_or_default();
            let (index, row) = rows.iter().enumerate().max_by(|a, b| size(a.1).total_cmp(&size(b.1)))?;
            let shown = rows.iter().take(limit).map(size).fold(0.0, f64::max);
            (size(row) > shown).then_some(index)
        })
        .take(limit)
        .collect();
    let first = limit.saturating_sub(leaders.len());
    let mut index = 0;
    rows.retain(|_| {
        index += 1;
        index <= first || leaders.contains(&(index - 1))
    });
}

/// For people.
pub fn table(answer: &Value) -> String {
    let mut table = Table::new(&[
        "USER",
        "USER AGENT",
        "FLOW SCHEMA",
        "PRIORITY LEVEL",
        "CONNECTIONS",
        "STREAMS",
        "WATCHES",
        "REQUESTS/S",
        "MB/S",
        "REFUSED/S",
        "REQUESTS",
        "MB",
        "REFUSED",
    ]);
    let megabytes = |value: &Value| match value.as_f64() {
        Some(octets) => format!("{:.1}", octets / 1e6),
        None => "-".to_owned(),
    };
    for row in show::list(&answer["flows"]) {
        let named = |name: &str, uid: &str| match row[name].as_str() {
            Some(name) => name.to_owned(),
            None => show::text(&row[uid]),
        };
        table.row([
            show::text(&row["user"]),
            show::text(&row["user_agent"]),
            named("flow_schema", "flow_schema_uid"),
            named("priority_level", "priority_level_uid"),
            show::text(&row["connections"]),
            show::text(&row["open_streams"]),
            show::text(&row["open_watches"]),
            show::text(&row["requests_per_second"]),
            megabytes(&row["bytes_per_second"]),
            show::text(&row["refused_per_second"]),
            show::text(&row["requests"]),
            megabytes(&row["bytes"]),
            show::text(&row["refused"]),
        ]);
    }
    let mut text = table.to_string();
    let others = &answer["others"];
    if others["requests"].as_u64().unwrap_or_default() > 0 {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "without a row, for want of room: {} requests, {} MB, {} refused",
            others["requests"],
            megabytes(&others["bytes"]),
            others["refused"]
        );
    }
    let without_rate = show::list(&answer["flows"])
        .iter()
        .filter(|row| row["bytes_per_second"].is_null());
    if let count @ 1.. = without_rate.count() {
        let _ = writeln!(text, "without a rate, for want of figures at the first look: {count}");
    }
    if let Some(fault) = answer["names_fault"].as_str() {
        let _ = writeln!(text, "UIDs in place of names: {}", clean(fault));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(instance: &str, rows: &[(&str, u64, u64)]) -> Value {
        let row = |(user, requests, bytes): &(&str, u64, u64)| {
            json!({"user": user, "user_agent": null, "flow_schema": "a", "flow_schema_uid": "1", "priority_level": null,
                "priority_level_uid": "2", "connections": 1, "requests": requests, "bytes": bytes, "refused": 0,
                "open_streams": 1})
        };
        json!({"instance": instance, "flows": rows.iter().map(row).collect::<Vec<_>>(),
            "others": {"requests": 3, "bytes": 1_000_000, "refused": 1}, "names_fault": "nobody may ask"})
    }

    #[test]
    fn rates_are_between_two_looks_and_the_heaviest_now_is_first() {
        let first = answer("x", &[("old", 1_000, 9_000_000), ("flood", 10, 1_000_000)]);
        let second = answer(
            "x",
            &[("old", 1_000, 9_000_000), ("flood", 14, 5_000_000), ("new\n", 2, 100)],
        );
        let got = with_rates(&first, second.clone(), Duration::from_secs(2), Sort::Bytes, 2);
        let rows = got["flows"].as_array().expect("rows");
        assert_eq!(
            (rows.len(), &rows[0]["user"], &rows[1]["user"]),
            (2, &json!("flood"), &json!("new\n"))
        );
        assert_eq!(
            (&rows[0]["requests_per_second"], &rows[0]["bytes_per_second"]),
            (&json!(2.0), &json!(2e6))
        );
        let text = table(&got);
        assert!(
            text.contains("flood") && text.contains("new?") && text.contains(" 2.0 "),
            "{text}"
        );
        assert!(
            text.contains("for want of room: 3 requests, 1.0 MB, 1 refused"),
            "{text}"
        );
        assert!(text.contains("UIDs in place of names: nobody may ask"), "{text}");
        // What the first look had no room for has no rate, and is not first for it.
        let mut cut = first;
        cut["cut"] = json!(true);
        let got = with_rates(&cut, second.clone(), Duration::from_secs(2), Sort::Bytes, 3);
        let rates: Vec<_> = show::list(&got["flows"])
            .iter()
            .map(|row| (&row["user"], &row["bytes_per_second"]))
            .collect();
        assert_eq!(
            rates,
            [
                (&json!("flood"), &json!(2e6)),
                (&json!("old"), &json!(0.0)),
                (&json!("new\n"), &Value::Null)
            ]
        );
        assert!(table(&got).contains("without a rate, for want of figures at the first look: 1"));
        let anew = with_rates(&answer("other", &[]), second, Duration::from_secs(2), Sort::Requests, 9);
        assert_eq!(anew["flows"][0]["requests_per_second"], Value::Null);
        assert_eq!(anew["flows"][0]["user"], "old");
    }

    #[test]
    fn who_is_refused_everything_or_reads_nothing_is_among_few_rows_too() {
        let users: Vec<String> = (0..50).map(|index| format!("user-{index}")).collect();
        let mut rows: Vec<_> = users.iter().map(|user| (user.as_str(), 10, 1_000_000)).collect();
        rows.extend([("refused", 1, 1), ("slow", 1, 0)]);
        let mut second = answer("x", &rows);
        second["flows"][50]["refused"] = json!(40);
        second["flows"][51]["open_streams"] = json!(60);
        for limit in [0, 1, 2, 5] {
            let got = with_rates(
                &answer("x", &[]),
                second.clone(),
                Duration::from_secs(1),
                Sort::Bytes,
                limit,
            );
            let shown: Vec<_> = show::list(&got["flows"])
                .iter()
                .filter_map(|row| row["user"].as_str())
                .collect();
            assert_eq!(shown.len(), limit);
            assert!(limit < 1 || shown.contains(&"refused"), "{shown:?}");
            assert!(limit < 2 || shown.contains(&"slow"), "{shown:?}");
        }
    }
}
