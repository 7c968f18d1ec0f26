//! Writing header blocks with a dynamic table (RFC 7541, sections 2.3.2 and 6).
//!
//! Job: say each field as its sender did, against a table of this encoder's own.
//! Output: octets of blocks. Must never name an index whose field it has not compared with what is meant: what the
//! receiver reads rests on this table alone, not on its agreeing with anybody else's about somebody's octets.

use super::{
    Coding, DEFAULT_TABLE_SIZE,
    fields::{Entry, Fields, STATIC_FIELDS},
    write_integer, write_string,
};

/// One direction's blocks, as they are written.
#[derive(Debug)]
pub struct Encoder {
    fields: Fields,
    /// The smallest and the last size since the last block, when they are still to be said (section 4.2).
    resized: Option<[usize; 2]>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self {
            fields: Fields::new(DEFAULT_TABLE_SIZE),
            resized: None,
        }
    }
}

impl Encoder {
    /// Uses a table of up to `capacity` octets from the next block on; the receiver has allowed that much.
    pub fn resize(&mut self, capacity: usize) {
        if capacity == self.fields.capacity() {
            return;
        }
        let smallest = self.resized.map_or(capacity, |[smallest, _]| smallest.min(capacity));
        self.resized = Some([smallest, capacity]);
        self.fields.resize(capacity);
    }

    /// Begins a block: the table's size comes first, when it has changed.
    pub fn begin(&mut self, out: &mut Vec<u8>) {
        if let Some([smallest, last]) = self.resized.take() {
            if smallest < last {
                write_integer(smallest, 5, 0x20, out);
            }
            write_integer(last, 5, 0x20, out);
        }
    }

    /// Appends a field.
    pub fn field(&mut self, name: &[u8], value: &[u8], coding: &Coding, out: &mut Vec<u8>) {
        debug_assert!(self.resized.is_none(), "a block is begun before its fields");
        match coding {
            Coding::Indexed(index) => match self.index_of(*index, name, value) {
                Some(index) => write_integer(index, 7, 0x80, out),
                // Its sender's table has it, and this one has not: from here on both have.
                None => self.add(0, Entry::new(name, value), name, value, out),
            },
            Coding::Added { name: hint, entry } => self.add(*hint, entry.clone(), name, value, out),
            Coding::Plain { name: hint, never } => {
                let lead = if *never { 0x10 } else { 0x00 };
                self.literal(*hint, 4, lead, name, value, out);
            }
        }
    }

    fn add(&mut self, hint: usize, entry: Entry, name: &[u8], value: &[u8], out: &mut Vec<u8>) {
        if entry.cost() > self.fields.capacity() {
            // It would only empty the table.
            return self.literal(hint, 4, 0x00, name, value, out);
        }
        self.literal(hint, 6, 0x40, name, value, out);
        self.fields.insert(entry);
    }

    fn literal(&self, hint: usize, bits: u32, lead: u8, name: &[u8], value: &[u8], out: &mut Vec<u8>) {
        if hint > 0 && self.fields.get(hint).is_some_and(|field| field.0 == name) {
            write_integer(hint, bits, lead, out);
        } else {
            out.push(lead);
            write_string(name, out);
        }
        write_string(value, out);
    }

    /// The field's index here: nearly always the one its sender used.
    fn index_of(&self, hint: usize, name: &[u8], value: &[u8]) -> Option<usize> {
        if self.fields.get(hint) == Some((name, value)) {
            return Some(hint);
        }
        debug_assert!(hint > STATIC_FIELDS, "the static tables are one");
        self.fields.find(name, value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::h2::hpack::{Decoder, FieldList};

    /// Decodes a client's blocks, leaves some fields and some blocks out, encodes the rest anew, and reads that back.
    struct Hop {
        client: Decoder,
        encoder: Encoder,
        server: Decoder,
    }

    impl Hop {
        fn new() -> Self {
            Self {
                client: Decoder::default(),
                encoder: Encoder::default(),
                server: Decoder::default(),
            }
        }

        fn pass(&mut self, block: &[u8], keep: impl Fn(&[u8]) -> bool) -> Option<(FieldList, FieldList, Vec<u8>)> {
            let came = self.client.decode(block, 1 << 16).ok()?;
            self.encoder.resize(self.client.capacity());
            let mut out = Vec::new();
            self.encoder.begin(&mut out);
            for (name, value, coding) in came.coded().filter(|field| keep(field.0)) {
                self.encoder.field(name, value, coding, &mut out);
            }
            let went = self.server.decode(&out, 1 << 16).expect("the server reads it");
            let kept = came.iter().filter(|field| keep(field.0)).collect();
            Some((kept, went, out))
        }
    }

    #[test]
    fn a_request_that_is_repeated_costs_what_it_came_with() {
        let mut hop = Hop::new();
        let mut first = vec![0x82, 0x87, 0x41, 3];
        first.extend(b"api");
        first.extend([0x40, 6]);
        first.extend(b"x-same");
        first.extend([4]);
        first.extend(b"text");
        let (kept, went, out) = hop.pass(&first, |_| true).expect("a block");
        assert_eq!((kept, out), (went, first), "nothing is changed that need not be");
        let again = [0x82, 0x87, 0xbf, 0xbe];
        let (kept, went, out) = hop.pass(&again, |_| true).expect("a block");
        assert_eq!((kept, &out[..]), (went, &again[..]));
    }

    #[test]
    fn what_must_never_be_kept_goes_on_so_and_what_is_too_large_empties_nothing() {
        let mut hop = Hop::new();
        let mut secret = vec![0x1f, 8, 6];
        secret.extend(b"secret");
        let (_, _, out) = hop.pass(&secret, |_| true).expect("a block");
        assert_eq!(out, secret, "authorization by the static table's name, never indexed");
        let mut small = vec![0x40, 1];
        small.extend(b"a");
        small.extend([1]);
        small.extend(b"b");
        hop.pass(&small, |_| true).expect("a block");
        let mut large = vec![0x40, 1, b'l'];
        write_integer(5000, 7, 0, &mut large);
        large.extend([b'x'; 5000]);
        let (kept, went, out) = hop.pass(&large, |_| true).expect("a block");
        assert_eq!((out[0], kept), (0x00, went), "a literal that no table keeps");
        assert!(
            hop.encoder.fields.get(62).is_some(),
            "the receiver's table is as it was"
        );
    }

    #[test]
    fn sizes_are_said_in_the_next_block_with_the_smallest_on_the_way() {
        let mut hop = Hop::new();
        hop.encoder.resize(0);
        hop.encoder.resize(100);
        let mut out = Vec::new();
        hop.encoder.begin(&mut out);
        assert_eq!(out, [0x20, 0x3f, 69]);
        let mut block = vec![0x3f, 69, 0x82];
        let (_, _, out) = hop.pass(&block, |_| true).expect("a block");
        assert_eq!(out, [0x82], "said once");
        block[1] = 70;
        let (_, _, out) = hop.pass(&block, |_| true).expect("a block");
        assert_eq!(out, block);
    }

    fn any_field() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            (1_usize..70).prop_map(|index| {
                let mut octets = Vec::new();
                write_integer(index, 7, 0x80, &mut octets);
                octets
            }),
            (
                prop_oneof![Just((6, 0x40)), Just((4, 0x00)), Just((4, 0x10))],
                0_usize..66,
                1_usize..4,
                any::<u8>(),
                prop_oneof![0_usize..40, 1000_usize..1800],
            )
                .prop_map(|((bits, lead), name_index, name, value, length)| {
                    let name = "abc"[..name].to_owned();
                    let value = char::from(b'a' + value % 26).to_string().repeat(length);
                    let mut octets = Vec::new();
                    write_integer(name_index, bits, lead, &mut octets);
                    if name_index == 0 {
                        write_string(name.as_bytes(), &mut octets);
                    }
                    write_string(value.as_bytes(), &mut octets);
                    octets
                }),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_left_out_the_receiver_reads_what_was_meant(
            blocks in prop::collection::vec((prop::option::of(0_usize..4097), prop::collection::vec(any_field(), 0..12)), 1..20),
        ) {
            let mut hop = Hop::new();
            for (size, fields) in blocks {
                let mut block = Vec::new();
                if let Some(size) = size {
                    write_integer(size, 5, 0x20, &mut block);
                }
                block.extend(fields.concat());
                // Names of one letter are removed, as identity is.
                let Some((kept, went, _)) = hop.pass(&block, |name| name.len() != 1) else { break };
                prop_assert_eq!(kept, went);
            }
        }

        #[test]
        fn nothing_is_left_out_nothing_grows(blocks in prop::collection::vec(prop::collection::vec(any_field(), 0..12), 1..20)) {
            let mut hop = Hop::new();
            for fields in blocks {
                let block = fields.concat();
                let Some((_, _, out)) = hop.pass(&block, |_| true) else { break };
                prop_assert!(out.len() <= block.len(), "{} octets became {}", block.len(), out.len());
            }
        }
    }
}
