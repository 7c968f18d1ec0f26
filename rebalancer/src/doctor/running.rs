//! The processes of this node: agent, relay, apiserver.
//!
//! Input: what they answer, as JSON, and their command lines.

use serde_json::Value;

use super::{Finding, Gravity};
use crate::steer::SteerError;

/// Holds that are as it should be, or an operator's own doing.
const CALM: [&str; 5] = ["below_threshold", "noise", "paused", "cooling_down", "plan_in_flight"];

/// A clock that is another by so many seconds is said: certificates, logs and decisions are dated by it.
const CLOCK_S: i64 = 2;

/// So many clients must have been told before it is judged where they landed.
const TOLD: u64 = 20;

/// A hold for another reason than these is worth a look after so many seconds.
const LONG: u64 = 30 * 60;

/// Judges what the agent says of itself (`/v1/status`).
pub fn agent(status: &Result<Value, String>) -> Vec<Finding> {
    let status = match status {
        Ok(status) => status,
        Err(why) => {
            return vec![Finding::mend(
                "agent",
                Gravity::Wrong,
                why,
                "start it (systemctl start rebalancer-agent), or name its socket by --api",
            )];
        }
    };
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let mut findings = vec![Finding::good(
        "agent",
        format!(
            "{}, source {}, shim {}",
            text(&status["mode"]),
            text(&status["source"]),
            text(&status["shim"])
        ),
    )];
    if status["mode"] == "dry-run" {
        findings.push(Finding::note(
            "dry run",
            "it decides and sends nothing; --mode active sends",
        ));
    }
    for warning in list(&status["warnings"]) {
        findings.push(Finding::mend(
            "warning",
            Gravity::Soon,
            text(warning),
            "docs/agent.md says what to do about it",
        ));
    }
    let hold = &status["hold"];
    if let Some(reason) = hold["reason"].as_str() {
        let since = status["hold_since_s"].as_u64().unwrap_or(0);
        let found = format!("{} (since {since} s)", text(&hold["message"]));
        // Said below, at once.
        findings.push(if CALM.contains(&reason) || since < LONG || reason == FUTILE {
            Finding::note("hold", found)
        } else {
            Finding::mend(
                "hold",
                Gravity::Soon,
                found,
                format!("docs/agent.md says what to do about the hold `{reason}`"),
            )
        });
    }
    for peer in list(&status["peers"]) {
        let what = format!("peer {}", text(&peer["apiserver"]));
        findings.push(match peer["fault"].as_str() {
            Some(fault) => Finding::mend(
                &what,
                Gravity::Wrong,
                fault,
                "until it is mended this node's agent moves nobody",
            ),
            None => Finding::good(&what, "it answers"),
        });
        findings.extend(manners(peer, status["version"].as_str()));
    }
    findings.extend(load_balancer(status));
    if let Some(clients @ 1..) = status["node_local"].as_u64() {
        findings.push(Finding::note(
            "node-local clients",
            format!("{clients} on this node, who are never told to go unless --node-local is move"),
        ));
    }
    findings
}

/// What a peer shows beside its snapshot: another release, another clock.
fn manners(peer: &Value, own: Option<&str>) -> Vec<Finding> {
    let name = peer["apiserver"].as_str().unwrap_or("-");
    let mut findings = Vec::new();
    if let Some(release) = peer["release"].as_str()
        && own.is_some_and(|own| own != release)
    {
        findings.push(Finding::mend(
            &format!("release of {name}"),
            Gravity::Soon,
            format!("{release}, this agent's is {}", own.unwrap_or("-")),
            "finish the upgrade (docs/upgrade.md)",
        ));
    }
    if let Some(ahead) = peer["clock_ahead_s"].as_i64() {
        let what = format!("clock of {name}");
        findings.push(if ahead.abs() < CLOCK_S {
            Finding::good(&what, "as this node's")
        } else {
            Finding::mend(
                &what,
                Gravity::Soon,
                format!("{} s {}", ahead.abs(), if ahead > 0 { "ahead" } else { "behind" }),
                "have both follow a time server (chronyc tracking): certificates begin and end by these clocks, and logs \
                 are dated by them",
            )
        });
    }
    findings
}

/// The hold of clients that come back.
const FUTILE: &str = "futile";

/// Whether whoever is told lands elsewhere.
fn load_balancer(status: &Value) -> Option<Finding> {
    let count = |name: &str| status["outcomes"][name].as_u64().unwrap_or(0);
    let (moved, returned) = (count("moved"), count("returned"));
    let is_futile = status["hold"]["reason"] == FUTILE;
    if !is_futile && (moved + returned < TOLD || returned <= 2 * moved) {
        return None;
    }
    Some(Finding::mend(
        "load balancer",
        Gravity::Soon,
        format!("of {} who were told to go {returned} came back", moved + returned),
        "it sends clients back to where they were: switch off its source affinity, prefer leastconn, and see that it knows \
         every apiserver as healthy (docs/planner.md)",
    ))
}

/// Judges who listens on the apiserver's port.
pub fn process(port: u16, found: Result<u32, &SteerError>) -> Finding {
    let what = "apiserver";
    match found {
        Ok(pid) => Finding::good(what, format!("process {pid} listens on port {port}")),
        Err(error @ SteerError::NobodyListens { .. }) => Finding::mend(
            what,
            Gravity::Wrong,
            error.to_string(),
            "start it, or name its port by --apiserver-port",
        ),
        Err(error @ SteerError::SeveralProcesses { .. }) => Finding::mend(
            what,
            Gravity::Soon,
            error.to_string(),
            "connections of all of them are counted as the apiserver's: give the other one another port",
        ),
        Err(error) => Finding::note(what, error.to_string()),
    }
}

/// Judges what the relay says of itself (`/v1/connections`), where the agent has one.
pub fn relay(listing: &Result<Value, String>) -> Finding {
    match listing {
        Err(why) => Finding::mend(
            "relay",
            Gravity::Wrong,
            why,
            "start it (systemctl start rebalancer-relay@1), or name its socket by --control; clients reach the apiserver \
             itself meanwhile if the agent intercepts",
        ),
        Ok(listing) => match listing["upstream"].as_str().unwrap_or("unknown") {
            "ready" => Finding::good("relay", "it serves, and its apiserver is ready"),
            "overloaded" => Finding::mend(
                "relay",
                Gravity::Soon,
                "its apiserver answers too late, or that it is not ready",
                "see what loads the apiserver; clients are served as they would be without a relay",
            ),
            state => Finding::mend(
                "relay",
                Gravity::Wrong,
                format!("its apiserver is {state}, so it takes no connections"),
                "its log says why; docs/relay.md says what it asks the apiserver",
            ),
        },
    }
}

/// A flag of the apiserver: its value where it is given, or why that is not known.
pub type Flag = Result<Option<String>, String>;

/// Judges the apiserver's flags by what the agent's shim needs of them.
pub fn apiserver(flag: impl Fn(&str) -> Flag, shim: Option<&str>) -> Vec<Finding> {
    let judged = |name: &str, judge: &dyn Fn(&str, Option<String>) -> Finding| {
        let what = format!("apiserver --{name}");
        match flag(name) {
            Ok(value) => judge(&what, value),
            Err(why) => Finding::note(&what, format!("not known: {why}")),
        }
    };
    let mut findings = vec![judged("goaway-chance", &|what, value| {
        let chance = value
            .as_deref()
            .and_then(|chance| chance.parse::<f64>().ok())
            .unwrap_or(0.0);
        match shim {
            Some("steer") if chance == 0.0 => Finding::mend(
                what,
                Gravity::Wrong,
                "0: it never asks, so steer cannot answer",
                "start it with --goaway-chance=0.000001",
            ),
            Some("relay") if chance > 0.0 => Finding::mend(
                what,
                Gravity::Soon,
                format!("{chance}: its lottery goes on beside the plans"),
                "start it without the flag",
            ),
            _ => Finding::good(what, chance.to_string()),
        }
    })];
    if shim == Some("relay") {
        findings.push(judged("requestheader-client-ca-file", &|what, value| match value {
            Some(file) => Finding::good(what, file),
            None => Finding::mend(
                what,
                Gravity::Wrong,
                "it is not given, so the apiserver believes no relay",
                "start it with the authority of the front-proxy certificate, as kubeadm does",
            ),
        }));
    }
    findings
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn worst(findings: &[Finding]) -> Gravity {
        findings.iter().map(|finding| finding.gravity).max().expect("findings")
    }

    #[test]
    fn an_agent_is_judged_by_what_it_says() {
        let well = json!({"mode": "active", "source": "ebpf", "shim": "relay", "warnings": [],
            "hold": {"reason": "below_threshold", "message": "level"}, "hold_since_s": 90_000,
            "peers": [{"apiserver": "cp-2", "fault": null}]});
        assert_eq!(worst(&agent(&Ok(well.clone()))), Gravity::Note);
        let with = |key: &str, value: Value| {
            let mut status = well.clone();
            status[key] = value;
            worst(&agent(&Ok(status)))
        };
        let lost = json!({"reason": "lost_events", "message": "waiting"});
        assert_eq!(with("hold", lost.clone()), Gravity::Soon);
        assert_eq!(with("warnings", json!(["most clients are node-local"])), Gravity::Soon);
        assert_eq!(
            with("peers", json!([{"apiserver": "cp-2", "fault": "connection refused"}])),
            Gravity::Wrong
        );
        let mut early = well.clone();
        early["hold"] = lost;
        early["hold_since_s"] = json!(60);
        assert_eq!(worst(&agent(&Ok(early))), Gravity::Note);
        assert_eq!(worst(&agent(&Err("nobody answers".to_owned()))), Gravity::Wrong);
    }

    #[test]
    fn what_peers_and_the_load_balancer_show_is_judged() {
        let with = |peer: Value, more: Value| {
            let mut status = json!({"mode": "active", "version": "0.1.0", "peers": [peer], "outcomes": {}});
            for (key, value) in more.as_object().expect("members") {
                status[key] = value.clone();
            }
            let found = agent(&Ok(status))
                .into_iter()
                .filter(|finding| finding.gravity > Gravity::Note);
            found.map(|finding| (finding.what, finding.gravity)).collect::<Vec<_>>()
        };
        let soon = |what: &str| vec![(what.to_owned(), Gravity::Soon)];
        let peer = |release: Option<&str>, clock: Option<i64>| json!({"apiserver": "cp-2", "fault": null, "release": release, "clock_ahead_s": clock});
        let well = || peer(Some("0.1.0"), Some(1));
        assert_eq!(with(well(), json!({})), []);
        assert_eq!(with(peer(None, None), json!({})), [], "an older release shows neither");
        assert_eq!(with(peer(Some("0.1.1"), Some(0)), json!({})), soon("release of cp-2"));
        for ahead in [2, -3600] {
            assert_eq!(
                with(peer(None, Some(ahead)), json!({})),
                soon("clock of cp-2"),
                "{ahead}"
            );
        }
        let outcomes = |moved: u64, returned: u64| json!({"outcomes": {"moved": moved, "returned": returned}});
        assert_eq!(with(well(), outcomes(7, 14)), [], "round robin behind one of three");
        assert_eq!(with(well(), outcomes(0, 19)), [], "too few to judge");
        assert_eq!(with(well(), outcomes(1, 19)), soon("load balancer"));
        let futile = json!({"hold": {"reason": "futile", "message": "they come back"}, "hold_since_s": 1});
        assert_eq!(with(well(), futile), soon("load balancer"));
    }

    #[test]
    fn who_listens_on_the_apiservers_port_is_judged() {
        let gravity = |error| process(6443, Err(&error)).gravity;
        assert_eq!(process(6443, Ok(7)).gravity, Gravity::Good);
        assert_eq!(gravity(SteerError::NobodyListens { port: 6443 }), Gravity::Wrong);
        let processes = "process 7 running a, process 8 running b".to_owned();
        assert_eq!(
            gravity(SteerError::SeveralProcesses { port: 6443, processes }),
            Gravity::Soon
        );
        let unseen = SteerError::ProcessNotFound {
            port: 6443,
            unreadable: 40,
        };
        assert_eq!(gravity(unseen), Gravity::Note);
    }

    #[test]
    fn an_apiserver_is_judged_by_what_the_shim_needs() {
        let found = |chance: Option<&str>, ca: Option<&str>, shim| {
            let flag = |name: &str| -> Flag {
                let value = if name == "goaway-chance" { chance } else { ca };
                Ok(value.map(str::to_owned))
            };
            worst(&apiserver(flag, Some(shim)))
        };
        assert_eq!(found(Some("0.001"), Some("/a"), "relay"), Gravity::Soon);
        assert_eq!(found(None, Some("/a"), "relay"), Gravity::Good);
        assert_eq!(found(None, None, "relay"), Gravity::Wrong);
        assert_eq!(found(None, None, "steer"), Gravity::Wrong);
        assert_eq!(found(Some("0.001"), None, "steer"), Gravity::Good);
        // What is inside another program shows no flags: nothing is missing that nobody can see.
        let hidden = |_: &str| -> Flag { Err("it runs inside k3s".to_owned()) };
        for shim in ["relay", "steer"] {
            assert_eq!(worst(&apiserver(hidden, Some(shim))), Gravity::Note);
        }
    }
}
