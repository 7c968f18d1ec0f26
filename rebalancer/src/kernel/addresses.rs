//! The addresses of this network namespace: whoever comes from one of them is on this node.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ptr,
};

/// All addresses of all interfaces, in order.
///
/// # Errors
///
/// What getifaddrs(3) says.
pub fn own() -> io::Result<Vec<IpAddr>> {
    let mut list: *mut libc::ifaddrs = ptr::null_mut();
    // SAFETY: the pointer is to a pointer that lives through the call.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: the list is getifaddrs' own and is freed once, after the last look; its addresses are null or of the kind
    // that their family says.
    unsafe {
        while let Some(entry) = next.as_ref() {
            next = entry.ifa_next;
            let Some(address) = entry.ifa_addr.as_ref() else {
                continue;
            };
            match i32::from(address.sa_family) {
                libc::AF_INET => {
                    let address = entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned();
                    found.push(IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr))));
                }
                libc::AF_INET6 => {
                    let address = entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned();
                    found.push(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)).to_canonical());
                }
                _ => {}
            }
        }
        libc::freeifaddrs(list);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    #[test]
    fn loopback_is_one_of_them() {
        let own = super::own().expect("addresses");
        assert!(own.contains(&[127, 0, 0, 1].into()), "{own:?}");
    }
}
