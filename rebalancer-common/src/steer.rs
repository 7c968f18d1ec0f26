//! The ABI of the program that answers an apiserver's own goaway decision.

/// Index into the map `ANSWERED`: how often the function was entered.
pub const ANSWER_HITS: u32 = 0;
/// Index into the map `ANSWERED`: answered yes.
pub const ANSWER_YES: u32 = 1;
/// Index into the map `ANSWERED`: answered no.
pub const ANSWER_NO: u32 = 2;
/// Index into the map `ANSWERED`: the return address could not be read, so the function itself ran.
pub const ANSWER_LEFT: u32 = 3;
/// Index into the map `ANSWERED`: the request could not be read; answered no.
pub const ANSWER_UNREADABLE: u32 = 4;
/// Index into the map `ANSWERED`: its client's address is empty, or longer than any; answered no.
pub const ANSWER_NO_ADDRESS: u32 = 5;
/// Index into the map `ANSWERED`: the victim's plan had expired; answered no.
pub const ANSWER_EXPIRED: u32 = 6;
/// Index into the map `ANSWERED`: the request is not one over HTTP/2, for which the apiserver does not ask; answered no.
pub const ANSWER_NOT_H2: u32 = 7;
/// Index into the map `ANSWERED`: another program at the same place had moved the instruction pointer before this one
/// ran, so nothing was touched.
pub const ANSWER_TAKEN: u32 = 8;
/// Index into the map `ANSWERED`: another tool's probe on the function's return would write to the stack behind this one,
/// so the function itself ran.
pub const ANSWER_RETURN_PROBE: u32 = 9;
/// Index into the map `ANSWERED`: there was no room to count the connection's requests.
pub const ANSWER_UNCOUNTED: u32 = 10;
/// Index into the map `ANSWERED`: the agent only says what it would do, so the function itself ran.
pub const ANSWER_REHEARSED: u32 = 11;
/// How many counters the map `ANSWERED` has.
pub const ANSWERS: u32 = 12;

/// The counters' names, as metrics have them.
pub const ANSWER_NAMES: [&str; ANSWERS as usize] = [
    "hits",
    "yes",
    "no",
    "left",
    "unreadable",
    "no_address",
    "expired",
    "not_h2",
    "taken",
    "return_probe",
    "uncounted",
    "rehearsed",
];

/// How many victims there may be at once.
pub const VICTIMS: u32 = 65_536;
/// How many connections' requests are counted at once. Memory is taken for those that are there.
pub const COUNTED: u32 = 262_144;

/// How long a connection that was told is told again, in nanoseconds from its plan's expiry: an answer that is cancelled
/// carries no GOAWAY. Nobody else who gets the address is told after that, whatever became of the agent.
pub const AGAIN_NS: u64 = 30_000_000_000;

/// Room for a client's address as text: `[`, 39 octets of IPv6, `%` and 15 of a zone, `]`, `:` and a port make 63.
pub const TEXT_OCTETS: usize = 64;

/// A client's address and port as text, as Go writes them in `RemoteAddr`; what is left over is zero.
///
/// The kernel program compares and does not read: reading 63 octets with all their forms is a million steps to the
/// verifier, and Go writes each address in one form only.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientKey {
    /// The octets.
    pub text: [u8; TEXT_OCTETS],
}

impl ClientKey {
    /// A key of that text; `None` when it is too long to be an address.
    pub fn new(text: &[u8]) -> Option<Self> {
        let mut key = Self { text: [0; TEXT_OCTETS] };
        // One octet stays zero: the kernel program reads 63 at most.
        key.text[..TEXT_OCTETS - 1].get_mut(..text.len())?.copy_from_slice(text);
        Some(key)
    }
}

/// A connection that is to hear GOAWAY at its next request.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Of the plan.
    pub generation: u64,
    /// CLOCK_MONOTONIC, nanoseconds: not to be told for the first time later than this.
    pub expires_ns: u64,
    /// How often it was answered yes.
    pub told: u64,
}

/// What the program knows of the process and of the running kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Where the function begins in the process's memory: the program answers there and nowhere else.
    pub address: u64,
    /// Where `Proto` lies in `net/http.Request`.
    pub proto: u32,
    /// Where `RemoteAddr` lies in it.
    pub remote_address: u32,
    /// 1 when requests are counted and nothing is answered, whoever asks: the function itself runs.
    pub rehearses: u32,
    /// Zero.
    pub padding: u32,
    /// Where the kernel keeps who else has a probe at the place.
    pub consumers: Consumers,
}

/// Where members of the kernel's structures for uprobes lie (kernel/events/uprobes.c), in octets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consumers {
    /// 1 when these are known and may be read; else the rest is zero.
    pub known: u32,
    /// `task_struct.utask`
    pub task_utask: u32,
    /// `uprobe_task.auprobe`, which points to the probe's `arch` while its handlers run.
    pub utask_auprobe: u32,
    /// `uprobe.arch`
    pub uprobe_arch: u32,
    /// `uprobe.consumers`, a list.
    pub uprobe_consumers: u32,
    /// `uprobe_consumer.cons_node`, what links it into the list.
    pub consumer_node: u32,
    /// `uprobe_consumer.ret_handler`; not null for who wants to hear of returns.
    pub consumer_ret_handler: u32,
    /// Nothing.
    pub padding: u32,
}

const _: () = {
    assert!(size_of::<ClientKey>() == TEXT_OCTETS);
    assert!(size_of::<Victim>() == 24);
    assert!(size_of::<Place>() == 56);
};
