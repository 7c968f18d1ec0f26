//! The kernel programs: which connections on the watched port open, what their ClientHello offers, when they close.
//!
//! Output: events, each in the place of its turn, a ring buffer of hellos, and a list. Must never drop, change or delay a packet, and never count a loss as nothing.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod hello;
mod list;
mod read;
mod state;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, PerCpuArray, RingBuf},
};
use rebalancer_common::{EVENTS as ROOM, Early, Event, HelloRecord, LOST_COUNTERS, Offsets};

/// Set by the loader, and frozen: the verifier sees constants.
#[unsafe(no_mangle)]
static OFFSETS: Global<Offsets> = Global::new(Offsets {
    family: 0,
    state: 0,
    num: 0,
    dport: 0,
    daddr: 0,
    rcv_saddr: 0,
    v6_daddr: 0,
    v6_rcv_saddr: 0,
    net: 0,
    inum: 0,
    sport: 0,
    bytes_received: 0,
    bytes_acked: 0,
    is_mptcp: 0,
    ulp_data: 0,
    mp_join_bit: 0,
    token: 0,
    rcv_isn: 0,
    rcv_nxt: 0,
    port: 0,
    netns: 0,
});

/// Opens and closes, which the agent reads out of this very memory.
#[map]
static EVENTS: Array<Event> = Array::with_max_entries(ROOM, BPF_F_MMAPABLE);

/// How many events there were, likewise.
#[map]
static TURNS: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// A word for each socket that begins or ceases to listen.
#[map]
static LISTENERS: RingBuf = RingBuf::with_byte_size(1 << 12, 0);

/// Early payloads: [`rebalancer_common::HelloRecord`], each as long as what came. Room for 2,000 hellos of two packets.
#[map]
static HELLOS: RingBuf = RingBuf::with_byte_size(1 << 22, 0);

/// What found no room, by the `LOST_` constants.
#[map]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOST_COUNTERS, 0);

/// Where a record is put together.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// A record, and room behind it: the verifier sees that the first octets of a TLS record are read within it, wherever it
/// begins.
#[repr(C)]
pub struct Scratch {
    record: HelloRecord,
    behind: [u8; 16],
}

/// One entry a watched connection, gone with its socket.
#[btf_map]
static EARLY: SkStorage<Early> = SkStorage::new();

/// How to submit to a ring: the agent looks every tenth of a second, and is woken only when more than `octets` wait.
/// Waking it costs more than all the rest, an interrupt to itself from wherever the event happened: it is woken when what
/// waits passes `octets`, a power of two, or a multiple of it, and not again for each event until it comes.
/// The records of `window` octets may each find that they passed it, since other processors reserve meanwhile.
#[inline(always)]
fn wake_beyond(ring: &RingBuf, octets: u64, window: u64) -> u64 {
    let waiting = ring.query(u64::from(BPF_RB_AVAIL_DATA));
    if waiting >= octets && waiting & (octets - 1) < window {
        u64::from(BPF_RB_FORCE_WAKEUP)
    } else {
        u64::from(BPF_RB_NO_WAKEUP)
    }
}

fn lost(what: u32) {
    if let Some(count) = LOST.get_ptr_mut(what) {
        // SAFETY: the verifier checked the pointer for null; the slot is this CPU's, and programs are not migrated.
        unsafe { *count += 1 };
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers that only GPL-compatible programs may call are used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
