//! The instructions a goaway decider must have to be taken for one.
//!
//! At a function's entry the register calling convention has its receiver, its request and its return address where the
//! probe looks for them; that holds where a function begins with Go's stack check, and the check is not passed yet.

use super::{Architecture, RequestLayout};

/// How far the comparison of the protocol is from the function's beginning at most.
const NEAR: usize = 64;

/// How many octets an error shows.
const SHOWN: usize = 32;

/// Checks a function's code; the error names what is missing.
pub fn check(architecture: Architecture, code: &[u8], layout: &RequestLayout) -> Result<(), &'static str> {
    match architecture {
        Architecture::X86_64 => x86_64(code, layout),
        Architecture::Aarch64 => aarch64(code, layout),
    }
}

/// The first octets, for an error.
pub fn hexadecimal(code: &[u8]) -> String {
    let shown: Vec<String> = code.iter().take(SHOWN).map(|octet| format!("{octet:02x}")).collect();
    shown.join(" ")
}

fn x86_64(code: &[u8], layout: &RequestLayout) -> Result<(), &'static str> {
    // cmp 0x10(%r14),%rsp; jbe, near or far.
    let rest = match code {
        [0x49, 0x3b, 0x66, 0x10, 0x76, _, rest @ ..] => rest,
        [0x49, 0x3b, 0x66, 0x10, 0x0f, 0x86, _, _, _, _, rest @ ..] => rest,
        _ => return Err("Go's stack check"),
    };
    // push %rbp; mov %rsp,%rbp, or as until Go 1.20 sub $…,%rsp; mov %rbp,…(%rsp).
    if !matches!(
        rest,
        [0x55, 0x48, 0x89, 0xe5, ..] | [0x48, 0x83, 0xec, _, 0x48, 0x89, 0x2c | 0x6c, 0x24, ..]
    ) {
        return Err("the frame of a function that calls");
    }
    // cmpq $8,length_of_proto(%rbx): the request is the second argument, and its protocol is where it is expected.
    let length = u8::try_from(layout.proto + 8).map_err(|_| "a short offset")?;
    let compare = [0x48, 0x83, 0x7b, length, 8];
    if !near(rest).windows(compare.len()).any(|window| window == compare) {
        return Err("the comparison of the length of r.Proto with 8");
    }
    // movabs $"HTTP/2.0", any register.
    if !near(rest).windows(8).any(|window| window == b"HTTP/2.0") {
        return Err("the text HTTP/2.0");
    }
    Ok(())
}

fn aarch64(code: &[u8], layout: &RequestLayout) -> Result<(), &'static str> {
    let (words, _) = code.as_chunks::<4>();
    let words: Vec<u32> = words
        .iter()
        .take(NEAR / 4)
        .map(|word| u32::from_le_bytes(*word))
        .collect();
    // ldr x16,[x28,#16]; cmp sp,x16, or as until Go 1.18 mov x17,sp; cmp x17,x16; b.ls
    let rest = match words[..] {
        [0xf940_0b90, 0xeb30_63ff, branch, ref rest @ ..] if is_branch(branch) => rest,
        [0xf940_0b90, 0x9100_03f1, 0xeb10_023f, branch, ref rest @ ..] if is_branch(branch) => rest,
        _ => return Err("Go's stack check"),
    };
    // str x30,[sp,#-…]!
    if !matches!(rest, [first, ..] if first & 0xffe0_0fff == 0xf800_0ffe) {
        return Err("the frame of a function that calls");
    }
    // ldp x?,x?,[x1,#proto]: the request is the second argument, and its protocol is where it is expected; or the
    // length alone, ldr x?,[x1,#proto+8].
    let pair = 0xa940_0020 | (layout.proto / 8) << 15;
    let single = 0xf940_0020 | ((layout.proto + 8) / 8) << 10;
    let reads = |word: &u32| word & 0xffff_83e0 == pair || word & 0xffff_ffe0 == single;
    if !rest.iter().any(reads) {
        return Err("the load of r.Proto");
    }
    Ok(())
}

fn near(code: &[u8]) -> &[u8] {
    &code[..code.len().min(NEAR)]
}

/// b.ls
fn is_branch(word: u32) -> bool {
    word & 0xff00_001f == 0x5400_0009
}
