//! Certificate policies (RFC 5280, section 6.1, as RFC 9618 has it), as verify.go's `policiesValid` judges them.
//!
//! Input: a chain. Output: whether a policy is left where one is demanded; any will do.
//! Must never take longer than the chain's policies times its length: the graph has a node a policy and depth.

use std::collections::{BTreeMap, BTreeSet};

use super::certificate::Certificate;

/// anyPolicy, 2.5.29.32.0.
const ANY: &[u8] = &[0x55, 0x1d, 32, 0];

struct Node {
    policy: Vec<u8>,
    expected: Vec<Vec<u8>>,
    parents: BTreeSet<usize>,
    children: BTreeSet<usize>,
}

struct Graph {
    nodes: Vec<Node>,
    /// Depth by depth, from the anchor: each policy's node.
    strata: Vec<BTreeMap<Vec<u8>, usize>>,
}

impl Graph {
    fn new() -> Self {
        let mut graph = Self {
            nodes: Vec::new(),
            strata: vec![BTreeMap::new()],
        };
        graph.insert(ANY.to_vec(), vec![ANY.to_vec()], &[]);
        graph
    }

    fn insert(&mut self, policy: Vec<u8>, expected: Vec<Vec<u8>>, parents: &[usize]) {
        let id = self.nodes.len();
        for parent in parents {
            self.nodes[*parent].children.insert(id);
        }
        self.nodes.push(Node {
            policy: policy.clone(),
            expected,
            parents: parents.iter().copied().collect(),
            children: BTreeSet::new(),
        });
        if let Some(leaves) = self.strata.last_mut() {
            leaves.insert(policy, id);
        }
    }

    fn leaf(&self, policy: &[u8]) -> Option<usize> {
        self.strata.last()?.get(policy).copied()
    }

    /// The depth above the leaves.
    fn above(&self) -> BTreeMap<Vec<u8>, usize> {
        let at = self.strata.len().checked_sub(2);
        at.map(|at| self.strata[at].clone()).unwrap_or_default()
    }

    fn remove(&mut self, depth: usize, policy: &[u8]) {
        let Some(id) = self.strata[depth].remove(policy) else {
            return;
        };
        for parent in std::mem::take(&mut self.nodes[id].parents) {
            self.nodes[parent].children.remove(&id);
        }
        for child in std::mem::take(&mut self.nodes[id].children) {
            self.nodes[child].parents.remove(&id);
        }
    }

    /// Removes what leads to no leaf.
    fn prune(&mut self) {
        for depth in (1..self.strata.len() - 1).rev() {
            let barren = self.strata[depth]
                .iter()
                .filter(|(_, id)| self.nodes[**id].children.is_empty());
            for policy in barren.map(|(policy, _)| policy.clone()).collect::<Vec<_>>() {
                self.remove(depth, &policy);
            }
        }
    }

    /// The next certificate's policies.
    fn descend(&mut self, policies: &[Vec<u8>], any_counts: bool) {
        self.strata.push(BTreeMap::new());
        let above = self.above();
        let mut expecting: BTreeMap<&[u8], Vec<usize>> = BTreeMap::new();
        let nodes: Vec<(usize, Vec<Vec<u8>>)> = above
            .values()
            .map(|id| (*id, self.nodes[*id].expected.clone()))
            .collect();
        for (id, expected) in &nodes {
            for policy in expected {
                expecting.entry(policy).or_default().push(*id);
            }
        }
        for policy in policies.iter().filter(|policy| *policy != ANY) {
            let any = above.get(ANY).map(|id| vec![*id]);
            if let Some(parents) = expecting.get(policy.as_slice()).cloned().or(any) {
                self.insert(policy.clone(), vec![policy.clone()], &parents);
            }
        }
        if any_counts && policies.iter().any(|policy| policy == ANY) {
            for (policy, parents) in expecting {
                if self.leaf(policy).is_none() {
                    self.insert(policy.to_vec(), vec![policy.to_vec()], &parents);
                }
            }
        }
        self.prune();
    }

    /// What one policy is called further down; `false` when a mapping is not allowed.
    fn map(&mut self, mappings: &[(Vec<u8>, Vec<u8>)], allowed: bool) -> bool {
        let mut by_issuer: BTreeMap<&[u8], Vec<Vec<u8>>> = BTreeMap::new();
        for (issuer, subject) in mappings {
            if !allowed {
                self.remove(self.strata.len() - 1, issuer);
            } else if issuer == ANY || subject == ANY {
                return false;
            } else {
                by_issuer.entry(issuer).or_default().push(subject.clone());
            }
        }
        self.prune();
        for (issuer, subjects) in by_issuer {
            if let Some(leaf) = self.leaf(issuer) {
                self.nodes[leaf].expected = subjects;
            } else if let Some(any) = self.leaf(ANY) {
                self.insert(issuer.to_vec(), subjects, &[any]);
            }
        }
        true
    }

    /// Whether any policy is valid at the end.
    fn is_anything_left(&self) -> bool {
        let below_any = |id: &usize| {
            let node = &self.nodes[*id];
            let only = node.parents.first().filter(|_| node.parents.len() == 1);
            node.policy != ANY && only.is_some_and(|parent| self.nodes[*parent].policy == ANY)
        };
        self.leaf(ANY).is_some() || self.strata.iter().flat_map(BTreeMap::values).any(below_any)
    }
}

/// Judges a chain, the leaf first and the anchor last, whose own policies do not count.
pub fn are_valid(chain: &[&Certificate]) -> bool {
    let Some(below) = chain.len().checked_sub(1).filter(|below| *below > 0) else {
        return true;
    };
    let count = below as i64;
    let mut graph = Some(Graph::new());
    let (mut inhibit_any, mut explicit, mut mapping) = (count + 1, count + 1, count + 1);
    for (at, certificate) in chain[..below].iter().enumerate().rev() {
        let extensions = &certificate.extensions;
        let self_issued = certificate.issuer() == certificate.subject();
        if extensions.policies.is_empty() {
            graph = None;
        }
        if explicit == 0 && graph.is_none() {
            return false;
        }
        if let Some(graph) = &mut graph {
            graph.descend(&extensions.policies, inhibit_any > 0 || at > 0 && self_issued);
            if at > 0 && !extensions.mappings.is_empty() && !graph.map(&extensions.mappings, mapping > 0) {
                return false;
            }
        }
        if at == 0 {
            break;
        }
        if !self_issued {
            for counter in [&mut explicit, &mut mapping, &mut inhibit_any] {
                *counter = (*counter - 1).max(0);
            }
        }
        for (counter, said) in [
            (&mut explicit, extensions.require_explicit_policy),
            (&mut mapping, extensions.inhibit_policy_mapping),
            (&mut inhibit_any, extensions.inhibit_any_policy),
        ] {
            *counter = said.map_or(*counter, |said| said.min(*counter));
        }
    }
    explicit = (explicit - 1).max(0);
    if chain[0].extensions.require_explicit_policy == Some(0) {
        explicit = 0;
    }
    explicit > 0 || graph.is_some_and(|graph| graph.is_anything_left())
}
