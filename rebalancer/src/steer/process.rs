//! The process that listens on the watched port, and what its command line says.
//!
//! Input: /proc of this network namespace and of the processes. Must never take a process for the apiserver that does
//! not hold the listening socket itself.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io::{self, BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::SteerError;

/// The flag that makes an apiserver decide on GOAWAY at all.
const FLAG: &str = "--goaway-chance";

/// /proc/net/tcp: the state LISTEN.
const LISTEN: &str = "0A";

/// A process, told from any other that has had or will have its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its binary, as it names it itself: a path in its own mount namespace.
    pub executable: PathBuf,
    /// When it started, in ticks since boot.
    started: u64,
    /// Device and inode of its binary.
    file: (u64, u64),
}

impl Process {
    fn read(pid: u32) -> io::Result<Self> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let file = fs::metadata(directory.join("exe"))?;
        Ok(Self {
            pid,
            executable: fs::read_link(directory.join("exe"))?,
            started: started(&fs::read_to_string(directory.join("stat"))?)
                .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))?,
            file: identity(&file),
        })
    }

    /// Its binary, whatever it is called and wherever it lies: also in a container, also when it was replaced.
    pub fn binary(&self) -> PathBuf {
        format!("/proc/{}/exe", self.pid).into()
    }

    /// Whether it still runs, and runs the same binary.
    pub fn is_the_same(&self) -> bool {
        Self::read(self.pid).is_ok_and(|now| now == *self)
    }

    /// Refuses a process that never asks its goaway decider.
    ///
    /// # Errors
    ///
    /// [`SteerError::NoGoawayChance`]; the command line cannot be read.
    pub fn check_goaway_chance(&self) -> Result<f64, SteerError> {
        let path = format!("/proc/{}/cmdline", self.pid);
        let line = fs::read(&path).map_err(SteerError::io(path))?;
        let arguments: Vec<String> = line
            .split(|octet| *octet == 0)
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect();
        let refused = |given| SteerError::NoGoawayChance { pid: self.pid, given };
        let given = goaway_chance(&arguments).ok_or_else(|| refused("absent".to_owned()))?;
        let chance: f64 = given.parse().map_err(|_| refused(format!("`{given}`")))?;
        if chance > 0.0 {
            Ok(chance)
        } else {
            Err(refused(given.to_owned()))
        }
    }

    fn runs(&self, path: &Path) -> bool {
        // As this process sees the path, or as the other one does, in a container.
        let inside = PathBuf::from(format!("/proc/{}/root", self.pid)).join(path.strip_prefix("/").unwrap_or(path));
        let is_it = |path: &Path| fs::metadata(path).is_ok_and(|file| identity(&file) == self.file);
        self.executable == path || is_it(path) || is_it(&inside)
    }
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Field 22 of /proc/PID/stat; the second, the name, may contain anything.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// What the last `--goaway-chance` says: that one counts.
fn goaway_chance(arguments: &[String]) -> Option<&str> {
    let mut found = None;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == FLAG {
            found = rest.next().map(String::as_str);
        } else if let Some(value) = argument.strip_prefix(FLAG).and_then(|rest| rest.strip_prefix('=')) {
            found = Some(value);
        }
    }
    found
}

/// The one process that listens on the port in this network namespace; with `path`, the one that runs that binary.
///
/// # Errors
///
/// There is none, or there are several.
pub fn find(port: u16, path: Option<&Path>) -> Result<Process, SteerError> {
    let inodes = listeners(port)?;
    if inodes.is_empty() {
        return Err(SteerError::NobodyListens { port });
    }
    let (mut processes, unreadable) = holders(&inodes)?;
    if processes.is_empty() {
        return Err(SteerError::ProcessNotFound { port, unreadable });
    }
    let all = shown(&processes);
    if let Some(path) = path {
        processes.retain(|process| process.runs(path));
    }
    match (processes.pop(), processes.is_empty(), path) {
        (Some(process), true, _) => Ok(process),
        (None, _, Some(path)) => Err(SteerError::AnotherBinary {
            port,
            path: path.to_owned(),
            processes: all,
        }),
        _ => Err(SteerError::SeveralProcesses { port, processes: all }),
    }
}

/// The inodes of the sockets that listen on the port.
pub fn listeners(port: u16) -> Result<BTreeSet<u64>, SteerError> {
    let mut found = BTreeSet::new();
    for path in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let file = match File::open(path) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.map_err(SteerError::io(path))?,
        };
        for line in BufReader::new(file).lines().skip(1) {
            let line = line.map_err(SteerError::io(path))?;
            match listener(&line) {
                Some((listening, inode)) if listening == port => {
                    found.insert(inode);
                }
                Some(_) => {}
                // The kernel lists those that listen first.
                None => break,
            }
        }
    }
    Ok(found)
}

/// Port and inode of a line of /proc/net/tcp; `None` when its socket does not listen.
fn listener(line: &str) -> Option<(u16, u64)> {
    let mut words = line.split_whitespace().skip(1);
    let local = words.next()?;
    let state = words.nth(1)?;
    let inode = words.nth(5)?.parse().ok()?;
    let (_, port) = local.rsplit_once(':')?;
    (state == LISTEN).then_some((u16::from_str_radix(port, 16).ok()?, inode))
}

/// Every process that holds one of the sockets, and how many could not be looked into.
fn holders(inodes: &BTreeSet<u64>) -> Result<(Vec<Process>, usize), SteerError> {
    let names: BTreeSet<PathBuf> = inodes
        .iter()
        .map(|inode| PathBuf::from(format!("socket:[{inode}]")))
        .collect();
    let mut found = Vec::new();
    let mut unreadable = 0;
    let entries = fs::read_dir("/proc").map_err(SteerError::io("/proc"))?;
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let descriptors = match fs::read_dir(entry.path().join("fd")) {
            Ok(descriptors) => descriptors,
            Err(error) => {
                unreadable += usize::from(error.kind() == io::ErrorKind::PermissionDenied);
                continue;
            }
        };
        let holds = descriptors
            .flatten()
            .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
            .any(|link| names.contains(&link));
        if !holds {
            continue;
        }
        match Process::read(pid) {
            Ok(process) => found.push(process),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => unreadable += 1,
            // It has just ended.
            Err(_) => {}
        }
    }
    Ok((found, unreadable))
}

fn shown(processes: &[Process]) -> String {
    let each: Vec<String> = processes
        .iter()
        .map(|process| format!("process {} running {}", process.pid, process.executable.display()))
        .collect();
    each.join(", ")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn arguments(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_last_goaway_chance_counts() {
        for (line, chance) in [
            ("kube-apiserver --v=1", None),
            ("kube-apiserver --goaway-chance=0.001", Some("0.001")),
            ("kube-apiserver --goaway-chance 0.001 --v=1", Some("0.001")),
            ("kube-apiserver --goaway-chance=0.001 --goaway-chance=0", Some("0")),
            ("kube-apiserver --goaway-chances=0.001", None),
            ("kube-apiserver --goaway-chance", None),
        ] {
            assert_eq!(goaway_chance(&arguments(line)), chance, "{line}");
        }
    }

    #[test]
    fn a_start_time_is_behind_any_name() {
        let rest: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let line = format!("7 (a) b (c)) {}", rest.join(" "));
        assert_eq!(started(&line), Some(22));
    }

    #[test]
    fn lines_of_listening_sockets_are_read() {
        let line = "   0: 00000000:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 48131 1 0 100 0 0 10 0";
        assert_eq!(listener(line), Some((6443, 48131)));
        assert_eq!(listener(&line.replace(" 0A ", " 01 ")), None);
    }

    #[test]
    fn a_listening_process_is_found_by_its_port() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let process = find(port, None).expect("this process");
        assert_eq!(process.pid, std::process::id());
        assert!(process.is_the_same());
        let own = std::env::current_exe().expect("a path");
        assert_eq!(find(port, Some(&own)).expect("this process"), process);
        assert!(matches!(
            find(port, Some(Path::new("/bin/true"))),
            Err(SteerError::AnotherBinary { .. })
        ));
        // This process never says anything of GOAWAY.
        let said = process.check_goaway_chance().expect_err("a refusal").to_string();
        assert!(
            said.contains("--goaway-chance is absent") && said.contains("--goaway-chance=0.000001"),
            "{said}"
        );
        drop(listener);
        assert!(matches!(find(port, None), Err(SteerError::NobodyListens { .. })));
    }
}
