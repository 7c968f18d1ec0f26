//! Puts the kernel programs into the binary, where `cargo xtask build-ebpf` has built them; else nothing is put there,
//! and the agent says so.

use std::{env, error::Error, fs, path::PathBuf};

/// The programs that count, the one that answers in an apiserver's place, the one that steers new connections; and what
/// benchmarks measure beside them, which nothing refers to in the program itself, so that the linker leaves it out.
const OBJECTS: [&str; 4] = [
    "rebalancer-ebpf.o",
    "rebalancer-steer.o",
    "rebalancer-intercept.o",
    "rebalancer-cost.o",
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // TARGET/PROFILE/build/PACKAGE/out, or one deeper when a target triple is named.
    let beside = out.ancestors().skip(4).take(2).map(|directory| directory.join("ebpf"));
    println!("cargo::rerun-if-env-changed=REBALANCER_EBPF_OBJECTS");
    let named = env::var_os("REBALANCER_EBPF_OBJECTS").map(PathBuf::from);
    let directories: Vec<PathBuf> = named.into_iter().chain(beside).collect();
    let mut are_there = true;
    for name in OBJECTS {
        let candidates: Vec<PathBuf> = directories.iter().map(|directory| directory.join(name)).collect();
        let found = candidates.iter().find(|path| path.is_file());
        // To cargo a file that is missing has changed, whenever it looks: naming one beside those that are there would
        // compile the crate anew at every command.
        for candidate in found.map_or(&candidates[..], std::slice::from_ref) {
            println!("cargo::rerun-if-changed={}", candidate.display());
        }
        let object = found.map(fs::read).transpose()?.unwrap_or_default();
        are_there &= !object.is_empty();
        fs::write(out.join(name), object)?;
    }
    // What `--version` says.
    println!(
        "cargo::rustc-env=REBALANCER_PROGRAMS={}",
        if are_there { "built in" } else { "not built in" }
    );
    Ok(())
}
