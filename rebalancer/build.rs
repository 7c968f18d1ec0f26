//! Puts the kernel programs into the binary, where `cargo xtask build-ebpf` has built them; else nothing is put there,
//! and the agent says so.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // TARGET/PROFILE/build/PACKAGE/out, or one deeper when a target triple is named.
    let beside = out
        .ancestors()
        .skip(4)
        .take(2)
        .map(|directory| directory.join("ebpf/rebalancer-ebpf.o"));
    println!("cargo::rerun-if-env-changed=REBALANCER_EBPF_OBJECT");
    let named = env::var_os("REBALANCER_EBPF_OBJECT").map(PathBuf::from);
    let candidates: Vec<PathBuf> = named.into_iter().chain(beside).collect();
    for candidate in &candidates {
        println!("cargo::rerun-if-changed={}", candidate.display());
    }
    let object = match candidates.iter().find(|path| path.is_file()) {
        Some(path) => fs::read(path)?,
        None => Vec::new(),
    };
    fs::write(out.join("rebalancer-ebpf.o"), object)?;
    Ok(())
}
