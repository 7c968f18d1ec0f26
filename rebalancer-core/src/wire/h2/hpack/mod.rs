//! HPACK (RFC 7541): reading every header block of a connection, and writing blocks of its own.
//!
//! Job: follow a sender's compression state exactly, and keep one towards a receiver.
//! Output: fields, and blocks of them.
//! Must never decode to more than the bound it is given.

mod encoder;
mod fields;
mod huffman;
mod list;

pub use encoder::Encoder;
use fields::{Entry, Fields, OVERHEAD};
pub use list::{Coding, FieldList};

use super::error::ConnectionError;

/// The size a dynamic table has until SETTINGS say otherwise (RFC 9113, section 6.5.2).
pub const DEFAULT_TABLE_SIZE: usize = 4096;

/// How many octets the names that a block's literals give by an index may have, for each of the block's own, and besides:
/// a name that was put into the table once could else be copied again for every two octets.
const NAMES_FACTOR: usize = 32;
const NAMES_FREE: usize = 64 * 1024;

const FAR_MORE: ConnectionError = ConnectionError::calm("a header block that stands for far more than was sent");

/// Follows one direction's header blocks.
#[derive(Debug)]
pub struct Decoder {
    fields: Fields,
    allowed: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            fields: Fields::new(DEFAULT_TABLE_SIZE),
            allowed: DEFAULT_TABLE_SIZE,
        }
    }
}

impl Decoder {
    /// The receiver announced a table of up to `size` octets; the sender may use it as soon as it reads that.
    pub fn allow(&mut self, size: usize) {
        self.allowed = self.allowed.max(size);
    }

    /// Decodes one complete block, whose list may have `limit` octets, 32 for each field included (RFC 9113, section
    /// 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE). One that stands for more is cut ([`FieldList::is_cut`]) and followed to its
    /// end all the same, since later blocks refer to it: what that costs goes by its own length, not by what it stands for.
    ///
    /// # Errors
    ///
    /// A compression error (RFC 7541, sections 2.3.3, 4.2, 5.1 and 5.2), or names by an index that stand for far more than
    /// the block has.
    pub fn decode(&mut self, block: &[u8], limit: usize) -> Result<FieldList, ConnectionError> {
        let mut reader = Reader { rest: block };
        let mut list = FieldList::with_room();
        let mut names = block.len() * NAMES_FACTOR + NAMES_FREE;
        while let Some(&first) = reader.rest.first() {
            if first & 0xe0 == 0x20 {
                if !list.is_empty() {
                    return Err(ConnectionError::compression("a table size update after a header field"));
                }
                let size = reader.integer(5)?;
                if size > self.allowed {
                    return Err(ConnectionError::compression(
                        "a table size update beyond what was allowed",
                    ));
                }
                self.fields.resize(size);
                list.set_resized();
                continue;
            }
            if first & 0x80 != 0 {
                let index = reader.integer(7)?;
                let (name, value) = self.indexed(index)?;
                if list.is_cut() {
                    continue;
                }
                list.push_with(limit, |out| {
                    out.extend_from_slice(name);
                    let name_end = out.len();
                    out.extend_from_slice(value);
                    Ok((name_end, Coding::Indexed(index)))
                })?;
            } else {
                let adding = first & 0x40 != 0;
                let index = reader.integer(if adding { 6 } else { 4 })?;
                list.push_with(limit, |out| {
                    let begin = out.len();
                    if index == 0 {
                        reader.string(out)?;
                    } else {
                        let name = self.indexed(index)?.0;
                        names = names.checked_sub(name.len()).ok_or(FAR_MORE)?;
                        out.extend_from_slice(name);
                    }
                    let name_end = out.len();
                    reader.string(out)?;
                    let coding = if adding {
                        let entry = Entry::new(&out[begin..name_end], &out[name_end..]);
                        self.fields.insert(entry.clone());
                        Coding::Added { name: index, entry }
                    } else {
                        Coding::Plain {
                            name: index,
                            never: first & 0x10 != 0,
                        }
                    };
                    Ok((name_end, coding))
                })?;
            }
        }
        debug_assert!(list.size() <= limit);
        Ok(list)
    }

    /// How much its sender's table may hold now.
    pub fn capacity(&self) -> usize {
        self.fields.capacity()
    }

    fn indexed(&self, index: usize) -> Result<(&[u8], &[u8]), ConnectionError> {
        self.fields
            .get(index)
            .ok_or(ConnectionError::compression("a header index that names nothing"))
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn octet(&mut self) -> Result<u8, ConnectionError> {
        let (&first, rest) = self
            .rest
            .split_first()
            .ok_or(ConnectionError::compression("a header block ends early"))?;
        self.rest = rest;
        Ok(first)
    }

    /// An integer with a prefix of `bits` (RFC 7541, section 5.1); more than 28 bits are refused.
    fn integer(&mut self, bits: u32) -> Result<usize, ConnectionError> {
        let mask = (1_usize << bits) - 1;
        let mut value = usize::from(self.octet()?) & mask;
        if value < mask {
            return Ok(value);
        }
        for shift in [0, 7, 14, 21] {
            let octet = self.octet()?;
            value += usize::from(octet & 0x7f) << shift;
            if octet & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ConnectionError::compression(
            "an integer in a header block is too large",
        ))
    }

    /// Appends a string literal (RFC 7541, section 5.2): no more than eight octets for each five of the block's.
    fn string(&mut self, out: &mut Vec<u8>) -> Result<(), ConnectionError> {
        let huffman = self.rest.first().is_some_and(|first| first & 0x80 != 0);
        let length = self.integer(7)?;
        let (text, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(ConnectionError::compression("a string in a header block ends early"))?;
        self.rest = rest;
        if huffman {
            huffman::decode(text, out)
                .map_err(|huffman::Invalid| ConnectionError::compression("a Huffman code is invalid"))
        } else {
            out.extend_from_slice(text);
            Ok(())
        }
    }
}

/// Appends a field as a literal that is never indexed (RFC 7541, section 6.2.3): no table changes.
pub fn write_literal(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.push(0x10);
    write_string(name, out);
    write_string(value, out);
}

fn write_string(text: &[u8], out: &mut Vec<u8>) {
    write_integer(text.len(), 7, 0, out);
    out.extend_from_slice(text);
}

fn write_integer(mut value: usize, bits: u32, lead: u8, out: &mut Vec<u8>) {
    let mask = (1_usize << bits) - 1;
    if value < mask {
        out.push(lead | value as u8);
        return;
    }
    out.push(lead | mask as u8);
    value -= mask;
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(list: &FieldList) -> Vec<(String, String)> {
        let text = |octets: &[u8]| String::from_utf8(octets.to_vec()).expect("the examples are text");
        list.iter().map(|(name, value)| (text(name), text(value))).collect()
    }

    #[test]
    fn the_request_examples_of_rfc_7541_share_their_table() {
        // Appendix C.4: three requests on one connection, Huffman coded.
        let requests: [&[u8]; 3] = [
            &[
                0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
            ],
            &[0x82, 0x86, 0x84, 0xbe, 0x58, 0x86, 0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf],
            &[
                0x82, 0x87, 0x85, 0xbf, 0x40, 0x88, 0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xa9, 0x7d, 0x7f, 0x89, 0x25, 0xa8,
                0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf,
            ],
        ];
        let mut decoder = Decoder::default();
        let lists: Vec<_> = requests
            .iter()
            .map(|block| text(&decoder.decode(block, 1024).expect("an example decodes")))
            .collect();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(lists[0][3], pair(":authority", "www.example.com"));
        assert_eq!(lists[1][4], pair("cache-control", "no-cache"));
        assert_eq!(lists[2][3], pair(":authority", "www.example.com"));
        assert_eq!(lists[2][4], pair("custom-key", "custom-value"));
    }

    #[test]
    fn faults_are_refused_with_their_code() {
        use super::super::error::ErrorCode::CompressionError;
        let refused = |block: &[u8]| Decoder::default().decode(block, 64).expect_err("a fault").code;
        assert_eq!(refused(&[0x80]), CompressionError, "index zero");
        assert_eq!(refused(&[0xff, 0x20]), CompressionError, "an index beyond the table");
        assert_eq!(refused(&[0x82, 0x20]), CompressionError, "a size update after a field");
        assert_eq!(refused(&[0x3f, 0xe2, 0x1f]), CompressionError, "a size beyond 4096");
        assert_eq!(
            refused(&[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff]),
            CompressionError,
            "an integer"
        );
        assert_eq!(refused(&[0x00, 0x01]), CompressionError, "an early end");
    }

    #[test]
    fn a_list_beyond_its_bound_is_cut_and_followed_to_its_end() {
        let mut decoder = Decoder::default();
        // A literal that is too long, and behind it one that goes into the table.
        let mut block = vec![0x82, 0x00, 0x01, b'a', 0x7f, 0x00];
        block.extend([b'x'; 127]);
        block.extend([0x40, 1, b'b', 1, b'c']);
        let list = decoder.decode(&block, 80).expect("a block");
        assert!(list.is_cut());
        assert_eq!(text(&list), [(":method".to_owned(), "GET".to_owned())]);
        let list = decoder.decode(&[0xbe], 80).expect("a block");
        assert!(!list.is_cut());
        assert_eq!(text(&list), [("b".to_owned(), "c".to_owned())]);
        // What few octets stand for, many times.
        let mut bomb = vec![0x40, 1, b'l'];
        write_integer(4000, 7, 0, &mut bomb);
        bomb.extend([b'x'; 4000]);
        bomb.extend([0xbe; 10_000]);
        let list = decoder.decode(&bomb, 10_000).expect("a block");
        assert!(list.is_cut());
        assert_eq!(list.iter().count(), 2);
        assert_eq!(
            list.octets.capacity().next_power_of_two(),
            16_384,
            "no more than it may hold, and one field"
        );
        let after_cut = [&[0xbe; 10][..], &[0x80]].concat();
        assert!(decoder.decode(&after_cut, 64).is_err(), "a fault behind the cut is one");
    }

    #[test]
    fn a_long_name_is_not_copied_for_every_two_octets() {
        // A name of 4,000 octets, and then literals that name it: some into the table, some not.
        let mut first = vec![0x40];
        write_integer(4000, 7, 0, &mut first);
        first.extend([b'n'; 4000]);
        first.push(0);
        for again in [&[0x7e, 0x00][..], &[0x0f, 0x2f, 0x00]] {
            let mut decoder = Decoder::default();
            let list = decoder.decode(&first, 1 << 17).expect("it fits");
            assert!(!list.is_cut());
            let few = decoder.decode(&again.repeat(10), 1 << 17).expect("some are well");
            assert_eq!(few.iter().count(), 10);
            let many = decoder
                .decode(&again.repeat(40_000), 1 << 17)
                .expect_err("far too many");
            assert_eq!(many, FAR_MORE);
        }
    }

    proptest! {
        #[test]
        fn literals_read_back_and_leave_no_trace(fields in prop::collection::vec(("[a-z-]{1,300}", ".{0,300}"), 0..8)) {
            let mut block = Vec::new();
            for (name, value) in &fields {
                write_literal(name.as_bytes(), value.as_bytes(), &mut block);
            }
            let mut decoder = Decoder::default();
            let list = decoder.decode(&block, 1 << 20).expect("literals decode");
            prop_assert_eq!(text(&list), fields);
            prop_assert!(decoder.fields.get(62).is_none());
        }

        #[test]
        fn any_bytes_decode_or_are_refused_within_the_bound(block in prop::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(list) = Decoder::default().decode(&block, 256) {
                let octets: usize = list.iter().map(|(name, value)| name.len() + value.len() + OVERHEAD).sum();
                prop_assert_eq!(octets, list.size());
                prop_assert!(octets <= 256);
            }
        }
    }
}
