//! Who steers new connections in this network namespace: several programs may, one after the other.
//!
//! Input: the kernel's list, and which processes hold what is on it. Must never call a program nobody's that is only not
//! seen: it may be pinned, or its process be another user's.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::programs::loaded_programs;

use crate::sys;

/// One program (sk_lookup).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steering {
    /// The kernel's number of it.
    pub program: u32,
    /// Its name, where it may be asked (CAP_SYS_ADMIN).
    pub name: Option<String>,
    /// The processes that hold it, with what they run.
    pub holders: Vec<(u32, PathBuf)>,
}

/// All that are attached.
///
/// # Errors
///
/// What the kernel says.
pub fn steering() -> io::Result<Vec<Steering>> {
    let programs = sys::steering_programs()?;
    if programs.is_empty() {
        return Ok(Vec::new());
    }
    let named = |id: u32| {
        let mut loaded = loaded_programs().flatten();
        loaded
            .find(|program| program.id() == id)?
            .name_as_str()
            .map(str::to_owned)
    };
    let mut found: Vec<Steering> = programs
        .into_iter()
        .map(|program| Steering {
            program,
            name: named(program),
            holders: Vec::new(),
        })
        .collect();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let held = held(&entry.path());
        for one in found.iter_mut().filter(|one| held.contains(&one.program)) {
            one.holders
                .push((pid, fs::read_link(entry.path().join("exe")).unwrap_or_default()));
        }
    }
    Ok(found)
}

/// The programs that a process holds, itself or by a link (proc(5), /proc/PID/fdinfo).
fn held(process: &Path) -> Vec<u32> {
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let of_programs = descriptors.filter(|descriptor| {
        fs::read_link(descriptor.path()).is_ok_and(|link| link.to_string_lossy().starts_with("anon_inode:bpf"))
    });
    of_programs
        .filter_map(|descriptor| {
            let info = fs::read_to_string(process.join("fdinfo").join(descriptor.file_name())).ok()?;
            info.lines()
                .find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok())
        })
        .collect()
}
