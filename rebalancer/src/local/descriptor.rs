//! One octet over a Unix socket, and a descriptor with it (unix(7), SCM_RIGHTS).
//!
//! Must never leave a received descriptor open that nobody asked for.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use tokio::{io::Interest, net::UnixStream};

/// Room for one descriptor's control message, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends an octet, with a descriptor when there is one.
///
/// # Errors
///
/// What sendmsg(2) says.
pub async fn send(socket: &UnixStream, octet: u8, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    socket
        .async_io(Interest::WRITABLE, || send_now(socket, octet, descriptor))
        .await
}

/// Receives an octet, and a descriptor when one came with it.
///
/// # Errors
///
/// What recvmsg(2) says; [`io::ErrorKind::UnexpectedEof`] when the other side has closed.
pub async fn receive(socket: &UnixStream) -> io::Result<(u8, Option<OwnedFd>)> {
    socket.async_io(Interest::READABLE, || receive_now(socket)).await
}

fn send_now(socket: &UnixStream, mut octet: u8, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut part = libc::iovec {
        iov_base: (&raw mut octet).cast(),
        iov_len: 1,
    };
    let mut control = Control([0; 64]);
    // SAFETY: all zeros is a valid msghdr: null pointers and lengths of zero.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(descriptor) = descriptor {
        let length = mem::size_of::<libc::c_int>() as libc::c_uint;
        message.msg_control = (&raw mut control).cast();
        // SAFETY: CMSG_SPACE computes with its argument alone.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as _;
        // SAFETY: the control buffer is aligned and larger than one header with one descriptor, so the first header and
        // its data lie within it.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as _;
            libc::CMSG_DATA(header)
                .cast::<libc::c_int>()
                .write_unaligned(descriptor.as_raw_fd());
        }
    }
    // SAFETY: the message points to buffers that live through the call; both descriptors are open.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn receive_now(socket: &UnixStream) -> io::Result<(u8, Option<OwnedFd>)> {
    let mut octet = 0_u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut octet).cast(),
        iov_len: 1,
    };
    let mut control = Control([0; 64]);
    // SAFETY: all zeros is a valid msghdr: null pointers and lengths of zero.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = mem::size_of::<Control>() as _;
    // SAFETY: the message points to buffers of the lengths it names, which live through the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut descriptor = None;
    // SAFETY: the kernel has written headers within the buffer and set its length; the macros stay within it.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the header is not null, so it lies whole within the buffer.
        let (level, kind, length) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN computes with its argument alone.
            let count = (length - unsafe { libc::CMSG_LEN(0) } as usize) / mem::size_of::<libc::c_int>();
            for index in 0..count {
                // SAFETY: the kernel has installed that many descriptors for us, and nobody else owns them; dropping
                // one that is replaced closes it.
                descriptor = Some(unsafe {
                    OwnedFd::from_raw_fd(
                        libc::CMSG_DATA(header)
                            .cast::<libc::c_int>()
                            .add(index)
                            .read_unaligned(),
                    )
                });
            }
        }
        // SAFETY: both pointers are of this message.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    if received == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((octet, descriptor))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _, os::fd::AsFd as _};

    use super::*;

    #[tokio::test]
    async fn a_descriptor_goes_over_and_is_the_same_file() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (reader, writer) = io::pipe().expect("a pipe");
        send(&ours, b'F', Some(writer.as_fd())).await.expect("room");
        send(&ours, b'N', None).await.expect("room");
        drop((ours, writer));
        let (octet, passed) = receive(&theirs).await.expect("an octet");
        assert_eq!(octet, b'F');
        let mut passed = File::from(passed.expect("a descriptor"));
        io::Write::write_all(&mut passed, b"x").expect("the pipe's other end is open");
        drop(passed);
        let mut read = Vec::new();
        let mut reader = reader;
        reader.read_to_end(&mut read).expect("the writer's ends are closed");
        assert_eq!(read, b"x");
        let (octet, none) = receive(&theirs).await.expect("an octet");
        assert_eq!((octet, none.is_none()), (b'N', true));
        let end = receive(&theirs).await.expect_err("the end");
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }
}
