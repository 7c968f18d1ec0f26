//! What there is on this node beside what agent and relay say of themselves: their flags and files, the apiserver's, ports.
//!
//! Input: /proc, the kernel, one handshake with the apiserver. Output: findings. Must never write anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{Arguments, settings::Settings};
use crate::{
    doctor::{self, Finding, Gravity, Known, Neighbour, Told},
    intercept::{self, Probe},
    manifest::{Part, Topology},
    relay::{Files, RequestHeaders, SniFiles},
    steer::{self, Process, SteerError},
};

/// Where kubeadm has the certificates that the relay reads.
const KUBEADM: &str = "/etc/kubernetes/pki";

/// A flag that names an address, with its port where nobody says another.
const PORTS: [(Part, &str, Option<u16>); 4] = [
    (Part::Agent, "metrics", Some(9470)),
    (Part::Agent, "peer-listen", Some(9443)),
    (Part::Relay, "listen", None),
    (Part::Relay, "metrics", None),
];

/// All that was looked at.
pub struct Node {
    agent: Result<Settings, String>,
    /// Nothing where no relay is meant to be.
    relay: Option<Result<Settings, String>>,
    apiserver: Result<Process, SteerError>,
    shown: Result<Vec<u8>, String>,
}

impl Node {
    /// Looks.
    pub async fn look(arguments: &Arguments, is_relayed: bool) -> Self {
        let agent = Settings::of(Part::Agent, arguments.common.api.path()).await;
        let relay = match Settings::of(Part::Relay, &arguments.control.0).await {
            Ok(settings) => Some(Ok(settings)),
            // What kubeadm's would be told: before anything is installed, that is what can be looked at.
            Err(_) if !is_relayed && agent.is_err() => Path::new(KUBEADM)
                .is_dir()
                .then(|| Settings::assumed(Part::Relay, Topology::Kubeadm)),
            Err(why) => is_relayed.then_some(Err(why)),
        };
        let apiserver = steer::find_process(arguments.apiserver_port, None);
        let shown = match &relay {
            Some(Ok(relay)) => shown(relay).await,
            _ => Err("there is no relay".to_owned()),
        };
        Self {
            agent,
            relay,
            apiserver,
            shown,
        }
    }

    fn settings(&self, part: Part) -> Option<&Settings> {
        match part {
            Part::Agent => self.agent.as_ref().ok(),
            Part::Relay => self.relay.as_ref()?.as_ref().ok(),
        }
    }

    /// Who listens on its port, its flags, and whether somebody has a probe on it.
    pub fn apiserver(&self, port: u16, shim: Option<&str>) -> Vec<Finding> {
        let mut findings = vec![doctor::process(
            port,
            self.apiserver.as_ref().map(|process| process.pid),
        )];
        let Ok(process) = &self.apiserver else {
            return findings;
        };
        let flag = |name: &str| {
            let said = process.flag(name).map_err(|error| error.to_string())?;
            Ok(said.value)
        };
        findings.extend(doctor::apiserver(flag, shim));
        let foreign = steer::check_untouched(process).err();
        let is_foreign =
            |error: &SteerError| matches!(error, SteerError::ForeignProbe { .. } | SteerError::ChangedCode { .. });
        // An agent that steers has its own there, and says itself what else is.
        if let Some(error) = foreign.filter(|error| is_foreign(error) && shim != Some("steer")) {
            findings.push(Finding::mend(
                "probe",
                Gravity::Soon,
                error.to_string(),
                "find out whose it is: another agent that steers would tell clients beside this one",
            ));
        }
        findings
    }

    /// Whether relay and apiserver believe each other.
    pub fn trust(&self) -> Vec<Finding> {
        let what = "relay's flags";
        let told = match &self.relay {
            None => return Vec::new(),
            Some(settings) => settings.as_ref().map_err(Clone::clone).and_then(told),
        };
        let told = match told {
            Ok(told) => told,
            Err(why) => return vec![Finding::note(what, format!("not known: {why}"))],
        };
        let flags = self.apiserver.as_ref().map_err(ToString::to_string).and_then(flags);
        let known = Known {
            flags,
            shown: self.shown.clone(),
        };
        doctor::trust(&told, &known)
    }

    /// The files of certificates that agent and relay read.
    pub fn certificates(&self) -> Vec<PathBuf> {
        let flags = [
            (Part::Relay, "tls-cert"),
            (Part::Relay, "client-ca"),
            (Part::Relay, "upstream-ca"),
            (Part::Relay, "proxy-client-cert"),
            (Part::Relay, "requestheader-client-ca-file"),
            (Part::Agent, "peer-cert"),
            (Part::Agent, "peer-ca"),
        ];
        let mut files: Vec<PathBuf> = flags
            .into_iter()
            .filter_map(|(part, flag)| self.settings(part)?.path(flag))
            .collect();
        if let Some(relay) = self.settings(Part::Relay) {
            let sni = relay.list("tls-sni-cert-key");
            files.extend(
                sni.iter()
                    .filter_map(|value| Some(relay.reach(value.split(',').next()?))),
            );
        }
        // The same file may be named by several flags.
        let mut seen = BTreeSet::new();
        files.retain(|path| seen.insert(path.clone()));
        files
    }

    /// The ports of both.
    pub fn ports(&self) -> Vec<Finding> {
        let judged = PORTS.into_iter().filter_map(|(part, flag, default)| {
            let settings = self.settings(part);
            let runs = settings.is_some_and(|settings| settings.pid.is_some());
            // Without peers nobody listens for them.
            let is_meant = flag != "peer-listen"
                || settings.is_none_or(|settings| settings.value("peer").or(settings.value("peers")).is_some());
            let port = settings
                .and_then(|settings| settings.port(flag))
                .or(default)
                .filter(|_| is_meant)?;
            let holders = steer::listening(port).map_err(|error| error.to_string());
            let holders = holders.map(|holders| holders.map(|list| list.into_iter().map(neighbour).collect()));
            Some(doctor::port(&format!("{part} --{flag}"), port, holders, runs))
        });
        judged.collect()
    }

    /// Who steers connections here.
    pub fn steering(&self) -> Vec<Finding> {
        let agent = self.settings(Part::Agent).and_then(|settings| settings.pid);
        doctor::steering(intercept::steering().map_err(|error| error.to_string()), agent)
    }

    /// Where is written, each once.
    pub fn directories(&self, own: Option<PathBuf>) -> BTreeSet<PathBuf> {
        let flags = ["state", "decision-log"].into_iter();
        let named = flags.filter_map(|flag| self.settings(Part::Agent)?.path(flag));
        let named = named.filter_map(|file| file.parent().map(Path::to_owned));
        own.into_iter().chain(named).collect()
    }
}

fn neighbour(process: Process) -> Neighbour {
    (process.pid, process.executable)
}

/// The certificate that the relay's apiserver shows.
async fn shown(relay: &Settings) -> Result<Vec<u8>, String> {
    let upstream = relay.value("upstream").unwrap_or_default();
    let address: SocketAddr = upstream.parse().map_err(|_| format!("--upstream {upstream}"))?;
    let probe = Probe::new().map_err(|error| error.to_string())?;
    let shown = probe.shown(address).await;
    shown
        .map(|der| der.to_vec())
        .map_err(|error| format!("{address} shows no certificate: {error}"))
}

/// What a relay is told of whom it believes.
fn told(settings: &Settings) -> Result<Told, String> {
    let file = |flag: &str| settings.path(flag).ok_or_else(|| format!("--{flag} is not given"));
    let sni: Result<Vec<SniFiles>, String> = settings
        .list("tls-sni-cert-key")
        .iter()
        .map(|value| value.parse())
        .collect();
    let mut sni = sni?;
    for files in &mut sni {
        files.certificate = settings.reach(&files.certificate.to_string_lossy());
        files.key = settings.reach(&files.key.to_string_lossy());
    }
    let files = Files {
        certificate: file("tls-cert")?,
        key: file("tls-key")?,
        sni,
        client_ca: file("client-ca")?,
        proxy_ca: settings.path("requestheader-client-ca-file"),
        proxy_certificate: file("proxy-client-cert")?,
        proxy_key: file("proxy-client-key")?,
        upstream_ca: file("upstream-ca")?,
    };
    let headers = RequestHeaders {
        username: settings.list("requestheader-username-headers"),
        group: settings.list("requestheader-group-headers"),
        uid: settings.list("requestheader-uid-headers"),
        extra_prefix: settings.list("requestheader-extra-headers-prefix"),
        allowed_names: settings.list("requestheader-allowed-names"),
    };
    let headers = headers.checked().map_err(|error| error.to_string())?;
    Ok(Told { files, headers })
}

/// The apiserver's flags by the names that they have in its ConfigMap.
fn flags(process: &Process) -> Result<BTreeMap<String, String>, String> {
    let value = |name: &str| -> Result<Option<String>, String> {
        Ok(process.flag(name).map_err(|error| error.to_string())?.value)
    };
    let mut flags = BTreeMap::new();
    for name in ["client-ca-file", "requestheader-client-ca-file"] {
        if let Some(path) = value(name)? {
            let text = process
                .file_inside(&path)
                .map_err(|error| format!("the apiserver's --{name} {path}: {error}"))?;
            flags.insert(name.to_owned(), text);
        }
    }
    if !flags.contains_key("requestheader-client-ca-file") {
        return Ok(flags);
    }
    for (name, is_always_said) in [
        ("requestheader-username-headers", true),
        ("requestheader-group-headers", true),
        // Since Kubernetes 1.32, and then only where it is given.
        ("requestheader-uid-headers", false),
        ("requestheader-extra-headers-prefix", true),
        ("requestheader-allowed-names", true),
    ] {
        // Repeated, they add up.
        let given = process.flag(name).map_err(|error| error.to_string())?.all;
        if !given.is_empty() || is_always_said {
            let list: Vec<String> = given
                .iter()
                .flat_map(|given| given.split(','))
                .map(|one| one.trim().to_owned())
                .filter(|one| !one.is_empty())
                .collect();
            flags.insert(name.to_owned(), json!(list).to_string());
        }
    }
    Ok(flags)
}
