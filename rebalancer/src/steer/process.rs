//! The process that listens on the watched port, and what its flags say.
//!
//! Input: /proc of this network namespace and of the processes. Must never take a process for the apiserver that does
//! not hold the listening socket itself, nor take a path for a binary: files are replaced under running processes.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io::{self, BufRead as _, BufReader, Read as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    SteerError,
    flags::{self, Said},
};

/// Programs that run an apiserver inside, with flags that are nowhere on the command line.
const EMBEDDING: [&str; 4] = ["k3s", "k3s-server", "kubelite", "microshift"];

/// No file of flags is larger.
const FLAGS_OCTETS: u64 = 1 << 20;

/// /proc/net/tcp: the state LISTEN.
const LISTEN: &str = "0A";

/// A process, told from any other that has had or will have its number.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its binary, as it names it itself: a path in its own mount namespace, which may be another file by now.
    pub executable: PathBuf,
    /// When it started, in ticks since boot.
    pub started: u64,
    /// Device and inode of its binary.
    pub file: (u64, u64),
    /// The binary itself: what is looked into is what a probe is put on, whatever the process runs by then.
    binary: Arc<File>,
}

impl Process {
    fn read(pid: u32) -> io::Result<Self> {
        let executable = fs::read_link(format!("/proc/{pid}/exe"))?;
        let binary = File::open(format!("/proc/{pid}/exe"))?;
        let process = Self {
            pid,
            executable,
            started: started(pid)?,
            file: identity(&binary.metadata()?),
            binary: Arc::new(binary),
        };
        // It may have become another program between the looks.
        if process.is_the_same() {
            Ok(process)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Its binary.
    pub fn binary(&self) -> &File {
        &self.binary
    }

    /// A path that leads to its binary as long as this value lives, whatever it is called and wherever it lies: also in a
    /// container, also when it was replaced.
    pub fn binary_path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.binary.as_raw_fd()).into()
    }

    /// Whether it still runs, and runs the same binary.
    pub fn is_the_same(&self) -> bool {
        let file = fs::metadata(format!("/proc/{}/exe", self.pid));
        started(self.pid).is_ok_and(|started| started == self.started)
            && file.is_ok_and(|file| identity(&file) == self.file)
    }

    /// What is in its memory.
    ///
    /// # Errors
    ///
    /// It is gone, or must not be looked into.
    pub fn memory<const N: usize>(&self, address: u64) -> io::Result<[u8; N]> {
        let mut octets = [0; N];
        File::open(format!("/proc/{}/mem", self.pid))?.read_exact_at(&mut octets, address)?;
        Ok(octets)
    }

    /// Where its execution began: the kernel has told it in its auxiliary vector (proc(5), getauxval(3)).
    ///
    /// # Errors
    ///
    /// It is gone, must not be looked into, or was told nothing.
    pub fn entry(&self) -> io::Result<u64> {
        let vector = fs::read(format!("/proc/{}/auxv", self.pid))?;
        entry(&vector).ok_or_else(|| io::Error::other("its auxiliary vector has no AT_ENTRY"))
    }

    /// Refuses a process whose returns the processor compares with a second stack (Documentation/arch/x86/shstk.rst,
    /// Documentation/arch/arm64/gcs.rst): answering in a function's place leaves that one's address there.
    ///
    /// # Errors
    ///
    /// [`SteerError::ShadowStack`]; its status or memory map cannot be read.
    pub fn check_shadow_stack(&self) -> Result<(), SteerError> {
        let path = format!("/proc/{}/status", self.pid);
        let status = fs::read_to_string(&path).map_err(SteerError::io(path))?;
        let mut has = has_shadow_stack(&status);
        if cfg!(target_arch = "aarch64") {
            // Its status does not say it there.
            let path = format!("/proc/{}/smaps", self.pid);
            has |= maps_shadow_stack(&fs::read_to_string(&path).map_err(SteerError::io(path))?);
        }
        if has {
            return Err(SteerError::ShadowStack { pid: self.pid });
        }
        Ok(())
    }

    /// What a flag of the apiserver says, wherever this kind of process has its flags; the name has no dashes before it.
    ///
    /// # Errors
    ///
    /// [`SteerError::Embedded`] where an absent flag may still be given; its flags cannot be read.
    pub fn flag(&self, name: &str) -> Result<Said, SteerError> {
        let pid = self.pid;
        let path = format!("/proc/{pid}/cmdline");
        let line = fs::read(&path).map_err(SteerError::io(path))?;
        let arguments: Vec<String> = line
            .split(|octet| *octet == 0)
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect();
        let said = flags::said(name, &arguments, |path| self.file_inside(path))
            .map_err(|(path, source)| SteerError::Flags { pid, path, source })?;
        let name = self.executable.file_name().unwrap_or_default().to_string_lossy();
        if !said.certain && EMBEDDING.contains(&name.trim_end_matches(DELETED)) {
            let name = name.into_owned();
            return Err(SteerError::Embedded { pid, name });
        }
        Ok(said)
    }

    /// Refuses a process that never asks its goaway decider; the chance, and where it is said.
    ///
    /// # Errors
    ///
    /// [`SteerError::NoGoawayChance`] and what else can be said of it; its flags cannot be read.
    pub fn check_goaway_chance(&self) -> Result<(f64, String), SteerError> {
        let pid = self.pid;
        let Said { value, place, .. } = self.flag("goaway-chance")?;
        let refused = |given: &str, place| SteerError::NoGoawayChance {
            pid,
            given: given.to_owned(),
            place,
        };
        let Some(given) = value else {
            return Err(refused("absent", place));
        };
        match given.parse::<f64>() {
            Ok(chance) if chance > 0.0 => Ok((chance, place)),
            Ok(_) => Err(refused(&given, place)),
            Err(_) => Err(SteerError::UnclearGoawayChance { pid, given, place }),
        }
    }

    /// A file as the process names it, of 1 MiB at most.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn file_inside(&self, path: &str) -> io::Result<String> {
        let directory = if path.starts_with('/') { "root" } else { "cwd" };
        let inside = PathBuf::from(format!("/proc/{}/{directory}", self.pid)).join(path.trim_start_matches('/'));
        let mut text = String::new();
        File::open(inside)?.take(FLAGS_OCTETS).read_to_string(&mut text)?;
        Ok(text)
    }

    fn runs(&self, path: &Path) -> bool {
        // As this process sees the path, or as the other one does, in a container.
        let inside = PathBuf::from(format!("/proc/{}/root", self.pid)).join(path.strip_prefix("/").unwrap_or(path));
        let is_it = |path: &Path| fs::metadata(path).is_ok_and(|file| identity(&file) == self.file);
        // The file may have been replaced since it started.
        let replaced = self.executable.to_str().and_then(|own| own.strip_suffix(DELETED));
        self.executable == path || replaced.is_some_and(|own| Path::new(own) == path) || is_it(path) || is_it(&inside)
    }
}

/// What the kernel says behind the path of a file that is gone (proc(5), /proc/PID/exe).
pub(crate) const DELETED: &str = " (deleted)";

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// When a process started.
fn started(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    start_time(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// Field 22 of /proc/PID/stat; the second, the name, may contain anything.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// AT_ENTRY of an auxiliary vector: pairs of words (include/uapi/linux/auxvec.h).
fn entry(vector: &[u8]) -> Option<u64> {
    const AT_ENTRY: u64 = 9;
    let (words, _) = vector.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    let found = pairs.iter().find(|[key, _]| u64::from_ne_bytes(*key) == AT_ENTRY);
    found.map(|[_, value]| u64::from_ne_bytes(*value))
}

fn has_shadow_stack(status: &str) -> bool {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("x86_Thread_features:"));
    line.is_some_and(|features| features.split_whitespace().any(|feature| feature == "shstk"))
}

/// Whether any of the memory is such a stack (proc_pid_smaps(5), the flag `ss`).
fn maps_shadow_stack(smaps: &str) -> bool {
    let mut flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.any(|flags| flags.split_whitespace().any(|flag| flag == "ss"))
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

/// Who listens on a port of this network namespace: `None` for nobody; nobody that is named where none can be seen.
///
/// # Errors
///
/// The kernel's list cannot be read.
pub fn listening(port: u16) -> Result<Option<Vec<Process>>, SteerError> {
    let inodes = listeners(port)?;
    if inodes.is_empty() {
        return Ok(None);
    }
    Ok(Some(holders(&inodes)?.0))
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

    #[test]
    fn a_start_time_is_behind_any_name() {
        let rest: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let line = format!("7 (a) b (c)) {}", rest.join(" "));
        assert_eq!(start_time(&line), Some(22));
    }

    #[test]
    fn an_auxiliary_vector_names_the_entry() {
        let vector: Vec<u8> = [3_u64, 0x40, 9, 0x47_1000, 0, 0]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert_eq!(entry(&vector), Some(0x47_1000));
        assert_eq!(entry(&vector[..16]), None);
    }

    #[test]
    fn a_shadow_stack_is_seen_in_a_processs_status() {
        assert!(has_shadow_stack(
            "Name:\tx\nx86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\t\n"
        ));
        assert!(!has_shadow_stack(
            "Name:\tshstk\nx86_Thread_features:\t\nx86_Thread_features_locked:\tshstk wrss\n"
        ));
        assert!(!has_shadow_stack("Name:\tx\n"));
        assert!(maps_shadow_stack(
            "ffff0000-ffff8000 rw-p 00000000 00:00 0\nRss: 4 kB\nVmFlags: rd wr mr mw me ac ss\n"
        ));
        assert!(!maps_shadow_stack("ss\nVmFlags: rd wr mr mw me ac sd\n"));
        let own = fs::read_to_string("/proc/self/smaps").expect("the kernel says it of this process");
        assert!(own.contains("\nVmFlags:") && !maps_shadow_stack(&own));
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
        assert_eq!(find(port, Some(&own)).expect("this process").file, process.file);
        let code: [u8; 4] = process.memory(process.entry().expect("an entry")).expect("its code");
        assert_ne!(code, [0; 4]);
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
