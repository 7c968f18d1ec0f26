//! `rebalancer system-info`: what this machine lets the agent do, each feature by really trying it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::{Args, ValueEnum};
use prometheus_client::metrics::gauge::Gauge;
use rebalancer_core::binary::golang::AttachPoint;
use serde_json::{Value, json};

use super::{Failure, print, runtime, table::Table};
use crate::{
    doctor::Check,
    intercept::Intercept,
    kernel::{KernelLog, Lockdown, OLDEST, Options, Source, SourceKind},
    steer, sys,
};

/// How the answer is shown.
#[derive(Debug, Args)]
pub struct Arguments {
    /// For people, or JSON
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    /// Look into this binary for the place `--shim steer` attaches to
    #[arg(long, value_name = "PATH")]
    apiserver_binary: Option<PathBuf>,
    /// The port whose process `--shim steer` would attach to
    #[arg(long, value_name = "PORT", default_value_t = 6443)]
    apiserver_port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// One object
    Json,
}

/// Tries each feature; needs a runtime.
pub(super) fn checks(port: u16) -> Vec<Check> {
    vec![
        Check {
            name: "kernel",
            found: Ok(format!(
                "{}; counting with kernel programs needs {}.{} or what that brought, steer 6.18",
                sys::release(),
                OLDEST.0,
                OLDEST.1
            )),
        },
        Check {
            name: "architecture",
            found: Ok(std::env::consts::ARCH.to_owned()),
        },
        Check {
            name: "type-information",
            found: fs::metadata("/sys/kernel/btf/vmlinux")
                .map(|metadata| format!("/sys/kernel/btf/vmlinux, {} KiB", metadata.len() / 1024))
                .map_err(|error| format!("/sys/kernel/btf/vmlinux: {error}; needed by --source ebpf")),
        },
        Check {
            name: "capabilities",
            found: capabilities(),
        },
        Check {
            name: "cgroup-namespace",
            found: Ok(cgroup_namespace()),
        },
        Check {
            name: "lockdown",
            found: Ok(Lockdown::here().name().to_owned()),
        },
        Check {
            name: "source-ebpf",
            found: open(SourceKind::Ebpf),
        },
        Check {
            name: "client-hellos",
            found: client_hellos(port).map(|place| format!("read at {place}")),
        },
        Check {
            name: "source-sockdiag",
            found: open(SourceKind::Sockdiag),
        },
        Check {
            name: "intercept",
            found: Intercept::open(NOBODYS, Gauge::default())
                .map(|_| "takes a program that steers new connections".to_owned())
                .map_err(|error| error.to_string()),
        },
        Check {
            name: "steer-kernel",
            found: steer::trial_load()
                .map(|()| "takes a uprobe program that sets registers".to_owned())
                .map_err(|error| error.to_string()),
        },
        Check {
            name: "steer-apiserver",
            found: apiserver(port).map_err(|error| error.to_string()),
        },
    ]
}

/// Tries each feature, and shows it.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let mut checks = checks(arguments.apiserver_port);
    if let Some(path) = &arguments.apiserver_binary {
        let began = Instant::now();
        let found = steer::inspect(path)
            .map_err(|error| Failure::Configuration(anyhow::anyhow!("--apiserver-binary: {error}")))?;
        checks.push(Check {
            name: "apiserver-binary",
            found: found
                .map(|point| format!("{}; found in {} ms", shown(&point), began.elapsed().as_millis()))
                .map_err(|refusal| format!("{}: {refusal}", path.display())),
        });
    }
    let text = match arguments.output {
        Output::Json => {
            let features: serde_json::Map<String, Value> = checks
                .iter()
                .map(|check| {
                    let shown = match &check.found {
                        Ok(found) => json!({"ok": true, "found": found}),
                        Err(why) => json!({"ok": false, "why": why}),
                    };
                    (check.name.to_owned(), shown)
                })
                .collect();
            super::json(&features)?
        }
        Output::Table => {
            let mut table = Table::new(&["FEATURE", "", "FOUND"]);
            for check in checks {
                let (mark, text) = match check.found {
                    Ok(found) => ("yes", found),
                    Err(why) => ("NO", why),
                };
                table.row([check.name.to_owned(), mark.to_owned(), text]);
            }
            table.to_string()
        }
    };
    print(&text)
}

/// The process that would be probed: whether everything about it is as it must be.
fn apiserver(port: u16) -> Result<String, steer::SteerError> {
    let process = steer::find_process(port, None)?;
    let (chance, place) = process.check_goaway_chance()?;
    let point = steer::point_in(&process)?;
    Ok(format!(
        "process {} on port {port}, --goaway-chance={chance} {place}, {}: {}",
        process.pid,
        process.executable.display(),
        shown(&point)
    ))
}

fn shown(point: &AttachPoint) -> String {
    format!(
        "{}, {}, k8s.io/apiserver {}; the goaway decider is at address {:#x}, {:#x} in the file",
        point.build.version.text,
        point.architecture,
        point.build.apiserver.as_deref().unwrap_or("of unknown version"),
        point.address,
        point.file_offset
    )
}

/// Whether this process sees the host's cgroups.
fn cgroup_namespace() -> String {
    // include/linux/proc_ns.h, PROC_CGROUP_INIT_INO: the first namespace's number on every machine.
    const FIRST: &str = "cgroup:[4026531835]";
    match fs::read_link("/proc/self/ns/cgroup") {
        Ok(link) if link.as_os_str() == FIRST => "the host's".to_owned(),
        Ok(_) => "one of its own, as in a pod: the root it sees is its own cgroup's".to_owned(),
        Err(error) => format!("unknown: /proc/self/ns/cgroup: {error}"),
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(Path::new(path))
        .map(|text| text.trim().to_owned())
        .map_err(|error| format!("{path}: {error}"))
}

/// A port nobody uses.
const NOBODYS: u16 = 1;

fn options(source: SourceKind, port: u16) -> Options {
    Options {
        source,
        port,
        addresses: Vec::new(),
        kernel_log: KernelLog::Off,
        classify: true,
        cgroup_root: None,
    }
}

/// Opens a source for a port nobody uses, and closes it again.
fn open(kind: SourceKind) -> Result<String, String> {
    Source::open(&options(kind, NOBODYS))
        .map(|_| "works".to_owned())
        .map_err(|error| error.to_string())
}

/// Whether ClientHellos of the apiserver's clients could be read: where.
fn client_hellos(port: u16) -> Result<String, String> {
    let mut source = Source::open(&options(SourceKind::Ebpf, port)).map_err(|error| error.to_string())?;
    let looked = async {
        // The first observation is the complete list, for which it looks where the apiserver is.
        source.next().await.map_err(|error| error.to_string())?;
        source.reading().unwrap_or_else(|| Err("nobody looked".to_owned()))
    };
    tokio::runtime::Handle::current().block_on(looked)
}

/// The effective capabilities that matter here (capabilities(7)).
fn capabilities() -> Result<String, String> {
    const WANTED: [(u32, &str); 4] = [
        (12, "CAP_NET_ADMIN"),
        (19, "CAP_SYS_PTRACE"),
        (38, "CAP_PERFMON"),
        (39, "CAP_BPF"),
    ];
    let status = read("/proc/self/status")?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or("/proc/self/status has no CapEff")?;
    let (have, lack): (Vec<_>, Vec<_>) = WANTED.into_iter().partition(|(bit, _)| mask >> bit & 1 == 1);
    let names = |list: &[(u32, &str)]| list.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
    if lack.is_empty() {
        Ok(names(&have))
    } else {
        Err(format!("missing {}", names(&lack)))
    }
}
