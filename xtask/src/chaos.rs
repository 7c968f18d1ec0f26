//! `chaos` and `soak`: build what live clusters need, let them be broken or grow old, and write the pages.

use std::{
    fs,
    io::ErrorKind,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::Context as _;

use crate::{
    arch::Arch,
    debian, ebpf,
    run::{cargo, is_root, root, run, shown, target},
    vm,
};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Flags of the run; `--help` lists them. `chaos --vm VERSION` plays with `steer` in a virtual machine with that Debian
    /// kernel
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<String>,
}

/// A run on live clusters.
struct Live {
    part: &'static str,
    /// What it writes: the flag that says where, and the file in docs/.
    pages: &'static [(&'static str, &'static str)],
    /// Flags that leave some of it out: what is found then is no page.
    leaves_out: &'static [&'static str],
}

const CHAOS: Live = Live {
    part: "chaos",
    pages: &[("--page", "faults.md")],
    leaves_out: &[
        "--quick",
        "--only",
        "--alone",
        "--pairs",
        "--clients",
        "--lb-options",
        "--shim",
        "--page",
    ],
};

const SOAK: Live = Live {
    part: "soak",
    pages: &[("--page", "soak.md"), ("--picture", "soak.svg")],
    leaves_out: &["--page", "--picture"],
};

/// Plays the faults; the page is written from a whole run alone.
pub fn run_chaos(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (version, flags) = vm::without_version(&arguments.flags)?;
    match version {
        Some(version) => with_steer(&version, &flags),
        None => CHAOS.run(&flags).map(exit_code),
    }
}

/// Plays some of each kind.
///
/// # Errors
///
/// One was not as it must be.
pub fn run_quick() -> anyhow::Result<()> {
    let flags = ["--quick".to_owned()];
    anyhow::ensure!(CHAOS.run(&flags)?, "`cargo xtask chaos --quick`: see above");
    Ok(())
}

fn exit_code(all_is_well: bool) -> ExitCode {
    if all_is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Plays those that concern probes, in a virtual machine: a part of the page.
fn with_steer(version: &str, flags: &[String]) -> anyhow::Result<ExitCode> {
    let is_whole = !CHAOS.is_part(flags);
    let mut arguments = vec!["chaos".to_owned(), "--shim=steer".to_owned()];
    arguments.extend_from_slice(flags);
    if is_whole {
        arguments.push("--page=/proc/self/fd/1".to_owned());
    }
    if !flags.iter().any(|flag| flag.starts_with("--clients")) {
        eprintln!("the processors of the VM are emulated: {VM_CLIENTS} clients, unless --clients says otherwise");
        arguments.push(format!("--clients={VM_CLIENTS}"));
    }
    if vm::extras::control_plane().is_none() {
        eprintln!("no kube-apiserver is at hand, so small servers stand in its place: `cargo xtask chaos` builds one");
    }
    debian::install("haproxy", "haproxy")?;
    let mut said = String::new();
    let hear = |line: &str| {
        said.push_str(line);
        said.push('\n');
    };
    let program = vm::Payload::Program("rebalancer-demo");
    let code = vm::show(version, program, &arguments, vm::extras::CLUSTER, hear)?;
    // A run that came to its end has its page, whatever that says.
    if is_whole && said.contains(STEER) {
        let section = section(&said).context("the VM has not said its part of the page")?;
        let page = root().join("docs/faults.md");
        let before = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
        let relays = before.find(STEER).map_or(before.as_str(), |at| &before[..at]);
        fs::write(&page, format!("{}\n\n{section}", relays.trim_end()))
            .with_context(|| format!("cannot write {}", page.display()))?;
        eprintln!("{} is written", page.display());
    }
    Ok(ExitCode::from(code))
}

/// Clients in a VM, whose emulated processors play them and all nodes.
const VM_CLIENTS: u16 = 30;

/// The heading of that part.
const STEER: &str = "## With `steer`\n";

/// The part in what was said: from its heading to the end of its table.
fn section(said: &str) -> Option<String> {
    let from = &said[said.find(STEER)?..];
    let table = from.find("\n|")? + 1;
    let rows = from[table..]
        .split_inclusive('\n')
        .take_while(|line| line.starts_with('|'));
    Some(format!("{}{}", &from[..table], rows.collect::<String>()))
}

/// Lets a cluster grow old, and writes what it held.
pub fn run_soak(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    SOAK.run(&arguments.flags).map(exit_code)
}

impl Live {
    /// Whether that leaves some of it out.
    fn is_part(&self, flags: &[String]) -> bool {
        flags
            .iter()
            .any(|flag| self.leaves_out.iter().any(|part| flag.starts_with(part)))
    }

    /// Whether all was as it must be.
    fn run(&self, flags: &[String]) -> anyhow::Result<bool> {
        for (program, package) in [
            ("haproxy", "haproxy"),
            ("iptables", "iptables"),
            ("ss", "iproute2"),
            ("python3", "python3"),
        ] {
            debian::install(program, package)?;
        }
        ebpf::build(Arch::host())?;
        let packages = ["--package", "rebalancer", "--package", "rebalancer-tests"];
        run(cargo(["build", "--bin", "rebalancer", "--bin", "rebalancer-demo"]).args(packages))?;
        run(&mut cargo(["build", "--package", "rebalancer-clock-step"]))?;
        let program = target().join("debug/rebalancer-demo");
        let mut command = if is_root() {
            Command::new(&program)
        } else {
            eprintln!("network namespaces and eBPF need root: it runs under sudo");
            let mut command = Command::new("sudo");
            command.arg("-E").arg(&program);
            command
        };
        command.arg(self.part).args(flags);
        let mut written: Vec<(PathBuf, PathBuf)> = Vec::new();
        if !self.is_part(flags) {
            for (flag, page) in self.pages {
                let at = target().join(page);
                // One from an earlier run is not this run's, and `--help` writes none.
                match fs::remove_file(&at) {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        return Err(error).with_context(|| format!("cannot remove {}", at.display()));
                    }
                    _ => {}
                }
                command.arg(flag).arg(&at);
                written.push((at, root().join("docs").join(page)));
            }
        }
        eprintln!("+ {}", shown(&command));
        // It ends its clusters in order on Ctrl-C, which reaches both.
        let status = command.status().context("the run cannot be started")?;
        for (from, to) in written {
            // The page of a run that came to its end says itself what was not as it must be.
            if from.exists() {
                let text = fs::read_to_string(&from).with_context(|| format!("cannot read {}", from.display()))?;
                // There is none before the first run.
                let before = fs::read_to_string(&to).unwrap_or_default();
                let joined = with_rows_of(&before, &text);
                fs::write(&to, joined).with_context(|| format!("cannot write {}", to.display()))?;
                eprintln!("{} is written", to.display());
            }
        }
        Ok(status.success())
    }
}

/// Where a page lists its runs, a row each.
const RUNS: [&str; 2] = ["<!-- runs -->\n", "<!-- /runs -->\n"];

/// A page with the rows of an earlier one before its own, where it lists runs, and with the part of the earlier one that another run
/// writes.
fn with_rows_of(before: &str, page: &str) -> String {
    let rows = |text: &str| -> Option<(usize, usize)> {
        let begin = text.find(RUNS[0])? + RUNS[0].len();
        Some((begin, begin + text[begin..].find(RUNS[1])?))
    };
    let page = match (rows(before), rows(page)) {
        (Some((begin, end)), Some((place, _))) => {
            format!("{}{}{}", &page[..place], &before[begin..end], &page[place..])
        }
        _ => page.to_owned(),
    };
    match section(before) {
        Some(section) => format!("{}\n\n{section}", page.trim_end()),
        None => page,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_earlier_runs_stay() {
        let page = |rows: &str, rest: &str| format!("# Hours\n{rest}\n<!-- runs -->\n{rows}<!-- /runs -->\n");
        let joined = with_rows_of(&page("| 1 |\n| 2 |\n", "old"), &page("| 3 |\n", "new"));
        assert_eq!(joined, page("| 1 |\n| 2 |\n| 3 |\n", "new"));
        assert_eq!(with_rows_of("", &page("| 3 |\n", "new")), page("| 3 |\n", "new"));
        assert_eq!(with_rows_of(&page("| 1 |\n", "old"), "# Faults\n"), "# Faults\n");
    }

    #[test]
    fn the_part_of_another_run_stays() {
        let part = "## With `steer`\n\nWritten by it.\n\n| fault |\n|---|\n| one |\n";
        let said = format!("vm: kernel\n{part}vm: exit 0\n");
        assert_eq!(section(&said).as_deref(), Some(part));
        let page = "# Faults\n\n| new |\n";
        assert_eq!(
            with_rows_of(&format!("# Faults\n\n| old |\n\n{part}"), page),
            format!("{page}\n{part}")
        );
    }
}
