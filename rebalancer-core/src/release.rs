//! Which release an apiserver is, as far as its shim can tell, to notice two that differ.
//!
//! Input: what the server or its binary says. Output: a [`Release`] of bounded length.
//! Must never take what cannot be compared for a difference: a version and a build's digest are of two kinds.

use std::fmt;

/// The longest text, in octets: Kubernetes' own are some twenty.
const LONGEST: usize = 64;

/// What a digest begins with, where it travels as text.
const BUILD: &str = "build:";

/// A release of an apiserver.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(String);

impl Release {
    /// What `/version` calls `gitVersion`, or what another agent says; `None` for what is empty, too long or unprintable.
    pub fn new(text: &str) -> Option<Self> {
        let is_fit = !text.is_empty() && text.len() <= LONGEST && text.bytes().all(|octet| octet.is_ascii_graphic());
        is_fit.then(|| Self(text.to_owned()))
    }

    /// A digest of a binary that names no version.
    pub fn of_build(digest: &str) -> Option<Self> {
        Self::new(&format!("{BUILD}{digest}"))
    }

    /// Kubernetes' version, of the version of its module k8s.io/apiserver: v0.36.2 is part of v1.36.2
    /// (kubernetes/staging, "Published modules"). A tree that was built as it is calls it v0.0.0, which says nothing.
    pub fn of_module(version: &str) -> Option<Self> {
        let rest = version.strip_prefix("v0.")?;
        (!rest.starts_with("0.0")).then(|| Self::new(&format!("v1.{rest}")))?
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is certain that the two are of different releases.
    pub fn differs(&self, other: &Self) -> bool {
        self.0.starts_with(BUILD) == other.0.starts_with(BUILD) && self.0 != other.0
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_of_one_kind_differs() {
        let release = |text| Release::new(text).expect("it is fit");
        for (one, other, differs) in [
            ("v1.36.2", "v1.36.2", false),
            ("v1.36.2", "v1.35.0+k3s1", true),
            ("build:00ff", "build:00fe", true),
            ("build:00ff", "v1.36.2", false),
        ] {
            assert_eq!(release(one).differs(&release(other)), differs, "{one} {other}");
        }
    }

    #[test]
    fn what_is_no_release_is_none() {
        for text in ["", "v1 36", "v1.36\n", "\u{e9}", &"v".repeat(LONGEST + 1)] {
            assert_eq!(Release::new(text), None, "{text:?}");
        }
        for (module, release) in [
            ("v0.36.2", Some("v1.36.2")),
            ("v0.37.0-alpha.1", Some("v1.37.0-alpha.1")),
            ("v0.0.0", None),
            ("v0.0.0-20260101000000-0123456789ab", None),
            ("(devel)", None),
        ] {
            assert_eq!(Release::of_module(module), release.and_then(Release::new), "{module}");
        }
    }
}
