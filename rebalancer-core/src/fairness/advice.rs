//! The advice: who is held by what, why, and what that costs whom.
//!
//! Job: from a [`Question`] to the numbers of a FlowSchema and a PriorityLevelConfiguration. Output: [`Advice`] or
//! [`Refused`]. Must never hold somebody who did not flood more than it says: what its rules do not name stays where it is.

use super::{
    Level, Schema, Subject,
    place::place,
    seats::{lists_at_once, nominal_seats, shares_for},
    shuffle::{Hand, crowded_out},
    words, yaml,
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

/// What was seen of who floods.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Whose requests these are, as a sentence begins: a user, a user agent.
    pub whose: String,
    /// Their streams that are open now on this apiserver and are no watches.
    pub open_requests: u64,
    /// Their watches that are open now.
    pub open_watches: u64,
    /// Their answers so far, in octets.
    pub bytes: u64,
    /// Everybody's.
    pub all_bytes: u64,
    /// FlowSchemas that requests of the subject came by, for certain.
    pub schemas: Vec<String>,
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
    let place = place(question, &name)?;
    let hold = Hold {
        name: name.clone(),
        subject: question.subject.clone(),
        verbs: question.verbs.clone(),
        precedence: place.precedence,
        shares,
        lendable_percent: LENDABLE_PERCENT,
        hand,
        queue_length: QUEUE_LENGTH,
    };
    Ok(Advice {
        manifest: yaml::manifest(&hold),
        reason: words::reason(question, &hold, &place, others, &levels),
        cost: words::cost(question, &hold, seats, others, &levels),
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

/// A name that an object may have, which says whom it holds: another one for each subject. Of schemas with one precedence the
/// first by name counts: by these names a user's hold comes before a group's.
fn name_of(subject: &Subject) -> String {
    let kind = match subject {
        Subject::User(_) => "user",
        Subject::Group(_) => "users-of",
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

#[cfg(test)]
mod tests;
