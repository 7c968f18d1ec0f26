//! The program that steers new connections for the apiserver's port to the relay's listening socket (sk_lookup).
//!
//! It is an object of its own: it is loaded only when asked for.
//! Must never refuse a connection: whatever happens here, the answer is "go on", and without a relay that means the
//! apiserver.
#![no_std]
#![no_main]

use aya_ebpf::{
    Global,
    macros::{map, sk_lookup},
    maps::SockMap,
    programs::SkLookupContext,
};
use rebalancer_common::intercept::Steered;

/// Set by the loader, and frozen.
#[unsafe(no_mangle)]
static CONFIG: Global<Steered> = Global::new(Steered { port: 0, loopback: 0 });

/// The relay's listening socket. It leaves the map by itself when it is closed, however that comes about.
#[map]
static RELAY: SockMap = SockMap::with_max_entries(1, 0);

/// IPPROTO_TCP (include/uapi/linux/in.h).
const TCP: u32 = 6;
/// AF_INET (include/linux/socket.h).
const IPV4: u32 = 2;
/// SK_PASS (include/uapi/linux/bpf.h): with a socket assigned, take it; without, look on as ever.
const PASS: u32 = 1;

/// Runs for each packet that may open a connection in the network namespace.
#[sk_lookup]
pub fn intercept(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    let config = CONFIG.load();
    // SAFETY: the kernel gives a valid context, and each field is read at its own width.
    let (protocol, port, interface) = unsafe { ((*lookup).protocol, (*lookup).local_port, (*lookup).ingress_ifindex) };
    if protocol != TCP || port != config.port || interface == config.loopback {
        return PASS;
    }
    // A node that reaches its own address comes from it: the relay itself may be one of them.
    // SAFETY: as above.
    let own = unsafe {
        if (*lookup).family == IPV4 {
            (*lookup).remote_ip4 == (*lookup).local_ip4
        } else {
            (*lookup).remote_ip6[0] == (*lookup).local_ip6[0]
                && (*lookup).remote_ip6[1] == (*lookup).local_ip6[1]
                && (*lookup).remote_ip6[2] == (*lookup).local_ip6[2]
                && (*lookup).remote_ip6[3] == (*lookup).local_ip6[3]
        }
    };
    if own {
        return PASS;
    }
    // Without a socket in the map nothing is assigned, and the apiserver's own is found.
    let _ = RELAY.redirect_sk_lookup(&ctx, 0, 0);
    PASS
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers that only GPL-compatible programs may call are used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
