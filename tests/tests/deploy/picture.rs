//! The plan of the dashboard in `docs/`: its panels where Grafana puts them, each with what it shows.
//!
//! Made of the dashboard itself and held against it. It has no curves: those are drawn of a cluster's own figures.

use std::{env, fmt::Write as _, fs};

use serde_json::Value;

use crate::{docs::root, mixin};

/// Of Grafana's 24 columns, and of a line of its grid, in pixels.
const CELL: (u64, u64) = (40, 13);

/// A letter's width, for breaking lines.
const LETTER: u64 = 7;

/// Set to anything, it has the picture written instead of compared.
const WRITE: &str = "REBALANCER_WRITE_DOCS";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Lines of so many letters at most.
fn lines(text: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= most => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn picture(dashboard: &Value) -> String {
    let panels: Vec<&Value> = dashboard["panels"].as_array().expect("panels").iter().collect();
    let place = |panel: &Value, key: &str| panel["gridPos"][key].as_u64().expect("a place");
    let bottom = panels.iter().map(|panel| place(panel, "y") + place(panel, "h")).max();
    let (width, height) = (24 * CELL.0, bottom.expect("panels") * CELL.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\" role=\"img\" aria-label=\"The panels of the dashboard\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#f4f5f5\"/>\n"
    );
    let text = |svg: &mut String, x: u64, y: u64, more: &str, text: &str| {
        writeln!(svg, "<text x=\"{x}\" y=\"{y}\" {more}>{}</text>", escaped(text)).expect("a String takes it");
    };
    for panel in panels {
        let (x, y) = (place(panel, "x") * CELL.0, place(panel, "y") * CELL.1);
        let (w, h) = (place(panel, "w") * CELL.0, place(panel, "h") * CELL.1);
        let title = panel["title"].as_str().expect("a title");
        if panel["type"] == "row" {
            text(&mut svg, x + 4, y + 11, "font-weight=\"bold\" fill=\"#24292e\"", title);
            continue;
        }
        writeln!(
            svg,
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" rx=\"3\" fill=\"#ffffff\" stroke=\"#d0d7de\"/>",
            x + 2,
            y + 2,
            w - 4,
            h - 4
        )
        .expect("a String takes it");
        text(&mut svg, x + 10, y + 20, "font-weight=\"bold\" fill=\"#1f60c4\"", title);
        let most = ((w - 20) / LETTER) as usize;
        let description = panel["description"].as_str().unwrap_or_default();
        for (line, words) in (0..).zip(lines(description, most)) {
            text(&mut svg, x + 10, y + 38 + 15 * line, "fill=\"#24292e\"", &words);
        }
        let kind = panel["type"].as_str().expect("a type");
        let end = format!(
            "x=\"{}\" text-anchor=\"end\" fill=\"#6e7781\" font-size=\"10\"",
            x + w - 10
        );
        writeln!(svg, "<text {end} y=\"{}\">{kind}</text>", y + h - 10).expect("a String takes it");
    }
    svg + "</svg>\n"
}

#[test]
fn the_plan_in_the_docs_is_that_of_the_dashboard() {
    let dashboard = mixin::dashboard();
    let made = picture(&dashboard);
    for panel in dashboard["panels"].as_array().expect("panels") {
        let title = escaped(panel["title"].as_str().expect("a title"));
        assert!(made.contains(&format!(">{title}</text>")), "{title}");
    }
    let path = root().join("docs/dashboard.svg");
    if env::var_os(WRITE).is_some() {
        fs::write(&path, made).expect("it is written");
        return;
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == made,
        "docs/dashboard.svg is not of this dashboard; to write it anew: {WRITE}=1 cargo test -p rebalancer-tests --test deploy plan_in_the_docs"
    );
}
