//! The ABI of the program that answers an apiserver's own goaway decision, and the reading of a client's address.
//!
//! The kernel program and its tests run the same [`parse`]: it is total, allocates nothing, and loops a bounded number
//! of times over scalars only, so that the verifier is done with it quickly.

/// Index into the map `ANSWERED`: how often the function was entered.
pub const ANSWER_HITS: u32 = 0;
/// Index into the map `ANSWERED`: answered yes.
pub const ANSWER_YES: u32 = 1;
/// Index into the map `ANSWERED`: answered no.
pub const ANSWER_NO: u32 = 2;
/// Index into the map `ANSWERED`: the return address could not be read, so the function itself ran.
pub const ANSWER_LEFT: u32 = 3;
/// Index into the map `ANSWERED`: the request could not be read; answered no.
pub const ANSWER_UNREADABLE: u32 = 4;
/// Index into the map `ANSWERED`: its client's address is no address; answered no.
pub const ANSWER_NO_ADDRESS: u32 = 5;
/// Index into the map `ANSWERED`: the victim's plan had expired; answered no.
pub const ANSWER_EXPIRED: u32 = 6;
/// Index into the map `ANSWERED`: the request is not one over HTTP/2, for which the apiserver does not ask; answered no.
pub const ANSWER_NOT_H2: u32 = 7;
/// How many counters the map `ANSWERED` has.
pub const ANSWERS: u32 = 8;

/// How many victims there may be at once.
pub const VICTIMS: u32 = 65_536;
/// How many connections' requests are counted; beyond that the longest silent ones are forgotten.
pub const COUNTED: u32 = 32_768;

/// Room for a client's address as text: `[`, 39 octets of IPv6, `%` and 15 of a zone, `]`, `:` and a port make 63.
pub const TEXT_OCTETS: usize = 64;

/// A client's address and port; IPv4 is v4-mapped, a zone is left away.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientKey {
    /// The address.
    pub address: [u8; 16],
    /// The port, host order.
    pub port: u32,
}

/// A connection that is to hear GOAWAY at its next request.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Of the plan.
    pub generation: u64,
    /// CLOCK_MONOTONIC, nanoseconds: not to be told for the first time later than this.
    pub expires_ns: u64,
    /// How often it was answered yes.
    pub told: u64,
}

/// Where members of `net/http.Request` lie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestOffsets {
    /// `Proto`
    pub proto: u32,
    /// `RemoteAddr`
    pub remote_address: u32,
}

const _: () = {
    assert!(size_of::<ClientKey>() == 20);
    assert!(size_of::<Victim>() == 24);
    assert!(size_of::<RequestOffsets>() == 8);
};

/// Where the reader is in the text.
const IN_ADDRESS: u32 = 0;
const IN_ZONE: u32 = 1;
const BEFORE_COLON: u32 = 2;
const IN_PORT: u32 = 3;

/// Reads `ADDRESS:PORT` as Go writes a TCP peer's address: IPv4, `[IPv6]`, `[IPv6%zone]`; v4-mapped IPv6 is IPv4.
///
/// `None` for anything else.
#[inline(always)]
pub fn parse(text: &[u8; TEXT_OCTETS], length: u32) -> Option<ClientKey> {
    let bracketed = text[0] == b'[';
    let mut address = Reader::default();
    let mut place = IN_ADDRESS;
    let (mut port, mut port_digits) = (0_u32, 0_u32);
    let mut index = 0;
    while index < TEXT_OCTETS {
        if index as u32 >= length {
            break;
        }
        let octet = text[index];
        index += 1;
        if place == IN_ADDRESS {
            match octet {
                b'[' if index == 1 => {}
                b']' if bracketed => place = BEFORE_COLON,
                b'%' if bracketed => place = IN_ZONE,
                b':' if !bracketed => place = IN_PORT,
                b':' => address.colon()?,
                b'.' => address.dot()?,
                _ => address.digit(octet, bracketed)?,
            }
        } else if place == IN_PORT {
            let digit = u32::from(octet.wrapping_sub(b'0'));
            port = port * 10 + digit;
            port_digits += 1;
            if digit > 9 || port > 0xffff {
                return None;
            }
        } else if place == IN_ZONE {
            if octet == b']' {
                place = BEFORE_COLON;
            }
        } else if octet == b':' {
            place = IN_PORT;
        } else {
            return None;
        }
    }
    if place != IN_PORT || port_digits == 0 {
        return None;
    }
    let (high, low) = address.finish(bracketed)?;
    let (high, low) = (high.to_be_bytes(), low.to_be_bytes());
    Some(ClientKey {
        address: [
            high[0], high[1], high[2], high[3], high[4], high[5], high[6], high[7], low[0], low[1], low[2], low[3],
            low[4], low[5], low[6], low[7],
        ],
        port,
    })
}

/// What was read of an address so far. Scalars only: an index into an array would cost the verifier dearly.
#[derive(Clone, Copy, Default)]
struct Reader {
    /// The groups so far, or those since `::`, 128 bits.
    high: u64,
    low: u64,
    groups: u32,
    /// Those before `::`.
    high_before: u64,
    low_before: u64,
    groups_before: u32,
    compressed: bool,
    /// The last octet was a colon.
    after_colon: bool,
    /// The current group, read both ways.
    hexadecimal: u32,
    decimal: u32,
    digits: u32,
    /// Whether a letter was among its digits.
    letters: bool,
    /// The decimal numbers before dots.
    quad: u32,
    dots: u32,
}

impl Reader {
    #[inline(always)]
    fn digit(&mut self, octet: u8, letters: bool) -> Option<()> {
        let decimal = u32::from(octet.wrapping_sub(b'0'));
        let letter = u32::from((octet | 0x20).wrapping_sub(b'a'));
        let value = if decimal <= 9 {
            decimal
        } else if letters && letter <= 5 {
            self.letters = true;
            letter + 10
        } else {
            return None;
        };
        self.hexadecimal = self.hexadecimal << 4 | value;
        self.decimal = self.decimal * 10 + value;
        self.digits += 1;
        self.after_colon = false;
        (self.digits <= 4).then_some(())
    }

    #[inline(always)]
    fn dot(&mut self) -> Option<()> {
        self.number()?;
        self.dots += 1;
        self.begin_group();
        (self.dots <= 3).then_some(())
    }

    /// Ends a decimal number of a dotted quad.
    #[inline(always)]
    fn number(&mut self) -> Option<()> {
        let shortest = match self.digits {
            1 => 0,
            2 => 10,
            3 => 100,
            _ => return None,
        };
        if self.letters || self.decimal > 255 || self.decimal < shortest {
            return None;
        }
        self.quad = self.quad << 8 | self.decimal;
        Some(())
    }

    #[inline(always)]
    fn colon(&mut self) -> Option<()> {
        if self.dots != 0 {
            return None;
        }
        if self.digits != 0 {
            self.end_group();
        } else if self.after_colon {
            if self.compressed {
                return None;
            }
            self.compressed = true;
            self.high_before = self.high;
            self.low_before = self.low;
            self.groups_before = self.groups;
            self.high = 0;
            self.low = 0;
            self.groups = 0;
            // A third colon is none of these.
            self.after_colon = false;
            return Some(());
        } else if self.groups != 0 || self.compressed {
            return None;
        }
        self.after_colon = true;
        Some(())
    }

    #[inline(always)]
    fn end_group(&mut self) {
        self.high = self.high << 16 | self.low >> 48;
        self.low = self.low << 16 | u64::from(self.hexadecimal);
        self.groups += 1;
        self.begin_group();
    }

    #[inline(always)]
    fn begin_group(&mut self) {
        self.hexadecimal = 0;
        self.decimal = 0;
        self.digits = 0;
        self.letters = false;
    }

    /// The address in two halves.
    #[inline(always)]
    fn finish(mut self, bracketed: bool) -> Option<(u64, u64)> {
        if !bracketed {
            self.number()?;
            return (self.dots == 3).then_some((0, 0xffff_0000_0000 | u64::from(self.quad)));
        }
        if self.after_colon {
            return None;
        }
        if self.dots != 0 {
            self.number()?;
            if self.dots != 3 {
                return None;
            }
            self.high = self.high << 32 | self.low >> 32;
            self.low = self.low << 32 | u64::from(self.quad);
            self.groups += 2;
        } else if self.digits != 0 {
            self.end_group();
        }
        if !self.compressed {
            return (self.groups == 8).then_some((self.high, self.low));
        }
        if self.groups_before + self.groups > 7 {
            return None;
        }
        // At least one group is left out: the shift is by 16 to 128 bits, and by 128 only when there is nothing to shift.
        let shift = 128 - 16 * self.groups_before;
        let (high, low) = if shift >= 128 {
            (0, 0)
        } else if shift >= 64 {
            (self.low_before << (shift - 64), 0)
        } else {
            (
                self.high_before << shift | self.low_before >> (64 - shift),
                self.low_before << shift,
            )
        };
        Some((self.high | high, self.low | low))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{
        format,
        net::{IpAddr, SocketAddr},
        string::{String, ToString as _},
    };

    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Option<ClientKey> {
        let mut octets = [0; TEXT_OCTETS];
        octets.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        parse(&octets, text.len() as u32)
    }

    fn key(address: SocketAddr) -> ClientKey {
        let octets = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        ClientKey {
            address: octets,
            port: u32::from(address.port()),
        }
    }

    fn parsed(text: &str) -> Option<ClientKey> {
        text.parse().ok().map(key)
    }

    #[test]
    fn addresses_are_read_as_go_writes_them() {
        for (text, same_as) in [
            ("192.0.2.7:45678", "192.0.2.7:45678"),
            ("0.0.0.0:0", "0.0.0.0:0"),
            ("255.255.255.255:65535", "255.255.255.255:65535"),
            ("[::1]:6443", "[::1]:6443"),
            ("[::]:1", "[::]:1"),
            ("[2001:db8::]:1", "[2001:db8::]:1"),
            ("[2001:db8::8:800:200c:417a]:443", "[2001:db8::8:800:200c:417a]:443"),
            ("[1:2:3:4:5:6:7:8]:443", "[1:2:3:4:5:6:7:8]:443"),
            ("[1:2:3:4:5:6:7::]:443", "[1:2:3:4:5:6:7:0]:443"),
            ("[fe80::1%eth0]:443", "[fe80::1]:443"),
            ("[fe80::1%a.b:c]:443", "[fe80::1]:443"),
            ("[::ffff:192.0.2.7]:45678", "192.0.2.7:45678"),
            ("[::ffff:c000:207]:45678", "192.0.2.7:45678"),
            ("[FE80::ABCD]:1", "[fe80::abcd]:1"),
        ] {
            assert!(read(text).is_some(), "{text}");
            assert_eq!(read(text), parsed(same_as), "{text}");
        }
        let longest = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff%abcdefghijklmno]:65535";
        assert_eq!(longest.len(), TEXT_OCTETS - 1);
        assert!(read(longest).is_some());
    }

    #[test]
    fn what_is_no_address_is_none() {
        for text in [
            "",
            ":",
            "@",
            "[",
            "[]",
            "[]:1",
            "1.2.3:4",
            "1.2.3.4",
            "1.2.3.4:",
            "1.2.3.4.5:6",
            "256.1.1.1:1",
            "01.2.3.4:1",
            "1.2.3.4:65536",
            "1.2.3.4:99999999999",
            "1.2.3.4:5a",
            "a.2.3.4:5",
            "::1:5",
            "[1::2::3]:4",
            "[:::]:1",
            "[:1]:2",
            "[1:]:2",
            "[1:2]:3",
            "[1:2:3:4:5:6:7:8:9]:1",
            "[12345::]:1",
            "[::1]6443",
            "[::1]",
            "[::1%eth0:1",
            "[::1.2.3]:4",
            "[1.2.3.4]:5",
            "[::1.2.3.4:5]:6",
            "/run/socket",
            "pipe",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_address_is_read(octets in any::<[u8; 16]>(), zeros in any::<u16>(), v4 in any::<bool>(), port in any::<u16>()) {
            let mut octets = octets;
            for (index, octet) in octets.iter_mut().enumerate() {
                if zeros >> index & 1 == 1 {
                    *octet = 0;
                }
            }
            let ip = if v4 {
                IpAddr::from([octets[0], octets[1], octets[2], octets[3]])
            } else {
                IpAddr::from(octets)
            };
            let address = SocketAddr::new(ip, port);
            prop_assert_eq!(read(&address.to_string()), Some(key(address)));
        }

        /// Neither panics nor finds an address where the standard library finds none.
        #[test]
        fn only_addresses_are_read(text in "[\\[\\]0-9a-f:.%]{0,63}|\\[[0-9a-f:]{0,40}\\]:[0-9]{1,5}") {
            let text: String = text;
            let without_zone = match (text.find('%'), text.rfind(']')) {
                (Some(begin), Some(end)) if begin < end => format!("{}{}", &text[..begin], &text[end..]),
                _ => text.clone(),
            };
            if let Some(found) = read(&text) {
                prop_assert_eq!(Some(found), parsed(&without_zone));
            }
        }
    }
}
