//! A picture of runs: the load of each apiserver over time, one panel a contender, GOAWAYs marked below.
//!
//! Input: runs with their series. Output: an SVG document that needs nothing else.
//! Must never leave out a GOAWAY: those of one column of pixels are one bar, as high as their number.

use std::fmt::Write as _;

use crate::figures::Run;

const WIDTH: f64 = 900.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
/// Room on either side for labels that reach beyond their axis.
const MARGIN: f64 = 30.0;
const PANEL: f64 = 190.0;
const CHART: f64 = 110.0;
const BARS: f64 = 26.0;

/// Columns that bars are gathered in.
const COLUMNS: usize = 240;

/// Colours that differ in lightness too (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000",
];

/// Draws runs under a title; `target` is the share above the mean that is the goal.
pub fn draw(title: &str, runs: &[(String, &Run)], target: f64) -> String {
    let height = 46.0 + PANEL * runs.len() as f64;
    let width = WIDTH + 2.0 * MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"-{MARGIN} 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect x=\"-{MARGIN}\" width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, LEFT, 22.0, "start", "#222222", &escaped(title));
    let end = runs
        .iter()
        .filter_map(|(_, run)| run.series.last())
        .map(|sample| sample.at)
        .fold(1.0, f64::max);
    let highest = runs
        .iter()
        .flat_map(|(_, run)| &run.series)
        .flat_map(|sample| &sample.loads)
        .fold(1.0_f64, |highest, load| highest.max(*load));
    for (index, (name, run)) in runs.iter().enumerate() {
        panel(&mut svg, 40.0 + PANEL * index as f64, name, run, end, highest, target);
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, top: f64, name: &str, run: &Run, end: f64, highest: f64, target: f64) {
    let x = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * at / end;
    let bottom = top + 20.0 + CHART;
    let y = |load: f64| bottom - CHART * load / highest;
    let balanced = match run.to_balance {
        Some(time) => format!("balanced after {}", duration(time.as_secs_f64())),
        None => "not balanced".to_owned(),
    };
    let head = format!(
        "{}: {} GOAWAYs, {balanced}, then {} more",
        escaped(name),
        run.goaways,
        run.goaways_after
    );
    text(svg, LEFT, top + 10.0, "start", "#222222", &head);
    for share in [0.0, 0.5, 1.0] {
        line(svg, LEFT, y(highest * share), WIDTH - RIGHT, "#e5e5e5");
        text(
            svg,
            LEFT - 6.0,
            y(highest * share) + 4.0,
            "end",
            "#666666",
            &format!("{:.0}", highest * share),
        );
    }
    if let Some(last) = run.series.last() {
        let mean = last.loads.iter().sum::<f64>() / last.loads.len().max(1) as f64;
        let ceiling = y(mean * (1.0 + target));
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{ceiling:.1}\" x2=\"{:.1}\" y2=\"{ceiling:.1}\" stroke=\"#999999\" stroke-dasharray=\"4 3\"/>",
            WIDTH - RIGHT
        );
    }
    let servers = run.series.first().map_or(0, |sample| sample.loads.len());
    for server in 0..servers {
        let mut points = String::new();
        for sample in &run.series {
            // Writing to a String cannot fail.
            let _ = write!(points, "{:.1},{:.1} ", x(sample.at), y(sample.loads[server]));
        }
        let colour = COLOURS[server % COLOURS.len()];
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>",
            points.trim_end()
        );
    }
    let mut columns = [0_usize; COLUMNS];
    for mark in &run.marks {
        let column = (mark.at / end * COLUMNS as f64) as usize;
        columns[column.min(COLUMNS - 1)] += 1;
    }
    let most = columns.iter().copied().max().unwrap_or(0);
    let base = bottom + 6.0 + BARS;
    let width = (WIDTH - LEFT - RIGHT) / COLUMNS as f64;
    for (column, count) in columns.iter().enumerate().filter(|(_, count)| **count > 0) {
        let height = (BARS * *count as f64 / most as f64).max(1.5);
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#b22222\"/>",
            LEFT + width * column as f64,
            base - height,
            width * 0.9
        );
    }
    let per = duration(end / COLUMNS as f64);
    let scale = format!("{most} a bar");
    text(svg, LEFT - 6.0, bottom + 22.0, "end", "#b22222", &scale);
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        text(
            svg,
            x(end * share),
            base + 12.0,
            "middle",
            "#666666",
            &duration(end * share),
        );
    }
    let _ = writeln!(svg, "<!-- a bar is {per} -->");
}

fn line(svg: &mut String, x: f64, y: f64, to: f64, colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{to:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, colour: &str, words: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>"
    );
}

/// A time as people say it.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 180.0 => format!("{s:.0} s"),
        s if s < 10_800.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3_600.0),
    }
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{Mark, Sample};

    #[test]
    fn every_goaway_is_in_a_bar_and_every_apiserver_has_a_line() {
        let sample = |at| Sample {
            at,
            loads: vec![5.0, 4.0, 0.0],
            draining: vec![0, 0, 0],
        };
        let mark = |at| Mark {
            at,
            server: 0,
            client: 0,
            above_mean: 0.0,
        };
        let run = Run {
            series: vec![sample(0.0), sample(100.0)],
            marks: [0.0, 50.0, 100.0].map(mark).to_vec(),
            ..Run::default()
        };
        let svg = draw("a < b", &[("one".to_owned(), &run)], 0.05);
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert_eq!(svg.matches("fill=\"#b22222\"/>").count(), 3);
        assert!(svg.contains("a &lt; b"));
    }
}
