//! The Huffman code of RFC 7541, appendix B.
//!
//! The code is canonical: within a length, codes grow with the symbol, so its lengths are all there is to know.
//! Input and output: bytes. Must never write more than the caller's bound.

/// The length in bits of each octet's code (RFC 7541, appendix B); end-of-string has 30 bits.
#[rustfmt::skip]
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];

const SHORTEST: usize = 5;
const LONGEST: usize = 30;

/// For each length: the first code, how many codes there are, and where their symbols begin in `SYMBOLS`.
struct Row {
    first: u32,
    count: u32,
    offset: u32,
}

const TABLE: ([Row; LONGEST + 1], [u8; 256]) = canonical();

const fn canonical() -> ([Row; LONGEST + 1], [u8; 256]) {
    let mut rows = [const {
        Row {
            first: 0,
            count: 0,
            offset: 0,
        }
    }; LONGEST + 1];
    let mut symbols = [0; 256];
    let mut code = 0;
    let mut placed = 0;
    let mut length = 1;
    while length <= LONGEST {
        code <<= 1;
        rows[length].first = code;
        rows[length].offset = placed;
        let mut symbol = 0;
        while symbol < 256 {
            if LENGTHS[symbol] as usize == length {
                symbols[placed as usize] = symbol as u8;
                placed += 1;
                code += 1;
            }
            symbol += 1;
        }
        rows[length].count = placed - rows[length].offset;
        length += 1;
    }
    (rows, symbols)
}

/// Codes of so many bits at most, which all usual octets have, are found at once.
const AT_ONCE: usize = 9;

/// For each of the next [`AT_ONCE`] bits: the length of the code they begin with and its symbol, or zero for a longer one.
const QUICK: [u16; 1 << AT_ONCE] = {
    let (rows, symbols) = &TABLE;
    let mut quick = [0; 1 << AT_ONCE];
    let mut length = SHORTEST;
    while length <= AT_ONCE {
        let mut index = 0;
        while index < rows[length].count {
            let symbol = symbols[(rows[length].offset + index) as usize];
            let first = ((rows[length].first + index) as usize) << (AT_ONCE - length);
            let mut more = 0;
            while more < 1 << (AT_ONCE - length) {
                quick[first + more] = (length as u16) << 8 | symbol as u16;
                more += 1;
            }
            index += 1;
        }
        length += 1;
    }
    quick
};

/// The string is not a Huffman code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// Appends what `input` decodes to: eight octets for each five at most, since no code is shorter than five bits.
///
/// # Errors
///
/// [`Invalid`] on an end-of-string code, and on padding that is longer than seven bits or not all ones (RFC 7541,
/// section 5.2).
pub fn decode(input: &[u8], out: &mut Vec<u8>) -> Result<(), Invalid> {
    let (rows, symbols) = &TABLE;
    let mut bits: u64 = 0;
    let mut held = 0;
    let mut rest = input.iter();
    out.reserve(input.len() * 8 / SHORTEST + 1);
    loop {
        if held < LONGEST {
            while held <= 56 {
                let Some(&octet) = rest.next() else { break };
                bits = bits << 8 | u64::from(octet);
                held += 8;
            }
        }
        if held >= AT_ONCE {
            let quick = QUICK[(bits >> (held - AT_ONCE)) as usize & ((1 << AT_ONCE) - 1)];
            if quick != 0 {
                held -= usize::from(quick >> 8);
                out.push(quick as u8);
                continue;
            }
        }
        let mut length = SHORTEST;
        let symbol = loop {
            if length > LONGEST {
                return Err(Invalid);
            }
            if length > held {
                // What is left must be the most significant bits of end-of-string: ones, fewer than eight.
                let padding = (1_u64 << held) - 1;
                return if held < 8 && bits & padding == padding {
                    Ok(())
                } else {
                    Err(Invalid)
                };
            }
            let code = (bits >> (held - length)) as u32 & ((1_u32 << length) - 1);
            let row = &rows[length];
            let index = code.wrapping_sub(row.first);
            if index < row.count {
                break symbols[(row.offset + index) as usize];
            }
            length += 1;
        };
        held -= length;
        out.push(symbol);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(hex: &[u8]) -> Result<Vec<u8>, Invalid> {
        let mut out = Vec::new();
        decode(hex, &mut out)?;
        Ok(out)
    }

    #[test]
    fn the_examples_of_rfc_7541_decode() {
        // Appendix C.4.1 and C.6.1.
        let host = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(decoded(&host).as_deref(), Ok(&b"www.example.com"[..]));
        assert_eq!(decoded(&[0x64, 0x02]).as_deref(), Ok(&b"302"[..]));
        assert_eq!(decoded(&[]).as_deref(), Ok(&b""[..]));
    }

    #[test]
    fn bad_padding_and_end_of_string_are_refused() {
        assert_eq!(decoded(&[0b0001_1000]), Err(Invalid), "padding of zeros");
        assert_eq!(decoded(&[0b0001_1111, 0xff]), Err(Invalid), "padding of eleven bits");
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xff]), Err(Invalid), "end of string");
        assert_eq!(
            decoded(&[0; 65]).map(|text| text.len()),
            Ok(104),
            "five bits each are the most"
        );
    }

    /// Each octet's code, by the rule that codes of one length follow each other and a longer one begins behind them.
    fn encode(text: &[u8]) -> Vec<u8> {
        let (rows, symbols) = &TABLE;
        let mut bits = String::new();
        for octet in text {
            let length = usize::from(LENGTHS[usize::from(*octet)]);
            let row = &rows[length];
            let place = (0..row.count).find(|place| symbols[(row.offset + place) as usize] == *octet);
            let code = row.first + place.expect("each octet has a code");
            bits.push_str(&format!("{code:0length$b}"));
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        let octets = bits.as_bytes().chunks(8);
        let octet = |chunk: &[u8]| chunk.iter().fold(0, |octet, bit| octet << 1 | (bit & 1));
        octets.map(octet).collect()
    }

    #[test]
    fn whatever_stands_beside_an_octet_it_is_read() {
        for first in 0..=255 {
            for second in 0..=255 {
                for text in [vec![first], vec![first, second], vec![b'a', first, second, first]] {
                    let mut out = Vec::new();
                    assert_eq!(decode(&encode(&text), &mut out), Ok(()), "{text:?}");
                    assert_eq!(out, text);
                }
            }
        }
    }
}
