//! What a process may use: files and memory, made less while it runs.
//!
//! Must never touch a process the caller did not start.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, ensure};

/// A process that may open no more files.
pub struct Files {
    id: u32,
    before: libc::rlimit,
}

impl Files {
    /// Sets the limit to the lowest number that is free: one that is open stays open whatever its number is.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub fn no_more(id: u32) -> anyhow::Result<Self> {
        let open: BTreeSet<u64> = descriptors(id)?.into_iter().collect();
        let before = limit(id, None).context("prlimit")?;
        let now = libc::rlimit {
            // The limit is one more than the highest number that may be had (getrlimit(2)), and the lowest free one is had
            // first (open(2)).
            rlim_cur: (0..).find(|number| !open.contains(number)).unwrap_or_default(),
            rlim_max: before.rlim_max,
        };
        limit(id, Some(&now)).context("prlimit")?;
        Ok(Self { id, before })
    }

    /// Sets it to what it was.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub fn as_before(&self) -> anyhow::Result<()> {
        limit(self.id, Some(&self.before)).context("prlimit")?;
        Ok(())
    }
}

fn limit(id: u32, new: Option<&libc::rlimit>) -> io::Result<libc::rlimit> {
    let mut old = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both pointers are null or to an rlimit that lives through the call; the id is of a child of the caller.
    if unsafe { libc::prlimit(id as libc::pid_t, libc::RLIMIT_NOFILE, new, &raw mut old) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(old)
}

/// Numbers of the open files of a process.
///
/// # Errors
///
/// The process is gone.
pub fn descriptors(id: u32) -> anyhow::Result<Vec<u64>> {
    let entries = fs::read_dir(format!("/proc/{id}/fd")).with_context(|| format!("process {id}"))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect())
}

/// Octets of memory that are in use (`VmRSS`, proc_pid_status(5)).
///
/// # Errors
///
/// The process is gone.
pub fn resident(id: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).with_context(|| format!("process {id}"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS")?;
    Ok(kib * 1024)
}

/// A cgroup with a limit of memory; its process goes back where it came from when this goes.
pub struct Group {
    path: PathBuf,
    /// Where the process came from.
    from: PathBuf,
    id: u32,
    /// The file that says what is in use.
    usage: &'static str,
}

impl Group {
    /// Puts the process in one that allows `more` octets above what it uses.
    ///
    /// # Errors
    ///
    /// There is no memory controller, or it takes root.
    pub fn new(id: u32, more: u64) -> anyhow::Result<Self> {
        let controller = controller().context("no cgroup with a memory controller is mounted")?;
        let path = controller.root.join(format!("rebalancer-chaos-{}", process::id()));
        let from = controller.of(id)?;
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let group = Self {
            path,
            from,
            id,
            usage: controller.usage,
        };
        // What a process uses stays counted where it was when it is moved (cgroup-v2.rst, "Memory Ownership"; memory.txt
        // of version 1, "Move charges at task migration", which is off): only what comes is counted here.
        fs::write(group.path.join(controller.limit), more.to_string())?;
        fs::write(group.path.join("cgroup.procs"), id.to_string())?;
        Ok(group)
    }

    /// Octets that are counted in it.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn used(&self) -> anyhow::Result<u64> {
        let text = fs::read_to_string(self.path.join(self.usage))?;
        text.trim().parse().with_context(|| format!("{}: {text:?}", self.usage))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The process may have ended: then its group is empty.
        let _ = fs::write(self.from.join("cgroup.procs"), self.id.to_string());
        let _ = fs::remove_dir(&self.path);
    }
}

/// A hierarchy that limits memory.
struct Controller {
    root: PathBuf,
    /// The file that limits it, and the one that says what is in use.
    limit: &'static str,
    usage: &'static str,
    /// What a process's line of it begins with after its number (cgroups(7), `/proc/PID/cgroup`).
    of_processes: &'static str,
}

impl Controller {
    /// The directory of a process's group.
    fn of(&self, id: u32) -> anyhow::Result<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{id}/cgroup")).with_context(|| format!("process {id}"))?;
        let path = text.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let is_it = controllers == self.of_processes || controllers.split(',').any(|one| one == self.of_processes);
            is_it.then_some(path)
        });
        let path = path.with_context(|| format!("process {id} is in no group"))?;
        Ok(self.root.join(path.trim_start_matches('/')))
    }
}

/// Where memory is limited: version 1's own hierarchy, else version 2.
fn controller() -> Option<Controller> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut of = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (root, kind, options) = (words.next()?, words.next()?, words.next()?);
        let (limit, usage, of_processes) = match kind {
            "cgroup" if options.split(',').any(|option| option == "memory") => {
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory")
            }
            "cgroup2" => {
                let names = fs::read_to_string(Path::new(root).join("cgroup.subtree_control")).ok()?;
                names.split_whitespace().find(|name| *name == "memory")?;
                ("memory.max", "memory.current", "")
            }
            _ => return None,
        };
        let root = PathBuf::from(root);
        Some(Controller {
            root,
            limit,
            usage,
            of_processes,
        })
    });
    of.next()
}

/// A small disk of memory, in a mount namespace that ends with this process.
///
/// # Errors
///
/// It takes root.
pub fn small_disk(at: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(at)?;
    let mounted = process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m", "rebalancer-chaos"])
        .arg(at)
        .status()
        .context("mount(8)")?;
    ensure!(mounted.success(), "a small disk cannot be mounted at {}", at.display());
    Ok(())
}

/// From now on mounts are this process's and its children's alone, and go with them. Before any thread is started.
///
/// # Errors
///
/// It takes root.
pub fn own_mounts() -> anyhow::Result<()> {
    // SAFETY: unshare takes an integer; no other thread shares this one's view of mounts yet.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error()).context("mounts of its own need root");
    }
    let made = process::Command::new("mount").args(["--make-rprivate", "/"]).status()?;
    ensure!(made.success(), "mounts cannot be made private");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_says_what_it_uses_and_a_limit_comes_back() {
        let mut child = process::Command::new("sleep").arg("60").spawn().expect("a process");
        let id = child.id();
        assert!(descriptors(id).expect("files").len() >= 3);
        assert!(resident(process::id()).expect("memory") > 1 << 20);
        let before = limit(id, None).expect("a limit");
        let files = Files::no_more(id).expect("a limit");
        let now = limit(id, None).expect("a limit").rlim_cur;
        assert!(now < before.rlim_cur && !descriptors(id).expect("files").contains(&now));
        files.as_before().expect("a limit");
        assert_eq!(limit(id, None).expect("a limit").rlim_cur, before.rlim_cur);
        child.kill().expect("it runs");
        child.wait().expect("it ends");
    }
}
