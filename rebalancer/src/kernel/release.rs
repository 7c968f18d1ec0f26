//! What the programs that count need of a kernel, by the release that brought it.
//!
//! Output: words. Must never refuse anything by a number: distributions bring what they need to older kernels, so the
//! programs are tried, and only what was refused is explained.

use crate::sys;

/// Major and minor number.
pub type Release = (u32, u32);

/// What the programs use, in the order it came; type information with the kernel itself is older (5.4).
const NEEDS: [(Release, &str); 3] = [
    ((5, 8), "ring buffers"),
    ((5, 9), "the list of TCP sockets for programs (iter/tcp)"),
    ((5, 12), "socket cookies in tracing programs (bpf_get_socket_cookie)"),
];

/// The oldest kernel that has it all by itself.
pub const OLDEST: Release = NEEDS[NEEDS.len() - 1].0;

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
    running().map_or_else(String::new, explained)
}

fn explained(release: Release) -> String {
    let lacking: Vec<&str> = NEEDS
        .iter()
        .filter(|(since, _)| *since > release)
        .map(|(_, what)| *what)
        .collect();
    if lacking.is_empty() {
        return String::new();
    }
    let ((major, minor), (oldest_major, oldest_minor)) = (release, OLDEST);
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
        assert_eq!(explained((5, 12)), "");
        assert_eq!(explained((7, 3)), "");
        let said = explained((5, 10));
        assert!(
            said.contains("Linux 5.10 by itself lacks socket cookies") && said.contains("Linux 5.12"),
            "{said}"
        );
        assert!(!said.contains("ring buffers"), "{said}");
        assert!(
            explained((4, 18)).contains("ring buffers, the list of TCP sockets"),
            "all of it"
        );
    }
}
