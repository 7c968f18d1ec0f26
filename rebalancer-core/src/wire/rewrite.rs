//! What is done to a request on its way to the apiserver: which fields go, which come, trailers included.
//!
//! Input: field names and values. Output: what becomes of each. Two writers put it on the wire, HTTP/2's in this crate and
//! HTTP/1.1's at the edge: they must never decide anything about a field themselves.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

/// The header that names the client's address. The apiserver reads its first field alone
/// (k8s.io/apimachinery/pkg/util/net/http.go, `SourceIPs`), so that several have to become one.
pub const FORWARDED_FOR: &str = "x-forwarded-for";

/// The header that brings a token.
pub const AUTHORIZATION: &str = "authorization";

/// The headers by which a front proxy tells the apiserver who asks: kube-apiserver's `--requestheader-username-headers`,
/// `-group-headers`, `-uid-headers` and `-extra-headers-prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityNames {
    /// Those that name a user, in the order the apiserver looks for them.
    usernames: Vec<String>,
    exact: Vec<Box<[u8]>>,
    prefixes: Vec<Box<[u8]>>,
    /// Which octets any of these begins with, in either case: most fields' names do not.
    firsts: [u64; 4],
}

impl Default for IdentityNames {
    /// All that begin with `X-Remote-`, which kubeadm's do.
    fn default() -> Self {
        Self::new(["x-remote-user"], [], ["x-remote-"])
    }
}

impl IdentityNames {
    /// The names of users, other whole names, and beginnings of names; case is of no account, as in HTTP.
    pub fn new<'a>(
        usernames: impl IntoIterator<Item = &'a str>,
        exact: impl IntoIterator<Item = &'a str>,
        prefixes: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let lower = |name: &str| name.to_ascii_lowercase().into_bytes().into_boxed_slice();
        let usernames: Vec<String> = usernames.into_iter().map(str::to_ascii_lowercase).collect();
        let whole = usernames
            .iter()
            .map(|name| lower(name))
            .chain(exact.into_iter().map(lower));
        let exact: Vec<Box<[u8]>> = whole.collect();
        let prefixes: Vec<Box<[u8]>> = prefixes.into_iter().map(lower).collect();
        let mut firsts = [0; 4];
        for name in exact.iter().chain(&prefixes) {
            match name.first() {
                Some(first) => {
                    for octet in [*first, first.to_ascii_uppercase()] {
                        firsts[usize::from(octet / 64)] |= 1 << (octet % 64);
                    }
                }
                // Any name begins with nothing.
                None => firsts = [u64::MAX; 4],
            }
        }
        Self {
            exact,
            prefixes,
            firsts,
            usernames,
        }
    }

    /// Whether a field of that name says who asks. The apiserver compares names without regard to case.
    pub fn covers(&self, name: &[u8]) -> bool {
        let may = |first: &u8| self.firsts[usize::from(first / 64)] & 1 << (first % 64) != 0;
        name.first().is_none_or(may) && self.covers_whole(name)
    }

    fn covers_whole(&self, name: &[u8]) -> bool {
        self.exact.iter().any(|exact| exact.eq_ignore_ascii_case(name))
            || self.prefixes.iter().any(|prefix| {
                name.get(..prefix.len())
                    .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
            })
    }
}

/// What becomes of a field of the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on as it came.
    Passes,
    /// It does not go on.
    Removed,
    /// Its value becomes a part of the relay's own field of that name: see [`Policy::forwarded_for`].
    Merged,
}

/// What is done to every request of one connection.
#[derive(Clone, Debug)]
pub struct Policy {
    names: Arc<IdentityNames>,
    identity: Box<[(Cow<'static, str>, String)]>,
    /// The client is a front proxy itself: it names the user, with each request.
    is_proxy: bool,
    unless_token: Option<Cow<'static, str>>,
    /// Its address, as it is written.
    client: Box<[u8]>,
}

impl Policy {
    /// Takes the fields of those names away, and adds the client's address.
    pub fn new(names: Arc<IdentityNames>, client: IpAddr) -> Self {
        Self {
            names,
            identity: Box::default(),
            is_proxy: false,
            unless_token: None,
            client: client.to_canonical().to_string().into_bytes().into_boxed_slice(),
        }
    }

    /// Adds these fields: who asks.
    ///
    /// Names are in lower case, and values hold what a header may.
    #[must_use]
    pub fn with_identity(mut self, fields: impl IntoIterator<Item = (Cow<'static, str>, String)>) -> Self {
        self.identity = fields.into_iter().collect();
        debug_assert!(
            self.identity
                .iter()
                .all(|(name, _)| !name.bytes().any(|octet| octet.is_ascii_uppercase())),
            "HTTP/2 has names in lower case"
        );
        self
    }

    /// Lets requests that name a user pass with the fields that do, and gives these to others; without any, nobody asks.
    #[must_use]
    pub fn of_proxy(self, fields: impl IntoIterator<Item = (Cow<'static, str>, String)>) -> Self {
        let mut policy = self.with_identity(fields);
        policy.is_proxy = true;
        policy
    }

    /// Gives requests that bring no bearer token this `authorization`, in place of any other they bring.
    #[must_use]
    pub fn with_authorization_unless_token(mut self, value: impl Into<Cow<'static, str>>) -> Self {
        self.unless_token = Some(value.into());
        self
    }

    /// What is done to one request, whose first field of a name (in lower case) `first` answers; `None` when a front
    /// proxy's request names nobody, which is answered 401 and goes nowhere.
    pub fn request<'v>(&self, first: impl Fn(&str) -> Option<&'v [u8]>) -> Option<Rewrite<'_>> {
        // As the apiserver's request-header authenticator: the first name that holds something.
        let names_user = |name: &String| first(name).is_some_and(|value| !value.is_empty());
        let is_named = self.is_proxy && self.names.usernames.iter().any(names_user);
        if self.is_proxy && !is_named && self.identity.is_empty() {
            return None;
        }
        let replaced = self
            .unless_token
            .as_deref()
            .filter(|_| !first(AUTHORIZATION).is_some_and(brings_token));
        Some(Rewrite {
            policy: self,
            is_named,
            authorization: replaced,
        })
    }

    /// Whether a trailer goes on: none that a reader might take for a field of the request the relay answers for.
    pub fn trailer_passes(&self, name: &[u8]) -> bool {
        !self.names.covers(name)
            && !name.eq_ignore_ascii_case(FORWARDED_FOR.as_bytes())
            && !name.eq_ignore_ascii_case(AUTHORIZATION.as_bytes())
    }

    /// The value of the one `x-forwarded-for` a request goes on with: what came, and the client's address, the way a
    /// reverse proxy does.
    pub fn forwarded_for<'a>(&self, came: impl Iterator<Item = &'a [u8]>) -> Cow<'_, [u8]> {
        let mut chain = Vec::new();
        for value in came {
            chain.extend_from_slice(value);
            chain.extend_from_slice(b", ");
        }
        if chain.is_empty() {
            return Cow::Borrowed(&self.client);
        }
        chain.extend_from_slice(&self.client);
        Cow::Owned(chain)
    }

    /// How many octets its additions count for in a header list, 32 for each field included (RFC 9113, section 6.5.2).
    pub(in crate::wire) fn size(&self) -> usize {
        let fields = self.identity.iter().map(|(name, value)| name.len() + value.len() + 32);
        // An address has 39 octets at most.
        fields.sum::<usize>() + self.unless_token.as_ref().map_or(0, |value| value.len() + 45) + 96
    }
}

/// What is done to one request.
#[derive(Clone, Copy, Debug)]
pub struct Rewrite<'a> {
    policy: &'a Policy,
    /// By itself.
    is_named: bool,
    authorization: Option<&'a str>,
}

impl<'a> Rewrite<'a> {
    /// What becomes of a field of that name.
    pub fn fate(&self, name: &[u8]) -> Fate {
        if !self.is_named && self.policy.names.covers(name)
            || self.authorization.is_some() && name.eq_ignore_ascii_case(AUTHORIZATION.as_bytes())
        {
            Fate::Removed
        } else if name.eq_ignore_ascii_case(FORWARDED_FOR.as_bytes()) {
            Fate::Merged
        } else {
            Fate::Passes
        }
    }

    /// The fields that come, beside the address: several may have one name.
    pub fn adds(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let is_named = self.is_named;
        let identity = self.policy.identity.iter().filter(move |_| !is_named);
        identity
            .map(|(name, value)| (name.as_ref(), value.as_str()))
            .chain(self.authorization.map(|value| (AUTHORIZATION, value)))
    }
}

/// Whether the apiserver finds a token in it
/// (k8s.io/apiserver/pkg/authentication/request/bearertoken/bearertoken.go).
fn brings_token(authorization: &[u8]) -> bool {
    let mut parts = authorization.trim_ascii().splitn(3, |octet| *octet == b' ');
    let scheme = parts.next().unwrap_or_default();
    scheme.eq_ignore_ascii_case(b"bearer") && parts.next().is_some_and(|token| !token.is_empty())
}

/// Where a text of a client's is kept, the first so many octets of it are, cut between two characters.
pub const MAX_USER_AGENT: usize = 256;

/// A user agent as it is kept and shown: a client may send any number of octets, of any kind.
pub fn user_agent(value: &[u8]) -> String {
    // Two octets more than are kept, so that a character the cut is in is seen whole or not at all.
    let mut text = String::from_utf8_lossy(&value[..value.len().min(MAX_USER_AGENT + 3)]).into_owned();
    text.truncate(text.floor_char_boundary(MAX_USER_AGENT));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy::new(Arc::default(), IpAddr::from([192, 0, 2, 7]))
    }

    fn nothing(_: &str) -> Option<&'static [u8]> {
        None
    }

    #[test]
    fn a_front_proxy_names_the_user_itself_or_is_one_or_is_nobody() {
        let own = [("x-remote-user".into(), "proxy".to_owned())];
        let named = |name: &str| (name == "x-remote-user").then_some(&b"erin"[..]);
        let empty = |name: &str| (name == "x-remote-user").then_some(&b""[..]);
        for policy in [policy().of_proxy([]), policy().of_proxy(own.clone())] {
            let rewrite = policy.request(named).expect("it names erin");
            assert_eq!(rewrite.fate(b"X-Remote-Group"), Fate::Passes);
            assert_eq!(rewrite.adds().count(), 0);
            assert!(!policy.trailer_passes(b"x-remote-user"));
        }
        let policy_of_nobody = policy().of_proxy([]);
        assert!(policy_of_nobody.request(nothing).is_none() && policy_of_nobody.request(empty).is_none());
        let policy = policy().of_proxy(own);
        for unnamed in [policy.request(nothing), policy.request(empty)] {
            let rewrite = unnamed.expect("its own certificate names it");
            assert_eq!(rewrite.fate(b"x-remote-group"), Fate::Removed);
            assert_eq!(rewrite.adds().collect::<Vec<_>>(), [("x-remote-user", "proxy")]);
        }
    }

    #[test]
    fn identity_in_any_spelling_is_removed_from_requests_and_trailers() {
        let policy = policy();
        let rewrite = policy.request(nothing).expect("it goes on");
        for name in ["x-remote-user", "X-Remote-Group", "X-REMOTE-EXTRA-a", "x-remote-uid"] {
            assert_eq!(rewrite.fate(name.as_bytes()), Fate::Removed, "{name}");
            assert!(!policy.trailer_passes(name.as_bytes()), "{name}");
        }
        // Go does not take an underscore for a hyphen.
        for name in ["x_remote_user", "x-remot", "remote-user", "accept", "authorization"] {
            assert_eq!(rewrite.fate(name.as_bytes()), Fate::Passes, "{name}");
        }
        assert_eq!(rewrite.fate(b"X-Forwarded-For"), Fate::Merged);
        assert!(!policy.trailer_passes(b"x-forwarded-for"));
    }

    #[test]
    fn the_apiservers_own_names_are_removed_and_no_others() {
        let names = IdentityNames::new(["X-Auth-User"], ["X-Auth-Group"], ["X-Auth-Extra-"]);
        let policy = Policy::new(Arc::new(names), IpAddr::from([192, 0, 2, 7]));
        let fate = |name: &str| policy.request(nothing).expect("it goes on").fate(name.as_bytes());
        for name in ["x-auth-user", "X-AUTH-GROUP", "x-auth-extra-scopes"] {
            assert_eq!(fate(name), Fate::Removed, "{name}");
        }
        for name in ["x-auth-users", "x-auth-extra", "x-remote-user", ""] {
            assert_eq!(fate(name), Fate::Passes, "{name}");
        }
        let names = IdentityNames::new(["X-Auth-User"], ["_group"], [""]);
        assert!(
            ["x-auth-user", "", "accept", "\u{ff}"]
                .iter()
                .all(|name| names.covers(name.as_bytes()))
        );
    }

    #[test]
    fn an_authorization_without_a_token_is_replaced_where_there_is_one_to_give() {
        let policy = policy().with_authorization_unless_token("Bearer none");
        for (came, replaced) in [
            (None, true),
            (Some(""), true),
            (Some("x"), true),
            (Some("Bearer "), true),
            (Some("Bearer  token"), true),
            (Some("Basic YTpi"), true),
            (Some("Bearer token"), false),
            (Some("  bearer token more"), false),
        ] {
            let first = |name: &str| came.map(str::as_bytes).filter(|_| name == AUTHORIZATION);
            let rewrite = policy.request(first).expect("it goes on");
            let adds: Vec<_> = rewrite.adds().collect();
            let fate = rewrite.fate(b"Authorization");
            if replaced {
                assert_eq!(
                    (adds, fate),
                    (vec![("authorization", "Bearer none")], Fate::Removed),
                    "{came:?}"
                );
            } else {
                assert_eq!((adds, fate), (vec![], Fate::Passes), "{came:?}");
            }
        }
    }

    #[test]
    fn addresses_are_merged_into_one_field_in_their_canonical_form() {
        let policy = Policy::new(Arc::default(), "::ffff:192.0.2.7".parse().expect("an address"));
        let came = [&b"10.9.9.9"[..], b"10.8.8.8, 10.7.7.7"];
        let chain = policy.forwarded_for(came.into_iter());
        assert_eq!(*chain, *b"10.9.9.9, 10.8.8.8, 10.7.7.7, 192.0.2.7");
        assert_eq!(*policy.forwarded_for([].into_iter()), *b"192.0.2.7");
    }

    #[test]
    fn a_user_agent_is_cut_between_characters() {
        assert_eq!(user_agent(b"kubelet/v1.36.2"), "kubelet/v1.36.2");
        for character in ["a", "é", "€", "𝄞"] {
            for lead in 0..4 {
                let long = format!("{}{}", "x".repeat(lead), character.repeat(300));
                let kept = user_agent(long.as_bytes());
                assert!(long.starts_with(&kept) && kept.len() <= MAX_USER_AGENT, "{kept}");
                assert!(kept.len() > MAX_USER_AGENT - 4);
            }
        }
        assert!(user_agent(&[0xff; 1 << 20]).len() <= MAX_USER_AGENT);
    }
}
