//! The host of a URI in a certificate, as Go's `url.Parse` finds it.
//!
//! Input: ASCII. Output: host and port as one text, empty where there is none. Must never take what Go refuses.

use std::net::Ipv6Addr;

use super::constraints::is_domain;

/// The host, or `None` when the certificate is malformed for it.
pub fn host(uri: &str) -> Option<String> {
    let (uri, fragment) = uri.split_once('#').unwrap_or((uri, ""));
    let host = authority(uri)?;
    unescaped(fragment, Within::Path)?;
    is_domain(&host, false).then_some(host)
}

fn authority(uri: &str) -> Option<String> {
    if uri.bytes().any(|octet| octet < b' ' || octet == 0x7f) {
        return None;
    }
    if uri == "*" {
        return Some(String::new());
    }
    let (scheme, rest) = scheme(uri)?;
    let rest = rest.split_once('?').map_or(rest, |(path, _)| path);
    if !rest.starts_with('/') {
        let first = rest.split('/').next().unwrap_or_default();
        // Opaque, or relative: and then it must not look like a scheme.
        if !scheme.is_empty() || !first.contains(':') {
            if scheme.is_empty() {
                unescaped(rest, Within::Path)?;
            }
            return Some(String::new());
        }
        return None;
    }
    let there = rest
        .strip_prefix("//")
        .filter(|_| !scheme.is_empty() || !rest.starts_with("///"));
    let Some(there) = there else {
        unescaped(rest, Within::Path)?;
        return Some(String::new());
    };
    let (authority, path) = there.find('/').map_or((there, ""), |slash| there.split_at(slash));
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    let host = with_port(&scheme, host)?;
    if let Some(user) = user {
        let allowed = |octet: u8| octet.is_ascii_alphanumeric() || b"-._:~!$&'()*+,;=%@".contains(&octet);
        if !user.bytes().all(allowed) {
            return None;
        }
        let (name, password) = user.split_once(':').unwrap_or((user, ""));
        unescaped(name, Within::Path)?;
        unescaped(password, Within::Path)?;
    }
    unescaped(path, Within::Path)?;
    Some(host)
}

/// The scheme in lower case, empty without one, and the rest.
fn scheme(uri: &str) -> Option<(String, &str)> {
    for (at, octet) in uri.bytes().enumerate() {
        match octet {
            b'a'..=b'z' | b'A'..=b'Z' => {}
            b'0'..=b'9' | b'+' | b'-' | b'.' if at > 0 => {}
            b':' if at == 0 => return None,
            b':' => return Some((uri[..at].to_ascii_lowercase(), &uri[at + 1..])),
            _ => break,
        }
    }
    Some((String::new(), uri))
}

fn with_port(scheme: &str, host: &str) -> Option<String> {
    let is_port = |port: &str| {
        port.is_empty()
            || port
                .strip_prefix(':')
                .is_some_and(|digits| digits.bytes().all(|octet| octet.is_ascii_digit()))
    };
    match host.rfind('[') {
        Some(0) => {
            let close = host.rfind(']')?;
            let port = &host[close + 1..];
            let inner = &host[1..close];
            let (address, zone) = inner.find("%25").map_or((inner, ""), |at| inner.split_at(at));
            if !is_port(port) {
                return None;
            }
            let (address, zone) = (unescaped(address, Within::Host)?, unescaped(zone, Within::Zone)?);
            address.parse::<Ipv6Addr>().ok()?;
            if zone == "%" {
                return None;
            }
            Some(format!("[{address}{zone}]{port}"))
        }
        Some(_) => None,
        None => {
            // Several colons are let pass but in HTTP's.
            let strict = matches!(scheme, "http" | "https");
            let colon = if strict { host.find(':') } else { host.rfind(':') };
            if colon.is_some_and(|at| !is_port(&host[at..])) {
                return None;
            }
            unescaped(host, Within::Host)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Within {
    Host,
    Zone,
    Path,
}

/// Undoes percent-encoding; hosts allow fewer characters, written or encoded.
fn unescaped(text: &str, within: Within) -> Option<String> {
    let plain = |octet: u8| octet.is_ascii_alphanumeric() || b"!$&'()*+,;=:[]<>\"-_.~".contains(&octet);
    let mut out = Vec::new();
    let mut octets = text.bytes();
    while let Some(octet) = octets.next() {
        if octet != b'%' {
            if within != Within::Path && octet < 0x80 && !plain(octet) {
                return None;
            }
            out.push(octet);
            continue;
        }
        let mut digit = || octets.next().and_then(|digit| char::from(digit).to_digit(16));
        let value = (digit()? * 16 + digit()?) as u8;
        let good = match within {
            Within::Path => true,
            Within::Host => value >= 0x80 || value == b'%',
            Within::Zone => value == b'%' || value == b' ' || plain(value),
        };
        out.push(good.then_some(value)?);
    }
    // What is not text fails as a domain, and says nothing elsewhere.
    Some(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::host;

    #[test]
    fn hosts_are_found_where_go_finds_them() {
        for (uri, expected) in [
            ("spiffe://cluster.local/ns/a/sa/b", "cluster.local"),
            ("https://user:pw@Example.com:8443/a?b#c", "Example.com:8443"),
            ("urn:uuid:1234", ""),
            ("/a/b", ""),
            ("//host/a", "host"),
            ("///a", ""),
            ("a/b", ""),
            ("*", ""),
            ("https://[::1]:80/", "[::1]:80"),
            ("x://a:b:80/", "a:b:80"),
        ] {
            assert_eq!(host(uri).as_deref(), Some(expected), "{uri}");
        }
        for wrong in [
            "https://a b/",
            "https://a:b/",
            "https://a:b:80/",
            "https://[::1/",
            "https://a[::1]/",
            "https://[1.2.3.4]/",
            ":a",
            "1a:b",
            "https://a/%zz",
            "https://a%41/",
            "https://a%zz/",
            "https://a./",
            "https://u ser@a/",
            "a\nb",
            "https://a/#%z",
        ] {
            assert_eq!(host(wrong), None, "{wrong}");
        }
    }
}
