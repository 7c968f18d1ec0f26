//! A node's wall clock that jumps, for its agent and its relay.
//!
//! The kernel has one wall clock for all (a time namespace has monotonic ones of its own, time_namespaces(7)), and it is not
//! this run's to set. So agent and relay are started with a library before the C library's, by which they ask the time
//! (`tests/clock-step`): of each process a file says how far its clock is stepped.
//! Must never say that a clock was stepped before its process has seen it.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;

use crate::{demo::cluster::Cluster, process::wait_for};

/// Where the clocks of a cluster's processes are, beside its nodes' directories.
const CLOCKS: &str = "clocks";

/// A process asks what time it is at the latest with its next Lease, or its next look at its certificates.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program that starts `binary` with such a clock; `binary` itself where the library is not built.
///
/// # Errors
///
/// It cannot be written.
pub fn started_with(binary: PathBuf, directory: &Path) -> anyhow::Result<PathBuf> {
    let library = binary.with_file_name("librebalancer_clock_step.so");
    if !library.exists() {
        return Ok(binary);
    }
    let clocks = directory.join(CLOCKS);
    fs::create_dir_all(&clocks)?;
    let program = directory.join("rebalancer");
    let text = format!(
        "#!/bin/sh\nLD_PRELOAD='{}' REBALANCER_CLOCK='{}' exec '{}' \"$@\"\n",
        library.display(),
        clocks.display(),
        binary.display()
    );
    fs::write(&program, text).with_context(|| format!("cannot write {}", program.display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

/// Steps the clocks of a node's agent and relay to so many seconds beside the kernel's, and waits until both have seen it.
///
/// # Errors
///
/// They have no clock of their own, or do not look at it.
pub fn step(cluster: &Cluster, index: usize, seconds: i64) -> anyhow::Result<()> {
    let node = &cluster.nodes[index];
    let clocks = node
        .directory()
        .parent()
        .context("the cluster's directory")?
        .join(CLOCKS);
    for id in [Some(node.agent_id()), node.relay_id()].into_iter().flatten() {
        let path = clocks.join(format!("clock.{id}"));
        let clock = File::options().read(true).write(true).open(&path).with_context(|| {
            format!(
                "{}: the process has no clock of its own; build it: cargo build --package rebalancer-clock-step",
                path.display()
            )
        })?;
        clock.write_all_at(&seconds.to_ne_bytes(), 0)?;
        let asked = || -> anyhow::Result<u64> {
            let mut count = [0; 8];
            clock.read_exact_at(&mut count, 8)?;
            Ok(u64::from_ne_bytes(count))
        };
        let before = asked()?;
        wait_for(PATIENCE, || asked().is_ok_and(|now| now > before).then_some(()))
            .with_context(|| format!("process {id} of {} does not look at its clock", node.name))?;
    }
    Ok(())
}
