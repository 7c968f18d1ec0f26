//! Flags of agent and relay, and what follows from them: files, directories, capabilities.
//!
//! Input: words as on a command line. Must never know a flag by heart that says itself what its value is.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use clap::{ArgMatches, Command, parser::ValueSource};

use super::ManifestError;

/// Which of the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `rebalancer agent`.
    Agent,
    /// `rebalancer relay`.
    Relay,
}

impl Part {
    /// The subcommand.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Relay => "relay",
        }
    }
}

/// Where both have their sockets unless told otherwise, and the agent its state.
const RUN: &str = "/run/rebalancer";

/// Flags whose file is written; the values of all others that name a FILE are read.
const WRITTEN: [&str; 2] = ["state", "decision-log"];

/// A directory of the host that a pod needs, at the same place inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The directory.
    pub path: PathBuf,
    /// Whether the process writes there, or makes a socket.
    pub written: bool,
}

/// The flags of one part, looked through by the part's own parser.
#[derive(Clone, Debug)]
pub struct Flags {
    part: Part,
    words: Vec<String>,
    mounts: Vec<Mount>,
    values: BTreeMap<String, String>,
}

impl Flags {
    /// None: they come from elsewhere.
    pub fn none(part: Part) -> Self {
        Self {
            part,
            words: Vec::new(),
            mounts: vec![Mount {
                path: RUN.into(),
                written: true,
            }],
            values: BTreeMap::new(),
        }
    }

    /// Has the part's parser look at them.
    ///
    /// # Errors
    ///
    /// The parser refuses them, or a path is none that can be mounted.
    pub fn parse(part: Part, command: Command, words: Vec<String>) -> Result<Self, ManifestError> {
        let command = command.name(part.name()).no_binary_name(true);
        let matches = command
            .clone()
            .try_get_matches_from(&words)
            .map_err(|error| ManifestError::Refused {
                part,
                why: first_sentence(&error.to_string()),
            })?;
        let mut flags = Self {
            words,
            ..Self::none(part)
        };
        for argument in command.get_arguments() {
            let id = argument.get_id().as_str();
            let given = matches.value_source(id) == Some(ValueSource::CommandLine);
            let Some(long) = argument.get_long().filter(|_| given) else {
                continue;
            };
            let name = argument.get_value_names().and_then(|names| names.first());
            for value in raw(&matches, id) {
                flags.take(long, name.map_or("", |name| name.as_str()), &value)?;
                flags.values.insert(long.to_owned(), value);
            }
        }
        Ok(flags)
    }

    /// Notes what a value of a kind asks for.
    fn take(&mut self, long: &str, kind: &str, value: &str) -> Result<(), ManifestError> {
        if long == "config" {
            return Err(ManifestError::ConfigFile);
        }
        let written = WRITTEN.contains(&long);
        match kind {
            // `relay:unix:PATH`, or a shim without a socket.
            "unix:PATH" | "SHIM" => match value.split_once("unix:") {
                Some((_, socket)) => self.mount(long, socket, true),
                None => Ok(()),
            },
            "FILE" => self.mount(long, value, written),
            "CERT,KEY[:NAME,...]" => {
                let files = value.split(':').next().unwrap_or_default();
                files.split(',').try_for_each(|file| self.mount(long, file, false))
            }
            _ => Ok(()),
        }
    }

    /// The directory of a file: a file that is replaced, as certificates are, is seen only so.
    fn mount(&mut self, long: &str, file: &str, written: bool) -> Result<(), ManifestError> {
        let refused = || ManifestError::Path {
            flag: long.to_owned(),
            path: file.to_owned(),
        };
        let path = Path::new(file);
        let is_plain = path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let directory = path
            .parent()
            .filter(|_| is_plain && path.is_absolute())
            .ok_or_else(refused)?;
        if directory == Path::new("/") {
            return Err(refused());
        }
        match self.mounts.iter_mut().find(|mount| mount.path == directory) {
            Some(known) => known.written |= written,
            // Written once however it was given: the agent may name it otherwise than the relay.
            None => self.mounts.push(Mount {
                path: directory.components().collect(),
                written,
            }),
        }
        Ok(())
    }

    /// Whose they are.
    pub fn part(&self) -> Part {
        self.part
    }

    /// As they were given.
    pub fn words(&self) -> &[String] {
        &self.words
    }

    /// The directories, each once.
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The last value of a flag that was given.
    pub fn value(&self, long: &str) -> Option<&str> {
        self.values.get(long).map(String::as_str)
    }

    /// What the kernel must let the process do (capabilities(7)), without `CAP_`.
    pub fn capabilities(&self) -> Vec<&'static str> {
        if self.part == Part::Relay {
            return Vec::new();
        }
        let mut capabilities = vec!["BPF", "NET_ADMIN", "PERFMON"];
        if self.value("source") == Some("sockdiag") && !self.intercepts() && !self.steers() {
            capabilities = vec!["NET_ADMIN"];
        }
        if self.steers() {
            capabilities.push("SYS_PTRACE");
        }
        capabilities
    }

    /// Whether connections are steered to the relay.
    pub fn intercepts(&self) -> bool {
        self.value("intercept").is_some_and(|value| value != "false")
    }

    /// Whether a probe goes into the apiserver's process.
    pub fn steers(&self) -> bool {
        self.value("shim").is_some_and(|shim| shim.starts_with("steer"))
    }
}

fn raw(matches: &ArgMatches, id: &str) -> Vec<String> {
    let values = matches.get_raw(id).into_iter().flatten();
    values.map(|value| value.to_string_lossy().into_owned()).collect()
}

/// The parser's words without what it says of usage.
fn first_sentence(text: &str) -> String {
    let lines = text.lines().take_while(|line| !line.starts_with("Usage:"));
    let words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}
