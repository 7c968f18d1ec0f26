//! Where the running kernel has what the programs read, and what they watch.
//!
//! Input: the kernel's type information. Must never guess an offset.

use std::{fs, os::unix::fs::MetadataExt as _};

use rebalancer_common::Offsets;
use rebalancer_core::binary::btf;

use super::{Options, ebpf_error::EbpfError};

/// Where the kernel's members are, and what is watched.
pub fn offsets(blob: &[u8], options: &Options) -> Result<Offsets, EbpfError> {
    let btf = btf::Btf::parse(blob)?;
    let common = |member| btf.offset("sock_common", member);
    let tcp = |member| btf.offset("tcp_sock", member);
    let netns = fs::metadata("/proc/self/ns/net").map_err(|source| EbpfError::Io {
        what: "/proc/self/ns/net",
        source,
    })?;
    // A kernel built without MPTCP has no such member.
    let is_mptcp = tcp("is_mptcp").unwrap_or(0);
    let mp_join_bit = btf.bits("mptcp_subflow_context", "mp_join");
    let token = btf.offset("mptcp_subflow_context", "token");
    Ok(Offsets {
        family: common("skc_family")?,
        state: common("skc_state")?,
        num: common("skc_num")?,
        dport: common("skc_dport")?,
        daddr: common("skc_daddr")?,
        rcv_saddr: common("skc_rcv_saddr")?,
        v6_daddr: common("skc_v6_daddr")?,
        v6_rcv_saddr: common("skc_v6_rcv_saddr")?,
        net: common("skc_net")?,
        inum: btf.offset("net", "ns")? + btf.offset("ns_common", "inum")?,
        sport: btf.offset("inet_sock", "inet_sport")?,
        bytes_received: tcp("bytes_received")?,
        bytes_acked: tcp("bytes_acked")?,
        is_mptcp: if mp_join_bit.is_ok() && token.is_ok() {
            is_mptcp
        } else {
            0
        },
        ulp_data: btf.offset("inet_connection_sock", "icsk_ulp_data")?,
        mp_join_bit: mp_join_bit.unwrap_or(0),
        token: token.unwrap_or(0),
        rcv_isn: btf.offset("tcp_request_sock", "rcv_isn")?,
        rcv_nxt: tcp("rcv_nxt")?,
        port: u32::from(options.port),
        netns: u32::try_from(netns.ino()).unwrap_or(0),
    })
}
