//! Connections summed by user, as a table for people.
//!
//! Input: the API's JSON. Output: text. Must never show a number the API does not.

use serde_json::Value;

use super::{
    show::{list, text},
    table::Table,
};

/// Connections summed by user.
pub fn table_of(answer: &Value) -> String {
    let mut table = Table::new(&[
        "USER",
        "CONNECTIONS",
        "REQUESTS",
        "A SECOND",
        "STREAMS",
        "WATCHES",
        "BYTES",
        "A SECOND",
    ]);
    let shown = list(&answer["users"]);
    for user in shown {
        table.row([
            text(&user["user"]),
            text(&user["connections"]),
            text(&user["requests"]),
            text(&user["requests_per_second"]),
            text(&user["open_streams"]),
            text(&user["open_watches"]),
            text(&user["bytes"]),
            text(&user["bytes_per_second"]),
        ]);
    }
    format!("{table}{} of {} users\n", shown.len(), text(&answer["total"]))
}
