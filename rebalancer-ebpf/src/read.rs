//! Reading a socket's fields at offsets that the running kernel's BTF gave.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use rebalancer_common::SocketRecord;

/// include/linux/socket.h
const AF_INET: u16 = 2;

/// Reads a field; 0 when it cannot be read, which the kernel does not let happen for a live socket.
#[inline(always)]
pub fn field<T: Default>(base: *const u8, offset: u32) -> T {
    // SAFETY: the helper checks the address and copies; no reference is made.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }.unwrap_or_default()
}

/// Reads a member at an offset that is a constant to the verifier: it checks the access, and no helper is called.
///
/// # Safety
///
/// `base` is a kernel structure that the verifier knows.
#[inline(always)]
pub unsafe fn direct<T>(base: *const u8, offset: u32) -> T {
    // SAFETY: the verifier refuses the program unless the structure has a member there; a load of freed memory is
    // turned into 0 by the kernel's exception table.
    unsafe { core::ptr::read_volatile(base.wrapping_add(offset as usize).cast::<T>()) }
}

/// One of [`crate::OFFSETS`], read by itself: a constant to the verifier, since the loader freezes them.
#[macro_export]
macro_rules! offset {
    ($field:ident) => {{
        let offsets = (&raw const $crate::OFFSETS).cast::<rebalancer_common::Offsets>();
        // SAFETY: the global is nothing but its value, and frozen before any program runs.
        unsafe { core::ptr::read_volatile(&raw const (*offsets).$field) }
    }};
}

/// Whether the socket belongs to the watched network namespace.
#[inline(always)]
pub fn in_namespace(socket: *const u8) -> bool {
    let net: u64 = field(socket, offset!(net));
    field::<u32>(net as *const u8, offset!(inum)) == offset!(netns)
}

/// Ports and addresses.
///
/// # Safety
///
/// `common` is a socket that the verifier knows.
#[inline(always)]
pub unsafe fn addresses(common: *const u8, record: &mut SocketRecord) {
    // SAFETY: see `direct`.
    unsafe {
        record.local_port = u32::from(direct::<u16>(common, offset!(num)));
        record.remote_port = u32::from(u16::from_be(direct(common, offset!(dport))));
        if direct::<u16>(common, offset!(family)) == AF_INET {
            record.local = mapped(direct::<u32>(common, offset!(rcv_saddr)).to_ne_bytes());
            record.remote = mapped(direct::<u32>(common, offset!(daddr)).to_ne_bytes());
        } else {
            // The verifier lets nobody load more than a member of a member at once.
            record.local = field(common, offset!(v6_rcv_saddr));
            record.remote = field(common, offset!(v6_daddr));
        }
    }
}

/// A v4-mapped address (RFC 4291, section 2.5.5.2).
#[inline(always)]
fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}
