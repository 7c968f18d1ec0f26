//! Local APIs: a Unix socket only its owner may use, and errors as `application/problem+json` (RFC 9457).

pub mod client;
pub mod descriptor;

use std::{
    fs, io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tokio::net::UnixListener;

use crate::random;

/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("{0} is in use: another process answers on it; end that one, or give this one another path")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is not a socket; give another path, or remove it")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A bound socket, whose file goes when this goes.
#[derive(Debug)]
pub struct LocalSocket {
    /// The listener.
    pub listener: UnixListener,
    /// Removes the file at the end.
    pub guard: SocketFile,
}

/// The file of a socket.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A successor may have put its own there.
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            // It may have been removed meanwhile: nothing is lost.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A socket that is bound beside its place, with its mode set, so that nobody can connect before it is moved there.
#[derive(Debug)]
pub struct Prepared {
    listener: UnixListener,
    beside: Beside,
    path: PathBuf,
    inode: u64,
}

/// A file that goes with this, unless it was moved.
#[derive(Debug)]
struct Beside(PathBuf);

impl Drop for Beside {
    fn drop(&mut self) {
        // After the move there is nothing there.
        let _ = fs::remove_file(&self.0);
    }
}

impl Prepared {
    /// Moves it to its place, over whatever socket is there.
    ///
    /// # Errors
    ///
    /// See [`BindError`].
    pub fn commit(self) -> Result<LocalSocket, BindError> {
        fs::rename(&self.beside.0, &self.path).map_err(failed("move the socket to", &self.path))?;
        Ok(LocalSocket {
            listener: self.listener,
            guard: SocketFile {
                path: self.path,
                inode: self.inode,
            },
        })
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BindError {
    let path = path.to_owned();
    move |source| BindError::Io { action, path, source }
}

/// Binds `path` with mode 0600 and takes over a socket that nobody answers on.
///
/// # Errors
///
/// See [`BindError`].
pub fn bind(path: &Path) -> Result<LocalSocket, BindError> {
    prepare(path)?.commit()
}

/// The first half of [`bind`].
///
/// # Errors
///
/// See [`BindError`].
pub fn prepare(path: &Path) -> Result<Prepared, BindError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() && UnixStream::connect(path).is_ok() => {
            Err(BindError::InUse(path.into()))
        }
        _ => replace(path),
    }
}

/// The same where whoever answers there is to be relieved.
///
/// # Errors
///
/// See [`BindError`].
pub fn replace(path: &Path) -> Result<Prepared, BindError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.into()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at", path)(error)),
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed("make the directory", directory))?;
    }
    remove_left_over(path);
    // Not the process's id: in a container it is 1 each time, and what a crash left would be in the way.
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!("{BESIDE}{:08x}", random::u64() as u32));
    let beside = PathBuf::from(beside);
    // A process of this id that was killed in between has left it; in a container the id is always the same.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &beside)(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&beside).map_err(failed("bind", &beside))?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600)).map_err(failed("set the mode of", &beside))?;
    let inode = fs::symlink_metadata(&beside).map_err(failed("look at", &beside))?.ino();
    Ok(Prepared {
        listener,
        beside: Beside(beside),
        path: path.into(),
        inode,
    })
}

/// Between the name of a socket and the number of one that is not in its place yet.
const BESIDE: &str = ".~";

/// Removes what processes left that ended between binding and moving: nobody answers there.
fn remove_left_over(path: &Path) {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return;
    };
    let is_left_over = |other: &[u8]| {
        // By this release, and by those that put the process's id behind the name.
        let behind = other.strip_prefix(name.as_bytes()).unwrap_or_default();
        let by_id = behind.strip_prefix(b".").unwrap_or_default();
        behind.starts_with(BESIDE.as_bytes()) || !by_id.is_empty() && by_id.iter().all(u8::is_ascii_digit)
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_one = is_left_over(entry.file_name().as_bytes()) && entry.file_type().is_ok_and(|kind| kind.is_socket());
        let refuses =
            || UnixStream::connect(entry.path()).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if is_one && refuses() {
            // It may have been removed meanwhile: nothing is lost.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// `unix:PATH`, as flags name a local socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(pub PathBuf);

impl std::str::FromStr for SocketPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self(path.into())),
            _ => Err(format!("`{text}` is not unix:PATH with an absolute path")),
        }
    }
}

/// An error answer (RFC 9457).
#[derive(Debug, Serialize)]
pub struct Problem {
    title: &'static str,
    status: u16,
    detail: String,
}

impl Problem {
    /// An answer with that status and an explanation for this occurrence.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            title: status.canonical_reason().unwrap_or("error"),
            status: status.as_u16(),
            detail: detail.into(),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_killed_process_left_is_taken_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("agent.sock");
        let beside = directory.path().join(format!("agent.sock.{}", std::process::id()));
        // Bound and never moved to its place; and bound, moved, and never removed.
        for left in [&beside, &path] {
            drop(std::os::unix::net::UnixListener::bind(left).expect("a socket"));
        }
        let bound = bind(&path).expect("nobody answers on them");
        assert!(!beside.exists());
        assert_eq!(
            fs::metadata(&path).expect("a socket").permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(bind(&path), Err(BindError::InUse(_))));
        drop(bound);
        assert!(!path.exists());
    }
}
