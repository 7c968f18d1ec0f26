//! The extensions that Go understands, and which of the others are critical.
//!
//! Input: the list. Output: what path checks need. Must never let an extension that Go finds malformed pass, also where
//! nothing is asked of its content here.

use std::net::IpAddr;

use super::{
    certificate::Malformed,
    constraints::{self, Constraints},
    der::{Der, tag},
    uri,
};

/// What they say.
#[derive(Clone, Debug, Default)]
pub struct Extensions {
    /// A critical one that is not understood.
    pub unhandled: bool,
    /// Bits of the key usage, the lowest first; zero without the extension.
    pub key_usage: u16,
    pub basic: Option<Basic>,
    /// The alternative names' value as it came.
    pub names_raw: Option<Vec<u8>>,
    pub names: Names,
    pub constraints: Option<Constraints>,
    pub authority_key_id: Vec<u8>,
    pub subject_key_id: Vec<u8>,
    pub usages: Usages,
    pub policies: Vec<Vec<u8>>,
    /// The issuer's policy, the subject's.
    pub mappings: Vec<(Vec<u8>, Vec<u8>)>,
    pub require_explicit_policy: Option<i64>,
    pub inhibit_policy_mapping: Option<i64>,
    pub inhibit_any_policy: Option<i64>,
}

/// Basic constraints.
#[derive(Clone, Copy, Debug)]
pub struct Basic {
    pub is_ca: bool,
    pub max_path: Option<u64>,
}

/// Alternative names.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pub dns: Vec<String>,
    pub emails: Vec<String>,
    pub addresses: Vec<IpAddr>,
    /// The hosts of its URIs, with their ports.
    pub uri_hosts: Vec<String>,
}

/// Extended key usage.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usages {
    /// At least one is named.
    pub named: bool,
    pub any: bool,
    pub client: bool,
    pub server: bool,
}

/// Bit 5, keyCertSign (RFC 5280, section 4.2.1.3).
pub const KEY_CERT_SIGN: u16 = 1 << 5;

const ACCESS_INFORMATION: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 1, 1];
const ANY_USAGE: &[u8] = &[0x55, 0x1d, 37, 0];
const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];

/// A value that is read, or is not understood.
enum Read {
    Handled,
    Unhandled,
}

impl Extensions {
    pub fn read(mut list: Der<'_>) -> Result<Self, Malformed> {
        const ONE: Malformed = Malformed("extensions");
        let mut all = Self::default();
        let mut seen: Vec<&[u8]> = Vec::new();
        let mut found = Vec::new();
        while !list.is_empty() {
            let mut extension = list.read(tag::SEQUENCE).ok_or(ONE)?;
            let oid = extension.identifier().ok_or(ONE)?;
            let critical = if extension.is_next(tag::BOOLEAN) {
                extension.boolean().ok_or(ONE)?
            } else {
                false
            };
            let value = extension.read(tag::OCTET_STRING).ok_or(ONE)?;
            seen.push(oid);
            found.push((oid, critical, value));
        }
        seen.sort_unstable();
        if seen.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Malformed("extensions: one comes twice"));
        }
        for (oid, critical, value) in found {
            if let Read::Unhandled = all.one(oid, critical, value)? {
                all.unhandled |= critical;
            }
        }
        Ok(all)
    }

    fn one(&mut self, oid: &[u8], critical: bool, value: Der<'_>) -> Result<Read, Malformed> {
        let never_critical = |what| if critical { Err(Malformed(what)) } else { Ok(()) };
        let kind = match oid {
            [0x55, 0x1d, kind] => *kind,
            ACCESS_INFORMATION => {
                const WHAT: &str = "authority information access";
                never_critical(WHAT)?;
                access_information(value).ok_or(Malformed(WHAT))?;
                return Ok(Read::Handled);
            }
            _ => return Ok(Read::Unhandled),
        };
        match kind {
            14 => {
                const WHAT: &str = "subject key identifier";
                never_critical(WHAT)?;
                let mut value = value;
                self.subject_key_id = value.read(tag::OCTET_STRING).ok_or(Malformed(WHAT))?.0.to_vec();
            }
            15 => {
                let mut value = value;
                let bits = value.bits().ok_or(Malformed("key usage"))?;
                self.key_usage = (0..9).filter(|bit| bits.is_set(*bit)).map(|bit| 1 << bit).sum();
            }
            17 => {
                self.names = names(value).ok_or(Malformed("subject alternative names"))?;
                self.names_raw = Some(value.0.to_vec());
                if self.names.is_empty() {
                    return Ok(Read::Unhandled);
                }
            }
            19 => self.basic = Some(basic(value).ok_or(Malformed("basic constraints"))?),
            30 => {
                let (read, whole) = constraints::read(value).ok_or(Malformed("name constraints"))?;
                self.constraints = Some(read);
                if !whole {
                    return Ok(Read::Unhandled);
                }
            }
            31 => distribution_points(value).ok_or(Malformed("CRL distribution points"))?,
            32 => self.policies = policies(value).ok_or(Malformed("certificate policies"))?,
            33 => self.mappings = mappings(value).ok_or(Malformed("policy mappings"))?,
            35 => {
                const WHAT: &str = "authority key identifier";
                never_critical(WHAT)?;
                self.authority_key_id = authority_key_id(value).ok_or(Malformed(WHAT))?;
            }
            36 => self.policy_constraints(value).ok_or(Malformed("policy constraints"))?,
            37 => self.usages = usages(value).ok_or(Malformed("extended key usage"))?,
            54 => {
                let mut value = value;
                let skip = value.number(tag::INTEGER).ok_or(Malformed("inhibited any-policy"))?;
                self.inhibit_any_policy = Some(skip).filter(|skip| *skip >= 0);
            }
            _ => return Ok(Read::Unhandled),
        }
        Ok(Read::Handled)
    }

    fn policy_constraints(&mut self, mut value: Der<'_>) -> Option<()> {
        let mut fields = value.read(tag::SEQUENCE)?;
        let mut field = |number| {
            if fields.is_next(tag::context(number)) {
                fields.number(tag::context(number)).map(Some)
            } else {
                Some(None)
            }
        };
        // One below zero says nothing, to Go.
        self.require_explicit_policy = field(0)?.filter(|skip| *skip >= 0);
        self.inhibit_policy_mapping = field(1)?.filter(|skip| *skip >= 0);
        Some(())
    }
}

impl Names {
    fn is_empty(&self) -> bool {
        self.dns.is_empty() && self.emails.is_empty() && self.addresses.is_empty() && self.uri_hosts.is_empty()
    }
}

fn basic(mut value: Der<'_>) -> Option<Basic> {
    let mut fields = value.read(tag::SEQUENCE)?;
    let is_ca = if fields.is_next(tag::BOOLEAN) {
        fields.boolean()?
    } else {
        false
    };
    let max_path = if fields.is_next(tag::INTEGER) {
        Some(fields.number(tag::INTEGER)?.try_into().ok()?)
    } else {
        None
    };
    Some(Basic { is_ca, max_path })
}

fn names(mut value: Der<'_>) -> Option<Names> {
    let mut list = value.read(tag::SEQUENCE)?;
    let mut names = Names::default();
    while !list.is_empty() {
        let name = list.any()?;
        let text = || {
            let all = name.content.is_ascii();
            all.then(|| name.content.iter().copied().map(char::from).collect::<String>())
        };
        match name.tag ^ 0x80 {
            1 => names.emails.push(text()?),
            2 => names.dns.push(text()?),
            6 => names.uri_hosts.push(uri::host(&text()?)?),
            7 => names.addresses.push(constraints::address(name.content)?),
            _ => {}
        }
    }
    Some(names)
}

fn usages(mut value: Der<'_>) -> Option<Usages> {
    let mut list = value.read(tag::SEQUENCE)?;
    let mut usages = Usages::default();
    while !list.is_empty() {
        let oid = list.identifier()?;
        usages.named = true;
        usages.any |= oid == ANY_USAGE;
        usages.client |= oid == CLIENT_AUTH;
        usages.server |= oid == SERVER_AUTH;
    }
    Some(usages)
}

fn authority_key_id(mut value: Der<'_>) -> Option<Vec<u8>> {
    let mut fields = value.read(tag::SEQUENCE)?;
    let id = fields.optional(tag::context(0))?;
    Some(id.map_or_else(Vec::new, |id| id.0.to_vec()))
}

fn policies(mut value: Der<'_>) -> Option<Vec<Vec<u8>>> {
    let mut list = value.read(tag::SEQUENCE)?;
    let mut policies: Vec<Vec<u8>> = Vec::new();
    while !list.is_empty() {
        let oid = list.read(tag::SEQUENCE)?.read(tag::OBJECT_IDENTIFIER)?.0;
        // Any number is allowed here, in the fewest octets.
        let ends = |index: usize| index == 0 || oid[index - 1] & 0x80 == 0;
        let starts_well = oid
            .iter()
            .enumerate()
            .all(|(index, octet)| *octet != 0x80 || !ends(index));
        if oid.last().is_none_or(|last| last & 0x80 != 0) || !starts_well {
            return None;
        }
        policies.push(oid.to_vec());
    }
    let mut sorted: Vec<&Vec<u8>> = policies.iter().collect();
    sorted.sort_unstable();
    let twice = sorted.windows(2).any(|pair| pair[0] == pair[1]);
    (!twice).then_some(policies)
}

fn mappings(mut value: Der<'_>) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut list = value.read(tag::SEQUENCE)?;
    let mut mappings = Vec::new();
    while !list.is_empty() {
        let mut pair = list.read(tag::SEQUENCE)?;
        let issuer = pair.read(tag::OBJECT_IDENTIFIER)?.0.to_vec();
        mappings.push((issuer, pair.read(tag::OBJECT_IDENTIFIER)?.0.to_vec()));
    }
    Some(mappings)
}

fn distribution_points(mut value: Der<'_>) -> Option<()> {
    let mut list = value.read(tag::SEQUENCE)?;
    while !list.is_empty() {
        let mut point = list.read(tag::SEQUENCE)?;
        let Some(mut name) = point.optional(tag::explicit(0))? else {
            continue;
        };
        let mut full = name.read(tag::explicit(0))?;
        while full.is_next(tag::context(6)) {
            full.any()?;
        }
    }
    Some(())
}

fn access_information(mut value: Der<'_>) -> Option<()> {
    let mut list = value.read(tag::SEQUENCE)?;
    while !list.is_empty() {
        let mut access = list.read(tag::SEQUENCE)?;
        access.identifier()?;
        if access.is_next(tag::context(6)) {
            access.any()?;
        }
    }
    Some(())
}
