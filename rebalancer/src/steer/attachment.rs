//! The probe on one apiserver process: made only when everything about it is known.

use std::{collections::BTreeSet, path::Path};

use rebalancer_common::steer::Place;
use rebalancer_core::binary::golang::{Architecture, AttachPoint, BEGIN};

use super::{
    SteerError, binary,
    lock::{self, Lock},
    process::{self, Process},
    program::{Part, Program},
};

/// A probe in place. It goes when this value goes.
pub struct Attachment {
    /// The kernel program.
    pub program: Program,
    /// Where it is.
    pub process: Process,
    /// What is known of the binary.
    pub point: AttachPoint,
    /// Where the function is in its memory.
    pub address: u64,
    port: u16,
    /// The sockets that listen on the port.
    sockets: BTreeSet<u64>,
    _lock: Lock,
}

impl Attachment {
    /// Finds the process that listens on the port, and the place in its binary, and puts the probe there; one that rehearses
    /// counts requests and leaves the answer to the apiserver.
    ///
    /// # Errors
    ///
    /// Whatever is not certain.
    pub fn new(port: u16, path: Option<&Path>, rehearses: bool) -> Result<Self, SteerError> {
        let sockets = process::listeners(port)?;
        let (process, point) = located(port, path)?;
        process.check_goaway_chance()?;
        process.check_shadow_stack()?;
        let lock = lock::take(&process)?;
        let address = untouched(&process, &point)?;
        let place = Place {
            rehearses: u32::from(rehearses),
            ..place(&point, address)
        };
        let mut program = Program::load(Part::STEER, place)?;
        program.attach(process.pid, &process.binary_path(), point.file_offset)?;
        // The number may have become another process's, or the process another program, between the looks.
        if !process.is_the_same() {
            return Err(SteerError::Changed { pid: process.pid });
        }
        let code: [u8; BEGIN] = memory(&process, address)?;
        if !is_breakpoint(point.architecture, &code) {
            let why = format!("there is no breakpoint at {address:#x} afterwards");
            return Err(SteerError::Attach { pid: process.pid, why });
        }
        Ok(Self {
            program,
            process,
            point,
            address,
            port,
            sockets,
            _lock: lock,
        })
    }

    /// Whether the process still runs, and nobody else listens on the port.
    pub fn holds(&self) -> bool {
        self.process.is_the_same() && process::listeners(self.port).is_ok_and(|sockets| sockets == self.sockets)
    }
}

/// What the program is to know of the place.
pub(super) fn place(point: &AttachPoint, address: u64) -> Place {
    Place {
        address,
        proto: point.layout.proto,
        remote_address: point.layout.remote_address,
        ..Place::default()
    }
}

/// Where the function is in the process: a position-independent binary is moved as a whole.
pub(super) fn address(process: &Process, point: &AttachPoint) -> Result<u64, SteerError> {
    let entry = process
        .entry()
        .map_err(SteerError::io(format!("/proc/{}/auxv", process.pid)))?;
    Ok(point.address.wrapping_add(entry.wrapping_sub(point.entry)))
}

fn memory(process: &Process, address: u64) -> Result<[u8; BEGIN], SteerError> {
    process
        .memory(address)
        .map_err(SteerError::io(format!("/proc/{}/mem at {address:#x}", process.pid)))
}

/// The function's address, where its code is as in the file: nobody has put anything there.
fn untouched(process: &Process, point: &AttachPoint) -> Result<u64, SteerError> {
    let (pid, address) = (process.pid, address(process, point)?);
    let code = memory(process, address)?;
    if code == point.code {
        Ok(address)
    } else if is_breakpoint(point.architecture, &code) {
        Err(SteerError::ForeignProbe { pid, address })
    } else {
        let octets: Vec<String> = code.iter().map(|octet| format!("{octet:02x}")).collect();
        let octets = octets.join(" ");
        Err(SteerError::ChangedCode { pid, address, octets })
    }
}

/// Refuses a process whose decider is not as in its file.
///
/// # Errors
///
/// [`SteerError::ForeignProbe`], [`SteerError::ChangedCode`], or it cannot be looked at.
pub fn check_untouched(process: &Process) -> Result<(), SteerError> {
    untouched(process, &point_in(process)?).map(drop)
}

/// Whether code begins with a breakpoint: INT3, or BRK with any number.
fn is_breakpoint(architecture: Architecture, code: &[u8; BEGIN]) -> bool {
    let [first, second, third, fourth, ..] = *code;
    match architecture {
        Architecture::X86_64 => first == 0xcc,
        Architecture::Aarch64 => u32::from_le_bytes([first, second, third, fourth]) & 0xffe0_001f == 0xd420_0000,
    }
}

pub(super) fn located(port: u16, path: Option<&Path>) -> Result<(Process, AttachPoint), SteerError> {
    let process = process::find(port, path)?;
    let point = point_in(&process)?;
    Ok((process, point))
}

/// The place in a process's binary.
///
/// # Errors
///
/// The binary is refused, or is for another processor.
pub fn point_in(process: &Process) -> Result<AttachPoint, SteerError> {
    let inspected =
        binary::inspect_file(process.binary()).map_err(SteerError::io(process.executable.display().to_string()))?;
    let point = inspected.map_err(|source| SteerError::Binary {
        pid: process.pid,
        path: process.executable.clone(),
        source,
    })?;
    let machine = std::env::consts::ARCH;
    if point.architecture.to_string() == machine {
        Ok(point)
    } else {
        Err(SteerError::AnotherArchitecture {
            binary: point.architecture,
            machine,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_of_both_processors_are_known() {
        let code = |begin: &[u8]| {
            let mut code = [0x90; BEGIN];
            code[..begin.len()].copy_from_slice(begin);
            code
        };
        for (architecture, begin, is) in [
            (Architecture::X86_64, &[0xcc, 0x3b, 0x66, 0x10][..], true),
            (Architecture::X86_64, &[0x49, 0x3b, 0x66, 0x10], false),
            // The kernel's for uprobes (arch/arm64/include/asm/brk-imm.h), a debugger's, and Go's stack check.
            (Architecture::Aarch64, &0xd420_00a0_u32.to_le_bytes(), true),
            (Architecture::Aarch64, &0xd420_0000_u32.to_le_bytes(), true),
            (Architecture::Aarch64, &0xf940_0b90_u32.to_le_bytes(), false),
        ] {
            assert_eq!(is_breakpoint(architecture, &code(begin)), is, "{begin:x?}");
        }
    }
}
