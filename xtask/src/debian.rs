//! Packages from the Debian mirror this machine is configured with, unpacked and not installed.
//!
//! Must never change what the system has installed, nor its own package lists.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{
    arch::Arch,
    run::{is_root, run, target},
};

/// A private package list of one suite.
pub struct Suite {
    directory: PathBuf,
    name: String,
    arch: Arch,
}

impl Suite {
    /// A package that was fetched and unpacked before, as [`unpacked`](Self::unpacked) would have it: it takes no network.
    pub fn kept(name: &str, arch: Arch, package: &str) -> Option<PathBuf> {
        let tree = Self::directory(name, arch).join("trees").join(tree_name(package));
        tree.join(".complete").is_file().then_some(tree)
    }

    fn directory(name: &str, arch: Arch) -> PathBuf {
        let debian = target().join("debian");
        if arch.is_host() {
            debian.join(name)
        } else {
            debian.join(format!("{name}-{}", arch.debian()))
        }
    }

    /// Fetches the suite's list.
    ///
    /// # Errors
    ///
    /// This is no Debian, or the mirror cannot be reached.
    pub fn open(name: &str, arch: Arch) -> anyhow::Result<Self> {
        let directory = Self::directory(name, arch);
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let suite = Self {
            directory,
            name: name.to_owned(),
            arch,
        };
        let mut mirror = mirror()?;
        // Security updates have an archive of their own, beside the other on every mirror that has both.
        if name.ends_with("-security") {
            mirror.push_str("-security");
        }
        fs::write(
            suite.directory.join("sources.list"),
            format!("deb [arch={}] {mirror} {name} main\n", arch.debian()),
        )?;
        // apt-get gives up where another one reads the same list.
        let one = fs::File::create(suite.directory.join("reading"))?;
        one.lock()?;
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
            format!("APT::Architecture={}", self.arch.debian()),
            format!("APT::Architectures::={}", self.arch.debian()),
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

    /// A package and the libraries it needs, directly or not.
    pub fn closure(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let output = self
            .apt("apt-cache")
            .args([
                "depends",
                "--recurse",
                "--no-recommends",
                "--no-suggests",
                "--no-conflicts",
                "--no-breaks",
            ])
            .args(["--no-replaces", "--no-enhances", package])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut names: Vec<String> = text
            .lines()
            .filter(|name| *name == package || name.starts_with("lib") || name.starts_with("zlib"))
            .map(str::to_owned)
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Fetches and unpacks a package, once; the directory it is in.
    ///
    /// # Errors
    ///
    /// It cannot be fetched or unpacked.
    pub fn unpacked(&self, package: &str, version: Option<&str>) -> anyhow::Result<PathBuf> {
        let wanted = version.map_or_else(|| package.to_owned(), |version| format!("{package}={version}"));
        let name = tree_name(&wanted);
        let tree = self.directory.join("trees").join(&name);
        if tree.join(".complete").is_file() {
            return Ok(tree);
        }
        // One of two that want the same package waits for the other one, and does not take the tree from under it.
        let trees = self.directory.join("trees");
        fs::create_dir_all(&trees)?;
        let one = fs::File::create(trees.join(format!("{name}.lock")))?;
        one.lock()?;
        if tree.join(".complete").is_file() {
            return Ok(tree);
        }
        // Two packages are fetched at once when a group's tests run beside a VM.
        let download = self.directory.join("download").join(&name);
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

/// Of a directory, for a package or PACKAGE=VERSION.
fn tree_name(wanted: &str) -> String {
    wanted.replace([':', '~', '='], "_")
}

/// Installs a program's package on this system where the program is missing.
///
/// # Errors
///
/// It is still missing then.
pub fn install(program: &str, package: &str) -> anyhow::Result<()> {
    if on_path(program).is_some() {
        return Ok(());
    }
    eprintln!("{program} is needed and missing: installing Debian's package {package}");
    fetch(package)?;
    if on_path(program).is_none() {
        bail!("{program} is still missing; install it by hand");
    }
    Ok(())
}

/// The same for a file that is no program.
pub fn install_file(path: &Path, package: &str) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let shown = path.display();
    eprintln!("{shown} is needed and missing: installing Debian's package {package}");
    fetch(package)?;
    if !path.exists() {
        bail!("{shown} is still missing; install it by hand");
    }
    Ok(())
}

fn fetch(package: &str) -> anyhow::Result<()> {
    let apt = |arguments: &[&str]| {
        let mut command = if is_root() {
            Command::new("apt-get")
        } else {
            let mut command = Command::new("sudo");
            command.arg("apt-get");
            command
        };
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        run(&mut command)
    };
    apt(&["update", "-qq"])?;
    apt(&["install", "-qq", "--yes", "--no-install-recommends", package])
}

/// Where a program is that a shell would run. Debian's servers are in `sbin`, which is not on everybody's PATH.
pub fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
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
