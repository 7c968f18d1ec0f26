//! Pages: links lead somewhere, and what the program can say is said what to do about.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use rebalancer_tests::binary;

/// The workspace's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests lies in it")
}

/// A page's text.
pub fn page(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The anchors of a page's headings, as forges make them: lower case, blanks as hyphens, no punctuation.
pub fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.starts_with("```") {
            in_code = !in_code;
        }
        let heading = line.trim_start_matches('#');
        if in_code || heading.len() == line.len() {
            continue;
        }
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        anchors.insert(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
    }
    anchors
}

/// The targets of a page's links that lead to other files or headings.
fn links(text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .filter(|target| !target.contains("://") && !target.starts_with("man:"))
        .map(str::to_owned)
        .collect()
}

fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    for directory in ["", "docs"] {
        for entry in fs::read_dir(root().join(directory)).expect("a directory").flatten() {
            if entry.path().extension().is_some_and(|ending| ending == "md") {
                pages.push(entry.path());
            }
        }
    }
    assert!(pages.len() > 8, "{pages:?}");
    pages
}

#[test]
fn every_link_leads_to_a_page_and_a_heading_that_are_there() {
    let mut followed = 0;
    for path in pages() {
        let text = fs::read_to_string(&path).expect("a page");
        for link in links(&text) {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() {
                path.clone()
            } else {
                path.parent().expect("a directory").join(file)
            };
            assert!(target.exists(), "{}: {link}", path.display());
            if !anchor.is_empty() {
                let there = anchors(&fs::read_to_string(&target).expect("a page"));
                assert!(there.contains(anchor), "{}: {link}: {there:?}", path.display());
            }
            followed += 1;
        }
    }
    assert!(followed > 30, "{followed}");
}

/// Every reason to hold, from where the core gives them their words.
pub fn holds() -> BTreeSet<String> {
    let source = page("rebalancer-core/src/hold.rs");
    let (_, words) = source.split_once("pub fn reason(&self)").expect("where the words are");
    let (words, _) = words.split_once("\n    }\n").expect("its end");
    let reasons = words.split("=> \"").skip(1).filter_map(|rest| rest.split('"').next());
    let reasons: BTreeSet<String> = reasons.map(str::to_owned).collect();
    assert!(reasons.len() >= 24, "{reasons:?}");
    reasons
}

#[test]
fn every_hold_has_what_to_do() {
    let text = page("docs/agent.md");
    let named: BTreeSet<&str> = section(&text, "## Holds, and what to do")
        .lines()
        .filter(|line| line.starts_with("| `"))
        .filter_map(|line| line.split(" | ").next())
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    for hold in holds() {
        assert!(
            named.contains(hold.as_str()),
            "docs/agent.md does not say what to do about {hold}"
        );
    }
}

/// The section of a page below a heading.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, section) = text.split_once(&format!("\n{heading}\n")).expect(heading);
    section.split_once("\n## ").map_or(section, |(section, _)| section)
}

#[test]
fn every_flag_that_is_said_to_tune_it_is_one() {
    let help = |command: &str| {
        let output = Command::new(binary())
            .args([command, "--help"])
            .output()
            .expect("it starts");
        String::from_utf8(output.stdout).expect("text")
    };
    let known = help("agent") + &help("relay");
    let text = page("docs/operations.md");
    let mut found = 0;
    for word in section(&text, "## Tuning").split(['`', ' ', '|']) {
        if word.starts_with("--") && word.len() > 4 && word != "--from" {
            assert!(
                known.contains(&format!("{word} ")),
                "neither agent nor relay has {word}"
            );
            found += 1;
        }
    }
    assert!(found > 30, "{found}");
}

/// What a stranger asks first, and the page that answers.
const QUESTIONS: [(&str, &str); 6] = [
    ("How do I install it?", "docs/operations.md"),
    ("Is it safe?", "docs/threat-model.md"),
    ("What will it do to my cluster?", "docs/planner.md"),
    ("What is it doing now?", "docs/agent.md"),
    ("Why did it not act?", "docs/troubleshooting.md"),
    ("How do I take it out?", "docs/operations.md#taking-it-out"),
];

#[test]
fn a_strangers_questions_are_in_the_readme_each_with_one_page() {
    let text = page("README.md");
    for (question, answer) in QUESTIONS {
        let line = text
            .lines()
            .find(|line| line.contains(question))
            .unwrap_or_else(|| panic!("README.md does not have {question:?}"));
        assert!(line.contains(&format!("({answer}")), "{line}");
    }
}
