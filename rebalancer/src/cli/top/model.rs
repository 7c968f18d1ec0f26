//! What `top` knows: the agent's last answers, a few minutes of each apiserver, and what the operator wants to see.
//!
//! Pure: answers and keys in, state to draw out.

use std::collections::{BTreeMap, VecDeque};

use serde_json::Value;

use crate::cli::show;

/// Looks that a sparkline shows.
pub const HISTORY: usize = 120;

/// What the agent answered.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// `/v1/status`.
    pub status: Value,
    /// `/v1/connections`.
    pub connections: Value,
    /// `/v1/decisions`.
    pub decisions: Value,
}

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A letter, or what is typed into the filter.
    Char(char),
    /// Takes a letter of the filter back.
    Backspace,
    /// Ends typing.
    Enter,
    /// Ends typing, and forgets the filter.
    Escape,
    /// The other list.
    Tab,
    /// So many lines up.
    Up(usize),
    /// So many lines down.
    Down(usize),
    /// At any time.
    Quit,
}

/// What the lower half shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// Who is connected.
    Connections,
    /// What was decided.
    Decisions,
}

/// What connections are sorted by, as the API names it.
const SORTS: [&str; 5] = ["age", "requests", "streams", "watches", "bytes"];

/// Everything that is drawn.
pub struct Model {
    /// The last answers that came.
    pub answers: Answers,
    /// Why none came since.
    pub fault: Option<String>,
    /// Connections of each apiserver, the newest last.
    pub history: BTreeMap<String, VecDeque<u64>>,
    /// Which list has the lower half.
    pub list: List,
    /// Only lines with this text.
    pub filter: String,
    /// Whether keys go into the filter.
    pub is_typing: bool,
    /// The first line of the list that is shown.
    pub first: usize,
    /// Whether there are colours.
    pub has_colors: bool,
    sort: usize,
}

impl Model {
    /// Nothing is known yet.
    pub fn new(has_colors: bool) -> Self {
        Self {
            answers: Answers::default(),
            fault: None,
            history: BTreeMap::new(),
            list: List::Connections,
            filter: String::new(),
            is_typing: false,
            first: 0,
            has_colors,
            sort: 0,
        }
    }

    /// What connections are sorted by.
    pub fn sort(&self) -> &'static str {
        SORTS[self.sort]
    }

    /// Takes what the agent answered, or why it did not.
    pub fn take(&mut self, answers: Result<Answers, String>) {
        let answers = match answers {
            Ok(answers) => answers,
            Err(why) => {
                self.fault = Some(why);
                return;
            }
        };
        self.fault = None;
        let view = show::list(&answers.status["view"]);
        // Who has left the cluster leaves the screen.
        self.history
            .retain(|name, _| view.iter().any(|entry| entry["apiserver"] == **name));
        for entry in view {
            let past = self.history.entry(show::text(&entry["apiserver"])).or_default();
            past.push_back(entry["connections"].as_u64().unwrap_or(0));
            if past.len() > HISTORY {
                past.pop_front();
            }
        }
        debug_assert!(self.history.values().all(|past| past.len() <= HISTORY));
        self.answers = answers;
    }

    /// Does what a key asks for; false when it asks for the end.
    pub fn press(&mut self, key: Key) -> bool {
        if self.is_typing {
            match key {
                Key::Char(c) => self.filter.push(c),
                Key::Backspace => _ = self.filter.pop(),
                Key::Enter => self.is_typing = false,
                Key::Escape => {
                    self.is_typing = false;
                    self.filter.clear();
                }
                Key::Quit => return false,
                Key::Tab | Key::Up(_) | Key::Down(_) => {}
            }
            self.first = 0;
            return true;
        }
        match key {
            Key::Quit | Key::Char('q') => return false,
            Key::Char('/') => self.is_typing = true,
            Key::Char('s') => self.sort = (self.sort + 1) % SORTS.len(),
            Key::Tab => {
                self.list = match self.list {
                    List::Connections => List::Decisions,
                    List::Decisions => List::Connections,
                };
                self.first = 0;
            }
            Key::Escape => self.filter.clear(),
            Key::Up(lines) => self.first = self.first.saturating_sub(lines),
            Key::Down(lines) => self.first = (self.first + lines).min(self.lines().len().saturating_sub(1)),
            Key::Char(_) | Key::Backspace | Key::Enter => {}
        }
        true
    }

    /// The list's lines, below its head, those that the filter lets through.
    pub fn lines(&self) -> Vec<String> {
        let text = match self.list {
            List::Connections => show::connection_rows(&self.answers.connections),
            List::Decisions => show::list(&self.answers.decisions["decisions"])
                .iter()
                .rev()
                .map(show::line)
                .collect(),
        };
        let filter = self.filter.to_lowercase();
        text.lines()
            .filter(|line| line.to_lowercase().contains(&filter))
            .map(str::to_owned)
            .collect()
    }
}
