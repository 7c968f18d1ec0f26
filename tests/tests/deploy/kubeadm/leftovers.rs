//! What outlives the processes of a node: cgroups, mount points, settings of the machine, files.
//!
//! A process of its own takes it away when this one lets go of a pipe: at the end, in a panic, and when it is killed.

use std::{
    fmt::Write as _,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

use anyhow::Context as _;

use super::lab::{NODES, OWN};

/// What a kubelet sets for the whole machine (pkg/kubelet/cm/container_manager_linux.go, `setupKernelTunables`).
const SETTINGS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// Whoever takes it away.
pub struct Leftovers {
    child: Child,
    pipe: Option<ChildStdin>,
    /// Where a node's are made: in every hierarchy of version 1, or in version 2 where it is alone.
    cgroups: Vec<PathBuf>,
}

impl Leftovers {
    /// Notes how things are, makes what mounts need, and waits for the end.
    ///
    /// # Errors
    ///
    /// A directory cannot be made.
    pub fn watch(directory: &Path) -> anyhow::Result<Self> {
        let mut script = String::from("read -r keep\n");
        let (first, second) = (hierarchies("cgroup"), hierarchies("cgroup2"));
        // A runtime has a place in version 2 also where it counts by version 1.
        for cgroup in first.iter().chain(&second) {
            for index in 0..NODES {
                let path = cgroup.join(name(&format!("cp-{}", index + 1)));
                // The last process may not be reaped yet.
                writeln!(
                    script,
                    "for i in $(seq 600); do [ -d {0} ] || break; find {0} -depth -type d -exec rmdir {{}} + 2>/dev/null; sleep 0.1; done",
                    path.display()
                )?;
            }
        }
        for setting in SETTINGS {
            let path = Path::new("/proc/sys").join(setting);
            if let Ok(value) = fs::read_to_string(&path) {
                writeln!(script, "echo {} > {}", value.trim(), path.display())?;
            }
        }
        for own in OWN {
            let made: Vec<&Path> = Path::new(own).ancestors().take_while(|path| !path.exists()).collect();
            fs::create_dir_all(own).with_context(|| format!("cannot make {own}"))?;
            for path in made {
                writeln!(script, "rmdir {} 2>/dev/null", path.display())?;
            }
        }
        let directory = directory.display();
        writeln!(
            script,
            "for i in 1 2 3 4 5; do rm -rf {directory}/cp-* {directory}/images && break; sleep 1; done"
        )?;
        writeln!(script, "[ \"$keep\" = keep ] || rm -rf {directory}\nexit 0")?;
        let cgroups = if first.is_empty() { second } else { first };
        let mut child = Command::new("bash")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C on the terminal is for the test.
            .process_group(0)
            .spawn()
            .context("bash")?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe, cgroups })
    }

    /// Where a host's pods are, in each hierarchy.
    pub fn cgroup(&self, host: &str) -> String {
        format!("/{}", name(host))
    }

    /// Makes it.
    ///
    /// # Errors
    ///
    /// A hierarchy takes none.
    pub fn make_cgroup(&self, host: &str) -> anyhow::Result<()> {
        for hierarchy in &self.cgroups {
            let path = hierarchy.join(name(host));
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
            // Without them no process may enter (cpusets, version 1).
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = fs::read_to_string(hierarchy.join(file)) {
                    fs::write(path.join(file), value)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        use std::io::Write as _;
        if let Some(mut pipe) = self.pipe.take()
            && std::thread::panicking()
        {
            // Nobody can help when it is gone already.
            let _ = pipe.write_all(b"keep\n");
        }
        let _ = self.child.wait();
    }
}

fn name(host: &str) -> String {
    format!("rebalancer-{}-{host}", std::process::id())
}

/// Where cgroups of a version are.
fn hierarchies(kind: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let of_kind = lines.filter(|words| words.get(2) == Some(&kind));
    of_kind.map(|words| PathBuf::from(words[1])).collect()
}
