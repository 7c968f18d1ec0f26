//! Why, and what it will cost: the sentences of an advice.
//!
//! Input: a question and the numbers of its hold. Output: sentences. Must never say for certain what depends on groups that
//! nobody has seen, nor give a bound without "at most".

use std::collections::BTreeSet;

use super::{
    Level, Schema, Subject,
    advice::{Hold, Question},
    place::Place,
    seats::{lent, lists_at_once, nominal_seats, widest_list},
    shuffle::crowded_out,
    yaml,
};

/// How long a request waits in a queue: a quarter of kube-apiserver's --request-timeout, which is 60 s by default
/// (k8s.io/apiserver/pkg/server/config.go).
const WAIT_S: u32 = 15;

/// How often an apiserver decides anew which level lends whom seats (k8s.io/apiserver/pkg/util/flowcontrol,
/// `borrowingAdjustmentPeriod`).
const ADJUSTED_S: u32 = 10;

pub(super) fn reason(
    question: &Question,
    hold: &Hold,
    place: &Place<'_>,
    others: u32,
    levels: &[&Level],
) -> Vec<String> {
    let mut reason = Vec::new();
    if let Some(observed) = &question.observed {
        let part = 100.0 * observed.bytes as f64 / observed.all_bytes.max(1) as f64;
        reason.push(format!(
            "{}: {} requests and {} watches are open now; the answers are {:.1} MB so far, {part:.0} % of everybody's.",
            observed.whose,
            observed.open_requests,
            observed.open_watches,
            observed.bytes as f64 / 1e6
        ));
    }
    let presumably = if place.doubtful.is_empty() { "" } else { "presumably " };
    for schema in &place.now {
        let served = levels.iter().find(|level| level.name == schema.level).map(|level| {
            let seats = nominal_seats(question.server_seats, level.shares, others);
            let borrows = match level.borrowing_limit_percent {
                None => "it borrows every seat that other levels lend: its own are no bound".to_owned(),
                Some(percent) => format!("it may borrow {percent} % more"),
            };
            format!(", which has {seats} of {} seats; {borrows}", question.server_seats)
        });
        reason.push(format!(
            "Now they {presumably}match FlowSchema {}{} and level {}{}.",
            schema.name,
            part_of(schema, question),
            schema.level,
            served.unwrap_or_default()
        ));
    }
    reason.extend(standing(question, hold, place));
    if has(&hold.verbs, "watch") {
        reason.push(
            "Informers of client-go 1.35 and later read what they would LIST by a watch that begins with all objects \
             (sendInitialEvents): such a watch takes seats as a LIST does until these are sent, and none after that."
                .into(),
        );
    } else if has(&hold.verbs, "list") {
        reason.push(
            "Informers of client-go 1.35 and later read what they would LIST by a watch that begins with all objects \
             (sendInitialEvents): these are not held without --verb watch."
                .into(),
        );
    }
    reason.push(
        "An answer that is read slowly is held whole in the apiserver's memory, for each request at once: the bound is on \
         how many run."
            .into(),
    );
    reason
}

/// What it comes before, and what comes before it.
fn standing(question: &Question, hold: &Hold, place: &Place<'_>) -> Vec<String> {
    let who = question.subject.in_words();
    let verbs = hold.verbs.join(", ");
    let mut sentences = Vec::new();
    if !place.passed.is_empty() {
        sentences.push(format!(
            "By precedence {} this comes before {}: {verbs} of {who} comes here from there.",
            hold.precedence,
            schemas(&place.passed)
        ));
    }
    if !place.taken.is_empty() {
        sentences.push(format!(
            "It comes also before {}, which are for some users of the group: ask for these again once this is applied.",
            schemas(&place.taken)
        ));
    }
    if !place.kept.is_empty() {
        sentences.push(format!(
            "Requests of some users of the group are taken by {} before this.",
            schemas(&place.kept)
        ));
    }
    if !place.doubtful.is_empty() {
        let before = schemas(&place.doubtful);
        sentences.push(match &question.subject {
            Subject::User(_) => {
                let deciding = place.doubtful.iter();
                let groups: BTreeSet<&str> = deciding
                    .flat_map(|schema| schema.deciding_groups(&question.subject))
                    .collect();
                let groups: Vec<String> = groups.into_iter().map(yaml::quoted).collect();
                format!(
                    "Which groups {who} is in is not known here: should it be in {}, its requests are taken by {before} \
                     before this, and are not held.",
                    groups.join(" or ")
                )
            }
            Subject::Group(_) => format!(
                "Who is in {who} is not known here: whoever of them is a subject of {before} comes there before this, and is not held."
            ),
        });
    }
    if !place.overtaken.is_empty() {
        sentences.push(format!(
            "Who is in the group is not known here: this comes before {}, should it be for one of its users.",
            schemas(&place.overtaken)
        ));
    }
    sentences
}

fn schemas(all: &[&Schema]) -> String {
    let names: Vec<&str> = all.iter().map(|schema| schema.name.as_str()).collect();
    match names.as_slice() {
        [name] => format!("FlowSchema {name}"),
        names => format!("FlowSchemas {}", names.join(", ")),
    }
}

/// What a schema is for that does not take all.
fn part_of(schema: &Schema, question: &Question) -> String {
    if schema.is_for_all(&question.subject, &question.verbs) {
        return String::new();
    }
    let resources = schema.rules.iter().flat_map(|rule| &rule.resources);
    let parts: Vec<String> = resources
        .map(|one| {
            let groups: Vec<String> = one.api_groups.iter().map(|group| yaml::quoted(group)).collect();
            format!(
                "{} {} of {}",
                one.verbs.join("/"),
                one.resources.join("/"),
                groups.join("/")
            )
        })
        .collect();
    format!(" with a part of it ({})", parts.join("; "))
}

fn has(verbs: &[String], verb: &str) -> bool {
    verbs.iter().any(|one| one == verb || one == "*")
}

pub(super) fn cost(question: &Question, hold: &Hold, seats: u32, others: u32, levels: &[&Level]) -> Vec<String> {
    let (server, hand) = (question.server_seats, hold.hand);
    let verbs = hold.verbs.join(", ");
    let lists = lists_at_once(seats, hand.size);
    let mut cost = vec![format!(
        "On each apiserver {seats} of {server} seats are for {verbs} of {}, and none are borrowed: at most {lists} large \
         LISTs from the watch cache at once, {} seats each, or {seats} small ones. All else of theirs stays where it is.",
        question.subject.in_words(),
        widest_list(seats, hand.size),
    )];
    if lists > question.lists {
        cost.push(format!(
            "Fewer than {lists} cannot be had: one share of this server's seats is that many (--lists {}).",
            question.lists
        ));
    }
    let lent = lent(seats, hold.lendable_percent);
    if lent > 0 {
        cost.push(format!(
            "While they leave seats free, others borrow up to {lent} of the {seats}: the next ones begin with {}, at most {} \
             large LISTs at once, until the apiserver gives the rest back, which it decides each {ADJUSTED_S} s.",
            seats - lent,
            lists_at_width(seats - lent, widest_list(seats, hand.size)),
        ));
    }
    let waiting = hand.size * hold.queue_length;
    cost.push(format!(
        "Whoever finds no seat waits: {waiting} of one user at most, {WAIT_S} s at most (a quarter of kube-apiserver's \
         --request-timeout), and is then answered 429 with Retry-After; client-go asks again ten times, informers after \
         that from the start."
    ));
    if has(&hold.verbs, "watch") {
        cost.push(
            "Their watches wait in the same queues to begin; a watch that has begun takes no seat, however long it lasts."
                .into(),
        );
    }
    cost.extend(backlog(question, hold, lists));
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

/// What becomes of what is open now. Watches are left out: they have seats only while they begin.
fn backlog(question: &Question, hold: &Hold, lists: u32) -> Option<String> {
    let open = question.observed.as_ref()?.open_requests;
    let running = u64::from(lists);
    let waiting = open.checked_sub(running).filter(|rest| *rest > 0)?;
    let room = u64::from(hold.hand.queues) * u64::from(hold.queue_length);
    let queued = waiting.min(room);
    let late = (running + queued) as f64 / lists as f64;
    let refused = match waiting - queued {
        0 => String::new(),
        refused => format!(", and {refused} are answered 429 at once"),
    };
    Some(format!(
        "Of {open} requests that are open now, if all are large LISTs, {lists} would run at once and {queued} wait{refused}; \
         the last to run begins at most about {late:.0} times as late as if all ran at once."
    ))
}

fn lists_at_width(seats: u32, width: u32) -> u32 {
    (seats / width.max(1)).max(1)
}
