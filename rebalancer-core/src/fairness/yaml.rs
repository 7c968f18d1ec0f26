//! The manifest's text: two objects of flowcontrol.apiserver.k8s.io/v1.
//!
//! Input: an advice's numbers and names. Output: YAML. Must never let a name end its own line or quotes.

use std::fmt::Write as _;

use crate::unseen::is_unseen;

use super::{Subject, advice::Hold, shuffle::Hand};

/// A string as YAML's double-quoted scalars have it, which are JSON's.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                quoted.push('\\');
                quoted.push(c);
            }
            c if c.is_control() || !c.is_ascii() && !c.is_alphanumeric() => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    // Writing to a String cannot fail.
                    let _ = write!(quoted, "\\u{unit:04x}");
                }
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Text as a comment of one line, whatever it holds.
pub(super) fn comment(text: &str) -> String {
    // To YAML some of them end a line too.
    let line: String = text.chars().map(|c| if is_unseen(c) { ' ' } else { c }).collect();
    format!("# {line}\n")
}

/// Both objects.
pub(super) fn manifest(hold: &Hold) -> String {
    let Hold {
        name,
        subject,
        verbs,
        precedence,
        shares,
        lendable_percent,
        hand: Hand { queues, size },
        queue_length,
    } = hold;
    let subject = match subject {
        Subject::User(user) => format!("{{kind: User, user: {{name: {}}}}}", quoted(user)),
        Subject::Group(group) => format!("{{kind: Group, group: {{name: {}}}}}", quoted(group)),
    };
    let distinguisher = match hold.subject {
        Subject::User(_) => "",
        Subject::Group(_) => "  distinguisherMethod: {type: ByUser}\n",
    };
    let verbs: Vec<String> = verbs.iter().map(|verb| quoted(verb)).collect();
    format!(
        "\
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: PriorityLevelConfiguration
metadata:
  name: {name}
spec:
  type: Limited
  limited:
    nominalConcurrencyShares: {shares}
    lendablePercent: {lendable_percent}
    borrowingLimitPercent: 0
    limitResponse:
      type: Queue
      queuing: {{queues: {queues}, handSize: {size}, queueLengthLimit: {queue_length}}}
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata:
  name: {name}
spec:
  priorityLevelConfiguration: {{name: {name}}}
  matchingPrecedence: {precedence}
{distinguisher}  rules:
  - subjects:
    - {subject}
    resourceRules:
    - {{verbs: [{}], apiGroups: [\"*\"], resources: [\"*\"], namespaces: [\"*\"], clusterScope: true}}
",
        verbs.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_ends_its_quotes_or_its_line() {
        for (text, expected) in [
            ("system:node:a", r#""system:node:a""#),
            ("a\"b\\c", r#""a\"b\\c""#),
            ("a\nb\u{85}\u{2028}", r#""a\u000ab\u0085\u2028""#),
            ("Ünal", "\"Ünal\""),
        ] {
            assert_eq!(quoted(text), expected);
        }
        assert_eq!(comment("a\nb\u{85}c\u{2028}d"), "# a b c d\n");
        assert_eq!(comment("a\u{202e}b"), "# a b\n");
    }
}
