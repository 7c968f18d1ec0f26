//! Programs without shared libraries, for this processor or another: the standard library they are built with.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{arch::Arch, debian, ebpf};

/// Where the standard library for a processor comes from.
pub enum Standard {
    /// The toolchain has it.
    There,
    /// It is built from its source; the directory of that, where it is not the toolchain's own.
    Built(Option<PathBuf>),
}

impl Standard {
    /// Makes it be there, and what links for that processor too.
    ///
    /// # Errors
    ///
    /// It cannot be had.
    pub fn of(arch: Arch) -> anyhow::Result<Self> {
        let triple = arch.triple();
        let is_there = || {
            let printed = Command::new("rustc")
                .args(["--print", "target-libdir", "--target", &triple])
                .output();
            printed.is_ok_and(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
        };
        if !arch.is_host() {
            let (compiler, package) = arch.cross_compiler();
            debian::install(&compiler, &package)?;
            // The compiler only recommends what C's library is compiled against.
            let headers = format!("/usr/{}-linux-gnu/include/stdlib.h", arch.rust());
            debian::install_file(Path::new(&headers), &format!("libc6-dev-{}-cross", arch.debian()))?;
        }
        if is_there() {
            return Ok(Self::There);
        }
        eprintln!("the standard library for {triple} is needed: `rustup target add {triple}`");
        let added = Command::new("rustup").args(["target", "add", &triple]).status();
        if added.is_ok_and(|status| status.success()) && is_there() {
            return Ok(Self::There);
        }
        eprintln!("rustup cannot add it here: building it from its source instead");
        ebpf::standard_library().map(Self::Built)
    }

    /// Has a build use it.
    pub fn prepare(&self, command: &mut Command, arch: Arch) {
        if !arch.is_host() {
            let variable = arch.triple().to_uppercase().replace('-', "_");
            command.env(format!("CARGO_TARGET_{variable}_LINKER"), arch.cross_compiler().0);
        }
        if let Self::Built(library) = self {
            command
                .arg("-Zbuild-std=std,panic_abort,test")
                .env("RUSTC_BOOTSTRAP", "1");
            if let Some(library) = library {
                command.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
            }
        }
    }
}
