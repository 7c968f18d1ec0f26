//! A page that is executed: its commands, each with the host it is for.
//!
//! Must never run what the page does not say: a test adds looks between its steps, and no command.

use crate::docs::page;

/// One line of a shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The hosts, by name; all of them for `each`.
    pub host: String,
    /// What is typed.
    pub line: String,
    /// The words that a line of the screen begins with when `watch` is ended.
    pub until: Option<String>,
}

impl Step {
    /// Whether a screen has a line that begins so; how wide its columns are does not matter.
    pub fn is_seen(until: &str, screen: &str) -> bool {
        let words = || until.split_whitespace();
        screen
            .lines()
            .any(|line| line.split_whitespace().take(words().count()).eq(words()))
    }
}

/// A heading and what is typed below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    pub title: String,
    pub steps: Vec<Step>,
}

/// The sections of a page.
pub fn sections(name: &str) -> Vec<Section> {
    parse(&page(name))
}

fn parse(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.starts_with("```") {
            in_code = !in_code;
        } else if let Some(title) = line.strip_prefix("## ").filter(|_| !in_code) {
            sections.push(Section {
                title: title.to_owned(),
                steps: Vec::new(),
            });
        } else if in_code {
            let section = sections.last_mut().expect("commands are below a heading");
            section.steps.push(step(line));
        }
    }
    sections
}

fn step(line: &str) -> Step {
    let (host, command) = line
        .split_once("# ")
        .unwrap_or_else(|| panic!("no host and no command: {line}"));
    let (command, comment) = command.split_once(" # ").unwrap_or((command, ""));
    let command = command.trim();
    let until = comment.strip_prefix("until ").map(str::to_owned);
    let watched = command.strip_prefix("watch ");
    assert_eq!(watched.is_some(), until.is_some(), "a watch without its end: {line}");
    Step {
        host: host.to_owned(),
        line: watched.unwrap_or(command).to_owned(),
        until,
    }
}

#[test]
fn commands_have_a_host_and_a_watch_its_end() {
    let text =
        "# T\n\n## One\n\n```console\ncp-1# a --b\neach# watch rebalancer status   # until hold: skew\n```\n\n## Two\n";
    let steps = |host: &str, line: &str, until: Option<&str>| Step {
        host: host.to_owned(),
        line: line.to_owned(),
        until: until.map(str::to_owned),
    };
    let expected = [
        (
            "One",
            vec![
                steps("cp-1", "a --b", None),
                steps("each", "rebalancer status", Some("hold: skew")),
            ],
        ),
        ("Two", vec![]),
    ];
    let expected = expected.map(|(title, steps)| Section {
        title: title.to_owned(),
        steps,
    });
    assert_eq!(parse(text), expected);
}

#[test]
fn a_watch_ends_with_a_line_that_begins_so() {
    let screen = "cp-1       ready  51\ncp-3       down   50\n[+]ping ok\n";
    for (until, expected) in [
        ("cp-3 down", true),
        ("cp-1 down", false),
        ("ok", false),
        ("cp-1 ready 51", true),
        ("cp-1 rea", false),
    ] {
        assert_eq!(Step::is_seen(until, screen), expected, "{until}");
    }
}

#[test]
fn the_walk_through_installs_balances_upgrades_evacuates_and_goes_back() {
    let sections = sections("docs/walkthrough.md");
    let titles: Vec<&str> = sections.iter().map(|section| section.title.as_str()).collect();
    assert_eq!(titles.len(), 7, "{titles:?}");
    for word in ["image", "dry run", "real", "balance", "evacuate", "Upgrade", "nothing"] {
        assert!(titles.iter().any(|title| title.contains(word)), "{word}: {titles:?}");
    }
    for section in &sections {
        assert!(!section.steps.is_empty(), "{}", section.title);
        for step in &section.steps {
            assert!(
                ["cp-1", "cp-2", "cp-3", "each", "lb"].contains(&step.host.as_str()),
                "{step:?}"
            );
        }
    }
}
