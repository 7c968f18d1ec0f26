//! The shim without a proxy: a uprobe on the stock apiserver's own goaway decision, answered for the victims.
//!
//! Job: find the apiserver's process and the place in its binary, keep the probe on it as it restarts, carry out orders.
//! Input: the watched port, orders. Output: the common interface's reports and results.
//! Must never attach to what is not recognised, nor fall back to anything else: each refusal names its reason.

mod address;
mod answers;
mod attachment;
mod batch;
mod binary;
mod comparison;
mod consumers;
mod cost;
mod flags;
mod lock;
mod process;
mod program;
mod shim;

use std::{io, path::PathBuf};

use rebalancer_core::binary::golang;

pub use answers::Answers;
pub use attachment::{Attachment, check_untouched, point_in};
pub use binary::inspect;
pub use cost::cost_program;
pub(crate) use process::DELETED;
pub use process::{Process, find as find_process, listening};
pub use program::{Part, Program, trial_load};
pub use shim::Steer;

/// Why the shim cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The binary carries no kernel program.
    #[error("this build carries no kernel programs: run `cargo xtask build-ebpf` before `cargo build`")]
    NotBuilt,
    /// The kernel does not take a program that writes registers.
    #[error(
        "the kernel refuses a uprobe program that sets registers ({why}): kernels before 6.18 do, and some later ones; \
         a newer kernel takes it"
    )]
    Kernel {
        /// What it said.
        why: String,
    },
    /// A privilege is missing.
    #[error("{what}: {why}; the agent needs the capabilities CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE, or root")]
    NotPermitted {
        /// What was tried.
        what: String,
        /// What the kernel said.
        why: String,
    },
    /// Nobody listens on the port.
    #[error(
        "no process listens on port {port} in this network namespace: the apiserver is waited for; its port is named by --apiserver-port"
    )]
    NobodyListens {
        /// The port.
        port: u16,
    },
    /// Somebody listens, but the process cannot be seen.
    #[error(
        "somebody listens on port {port}, but the process is not found: the agent must see the host's processes \
         (`hostPID: true` in a pod) and look into them (CAP_SYS_PTRACE); {unreadable} processes could not be looked into"
    )]
    ProcessNotFound {
        /// The port.
        port: u16,
        /// Processes whose descriptors could not be read.
        unreadable: usize,
    },
    /// Several processes hold the listening sockets.
    #[error(
        "more than one process listens on port {port} ({processes}): name the apiserver's binary by --shim steer:PATH"
    )]
    SeveralProcesses {
        /// The port.
        port: u16,
        /// Which ones.
        processes: String,
    },
    /// The binary that was named is not the one that listens.
    #[error("no process that listens on port {port} runs {path}; there is {processes}", path = .path.display())]
    AnotherBinary {
        /// The port.
        port: u16,
        /// What was named.
        path: PathBuf,
        /// What is there.
        processes: String,
    },
    /// There is no place to attach in its binary.
    #[error("the binary {path} of process {pid} cannot be used: {source}", path = .path.display())]
    Binary {
        /// The process.
        pid: u32,
        /// Its binary, as it names it itself.
        path: PathBuf,
        /// Why.
        #[source]
        source: golang::Refusal,
    },
    /// The binary is for another processor than the kernel.
    #[error("the binary is for {binary}, and this machine is {machine}: such a process cannot be probed")]
    AnotherArchitecture {
        /// Of the binary.
        binary: golang::Architecture,
        /// Of the machine.
        machine: &'static str,
    },
    /// The apiserver never asks.
    #[error(
        "process {pid} never decides on GOAWAY: --goaway-chance is {given} {place}; start it with \
         --goaway-chance=0.000001, which is answered for it as long as the agent runs"
    )]
    NoGoawayChance {
        /// The process.
        pid: u32,
        /// What is said there.
        given: String,
        /// Where.
        place: String,
    },
    /// The flag's value is in a form that is not known.
    #[error("process {pid} has --goaway-chance={given} {place}, which is not understood: write it as 0.000001")]
    UnclearGoawayChance {
        /// The process.
        pid: u32,
        /// What is said there.
        given: String,
        /// Where.
        place: String,
    },
    /// A file with the apiserver's flags cannot be read.
    #[error("process {pid} takes its flags from {path}, which cannot be read: {source}")]
    Flags {
        /// The process.
        pid: u32,
        /// The file, as the process names it.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The apiserver is a part of another program.
    #[error(
        "process {pid} is {name}, which runs the apiserver inside and does not show its flags: whether it decides on \
         GOAWAY cannot be told"
    )]
    Embedded {
        /// The process.
        pid: u32,
        /// The program.
        name: String,
    },
    /// The processor compares returns with a second stack.
    #[error(
        "process {pid} has user shadow stacks (shstk): answering in a function's place would be taken for an attack; \
         start it without glibc.cpu.x86_shstk or glibc.cpu.aarch64_gcs in GLIBC_TUNABLES"
    )]
    ShadowStack {
        /// The process.
        pid: u32,
    },
    /// Another agent has this apiserver.
    #[error(
        "another agent has a probe on process {pid}: one agent answers for an apiserver; end that one, or run this one \
         without --shim steer"
    )]
    AnotherAgent {
        /// The process.
        pid: u32,
    },
    /// Another tool has a probe at the place.
    #[error(
        "there is a breakpoint on the decider of process {pid} already, at {address:#x}: another tool's probe, a \
         debugger's, or that of another agent; two programs that answer in one function's place end the process"
    )]
    ForeignProbe {
        /// The process.
        pid: u32,
        /// The function's address in it.
        address: u64,
    },
    /// The code in memory is not the file's.
    #[error(
        "the decider of process {pid} has other instructions in memory, at {address:#x}, than in its file: {octets}"
    )]
    ChangedCode {
        /// The process.
        pid: u32,
        /// The function's address in it.
        address: u64,
        /// What is there, in hexadecimal.
        octets: String,
    },
    /// The kernel refuses the probe itself.
    #[error("the probe cannot be put on process {pid}: {why}{}", crate::kernel::probe_hint(.why))]
    Attach {
        /// The process.
        pid: u32,
        /// What the kernel said.
        why: String,
    },
    /// The process went or became another one meanwhile.
    #[error("process {pid} changed while the probe was put on it")]
    Changed {
        /// The process.
        pid: u32,
    },
    /// A file or map failed.
    #[error("{what}: {source}")]
    Io {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl SteerError {
    /// Whether waiting for the apiserver may help: it is (re)starting.
    fn is_passing(&self) -> bool {
        matches!(self, Self::NobodyListens { .. } | Self::Changed { .. })
    }

    /// Whether it may be what somebody has left that has just ended, an agent or the apiserver itself: the kernel takes a
    /// moment to clear up, and a process that ends holds its sockets longer than its memory.
    fn may_be_left_over(&self) -> bool {
        matches!(
            self,
            Self::AnotherAgent { .. } | Self::ForeignProbe { .. } | Self::ProcessNotFound { .. }
        )
    }

    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| {
            if source.kind() == io::ErrorKind::PermissionDenied {
                Self::NotPermitted {
                    what,
                    why: source.to_string(),
                }
            } else {
                Self::Io { what, source }
            }
        }
    }
}
