//! Where FlowSchemas and PriorityLevelConfigurations are read.
//!
//! Input: the way to the API, where the agent has one; or what kubectl printed. Output: schemas and levels, or one sentence
//! why not. Must never be asked in a loop: what was read is good for a while, and so is a refusal.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use k8s_openapi::api::flowcontrol::v1::{
    FlowSchema, PolicyRulesWithSubjects, PriorityLevelConfiguration, ResourcePolicyRule, Subject as ApiSubject,
};
use kube::{
    Api, Resource,
    api::{ListParams, ObjectList},
};
use rebalancer_core::fairness::{Level, Resources, Rule, Schema, Subject};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::sync::Mutex;

use super::{
    access::{Access, Asked, FLOW_SCHEMAS, Failed, PRIORITY_LEVELS},
    flow_control::{FlowControl, Names},
};

/// What was read is not read again for so long.
const FRESH: Duration = Duration::from_secs(30);

/// More objects of a kind than that are not read: a cluster has a dozen or two.
const MOST: u32 = 1_000;

/// The latest reading, or why there is none.
type Read = Result<Arc<FlowControl>, String>;

/// The way to them. Cheap to clone.
#[derive(Clone, Default)]
pub struct FlowControlReader {
    access: Arc<OnceLock<Access>>,
    last: Arc<Mutex<Option<(Instant, Read)>>>,
}

impl FlowControlReader {
    /// From now on it can ask.
    pub fn open(&self, access: Access) {
        // Set once, at the agent's start.
        let _ = self.access.set(access);
    }

    /// What there is, as it was half a minute ago at the latest.
    ///
    /// # Errors
    ///
    /// Nobody can be asked, or the API does not allow it: in words.
    pub async fn read(&self) -> Read {
        let Some(access) = self.access.get() else {
            return Err("this agent does not ask the Kubernetes API (--peers kubernetes)".to_owned());
        };
        // Whoever comes meanwhile waits for the same answer.
        let mut last = self.last.lock().await;
        if let Some((at, read)) = &*last
            && at.elapsed() < FRESH
        {
            return read.clone();
        }
        let read = ask(access).await.map(Arc::new);
        *last = Some((Instant::now(), read.clone()));
        read
    }
}

async fn ask(access: &Access) -> Result<FlowControl, String> {
    let schemas = list::<FlowSchema>(access, FLOW_SCHEMAS).await?;
    let levels = list::<PriorityLevelConfiguration>(access, PRIORITY_LEVELS).await?;
    Ok(FlowControl::of(&schemas, &levels))
}

async fn list<K>(access: &Access, of: &'static str) -> Result<Vec<K>, String>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let asked = Asked {
        verb: "list",
        of,
        namespace: "",
    };
    let all: Result<ObjectList<K>, Failed> = access
        .ask(asked, |client| async move {
            Api::<K>::all(client).list(&ListParams::default().limit(MOST)).await
        })
        .await;
    match all {
        Ok(list) => Ok(list.items),
        Err(Failed::Because(why)) => Err(why),
        Err(Failed::Outdated) => Err(format!(
            "the cluster has no {of}: API Priority and Fairness is v1 from Kubernetes 1.29 on"
        )),
    }
}

impl FlowControl {
    fn of(schemas: &[FlowSchema], levels: &[PriorityLevelConfiguration]) -> Self {
        fn names<K: Resource>(all: &[K]) -> Names {
            let of = |one: &K| Some((one.meta().uid.clone()?, one.meta().name.clone()?));
            all.iter().filter_map(of).collect()
        }
        Self {
            schema_names: names(schemas),
            level_names: names(levels),
            schemas: schemas.iter().map(schema).collect(),
            levels: levels.iter().map(level).collect(),
        }
    }

    /// From what `kubectl get prioritylevelconfigurations,flowschemas -o json` (or `-o yaml`) printed.
    ///
    /// # Errors
    ///
    /// It is something else: in words.
    pub fn from_kubectl(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct List {
            items: Vec<serde_json::Value>,
        }
        let how = "give what `kubectl get prioritylevelconfigurations,flowschemas -o json` prints";
        // JSON is YAML.
        let list: List =
            serde_yaml_ng::from_str(text).map_err(|error| format!("it is no list of objects ({error}): {how}"))?;
        let (mut schemas, mut levels) = (Vec::new(), Vec::new());
        for item in list.items {
            let kind = item["kind"].as_str().unwrap_or_default().to_owned();
            let broken = |error: serde_json::Error| format!("a {kind} in it cannot be read ({error}): {how}");
            match kind.as_str() {
                "FlowSchema" => schemas.push(serde_json::from_value(item).map_err(broken)?),
                "PriorityLevelConfiguration" => levels.push(serde_json::from_value(item).map_err(broken)?),
                _ => return Err(format!("it holds a {kind:?}: {how}")),
            }
        }
        Ok(Self::of(&schemas, &levels))
    }
}

/// A number of the API's; what is negative is refused there.
fn number(value: Option<i32>, default: u32) -> u32 {
    value.map_or(default, |value| u32::try_from(value).unwrap_or(0))
}

fn level(level: &PriorityLevelConfiguration) -> Level {
    let spec = level.spec.clone().unwrap_or_default();
    let is_exempt = spec.type_ == "Exempt";
    // The API's defaults: 30 where it is limited, none where it is exempt.
    let shares = match (&spec.limited, &spec.exempt) {
        (Some(limited), _) => number(limited.nominal_concurrency_shares, 30),
        (None, Some(exempt)) => number(exempt.nominal_concurrency_shares, 0),
        (None, None) => 0,
    };
    let borrows = spec
        .limited
        .as_ref()
        .and_then(|limited| limited.borrowing_limit_percent);
    Level {
        name: level.metadata.name.clone().unwrap_or_default(),
        is_exempt,
        shares,
        borrowing_limit_percent: borrows.map(|percent| number(Some(percent), 0)),
    }
}

fn schema(schema: &FlowSchema) -> Schema {
    let spec = schema.spec.clone().unwrap_or_default();
    Schema {
        name: schema.metadata.name.clone().unwrap_or_default(),
        level: spec.priority_level_configuration.name,
        // The API's default.
        precedence: number(spec.matching_precedence, 1_000),
        rules: spec.rules.iter().flatten().map(rule).collect(),
    }
}

fn rule(rule: &PolicyRulesWithSubjects) -> Rule {
    let resources = |one: &ResourcePolicyRule| Resources {
        verbs: one.verbs.clone(),
        api_groups: one.api_groups.clone(),
        resources: one.resources.clone(),
        namespaces: one.namespaces.clone().unwrap_or_default(),
        cluster_scope: one.cluster_scope.unwrap_or_default(),
    };
    Rule {
        subjects: rule.subjects.iter().filter_map(subject).collect(),
        resources: rule.resource_rules.iter().flatten().map(resources).collect(),
    }
}

fn subject(subject: &ApiSubject) -> Option<Subject> {
    if let Some(user) = &subject.user {
        return Some(Subject::User(user.name.clone()));
    }
    if let Some(group) = &subject.group {
        return Some(Subject::Group(group.name.clone()));
    }
    let account = subject.service_account.as_ref()?;
    Some(match account.name.as_str() {
        "*" => Subject::Group(format!("system:serviceaccounts:{}", account.namespace)),
        name => Subject::User(format!("system:serviceaccount:{}:{name}", account.namespace)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::Shown;

    const KUBECTL: &str = r#"
apiVersion: v1
kind: List
items:
- apiVersion: flowcontrol.apiserver.k8s.io/v1
  kind: PriorityLevelConfiguration
  metadata: {name: exempt, uid: 00000000-0000-0000-0000-000000000001}
  spec: {type: Exempt, exempt: {nominalConcurrencyShares: 0, lendablePercent: 0}}
- apiVersion: flowcontrol.apiserver.k8s.io/v1
  kind: PriorityLevelConfiguration
  metadata: {name: workload-low, uid: 00000000-0000-0000-0000-000000000002}
  spec:
    type: Limited
    limited:
      nominalConcurrencyShares: 100
      lendablePercent: 90
      limitResponse: {type: Queue, queuing: {handSize: 6, queueLengthLimit: 50, queues: 128}}
- apiVersion: flowcontrol.apiserver.k8s.io/v1
  kind: FlowSchema
  metadata: {name: service-accounts, uid: 00000000-0000-0000-0000-000000000003}
  spec:
    distinguisherMethod: {type: ByUser}
    matchingPrecedence: 9000
    priorityLevelConfiguration: {name: workload-low}
    rules:
    - resourceRules:
      - {apiGroups: [cilium.io], namespaces: [a], resources: ["*"], verbs: [list, watch]}
      subjects:
      - {kind: Group, group: {name: system:serviceaccounts}}
      - {kind: ServiceAccount, serviceAccount: {namespace: a, name: "*"}}
      - {kind: ServiceAccount, serviceAccount: {namespace: a, name: b}}
    - nonResourceRules:
      - {nonResourceURLs: [/readyz], verbs: [get]}
      subjects:
      - {kind: Group, group: {name: system:authenticated}}
"#;

    #[test]
    fn what_kubectl_prints_is_read_and_comes_through_the_local_api() {
        let read = FlowControl::from_kubectl(KUBECTL).expect("a list");
        let level = |name: &str, is_exempt, shares| Level {
            name: name.into(),
            is_exempt,
            shares,
            borrowing_limit_percent: None,
        };
        assert_eq!(
            read.levels,
            [level("exempt", true, 0), level("workload-low", false, 100)]
        );
        let schema = Schema {
            name: "service-accounts".into(),
            level: "workload-low".into(),
            precedence: 9_000,
            rules: vec![
                Rule {
                    subjects: vec![
                        Subject::Group("system:serviceaccounts".into()),
                        Subject::Group("system:serviceaccounts:a".into()),
                        Subject::User("system:serviceaccount:a:b".into()),
                    ],
                    resources: vec![Resources {
                        verbs: vec!["list".into(), "watch".into()],
                        api_groups: vec!["cilium.io".into()],
                        resources: vec!["*".into()],
                        namespaces: vec!["a".into()],
                        cluster_scope: false,
                    }],
                },
                Rule {
                    subjects: vec![Subject::Group("system:authenticated".into())],
                    resources: Vec::new(),
                },
            ],
        };
        assert_eq!(read.schemas, [schema]);
        assert_eq!(
            read.schema_names["00000000-0000-0000-0000-000000000003"],
            "service-accounts"
        );
        let json = serde_json::to_value(read.shown()).expect("JSON");
        let shown: Shown = serde_json::from_value(json).expect("the same");
        let again = FlowControl::from(shown);
        assert_eq!(again.levels, read.levels);
        let sorted = |control: &FlowControl| {
            let mut schemas = control.schemas.clone();
            for rule in schemas.iter_mut().flat_map(|schema| &mut schema.rules) {
                rule.subjects.sort_by_key(|subject| format!("{subject:?}"));
            }
            schemas
        };
        assert_eq!(sorted(&again), sorted(&read));
    }

    #[test]
    fn what_is_something_else_is_told_in_a_sentence() {
        for (text, part) in [
            ("", "no list of objects"),
            ("items: 1", "no list of objects"),
            ("{", "no list of objects"),
            ("items: [{kind: Pod}]", "\"Pod\""),
            ("items: [{}]", "it holds a"),
            (
                "items: [{kind: FlowSchema, spec: 1}]",
                "a FlowSchema in it cannot be read",
            ),
        ] {
            let why = FlowControl::from_kubectl(text).expect_err(text);
            assert!(why.contains(part) && why.contains("kubectl get"), "{text}: {why}");
        }
    }
}
