//! The probe on one apiserver process: made only when everything about it is known.

use std::{collections::BTreeSet, path::Path};

use rebalancer_common::steer::RequestOffsets;
use rebalancer_core::golang::AttachPoint;

use super::{
    SteerError, binary,
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
    port: u16,
    /// The sockets that listen on the port.
    sockets: BTreeSet<u64>,
}

impl Attachment {
    /// Finds the process that listens on the port, and the place in its binary, and puts the probe there.
    ///
    /// # Errors
    ///
    /// Whatever is not certain.
    pub fn new(port: u16, path: Option<&Path>) -> Result<Self, SteerError> {
        let sockets = process::listeners(port)?;
        let (process, point) = located(port, path)?;
        process.check_goaway_chance()?;
        let mut program = Program::load(Part::Steer, offsets(&point))?;
        program.attach(process.pid, &process.binary(), point.file_offset)?;
        // The number may have become another process's, or the process another program, between the looks.
        if !process.is_the_same() {
            return Err(SteerError::Changed { pid: process.pid });
        }
        Ok(Self {
            program,
            process,
            point,
            port,
            sockets,
        })
    }

    /// Whether the process still runs, and nobody else listens on the port.
    pub fn holds(&self) -> bool {
        self.process.is_the_same() && process::listeners(self.port).is_ok_and(|sockets| sockets == self.sockets)
    }
}

/// Puts one of the programs where the probe would go, for measuring; it goes when the returned value goes.
///
/// # Errors
///
/// As for [`Attachment::new`].
pub fn cost_program(part: Part, port: u16) -> Result<Program, SteerError> {
    let (process, point) = located(port, None)?;
    let mut program = Program::load(part, offsets(&point))?;
    program.attach(process.pid, &process.binary(), point.file_offset)?;
    Ok(program)
}

fn offsets(point: &AttachPoint) -> RequestOffsets {
    RequestOffsets {
        proto: point.layout.proto,
        remote_address: point.layout.remote_address,
    }
}

fn located(port: u16, path: Option<&Path>) -> Result<(Process, AttachPoint), SteerError> {
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
    let point = binary::inspect(&process.binary())?.map_err(|source| SteerError::Binary {
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
