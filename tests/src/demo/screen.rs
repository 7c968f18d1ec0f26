//! What the audience sees: a live view that fills the terminal, with the bars of `rebalancer top`; plain lines otherwise;
//! always on stderr.

use std::{
    collections::VecDeque,
    io::{self, IsTerminal as _, Stderr},
    time::Instant,
};

use ratatui::{
    Frame, Terminal, TerminalOptions, Viewport,
    backend::CrosstermBackend,
    layout::{Constraint, Layout},
    text::Line,
    widgets::{Block, Paragraph},
};
use rebalancer::cli::top::{Answers, Model, bars};
use serde_json::{Value, json};

use super::scene::{Event, LEVEL};

/// Lines that are kept: more than any terminal has rows.
const LINES: usize = 500;

/// Rows where a terminal does not say how many it has.
const ROWS: u16 = 24;

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
    view: View,
}

/// What is on it.
struct View {
    began: Instant,
    clients: usize,
    lines: VecDeque<String>,
    model: Model,
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
        let (_, rows) = crossterm::terminal::size().unwrap_or((0, ROWS));
        let terminal = Terminal::with_options(
            CrosstermBackend::new(io::stderr()),
            TerminalOptions {
                // As high as the screen, and it stays above what is said afterwards.
                viewport: Viewport::Inline(rows),
            },
        )?;
        let has_colors = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Ok(Self::Live(Box::new(Live {
            terminal,
            view: View::new(nodes, clients, has_colors),
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
                live.view.take(event);
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
    let measured = elapsed
        .map(|_| format!(", {goaways} GOAWAYs, {errors} client errors"))
        .unwrap_or_default();
    format!(
        "active connections {} (sockets at the load balancer {}){measured}",
        per_node.join(" / "),
        joined(sockets)
    )
}

/// A plan, or a hold with another reason than this node's last.
pub(crate) fn decision_line(decision: &Value, holds: &mut Vec<(String, String)>) -> Option<String> {
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
    fn draw(&mut self) -> io::Result<()> {
        self.terminal.draw(|frame| self.view.draw(frame))?;
        Ok(())
    }
}

impl View {
    fn new(nodes: usize, clients: usize, has_colors: bool) -> Self {
        let mut view = Self {
            began: Instant::now(),
            clients,
            lines: VecDeque::new(),
            model: Model::new(has_colors),
            sockets: vec![0; nodes],
            title: "starting".to_owned(),
            holds: Vec::new(),
        };
        view.loads(&vec![0; nodes]);
        view
    }

    /// Takes loads as `top` has them from an agent.
    fn loads(&mut self, loads: &[u64]) {
        let mean = loads.iter().sum::<u64>() as f64 / loads.len().max(1) as f64;
        let one = |(index, load): (usize, &u64)| json!({"apiserver": format!("node-{}", index + 1), "connections": load, "load": load});
        let view: Vec<Value> = loads.iter().enumerate().map(one).collect();
        self.model.take(Ok(Answers {
            status: json!({"mean": mean, "trigger": LEVEL, "view": view}),
            ..Answers::default()
        }));
    }

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
                self.loads(loads);
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
            while self.lines.len() > LINES {
                self.lines.pop_front();
            }
        }
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let nodes = u16::try_from(self.sockets.len()).unwrap_or(u16::MAX);
        let [loads, text] =
            Layout::vertical([Constraint::Max(nodes.saturating_add(2)), Constraint::Fill(1)]).areas(frame.area());
        let block = Block::bordered()
            .title(format!(
                " active connections of {} clients · {} ",
                self.clients, self.title
            ))
            .title_bottom(format!(" sockets at the load balancer: {} ", joined(&self.sockets)));
        let inside = block.inner(loads);
        frame.render_widget(block, loads);
        bars(&self.model, frame, inside);
        let (width, height) = (text.width.saturating_sub(2), text.height.saturating_sub(2));
        let rows: Vec<String> = self
            .lines
            .iter()
            .flat_map(|line| wrapped(line, usize::from(width)))
            .collect();
        let newest = &rows[rows.len().saturating_sub(usize::from(height))..];
        let lines: Vec<Line<'_>> = newest.iter().map(|row| Line::from(row.as_str())).collect();
        frame.render_widget(
            Paragraph::new(lines).block(Block::bordered().title(" decisions ")),
            text,
        );
    }
}

fn joined(counts: &[usize]) -> String {
    let counts: Vec<String> = counts.iter().map(usize::to_string).collect();
    counts.join(" / ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ratatui::backend::TestBackend;

    use super::*;

    #[test]
    fn the_view_fills_the_screen_with_the_bars_of_top() {
        let mut view = View::new(3, 300, false);
        view.take(&Event::State {
            loads: &[150, 100, 50],
            sockets: &[160, 100, 50],
            goaways: 7,
            errors: 0,
            elapsed: Some(Duration::from_secs(12)),
        });
        for step in 0..40 {
            view.take(&Event::Step(&format!("step {step}")));
        }
        let screen = |width, height| -> Vec<String> {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
            terminal.draw(|frame| view.draw(frame)).expect("a screen");
            let buffer = terminal.backend().buffer();
            let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
            (0..height).map(line).collect()
        };
        let small = screen(80, 24);
        assert!(
            small[1].contains("node-1") && small[1].contains("150   +50.0 %"),
            "{small:#?}"
        );
        assert!(
            small[1].contains('┊') && small[1].contains('│'),
            "the mean and the band"
        );
        assert!(small[4].contains("160 / 100 / 50"), "{small:#?}");
        assert!(small[22].contains("step 39"), "the newest is the last: {small:#?}");
        assert!(small[6].contains("step 23"), "to the screen's end: {small:#?}");
        let large = screen(140, 50);
        assert!(
            large[6].contains("step 0") && large[45].contains("step 39"),
            "{large:#?}"
        );
        for (width, height) in [(1, 1), (20, 3), (40, 6), (300, 100)] {
            screen(width, height);
        }
    }

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
