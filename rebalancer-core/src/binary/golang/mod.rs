//! Where a stock apiserver decides whether a request is answered with GOAWAY, found in its binary.
//!
//! Job: from the bytes of an executable to the place a uprobe may be put, and how the request is laid out there.
//! Input: the bytes. Output: an [`AttachPoint`], or a [`Refusal`]: a probe in the wrong place kills an apiserver.
//! Must never read outside the bytes, whatever they say, nor guess: what is not recognised is refused.

mod build;
mod code;
mod functions;
mod image;

use std::fmt;

pub use build::{BuildInfo, GoVersion};
use functions::FunctionTable;
use image::Image;

/// The function that decides, without what a vendoring build puts before it.
pub const FUNCTION: &str = "k8s.io/apiserver/pkg/server/filters.(*probabilisticGoawayDecider).Goaway";

/// Go releases whose function table, calling convention and `http.Request` are known, as minor versions of Go 1.
pub const KNOWN_MINORS: std::ops::RangeInclusive<u32> = 18..=27;

/// The processor a binary is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// x86_64
    X86_64,
    /// arm64
    Aarch64,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        })
    }
}

/// Where the members of `net/http.Request` lie, in octets from its beginning; each is a pointer and a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLayout {
    /// `Proto`, `HTTP/2.0` for HTTP/2.
    pub proto: u32,
    /// `RemoteAddr`, the client's address and port as text.
    pub remote_address: u32,
}

/// The same from Go 1.18 to Go 1.27: what was added to the structure since was added behind these (net/http/request.go).
pub const LAYOUT: RequestLayout = RequestLayout {
    proto: 0x18,
    remote_address: 0xb0,
};

/// The place, and what is known of the binary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachPoint {
    /// The processor it is for.
    pub architecture: Architecture,
    /// Who built it, from what.
    pub build: BuildInfo,
    /// Where the function begins, as linked.
    pub address: u64,
    /// Where it begins in the file: what a uprobe takes.
    pub file_offset: u64,
    /// The function's first octets, as the process has them in memory where nobody put a breakpoint.
    pub code: [u8; BEGIN],
    /// Where execution of the whole program begins, as linked: what a process moved this by, it moved the function by.
    pub entry: u64,
    /// How the request is laid out that the function is called with.
    pub layout: RequestLayout,
}

/// How many of the function's first octets are kept: more than a breakpoint or a jump takes.
pub const BEGIN: usize = 16;

/// Why there is no place to attach.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not an executable of the kind that is understood.
    #[error("it is not a 64-bit little-endian ELF executable: {why}")]
    NotElf {
        /// What is wrong.
        why: &'static str,
    },
    /// Another processor.
    #[error("it is for the processor type {machine} (ELF e_machine); known are x86_64 (62) and aarch64 (183)")]
    UnsupportedArchitecture {
        /// ELF's number of it.
        machine: u16,
    },
    /// No build information of Go.
    #[error("it carries no build information of Go: it is no Go program, or older than Go 1.18")]
    NotGo,
    /// A release that was never looked at.
    #[error(
        "it is built with `{version}`; known are go1.{} to go1.{} with the register calling convention",
        KNOWN_MINORS.start(), KNOWN_MINORS.end()
    )]
    UnknownGoVersion {
        /// What it says.
        version: String,
    },
    /// The compiler was guided by a profile.
    #[error(
        "it is built with a profile (-pgo={profile}): Go then puts the decider's code where it is called, and a probe on \
         the function is passed by"
    )]
    ProfileGuided {
        /// As the build names it.
        profile: String,
    },
    /// No function table.
    #[error(
        "it has no function table (.gopclntab): it was packed or stripped by something other than `strip` or `-ldflags=-s`"
    )]
    NoFunctionTable,
    /// A function table of another shape.
    #[error("its function table has the form {magic:#x}, which is not known")]
    UnknownFunctionTable {
        /// The table's magic number.
        magic: u32,
    },
    /// Something contradicts itself.
    #[error("its {what} is malformed")]
    Malformed {
        /// What.
        what: &'static str,
    },
    /// The base of all code addresses is not known for certain.
    #[error("the address its code begins at (runtime.text) cannot be established: {why}")]
    NoTextStart {
        /// Why.
        why: &'static str,
    },
    /// The function is not there.
    #[error(
        "it has no goaway filter: there is no function {FUNCTION} in it, so it is not built on k8s.io/apiserver or never uses --goaway-chance"
    )]
    NoGoawayFilter,
    /// More than one function of that name.
    #[error("it has {count} functions named {FUNCTION}: which one is called cannot be told")]
    Ambiguous {
        /// How many.
        count: usize,
    },
    /// The function does not begin as Go's compiler lets functions begin, or uses its receiver in another way.
    #[error(
        "{FUNCTION} at {address:#x} does not have the expected instructions ({what}): its first octets are {octets}"
    )]
    UnexpectedCode {
        /// Where.
        address: u64,
        /// What was looked for.
        what: &'static str,
        /// What is there, in hexadecimal.
        octets: String,
    },
}

/// Finds the place.
///
/// # Errors
///
/// See [`Refusal`].
pub fn find(bytes: &[u8]) -> Result<AttachPoint, Refusal> {
    let image = Image::parse(bytes)?;
    let build = BuildInfo::read(&image)?;
    if !build.version.is_known() {
        return Err(Refusal::UnknownGoVersion {
            version: build.version.text,
        });
    }
    if let Some(profile) = build.profile {
        return Err(Refusal::ProfileGuided { profile });
    }
    let table = FunctionTable::read(&image)?;
    let function = table.find(FUNCTION.as_bytes())?;
    let code = image
        .code(function.address, function.length)
        .ok_or(Refusal::Malformed { what: "function table" })?;
    let architecture = image.architecture();
    code::check(architecture, code).map_err(|what| Refusal::UnexpectedCode {
        address: function.address,
        what,
        octets: code::hexadecimal(code),
    })?;
    let file_offset = image
        .file_offset(function.address)
        .ok_or(Refusal::Malformed { what: "program header" })?;
    Ok(AttachPoint {
        architecture,
        build,
        address: function.address,
        file_offset,
        code: *code
            .first_chunk()
            .ok_or(Refusal::Malformed { what: "function table" })?,
        entry: image.entry(),
        layout: LAYOUT,
    })
}

#[cfg(test)]
mod tests;
