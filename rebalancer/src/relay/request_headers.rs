//! The headers by which a front proxy tells the apiserver who asks, as kube-apiserver's `--requestheader-*` flags have
//! them (k8s.io/apiserver/pkg/authentication/request/headerrequest/requestheader.go).
//!
//! Input: the flags. Output: which names are written, which are taken from clients, and who may send them.
//! Must never write a name that is not taken from clients too.

use rebalancer_core::wire::rewrite::IdentityNames;

/// The flags' values; each list but the last has at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHeaders {
    /// `--requestheader-username-headers`.
    pub username: Vec<String>,
    /// `--requestheader-group-headers`.
    pub group: Vec<String>,
    /// `--requestheader-uid-headers`.
    pub uid: Vec<String>,
    /// `--requestheader-extra-headers-prefix`.
    pub extra_prefix: Vec<String>,
    /// `--requestheader-allowed-names`: common names of those who may name users; none means all.
    pub allowed_names: Vec<String>,
}

/// What kubeadm sets, and always taken from clients.
pub const STANDARD_PREFIX: &str = "x-remote-";

/// The key `authentication.kubernetes.io/credential-id`, escaped as the apiserver unescapes it.
const CREDENTIAL_ID: &str = "authentication.kubernetes.io%2fcredential-id";

/// A list of names that is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag}: `{name}` is not a header name; give one or more, with commas between them")]
pub struct NotAName {
    flag: &'static str,
    name: String,
}

impl Default for RequestHeaders {
    fn default() -> Self {
        let one = |name: &str| vec![name.to_owned()];
        Self {
            username: one("X-Remote-User"),
            group: one("X-Remote-Group"),
            uid: one("X-Remote-Uid"),
            extra_prefix: one("X-Remote-Extra-"),
            allowed_names: Vec::new(),
        }
    }
}

impl RequestHeaders {
    /// Trims the names as the apiserver does, and checks them.
    ///
    /// # Errors
    ///
    /// Names the flag and what stands there.
    pub fn checked(mut self) -> Result<Self, NotAName> {
        for (flag, names) in [
            ("--requestheader-username-headers", &mut self.username),
            ("--requestheader-group-headers", &mut self.group),
            ("--requestheader-uid-headers", &mut self.uid),
            ("--requestheader-extra-headers-prefix", &mut self.extra_prefix),
        ] {
            for name in names.iter_mut() {
                *name = name.trim().to_owned();
            }
            let wrong = names
                .iter()
                .find(|name| http::HeaderName::from_bytes(name.as_bytes()).is_err());
            let nothing = String::new();
            if let Some(name) = wrong.or_else(|| names.is_empty().then_some(&nothing)) {
                return Err(NotAName {
                    flag,
                    name: name.clone(),
                });
            }
        }
        Ok(self)
    }

    /// What is taken from clients.
    pub fn names(&self) -> IdentityNames {
        let usernames = self.username.iter().map(String::as_str);
        let others = self.group.iter().chain(&self.uid).map(String::as_str);
        let prefixes = self.extra_prefix.iter().map(String::as_str);
        IdentityNames::new(usernames, others, prefixes.chain([STANDARD_PREFIX]))
    }

    /// Whether the owner of that common name may name users.
    pub fn allows(&self, common_name: &str) -> bool {
        self.allowed_names.is_empty() || self.allowed_names.iter().any(|name| name == common_name)
    }

    /// The names a user's name, groups, UID and credential are written under, in lower case.
    pub fn written(&self) -> [String; 4] {
        let first = |names: &[String]| names.first().map_or_else(String::new, |name| name.to_ascii_lowercase());
        [
            first(&self.username),
            first(&self.group),
            first(&self.uid),
            first(&self.extra_prefix) + CREDENTIAL_ID,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_trimmed_and_checked_and_the_first_is_written() {
        let headers = RequestHeaders {
            group: vec![" X-Auth-Group ".to_owned(), "X-Remote-Group".to_owned()],
            ..RequestHeaders::default()
        };
        let headers = headers.checked().expect("names");
        assert_eq!(headers.written()[..2], ["x-remote-user", "x-auth-group"]);
        let names = headers.names();
        for name in [
            "x-auth-GROUP",
            "x-remote-group",
            "X-Remote-Anything",
            "x-remote-extra-a",
        ] {
            assert!(names.covers(name.as_bytes()), "{name}");
        }
        assert!(!names.covers(b"x-auth"));
        for wrong in [vec![], vec![" ".to_owned()], vec!["a b".to_owned()]] {
            let headers = RequestHeaders {
                uid: wrong,
                ..RequestHeaders::default()
            };
            let error = headers.checked().expect_err("not a name").to_string();
            assert!(error.contains("--requestheader-uid-headers"), "{error}");
        }
    }

    #[test]
    fn only_allowed_names_name_users_and_no_list_allows_all() {
        let mut headers = RequestHeaders::default();
        assert!(headers.allows("anybody"));
        headers.allowed_names = vec!["front-proxy-client".to_owned()];
        assert!(headers.allows("front-proxy-client") && !headers.allows("anybody") && !headers.allows(""));
    }
}
