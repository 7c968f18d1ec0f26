//! The kernel's type information, damaged in any way: an offset, or an error, and no endless walk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebalancer_core::binary::btf::Btf;

fuzz_target!(|data: &[u8]| {
    if let Ok(btf) = Btf::parse(data) {
        for structure in ["outer", "sock", ""] {
            for member in ["a", "c", "sk_num", ""] {
                let first = btf.offset(structure, member);
                assert_eq!(first, btf.offset(structure, member));
            }
        }
    }
});
