//! Why the kernel refuses programs, in words that name the true cause.
//!
//! Input: what it said, and how this machine and process are. Output: what to do about it.
//! Must never name a cause that is not there.

use std::{fs, path::Path};

use crate::sys;

/// How the kernel is locked down (kernel_lockdown(7)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lockdown {
    /// Not, or the kernel cannot be.
    None,
    /// Nothing may be changed.
    Integrity,
    /// Nor read.
    Confidentiality,
    /// Nobody tells: securityfs is not mounted.
    Unknown,
}

impl Lockdown {
    /// This machine's.
    pub fn here() -> Self {
        Self::at(Path::new("/sys/kernel/security"))
    }

    fn at(securityfs: &Path) -> Self {
        let Ok(text) = fs::read_to_string(securityfs.join("lockdown")) else {
            // Mounted, and without the file: the kernel has no lockdown.
            let is_mounted = fs::read_dir(securityfs).is_ok_and(|mut entries| entries.next().is_some());
            return if is_mounted { Self::None } else { Self::Unknown };
        };
        let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        match chosen.map(|(chosen, _)| chosen) {
            Some("integrity") => Self::Integrity,
            Some("confidentiality") => Self::Confidentiality,
            Some("none") => Self::None,
            _ => Self::Unknown,
        }
    }

    /// In words.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Integrity => "integrity",
            Self::Confidentiality => "confidentiality",
            Self::Unknown => "unknown: securityfs is not mounted at /sys/kernel/security",
        }
    }
}

/// What of machine and process can be in the way of kernel programs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Circumstances {
    lockdown: Lockdown,
    /// Capabilities that are missing.
    missing: Vec<&'static str>,
    selinux: bool,
    seccomp: bool,
    /// `RLIMIT_MEMLOCK` in octets, where it counts: before Linux 5.11 maps were charged to it.
    memlock: Option<u64>,
    /// `kernel.perf_event_paranoid`, where it counts: for probes, above 2, which is Debian's and Ubuntu's own, and asks
    /// for CAP_SYS_ADMIN.
    paranoid: Option<i64>,
}

impl Circumstances {
    fn here() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let mask = field("CapEff:").and_then(|mask| u64::from_str_radix(mask, 16).ok());
        // CAP_SYS_ADMIN stands for the first two (capabilities(7)).
        let has = |bit: u32| mask.is_none_or(|mask| mask >> bit & 1 == 1);
        let missing = [
            ("CAP_BPF", 39, true),
            ("CAP_PERFMON", 38, true),
            ("CAP_NET_ADMIN", 12, false),
        ]
        .into_iter()
        .filter(|(_, bit, admin)| !(has(*bit) || *admin && has(21)))
        .map(|(name, ..)| name)
        .collect();
        let release = sys::release();
        Self {
            lockdown: Lockdown::here(),
            missing,
            selinux: fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|text| text.trim() == "1"),
            seccomp: field("Seccomp:") == Some("2"),
            memlock: is_before_5_11(&release).then(memlock).flatten(),
            paranoid: (!has(21)).then(paranoid).flatten(),
        }
    }

    /// What to do, or nothing when none of this can be the cause.
    fn hint(&self, why: &str) -> String {
        let says = |words: &[&str]| words.iter().any(|word| why.contains(word));
        let is_denied = says(&[
            "EPERM",
            "EACCES",
            "not permitted",
            "ermission denied",
            "os error 1)",
            "os error 13)",
        ]);
        let cannot_read = says(&["cannot use helper", "unknown func", "probe_read"]);
        if cannot_read && self.lockdown == Lockdown::Confidentiality {
            return "; the kernel is locked down (confidentiality), which takes this helper away: boot it with \
                    lockdown=integrity"
                .to_owned();
        }
        if !is_denied {
            return String::new();
        }
        if !self.missing.is_empty() {
            return format!(
                "; the process lacks {}: add them, or run as root",
                self.missing.join(", ")
            );
        }
        let mut causes = Vec::new();
        match self.lockdown {
            Lockdown::Confidentiality => causes.push("the kernel is locked down (confidentiality)".to_owned()),
            Lockdown::Unknown => causes
                .push("the kernel may be locked down (securityfs is not mounted, so that nobody can tell)".to_owned()),
            Lockdown::None | Lockdown::Integrity => {}
        }
        if let Some(octets) = self.memlock {
            causes.push(format!(
                "this kernel charges maps to the memory that may be locked, {octets} octets: raise `ulimit -l` (LimitMEMLOCK=)"
            ));
        }
        if let Some(level) = self.paranoid {
            causes.push(format!(
                "kernel.perf_event_paranoid is {level}, and above 2 this kernel may ask for CAP_SYS_ADMIN: set it to 2, or \
                 add the capability"
            ));
        }
        if self.selinux {
            causes.push("SELinux is enforcing: its log (ausearch -m avc) says whether it was that".to_owned());
        }
        if self.seccomp {
            causes.push("a seccomp filter is on: it must let bpf(2) and perf_event_open(2) pass".to_owned());
        }
        if causes.is_empty() {
            return "; the process has the capabilities it needs: a container's user namespace, or a security module \
                    forbids it"
                .to_owned();
        }
        format!("; {}", causes.join("; or "))
    }
}

/// What to do about a refusal of a program that counts: no such program is a perf event.
pub fn hint(why: &str) -> String {
    let circumstances = Circumstances {
        paranoid: None,
        ..Circumstances::here()
    };
    circumstances.hint(why)
}

/// What to do about a refusal of a probe, which is a perf event (perf_event_open(2)).
pub fn probe_hint(why: &str) -> String {
    Circumstances::here().hint(why)
}

/// The level, where it is above what Linux itself knows.
fn paranoid() -> Option<i64> {
    let text = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").ok()?;
    text.trim().parse().ok().filter(|level| *level > 2)
}

fn is_before_5_11(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) < (5, 11),
        _ => false,
    }
}

/// The limit, where there is one.
fn memlock() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to an rlimit that lives through the call.
    let failed = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0;
    (!failed && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Circumstances {
        Circumstances {
            lockdown: Lockdown::None,
            missing: Vec::new(),
            selinux: false,
            seccomp: false,
            memlock: None,
            paranoid: None,
        }
    }

    #[test]
    fn the_cause_that_is_there_is_named_and_no_other() {
        let denied = "Operation not permitted (os error 1)";
        let cases = [
            (nothing(), denied, "security module"),
            (
                Circumstances {
                    missing: vec!["CAP_BPF"],
                    selinux: true,
                    ..nothing()
                },
                denied,
                "lacks CAP_BPF",
            ),
            (
                Circumstances {
                    selinux: true,
                    ..nothing()
                },
                denied,
                "SELinux",
            ),
            (
                Circumstances {
                    seccomp: true,
                    ..nothing()
                },
                denied,
                "seccomp",
            ),
            (
                Circumstances {
                    memlock: Some(65_536),
                    ..nothing()
                },
                denied,
                "65536 octets",
            ),
            (
                Circumstances {
                    paranoid: Some(3),
                    ..nothing()
                },
                "`perf_event_open` failed: Permission denied (os error 13)",
                "perf_event_paranoid is 3",
            ),
            (
                Circumstances {
                    lockdown: Lockdown::Unknown,
                    ..nothing()
                },
                denied,
                "may be locked down",
            ),
            (
                Circumstances {
                    lockdown: Lockdown::Confidentiality,
                    ..nothing()
                },
                "cannot use helper bpf_probe_read#4: Invalid argument (os error 22)",
                "lockdown=integrity",
            ),
        ];
        let words = [
            "security module",
            "lacks",
            "SELinux",
            "seccomp",
            "octets",
            "perf_event_paranoid",
            "locked down",
        ];
        for (circumstances, why, named) in cases {
            let said = circumstances.hint(why);
            assert!(said.contains(named), "{said}");
            let of = words.iter().filter(|word| said.contains(**word)).count();
            assert_eq!(of, 1, "{said}");
        }
        // A verifier's answer has nothing to do with any of these.
        let all = Circumstances {
            selinux: true,
            seccomp: true,
            missing: vec!["CAP_BPF"],
            ..nothing()
        };
        assert_eq!(
            all.hint("R1 invalid mem access 'scalar': Invalid argument (os error 22)"),
            ""
        );
    }

    #[test]
    fn a_lockdown_that_nobody_tells_is_unknown() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(Lockdown::at(&directory.path().join("nowhere")), Lockdown::Unknown);
        assert_eq!(
            Lockdown::at(directory.path()),
            Lockdown::Unknown,
            "an empty mount point"
        );
        fs::write(directory.path().join("lsm"), "capability").expect("a file");
        assert_eq!(Lockdown::at(directory.path()), Lockdown::None);
        for (text, expected) in [
            ("[none] integrity confidentiality\n", Lockdown::None),
            ("none [integrity] confidentiality\n", Lockdown::Integrity),
            ("none integrity [confidentiality]\n", Lockdown::Confidentiality),
        ] {
            fs::write(directory.path().join("lockdown"), text).expect("a file");
            assert_eq!(Lockdown::at(directory.path()), expected);
        }
    }

    #[test]
    fn releases_are_compared_by_number() {
        for (release, before) in [
            ("5.10.0-46-amd64", true),
            ("5.11.0", false),
            ("6.1.0", false),
            ("4.18.0-553.el8", true),
        ] {
            assert_eq!(is_before_5_11(release), before, "{release}");
        }
    }
}
