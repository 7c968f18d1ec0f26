//! The cluster's FlowSchemas and PriorityLevelConfigurations: their names, and who has how many shares.
//!
//! Output: what UIDs in answers mean, and what `advise` reckons with; the same for the local API.

use std::collections::BTreeMap;

use rebalancer_core::fairness::{Level, Resources, Rule, Schema, Subject};
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
        let schema = |schema: &Schema| ShownSchema {
            name: schema.name.clone(),
            level: schema.level.clone(),
            precedence: schema.precedence,
            rules: schema.rules.iter().map(shown_rule).collect(),
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
    rules: Vec<ShownRule>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ShownRule {
    users: Vec<String>,
    groups: Vec<String>,
    resources: Vec<ShownResources>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ShownResources {
    verbs: Vec<String>,
    api_groups: Vec<String>,
    resources: Vec<String>,
    namespaces: Vec<String>,
    cluster_scope: bool,
}

fn shown_rule(rule: &Rule) -> ShownRule {
    let (mut users, mut groups) = (Vec::new(), Vec::new());
    for subject in &rule.subjects {
        match subject {
            Subject::User(name) => users.push(name.clone()),
            Subject::Group(name) => groups.push(name.clone()),
        }
    }
    let resources = |one: &Resources| ShownResources {
        verbs: one.verbs.clone(),
        api_groups: one.api_groups.clone(),
        resources: one.resources.clone(),
        namespaces: one.namespaces.clone(),
        cluster_scope: one.cluster_scope,
    };
    ShownRule {
        users,
        groups,
        resources: rule.resources.iter().map(resources).collect(),
    }
}

impl From<ShownRule> for Rule {
    fn from(shown: ShownRule) -> Self {
        let users = shown.users.into_iter().map(Subject::User);
        let resources = |one: ShownResources| Resources {
            verbs: one.verbs,
            api_groups: one.api_groups,
            resources: one.resources,
            namespaces: one.namespaces,
            cluster_scope: one.cluster_scope,
        };
        Self {
            subjects: users.chain(shown.groups.into_iter().map(Subject::Group)).collect(),
            resources: shown.resources.into_iter().map(resources).collect(),
        }
    }
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
            rules: schema.rules.into_iter().map(Rule::from).collect(),
        };
        Self {
            levels: shown.priority_levels.into_iter().map(level).collect(),
            schemas: shown.flow_schemas.into_iter().map(schema).collect(),
            ..Self::default()
        }
    }
}
