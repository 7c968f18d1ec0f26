//! The processors that kernel programs, tests and VMs are built for.

use std::env;

use clap::ValueEnum;

/// A processor, by Debian's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// x86_64
    Amd64,
    /// aarch64
    Arm64,
}

impl Arch {
    /// This machine's; another than the two is taken for x86_64, and then fails by name.
    pub fn host() -> Self {
        if env::consts::ARCH == "aarch64" {
            Self::Arm64
        } else {
            Self::Amd64
        }
    }

    pub fn is_host(self) -> bool {
        self == Self::host()
    }

    /// Debian's name, which is Go's as well.
    pub fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Rust's name.
    pub fn rust(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// What programs for it are compiled for.
    pub fn triple(self) -> String {
        format!("{}-unknown-linux-gnu", self.rust())
    }

    /// C's compiler for it, and Debian's package of it, where the machine is another.
    pub fn cross_compiler(self) -> (String, String) {
        let name = self.rust().replace('_', "-");
        (
            format!("{}-linux-gnu-gcc", self.rust()),
            format!("gcc-{name}-linux-gnu"),
        )
    }

    /// The emulator, and Debian's package of it.
    pub fn qemu(self) -> (&'static str, &'static str) {
        match self {
            Self::Amd64 => ("qemu-system-x86_64", "qemu-system-x86"),
            Self::Arm64 => ("qemu-system-aarch64", "qemu-system-arm"),
        }
    }

    /// The emulated machine; the kernel's arguments that go with it.
    pub fn machine(self) -> (&'static [&'static str], &'static str) {
        match self {
            Self::Amd64 => (&["-machine", "q35", "-cpu", "max"], "console=ttyS0"),
            // Pointer authentication as the architecture has it is three times slower to emulate.
            Self::Arm64 => (&["-machine", "virt", "-cpu", "max,pauth-impdef=on"], "console=ttyAMA0"),
        }
    }

    /// The kernel's arguments for a clock that is always right, and slow to read.
    pub fn clock(self) -> &'static str {
        match self {
            // A time-stamp counter whose pace the guest has measured on a busy machine runs away, and takes its clock with it.
            Self::Amd64 => "tsc=unstable",
            Self::Arm64 => "",
        }
    }
}
