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
};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Flags of the run; `--help` lists them
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
    leaves_out: &["--quick", "--only", "--alone", "--page"],
};

const SOAK: Live = Live {
    part: "soak",
    pages: &[("--page", "soak.md"), ("--picture", "soak.svg")],
    leaves_out: &["--page", "--picture"],
};

/// Plays the faults; the page is written from a whole run alone.
pub fn run_chaos(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    CHAOS.run(&arguments.flags)
}

/// Lets a cluster grow old, and writes what it held.
pub fn run_soak(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    SOAK.run(&arguments.flags)
}

impl Live {
    fn run(&self, flags: &[String]) -> anyhow::Result<ExitCode> {
        for (program, package) in [("haproxy", "haproxy"), ("iptables", "iptables"), ("ss", "iproute2")] {
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
        let in_part = |flag: &String| self.leaves_out.iter().any(|part| flag.starts_with(part));
        let mut written: Vec<(PathBuf, PathBuf)> = Vec::new();
        if !flags.iter().any(in_part) {
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
            // What was not as it must be is not published in place of what was.
            if status.success() && from.exists() {
                let text = fs::read_to_string(&from).with_context(|| format!("cannot read {}", from.display()))?;
                // There is none before the first run.
                let before = fs::read_to_string(&to).unwrap_or_default();
                let joined = with_rows_of(&before, &text);
                fs::write(&to, joined).with_context(|| format!("cannot write {}", to.display()))?;
                eprintln!("{} is written", to.display());
            }
        }
        Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// Where a page lists its runs, a row each.
const RUNS: [&str; 2] = ["<!-- runs -->\n", "<!-- /runs -->\n"];

/// A page with the rows of an earlier one before its own, where it lists runs.
fn with_rows_of(before: &str, page: &str) -> String {
    let rows = |text: &str| -> Option<(usize, usize)> {
        let begin = text.find(RUNS[0])? + RUNS[0].len();
        Some((begin, begin + text[begin..].find(RUNS[1])?))
    };
    match (rows(before), rows(page)) {
        (Some((begin, end)), Some((place, _))) => {
            format!("{}{}{}", &page[..place], &before[begin..end], &page[place..])
        }
        _ => page.to_owned(),
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
}
