//! Name constraints (RFC 5280, section 4.2.1.10), as Go 1.26's crypto/x509/constraints.go applies them.
//!
//! Input: an authority's constraints and the names of who is below it. Output: whether they permit them.
//! Must never pass a name over that a constraint of its kind speaks of.

use std::{cmp::Ordering, net::IpAddr};

use super::{
    der::{Der, tag},
    extension::Names,
};

/// Permitted and excluded subtrees.
#[derive(Clone, Debug, Default)]
pub struct Constraints {
    permitted: Subtrees,
    excluded: Subtrees,
}

#[derive(Clone, Debug, Default)]
struct Subtrees {
    dns: Vec<String>,
    networks: Vec<Network>,
    emails: Vec<String>,
    uri_domains: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct Network {
    address: IpAddr,
    mask: IpAddr,
}

/// An address of a certificate, four octets or sixteen.
pub fn address(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(octets) {
        return Some(octets.into());
    }
    <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
}

/// Reads the extension, and says whether every constraint in it is of a kind that is known.
pub fn read(mut value: Der<'_>) -> Option<(Constraints, bool)> {
    let mut both = value.read(tag::SEQUENCE)?;
    let permitted = both.optional(tag::explicit(0))?;
    let excluded = both.optional(tag::explicit(1))?;
    if !value.is_empty() || !both.is_empty() {
        return None;
    }
    let (permitted, excluded) = (permitted.unwrap_or(Der(&[])), excluded.unwrap_or(Der(&[])));
    if permitted.is_empty() && excluded.is_empty() {
        return None;
    }
    let mut whole = true;
    let constraints = Constraints {
        permitted: subtrees(permitted, &mut whole)?,
        excluded: subtrees(excluded, &mut whole)?,
    };
    Some((constraints, whole))
}

fn subtrees(mut list: Der<'_>, whole: &mut bool) -> Option<Subtrees> {
    let mut subtrees = Subtrees::default();
    while !list.is_empty() {
        let base = list.read(tag::SEQUENCE)?.any()?;
        let text = || {
            let ascii = base.content.is_ascii();
            ascii.then(|| base.content.iter().copied().map(char::from).collect::<String>())
        };
        let domain = || text().filter(|domain| is_domain(domain, true));
        const EMAIL: u8 = tag::context(1);
        const DNS: u8 = tag::context(2);
        const URI: u8 = tag::context(6);
        const ADDRESS: u8 = tag::context(7);
        match base.tag {
            DNS => subtrees.dns.push(domain()?),
            ADDRESS => {
                if !matches!(base.content.len(), 8 | 32) {
                    return None;
                }
                let (octets, mask) = base.content.split_at(base.content.len() / 2);
                subtrees.networks.push(Network {
                    address: address(octets)?,
                    mask: address(mask).filter(|_| is_mask(mask))?,
                });
            }
            EMAIL => {
                let constraint = text()?;
                let good = if constraint.contains('@') {
                    mailbox(&constraint).is_some()
                } else {
                    is_domain(&constraint, true)
                };
                subtrees.emails.push(good.then_some(constraint)?);
            }
            URI => {
                let domain = domain()?;
                subtrees
                    .uri_domains
                    .push(domain.parse::<IpAddr>().is_err().then_some(domain)?);
            }
            _ => *whole = false,
        }
    }
    Some(subtrees)
}

/// Ones, and then zeroes.
fn is_mask(mask: &[u8]) -> bool {
    let ones: u32 = mask
        .iter()
        .map(|octet| octet.leading_ones())
        .take_while(|ones| *ones == 8)
        .sum();
    let rest = &mask[ones as usize / 8..];
    rest.first()
        .is_none_or(|first| first.leading_ones() + first.trailing_zeros() >= 8)
        && rest.iter().skip(1).all(|octet| *octet == 0)
}

impl Network {
    /// Its last address.
    fn last(&self) -> IpAddr {
        match (self.address, self.mask) {
            (IpAddr::V4(address), IpAddr::V4(mask)) => IpAddr::V4((address | !mask).to_bits().into()),
            (IpAddr::V6(address), IpAddr::V6(mask)) => IpAddr::V6((address | !mask).to_bits().into()),
            (address, _) => address,
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        // An IPv4 address in IPv6's form is to Go an IPv4 address (net, `IPNet.Contains`).
        match (self.address.to_canonical(), self.mask, address.to_canonical()) {
            (IpAddr::V4(network), mask, IpAddr::V4(address)) => {
                let mask = match mask {
                    IpAddr::V4(mask) => mask.to_bits(),
                    IpAddr::V6(mask) if mask.to_bits() >> 32 == u128::MAX >> 32 => mask.to_bits() as u32,
                    IpAddr::V6(_) => return false,
                };
                network.to_bits() & mask == address.to_bits() & mask
            }
            (IpAddr::V6(network), IpAddr::V6(mask), IpAddr::V6(address)) => {
                network.to_bits() & mask.to_bits() == address.to_bits() & mask.to_bits()
            }
            _ => false,
        }
    }
}

impl Constraints {
    /// Whether everything a certificate calls itself is permitted, and nothing excluded.
    pub fn permit(&self, names: &Names) -> bool {
        self.permit_all(names).unwrap_or(false)
    }

    /// `None` when a name cannot be compared with a constraint.
    fn permit_all(&self, names: &Names) -> Option<bool> {
        let uris: Vec<String> = names
            .uri_hosts
            .iter()
            .map(|host| uri_domain(host))
            .collect::<Option<_>>()?;
        let emails: Vec<(String, String)> = names.emails.iter().map(|name| mailbox(name)).collect::<Option<_>>()?;
        let (permitted, excluded) = (&self.permitted, &self.excluded);
        for address in &names.addresses {
            let within = |networks: &[Network]| is_within(*address, networks);
            if !permitted.networks.is_empty() && !within(&permitted.networks) || within(&excluded.networks) {
                return Some(false);
            }
        }
        for (domains, permitted, excluded) in [
            (&names.dns, &permitted.dns, &excluded.dns),
            (&uris, &permitted.uri_domains, &excluded.uri_domains),
        ] {
            for domain in domains {
                if !is_domain(domain, false) {
                    return None;
                }
                if !permitted.is_empty() && !is_permitted(domain, permitted) || is_excluded(domain, excluded) {
                    return Some(false);
                }
            }
        }
        for (local, domain) in &emails {
            if !is_domain(domain, false) {
                return None;
            }
            let exact = |constraints: &[String]| {
                let mut full = constraints.iter().filter_map(|constraint| mailbox(constraint));
                full.any(|(of, at)| of == *local && at == *domain)
            };
            let hosts = |constraints: &[String]| -> Vec<String> {
                constraints
                    .iter()
                    .filter(|constraint| !constraint.contains('@'))
                    .cloned()
                    .collect()
            };
            let permits = exact(&permitted.emails) || is_permitted(domain, &hosts(&permitted.emails));
            let excludes = exact(&excluded.emails) || is_excluded(domain, &hosts(&excluded.emails));
            if !permitted.emails.is_empty() && !permits || excludes {
                return Some(false);
            }
        }
        Some(true)
    }
}

/// Sorts constraints, and leaves out those that are within the one before: what Go looks for names in.
fn sorted<T: Clone>(
    all: impl Iterator<Item = T>,
    order: impl Fn(&T, &T) -> Ordering,
    within: impl Fn(&T, &T) -> bool,
) -> Vec<T> {
    let mut all: Vec<T> = all.collect();
    all.sort_by(order);
    all.dedup_by(|after, before| within(after, before));
    all
}

/// Looks at one constraint, the nearest in the order. Where networks have host bits, or domains odd characters, another
/// one may speak of the name as well: Go does not see it, and who it lets in is let in here.
fn nearest<'a, T>(set: &'a [T], place: impl Fn(&T) -> Ordering, matches: impl Fn(&T) -> bool) -> bool {
    let at = set.partition_point(|constraint| place(constraint).is_lt());
    let found: Option<&'a T> = set.get(at);
    found.is_some_and(|constraint| place(constraint).is_eq()) || set.get(at.saturating_sub(1)).is_some_and(matches)
}

fn is_within(address: IpAddr, networks: &[Network]) -> bool {
    let of_kind = networks
        .iter()
        .filter(|network| network.address.is_ipv4() == address.is_ipv4());
    let order = |one: &Network, other: &Network| (one.address, one.mask).cmp(&(other.address, other.mask));
    let set = sorted(of_kind.copied(), order, |inner, outer| {
        outer.contains(inner.address) && outer.contains(inner.last())
    });
    nearest(
        &set,
        |network| network.address.cmp(&address),
        |network| network.contains(address),
    )
}

fn domains(constraints: &[String]) -> Vec<&String> {
    sorted(
        constraints.iter(),
        |one, other| compare(one, other),
        |inner, outer| is_below(inner, outer),
    )
}

fn is_permitted(domain: &str, constraints: &[String]) -> bool {
    constraints.iter().any(String::is_empty)
        || nearest(
            &domains(constraints),
            |constraint| compare(constraint, domain),
            |constraint| is_below(domain, constraint),
        )
}

fn is_excluded(domain: &str, constraints: &[String]) -> bool {
    // A wildcard is excluded with any one name that it stands for.
    let first_label = |name: &str| name.find('.').map(|dot| name[dot..].to_ascii_lowercase());
    let wild = domain.strip_prefix('*').and_then(|_| first_label(domain));
    is_permitted(domain, constraints)
        || wild.is_some_and(|wild| {
            domains(constraints)
                .iter()
                .any(|name| first_label(name).as_ref() == Some(&wild))
        })
}

/// From the last character to the first, without regard to case, a dot before everything else.
fn compare(one: &str, other: &str) -> Ordering {
    let key = |octet: u8| if octet == b'.' { 0 } else { octet.to_ascii_lowercase() };
    one.bytes().rev().map(key).cmp(other.bytes().rev().map(key))
}

/// Whether a name is the constraint's domain or below it; below it alone when the constraint begins with a dot.
fn is_below(name: &str, constraint: &str) -> bool {
    if constraint.is_empty() {
        return true;
    }
    let Some(at) = name.len().checked_sub(constraint.len()) else {
        return false;
    };
    let (before, end) = name.as_bytes().split_at(at);
    end.eq_ignore_ascii_case(constraint.as_bytes())
        && (constraint.starts_with('.') || before.last().is_none_or(|last| *last == b'.'))
}

/// Whether it can be compared as a domain (parser.go, `domainNameValid`).
pub fn is_domain(name: &str, constraint: bool) -> bool {
    if name.is_empty() {
        return true;
    }
    let name = if constraint {
        name.strip_prefix('.').unwrap_or(name)
    } else {
        name
    };
    let printable = name.bytes().all(|octet| (33..=126).contains(&octet));
    let mut labels = name.split('.');
    printable && !name.ends_with('.') && !name.is_empty() && labels.all(|label| !label.is_empty())
}

/// The domain of a URI's host, in lower case; `None` for those that constraints cannot speak of.
fn uri_domain(host: &str) -> Option<String> {
    let lower = host.to_ascii_lowercase();
    let domain = if lower.contains(':') && !lower.ends_with(']') {
        let (name, _) = lower.rsplit_once(':')?;
        let name = match name.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']')?,
            None if name.contains(':') => return None,
            None => name,
        };
        if name.contains(['[', ']']) {
            return None;
        }
        name.to_owned()
    } else {
        lower
    };
    let address = domain.parse::<IpAddr>().is_ok() || domain.starts_with('[') && domain.ends_with(']');
    (!host.is_empty() && !address).then_some(domain)
}

/// An address's local part, and its domain in lower case (RFC 2821, section 4.1.2, as verify.go has it).
fn mailbox(address: &str) -> Option<(String, String)> {
    let mut rest = address.as_bytes();
    let mut local = Vec::new();
    let next = |rest: &mut &[u8]| {
        let (&first, after) = rest.split_first()?;
        *rest = after;
        Some(first)
    };
    if let Some(quoted) = rest.strip_prefix(b"\"") {
        rest = quoted;
        loop {
            match next(&mut rest)? {
                b'"' => break,
                b'\\' => local.push(next(&mut rest).filter(|octet| matches!(octet, 1..=9 | 11 | 12 | 14..=127))?),
                octet @ (1..=8 | 11 | 12 | 14..=33 | 35..=91 | 93..=127) => local.push(octet),
                _ => return None,
            }
        }
    } else {
        while let Some(&first) = rest.first() {
            match first {
                b'\\' => {
                    next(&mut rest)?;
                    local.push(next(&mut rest)?);
                }
                _ if first.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.".contains(&first) => {
                    local.push(first);
                    next(&mut rest)?;
                }
                _ => break,
            }
        }
        let dots = local.starts_with(b".") || local.ends_with(b".") || local.windows(2).any(|pair| pair == b"..");
        if local.is_empty() || dots {
            return None;
        }
    }
    let domain = rest.strip_prefix(b"@")?;
    let labels_are_good = domain
        .split(|octet| *octet == b'.')
        .all(|label| !label.is_empty() && label.iter().all(|octet| (33..=126).contains(octet)));
    if !domain.is_empty() && !labels_are_good {
        return None;
    }
    let local = String::from_utf8(local).ok()?;
    Some((local, String::from_utf8(domain.to_vec()).ok()?.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_below_itself_and_not_beside() {
        assert!(is_below("a.example.com", "Example.com"));
        assert!(is_below("example.com", "example.com"));
        assert!(!is_below("anexample.com", "example.com"));
        assert!(!is_below("example.com", ".example.com"));
        assert!(is_below("a.example.com", ".example.com"));
        assert!(is_excluded("*.example.com", &["www.example.com".to_owned()]));
        assert!(!is_permitted("*.example.com", &["www.example.com".to_owned()]));
        assert!(!is_excluded("*.example.com", &["a.b.example.com".to_owned()]));
    }

    #[test]
    fn domains_and_masks() {
        for good in ["", "a", "a.b", "*.b", "a_b.c-d", "a/b"] {
            assert!(is_domain(good, false), "{good}");
        }
        for wrong in [".", "a.", ".a", "a..b", "a b", "\u{7f}a"] {
            assert!(!is_domain(wrong, false), "{wrong}");
        }
        assert!(is_domain(".a", true));
        assert!(is_mask(&[255, 255, 0, 0]) && is_mask(&[255, 254, 0, 0]) && is_mask(&[0; 4]) && is_mask(&[255; 16]));
        assert!(!is_mask(&[255, 0, 255, 0]) && !is_mask(&[255, 1, 0, 0]));
    }

    #[test]
    fn mailboxes_are_split_as_go_splits_them() {
        let split = |text: &str| mailbox(text).map(|(local, domain)| format!("{local}|{domain}"));
        assert_eq!(split("a.b@Example.com").as_deref(), Some("a.b|example.com"));
        assert_eq!(split("\"a b\"@c").as_deref(), Some("a b|c"));
        assert_eq!(split("a\\@b@c").as_deref(), Some("a@b|c"));
        for wrong in [
            "", "@c", ".a@c", "a.@c", "a..b@c", "a@c.", "a@.c", "a", "a b@c", "\"a@c",
        ] {
            assert_eq!(split(wrong), None, "{wrong}");
        }
        assert_eq!(uri_domain("a.B:80").as_deref(), Some("a.b"));
        for wrong in ["", "1.2.3.4", "[::1]", "[::1]:80", "a:b:80"] {
            assert_eq!(uri_domain(wrong), None, "{wrong}");
        }
    }
}
