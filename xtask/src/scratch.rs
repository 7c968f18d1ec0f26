//! Where tests write: one directory for all of a run, so that nothing of it stays behind.
//!
//! What a test keeps for the whole of its process, such as the logs of an apiserver that all tests share, is never dropped by
//! that process. Must never remove what a run that goes on, or somebody else, has written.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::Context as _;

/// What such a directory's name begins with; the number of the run's process follows.
const NAME: &str = "rebalancer-tests-";

/// The directory of a run; it goes with this unless it is kept.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes it in the system's place for temporary files, and removes those of runs that were interrupted or failed.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn make() -> anyhow::Result<Self> {
        Self::make_in(&env::temp_dir())
    }

    fn make_in(place: &Path) -> anyhow::Result<Self> {
        let here = fs::read_dir(place).into_iter().flatten().flatten();
        for path in here.map(|entry| entry.path()).filter(|path| is_ended(path)) {
            remove(&path);
        }
        let path = place.join(format!("{NAME}{}", process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Leaves it for whoever wants to know why something failed; the next run removes it.
    pub fn keep(self) -> PathBuf {
        std::mem::take(&mut std::mem::ManuallyDrop::new(self).0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Whether it is the directory of a run whose process is gone.
fn is_ended(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.strip_prefix(NAME))
        .and_then(|number| number.parse::<u32>().ok())
        .is_some_and(|number| number != process::id() && !Path::new("/proc").join(number.to_string()).exists())
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path) {
        eprintln!("cannot remove {}, which tests wrote: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_ended_runs_are_removed() {
        let place = tempfile::tempdir().expect("a directory");
        // Beyond what the kernel gives out (PID_MAX_LIMIT is 2^22).
        let ended = place.path().join(format!("{NAME}4194305"));
        let goes_on = place.path().join(format!("{NAME}1"));
        let others = place.path().join(format!("{NAME}of-somebody"));
        for path in [&ended, &goes_on, &others] {
            fs::create_dir(path).expect("a directory");
            fs::write(path.join("log"), "a line").expect("a log");
        }
        let scratch = Scratch::make_in(place.path()).expect("a directory of its own");
        assert!(!ended.exists() && goes_on.exists() && others.exists());
        let path = scratch.path().to_owned();
        assert!(path.is_dir());
        drop(scratch);
        assert!(!path.exists());
        let kept = Scratch::make_in(place.path()).expect("another one").keep();
        assert!(kept.is_dir());
    }
}
