//! What this machine lets agent and relay do, judged by what they are asked to do.

use super::{Finding, Gravity};

/// A feature that was tried.
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What was found, or why it cannot be used.
    pub found: Result<String, String>,
}

/// Judges features; `shim` is the running agent's, where one runs.
pub fn features(checks: Vec<Check>, shim: Option<&str>) -> Vec<Finding> {
    let counts_without = checks
        .iter()
        .any(|check| check.name == "source-sockdiag" && check.found.is_ok());
    let steers = shim == Some("steer");
    let judged = checks.into_iter().filter_map(|Check { name, found }| {
        let why = match found {
            // What is not known is not good.
            Ok(found) if found.starts_with("unknown") => return Some(Finding::note(name, found)),
            Ok(found) => return Some(Finding::good(name, found)),
            Err(why) => why,
        };
        let is_steers = name.starts_with("steer-");
        Some(match name {
            "source-ebpf" if counts_without => Finding::mend(
                name,
                Gravity::Soon,
                why,
                "connections are counted by the socket list instead: later and without protocols; grant what is missing",
            ),
            "source-ebpf" | "source-sockdiag" => Finding::mend(
                name,
                Gravity::Wrong,
                why,
                "nothing can be counted: grant CAP_NET_ADMIN at least, CAP_BPF and CAP_PERFMON too",
            ),
            // Said by what needs it.
            "capabilities" => Finding::note(name, why),
            _ if is_steers && steers => Finding::mend(
                name,
                Gravity::Wrong,
                why,
                "the agent's --shim steer cannot answer here: use a relay, or mend this (docs/steer.md)",
            ),
            _ if is_steers => return None,
            _ => Finding::note(name, why),
        })
    });
    judged.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(refused: &[&'static str], shim: Option<&str>) -> Vec<(String, Gravity)> {
        let names = [
            "capabilities",
            "source-ebpf",
            "source-sockdiag",
            "intercept",
            "steer-kernel",
        ];
        let checks = names.map(|name| Check {
            name,
            found: if refused.contains(&name) {
                Err("refused".to_owned())
            } else {
                Ok("works".to_owned())
            },
        });
        features(checks.into(), shim)
            .into_iter()
            .filter(|finding| finding.gravity > Gravity::Good)
            .map(|finding| (finding.what, finding.gravity))
            .collect()
    }

    #[test]
    fn what_is_missing_weighs_what_it_costs() {
        let bad = |name: &str, gravity| (name.to_owned(), gravity);
        assert_eq!(judged(&[], None), []);
        assert_eq!(judged(&["source-ebpf"], None), [bad("source-ebpf", Gravity::Soon)]);
        assert_eq!(
            judged(&["source-ebpf", "source-sockdiag"], None),
            [
                bad("source-ebpf", Gravity::Wrong),
                bad("source-sockdiag", Gravity::Wrong)
            ]
        );
        assert_eq!(judged(&["steer-kernel"], Some("relay")), []);
        assert_eq!(
            judged(&["steer-kernel"], Some("steer")),
            [bad("steer-kernel", Gravity::Wrong)]
        );
        assert_eq!(judged(&["intercept"], None), [bad("intercept", Gravity::Note)]);
        let unknown = Check {
            name: "lockdown",
            found: Ok("unknown: securityfs is not mounted".to_owned()),
        };
        assert_eq!(features(vec![unknown], None)[0].gravity, Gravity::Note);
    }
}
