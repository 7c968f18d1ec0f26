//! What a process of this program was told: on its command line, in its environment, in the agent's file.
//!
//! Input: /proc of the process that answers on a socket, or the flags that a topology's relay would have.
//! Output: the values of flags, defaults included, as the process's own parser reads them.
//! Must never be shown as a whole: `--exclude-user` and others name people.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Command, CommandFactory as _, builder::Resettable};
use tokio::net::UnixStream;

use super::super::{Arguments, is_of_service};
use crate::manifest::{Part, Topology};

/// The flags of one process.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Its number, where it is a process that is seen from here.
    pub pid: Option<u32>,
    values: BTreeMap<String, Vec<String>>,
    root: Option<PathBuf>,
}

impl Settings {
    /// Those of the process that listens on a Unix socket.
    ///
    /// # Errors
    ///
    /// Nobody does, it is not seen from here, or it is another program or release.
    pub async fn of(part: Part, socket: &Path) -> Result<Self, String> {
        let asked = UnixStream::connect(socket).await.and_then(|stream| stream.peer_cred());
        let cred = asked.map_err(|error| format!("{}: {error}", socket.display()))?;
        // Of another pid namespace it is 0 (unix(7), SO_PEERCRED).
        let pid = cred
            .pid()
            .and_then(|pid| u32::try_from(pid).ok())
            .filter(|pid| *pid > 0);
        let pid = pid.ok_or("its process is not seen from here: run this on the host")?;
        Self::read(part, pid).map_err(|why| format!("process {pid}: {why}"))
    }

    fn read(part: Part, pid: u32) -> Result<Self, String> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let words = |name: &str| -> Result<Vec<String>, String> {
            let path = proc.join(name);
            let octets = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            // Each word ends with 0, and one may be empty.
            let octets = octets.strip_suffix(b"\0").unwrap_or(&octets);
            let words = octets.split(|octet| *octet == 0);
            Ok(words.map(|word| String::from_utf8_lossy(word).into_owned()).collect())
        };
        let line = words("cmdline")?;
        let environment: BTreeMap<String, String> = words("environ")?
            .iter()
            .filter_map(|word| word.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let is_elsewhere = mounts("self") != mounts(&pid.to_string());
        let mut settings = Self {
            pid: Some(pid),
            values: parse(part, &line, &environment)?,
            root: is_elsewhere.then(|| proc.join("root")),
        };
        if let Some(file) = settings.path("config") {
            let text = fs::read_to_string(&file).map_err(|error| format!("--config {}: {error}", file.display()))?;
            for (key, value) in from_file(&text).map_err(|error| format!("--config {}: {error}", file.display()))? {
                settings.values.entry(key).or_insert(value);
            }
        }
        Ok(settings)
    }

    /// Those of a topology, where nobody runs yet.
    ///
    /// # Errors
    ///
    /// They are none.
    pub fn assumed(part: Part, topology: Topology) -> Result<Self, String> {
        let flags = match part {
            Part::Agent => topology.agent(),
            Part::Relay => topology.relay(),
        };
        let line: Vec<String> = ["rebalancer", part.name()]
            .iter()
            .chain(flags)
            .map(|word| (*word).to_owned())
            .collect();
        Ok(Self {
            values: parse(part, &line, &BTreeMap::new())?,
            ..Self::default()
        })
    }

    /// The last value of a flag, or its default.
    pub fn value(&self, flag: &str) -> Option<&str> {
        self.values.get(flag)?.last().map(String::as_str)
    }

    /// All its values.
    pub fn list(&self, flag: &str) -> Vec<String> {
        self.values.get(flag).cloned().unwrap_or_default()
    }

    /// A file that a flag names, by a path that leads there from here.
    pub fn path(&self, flag: &str) -> Option<PathBuf> {
        Some(self.reach(self.value(flag)?))
    }

    /// A path of the process, from here.
    pub fn reach(&self, path: &str) -> PathBuf {
        match &self.root {
            Some(root) if path.starts_with('/') => root.join(path.trim_start_matches('/')),
            _ => path.into(),
        }
    }

    /// The port of an address that a flag names.
    pub fn port(&self, flag: &str) -> Option<u16> {
        self.value(flag)?.rsplit_once(':')?.1.parse().ok()
    }
}

/// Reads a command line with its environment as the process itself has.
fn parse(
    part: Part,
    line: &[String],
    environment: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Vec<String>>, String> {
    let known = Arguments::command();
    let own = known.find_subcommand(part.name()).ok_or("it has no such command")?;
    let at = line.iter().position(|word| word == part.name());
    let at = at.ok_or_else(|| format!("it does not run `rebalancer {}`", part.name()))?;
    let (before, after) = line.split_at(at + 1);
    let mut words = before.to_vec();
    for argument in own.get_arguments() {
        let (Some(long), Some(variable)) = (argument.get_long(), argument.get_env()) else {
            continue;
        };
        let is_it = |word: &String| word.strip_prefix("--").and_then(|word| word.split('=').next()) == Some(long);
        let value = environment.get(&*variable.to_string_lossy());
        let Some(value) = value.filter(|value| !value.is_empty() && !is_of_service(value)) else {
            continue;
        };
        if after.iter().any(is_it) {
            continue;
        }
        if argument.get_action().takes_values() {
            words.push(format!("--{long}={value}"));
        } else if !["false", "0", "no", "off", "n", "f"].contains(&value.to_lowercase().as_str()) {
            words.push(format!("--{long}"));
        }
    }
    words.extend_from_slice(after);
    // The variables of this process are not those of the other.
    let unset = |command: Command| command.mut_args(|argument| argument.env(Resettable::Reset));
    let command = unset(known.clone()).mut_subcommand(part.name(), unset);
    let matches = command
        .try_get_matches_from(words)
        .map_err(|error| format!("its flags are not this release's: {}", error.kind()))?;
    let (_, matches) = matches.subcommand().ok_or("it has no command")?;
    let mut values = BTreeMap::new();
    for argument in own.get_arguments() {
        let raw = matches.try_get_raw(argument.get_id().as_str()).ok().flatten();
        if let (Some(long), Some(raw)) = (argument.get_long(), raw) {
            let list = raw.map(|value| value.to_string_lossy().into_owned()).collect();
            values.insert(long.to_owned(), list);
        }
    }
    Ok(values)
}

/// The flags of the agent's file: its keys are their names.
fn from_file(text: &str) -> io::Result<Vec<(String, Vec<String>)>> {
    let file: BTreeMap<String, serde_yaml_ng::Value> = serde_yaml_ng::from_str(text).map_err(io::Error::other)?;
    let word = |value: &serde_yaml_ng::Value| match value {
        serde_yaml_ng::Value::String(text) => Some(text.clone()),
        serde_yaml_ng::Value::Bool(value) => Some(value.to_string()),
        serde_yaml_ng::Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let words = |value: &serde_yaml_ng::Value| match value {
        serde_yaml_ng::Value::Sequence(list) => list.iter().filter_map(word).collect(),
        value => word(value).into_iter().collect(),
    };
    Ok(file.iter().map(|(key, value)| (key.clone(), words(value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(part: Part, line: &str, environment: &[(&str, &str)]) -> Result<Settings, String> {
        let line: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let environment = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Ok(Settings {
            values: parse(part, &line, &environment.collect())?,
            ..Settings::default()
        })
    }

    #[test]
    fn a_flag_is_what_the_process_itself_takes_it_for() {
        let line = "/usr/bin/rebalancer --log-format json agent --source=sockdiag --peer a=https://h:1 -v";
        let environment = [
            ("REBALANCER_SOURCE", "ebpf"),
            ("REBALANCER_PEER", "b=https://i:1"),
            ("REBALANCER_STATE", "/var/lib/r/state"),
            ("REBALANCER_APISERVER_PORT", "tcp://10.96.0.7:6443"),
            ("REBALANCER_LOG_FORMAT", "text"),
            ("REBALANCER_DRY_RUN", "true"),
            ("REBALANCER_DECISION_LOG", ""),
        ];
        let settings = parsed(Part::Agent, line, &environment).expect("its own flags");
        assert_eq!(settings.value("source"), Some("sockdiag"), "the command line wins");
        assert_eq!(settings.list("peer"), ["a=https://h:1"]);
        assert_eq!(settings.value("state"), Some("/var/lib/r/state"));
        assert_eq!(settings.value("apiserver-port"), None, "a Service's is none");
        assert_eq!(settings.value("decision-log"), None);
        assert!(parsed(Part::Agent, "rebalancer relay", &[]).is_err());
        assert!(parsed(Part::Agent, "rebalancer agent --of-the-next-release", &[]).is_err());
    }

    #[test]
    fn a_relay_may_have_all_its_flags_in_its_environment() {
        let variables = [
            ("REBALANCER_UPSTREAM", "127.0.0.1:6443"),
            ("REBALANCER_UPSTREAM_CA", "/pki/ca.crt"),
            ("REBALANCER_CLIENT_CA", "/pki/ca.crt"),
            ("REBALANCER_TLS_CERT", "/pki/a.crt"),
            ("REBALANCER_TLS_KEY", "/pki/a.key"),
            ("REBALANCER_PROXY_CLIENT_CERT", "/pki/p.crt"),
            ("REBALANCER_PROXY_CLIENT_KEY", "/pki/p.key"),
            ("REBALANCER_REQUESTHEADER_GROUP_HEADERS", "X-A,X-B"),
            ("REBALANCER_LISTEN", "[::]:6445"),
        ];
        let settings = parsed(Part::Relay, "rebalancer relay", &variables).expect("all are given");
        assert_eq!(settings.list("requestheader-group-headers"), ["X-A", "X-B"]);
        assert_eq!(
            settings.list("requestheader-username-headers"),
            ["X-Remote-User"],
            "a default"
        );
        assert_eq!(settings.port("listen"), Some(6445));
        assert_eq!(settings.path("tls-cert"), Some("/pki/a.crt".into()));
    }

    #[test]
    fn a_topologys_flags_are_a_relays() {
        let settings = Settings::assumed(Part::Relay, Topology::Kubeadm).expect("good flags");
        assert_eq!(settings.value("client-ca"), Some("/etc/kubernetes/pki/ca.crt"));
    }

    #[test]
    fn the_file_of_the_agent_has_flags_as_keys() {
        let read: BTreeMap<_, _> = from_file("version: 1\npeer: [a=https://h:1]\nstate: /s\ndry-run: true\n")
            .expect("YAML")
            .into_iter()
            .collect();
        assert_eq!(read["peer"], ["a=https://h:1"]);
        assert_eq!(read["state"], ["/s"]);
        assert_eq!(read["dry-run"], ["true"]);
    }
}
