//! One agent for one apiserver process, whatever directories, users or containers two of them have.
//!
//! An abstract socket (unix(7)) belongs to the network namespace, which an agent has in common with its apiserver, and it
//! goes with the process that has it. Must never be taken for more than it is: the program in the kernel keeps the peace
//! with those who do not know this lock.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
};

use super::{SteerError, process::Process};

/// Held as long as this lives.
#[derive(Debug)]
pub struct Lock {
    _socket: UnixListener,
}

/// Takes the lock of a process.
///
/// # Errors
///
/// [`SteerError::AnotherAgent`]; no socket can be had.
pub fn take(process: &Process) -> Result<Lock, SteerError> {
    // Start time and file name the process also where two agents number it differently.
    let (device, inode) = process.file;
    let name = format!("rebalancer-steer-{}-{device:x}-{inode:x}", process.started);
    let failed = || SteerError::io(format!("the lock of process {}", process.pid));
    let address = SocketAddr::from_abstract_name(&name).map_err(failed())?;
    match UnixListener::bind_addr(&address) {
        Ok(socket) => Ok(Lock { _socket: socket }),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(SteerError::AnotherAgent { pid: process.pid }),
        Err(error) => Err(failed()(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_process_has_one_lock_at_a_time() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let process = super::super::process::find(port, None).expect("this process");
        let held = take(&process).expect("the first");
        assert!(matches!(take(&process), Err(SteerError::AnotherAgent { .. })));
        drop(held);
        take(&process).expect("the next");
    }
}
