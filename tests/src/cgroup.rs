//! A cgroup of one's own: what sockets are made within it are of it.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use crate::process::wait_for;

/// Its last process may not be reaped yet.
const PATIENCE: Duration = Duration::from_secs(90);

/// A cgroup below the root of the hierarchy, gone with this.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one; `None` where no cgroup2 is mounted.
    ///
    /// # Errors
    ///
    /// It takes root.
    pub fn new(name: &str) -> io::Result<Option<Self>> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (path, kind) = (words.next()?, words.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        });
        let Some(root) = root else { return Ok(None) };
        let path = root.join(format!("rebalancer-{name}-{}", process::id()));
        fs::create_dir(&path)?;
        Ok(Some(Self { path }))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the hierarchy is mounted.
    pub fn root(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// Its id, as programs' links name it.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn id(&self) -> io::Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// Does something as one of its processes: what sockets it makes are the cgroup's.
    ///
    /// # Errors
    ///
    /// This process may not move.
    pub fn within<T>(&self, job: impl FnOnce() -> T) -> io::Result<T> {
        enter(&self.path)?;
        let done = job();
        enter(self.root())?;
        Ok(done)
    }
}

fn enter(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), process::id().to_string())
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        wait_for(PATIENCE, || fs::remove_dir(&self.path).ok());
    }
}
