//! The advice: who is held by what, why, and what that costs whom.
//!
//! Job: from a [`Question`] to the numbers of a FlowSchema and a PriorityLevelConfiguration. Output: [`Advice`] or
//! [`Refused`]. Must never hold somebody who did not flood more than it says: what its rules do not name stays where it is.

use std::collections::BTreeSet;

use super::{
    Level, Schema,
    seats::{lists_at_once, nominal_seats, shares_for, widest_list},
    shuffle::{Hand, crowded_out},
    yaml,
};

/// How many large LISTs of theirs may run at once on an apiserver.
pub const LISTS: std::ops::RangeInclusive<u32> = 1..=50;

/// How many of a group's users may be said to flood at once.
const HEAVY: std::ops::RangeInclusive<u32> = 1..=64;

/// A quiet member of a group is crowded out no more often than that.
const CROWDED_OUT: f64 = 0.01;

/// Queues that are tried, the fewest first: each takes memory in every apiserver.
const QUEUES: [u32; 7] = [16, 32, 64, 128, 256, 512, 1_024];

/// A larger hand makes LISTs narrower, so that more of them run at once.
const LARGEST_HAND: u32 = 4;

/// Requests that may wait in a queue: the API's default.
const QUEUE_LENGTH: u32 = 50;

/// The part of its seats that the level lends while nobody uses them.
const LENDABLE_PERCENT: u32 = 50;

/// Where service accounts' own schema is in a cluster whose schemas say nothing.
const PRECEDENCE: u32 = 9_000;

/// How long a request waits in a queue: a quarter of kube-apiserver's --request-timeout, which is 60 s by default
/// (k8s.io/apiserver/pkg/server/config.go).
const WAIT_S: u32 = 15;

/// Verbs that a FlowSchema may name.
const VERBS: [&str; 10] = [
    "*",
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "proxy",
    "update",
    "watch",
];

/// Whom a schema is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// One user; a service account is `system:serviceaccount:NAMESPACE:NAME`.
    User(String),
    /// Everybody of a group.
    Group(String),
}

impl Subject {
    fn name(&self) -> &str {
        match self {
            Self::User(name) | Self::Group(name) => name,
        }
    }

    fn in_words(&self) -> String {
        match self {
            Self::User(name) => format!("user {}", yaml::quoted(name)),
            Self::Group(name) => format!("group {}", yaml::quoted(name)),
        }
    }

    /// Whether a schema for `other` is for this one too, as far as names say.
    fn is_within(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Group(group)) if group == "*" || group == "system:authenticated" => true,
            (Self::User(user), Self::User(other)) => other == "*" || user == other,
            (Self::Group(group), Self::Group(other)) => {
                group == other || other == "system:serviceaccounts" && group.starts_with("system:serviceaccounts:")
            }
            (Self::Group(_), Self::User(other)) => other == "*",
            (Self::User(user), Self::Group(group)) => groups_of(user).contains(group),
        }
    }
}

/// The groups that a user's name stands for.
fn groups_of(user: &str) -> BTreeSet<String> {
    let mut groups = BTreeSet::new();
    if let Some((namespace, _)) = user
        .strip_prefix("system:serviceaccount:")
        .and_then(|rest| rest.split_once(':'))
    {
        groups.insert("system:serviceaccounts".to_owned());
        groups.insert(format!("system:serviceaccounts:{namespace}"));
    }
    if user.starts_with("system:node:") {
        groups.insert("system:nodes".to_owned());
    }
    groups
}

/// What was seen of who floods.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Their streams that are open now on this apiserver.
    pub open_streams: u64,
    /// Their answers so far, in octets.
    pub bytes: u64,
    /// Everybody's.
    pub all_bytes: u64,
    /// The FlowSchema that most of that came by.
    pub schema: Option<String>,
}

/// What an operator asks.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Who floods.
    pub subject: Subject,
    /// With what: verbs as a FlowSchema has them.
    pub verbs: Vec<String>,
    /// How many large LISTs of theirs may run at once.
    pub lists: u32,
    /// Of a group: how many of its users may flood at once.
    pub heavy: u32,
    /// `--max-requests-inflight` and `--max-mutating-requests-inflight` together.
    pub server_seats: u32,
    /// The cluster's levels.
    pub levels: Vec<Level>,
    /// The cluster's schemas.
    pub schemas: Vec<Schema>,
    /// What was seen of them, where somebody looked.
    pub observed: Option<Observed>,
}

/// Why there is no advice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// The numbers of the two objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    pub name: String,
    pub subject: Subject,
    pub verbs: Vec<String>,
    pub precedence: u32,
    pub shares: u32,
    pub lendable_percent: u32,
    pub hand: Hand,
    pub queue_length: u32,
}

/// What holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// The name of both objects.
    pub name: String,
    /// YAML for kubectl.
    pub manifest: String,
    /// Why, a sentence each.
    pub reason: Vec<String>,
    /// What it will cost whom, a sentence each.
    pub cost: Vec<String>,
    /// Seats of the new level on each apiserver.
    pub seats: u32,
    /// Large LISTs that run at once there.
    pub lists_at_once: u32,
}

impl Advice {
    /// The manifest with reason and cost as comments before it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (title, sentences) in [("Why", &self.reason), ("What it will cost", &self.cost)] {
            text += &yaml::comment(&format!("{title}:"));
            for sentence in sentences {
                text += &yaml::comment(&format!("- {sentence}"));
            }
        }
        text + &self.manifest
    }
}

/// Answers.
///
/// # Errors
///
/// The question cannot be answered: one sentence, what is wrong and what to do.
pub fn advise(question: &Question) -> Result<Advice, Refused> {
    check(question)?;
    let name = name_of(&question.subject);
    let levels: Vec<&Level> = question.levels.iter().filter(|level| level.name != name).collect();
    let others: u32 = levels.iter().fold(0, |sum, level| sum.saturating_add(level.shares));
    let hand = hand_of(question)?;
    if others == 0 {
        let why = "the cluster's levels have no shares at all: give the levels of a cluster that serves (--levels)";
        return Err(Refused(why.into()));
    }
    let shares = shares_for(question.lists, hand.size, question.server_seats, others);
    let all_shares = others.saturating_add(shares);
    let seats = nominal_seats(question.server_seats, shares, all_shares);
    let lists_at_once = lists_at_once(seats, hand.size);
    let (now, precedence) = place(question, &name)?;
    let hold = Hold {
        name: name.clone(),
        subject: question.subject.clone(),
        verbs: question.verbs.clone(),
        precedence,
        shares,
        lendable_percent: LENDABLE_PERCENT,
        hand,
        queue_length: QUEUE_LENGTH,
    };
    Ok(Advice {
        manifest: yaml::manifest(&hold),
        reason: reason(question, now, others, &levels),
        cost: cost(question, &hold, seats, lists_at_once, others, &levels),
        name,
        seats,
        lists_at_once,
    })
}

fn check(question: &Question) -> Result<(), Refused> {
    let refuse = |why: String| Err(Refused(why));
    let who = question.subject.in_words();
    let name = question.subject.name();
    if name.is_empty() {
        return refuse("who floods has no name: give --user or --group one that is not empty".into());
    }
    if name.chars().any(char::is_control) {
        return refuse(format!(
            "{who} holds a control character: no user or group is called that"
        ));
    }
    let everybody = ["*", "system:authenticated"];
    if everybody.contains(&name) || name == "system:serviceaccounts" && matches!(question.subject, Subject::Group(_)) {
        return refuse(format!(
            "{who} is nearly everybody: name the user or the group that floods, as `rebalancer flows` shows it"
        ));
    }
    if name == "system:masters" || name == "system:apiserver" {
        return refuse(format!(
            "{who} is exempt from API Priority and Fairness, before any FlowSchema is looked at: take those clients out of \
             system:masters first"
        ));
    }
    if !LISTS.contains(&question.lists) {
        return refuse(out_of_range("--lists", question.lists, &LISTS));
    }
    if !HEAVY.contains(&question.heavy) {
        return refuse(out_of_range("--heavy", question.heavy, &HEAVY));
    }
    let seats = 10..=1_000_000;
    if !seats.contains(&question.server_seats) {
        let flags = "--max-requests-inflight and --max-mutating-requests-inflight together";
        return refuse(out_of_range(flags, question.server_seats, &seats));
    }
    if question.verbs.is_empty() {
        return refuse(format!("--verb is not given: allowed is {}", VERBS.join(", ")));
    }
    if let Some(verb) = question.verbs.iter().find(|verb| !VERBS.contains(&verb.as_str())) {
        return refuse(format!(
            "--verb {}: allowed is {}",
            yaml::quoted(verb),
            VERBS.join(", ")
        ));
    }
    if question.verbs.len() > 1 && question.verbs.iter().any(|verb| verb == "*") {
        return refuse("--verb * stands for all verbs: give it alone, or name the others".into());
    }
    if question.levels.is_empty() {
        return refuse(
            "no PriorityLevelConfiguration is known: seats are shares of the cluster's own levels (--levels FILE, from \
             `kubectl get prioritylevelconfigurations,flowschemas -o json`)"
                .into(),
        );
    }
    Ok(())
}

fn out_of_range(flag: &str, value: u32, range: &std::ops::RangeInclusive<u32>) -> String {
    format!("{flag} {value}: allowed is {} to {}", range.start(), range.end())
}

/// A name that an object may have, which says whom it holds: another one for each subject.
fn name_of(subject: &Subject) -> String {
    let kind = match subject {
        Subject::User(_) => "user",
        Subject::Group(_) => "group",
    };
    let plain: String = subject
        .name()
        .chars()
        .map(|c| {
            if c.is_ascii_lowercase() || c.is_ascii_digit() {
                c
            } else {
                '-'
            }
        })
        .take(40)
        .collect();
    // FNV-1a: what the plain part leaves out tells subjects apart.
    let hash = subject.name().bytes().fold(0x811c_9dc5_u32, |hash, octet| {
        (hash ^ u32::from(octet)).wrapping_mul(0x0100_0193)
    });
    let plain = plain.trim_matches('-');
    format!(
        "rebalancer-hold-{kind}-{plain}{}{hash:08x}",
        if plain.is_empty() { "" } else { "-" }
    )
}

/// One queue for one user, whose requests are one flow; for a group's users the smallest hand and the fewest queues that
/// keep a quiet one from being crowded out.
fn hand_of(question: &Question) -> Result<Hand, Refused> {
    if matches!(question.subject, Subject::User(_)) {
        return Ok(Hand { queues: 1, size: 1 });
    }
    let hands = QUEUES
        .iter()
        .flat_map(|queues| (1..=LARGEST_HAND).map(|size| Hand { queues: *queues, size }));
    let mut fit = hands.filter(|hand| hand.is_valid() && crowded_out(*hand, question.heavy) <= CROWDED_OUT);
    fit.next().ok_or_else(|| {
        Refused(format!(
            "--heavy {}: no hand of {LARGEST_HAND} queues or fewer keeps quiet users apart from so many; name the users one \
             by one",
            question.heavy
        ))
    })
}

/// The schema that their requests match now, and a precedence just before it: what is more particular, such as leader
/// election and the nodes' own, still comes first.
fn place<'q>(question: &'q Question, own: &str) -> Result<(Option<&'q Schema>, u32), Refused> {
    let schemas = || question.schemas.iter().filter(|schema| schema.name != own);
    let is_for = |schema: &&Schema| {
        schema
            .subjects
            .iter()
            .any(|subject| question.subject.is_within(subject))
    };
    let seen = question
        .observed
        .as_ref()
        .and_then(|observed| observed.schema.as_deref());
    let seen = seen.and_then(|name| schemas().find(|schema| schema.name == name));
    let now = seen.or_else(|| {
        let wide = schemas().filter(|schema| schema.takes_all).filter(is_for);
        wide.min_by_key(|schema| (schema.precedence, &schema.name))
    });
    if let Some(schema) = now {
        let is_exempt = |level: &&Level| level.name == schema.level && level.is_exempt;
        if question.levels.iter().find(is_exempt).is_some() {
            return Err(Refused(format!(
                "{} is exempt by FlowSchema {}: change that one first",
                question.subject.in_words(),
                schema.name
            )));
        }
    }
    let mut precedence = now.map_or(PRECEDENCE, |schema| schema.precedence).saturating_sub(1);
    while precedence > 2 && schemas().any(|schema| schema.precedence == precedence) {
        precedence -= 1;
    }
    Ok((now, precedence.max(2)))
}

fn reason(question: &Question, now: Option<&Schema>, others: u32, levels: &[&Level]) -> Vec<String> {
    let mut reason = Vec::new();
    if let Some(observed) = &question.observed {
        let part = 100.0 * observed.bytes as f64 / observed.all_bytes.max(1) as f64;
        reason.push(format!(
            "{}: {} requests are open now; its answers are {:.1} MB so far, {part:.0} % of everybody's.",
            question.subject.in_words(),
            observed.open_streams,
            observed.bytes as f64 / 1e6
        ));
    }
    let level = now.and_then(|schema| levels.iter().find(|level| level.name == schema.level));
    if let (Some(schema), Some(level)) = (now, level) {
        let seats = nominal_seats(question.server_seats, level.shares, others);
        let borrows = match level.borrowing_limit_percent {
            None => "it borrows every seat that other levels lend: its own are no bound".to_owned(),
            Some(percent) => format!("it may borrow {percent} % more"),
        };
        reason.push(format!(
            "They match FlowSchema {} and level {}, which has {seats} of {} seats; {borrows}.",
            schema.name, level.name, question.server_seats
        ));
    }
    reason.push(
        "An answer that is read slowly is held whole in the apiserver's memory, for each request at once: the bound is on \
         how many run."
            .into(),
    );
    reason
}

fn cost(question: &Question, hold: &Hold, seats: u32, lists: u32, others: u32, levels: &[&Level]) -> Vec<String> {
    let (server, hand) = (question.server_seats, hold.hand);
    let verbs = hold.verbs.join(", ");
    let mut cost = vec![format!(
        "On each apiserver {seats} of {server} seats are for {verbs} of {}, and none are borrowed: {lists} large LISTs at \
         once, {} seats each, or {seats} small ones. All else of theirs stays where it is.",
        question.subject.in_words(),
        widest_list(seats, hand.size),
    )];
    if lists > question.lists {
        cost.push(format!(
            "Fewer than {lists} cannot be had: one share of this server's seats is that many (--lists {}).",
            question.lists
        ));
    }
    let waiting = hand.size * hold.queue_length;
    cost.push(format!(
        "Whoever finds no seat waits: {waiting} of one user at most, {WAIT_S} s at most (a quarter of kube-apiserver's \
         --request-timeout), and is then answered 429 with Retry-After; client-go asks again ten times, informers after \
         that from the start."
    ));
    if let Some(observed) = question
        .observed
        .as_ref()
        .filter(|seen| seen.open_streams > u64::from(lists))
    {
        cost.push(format!(
            "Of {} that are open now {lists} large ones would run: the last begins about {:.0} times as late as if all ran \
             at once.",
            observed.open_streams,
            observed.open_streams as f64 / f64::from(lists)
        ));
    }
    if hand.queues > 1 {
        cost.push(format!(
            "A quiet user of the group is crowded out by {} heavy ones with a probability of {:.2} % ({} queues, {} in a hand).",
            question.heavy,
            100.0 * crowded_out(hand, question.heavy),
            hand.queues,
            hand.size
        ));
    }
    let all = others.saturating_add(hold.shares);
    let change = |level: &&&Level| {
        let seats = |all| nominal_seats(server, level.shares, all);
        let (before, after) = (seats(others), seats(all));
        (before != after).then(|| format!("{} {before} to {after}", level.name))
    };
    let changes: Vec<String> = levels.iter().filter_map(|level| change(&level)).collect();
    if !changes.is_empty() {
        cost.push(format!("Other levels' seats: {}.", changes.join(", ")));
    }
    cost.push(format!(
        "To take it back: kubectl delete flowschema,prioritylevelconfiguration {}",
        hold.name
    ));
    cost
}

#[cfg(test)]
mod tests;
