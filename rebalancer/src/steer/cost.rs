//! Programs at an apiserver's decision for the sake of measuring and of tests.
//!
//! Must never be called by an agent: nobody looks who else is there.

use super::{
    SteerError,
    attachment::{address, located, place},
    program::{Part, Program},
};

/// What benchmarks put beside the program that answers, in an object of its own.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rebalancer-cost.o"));

impl Part {
    /// The program that answers without its answer.
    pub const SILENT: Self = Self {
        object: OBJECT,
        name: "silent",
    };

    /// One that does nothing: what the trap alone costs.
    pub const EMPTY: Self = Self {
        object: OBJECT,
        name: "empty",
    };
}

/// Puts one of the programs where the probe would go, without a look at who else is there; it goes when the returned value
/// goes.
///
/// # Errors
///
/// As for [`super::Attachment::new`].
pub fn cost_program(part: Part, port: u16) -> Result<Program, SteerError> {
    let (process, point) = located(port, None)?;
    let mut program = Program::load(part, place(&point, address(&process, &point)?))?;
    program.attach(process.pid, &process.binary_path(), point.file_offset)?;
    Ok(program)
}
