//! The screen of `top`: from a line of who this is down to the keys, on whatever room there is.
//!
//! Must never need colour to be understood.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Paragraph, Sparkline, Wrap},
};
use serde_json::Value;

use super::model::{List, Model};
use crate::cli::show;

/// Columns of an apiserver's line beside its bar.
const NAME: u16 = 16;
const FIGURES: u16 = 24;

/// Columns of the last minutes, where there is room for them.
const PAST: u16 = 24;
const WIDE: u16 = 100;

/// Draws everything.
pub fn draw(model: &Model, frame: &mut Frame<'_>) {
    let status = &model.answers.status;
    let servers = show::list(&status["view"]);
    let rows = u16::try_from(servers.len()).unwrap_or(u16::MAX);
    // On a small screen the lists give way, and then the apiservers that come last.
    let [title, skew, now, bars, head, list, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(2),
        Constraint::Max(rows.saturating_add(1)),
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(self::title(status)).style(bold()), title);
    frame.render_widget(Paragraph::new(self::skew(status)), skew);
    let hold = Paragraph::new(self::now(model)).wrap(Wrap { trim: true });
    let hold = match model.fault {
        Some(_) => hold.style(coloured(model, Color::Red)),
        None => hold,
    };
    frame.render_widget(hold, now);
    self::bars(model, frame, bars);
    let lines = model.lines();
    frame.render_widget(Paragraph::new(self::head(model, lines.len())).style(bold()), head);
    let shown: Vec<Line<'_>> = lines
        .iter()
        .skip(model.first)
        .take(usize::from(list.height))
        .map(|line| Line::raw(line.as_str()))
        .collect();
    frame.render_widget(Paragraph::new(shown), list);
    frame.render_widget(
        Paragraph::new(self::keys(model)).style(Style::new().add_modifier(Modifier::REVERSED)),
        keys,
    );
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

fn coloured(model: &Model, color: Color) -> Style {
    if model.has_colors {
        Style::new().fg(color)
    } else {
        Style::new()
    }
}

fn title(status: &Value) -> String {
    let paused = if status["paused"] == true { " · PAUSED" } else { "" };
    format!(
        "{} · {}{paused} · source {} · shim {}",
        show::text(&status["node"]),
        show::text(&status["mode"]),
        show::text(&status["source"]),
        show::text(&status["shim"]),
    )
}

fn skew(status: &Value) -> String {
    format!(
        "skew {} (starts above {}, stops at {}) · {} GOAWAYs sent",
        show::percent(&status["skew"]),
        show::percent(&status["trigger"]),
        show::percent(&status["skew_target"]),
        show::text(&status["goaways_total"]),
    )
}

/// What is being done, or why nothing is.
fn now(model: &Model) -> String {
    let status = &model.answers.status;
    if let Some(fault) = &model.fault {
        return format!("these are old figures: {fault}");
    }
    match status["hold"]["message"].as_str() {
        Some(message) => format!("hold for {}: {message}", show::seconds(&status["hold_since_s"])),
        None => "a plan would start now".to_owned(),
    }
}

/// One line for each apiserver: its load against the mean and the band, and its last minutes. The demo shows the same.
pub fn bars(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    let status = &model.answers.status;
    let servers = show::list(&status["view"]);
    let mean = status["mean"].as_f64().unwrap_or(0.0);
    let band = status["trigger"].as_f64().unwrap_or(0.0);
    let load = |entry: &Value| entry["load"].as_f64().unwrap_or(0.0);
    let largest = servers
        .iter()
        .map(load)
        .fold(mean * (1.0 + band) * 1.05, f64::max)
        .max(1.0);
    let past = if area.width >= WIDE { PAST } else { 0 };
    let columns = |row: Rect| -> [Rect; 4] {
        Layout::horizontal([
            Constraint::Length(NAME),
            Constraint::Fill(1),
            Constraint::Length(FIGURES),
            Constraint::Length(past),
        ])
        .areas(row)
    };
    for (index, entry) in servers.iter().take(usize::from(area.height)).enumerate() {
        let row = Rect {
            y: area.y + u16::try_from(index).unwrap_or(u16::MAX),
            height: 1,
            ..area
        };
        let [name, bar, figures, sparkline] = columns(row);
        let own = show::text(&entry["apiserver"]);
        frame.render_widget(Paragraph::new(own.as_str()), name);
        let place = |value: f64| (value / largest * f64::from(bar.width)).round() as u16;
        let marks = [
            (place(mean * (1.0 - band)), '┊'),
            (place(mean), '│'),
            (place(mean * (1.0 + band)), '┊'),
        ];
        let skew = if mean > 0.0 { load(entry) / mean - 1.0 } else { 0.0 };
        let color = if skew.abs() > band { Color::Yellow } else { Color::Green };
        let cells = bar_cells(place(load(entry)), bar.width, marks);
        frame.render_widget(Paragraph::new(Span::styled(cells, coloured(model, color))), bar);
        let state = match entry["state"].as_str() {
            Some("ready") | None => format!("{:+.1} %", skew * 100.0),
            Some(state) => state.to_owned(),
        };
        let draining = match entry["draining"].as_u64() {
            None | Some(0) => String::new(),
            Some(count) => format!(" -{count}"),
        };
        let connections = show::text(&entry["connections"]);
        frame.render_widget(
            Paragraph::new(format!(" {connections:>6} {state:>9}{draining}")),
            figures,
        );
        if let Some(past) = model.history.get(&own) {
            let looks: Vec<u64> = past
                .iter()
                .rev()
                .take(usize::from(sparkline.width))
                .rev()
                .copied()
                .collect();
            frame.render_widget(Sparkline::default().data(&looks).max(largest as u64), sparkline);
        }
    }
}

/// A bar with the mean and the band upon it.
fn bar_cells(length: u16, width: u16, marks: [(u16, char); 3]) -> String {
    let cell = |column: u16| {
        let mark = marks.iter().find(|(place, _)| *place == column);
        match mark {
            Some((place, mark)) if *place > 0 => *mark,
            _ if column < length => '█',
            _ => ' ',
        }
    };
    (0..width).map(cell).collect()
}

fn head(model: &Model, lines: usize) -> String {
    let filter = if model.filter.is_empty() {
        String::new()
    } else {
        format!(", with `{}`", model.filter)
    };
    match model.list {
        List::Connections => format!(
            "CONNECTIONS, by {}{filter}: {lines} of {}",
            model.sort(),
            show::text(&model.answers.connections["total"])
        ),
        List::Decisions => format!("DECISIONS{filter}: {lines}, the newest first"),
    }
}

fn keys(model: &Model) -> String {
    if model.is_typing {
        return format!("/{}_   enter keeps, esc forgets", model.filter);
    }
    let other = match model.list {
        List::Connections => "decisions",
        List::Decisions => "connections",
    };
    format!("q quit  tab {other}  s sort  / filter  esc all  up down page")
}
