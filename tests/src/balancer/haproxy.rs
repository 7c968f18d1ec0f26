//! A real haproxy in TCP mode before the apiservers, as kubeadm's documentation has it.
//!
//! Input: backends, how to choose, options of its servers. Output: a running haproxy, and what it says of itself.
//! Must never be kinder than the flags: checks, admission and counts are haproxy's own.

use std::{
    ffi::OsString,
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use super::Policy;
use crate::process::{Process, wait_for};

/// How long it may take to listen.
const START: Duration = Duration::from_secs(20);

/// A running haproxy.
#[derive(Debug)]
pub struct Haproxy {
    socket: PathBuf,
    file: PathBuf,
    /// What its servers are called, before their numbers.
    name: String,
    backends: usize,
    namespace: Arc<OwnedFd>,
    process: Process,
}

/// What its statistics say of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    sessions: usize,
    is_up: bool,
    weight: u32,
}

impl Haproxy {
    /// Starts it in a namespace; its servers are called `NAME-1` and so on, and `options` go on every server line, for
    /// example `inter 15s rise 3`.
    ///
    /// # Errors
    ///
    /// There is no haproxy, or it refuses the options.
    pub fn start(
        listen: SocketAddr,
        name: &str,
        backends: &[SocketAddr],
        policy: Policy,
        options: &str,
        namespace: &Arc<OwnedFd>,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        ensure!(
            !options.contains(['\n', '\r']),
            "--lb-options is one line of server options"
        );
        let text = configuration(listen, name, backends, policy, options, &Self::socket_in(directory));
        let haproxy = Self::configured(&text, backends.len(), namespace, directory)?;
        Ok(Self {
            name: name.to_owned(),
            ..haproxy
        })
    }

    /// Starts it with another configuration, for so many servers; its `stats socket` must be [`Self::socket_in`] that
    /// directory.
    ///
    /// # Errors
    ///
    /// There is no haproxy, or it refuses the configuration.
    pub fn configured(text: &str, backends: usize, namespace: &Arc<OwnedFd>, directory: &Path) -> anyhow::Result<Self> {
        let file = directory.join("haproxy.cfg");
        fs::write(&file, text)?;
        let checked = Command::new(program())
            .args(["-c", "-q", "-f"])
            .arg(&file)
            .output()
            .context("haproxy does not run: `apt-get install haproxy`, or name one by HAPROXY")?;
        ensure!(
            checked.status.success(),
            "haproxy refuses its configuration: {}",
            String::from_utf8_lossy(&checked.stderr).trim()
        );
        let mut haproxy = Self {
            process: launch(&file, namespace, directory)?,
            socket: Self::socket_in(directory),
            file,
            name: String::new(),
            backends,
            namespace: Arc::clone(namespace),
        };
        haproxy.wait()?;
        Ok(haproxy)
    }

    /// Where it takes orders when its configuration is in that directory.
    pub fn socket_in(directory: &Path) -> PathBuf {
        directory.join("haproxy.sock")
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Kills it and starts it again, as it was started.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill();
        let directory = self.file.parent().context("its file is in a directory")?;
        self.process = launch(&self.file, &self.namespace, directory)?;
        self.wait()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        self.process.signal(signal);
    }

    /// Until it answers.
    fn wait(&mut self) -> anyhow::Result<()> {
        let ready = wait_for(START, || {
            if let Err(ended) = self.process.is_running() {
                return Some(Err(ended));
            }
            (self.rows().len() == self.backends).then_some(Ok(()))
        });
        ready.context("haproxy does not answer on its socket")?
    }

    /// Which backends it sends to.
    pub fn healthy(&self) -> Vec<bool> {
        let mut healthy: Vec<bool> = self.rows().iter().map(|row| row.is_up).collect();
        healthy.resize(self.backends, false);
        healthy
    }

    /// Sessions per backend.
    pub fn sockets(&self) -> Vec<usize> {
        let mut sockets: Vec<usize> = self.rows().iter().map(|row| row.sessions).collect();
        sockets.resize(self.backends, 0);
        sockets
    }

    /// The weights it goes by, as flags or agents' answers have set them.
    pub fn weights(&self) -> Vec<u32> {
        self.rows().iter().map(|row| row.weight).collect()
    }

    /// Where it takes orders.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Each client's port with the index of the backend that it is connected to.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn sessions(&self) -> anyhow::Result<Vec<(u16, usize)>> {
        Ok(sessions_of(&self.ask("show sess")?))
    }

    /// Whether new clients are sent to that backend, whatever its health; those it has stay.
    ///
    /// # Errors
    ///
    /// It does not answer, or knows no such backend.
    pub fn admit(&self, index: usize, admits: bool) -> anyhow::Result<()> {
        let state = if admits { "ready" } else { "drain" };
        let answer = self.ask(&format!(
            "set server apiservers/{}-{} state {state}",
            self.name,
            index + 1
        ))?;
        ensure!(answer.trim().is_empty(), "haproxy: {}", answer.trim());
        Ok(())
    }

    fn ask(&self, command: &str) -> anyhow::Result<String> {
        let mut stream = UnixStream::connect(&self.socket).context("haproxy's socket")?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// What it says of its servers; nothing when it does not answer.
    fn rows(&self) -> Vec<Row> {
        self.ask("show stat -1 4 -1")
            .map(|answer| rows_of(&answer))
            .unwrap_or_default()
    }
}

/// haproxy: the one that `HAPROXY` names, else the one on PATH.
pub fn program() -> OsString {
    std::env::var_os("HAPROXY").unwrap_or_else(|| "haproxy".into())
}

fn launch(file: &Path, namespace: &Arc<OwnedFd>, directory: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new(program());
    command.arg("-db").arg("-f").arg(file);
    Process::start("haproxy", command, Some(namespace), directory)
}

/// Rows of `show stat`, whose columns are named in its first line (management guide, section 9.1).
fn rows_of(answer: &str) -> Vec<Row> {
    let mut lines = answer.lines();
    let names: Vec<&str> = lines
        .next()
        .unwrap_or_default()
        .trim_start_matches("# ")
        .split(',')
        .collect();
    let column = |name: &str| names.iter().position(|column| *column == name);
    let (Some(sessions), Some(status), Some(weight)) = (column("scur"), column("status"), column("weight")) else {
        return Vec::new();
    };
    let row = |line: &str| {
        let cells: Vec<&str> = line.split(',').collect();
        Some(Row {
            sessions: cells.get(sessions)?.parse().ok()?,
            // On its way down it is `UP 1/3`, on its way up `DOWN 1/3`.
            is_up: cells.get(status)?.starts_with("UP") || *cells.get(status)? == "no check",
            weight: cells.get(weight)?.parse().ok()?,
        })
    };
    lines.filter_map(row).collect()
}

/// The sessions that have a server, in what `show sess` prints.
fn sessions_of(answer: &str) -> Vec<(u16, usize)> {
    let of = |line: &str| {
        let word = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
        let port = word("src=")?.rsplit_once(':')?.1.parse().ok()?;
        let number: usize = word("srv=")?.rsplit_once('-')?.1.parse().ok()?;
        Some((port, number.checked_sub(1)?))
    };
    answer.lines().filter_map(of).collect()
}

fn configuration(
    listen: SocketAddr,
    name: &str,
    backends: &[SocketAddr],
    policy: Policy,
    options: &str,
    socket: &Path,
) -> String {
    let mut text = format!(
        "global\n  stats socket {} level admin\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  \
         timeout server 1h\n  retries 3\n  option redispatch 1\nfrontend clients\n  bind {listen}\n  default_backend \
         apiservers\nbackend apiservers\n  balance {}\n  option httpchk GET /readyz\n  http-check expect status 200\n",
        socket.display(),
        policy.name(),
    );
    for (index, backend) in backends.iter().enumerate() {
        text += &format!(
            "  server {name}-{} {backend} check check-ssl verify none {options}\n",
            index + 1
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_read_with_the_server_each_has() {
        let answer = "0x55: proto=tcpv4 src=10.77.0.1:40544 fe=clients be=apiservers srv=node-3 ts=00 epoch=0\n\
                      0x56: proto=tcpv4 src=10.77.0.1:40546 fe=clients be=apiservers srv=<none> ts=00\n\
                      0x57: proto=unix_stream src=unix:1 fe=GLOBAL be=<NONE> srv=<none> ts=00\n\n";
        assert_eq!(sessions_of(answer), [(40544, 2)]);
    }

    #[test]
    fn rows_are_read_by_the_names_of_their_columns() {
        let answer = "# pxname,svname,qcur,qmax,scur,smax,slim,stot,bin,status,weight,\n\
                      apiservers,node-1,0,0,103,120,,300,0,UP,100,\n\
                      apiservers,node-2,0,0,0,9,,12,0,DOWN 1/3,1,\n\
                      apiservers,node-3,0,0,7,9,,12,0,UP 2/3,1,\n\n";
        let rows: Vec<_> = rows_of(answer)
            .into_iter()
            .map(|row| (row.sessions, row.is_up, row.weight))
            .collect();
        assert_eq!(rows, [(103, true, 100), (0, false, 1), (7, true, 1)]);
        assert!(rows_of("").is_empty());
    }
}
