//! Reads DER as Go's cryptobyte does: definite lengths in their shortest form, one-octet tags.
//!
//! Input: octets. Output: elements, `None` where they are malformed. Must never read past its input.

/// Tags (ITU-T X.680, section 8.4).
pub mod tag {
    pub const BOOLEAN: u8 = 1;
    pub const INTEGER: u8 = 2;
    pub const BIT_STRING: u8 = 3;
    pub const OCTET_STRING: u8 = 4;
    pub const OBJECT_IDENTIFIER: u8 = 6;
    pub const UTF8_STRING: u8 = 12;
    pub const NUMERIC_STRING: u8 = 18;
    pub const PRINTABLE_STRING: u8 = 19;
    pub const T61_STRING: u8 = 20;
    pub const IA5_STRING: u8 = 22;
    pub const UTC_TIME: u8 = 23;
    pub const GENERALIZED_TIME: u8 = 24;
    pub const BMP_STRING: u8 = 30;
    pub const SEQUENCE: u8 = 0x30;
    pub const SET: u8 = 0x31;

    /// A context-specific tag.
    pub const fn context(number: u8) -> u8 {
        0x80 | number
    }

    /// The same around an element of its own.
    pub const fn explicit(number: u8) -> u8 {
        0xa0 | number
    }
}

/// What is left to read.
#[derive(Clone, Copy, Debug)]
pub struct Der<'a>(pub &'a [u8]);

/// One element.
#[derive(Clone, Copy, Debug)]
pub struct Element<'a> {
    pub tag: u8,
    /// With tag and length.
    pub whole: &'a [u8],
    pub content: &'a [u8],
}

/// A bit string: its octets, and how many bits of the last one do not count.
#[derive(Clone, Copy, Debug)]
pub struct Bits<'a> {
    octets: &'a [u8],
    padding: u32,
}

impl Bits<'_> {
    /// Whether that bit, counted from the first octet's highest, is set.
    pub fn is_set(&self, index: usize) -> bool {
        index < self.octets.len() * 8 - self.padding as usize && self.octets[index / 8] & (0x80 >> (index % 8)) != 0
    }

    /// The bits as a number's octets: the padding goes to the front.
    pub fn right_aligned(&self) -> Vec<u8> {
        if self.padding == 0 {
            return self.octets.to_vec();
        }
        let mut before = 0;
        let shifted = self.octets.iter().map(|octet| {
            let whole = u16::from(before) << 8 | u16::from(*octet);
            before = *octet;
            (whole >> self.padding) as u8
        });
        shifted.collect()
    }
}

impl<'a> Der<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the next element has that tag.
    pub fn is_next(&self, tag: u8) -> bool {
        self.0.first() == Some(&tag)
    }

    /// The next element.
    pub fn any(&mut self) -> Option<Element<'a>> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        // Tags of several octets are not in use.
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (header, length) = if first & 0x80 == 0 {
            (2, usize::from(first))
        } else {
            let count = usize::from(first & 0x7f);
            let octets = rest.get(..count)?;
            if !(1..=4).contains(&count) || octets[0] == 0 {
                return None;
            }
            let length = octets.iter().fold(0_usize, |sum, octet| sum << 8 | usize::from(*octet));
            if length < 128 {
                return None;
            }
            (2 + count, length)
        };
        let end = header.checked_add(length)?;
        let whole = self.0.get(..end)?;
        self.0 = &self.0[end..];
        Some(Element {
            tag,
            whole,
            content: &whole[header..],
        })
    }

    /// The next element, which must have that tag.
    pub fn element(&mut self, tag: u8) -> Option<Element<'a>> {
        self.any().filter(|element| element.tag == tag)
    }

    /// Its content.
    pub fn read(&mut self, tag: u8) -> Option<Der<'a>> {
        self.element(tag).map(|element| Der(element.content))
    }

    /// The next element's content when it has that tag.
    pub fn optional(&mut self, tag: u8) -> Option<Option<Der<'a>>> {
        if self.is_next(tag) {
            self.read(tag).map(Some)
        } else {
            Some(None)
        }
    }

    pub fn boolean(&mut self) -> Option<bool> {
        match self.read(tag::BOOLEAN)?.0 {
            [0] => Some(false),
            [0xff] => Some(true),
            _ => None,
        }
    }

    /// An integer's octets, two's complement, shortest form.
    pub fn integer(&mut self, tag: u8) -> Option<&'a [u8]> {
        let octets = self.read(tag)?.0;
        match octets {
            [] | [0, 0..=0x7f, ..] | [0xff, 0x80..=0xff, ..] => None,
            _ => Some(octets),
        }
    }

    /// An integer that fits.
    pub fn number(&mut self, tag: u8) -> Option<i64> {
        let octets = self.integer(tag)?;
        if octets.len() > 8 {
            return None;
        }
        let sign = if octets[0] & 0x80 == 0 { 0 } else { -1 };
        Some(octets.iter().fold(sign, |sum, octet| sum << 8 | i64::from(*octet)))
    }

    /// An object identifier's octets.
    pub fn identifier(&mut self) -> Option<&'a [u8]> {
        let octets = self.read(tag::OBJECT_IDENTIFIER)?.0;
        let mut rest = octets;
        // Each part in the fewest octets, below 2^31.
        while !rest.is_empty() {
            let mut value = 0_u32;
            for at in 0.. {
                let (&octet, after) = rest.split_first()?;
                if at == 5 || value >= 1 << 24 || at == 0 && octet == 0x80 {
                    return None;
                }
                rest = after;
                value = value << 7 | u32::from(octet & 0x7f);
                if octet & 0x80 == 0 {
                    break;
                }
            }
        }
        (!octets.is_empty()).then_some(octets)
    }

    pub fn bits(&mut self) -> Option<Bits<'a>> {
        let (&padding, octets) = self.read(tag::BIT_STRING)?.0.split_first()?;
        let unused = (1_u32.checked_shl(u32::from(padding))? - 1) as u8;
        if padding > 7 || octets.last().map_or(padding != 0, |last| last & unused != 0) {
            return None;
        }
        Some(Bits {
            octets,
            padding: u32::from(padding),
        })
    }

    /// A time, in seconds since 1970.
    pub fn time(&mut self) -> Option<i64> {
        let element = self.any()?;
        match element.tag {
            tag::UTC_TIME => {
                let (year, rest) = digits(element.content, 2)?;
                // The year counts from 1950 on (RFC 5280, section 4.1.2.5.1).
                let century = if year >= 50 { 1900 } else { 2000 };
                moment(century + year, rest, true)
            }
            tag::GENERALIZED_TIME => {
                let (year, rest) = digits(element.content, 4)?;
                moment(year, rest, false)
            }
            _ => None,
        }
    }
}

fn digits(text: &[u8], count: usize) -> Option<(i64, &[u8])> {
    let (number, rest) = text.split_at_checked(count)?;
    if !number.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some((
        number.iter().fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0')),
        rest,
    ))
}

/// The rest of a time after its year: seconds may be missing in the short form, and an offset may stand for `Z`.
fn moment(year: i64, rest: &[u8], short: bool) -> Option<i64> {
    let (month, rest) = digits(rest, 2)?;
    let (day, rest) = digits(rest, 2)?;
    let (hour, rest) = digits(rest, 2)?;
    let (minute, rest) = digits(rest, 2)?;
    let (second, rest) = match digits(rest, 2) {
        Some(read) => read,
        None if short => (0, rest),
        None => return None,
    };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=days).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let offset = match rest {
        b"Z" => 0,
        [sign @ (b'+' | b'-'), offset @ ..] => {
            let (hours, offset) = digits(offset, 2)?;
            let (minutes, end) = digits(offset, 2)?;
            // None at all is written `Z`.
            if !end.is_empty() || hours > 24 || minutes > 59 || hours + minutes == 0 {
                return None;
            }
            let offset = (hours * 60 + minutes) * 60;
            if *sign == b'+' { offset } else { -offset }
        }
        _ => return None,
    };
    // Days since 1970-01-01, the year begun in March so that the leap day is its last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days =
        year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + (153 * month + 2) / 5 + day
            - 719_469;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second - offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_numbers_come_in_their_shortest_form_alone() {
        assert!(Der(&[4, 0x81, 127]).any().is_none());
        assert!(Der(&[4, 0x80]).any().is_none());
        assert!(Der(&[0x1f, 1, 0]).any().is_none());
        assert!(Der(&[4, 2, 0]).any().is_none());
        assert!(Der(&[4, 0x84, 0xff, 0xff, 0xff, 0xff]).any().is_none());
        let number = |octets: &[u8]| Der(octets).number(tag::INTEGER);
        assert_eq!(number(&[2, 1, 0xff]), Some(-1));
        assert_eq!(number(&[2, 2, 0, 0x80]), Some(128));
        for wrong in [&[2, 0][..], &[2, 2, 0, 1], &[2, 2, 0xff, 0x80]] {
            assert_eq!(number(wrong), None, "{wrong:?}");
        }
        assert_eq!(Der(&[6, 1, 0x80]).identifier(), None);
        assert_eq!(Der(&[6, 2, 0x2a, 0x81]).identifier(), None);
        assert_eq!(Der(&[6, 0]).identifier(), None);
        assert!(Der(&[3, 2, 8, 0]).bits().is_none());
        assert!(Der(&[3, 2, 1, 1]).bits().is_none());
        assert!(Der(&[3, 2, 0xff, 1]).bits().is_none());
        let bits = Der(&[3, 3, 4, 0xab, 0xc0]).bits().expect("twelve bits");
        assert_eq!(bits.right_aligned(), [0x0a, 0xbc]);
        assert!(bits.is_set(0) && !bits.is_set(1) && !bits.is_set(12));
    }

    #[test]
    fn times_are_read_as_go_reads_them() {
        let time = |tag: u8, text: &str| {
            let mut der = vec![tag, text.len() as u8];
            der.extend_from_slice(text.as_bytes());
            Der(&der).time()
        };
        let utc = |text| time(tag::UTC_TIME, text);
        let long = |text| time(tag::GENERALIZED_TIME, text);
        assert_eq!(utc("700101000000Z"), Some(0));
        assert_eq!(utc("000229000000Z"), Some(951_782_400));
        assert_eq!(utc("500101000000Z"), Some(-631_152_000));
        assert_eq!(utc("491231235959Z"), Some(2_524_607_999));
        assert_eq!(utc("7001010000Z"), Some(0));
        assert_eq!(utc("700101010000+0100"), Some(0));
        assert_eq!(long("19700101000000Z"), Some(0));
        assert_eq!(long("99991231235959Z"), Some(253_402_300_799));
        assert_eq!(long("00000101000000Z"), Some(-62_167_219_200));
        assert_eq!(long("20240229000000-0030"), Some(1_709_164_800 + 1800));
        for wrong in [
            "990229000000Z",
            "700101000000",
            "700101000000+0000",
            "700101000060Z",
            "701301000000Z",
            "700101240000Z",
            "700101000000.5Z",
            "7001 1000000Z",
        ] {
            assert_eq!(utc(wrong), None, "{wrong}");
        }
        assert_eq!(long("197001010000Z"), None);
    }
}
