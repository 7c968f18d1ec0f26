//! FlowSchemas: whom they are for, and which of somebody's requests they take.
//!
//! Job: what k8s.io/apiserver/pkg/util/flowcontrol/rule.go decides of one request, for all requests of a user or a group.
//! Input: names. Output: a [`Kin`]. Must never call somebody a member of a group on a guess: which groups a plain user is in
//! stands in his certificate or token, and nobody here has seen it.

use std::collections::BTreeSet;

use super::yaml;

/// Whom a schema is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// One user; a service account is `system:serviceaccount:NAMESPACE:NAME`.
    User(String),
    /// Everybody of a group.
    Group(String),
}

/// A FlowSchema, as far as it bears on who matches it first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    /// Its name.
    pub name: String,
    /// The level of its requests.
    pub level: String,
    /// `matchingPrecedence`: the lowest that matches counts, and of equal ones the first by name.
    pub precedence: u32,
    /// What it takes: requests of any of them.
    pub rules: Vec<Rule>,
}

/// Requests of any of the subjects for any of the resources. What a rule says of URLs that are no resources is left out: no
/// hold is for such.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Whose.
    pub subjects: Vec<Subject>,
    /// For what.
    pub resources: Vec<Resources>,
}

/// Requests for resources; `*` alone stands for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Verbs.
    pub verbs: Vec<String>,
    /// API groups.
    pub api_groups: Vec<String>,
    /// Resources, and subresources with a slash.
    pub resources: Vec<String>,
    /// Namespaces.
    pub namespaces: Vec<String>,
    /// Whether also requests of no namespace.
    pub cluster_scope: bool,
}

/// How much of somebody's requests are a schema's, by whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kin {
    /// Nobody's.
    None,
    /// It depends on groups that are not known.
    Unknown,
    /// Of a group: those of some of its users.
    Some,
    /// All of them.
    All,
}

/// Users with a certificate or a token.
const AUTHENTICATED: &str = "system:authenticated";

/// Users with neither.
const UNAUTHENTICATED: &str = "system:unauthenticated";

/// All service accounts.
const ACCOUNTS: &str = "system:serviceaccounts";

fn is_all(list: &[String]) -> bool {
    list.iter().any(|one| one == "*")
}

impl Subject {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::User(name) | Self::Group(name) => name,
        }
    }

    pub(super) fn in_words(&self) -> String {
        match self {
            Self::User(name) => format!("user {}", yaml::quoted(name)),
            Self::Group(name) => format!("group {}", yaml::quoted(name)),
        }
    }

    /// How much of its requests are those of `other`.
    pub(super) fn kin(&self, other: &Self) -> Kin {
        let decided = |is_so| if is_so { Kin::All } else { Kin::None };
        match (self, other) {
            (_, Self::User(name) | Self::Group(name)) if name == "*" => Kin::All,
            (Self::User(user), Self::User(other)) => decided(user == other),
            (Self::User(user), Self::Group(group)) => member(user, group, Kin::All),
            // Nobody else is in a group of service accounts.
            (Self::Group(group), Self::User(other)) if group.starts_with("system:serviceaccounts:") => {
                let is_one = groups_of(other).0.contains(group);
                if is_one { Kin::Some } else { Kin::None }
            }
            (Self::Group(group), Self::User(other)) => member(other, group, Kin::Some),
            (Self::Group(group), Self::Group(other)) if group == other => Kin::All,
            (Self::Group(group), Self::Group(other)) => match (group.as_str(), other.as_str()) {
                (UNAUTHENTICATED, _) | (_, UNAUTHENTICATED) => Kin::None,
                (_, AUTHENTICATED) => Kin::All,
                // A service account's groups are these and no others.
                _ if group.starts_with("system:serviceaccounts:") => decided(other == ACCOUNTS),
                _ => Kin::Unknown,
            },
        }
    }
}

/// Whether a user is in a group: `yes`, no, or not known.
fn member(user: &str, group: &str, yes: Kin) -> Kin {
    let (groups, are_all) = groups_of(user);
    match () {
        () if groups.contains(group) => yes,
        () if are_all || group == UNAUTHENTICATED => Kin::None,
        () => Kin::Unknown,
    }
}

/// The groups that a user's name stands for, and whether there can be no others.
fn groups_of(user: &str) -> (BTreeSet<String>, bool) {
    if user == "system:anonymous" {
        return (BTreeSet::from([UNAUTHENTICATED.to_owned()]), true);
    }
    let mut groups = BTreeSet::from([AUTHENTICATED.to_owned()]);
    let account = user.strip_prefix("system:serviceaccount:");
    if let Some((namespace, _)) = account.and_then(|rest| rest.split_once(':')) {
        groups.insert(ACCOUNTS.to_owned());
        groups.insert(format!("{ACCOUNTS}:{namespace}"));
        return (groups, true);
    }
    if user.starts_with("system:node:") {
        groups.insert("system:nodes".to_owned());
    }
    (groups, false)
}

impl Resources {
    fn has_any_of(&self, verbs: &[String]) -> bool {
        is_all(verbs) || is_all(&self.verbs) || self.verbs.iter().any(|verb| verbs.contains(verb))
    }

    fn has_all_of(&self, verbs: &[String]) -> bool {
        let every = is_all(&self.verbs) || verbs.iter().all(|verb| self.verbs.contains(verb));
        every && is_all(&self.api_groups) && is_all(&self.resources) && is_all(&self.namespaces) && self.cluster_scope
    }
}

impl Schema {
    /// How much of somebody's requests with these verbs it takes, by whose they are; whatever they are for.
    pub(super) fn kin(&self, subject: &Subject, verbs: &[String]) -> Kin {
        let rules = self
            .rules
            .iter()
            .filter(|rule| rule.resources.iter().any(|one| one.has_any_of(verbs)));
        let kin = rules.flat_map(|rule| &rule.subjects).map(|other| subject.kin(other));
        kin.max().unwrap_or(Kin::None)
    }

    /// Whether it takes all requests with these verbs of whom it is for.
    pub(super) fn is_for_all(&self, subject: &Subject, verbs: &[String]) -> bool {
        self.rules.iter().any(|rule| {
            rule.subjects.iter().any(|other| subject.kin(other) == Kin::All)
                && rule.resources.iter().any(|one| one.has_all_of(verbs))
        })
    }

    /// The groups of its that decide whether somebody is one of whom it is for.
    pub(super) fn deciding_groups<'s>(&'s self, subject: &Subject) -> impl Iterator<Item = &'s str> {
        let subjects = self.rules.iter().flat_map(|rule| &rule.subjects);
        subjects.filter_map(move |other| match other {
            Subject::Group(group) if subject.kin(other) == Kin::Unknown => Some(group.as_str()),
            _ => None,
        })
    }

    /// Where it stands: the first that matches counts (k8s.io/apiserver/pkg/util/apihelpers, `FlowSchemaSequence`).
    pub(super) fn position(&self) -> (u32, &str) {
        (self.precedence, &self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_whose_is_known_by_names_or_not_at_all() {
        let user = |name: &str| Subject::User(name.into());
        let group = |name: &str| Subject::Group(name.into());
        for (who, other, kin) in [
            (user("a"), user("a"), Kin::All),
            (user("a"), user("*"), Kin::All),
            (user("a"), user("b"), Kin::None),
            (user("a"), group("system:authenticated"), Kin::All),
            (user("a"), group("system:unauthenticated"), Kin::None),
            (user("a"), group("system:masters"), Kin::Unknown),
            (user("system:anonymous"), group("system:unauthenticated"), Kin::All),
            (user("system:anonymous"), group("system:authenticated"), Kin::None),
            (user("system:node:a"), group("system:nodes"), Kin::All),
            (user("system:node:a"), group("system:masters"), Kin::Unknown),
            (
                user("system:serviceaccount:n:a"),
                group("system:serviceaccounts:n"),
                Kin::All,
            ),
            (
                user("system:serviceaccount:n:a"),
                group("system:serviceaccounts"),
                Kin::All,
            ),
            (user("system:serviceaccount:n:a"), group("system:masters"), Kin::None),
            (group("dev"), group("*"), Kin::All),
            (group("dev"), group("system:authenticated"), Kin::All),
            (group("dev"), group("ops"), Kin::Unknown),
            (group("dev"), user("a"), Kin::Unknown),
            (group("dev"), user("system:serviceaccount:n:a"), Kin::None),
            (
                group("system:serviceaccounts:n"),
                user("system:serviceaccount:n:a"),
                Kin::Some,
            ),
            (
                group("system:serviceaccounts:n"),
                group("system:serviceaccounts"),
                Kin::All,
            ),
            (
                group("system:serviceaccounts:n"),
                group("system:serviceaccounts:m"),
                Kin::None,
            ),
            (
                group("system:unauthenticated"),
                group("system:authenticated"),
                Kin::None,
            ),
        ] {
            assert_eq!(who.kin(&other), kin, "{who:?} {other:?}");
        }
    }
}
