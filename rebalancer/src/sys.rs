//! System calls the standard library has no name for.
//!
//! Must stay small: each function is one call and its SAFETY reason.

use std::{
    fs::File,
    io, mem,
    net::TcpStream,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr, slice,
    time::Duration,
};

use tokio::io::{Interest, unix::AsyncFd};

/// A socket's cookie (`SO_COOKIE`, socket(7)): unique for the socket's life, and known to the kernel programs too.
///
/// # Errors
///
/// What getsockopt(2) says.
pub fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    cookie(socket, libc::SO_COOKIE)
}

/// Which network namespace a socket is in (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// # Errors
///
/// What getsockopt(2) says.
pub fn namespace_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    cookie(socket, libc::SO_NETNS_COOKIE)
}

/// An option of a socket that is a u64.
fn cookie(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = mem::size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers are to a u64 and to its length, which live through the call; the descriptor is open.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Binding this socket to an address takes no port yet (`IP_BIND_ADDRESS_NO_PORT`, ip(7)).
///
/// # Errors
///
/// What setsockopt(2) says.
pub fn bind_without_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer is to an int of the length that is given, which lives through the call; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            mem::size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Registers a socket with the running event loop, for some of its events.
///
/// # Errors
///
/// What epoll_ctl(2) says.
pub fn watched(socket: TcpStream, interest: Interest) -> io::Result<AsyncFd<TcpStream>> {
    // SAFETY: the socket owns its descriptor and keeps it open, the same one, until the registration gives it back.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::from)
}

/// Raises the soft limit of open files to the hard one, and says what it is now.
///
/// # Errors
///
/// What getrlimit(2) or setrlimit(2) says.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to an rlimit that lives through the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is to an initialised rlimit that lives through the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}

/// Has a write that would make a file larger than this process may (RLIMIT_FSIZE) fail, as one on a full disk does, rather
/// than end the process.
pub fn survive_full_files() {
    // SAFETY: the signal is ignored, so no handler runs; nothing else in this process sets it.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// The kernel's monotonic clock (clock_gettime(2)), which kernel programs read too.
pub fn monotonic() -> Duration {
    clock(libc::CLOCK_MONOTONIC)
}

/// How long the machine is up, its sleep counted (CLOCK_BOOTTIME, clock_gettime(2)).
pub fn since_boot() -> Duration {
    clock(libc::CLOCK_BOOTTIME)
}

/// Names this boot of the machine (random(4)); empty where it cannot be read.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn clock(which: libc::clockid_t) -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives through the call; both clocks exist on every Linux.
    unsafe {
        libc::clock_gettime(which, &raw mut now);
    }
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// A file's content, mapped and not copied (mmap(2)).
#[derive(Debug)]
pub struct Mapped {
    begin: *mut libc::c_void,
    length: usize,
}

impl Mapped {
    /// Maps the whole file, readable only, and shared: what another tool's probe puts into private mappings of a binary
    /// (kernel/events/uprobes.c, `valid_vma`) is not of the file.
    ///
    /// # Errors
    ///
    /// What mmap(2) says; an empty file cannot be mapped.
    pub fn new(file: &File) -> io::Result<Self> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        // SAFETY: the kernel chooses the address, the descriptor is open, and nothing is written through the mapping.
        let begin = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if begin == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { begin, length })
    }

    /// The octets.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is as long, and lives as long as `self`. The kernel does not let a running binary be
        // written to (ETXTBSY), and whoever reads these octets takes them for what they are, not for what they should be.
        unsafe { slice::from_raw_parts(self.begin.cast(), self.length) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it any more.
        unsafe {
            libc::munmap(self.begin, self.length);
        }
    }
}

/// The index of a network interface of this namespace.
///
/// # Errors
///
/// There is none of that name.
pub fn interface_index(name: &std::ffi::CStr) -> io::Result<u32> {
    // SAFETY: the pointer is to a string with its final zero, which lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// The running kernel's release, as `uname -r` has it (uname(2)): where /proc has processes only, it is nowhere else.
pub fn release() -> String {
    text(&names().release)
}

/// The host's name (uname(2)).
pub fn host_name() -> String {
    text(&names().nodename)
}

fn names() -> libc::utsname {
    // SAFETY: a utsname is octets only, so that zero is one; uname fills it in, and fails for a bad address only.
    unsafe {
        let mut names: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut names);
        names
    }
}

/// Text up to its zero.
fn text(field: &[libc::c_char]) -> String {
    let octets: Vec<u8> = field
        .iter()
        .take_while(|octet| **octet != 0)
        .map(|octet| *octet as u8)
        .collect();
    String::from_utf8_lossy(&octets).into_owned()
}

/// The programs that steer new connections in this process's network namespace (bpf(2), BPF_PROG_QUERY), by their numbers.
///
/// # Errors
///
/// What bpf(2) says: it takes CAP_NET_ADMIN and CAP_BPF, and Linux 5.9.
pub fn steering_programs() -> io::Result<Vec<u32>> {
    /// `query` of `union bpf_attr` (include/uapi/linux/bpf.h), up to what is used of it.
    #[repr(C)]
    struct Query {
        target_fd: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        padding: u32,
    }
    const BPF_PROG_QUERY: libc::c_int = 16;
    const BPF_SK_LOOKUP: u32 = 36;
    let namespace = File::open("/proc/self/ns/net")?;
    // The kernel takes 64 in a namespace (kernel/bpf/net_namespace.c, netns_bpf_max_progs).
    let mut programs = vec![0_u32; 64];
    let mut query = Query {
        target_fd: namespace.as_raw_fd().cast_unsigned(),
        attach_type: BPF_SK_LOOKUP,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: programs.as_mut_ptr() as u64,
        prog_cnt: 64,
        padding: 0,
    };
    // SAFETY: the pointer is to a query of the size that is given, which names room for 64 numbers; both live through the
    // call, and so does the namespace's descriptor.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, mem::size_of::<Query>()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    programs.truncate(query.prog_cnt as usize);
    Ok(programs)
}

/// What the file system of a directory has left for who is not root, in octets (statvfs(3)).
pub fn free_octets(directory: &std::path::Path) -> io::Result<u64> {
    let path = std::ffi::CString::new(directory.as_os_str().as_encoded_bytes())?;
    // SAFETY: the path ends in zero and lives through the call; a statvfs is integers only, so that zero is one.
    let (result, found) = unsafe {
        let mut found: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut found), found)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
