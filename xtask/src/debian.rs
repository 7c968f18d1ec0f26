//! Packages from the Debian mirror this machine is configured with, unpacked and not installed.
//!
//! Must never change what the system has installed, nor its own package lists.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::run::{run, target};

/// A private package list of one suite.
pub struct Suite {
    directory: PathBuf,
    name: String,
}

impl Suite {
    /// Fetches the suite's list.
    ///
    /// # Errors
    ///
    /// This is no Debian, or the mirror cannot be reached.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        let directory = target().join("debian").join(name);
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let suite = Self {
            directory,
            name: name.to_owned(),
        };
        let mirror = mirror()?;
        fs::write(
            suite.directory.join("sources.list"),
            format!("deb {mirror} {name} main\n"),
        )?;
        eprintln!("reading the package list of Debian {name}");
        let status = suite
            .apt("apt-get")
            .args(["update", "-qq"])
            .status()
            .context("apt-get")?;
        if !status.success() {
            bail!("the package list of Debian {name} cannot be fetched");
        }
        Ok(suite)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let at = |part: &str| self.directory.join(part).display().to_string();
        for option in [
            format!("Dir::Etc::SourceList={}", at("sources.list")),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            // Packages are fetched as the caller, into the caller's own directory.
            "APT::Sandbox::User=root".to_owned(),
            "APT::Get::List-Cleanup=0".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }

    /// The versions the suite has of a package.
    pub fn versions(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let output = self.apt("apt-cache").args(["madison", package]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = |line: &str| line.split('|').nth(1).map(|part| part.trim().to_owned());
        Ok(text.lines().filter_map(version).collect())
    }

    /// The packages whose name matches a regular expression, with what the list says of them.
    pub fn search(&self, pattern: &str) -> anyhow::Result<Vec<String>> {
        let output = self
            .apt("apt-cache")
            .args(["search", "--names-only", pattern])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let name = |line: &str| line.split_whitespace().next().map(str::to_owned);
        Ok(text.lines().filter_map(name).collect())
    }

    /// Fetches and unpacks a package, once; the directory it is in.
    ///
    /// # Errors
    ///
    /// It cannot be fetched or unpacked.
    pub fn unpacked(&self, package: &str, version: Option<&str>) -> anyhow::Result<PathBuf> {
        let wanted = version.map_or_else(|| package.to_owned(), |version| format!("{package}={version}"));
        let tree = self.directory.join("trees").join(wanted.replace([':', '~', '='], "_"));
        if tree.join(".complete").is_file() {
            return Ok(tree);
        }
        let download = self.directory.join("download");
        // A download that was cut off is begun again.
        let _ = fs::remove_dir_all(&download);
        let _ = fs::remove_dir_all(&tree);
        fs::create_dir_all(&download)?;
        fs::create_dir_all(&tree)?;
        eprintln!("fetching {wanted} from Debian {}", self.name);
        run(self
            .apt("apt-get")
            .current_dir(&download)
            .args(["download", "-qq"])
            .arg(&wanted))?;
        let archive = fs::read_dir(&download)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|ending| ending == "deb"))
            .with_context(|| format!("apt-get fetched no {wanted}"))?;
        run(Command::new("dpkg").arg("-x").arg(&archive).arg(&tree))?;
        fs::write(tree.join(".complete"), "")?;
        Ok(tree)
    }
}

/// The Debian mirror that apt is configured with.
fn mirror() -> anyhow::Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"])
        .output()
        .context("this route needs a Debian system (apt-get)")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if let Some(uri) = text.lines().find_map(|line| line.strip_prefix("Debian|Debian|")) {
        return Ok(uri.trim_end_matches('/').to_owned());
    }
    // Lists that were never fetched have no origin yet: take the URI that ends as Debian's do.
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .map(|line| line.trim_end_matches('/'))
        .find(|uri| uri.ends_with("/debian"))
        .map(str::to_owned)
        .context("apt is not configured with a Debian mirror")
}

/// The first file of that name in a tree, by a path that ends so.
pub fn find(tree: &Path, ending: &str) -> Option<PathBuf> {
    let mut directories = vec![tree.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).ok()?.flatten() {
            let path = entry.path();
            if path.ends_with(ending) {
                return Some(path);
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(path);
            }
        }
    }
    None
}
