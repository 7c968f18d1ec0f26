//! Why the kernel programs cannot be used, in the kernel's own words and with what to do.

use std::io;

use rebalancer_core::binary::btf;

use super::refusal::hint;

/// Where the kernel has its type information.
pub const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Why the kernel programs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// The binary carries none.
    #[error("this build carries no kernel programs: run `cargo xtask build-ebpf` before `cargo build`")]
    NotBuilt,
    /// The kernel has no type information.
    #[error("cannot read {BTF}: {0}; the kernel must be built with CONFIG_DEBUG_INFO_BTF, as distributions' are")]
    NoBtf(io::Error),
    /// The type information lacks something.
    #[error(transparent)]
    Btf(#[from] btf::BtfError),
    /// The kernel refused.
    #[error("the kernel refuses {what}: {why}{}{}", hint(.why), super::release::hint())]
    Refused {
        /// What.
        what: &'static str,
        /// What it said.
        why: String,
    },
    /// A file or ring failed.
    #[error("{what}: {source}")]
    Io {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The kernel's own words, through whatever layers they came.
pub fn refused(what: &'static str) -> impl FnOnce(&dyn std::error::Error) -> EbpfError {
    move |error| {
        let mut why = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            let said = inner.to_string();
            // Some errors show their cause themselves.
            if !why.contains(&said) {
                why = format!("{why}: {said}");
            }
            cause = inner.source();
        }
        EbpfError::Refused {
            what,
            why: shortened(&why),
        }
    }
}

/// The verifier's log can be thousands of lines: its beginning names the call, its end the reason.
fn shortened(why: &str) -> String {
    const LINES: usize = 6;
    let lines: Vec<&str> = why.lines().collect();
    if lines.len() <= 2 * LINES {
        return why.to_owned();
    }
    let left_out = lines.len() - 1 - LINES;
    format!(
        "{}\n  … {left_out} lines …\n{}",
        lines[0],
        lines[lines.len() - LINES..].join("\n")
    )
}
