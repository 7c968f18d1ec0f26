//! Which QEMU boots the VMs: the system's, or a newer one of the same Debian's backports where the system's is too old.
//!
//! Must never change the system but by installing Debian's package where there is none: a newer one is unpacked beside it,
//! and lives on the libraries that package brought.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use crate::{
    arch::Arch,
    debian::{self, Suite},
};

/// Up to it a guest's second processor may end its kernel: code was translated that another processor was changing (mended in
/// 8.1 by "accel/tcg: Always lock pages before translation"). With 7.2 guests were seen to end so with one processor too.
const OLDEST: (u32, u32) = (8, 1);

/// QEMU, for guests of one architecture.
pub struct Emulator {
    program: PathBuf,
    /// Where its firmware is, where that is not where it was built for.
    firmware: Vec<PathBuf>,
    is_new: bool,
}

impl Emulator {
    /// The newest there is.
    ///
    /// # Errors
    ///
    /// There is none, and none can be installed.
    pub fn get(arch: Arch) -> anyhow::Result<Self> {
        let (program, package) = arch.qemu();
        debian::install(program, package)?;
        let system = Self {
            program: program.into(),
            firmware: Vec::new(),
            is_new: false,
        };
        // One that says something else than its version is as good as it was before anybody asked.
        let version = system.version().unwrap_or_default();
        if version >= OLDEST {
            return Ok(Self { is_new: true, ..system });
        }
        Ok(backported(program, package).unwrap_or_else(|error| {
            eprintln!(
                "QEMU {}.{} emulates the VM, with one processor; {}.{} or newer is better, and cannot be had: {error:#}",
                version.0, version.1, OLDEST.0, OLDEST.1
            );
            system
        }))
    }

    /// To boot something with.
    pub fn arguments(&self) -> Vec<PathBuf> {
        let firmware = self
            .firmware
            .iter()
            .flat_map(|path| [PathBuf::from("-L"), path.clone()]);
        std::iter::once(self.program.clone()).chain(firmware).collect()
    }

    /// Whether its processors may be threads of their own.
    pub fn has_threads(&self) -> bool {
        self.is_new
    }

    fn version(&self) -> anyhow::Result<(u32, u32)> {
        let output = Command::new(&self.program)
            .arg("--version")
            .output()
            .with_context(|| self.program.display().to_string())?;
        let said = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&said).into_owned();
        version_in(&text).with_context(|| format!("{} --version says `{}`", self.program.display(), text.trim()))
    }
}

/// The one of this Debian's backports.
fn backported(program: &str, package: &str) -> anyhow::Result<Emulator> {
    let release = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let codename = codename_in(&release).context("/etc/os-release names no VERSION_CODENAME")?;
    let suite = format!("{codename}-backports");
    let packages = [package, "qemu-system-data"];
    let kept: Option<Vec<_>> = packages
        .iter()
        .map(|name| Suite::kept(&suite, Arch::host(), name))
        .collect();
    let trees = match kept {
        Some(trees) => trees,
        None => {
            let suite = Suite::open(&suite, Arch::host())?;
            let fetched = packages.iter().map(|name| suite.unpacked(name, None));
            fetched.collect::<anyhow::Result<_>>()?
        }
    };
    let mut firmware: Vec<PathBuf> = trees.iter().map(|tree| tree.join("usr/share/qemu")).collect();
    // What is not QEMU's own the system's package brought.
    firmware.extend(["/usr/share/seabios", "/usr/share/qemu"].map(|path| Path::new(path).to_owned()));
    firmware.retain(|path| path.is_dir());
    let newer = Emulator {
        program: trees[0].join("usr/bin").join(program),
        firmware,
        is_new: true,
    };
    // A library that it needs and the system does not have is seen here, and not in the middle of a boot.
    let (major, minor) = newer.version()?;
    anyhow::ensure!((major, minor) >= OLDEST, "{suite} has {major}.{minor}");
    Ok(newer)
}

fn version_in(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn codename_in(release: &str) -> Option<&str> {
    let line = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(line.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_code_names_are_read_as_they_are_written() {
        let old = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022";
        assert_eq!(version_in(old), Some((7, 2)));
        assert_eq!(version_in("QEMU emulator version 10.0.2 (v10)"), Some((10, 0)));
        assert!(version_in(old) < Some(OLDEST) && Some((10, 0)) > Some(OLDEST));
        assert_eq!(version_in("something else"), None);
        assert_eq!(codename_in("ID=debian\nVERSION_CODENAME=bookworm\n"), Some("bookworm"));
        assert_eq!(codename_in("VERSION_CODENAME=\"jammy\""), Some("jammy"));
        assert_eq!(codename_in("ID=arch\n"), None);
    }
}
