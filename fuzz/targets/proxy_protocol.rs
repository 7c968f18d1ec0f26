//! The first octets of a load balancer's connection: a header within its bound, more wanted, or a refusal; and a header
//! stays the same whatever follows it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebalancer_core::wire::proxy_protocol::{MAX_HEADER, parse};

fuzz_target!(|data: &[u8]| {
    match parse(data) {
        Ok(Some(header)) => {
            assert!(header.length <= data.len() && header.length <= MAX_HEADER);
            assert_eq!(parse(&data[..header.length]), Ok(Some(header)));
            assert_eq!(parse(&[data, b"\x16\x03\x01"].concat()), Ok(Some(header)));
            for end in 0..header.length {
                assert_eq!(parse(&data[..end]), Ok(None), "it is not whole before its end");
            }
        }
        Ok(None) => assert!(data.len() < MAX_HEADER),
        Err(error) => assert_eq!(
            parse(&[data, b"\r\n"].concat()),
            Err(error),
            "nothing that follows mends it"
        ),
    }
});
