//! Looking into a binary, mapped and not copied: an apiserver's is a hundred megabytes.

use std::{fs::File, io, path::Path};

use rebalancer_core::binary::golang::{self, AttachPoint, Refusal};

use super::SteerError;
use crate::sys::Mapped;

/// What was found in a file that is not running, or why it is refused.
///
/// # Errors
///
/// The file cannot be read.
pub fn inspect(path: &Path) -> Result<Result<AttachPoint, Refusal>, SteerError> {
    File::open(path)
        .and_then(|file| inspect_file(&file))
        .map_err(SteerError::io(path.display().to_string()))
}

/// The same of an open file.
///
/// # Errors
///
/// The file cannot be mapped.
pub fn inspect_file(file: &File) -> io::Result<Result<AttachPoint, Refusal>> {
    let mapped = Mapped::new(file)?;
    Ok(golang::find(mapped.bytes()))
}
