//! A distinguished name, attribute by attribute.
//!
//! Input: DER. Output: text, each kind of string as Go turns it into UTF-8.
//! Must never let a string pass that its type does not allow.

use super::der::{Der, tag};

/// `CN` (2.5.4.3).
const COMMON_NAME: &[u8] = &[0x55, 4, 3];

/// `O` (2.5.4.10).
const ORGANIZATION: &[u8] = &[0x55, 4, 10];

/// The attribute that carries a user's UID (KEP-5284): 1.3.6.1.4.1.57683.2.
const UID: &[u8] = &[0x2b, 6, 1, 4, 1, 0x83, 0xc2, 0x53, 2];

/// The attributes in their order: object identifier and text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name(Vec<(Vec<u8>, String)>);

impl Name {
    /// The common name: Go keeps the last one (crypto/x509/pkix, `FillFromRDNSequence`); empty without one.
    pub fn common_name(&self) -> &str {
        self.all(COMMON_NAME).last().unwrap_or_default()
    }

    /// Each organization.
    pub fn organizations(&self) -> impl Iterator<Item = &str> {
        self.all(ORGANIZATION)
    }

    /// Each UID.
    pub fn uids(&self) -> impl Iterator<Item = &str> {
        self.all(UID)
    }

    fn all(&self, kind: &'static [u8]) -> impl Iterator<Item = &str> {
        let of = self.0.iter().filter(move |(oid, _)| oid == kind);
        of.map(|(_, text)| text.as_str())
    }

    /// Reads the whole element.
    pub(super) fn read(whole: &[u8]) -> Option<Self> {
        let mut names = Vec::new();
        let mut sets = Der(whole).read(tag::SEQUENCE)?;
        while !sets.is_empty() {
            let mut set = sets.read(tag::SET)?;
            while !set.is_empty() {
                let mut attribute = set.read(tag::SEQUENCE)?;
                let kind = attribute.identifier()?;
                let value = attribute.any()?;
                names.push((kind.to_vec(), text(value.tag, value.content)?));
            }
        }
        Some(Self(names))
    }
}

fn text(kind: u8, value: &[u8]) -> Option<String> {
    let ascii = |allowed: fn(u8) -> bool| {
        let all = value.iter().all(|octet| allowed(*octet));
        all.then(|| value.iter().copied().map(char::from).collect())
    };
    match kind {
        // Latin-1, as everybody reads it.
        tag::T61_STRING => Some(value.iter().copied().map(char::from).collect()),
        tag::PRINTABLE_STRING => {
            // The last two do not belong there, and are in use.
            ascii(|octet| octet.is_ascii_alphanumeric() || b" '()+,-./:=?*&".contains(&octet))
        }
        tag::UTF8_STRING => String::from_utf8(value.to_vec()).ok(),
        tag::IA5_STRING => ascii(|octet| octet.is_ascii()),
        tag::NUMERIC_STRING => ascii(|octet| octet.is_ascii_digit() || octet == b' '),
        tag::BMP_STRING => {
            let (pairs, []) = value.as_chunks::<2>() else {
                return None;
            };
            // A terminator does not count.
            let pairs = pairs.strip_suffix(&[[0, 0]]).unwrap_or(pairs);
            let units = pairs.iter().map(|pair| u16::from_be_bytes(*pair));
            let chars = units.map(|unit| match unit {
                // Never characters (Unicode, section 23.7).
                0xfffe | 0xffff | 0xfdd0..=0xfdef => None,
                _ => char::from_u32(u32::from(unit)),
            });
            chars.collect()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_string_is_read_as_go_reads_it() {
        assert_eq!(text(tag::T61_STRING, b"zo\xeb").as_deref(), Some("zoë"));
        assert_eq!(text(tag::BMP_STRING, b"\0z\0o\0\xeb\0\0").as_deref(), Some("zoë"));
        assert_eq!(text(tag::BMP_STRING, b"\0z\0"), None);
        assert_eq!(text(tag::BMP_STRING, &[0xd8, 0]), None);
        assert_eq!(text(tag::BMP_STRING, &[0xff, 0xff]), None);
        assert_eq!(text(tag::PRINTABLE_STRING, b"a*b & c").as_deref(), Some("a*b & c"));
        assert_eq!(text(tag::PRINTABLE_STRING, b"a@b"), None);
        assert_eq!(text(tag::PRINTABLE_STRING, b"a_b"), None);
        assert_eq!(text(tag::IA5_STRING, b"a@b").as_deref(), Some("a@b"));
        assert_eq!(text(tag::IA5_STRING, b"\xe9"), None);
        assert_eq!(text(tag::UTF8_STRING, b"\xff"), None);
        assert_eq!(text(tag::NUMERIC_STRING, b"1 2").as_deref(), Some("1 2"));
        assert_eq!(text(tag::NUMERIC_STRING, b"1a"), None);
        // UniversalString, which Go does not know.
        assert_eq!(text(28, b"\0\0\0a"), None);
    }
}
