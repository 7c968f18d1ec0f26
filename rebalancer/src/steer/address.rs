//! A client's address as Go's server writes it in a request (net/ip.go, `IP.String`, and `TCPAddr.String`).
//!
//! Must never give an address that two clients may have the same form of: the zone tells link-local ones apart.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use rebalancer_common::steer::ClientKey;

/// Every form the address may have: one, but for a link-local address, which has a zone that only the server knows.
pub fn forms(client: SocketAddr, zones: &[String]) -> Vec<ClientKey> {
    let port = client.port();
    let texts = match client.ip().to_canonical() {
        IpAddr::V4(v4) => vec![format!("{v4}:{port}")],
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            zones.iter().map(|zone| format!("[{v6}%{zone}]:{port}")).collect()
        }
        IpAddr::V6(v6) => vec![format!("[{v6}]:{port}")],
    };
    texts
        .iter()
        .filter_map(|text| ClientKey::new(text.as_bytes()))
        .collect()
}

/// The client whose address a key is, without its zone; `None` when it is not Go's form of one.
pub fn client(key: &ClientKey) -> Option<SocketAddr> {
    let length = key.text.iter().position(|octet| *octet == 0)?;
    let text = str::from_utf8(&key.text[..length]).ok()?;
    match text.split_once('%') {
        None => text.parse().ok(),
        Some((ip, rest)) => {
            let (_, port) = rest.split_once(']')?;
            format!("{ip}]{port}").parse().ok()
        }
    }
}

/// The names of this network namespace's interfaces; none where they cannot be read, and then no link-local client is
/// ever told.
pub fn zones() -> Vec<String> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_gos_form() {
        let zones = ["lo".to_owned(), "eth0".to_owned()];
        for (client, expected) in [
            ("192.0.2.7:45678", &["192.0.2.7:45678"][..]),
            ("[::ffff:192.0.2.7]:45678", &["192.0.2.7:45678"]),
            ("[::1]:6443", &["[::1]:6443"]),
            ("[2001:db8:0:0:1:0:0:1]:1", &["[2001:db8::1:0:0:1]:1"]),
            ("[2001:DB8:0:1:1:1:1:1]:1", &["[2001:db8:0:1:1:1:1:1]:1"]),
            ("[::102:304]:1", &["[::102:304]:1"]),
            ("[fe80::1]:443", &["[fe80::1%lo]:443", "[fe80::1%eth0]:443"]),
        ] {
            let expected: Vec<_> = expected
                .iter()
                .filter_map(|text| ClientKey::new(text.as_bytes()))
                .collect();
            let client: SocketAddr = client.parse().expect("an address");
            assert_eq!(forms(client, &zones), expected, "{client}");
            let canonical = SocketAddr::new(client.ip().to_canonical(), client.port());
            for key in expected {
                assert_eq!(super::client(&key), Some(canonical));
            }
        }
    }

    #[test]
    fn what_is_no_address_is_nobodys() {
        for text in ["", "@", "192.0.2.7", "[fe80::1%eth0:443", "192.0.2.7:65536"] {
            assert_eq!(
                super::client(&ClientKey::new(text.as_bytes()).expect("room")),
                None,
                "{text}"
            );
        }
    }

    #[test]
    fn the_longest_form_fits_and_leaves_a_zero() {
        let longest = "[fe80:1111:1111:1111:1111:1111:1111:1111%abcdefghijklmno]:65535";
        let key = ClientKey::new(longest.as_bytes()).expect("room");
        assert_eq!((key.text[62], key.text[63]), (b'5', 0));
        assert!(ClientKey::new(&[b'a'; 64]).is_none());
    }

    #[test]
    fn there_is_a_loopback_interface() {
        assert!(zones().contains(&"lo".to_owned()));
    }
}
