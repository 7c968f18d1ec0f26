//! Where members lie in kernel structures, read from BTF (Documentation/bpf/btf.rst).
//!
//! Input: the bytes of /sys/kernel/btf/vmlinux. Output: offsets. Must never read outside the bytes, whatever they say.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
/// Anonymous members nest; the kernel's deepest is far below this.
const DEEPEST: usize = 16;
/// So many members are looked at for one offset: the kernel's largest structure has some hundreds, those of its anonymous
/// members included. In a damaged blob a structure may hold itself many times over.
const MOST_MEMBERS: u32 = 16_384;

/// Why an offset cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// Not BTF, or cut short.
    #[error("the kernel's type information (BTF) is malformed: {0}")]
    Malformed(&'static str),
    /// A kind of type that came after this program.
    #[error(
        "the kernel's type information (BTF) has a type of kind {0}, which this program does not know: it is newer than the program"
    )]
    UnknownKind(u32),
    /// The kernel has no such member.
    #[error("this kernel's `struct {structure}` has no member `{member}`")]
    Missing {
        /// The structure.
        structure: String,
        /// The member.
        member: String,
    },
}

/// An index of the structures in a BTF blob.
pub struct Btf<'a> {
    bytes: &'a [u8],
    strings: &'a [u8],
    /// Where each type's record begins; type 0 is void.
    types: Vec<usize>,
    structures: HashMap<&'a [u8], usize>,
}

impl<'a> Btf<'a> {
    /// Reads the header and walks the types once.
    ///
    /// # Errors
    ///
    /// [`BtfError::Malformed`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        let short = BtfError::Malformed("it ends early");
        let word = |at: usize| word(bytes, at).ok_or(short.clone());
        let magic = bytes.first_chunk().map(|chunk| u16::from_le_bytes(*chunk));
        if magic != Some(MAGIC) {
            return Err(BtfError::Malformed("it does not begin with BTF's magic number"));
        }
        let header = word(4)? as usize;
        let range = |offset: u32, length: u32| {
            let begin = header.checked_add(offset as usize)?;
            bytes.get(begin..begin.checked_add(length as usize)?)
        };
        let section = range(word(8)?, word(12)?).ok_or(short.clone())?;
        let strings = range(word(16)?, word(20)?).ok_or(short.clone())?;
        let mut btf = Self {
            bytes: section,
            strings,
            types: vec![0],
            structures: HashMap::new(),
        };
        let mut at = 0;
        while at < section.len() {
            let info = self::word(section, at + 4).ok_or(short.clone())?;
            let (kind, count) = (info >> 24 & 0x1f, info as usize & 0xffff);
            if matches!(kind, STRUCT | UNION)
                && let Some(name) = btf.name(self::word(section, at).ok_or(short.clone())?)
                && !name.is_empty()
            {
                btf.structures.entry(name).or_insert(btf.types.len());
            }
            btf.types.push(at);
            // What follows the twelve octets of `struct btf_type`, by kind.
            at += 12
                + match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    4 | 5 | 15 | 19 => count * 12,
                    6 | 13 => count * 8,
                    0 | 2 | 7..=12 | 16 | 18 => 0,
                    _ => return Err(BtfError::UnknownKind(kind)),
                };
        }
        Ok(btf)
    }

    /// The offset in octets of a member, which may lie in anonymous members.
    ///
    /// # Errors
    ///
    /// [`BtfError::Missing`].
    pub fn offset(&self, structure: &str, member: &str) -> Result<u32, BtfError> {
        self.bits(structure, member).map(|bits| bits / 8)
    }

    /// The offset in bits, for a member that has but one.
    ///
    /// # Errors
    ///
    /// [`BtfError::Missing`].
    pub fn bits(&self, structure: &str, member: &str) -> Result<u32, BtfError> {
        let mut left = MOST_MEMBERS;
        let found = self
            .structures
            .get(structure.as_bytes())
            .and_then(|id| self.find(*id, member.as_bytes(), 0, &mut left));
        found.ok_or_else(|| BtfError::Missing {
            structure: structure.to_owned(),
            member: member.to_owned(),
        })
    }

    /// Looks at `left` members at most.
    fn find(&self, id: usize, member: &[u8], depth: usize, left: &mut u32) -> Option<u32> {
        let at = *self.types.get(id).filter(|_| id != 0 && depth < DEEPEST)?;
        let info = word(self.bytes, at + 4)?;
        if !matches!(info >> 24 & 0x1f, STRUCT | UNION) {
            return None;
        }
        (0..info as usize & 0xffff).find_map(|index| {
            *left = left.checked_sub(1)?;
            let entry = at + 12 + index * 12;
            let name = self.name(word(self.bytes, entry)?)?;
            let mut offset = word(self.bytes, entry + 8)?;
            if info >> 31 == 1 {
                // With bit-fields in it, the upper octet is a width.
                offset &= 0x00ff_ffff;
            }
            if name == member {
                Some(offset)
            } else if name.is_empty() {
                let inner = self.find(word(self.bytes, entry + 4)? as usize, member, depth + 1, left)?;
                offset.checked_add(inner)
            } else {
                None
            }
        })
    }

    fn name(&self, offset: u32) -> Option<&'a [u8]> {
        let rest = self.strings.get(offset as usize..)?;
        rest.split(|octet| *octet == 0).next()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `struct outer { int a; struct { int b; int c; }; }`, as pahole would encode it.
    fn blob() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0c\0";
        let structure = |members: u32| STRUCT << 24 | members;
        let types: Vec<u32> = [
            vec![1, 1 << 24, 4, 32],
            vec![0, structure(2), 8, 13, 1, 0, 15, 1, 32],
            vec![5, structure(2), 12, 11, 1, 0, 0, 2, 32],
        ]
        .concat();
        let length = types.len() as u32 * 4;
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, length, length, strings.len() as u32].into_iter().chain(types) {
            blob.extend_from_slice(&word.to_le_bytes());
        }
        blob.extend_from_slice(strings);
        blob
    }

    #[test]
    fn members_are_found_also_in_anonymous_ones() {
        let blob = blob();
        let btf = Btf::parse(&blob).expect("BTF");
        assert_eq!(btf.offset("outer", "a"), Ok(0));
        assert_eq!(btf.offset("outer", "b"), Ok(4));
        assert_eq!(btf.offset("outer", "c"), Ok(8));
        let missing = btf.offset("outer", "d").expect_err("no such member").to_string();
        assert!(missing.contains("struct outer") && missing.contains("`d`"));
        assert_eq!(btf.bits("outer", "c"), Ok(64));
        let mut newer = blob.clone();
        // The first type's kind is in the upper octet of its second word.
        newer[24 + 7] = 25;
        assert_eq!(Btf::parse(&newer).err(), Some(BtfError::UnknownKind(25)));
    }

    /// A structure that holds itself sixty times over: sixty to the power of sixteen ways, none of which leads anywhere.
    #[test]
    fn a_structure_that_holds_itself_is_no_endless_walk() {
        let members = 60_u32;
        let strings = b"\0loop\0";
        let mut types = vec![1, STRUCT << 24 | members, 8];
        types.extend((0..members).flat_map(|_| [0, 1, 0]));
        let length = types.len() as u32 * 4;
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, length, length, strings.len() as u32].into_iter().chain(types) {
            blob.extend_from_slice(&word.to_le_bytes());
        }
        blob.extend_from_slice(strings);
        let btf = Btf::parse(&blob).expect("BTF");
        assert!(btf.offset("loop", "a").is_err());
    }

    proptest! {
        #[test]
        fn damaged_blobs_are_survived(at in 0_usize..120, value in any::<u8>(), cut in 0_usize..130) {
            let mut blob = blob();
            if let Some(octet) = blob.get_mut(at) {
                *octet = value;
            }
            blob.truncate(cut.max(1));
            if let Ok(btf) = Btf::parse(&blob) {
                let _ = btf.offset("outer", "c");
            }
        }
    }
}
