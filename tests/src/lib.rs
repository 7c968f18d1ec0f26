//! What the tests and the demo stand on: certificates, namespaces, a load balancer, apiservers, clients.

pub mod abuse;
pub mod apiserver;
pub mod balancer;
pub mod bench;
pub mod cgroup;
pub mod chaos;
pub mod demo;
pub mod fixture;
pub mod h2client;
pub mod h2wire;
pub mod kube;
pub mod kubectl;
pub mod netns;
pub mod node;
pub mod pki;
pub mod process;
pub mod soak;
pub mod standin;
pub mod storm;
pub mod swarm;

use std::{env, fs::OpenOptions, io::Write as _, path::PathBuf, thread};

/// Says that a test cannot run here, and why; `cargo xtask test` counts these and prints them above its last line.
pub fn skip(reason: &str) {
    let current = thread::current();
    let line = format!("{}: {reason}", current.name().unwrap_or("main"));
    eprintln!("SKIP {line}");
    let Some(path) = env::var_os("REBALANCER_SKIPS") else {
        return;
    };
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "{line}"));
    if let Err(error) = written {
        panic!("the skip must be counted in {}: {error}", path.display());
    }
}

/// The built `rebalancer` binary: `REBALANCER_BIN`, else beside the running test's own profile directory.
///
/// # Panics
///
/// When there is none, saying how to build it.
pub fn binary() -> PathBuf {
    env::var_os("REBALANCER_BIN").map_or_else(|| beside("rebalancer"), PathBuf::from)
}

/// The built demo, which is the stand-in apiserver and its clients as well.
///
/// # Panics
///
/// When there is none, saying how to build it.
pub fn demo_binary() -> PathBuf {
    beside("rebalancer-demo")
}

fn beside(name: &str) -> PathBuf {
    let own = env::current_exe().expect("a process knows its own binary on Linux");
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "no `{name}` beside {}: run `cargo xtask test`, or build it with `cargo build --workspace`",
            own.display()
        )
    })
}
