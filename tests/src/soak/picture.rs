//! Samples over time, one panel a quantity, as an SVG document that needs nothing else.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{report::Report, sample::Process};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 160.0;
const PANEL: f64 = 170.0;
const CHART: f64 = 120.0;

/// Colours that differ in lightness too (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000",
];

/// Lines by name: points of hours and value.
type Lines = BTreeMap<String, Vec<(f64, f64)>>;

/// Draws what was sampled.
pub fn draw(report: &Report) -> String {
    let of = |quantity: &dyn Fn(&Process) -> f64| {
        let mut lines = Lines::new();
        for sample in &report.samples {
            for process in &sample.processes {
                let line = lines.entry(process.what.clone()).or_default();
                line.push((sample.at / 3_600.0, quantity(process)));
            }
        }
        lines
    };
    let mut loads = Lines::new();
    let mut goaways = Lines::new();
    for sample in &report.samples {
        let at = sample.at / 3_600.0;
        for (index, load) in sample.loads.iter().enumerate() {
            let line = loads.entry(format!("node-{}", index + 1)).or_default();
            line.push((at, *load as f64));
        }
        goaways
            .entry("told".to_owned())
            .or_default()
            .push((at, sample.goaways as f64));
    }
    let mut least = 0;
    let mut bound = vec![(0.0, 0.0)];
    for happening in &report.happenings {
        let at = happening.at / 3_600.0;
        bound.push((at, f64::from(least as u32)));
        least += happening.lower_bound;
        bound.push((at, f64::from(least as u32)));
    }
    goaways.insert("least".to_owned(), bound);
    let panels = [
        ("memory, MiB", of(&|process| process.memory)),
        ("open files, without clients'", of(&|process| process.files as f64)),
        ("threads", of(&|process| process.threads as f64)),
        ("clients of each apiserver", loads),
        ("GOAWAYs", goaways),
    ];
    let height = 20.0 + PANEL * panels.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let end = report
        .samples
        .last()
        .map_or(1.0, |sample| sample.at / 3_600.0)
        .max(0.001);
    for (index, (title, lines)) in panels.iter().enumerate() {
        panel(&mut svg, 10.0 + PANEL * index as f64, title, lines, end);
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, top: f64, title: &str, lines: &Lines, end: f64) {
    let highest = lines
        .values()
        .flatten()
        .fold(1.0_f64, |highest, (_, value)| highest.max(*value));
    let bottom = top + 20.0 + CHART;
    let x = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * at / end;
    let y = |value: f64| bottom - CHART * value / highest;
    text(svg, LEFT, top + 10.0, "start", "#222222", title);
    for share in [0.0, 0.5, 1.0] {
        let at = y(highest * share);
        // Writing to a String cannot fail.
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#e5e5e5\"/>",
            WIDTH - RIGHT
        );
        text(
            svg,
            LEFT - 6.0,
            at + 4.0,
            "end",
            "#666666",
            &format!("{:.0}", highest * share),
        );
    }
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let words = format!("{:.1} h", end * share);
        text(svg, x(end * share), bottom + 15.0, "middle", "#666666", &words);
    }
    for (index, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut drawn = String::new();
        for (at, value) in points {
            let _ = write!(drawn, "{:.1},{:.1} ", x(*at), y(*value));
        }
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.4\"/>",
            drawn.trim_end()
        );
        text(
            svg,
            WIDTH - RIGHT + 10.0,
            top + 28.0 + 15.0 * index as f64,
            "start",
            colour,
            name,
        );
    }
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, colour: &str, words: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>"
    );
}
