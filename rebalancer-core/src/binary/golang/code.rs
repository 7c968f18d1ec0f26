//! The instructions a goaway decider must have to be taken for one.
//!
//! At a function's entry the register calling convention has its receiver, its request and its return address where the
//! probe looks for them; that holds where a function begins with Go's stack check, and the check is not passed yet.

use super::Architecture;

/// How far the load of the closure is from the frame's beginning at most.
const NEAR: usize = 64;

/// How many octets an error shows.
const SHOWN: usize = 32;

/// Checks a function's code; the error names what is missing.
pub fn check(architecture: Architecture, code: &[u8]) -> Result<(), &'static str> {
    match architecture {
        Architecture::X86_64 => x86_64(code),
        Architecture::Aarch64 => aarch64(code),
    }
}

/// The first octets, for an error.
pub fn hexadecimal(code: &[u8]) -> String {
    let shown: Vec<String> = code.iter().take(SHOWN).map(|octet| format!("{octet:02x}")).collect();
    shown.join(" ")
}

fn x86_64(code: &[u8]) -> Result<(), &'static str> {
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
    // mov 8(%rax),%rdx: the receiver is the first argument, and calls the closure it has at 8.
    if !near(rest).windows(4).any(|window| window == [0x48, 0x8b, 0x50, 0x08]) {
        return Err("the load of p.next");
    }
    Ok(())
}

fn aarch64(code: &[u8]) -> Result<(), &'static str> {
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
    // ldr x26,[x0,#8]: the receiver is the first argument, and calls the closure it has at 8.
    if !rest.contains(&0xf940_041a) {
        return Err("the load of p.next");
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
