//! Pages of the documentation that are made from the code: here they are held against it, or written anew.
//!
//! Input: what the code says of itself. Must never be in the program: this is for tests.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::Path};

/// Set to anything, it has the tests write the pages instead of comparing them.
const WRITE: &str = "REBALANCER_WRITE_DOCS";

/// Compares a whole file of the documentation with what the code makes.
///
/// # Panics
///
/// They differ, with how to write it anew.
pub fn file(name: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    if env::var_os(WRITE).is_some() {
        fs::write(&path, made).expect("it is written");
        return;
    }
    let there = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(
        there == made,
        "{name} is not what the code makes; to write it anew: {WRITE}=1 cargo test --package rebalancer --lib in_the_docs"
    );
}

/// Compares a part of a page with what the code says; the part stands between two comments that name it.
///
/// # Panics
///
/// They differ, with how to write the page anew.
pub fn check(page: &str, part: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{page}: {error}"));
    let (begin, end) = (
        format!("<!-- {part}: made by a test -->\n"),
        format!("<!-- end of {part} -->\n"),
    );
    let (before, rest) = text
        .split_once(&begin)
        .unwrap_or_else(|| panic!("{page} has no {begin:?}"));
    let (there, after) = rest.split_once(&end).unwrap_or_else(|| panic!("{page} has no {end:?}"));
    if env::var_os(WRITE).is_some() {
        fs::write(&path, format!("{before}{begin}{made}{end}{after}")).expect("the page is written");
        return;
    }
    assert!(
        there == made,
        "{page} does not say what the code has; to write it anew: {WRITE}=1 cargo test --package rebalancer --lib \
         the_page_of -- --test-threads=1\n{made}"
    );
}

/// Every command with its flags, as Markdown.
pub fn commands(program: &clap::Command) -> String {
    let mut page = String::new();
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        let mut own = command.clone().bin_name(format!("rebalancer {}", command.get_name()));
        let usage = own.render_usage().to_string();
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = write!(
            page,
            "## {}\n\n{about}.\n\n```console\n$ {}\n```\n\n",
            command.get_name(),
            usage.trim_start_matches("Usage: ")
        );
        let arguments: Vec<_> = command
            .get_arguments()
            .filter(|argument| !argument.is_hide_set())
            .collect();
        if !arguments.is_empty() {
            page += "| flag | variable | what |\n|---|---|---|\n";
            for argument in arguments {
                page += &flag(argument);
            }
            page.push('\n');
        }
    }
    page
}

/// A flag's line.
fn flag(argument: &clap::Arg) -> String {
    let takes = argument.get_action().takes_values();
    let names = argument.get_value_names().unwrap_or_default();
    let value = names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(" ");
    let shown = match argument.get_long() {
        Some(long) if takes => format!("--{long} {value}"),
        Some(long) => format!("--{long}"),
        None => value,
    };
    let short = argument
        .get_short()
        .map(|short| format!(", `-{short}`"))
        .unwrap_or_default();
    let variable = argument.get_env().map(|name| format!("`{}`", name.to_string_lossy()));
    let mut what = argument.get_help().map(ToString::to_string).unwrap_or_default();
    let possible: Vec<String> = argument
        .get_possible_values()
        .iter()
        .filter(|_| takes)
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({help})", value.get_name()),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !possible.is_empty() {
        let _ = write!(what, ": {}", possible.join("; "));
    }
    let defaults = argument.get_default_values().iter();
    let defaults: Vec<_> = defaults
        .filter(|_| takes)
        .map(|value| value.to_string_lossy())
        .collect();
    if !defaults.is_empty() {
        let _ = write!(what, " [default: {}]", defaults.join(","));
    }
    if argument.is_required_set() {
        what += " (required)";
    }
    format!(
        "| `{}`{short} | {} | {} |\n",
        shown.replace('|', "\\|"),
        variable.unwrap_or_default(),
        what.replace('|', "\\|").replace('\n', " ")
    )
}

/// One metric family of a scrape.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    unit: Option<String>,
    help: String,
    /// Labels in the order they were seen, without `le`.
    labels: Vec<String>,
}

/// The families of an OpenMetrics text as a table of Markdown, sorted by name; how many there are.
pub fn metrics(text: &str) -> (String, usize) {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut newest = String::new();
    for line in text.lines().filter(|line| *line != "# EOF") {
        let said = |what: &str| {
            let rest = line.strip_prefix(what)?;
            rest.split_once(' ')
        };
        if let Some((name, help)) = said("# HELP ") {
            newest = name.to_owned();
            families.entry(newest.clone()).or_default().help = help.trim_end_matches('.').to_owned();
        } else if let Some((name, kind)) = said("# TYPE ") {
            families.entry(name.to_owned()).or_default().kind = kind.to_owned();
        } else if let Some((name, unit)) = said("# UNIT ") {
            families.entry(name.to_owned()).or_default().unit = Some(unit.to_owned());
        } else {
            assert!(line.starts_with(&newest), "a series outside of its family: {line}");
            let labels = line.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
            let family = families.get_mut(&newest).expect("its HELP came before");
            for label in labels.map_or("", |(labels, _)| labels).split("\",") {
                let name = label.split('=').next().unwrap_or_default();
                if !["", "le"].contains(&name) && !family.labels.iter().any(|known| known == name) {
                    family.labels.push(name.to_owned());
                }
            }
        }
    }
    let mut table = "| metric | type | labels | what |\n|---|---|---|---|\n".to_owned();
    for (name, family) in &families {
        let suffix = match family.kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        well_named(name, family);
        let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(
            table,
            "| `{name}{suffix}` | {} | {} | {} |",
            family.kind,
            labels.join(", "),
            family.help.replace('|', "\\|")
        );
    }
    (table, families.len())
}

/// Prometheus' and OpenMetrics' rules for names: base units, a unit that is the name's end, no type and no label in it.
fn well_named(name: &str, family: &Family) {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    assert!(name.chars().all(plain) && name.starts_with("rebalancer_"), "{name}");
    if let Some(unit) = &family.unit {
        assert!(name.ends_with(&format!("_{unit}")), "{name} has the unit {unit}");
    }
    for wrong in [
        "milliseconds",
        "minutes",
        "hours",
        "percent",
        "kilobytes",
        "counter",
        "gauge",
        "total",
    ] {
        assert!(name.split('_').all(|word| word != wrong), "{name} has {wrong} in it");
    }
    assert!(!family.kind.is_empty() && !family.help.is_empty(), "{name}: {family:?}");
    for label in &family.labels {
        assert!(
            !name.split('_').any(|word| word == label),
            "{name} has its label {label} in its name"
        );
    }
}
