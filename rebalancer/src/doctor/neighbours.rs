//! Who else is there: at a port, or with a program that steers connections.
//!
//! Input: the kernel's lists. Must never take a process for this project's by more than its program's name.

use std::path::{Path, PathBuf};

use super::{Finding, Gravity};
use crate::{intercept::Steering, steer};

/// A process by its number and what it runs.
pub type Neighbour = (u32, PathBuf);

/// Whether what a process runs is this program, also where it was replaced since.
fn is_ours(executable: &Path) -> bool {
    let name = executable.file_name().unwrap_or_default().to_string_lossy();
    let own = std::env::current_exe().unwrap_or_default();
    let own = own.file_name().unwrap_or_default().to_string_lossy();
    name.trim_end_matches(steer::DELETED) == own.trim_end_matches(steer::DELETED)
}

fn shown(neighbours: &[Neighbour]) -> String {
    let each = neighbours
        .iter()
        .map(|(pid, executable)| format!("process {pid} ({})", executable.display()));
    each.collect::<Vec<_>>().join(", ")
}

/// Judges a port that a flag names: `holders` are those who listen there, `None` for nobody; `runs` is whether who has
/// the flag runs.
pub fn port(flag: &str, port: u16, holders: Result<Option<Vec<Neighbour>>, String>, runs: bool) -> Finding {
    let what = format!("port {port} ({flag})");
    let others = |holders: &[Neighbour]| -> Vec<Neighbour> {
        let others = holders.iter().filter(|(_, executable)| !is_ours(executable));
        others.cloned().collect()
    };
    match holders {
        Err(why) => Finding::note(&what, format!("not known: {why}")),
        Ok(None) if runs => Finding::note(&what, "nobody listens there in this network namespace"),
        Ok(None) => Finding::good(&what, "free"),
        Ok(Some(holders)) if holders.is_empty() => {
            Finding::note(&what, "taken; by whom is not seen: run this as root, on the host")
        }
        Ok(Some(holders)) => match others(&holders)[..] {
            [] => Finding::good(&what, "rebalancer's own"),
            ref others => Finding::mend(
                &what,
                Gravity::Wrong,
                format!("{} listens there", shown(others)),
                format!("end that one, or give {flag} another port"),
            ),
        },
    }
}

/// Judges who steers connections in this network namespace; `agent` is the process of this node's agent.
pub fn steering(found: Result<Vec<Steering>, String>, agent: Option<u32>) -> Vec<Finding> {
    let found = match found {
        Ok(found) => found,
        Err(why) => return vec![Finding::note("steering", format!("who does is not known: {why}"))],
    };
    let judged = found.into_iter().map(|Steering { program, name, holders }| {
        let what = match name {
            Some(name) => format!("program {program} `{name}`"),
            None => format!("program {program}"),
        };
        if holders.is_empty() {
            return Finding::note(
                "steering",
                format!(
                    "{what} steers connections here too; whose it is is not seen: it may send clients past the relay"
                ),
            );
        }
        let (ours, others): (Vec<Neighbour>, Vec<Neighbour>) =
            holders.into_iter().partition(|(_, executable)| is_ours(executable));
        if !others.is_empty() {
            return Finding::note(
                "steering",
                format!(
                    "{what} of {} steers connections here too: it may send clients past the relay",
                    shown(&others)
                ),
            );
        }
        match agent {
            Some(agent) if ours.iter().all(|(pid, _)| *pid != agent) => Finding::mend(
                "steering",
                Gravity::Wrong,
                format!("{}, another agent, steers connections here", shown(&ours)),
                "end one of the two: one agent for one apiserver",
            ),
            _ => Finding::good("steering", format!("{} alone", shown(&ours))),
        }
    });
    judged.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Neighbour {
        (7, std::env::current_exe().expect("a test"))
    }

    fn other() -> Neighbour {
        (8, "/usr/sbin/haproxy".into())
    }

    #[test]
    fn a_port_is_judged_by_who_has_it() {
        let judged = |holders, runs| port("--metrics", 9470, holders, runs);
        assert_eq!(judged(Ok(None), false).gravity, Gravity::Good);
        assert_eq!(judged(Ok(None), true).gravity, Gravity::Note);
        assert_eq!(judged(Ok(Some(vec![ours()])), true).gravity, Gravity::Good);
        assert_eq!(
            judged(Ok(Some(vec![])), true).gravity,
            Gravity::Note,
            "not seen is not good"
        );
        assert_eq!(judged(Err("no /proc".to_owned()), true).gravity, Gravity::Note);
        let (pid, path) = ours();
        let replaced = (pid, PathBuf::from(format!("{}{}", path.display(), steer::DELETED)));
        assert_eq!(judged(Ok(Some(vec![replaced])), true).gravity, Gravity::Good);
        for holders in [vec![other()], vec![ours(), other()]] {
            let found = judged(Ok(Some(holders)), true);
            assert_eq!(found.gravity, Gravity::Wrong);
            assert!(found.found.contains("process 8 (/usr/sbin/haproxy)"), "{found:?}");
            assert!(found.fix.is_some_and(|fix| fix.contains("--metrics")));
        }
    }

    #[test]
    fn who_steers_beside_the_agent_is_named() {
        let one = |holders: &[Neighbour]| Steering {
            program: 23,
            name: Some("intercept".to_owned()),
            holders: holders.to_vec(),
        };
        let gravity = |holders: &[Neighbour], agent| steering(Ok(vec![one(holders)]), agent)[0].gravity;
        assert_eq!(gravity(&[ours()], Some(7)), Gravity::Good);
        assert_eq!(gravity(&[ours()], Some(9)), Gravity::Wrong, "two agents");
        assert_eq!(
            gravity(&[ours()], None),
            Gravity::Good,
            "which process the agent is is not seen"
        );
        assert_eq!(gravity(&[other()], Some(7)), Gravity::Note);
        assert_eq!(gravity(&[], Some(7)), Gravity::Note);
        assert_eq!(steering(Ok(Vec::new()), Some(7)), []);
    }
}
