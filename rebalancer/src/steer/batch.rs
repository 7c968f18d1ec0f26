//! A whole map in a few system calls, however many entries it has (BPF_MAP_LOOKUP_BATCH, since Linux 5.6).

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use rebalancer_common::steer::{ClientKey, TEXT_OCTETS};

/// include/uapi/linux/bpf.h, `enum bpf_cmd`
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// How many entries one call is to read.
const ENTRIES: usize = 4096;

/// include/uapi/linux/bpf.h, `union bpf_attr`, the member `batch`.
#[repr(C)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

/// Every entry of a hash map of clients and counters. Entries that come or go meanwhile may be missed.
///
/// # Errors
///
/// What bpf(2) says.
pub fn entries(map: BorrowedFd<'_>) -> io::Result<Vec<(ClientKey, u64)>> {
    let mut found = Vec::new();
    let mut room = ENTRIES;
    let mut cursor = 0_u32;
    let mut begun = false;
    loop {
        let mut keys = vec![ClientKey { text: [0; TEXT_OCTETS] }; room];
        let mut values = vec![0_u64; room];
        let mut next = 0_u32;
        let mut attributes = Attributes {
            in_batch: if begun { (&raw const cursor) as u64 } else { 0 },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(room).map_err(io::Error::other)?,
            map: u32::try_from(map.as_raw_fd()).map_err(io::Error::other)?,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the attributes and what they point to live through the call; keys and values have room for `count`
        // entries of this map's sizes, and a hash map's cursor is 32 bits.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                &raw mut attributes,
                size_of::<Attributes>(),
            )
        };
        let error = (result != 0).then(io::Error::last_os_error);
        match error.as_ref().and_then(io::Error::raw_os_error) {
            // The last ones.
            None | Some(libc::ENOENT) => {
                let read = attributes.count as usize;
                found.extend(keys.into_iter().zip(values).take(read));
                if error.is_some() {
                    return Ok(found);
                }
                (cursor, begun) = (next, true);
            }
            // Entries of one bucket are read together or not at all.
            Some(libc::ENOSPC) => room *= 2,
            Some(_) => return Err(error.unwrap_or_else(io::Error::last_os_error)),
        }
    }
}
