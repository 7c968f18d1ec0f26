//! `bench steer`: what the probe costs here, and in a VM as well where this kernel refuses its answer; and what finding its
//! place in a binary costs.

use std::process::Command;

use anyhow::{Context as _, bail};
use clap::builder::PossibleValuesParser;

use super::Outcome;
use crate::{
    arch::Arch,
    ebpf,
    run::{is_root, shown},
    vm::{self, extras},
};

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// Where this kernel refuses the probe: the Debian kernel of the VM
    #[arg(long, value_name = "VERSION", default_value = "6.18", value_parser = PossibleValuesParser::new(vm::versions()))]
    kernel: String,
}

/// Builds, measures, shows.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    ebpf::build(Arch::host()).context("the kernel program is what is measured")?;
    super::build()?;
    let server = extras::goaway_server(Arch::host())?.context("the benchmark needs a server built with Go")?;
    let real = extras::control_plane();
    if real.is_none() {
        eprintln!(
            "no kube-apiserver is at hand, so requests are the small server's: `cargo xtask demo --apiserver real` builds \
             one"
        );
    }
    let answers = takes_the_probe()?;
    let probe = super::measure("steer", true, |command| {
        command.arg("--server").arg(&server);
        if let Some([apiserver, etcd]) = &real {
            command.arg("--apiserver").arg(apiserver).arg("--etcd").arg(etcd);
        }
        if !answers {
            command.arg("--silent");
        }
    })?;
    let mut figures: serde_json::Value = serde_json::from_str(&probe.json)?;
    let mut tables = probe.tables;
    if !answers {
        eprintln!(
            "this kernel refuses the probe its answer, so it was measured without; with it, in a VM with Debian's {}",
            arguments.kernel
        );
        let mut flags = vec!["--server=/bin/goaway-server"];
        if real.is_some() {
            flags.extend(["--apiserver=/bin/kube-apiserver", "--etcd=/bin/etcd"]);
        }
        let emulated = super::measure_in_vm(&arguments.kernel, "steer", "steer", &flags)?;
        tables += &format!("\n{}", emulated.tables);
        // The figures are those of the probe that answers, wherever it does.
        let here = std::mem::replace(&mut figures, serde_json::from_str(&emulated.json)?);
        figures["here_without_answer"] = here;
    }
    // A release's binary is the size that matters; without one, the small server's.
    let binary = real.map_or(server, |[apiserver, _]| apiserver);
    let find = super::measure("steer-find", false, |command| {
        command.arg("--binary").arg(&binary);
    })?;
    let more: serde_json::Value = serde_json::from_str(&find.json)?;
    let (Some(object), Some(more)) = (figures.as_object_mut(), more.as_object()) else {
        bail!("the figures are no objects: {figures} {more}");
    };
    object.extend(more.clone());
    let outcome = Outcome {
        json: format!("{figures}\n"),
        tables: format!("{tables}\n{}", find.tables),
    };
    super::show("steer", &outcome, &super::Page::Part("bench.md"), arguments.json, false)
}

/// Whether this machine's kernel takes the probe, as the product says.
fn takes_the_probe() -> anyhow::Result<bool> {
    if !is_root() {
        return Ok(false);
    }
    let mut command = Command::new(super::rebalancer());
    let output = command.args(["system-info", "--output=json"]).output()?;
    let features: serde_json::Value =
        serde_json::from_slice(&output.stdout).with_context(|| format!("what `{}` says", shown(&command)))?;
    Ok(features["steer-kernel"]["ok"] == true)
}
