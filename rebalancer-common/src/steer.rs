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
/// How many counters the map `ANSWERED` has.
pub const ANSWERS: u32 = 8;

/// How many victims there may be at once.
pub const VICTIMS: u32 = 65_536;
/// How many connections' requests are counted; beyond that the longest silent ones are forgotten.
pub const COUNTED: u32 = 32_768;

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

/// Where members of `net/http.Request` lie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestOffsets {
    /// `Proto`
    pub proto: u32,
    /// `RemoteAddr`
    pub remote_address: u32,
}

const _: () = {
    assert!(size_of::<ClientKey>() == TEXT_OCTETS);
    assert!(size_of::<Victim>() == 24);
    assert!(size_of::<RequestOffsets>() == 8);
};
