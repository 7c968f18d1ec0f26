//! Whether light kubelets ask what hollow ones of k8s.io/kubernetes/pkg/kubemark ask: by the apiserver's audit log.
//!
//! Job: as many of each on one apiserver at the same time; what each kind asked when it came, and what it goes on asking.
//! Must never take a light kubelet for a hollow one: each has a user of its own, and the apiserver says who asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::until;
use crate::{
    apiserver::{Settings, start_apiserver, start_etcd},
    bench::{
        audit::Log,
        kubelets::{Group, Kubelets},
    },
    demo::scene::check_interrupt,
    fixture::{self, Fixture},
    kube::Admin,
    netns::Network,
    node::PORT,
    pki::Pki,
    process::{Process, wait_for},
};

/// How long anything may take to start.
const START: Duration = Duration::from_secs(300);

/// Within which all of them come.
const RAMP: Duration = Duration::from_secs(10);

/// How often each reports its status here, so that some do while it is looked at: a light one's first is random within one
/// and a half of it.
const STATUS: Duration = Duration::from_secs(30);

/// From the moment all have their watches until nothing is left of their coming.
const SETTLE: Duration = Duration::from_secs(60);

/// For how long it is counted what they go on asking.
const STEADY: Duration = Duration::from_secs(120);

/// How many watches a kubelet has.
const WATCHES: usize = 5;

/// What they go on asking may differ by so much: Leases are renewed up to 4 % late, and a window cuts off one of twelve.
const TOLERANCE: f64 = 0.1;

/// What is asked, and by how many requests of all of a kind.
type Asked = BTreeMap<String, usize>;

/// What was seen.
#[derive(Debug)]
pub struct Figures {
    count: usize,
    /// Of hollow ones and of light ones, while they came and in [`STEADY`].
    coming: [Asked; 2],
    steady: [Asked; 2],
}

/// One line of the audit log, as far as it says what was asked.
struct Event {
    user: String,
    what: String,
    is_watch: bool,
}

/// Runs `count` of each.
///
/// # Errors
///
/// Not root, no apiserver, or something does not start.
pub fn run(count: usize, directory: &Path, say: impl Fn(&str) + Copy) -> anyhow::Result<Figures> {
    let _interrupts = crate::demo::interrupts()?;
    crate::process::open_files()?;
    let fixture = Fixture::get(say)?;
    let (light, hollow) = (fixture::kubelets()?, fixture::hollow(say)?);
    let directory = directory.join("hollow");
    fs::create_dir_all(&directory)?;
    let network = Network::new(1)?;
    let address = Network::node_address(0);
    let pki = Pki::new(&[address, Network::HUB])?;
    let at = |port| SocketAddr::new(Network::HUB, port);
    let _etcd = start_etcd(&fixture, at(2379), at(2380), &directory, Some(&network.hub))?;
    let name = "audit.log";
    // An earlier run's would be read as well.
    let _ = fs::remove_file(directory.join(name));
    let mut log = Log::new(&directory, name)?;
    let server = SocketAddr::new(address, PORT);
    let _apiserver = audited(&fixture, &pki, &network, server, &directory, &log.flags())?;

    say(&format!("{count} hollow and {count} light kubelets come"));
    for index in 0..count {
        let node = format!("real-{index:04}");
        pki.client(&node, &format!("system:node:{node}"), &["system:nodes"])?;
    }
    let mut command = Command::new(hollow);
    command
        .args([
            "--name=real",
            &format!("--server={server}"),
            &format!("--count={count}"),
        ])
        .arg(format!("--pki={}", pki.path().display()))
        .arg(format!("--ramp={}s", RAMP.as_secs()))
        .arg(format!("--status={}s", STATUS.as_secs()));
    let (mut real, _stdin, _stdout) = Process::piped("hollow", command, Some(network.hub.fd()), &directory)?;
    let group = Group {
        name: "light",
        server,
        count,
    };
    let mut light = Kubelets::start(&light, &[group], pki.path(), RAMP, STATUS, &network.hub, &directory)?;
    let mut watches: BTreeMap<String, usize> = BTreeMap::new();
    let mut coming = <[Asked; 2]>::default();
    let mut take = |into: &mut [Asked; 2]| -> anyhow::Result<usize> {
        for event in log.events::<Value>()?.iter().filter_map(asked) {
            if event.is_watch {
                *watches.entry(event.user.clone()).or_default() += 1;
            }
            *into[kind_of(&event.user)].entry(event.what).or_default() += 1;
        }
        Ok(watches.values().filter(|count| **count >= WATCHES).count())
    };
    until(START, "not all kubelets have their watches", || {
        real.is_running()?;
        light.counters()?;
        Ok(take(&mut coming)? >= 2 * count)
    })?;
    let mut pass = |time: Duration| -> anyhow::Result<()> {
        let began = Instant::now();
        while began.elapsed() < time {
            check_interrupt()?;
            real.is_running()?;
            light.counters()?;
            // This is how long it is counted, and no wait for a state.
            thread::park_timeout(Duration::from_secs(1));
        }
        Ok(())
    };
    pass(SETTLE)?;
    take(&mut coming)?;
    say(&format!("what they go on asking is counted for {} s", STEADY.as_secs()));
    let mut steady = <[Asked; 2]>::default();
    pass(STEADY)?;
    take(&mut steady)?;
    Ok(Figures { count, coming, steady })
}

fn audited(
    fixture: &Fixture,
    pki: &Pki,
    network: &Network,
    server: SocketAddr,
    directory: &Path,
    audit: &[String],
) -> anyhow::Result<Process> {
    let settings = Settings {
        fixture,
        pki,
        etcd: SocketAddr::new(Network::HUB, 2379),
        listen: server,
        advertise: server.ip(),
        count: 1,
        directory,
        name: "apiserver",
        goaway_chance: 0.0,
        host: None,
        extra: audit,
    };
    let apiserver = start_apiserver(&settings, Some(network.nodes[0].fd()))?;
    let admin = Admin::new(pki, &network.nodes[0], server)?;
    wait_for(START, || {
        (admin.ask_text("GET", "/readyz", None).ok()?.0 == 200).then_some(())
    })
    .context("the apiserver is not ready")?;
    Ok(apiserver)
}

/// 0 for hollow ones, 1 for light ones.
fn kind_of(user: &str) -> usize {
    usize::from(!user.starts_with("system:node:real-"))
}

/// What a kubelet asked, once: a watch when it begins, anything else when it is answered.
fn asked(event: &Value) -> Option<Event> {
    let user = event["user"]["username"].as_str()?;
    let verb = event["verb"].as_str()?;
    let is_watch = verb == "watch";
    let stage = if is_watch {
        "ResponseStarted"
    } else {
        "ResponseComplete"
    };
    if !user.starts_with("system:node:") || event["stage"] != stage {
        return None;
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut what = format!("{verb} {}", text(&event["objectRef"]["resource"]));
    let part = text(&event["objectRef"]["subresource"]);
    if !part.is_empty() {
        write!(what, "/{part}").ok()?;
    }
    if event["objectRef"].is_null() {
        what = format!("{verb} {}", text(&event["requestURI"]));
    }
    if is_watch && text(&event["requestURI"]).contains("sendInitialEvents=true") {
        what += ", initial events sent";
    }
    write!(what, ": {}", event["responseStatus"]["code"]).ok()?;
    Some(Event {
        user: user.to_owned(),
        what,
        is_watch,
    })
}

impl Figures {
    /// What light ones do not ask as often as hollow ones do, or ask and hollow ones do not.
    pub fn differences(&self) -> Vec<String> {
        let [hollow, light] = &self.steady;
        let all: BTreeSet<&String> = hollow.keys().chain(light.keys()).collect();
        let of = |asked: &Asked, what: &String| asked.get(what).copied().unwrap_or_default();
        let differs = |what: &&&String| {
            let (hollow, light) = (of(hollow, what), of(light, what));
            hollow.abs_diff(light) as f64 > TOLERANCE * hollow.max(light) as f64
        };
        all.iter().filter(differs).map(|what| (**what).clone()).collect()
    }

    /// One object.
    pub fn json(&self) -> Value {
        let [hollow, light] = &self.steady;
        json!({"kubelets": self.count, "differences": self.differences(), "hollow": hollow, "light": light})
    }

    /// Two tables.
    ///
    /// # Errors
    ///
    /// They differ.
    pub fn page(&self) -> anyhow::Result<String> {
        let mut page = String::new();
        let parts = [
            ("while it comes, in all", &self.coming, 1.0),
            (
                "afterwards, a minute",
                &self.steady,
                STEADY.as_secs_f64() / Duration::from_secs(60).as_secs_f64(),
            ),
        ];
        for (when, [hollow, light], minutes) in parts {
            let each = |asked: &Asked, what: &String| {
                asked.get(what).copied().unwrap_or_default() as f64 / self.count as f64 / minutes
            };
            writeln!(page, "| a kubelet, {when} | hollow | light |\n|---|--:|--:|")?;
            let all: BTreeSet<&String> = hollow.keys().chain(light.keys()).collect();
            for what in all {
                writeln!(
                    page,
                    "| {what} | {:.2} | {:.2} |",
                    each(hollow, what),
                    each(light, what)
                )?;
            }
            writeln!(page)?;
        }
        let differences = self.differences();
        if differences.is_empty() {
            Ok(page)
        } else {
            bail!(
                "light kubelets do not ask what hollow ones do: {}\n\n{page}",
                differences.join("; ")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_is_told_once_and_by_whom() {
        let event = |verb: &str, stage: &str, user: &str| {
            json!({
                "verb": verb, "stage": stage, "user": {"username": user},
                "objectRef": {"resource": "nodes", "subresource": "status"},
                "requestURI": "/api/v1/nodes?sendInitialEvents=true", "responseStatus": {"code": 200},
            })
        };
        let what = |verb, stage, user| asked(&event(verb, stage, user)).map(|event| event.what);
        let (real, complete) = ("system:node:real-0001", "ResponseComplete");
        assert_eq!(
            what("patch", complete, real).as_deref(),
            Some("patch nodes/status: 200")
        );
        assert_eq!(
            what("watch", "ResponseStarted", real).as_deref(),
            Some("watch nodes/status, initial events sent: 200")
        );
        assert_eq!(what("watch", complete, real), None, "it was counted when it began");
        assert_eq!(what("patch", complete, "admin"), None);
        assert_eq!((kind_of(real), kind_of("system:node:hollow-light-0001")), (0, 1));
    }

    #[test]
    fn a_request_that_one_kind_alone_makes_is_a_difference() {
        let asked = |pairs: &[(&str, usize)]| pairs.iter().map(|(what, count)| ((*what).to_owned(), *count)).collect();
        let figures = |light: &[(&str, usize)]| Figures {
            count: 10,
            coming: <[Asked; 2]>::default(),
            steady: [
                asked(&[("update leases: 200", 120), ("patch nodes/status: 200", 40)]),
                asked(light),
            ],
        };
        let (leases, status) = (("update leases: 200", 117), ("patch nodes/status: 200", 41));
        assert!(figures(&[leases, status]).page().is_ok());
        for light in [
            &[leases][..],
            &[leases, status, ("list pods: 200", 1)],
            &[leases, ("patch nodes/status: 200", 30)],
        ] {
            assert!(figures(light).page().is_err(), "{light:?}");
        }
    }
}
