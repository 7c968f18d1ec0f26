//! Rules and dashboard: judged by Prometheus, and held against what the program exports and the runbook says.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::PathBuf,
    process::Command,
};

use rebalancer_tests::{process::log_directory, skip};
use serde_json::Value;

use crate::{
    docs::{anchors, page, root},
    succeeds,
};

/// Prometheus' own tool, which `cargo xtask test` fetches.
fn promtool() -> Option<PathBuf> {
    let named = env::var_os("REBALANCER_PROMTOOL").map(PathBuf::from);
    let found = named.or_else(|| {
        let path = env::var_os("PATH")?;
        let mut candidates = env::split_paths(&path).map(|directory| directory.join("promtool"));
        candidates.find(|candidate| candidate.is_file())
    });
    if found.is_none() {
        skip("there is no promtool: `cargo xtask test deploy` fetches it where there is a Debian mirror");
    }
    found
}

fn mixin(name: &str) -> PathBuf {
    root().join("deploy/mixin").join(name)
}

fn yaml(name: &str) -> Value {
    let text = fs::read_to_string(mixin(name)).expect("a file");
    serde_yaml_ng::from_str(&text).expect("YAML")
}

fn items<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

fn word<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value[key].as_str()
}

/// All rules of all groups.
fn rules(file: &Value) -> Vec<&Value> {
    items(file, "groups").flat_map(|group| items(group, "rules")).collect()
}

#[test]
fn prometheus_takes_the_rules_and_each_alert_fires_when_it_should() {
    let Some(promtool) = promtool() else { return };
    succeeds(
        Command::new(&promtool)
            .args(["check", "rules"])
            .arg(mixin("rules.yaml")),
    );
    succeeds(
        Command::new(&promtool)
            .current_dir(root().join("deploy/mixin"))
            .args(["test", "rules", "tests.yaml"]),
    );
}

#[test]
fn each_alert_has_a_test_that_fires_it_one_that_does_not_and_a_section_of_the_runbook() {
    let (file, tests) = (yaml("rules.yaml"), yaml("tests.yaml"));
    let mut fired: BTreeMap<&str, (bool, bool)> = BTreeMap::new();
    for test in items(&tests, "tests").flat_map(|test| items(test, "alert_rule_test")) {
        let seen = fired.entry(word(test, "alertname").expect("a name")).or_default();
        match items(test, "exp_alerts").count() {
            0 => seen.1 = true,
            _ => seen.0 = true,
        }
    }
    let sections = anchors(&page("docs/runbook.md"));
    let mut alerts = BTreeSet::new();
    for rule in rules(&file) {
        let Some(alert) = word(rule, "alert") else { continue };
        assert_eq!(fired.get(alert), Some(&(true, true)), "{alert} in tests.yaml");
        let anchor = alert.to_lowercase();
        assert_eq!(rule["annotations"]["runbook"], format!("docs/runbook.md#{anchor}"));
        assert!(sections.contains(&anchor), "docs/runbook.md has no section {alert}");
        assert!(word(&rule["labels"], "severity").is_some(), "{alert}");
        alerts.insert(anchor);
    }
    assert!(alerts.len() >= 15, "{alerts:?}");
    let without: Vec<_> = sections
        .iter()
        .filter(|section| section.starts_with("rebalancer") && !alerts.contains(*section))
        .collect();
    assert!(without.is_empty(), "sections of no alert: {without:?}");
}

/// What the program exports, by the page that a test holds against the code: series name -> its labels.
fn exported() -> BTreeMap<String, BTreeSet<String>> {
    let mut series = BTreeMap::new();
    for line in page("docs/metrics.md").lines() {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, kind, labels, ..] = cells[..] else { continue };
        let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else {
            continue;
        };
        let mut labels: BTreeSet<String> = labels
            .split(", ")
            .map(|label| label.trim_matches('`').to_owned())
            .collect();
        labels.extend(["job".to_owned(), "instance".to_owned()]);
        if kind == "histogram" {
            for suffix in ["_sum", "_count"] {
                series.insert(format!("{name}{suffix}"), labels.clone());
            }
            labels.insert("le".to_owned());
            series.insert(format!("{name}_bucket"), labels);
        } else {
            series.insert(name.to_owned(), labels);
        }
    }
    assert!(series.len() > 30, "{series:?}");
    series
}

/// The series an expression names, each with the labels it selects by.
fn named(expression: &str) -> Vec<(String, BTreeSet<String>)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(at) = rest.find(is_name) {
        let length = rest[at..].find(|c| !is_name(c)).unwrap_or(rest.len() - at);
        let name = &rest[at..at + length];
        rest = &rest[at + length..];
        if !name.starts_with("rebalancer_") && !name.contains(":rebalancer_") {
            continue;
        }
        let mut labels = BTreeSet::new();
        if let Some((selectors, _)) = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            for selector in selectors.split(", ") {
                let end = selector.find(['=', '!']).unwrap_or(selector.len());
                labels.insert(selector[..end].trim().to_owned());
            }
        }
        found.push((name.to_owned(), labels));
    }
    found
}

/// Every expression of the dashboard.
fn expressions(dashboard: &Value) -> Vec<&str> {
    let mut found: Vec<&str> = items(dashboard, "panels")
        .flat_map(|panel| items(panel, "targets"))
        .filter_map(|target| word(target, "expr"))
        .collect();
    found.extend(items(&dashboard["annotations"], "list").filter_map(|annotation| word(annotation, "expr")));
    found
}

pub fn dashboard() -> Value {
    serde_json::from_slice(&fs::read(mixin("dashboard.json")).expect("a file")).expect("JSON")
}

#[test]
fn rules_and_dashboard_name_what_the_program_exports() {
    let (file, dashboard) = (yaml("rules.yaml"), dashboard());
    let mut known = exported();
    for rule in rules(&file) {
        if let Some(record) = word(rule, "record") {
            // `job:...` and `instance:...` are by these.
            let labels = ["job", "instance"].map(str::to_owned);
            known.insert(record.to_owned(), labels.into());
        }
    }
    let holds = crate::docs::holds();
    let queries = rules(&file).into_iter().filter_map(|rule| word(rule, "expr"));
    let mut used = 0;
    for query in queries.chain(expressions(&dashboard)) {
        for (name, labels) in named(query) {
            let has = known
                .get(&name)
                .unwrap_or_else(|| panic!("{name} is not exported: {query}"));
            assert!(labels.is_subset(has), "{name} has {has:?}, not {labels:?}: {query}");
            used += 1;
        }
        for reasons in query.split("reason").skip(1) {
            let value = reasons.trim_start_matches(['=', '~']).strip_prefix('"');
            let reasons = value
                .and_then(|value| value.split_once('"'))
                .map_or("", |(value, _)| value);
            for reason in reasons.split('|').filter(|reason| !reason.is_empty()) {
                assert!(holds.contains(reason), "there is no hold {reason}: {query}");
            }
        }
    }
    assert!(used > 40, "{used}");
}

#[test]
fn the_dashboard_is_one_that_grafana_and_prometheus_can_read() {
    let dashboard = dashboard();
    let (mut ids, mut covered) = (BTreeSet::new(), BTreeSet::new());
    for panel in items(&dashboard, "panels") {
        let number = |key: &str| panel["gridPos"][key].as_u64().expect("a place");
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{panel:#}");
        for x in number("x")..number("x") + number("w") {
            for y in number("y")..number("y") + number("h") {
                assert!(
                    x < 24 && covered.insert((x, y)),
                    "panels lie on each other: {}",
                    panel["title"]
                );
            }
        }
        let is_row = panel["type"] == "row";
        assert_eq!(items(panel, "targets").count() == 0, is_row, "{}", panel["title"]);
        for target in items(panel, "targets") {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{}", panel["title"]);
        }
    }
    let Some(promtool) = promtool() else { return };
    // Prometheus reads the expressions as rules, with what Grafana puts in for its variables.
    let rules: Vec<Value> = expressions(&dashboard)
        .into_iter()
        .map(|query| {
            let query = query
                .replace("$__rate_interval", "5m")
                .replace("$job", ".*")
                .replace("$instance", ".*");
            serde_json::json!({"record": "panel:x", "expr": query})
        })
        .collect();
    let group = |(at, rule)| serde_json::json!({"name": format!("panel {at}"), "rules": [rule]});
    let groups: Vec<Value> = rules.iter().enumerate().map(group).collect();
    let directory = log_directory("dashboard").expect("a directory");
    let path = directory.join("panels.yaml");
    let text = serde_json::to_string(&serde_json::json!({"groups": groups})).expect("JSON");
    fs::write(&path, text).expect("a file");
    succeeds(
        Command::new(&promtool)
            .args(["check", "rules", "--lint=none"])
            .arg(&path),
    );
    fs::remove_dir_all(directory).expect("it is there");
}
