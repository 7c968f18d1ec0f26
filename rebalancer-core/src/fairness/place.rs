//! Where a hold stands among the cluster's schemas.
//!
//! Job: a `matchingPrecedence` with which a hold's requests come to it, and which schemas it comes before and after.
//! Input: a question. Output: a [`Place`]. Must never put a group's hold before that of one of its users.

use super::{
    advice::{Question, Refused},
    schemas::{Kin, Schema, Subject},
};

/// Where service accounts' own schema is in a cluster whose schemas say nothing.
const PRECEDENCE: u32 = 9_000;

/// The API keeps precedence 1 for the schema `exempt`.
const FIRST: u32 = 2;

/// A place, and who else stands where; each list in the order in which schemas are looked at.
#[derive(Debug)]
pub(super) struct Place<'q> {
    /// `matchingPrecedence`.
    pub precedence: u32,
    /// What their requests match now: up to the first that takes all of them.
    pub now: Vec<&'q Schema>,
    /// All of whose requests that match come to the hold from now on, in part or whole.
    pub passed: Vec<&'q Schema>,
    /// Of a group: which are for some of its users, and come after the hold.
    pub taken: Vec<&'q Schema>,
    /// The same, and come before the hold.
    pub kept: Vec<&'q Schema>,
    /// Which come before the hold, if those held are in a group of theirs.
    pub doubtful: Vec<&'q Schema>,
    /// Of a group: which come after the hold, if whom they are for is in the group.
    pub overtaken: Vec<&'q Schema>,
}

/// The place of a hold of that name.
///
/// # Errors
///
/// They are exempt, or nothing may come before what they match.
pub(super) fn place<'q>(question: &'q Question, own: &str) -> Result<Place<'q>, Refused> {
    let who = &question.subject;
    let mut schemas: Vec<(&Schema, Kin)> = question
        .schemas
        .iter()
        .filter(|schema| schema.name != own)
        .map(|schema| (schema, kin(question, schema)))
        .filter(|(_, kin)| *kin != Kin::None)
        .collect();
    schemas.sort_by_key(|(schema, _)| schema.position());
    let of = |wanted: Kin| {
        schemas
            .iter()
            .filter(move |(_, kin)| *kin == wanted)
            .map(|(schema, _)| *schema)
    };
    let mut now = Vec::new();
    for schema in of(Kin::All) {
        now.push(schema);
        if schema.is_for_all(who, &question.verbs) {
            break;
        }
    }
    let is_exempt = |schema: &&&Schema| {
        let mut levels = question.levels.iter();
        levels.any(|level| level.name == schema.level && level.is_exempt)
    };
    if let Some(schema) = now.iter().find(is_exempt) {
        return Err(Refused(format!(
            "{} is exempt by FlowSchema {}: change that one first",
            who.in_words(),
            schema.name
        )));
    }
    // Holds of different users may have the same place: nobody is two users. A group's hold stands behind all of its users'.
    let room = match who {
        Subject::User(_) => 2,
        Subject::Group(_) => 1,
    };
    let first = now.first().map_or(PRECEDENCE, |schema| schema.precedence);
    let precedence = first.saturating_sub(room).max(FIRST);
    let here = (precedence, own);
    if let Some(schema) = now.first().filter(|schema| schema.position() < here) {
        return Err(Refused(format!(
            "FlowSchema {} has matchingPrecedence {}, and nothing may come before it: give it a higher one first",
            schema.name, schema.precedence
        )));
    }
    let (kept, taken) = of(Kin::Some).partition(|schema| schema.position() < here);
    let (doubtful, mut overtaken): (Vec<_>, Vec<_>) = of(Kin::Unknown).partition(|schema| schema.position() < here);
    if matches!(who, Subject::User(_)) {
        // Nothing is more particular than a user's hold.
        overtaken.clear();
    }
    Ok(Place {
        precedence,
        passed: of(Kin::All).collect(),
        taken,
        kept,
        doubtful,
        overtaken,
        now,
    })
}

/// Where a schema was seen in answers to them, groups that are not known are those it takes.
fn kin(question: &Question, schema: &Schema) -> Kin {
    let kin = schema.kin(&question.subject, &question.verbs);
    let seen = question.observed.iter().flat_map(|observed| &observed.schemas);
    if kin == Kin::Unknown && seen.into_iter().any(|name| *name == schema.name) {
        return Kin::All;
    }
    kin
}
