//! What the programs that count need of a kernel, by the release that brought it.
//!
//! Output: words. Must never refuse anything by a number: distributions bring what they need to older kernels, so the
//! programs are tried, and only what was refused is explained.

use crate::sys;

/// Major and minor number.
pub type Release = (u32, u32);

/// How many things the programs use that came with some release.
const MANY: usize = 4;

/// What the programs use, in the order it came; type information with the kernel itself is older (5.4).
const fn needs(is_arm64: bool) -> [(Release, &'static str); MANY] {
    [
        ((5, 8), "ring buffers"),
        ((5, 9), "the list of TCP sockets for programs (iter/tcp)"),
        ((5, 12), "socket cookies in tracing programs (bpf_get_socket_cookie)"),
        // arch/arm64/net/bpf_jit_comp.c: until then the kernel takes such a program and cannot translate it (ENOTSUPP).
        (
            if is_arm64 { (5, 18) } else { (5, 12) },
            "atomic additions that answer (BPF_FETCH)",
        ),
    ]
}

const NEEDS: [(Release, &str); MANY] = needs(cfg!(target_arch = "aarch64"));

/// The oldest kernel that has it all by itself, on this processor.
pub const OLDEST: Release = NEEDS[MANY - 1].0;

/// The running kernel's release; `None` when it does not say one.
pub fn running() -> Option<Release> {
    parsed(&sys::release())
}

fn parsed(text: &str) -> Option<Release> {
    let mut numbers = text.trim().split(['.', '-', '+']).map(|part| part.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Why programs may be refused on this kernel, to be added to the kernel's own words; nothing where it is new enough.
pub fn hint() -> String {
    running().map_or_else(String::new, |release| explained(release, NEEDS))
}

fn explained(release: Release, needs: [(Release, &str); MANY]) -> String {
    let lacking: Vec<&str> = needs
        .iter()
        .filter(|(since, _)| *since > release)
        .map(|(_, what)| *what)
        .collect();
    if lacking.is_empty() {
        return String::new();
    }
    let ((major, minor), (oldest_major, oldest_minor)) = (release, needs[MANY - 1].0);
    format!(
        "; Linux {major}.{minor} by itself lacks {}: Linux {oldest_major}.{oldest_minor} or later has it, and --source \
         sockdiag counts without",
        lacking.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        for (text, release) in [
            ("6.18.15+deb13-cloud-amd64\n", Some((6, 18))),
            ("5.10.0-46-cloud-amd64", Some((5, 10))),
            ("4.18.0-553.el8_10.x86_64", Some((4, 18))),
            ("6.17-rc1", Some((6, 17))),
            ("7", None),
            ("", None),
        ] {
            assert_eq!(parsed(text), release, "{text}");
        }
    }

    #[test]
    fn what_an_older_kernel_lacks_is_named() {
        let explained = |release| super::explained(release, needs(false));
        assert_eq!(explained((5, 12)), "");
        assert_eq!(explained((7, 3)), "");
        let said = explained((5, 10));
        assert!(
            said.contains("Linux 5.10 by itself lacks socket cookies")
                && said.contains("additions that answer")
                && said.contains("Linux 5.12"),
            "{said}"
        );
        assert!(!said.contains("ring buffers"), "{said}");
        assert!(
            explained((4, 18)).contains("ring buffers, the list of TCP sockets"),
            "all of it"
        );
    }

    #[test]
    fn on_arm64_what_came_later_there_is_named() {
        let explained = |release| super::explained(release, needs(true));
        assert_eq!(explained((5, 18)), "");
        let said = explained((5, 15));
        assert!(
            said.contains("Linux 5.15 by itself lacks atomic additions") && said.contains("Linux 5.18"),
            "{said}"
        );
        assert!(!said.contains("cookies"), "{said}");
    }

    #[test]
    fn the_last_to_come_is_the_last_in_the_list() {
        for needs in [needs(false), needs(true)] {
            assert!(needs.is_sorted_by_key(|(since, _)| *since), "{needs:?}");
        }
    }
}
