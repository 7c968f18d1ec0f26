//! Go's build information (debug/buildinfo): which release built the binary, from which modules.

use super::{Refusal, image::Image};
use crate::release::Release;

const MAGIC: &[u8] = b"\xff Go buildinf:";
/// Magic number, size of a pointer, flags, and padding to 32 octets.
const HEADER: usize = 32;
/// Flag: the strings follow the header (since Go 1.18).
const INLINE: u8 = 2;
/// The module list is between two of these of 16 octets (runtime/debug.ReadBuildInfo).
const SENTINEL: usize = 16;

/// A release of Go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoVersion {
    /// As the binary says it, `go1.26.8`.
    pub text: String,
    /// The number after `go1.`; `None` for development versions.
    pub minor: Option<u32>,
}

impl GoVersion {
    fn new(text: &str) -> Self {
        let minor = text.strip_prefix("go1.").and_then(|rest| {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            rest[..digits].parse().ok()
        });
        Self {
            text: text.to_owned(),
            minor,
        }
    }

    /// Whether its binaries are understood. `GOEXPERIMENT=noregabi…` passed arguments on the stack.
    pub(super) fn is_known(&self) -> bool {
        self.minor.is_some_and(|minor| super::KNOWN_MINORS.contains(&minor)) && !self.text.contains("noregabi")
    }
}

/// What a binary says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildInfo {
    /// Of Go.
    pub version: GoVersion,
    /// The main package's path, where modules were used.
    pub main: Option<String>,
    /// The version of k8s.io/apiserver it is built on, where the module list says so.
    pub apiserver: Option<String>,
    /// The linker's name for this very build (`.note.go.buildid`), where it was given one.
    pub id: Option<String>,
    /// The profile that guided the compiler (`-pgo`), where one did.
    pub profile: Option<String>,
}

impl BuildInfo {
    /// Which release of Kubernetes it is: by its modules, or else by what no other build has in common with it.
    pub fn release(&self) -> Option<Release> {
        let named = self.apiserver.as_deref().and_then(Release::of_module);
        let content = self.id.as_deref().and_then(|id| id.rsplit('/').next());
        named.or_else(|| Release::of_build(content?))
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotGo`].
    pub(super) fn read(image: &Image<'_>) -> Result<Self, Refusal> {
        let section = image.section(&[b".go.buildinfo"]).ok_or(Refusal::NotGo)?;
        let header = section.bytes.get(..HEADER).ok_or(Refusal::NotGo)?;
        if !header.starts_with(MAGIC) || header[MAGIC.len() + 1] & INLINE == 0 {
            return Err(Refusal::NotGo);
        }
        let malformed = Refusal::Malformed {
            what: "build information",
        };
        let (version, rest) = text(&section.bytes[HEADER..]).ok_or(malformed.clone())?;
        let (modules, _) = text(rest).ok_or(malformed)?;
        let modules = modules
            .get(SENTINEL..modules.len().saturating_sub(SENTINEL))
            .unwrap_or_default();
        let modules = String::from_utf8_lossy(modules);
        let main = modules.lines().find_map(|line| line.strip_prefix("path\t"));
        Ok(Self {
            version: GoVersion::new(&String::from_utf8_lossy(version)),
            main: main.map(str::to_owned),
            apiserver: module(&modules, "k8s.io/apiserver"),
            id: image
                .section(&[b".note.go.buildid"])
                .and_then(|note| build_id(note.bytes)),
            profile: setting(&modules, "-pgo").filter(|profile| profile != "off"),
        })
    }
}

/// The longest build ID that is taken, in octets: Go's has four digests, 83 octets.
const LONGEST_ID: usize = 128;

/// The text of the note: lengths of name and text, type, the name `Go` with its padding (cmd/internal/buildid).
fn build_id(note: &[u8]) -> Option<String> {
    let length = u32::from_le_bytes(note.get(4..8)?.try_into().ok()?) as usize;
    let is_it = note.get(12..16) == Some(b"Go\0\0") && (1..=LONGEST_ID).contains(&length);
    let text = note.get(16..)?.get(..length).filter(|_| is_it)?;
    text.is_ascii().then(|| String::from_utf8_lossy(text).into_owned())
}

/// The version of a module in the list; that of its replacement, where it is replaced.
fn module(list: &str, wanted: &str) -> Option<String> {
    let mut lines = list.lines().skip_while(|line| {
        let mut words = line.split('\t');
        !matches!(words.next(), Some("dep" | "mod")) || words.next() != Some(wanted)
    });
    let own = lines.next()?.split('\t').nth(2)?;
    let replacement = lines.next().and_then(|line| line.strip_prefix("=>\t"));
    let version = replacement.and_then(|line| line.split('\t').nth(1)).unwrap_or(own);
    (!version.is_empty()).then(|| version.to_owned())
}

/// A setting of the build (`build\tKEY=VALUE`, runtime/debug.BuildInfo.String); quoted where it has odd characters.
fn setting(list: &str, key: &str) -> Option<String> {
    list.lines().find_map(|line| {
        let (own, value) = line.strip_prefix("build\t")?.split_once('=')?;
        let is_it = own.trim_matches(['"', '`']) == key && !value.is_empty();
        is_it.then(|| value.trim_matches(['"', '`']).to_owned())
    })
}

/// A string with its length before it, and what follows it.
fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut length = 0_u64;
    for (index, octet) in bytes.iter().enumerate().take(9) {
        length |= u64::from(octet & 0x7f) << (7 * index);
        if octet & 0x80 == 0 {
            let length = usize::try_from(length).ok()?;
            return bytes.get(index + 1..)?.split_at_checked(length);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_only_known_ones_are_known() {
        for (text, minor, known) in [
            ("go1.18", Some(18), true),
            ("go1.26.8", Some(26), true),
            ("go1.27rc1", Some(27), true),
            ("go1.24.4 X:boringcrypto", Some(24), true),
            ("go1.22.9 (Red Hat 1.22.9-2.el9)", Some(22), true),
            ("go1.18 X:noregabiwrappers", Some(18), false),
            ("go1.17.13", Some(17), false),
            ("go1.28", Some(28), false),
            ("go1.", None, false),
            ("devel go1.27-0123abcd", None, false),
            ("", None, false),
        ] {
            let version = GoVersion::new(text);
            assert_eq!((version.minor, version.is_known()), (minor, known), "{text}");
        }
    }

    #[test]
    fn a_replaced_module_has_its_replacements_version() {
        let list = "path\tk8s.io/kubernetes/cmd/kube-apiserver\nmod\tk8s.io/kubernetes\tv1.36.2\t\n\
                    dep\tk8s.io/apimachinery\tv0.36.1\th1:x=\ndep\tk8s.io/apiserver\tv0.0.0\n=>\tk8s.io/apiserver\tv0.36.2\th1:y=\n";
        assert_eq!(module(list, "k8s.io/apiserver").as_deref(), Some("v0.36.2"));
        assert_eq!(module(list, "k8s.io/apimachinery").as_deref(), Some("v0.36.1"));
        assert_eq!(module(list, "k8s.io/kubernetes").as_deref(), Some("v1.36.2"));
        assert_eq!(module(list, "k8s.io"), None);
    }

    #[test]
    fn a_build_id_is_read_and_what_is_none_is_not() {
        let note = |length: u32, name: &[u8], text: &[u8]| {
            let head = [4_u32, length, 4].map(u32::to_le_bytes);
            [&head.concat()[..], name, text].concat()
        };
        assert_eq!(build_id(&note(5, b"Go\0\0", b"ab/cd\0\0\0")).as_deref(), Some("ab/cd"));
        for wrong in [
            note(0, b"Go\0\0", b"ab/cd"),
            note(9, b"Go\0\0", b"ab/cd"),
            note(u32::MAX, b"Go\0\0", b"ab/cd"),
            note(5, b"GNU\0", b"ab/cd"),
            note(2, b"Go\0\0", b"\xff\xfe"),
            vec![4, 0, 0],
        ] {
            assert_eq!(build_id(&wrong), None);
        }
    }

    #[test]
    fn settings_of_the_build_are_read() {
        let list = "path\tk8s.io/x\nbuild\t-buildmode=exe\nbuild\t-pgo=/a b/default.pgo\nbuild\tCGO_CFLAGS=\n";
        assert_eq!(setting(list, "-pgo").as_deref(), Some("/a b/default.pgo"));
        assert_eq!(setting(list, "CGO_CFLAGS"), None);
        assert_eq!(setting(list, "-pg"), None);
        assert_eq!(setting("dep\t-pgo=x\t1\n", "-pgo"), None);
    }
}
