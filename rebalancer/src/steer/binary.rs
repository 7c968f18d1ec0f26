//! Looking into a binary, mapped and not copied: an apiserver's is a hundred megabytes.

use std::{fs::File, path::Path};

use rebalancer_core::golang::{self, AttachPoint, Refusal};

use super::SteerError;
use crate::sys::Mapped;

/// What was found in a file, or why it is refused.
///
/// # Errors
///
/// The file cannot be read.
pub fn inspect(path: &Path) -> Result<Result<AttachPoint, Refusal>, SteerError> {
    let failed = || path.display().to_string();
    let file = File::open(path).map_err(SteerError::io(failed()))?;
    let mapped = Mapped::new(&file).map_err(SteerError::io(failed()))?;
    Ok(golang::find(mapped.bytes()))
}
