//! Paging a process out, for which the VM has a disk.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
};

/// The VM's disk.
const DISK: &str = "/dev/nvme0n1";

/// include/uapi/asm-generic/mman-common.h
const MADV_PAGEOUT: libc::c_int = 21;

/// Makes the disk a swap area and uses it; why not, where it cannot be.
pub fn swap_on() -> Result<(), String> {
    if fs::read_to_string("/proc/swaps").unwrap_or_default().contains(DISK) {
        return Ok(());
    }
    let failed = |error: io::Error| format!("{DISK}: {error}");
    let disk = File::options().write(true).open(DISK).map_err(failed)?;
    // include/linux/swap.h, union swap_header: version, last page, no bad pages; the signature ends the page.
    let mut page = vec![0_u8; 4096];
    page[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
    page[1028..1032].copy_from_slice(&((1_u32 << 30) / 4096 - 1).to_le_bytes());
    page[4086..].copy_from_slice(b"SWAPSPACE2");
    disk.write_all_at(&page, 0).map_err(failed)?;
    (&disk).flush().map_err(failed)?;
    drop(disk);
    let path = CString::new(DISK).expect("a path without zeros");
    // SAFETY: the path lives through the call and ends in zero.
    if unsafe { libc::swapon(path.as_ptr(), 0) } == 0 {
        Ok(())
    } else {
        Err(failed(io::Error::last_os_error()))
    }
}

/// Has the kernel page out all private memory of a process, and answers with how many KiB are swapped out then.
pub fn page_out(pid: u32) -> u64 {
    // SAFETY: pidfd_open takes two integers.
    let handle = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(handle >= 0, "pidfd_open: {}", io::Error::last_os_error());
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process runs");
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (range, _) = line.split_once(' ').expect("a range");
        let (begin, end) = range.split_once('-').expect("two addresses");
        let address = |text| usize::from_str_radix(text, 16).expect("hexadecimal");
        let (begin, end) = (address(begin), address(end));
        let area = libc::iovec {
            iov_base: begin as *mut libc::c_void,
            iov_len: end - begin,
        };
        // SAFETY: the kernel reads one iovec that lives through the call; the advice changes no memory's content. Areas
        // it refuses stay where they are.
        unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                handle,
                &raw const area,
                1_usize,
                MADV_PAGEOUT,
                0,
            );
        }
    }
    // SAFETY: the descriptor is this function's own.
    unsafe {
        libc::close(handle as libc::c_int);
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let swapped = status.lines().find_map(|line| line.strip_prefix("VmSwap:"));
    let number = swapped.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok());
    number.expect("VmSwap in KiB")
}
