//! What the audience sees: a live view on a terminal, plain lines otherwise; always on stderr.

use std::{
    collections::VecDeque,
    io::{self, IsTerminal as _, Stderr},
    time::Instant,
};

use ratatui::{
    Terminal, TerminalOptions, Viewport,
    backend::CrosstermBackend,
    layout::{Constraint, Layout},
    style::{Color, Style, Stylize as _},
    text::Line,
    widgets::{Block, Gauge, Paragraph},
};
use serde_json::Value;

use super::scene::Event;

/// Rows of the live view below the bars.
const LINES: u16 = 12;

/// Where events are shown.
pub enum Screen {
    /// Redrawn in place.
    Live(Box<Live>),
    /// One line an event.
    Plain {
        /// When it began.
        began: Instant,
        /// The last state told, not to say the same twice.
        last: String,
        /// Whether the last decision's hold was told, by node.
        holds: Vec<(String, String)>,
    },
}

/// The live view.
pub struct Live {
    terminal: Terminal<CrosstermBackend<Stderr>>,
    began: Instant,
    clients: usize,
    lines: VecDeque<String>,
    loads: Vec<u64>,
    sockets: Vec<usize>,
    title: String,
    holds: Vec<(String, String)>,
}

impl Screen {
    /// A live view when stderr is a terminal.
    ///
    /// # Errors
    ///
    /// The terminal cannot be used.
    pub fn new(nodes: usize, clients: usize) -> io::Result<Self> {
        if !io::stderr().is_terminal() {
            return Ok(Self::Plain {
                began: Instant::now(),
                last: String::new(),
                holds: Vec::new(),
            });
        }
        let height = nodes as u16 + 2 + LINES + 2;
        let terminal = Terminal::with_options(
            CrosstermBackend::new(io::stderr()),
            TerminalOptions {
                viewport: Viewport::Inline(height),
            },
        )?;
        Ok(Self::Live(Box::new(Live {
            terminal,
            began: Instant::now(),
            clients,
            lines: VecDeque::new(),
            loads: vec![0; nodes],
            sockets: vec![0; nodes],
            title: "starting".to_owned(),
            holds: Vec::new(),
        })))
    }

    /// Shows an event; a terminal that fails is no reason to stop.
    pub fn show(&mut self, event: &Event<'_>) {
        match self {
            Self::Plain { began, last, holds } => {
                let at = began.elapsed().as_secs_f64();
                match event {
                    Event::Step(what) => eprintln!("[{at:5.1}s] {what}"),
                    Event::State { .. } => {
                        let state = state_line(event);
                        if state != *last {
                            eprintln!("[{at:5.1}s] {state}");
                            *last = state;
                        }
                    }
                    Event::Decision(decision) => {
                        if let Some(line) = decision_line(decision, holds) {
                            eprintln!("[{at:5.1}s] {line}");
                        }
                    }
                }
            }
            Self::Live(live) => {
                live.take(event);
                // The next event draws again.
                let _ = live.draw();
            }
        }
    }

    /// Leaves the terminal as it was, below the view.
    pub fn end(self) {
        if let Self::Live(mut live) = self {
            // The view stays where it is.
            let _ = live.draw();
            eprintln!();
        }
    }
}

fn state_line(event: &Event<'_>) -> String {
    let Event::State {
        loads,
        sockets,
        goaways,
        errors,
        elapsed,
    } = event
    else {
        return String::new();
    };
    let per_node: Vec<String> = loads.iter().map(u64::to_string).collect();
    let sockets: Vec<String> = sockets.iter().map(usize::to_string).collect();
    let measured = elapsed
        .map(|_| format!(", {goaways} GOAWAYs, {errors} client errors"))
        .unwrap_or_default();
    format!(
        "active connections {} (sockets at the load balancer {}){measured}",
        per_node.join(" / "),
        sockets.join(" / ")
    )
}

/// A plan, or a hold with another reason than this node's last.
fn decision_line(decision: &Value, holds: &mut Vec<(String, String)>) -> Option<String> {
    let node = decision["node"].as_str()?.to_owned();
    let reason = decision["hold"]["reason"].as_str().unwrap_or("plan").to_owned();
    let known = holds.iter_mut().find(|(name, _)| *name == node);
    let repeated = known.as_ref().is_some_and(|(_, last)| *last == reason) && reason != "plan";
    match known {
        Some((_, last)) => last.clone_from(&reason),
        None => holds.push((node.clone(), reason)),
    }
    if repeated {
        return None;
    }
    Some(match decision["hold"]["message"].as_str() {
        Some(message) => format!("{node} holds: {message}"),
        None => format!(
            "{node} tells {} connections to go: {}",
            decision["victims"].as_array().map_or(0, Vec::len),
            decision["explanation"].as_str().unwrap_or_default()
        ),
    })
}

/// Breaks a line between words; its later rows begin below the first one's text.
fn wrapped(line: &str, width: usize) -> Vec<String> {
    const INDENT: &str = "       ";
    let mut rows = vec![String::new()];
    for word in line.split_inclusive(' ') {
        let row = rows.last_mut().expect("there is a first row");
        if row.chars().count() + word.trim_end().chars().count() > width && row.trim_end().len() > INDENT.len() {
            rows.push(format!("{INDENT}{word}"));
        } else {
            row.push_str(word);
        }
    }
    rows
}

impl Live {
    fn take(&mut self, event: &Event<'_>) {
        let line = match event {
            Event::Step(what) => {
                self.title = (*what).to_owned();
                Some((*what).to_owned())
            }
            Event::State {
                loads,
                sockets,
                goaways,
                errors,
                elapsed,
            } => {
                self.loads = loads.to_vec();
                self.sockets = sockets.to_vec();
                if let Some(elapsed) = elapsed {
                    self.title = format!(
                        "{:.0} s since it is back · {goaways} GOAWAYs · {errors} client errors",
                        elapsed.as_secs_f64()
                    );
                }
                None
            }
            Event::Decision(decision) => decision_line(decision, &mut self.holds),
        };
        if let Some(line) = line {
            self.lines
                .push_back(format!("{:5.1}s {line}", self.began.elapsed().as_secs_f64()));
            while self.lines.len() > usize::from(LINES) {
                self.lines.pop_front();
            }
        }
    }

    fn draw(&mut self) -> io::Result<()> {
        let nodes = self.loads.len() as u16;
        let mean = self.loads.iter().sum::<u64>() as f64 / f64::from(nodes.max(1));
        let full = (self.clients as f64).max(1.0);
        self.terminal.draw(|frame| {
            let [bars, text] =
                Layout::vertical([Constraint::Length(nodes + 2), Constraint::Length(LINES + 2)]).areas(frame.area());
            let block = Block::bordered().title(format!(" active connections · {} ", self.title));
            let inside = block.inner(bars);
            frame.render_widget(block, bars);
            let rows = Layout::vertical(vec![Constraint::Length(1); self.loads.len()]).split(inside);
            for (index, row) in rows.iter().enumerate() {
                let load = self.loads[index] as f64;
                let off = if mean > 0.0 { load / mean - 1.0 } else { 0.0 };
                let color = if off.abs() <= super::scene::LEVEL {
                    Color::Green
                } else {
                    Color::Yellow
                };
                let label = format!(
                    "node-{} {:4}  {:+5.1} %  ({} sockets)",
                    index + 1,
                    self.loads[index],
                    off * 100.0,
                    self.sockets[index]
                );
                let gauge = Gauge::default()
                    .gauge_style(Style::default().fg(color).bg(Color::DarkGray))
                    .ratio((load / full).clamp(0.0, 1.0))
                    .label(label.bold());
                frame.render_widget(gauge, *row);
            }
            let width = usize::from(text.width.saturating_sub(2));
            let rows: Vec<String> = self.lines.iter().flat_map(|line| wrapped(line, width)).collect();
            let newest = &rows[rows.len().saturating_sub(usize::from(LINES))..];
            let lines: Vec<Line<'_>> = newest.iter().map(|row| Line::from(row.as_str())).collect();
            frame.render_widget(
                Paragraph::new(lines).block(Block::bordered().title(" decisions ")),
                text,
            );
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_decision_is_shown_to_its_end() {
        let line = " 36.0s node-2 tells 37 connections to go: 150 connections are above the mean";
        assert_eq!(
            wrapped(line, 40),
            [
                " 36.0s node-2 tells 37 connections to ",
                "       go: 150 connections are above the ",
                "       mean"
            ]
        );
        assert_eq!(wrapped("short", 40), ["short"]);
        let word = "a".repeat(60);
        assert_eq!(
            wrapped(&word, 40),
            [word.as_str()],
            "a word that fits nowhere is cut by the view"
        );
    }
}
