//! The cluster's FlowSchemas and PriorityLevelConfigurations: their names, and who has how many shares.
//!
//! Output: what UIDs in answers mean, and what `advise` reckons with; the same for the local API.

use std::collections::BTreeMap;

use rebalancer_core::fairness::{Level, Schema, Subject};
use serde::{Deserialize, Serialize};

/// An object's name by its UID.
pub type Names = BTreeMap<String, String>;

/// What there is.
#[derive(Clone, Debug, Default)]
pub struct FlowControl {
    /// FlowSchemas by UID.
    pub schema_names: Names,
    /// PriorityLevelConfigurations by UID.
    pub level_names: Names,
    /// As `advise` takes them.
    pub schemas: Vec<Schema>,
    /// The same.
    pub levels: Vec<Level>,
}

impl FlowControl {
    /// For the local API.
    pub fn shown(&self) -> Shown {
        let level = |level: &Level| ShownLevel {
            name: level.name.clone(),
            exempt: level.is_exempt,
            shares: level.shares,
            borrowing_limit_percent: level.borrowing_limit_percent,
        };
        let schema = |schema: &Schema| {
            let (users, groups) = schema
                .subjects
                .iter()
                .partition::<Vec<_>, _>(|one| matches!(one, Subject::User(_)));
            let names = |all: Vec<&Subject>| {
                let name = |one: &Subject| match one {
                    Subject::User(name) | Subject::Group(name) => name.clone(),
                };
                all.into_iter().map(name).collect()
            };
            ShownSchema {
                name: schema.name.clone(),
                level: schema.level.clone(),
                precedence: schema.precedence,
                users: names(users),
                groups: names(groups),
                takes_all: schema.takes_all,
            }
        };
        Shown {
            priority_levels: self.levels.iter().map(level).collect(),
            flow_schemas: self.schemas.iter().map(schema).collect(),
        }
    }
}

/// What the local API shows of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shown {
    priority_levels: Vec<ShownLevel>,
    flow_schemas: Vec<ShownSchema>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ShownLevel {
    name: String,
    exempt: bool,
    shares: u32,
    borrowing_limit_percent: Option<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ShownSchema {
    name: String,
    level: String,
    precedence: u32,
    users: Vec<String>,
    groups: Vec<String>,
    takes_all: bool,
}

impl From<Shown> for FlowControl {
    fn from(shown: Shown) -> Self {
        let level = |level: ShownLevel| Level {
            name: level.name,
            is_exempt: level.exempt,
            shares: level.shares,
            borrowing_limit_percent: level.borrowing_limit_percent,
        };
        let schema = |schema: ShownSchema| Schema {
            name: schema.name,
            level: schema.level,
            precedence: schema.precedence,
            subjects: schema
                .users
                .into_iter()
                .map(Subject::User)
                .chain(schema.groups.into_iter().map(Subject::Group))
                .collect(),
            takes_all: schema.takes_all,
        };
        Self {
            levels: shown.priority_levels.into_iter().map(level).collect(),
            schemas: shown.flow_schemas.into_iter().map(schema).collect(),
            ..Self::default()
        }
    }
}
