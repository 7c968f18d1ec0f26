//! The image: built by buildah, and run by podman with all it asks for and with each thing left out.
//!
//! Must never touch the images and containers of this machine: both have a store of their own in the target directory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{
    arch::Arch,
    debian,
    run::{root, run, target},
};

/// What an image is made of.
pub struct Image {
    /// Name and tag.
    pub name: String,
    pub version: String,
    pub commit: String,
    pub arch: Arch,
    /// The directory with the program and the Containerfile.
    pub context: PathBuf,
}

/// The capabilities the agent is given, as docs and manifests say.
const CAPABILITIES: [&str; 3] = ["BPF", "NET_ADMIN", "PERFMON"];

/// What works with all of it.
const FEATURES: [&str; 4] = ["source-ebpf", "client-hellos", "source-sockdiag", "intercept"];

/// A store of images, empty.
struct Store(PathBuf);

impl Store {
    fn new(name: &str) -> anyhow::Result<Self> {
        let path = target().join("dist").join(name);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("cannot empty {}", path.display()))?;
        }
        fs::create_dir_all(&path)?;
        Ok(Self(std::path::absolute(path)?))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("--root")
            .arg(self.0.join("root"))
            .arg("--runroot")
            .arg(self.0.join("run"))
            // What works on any file system, and needs no mount of its own.
            .args(["--storage-driver", "vfs"]);
        command
    }
}

impl Image {
    /// Builds it in an empty store and packs it; the same octets each time.
    ///
    /// # Errors
    ///
    /// There is no buildah, or it fails.
    pub fn archive(&self, archive: &Path) -> anyhow::Result<()> {
        debian::install("buildah", "buildah")?;
        let store = Store::new("store")?;
        run(store
            .command("buildah")
            // Nothing is run in it, and nothing is fetched.
            .args(["bud", "--quiet", "--isolation", "chroot", "--pull-never"])
            .args(["--timestamp", "0", "--arch", self.arch.debian()])
            .args(["--build-arg", &format!("VERSION={}", self.version)])
            .args(["--build-arg", &format!("REVISION={}", self.commit)])
            .args(["--tag", &self.name])
            .arg(&self.context))?;
        // An archive is added to, and not written anew.
        let _ = fs::remove_file(archive);
        run(store
            .command("buildah")
            .args(["push", "--quiet", &self.name])
            .arg(format!("docker-archive:{}:{}", archive.display(), self.name)))?;
        fs::remove_dir_all(&store.0).context("the store cannot be removed")
    }

    /// Builds it again and compares; then runs it as docs/operations.md says, and with each thing left out.
    ///
    /// # Errors
    ///
    /// What differs, or what works that should not, or the other way round.
    pub fn check(&self, archive: &Path) -> anyhow::Result<()> {
        let again = archive.with_extension("again");
        self.archive(&again)?;
        let same = fs::read(archive)? == fs::read(&again)?;
        fs::remove_file(&again)?;
        ensure!(same, "two builds from the same sources differ");
        println!("two builds are the same, octet for octet");
        self.has_one_name(archive)?;
        nobody_owns(archive)?;
        if !self.arch.is_host() {
            println!("it is for another processor: it is not run here");
            return Ok(());
        }
        for (program, package) in [("podman", "podman"), ("runc", "runc")] {
            debian::install(program, package)?;
        }
        let store = Store::new("podman")?;
        run(store
            .command("podman")
            .args(["load", "--quiet", "--input"])
            .arg(archive))?;
        let checked = self.run_with_and_without(&store);
        fs::remove_dir_all(&store.0).context("podman's store cannot be removed")?;
        checked
    }

    /// What is imported by one name is taken away by it.
    fn has_one_name(&self, archive: &Path) -> anyhow::Result<()> {
        let said = Command::new("tar")
            .args(["--extract", "--to-stdout", "--file"])
            .arg(archive)
            .arg("manifest.json")
            .output()
            .context("tar")?;
        let manifest: Value = serde_json::from_slice(&said.stdout).context("the archive's manifest.json")?;
        let names = &manifest[0]["RepoTags"];
        ensure!(
            *names == serde_json::json!([self.name]),
            "the archive's names are {names}"
        );
        println!("its one name is {}", self.name);
        Ok(())
    }

    fn run_with_and_without(&self, store: &Store) -> anyhow::Result<()> {
        let profile = root().join("deploy/seccomp.json");
        let profile = format!("seccomp={}", profile.display());
        let all = self.features(store, &CAPABILITIES, Some(&profile), true)?;
        for feature in FEATURES {
            ensure!(
                all[feature]["ok"] == true,
                "{feature} does not work: {}",
                all[feature]["why"]
            );
        }
        println!(
            "with {} and the profile: {} work",
            CAPABILITIES.join(", "),
            FEATURES.join(", ")
        );
        for (left_out, lost) in [
            ("BPF", "source-ebpf"),
            ("PERFMON", "source-ebpf"),
            ("NET_ADMIN", "intercept"),
        ] {
            let others: Vec<_> = CAPABILITIES.into_iter().filter(|name| *name != left_out).collect();
            let found = self.features(store, &others, Some(&profile), true)?;
            fails(
                &found,
                lost,
                &format!("without CAP_{left_out}"),
                &format!("CAP_{left_out}"),
            )?;
        }
        // podman's own profile.
        let found = self.features(store, &CAPABILITIES, None, true)?;
        fails(&found, "source-ebpf", "with podman's own seccomp profile", "seccomp")?;
        let found = self.features(store, &CAPABILITIES, Some(&profile), false)?;
        fails(&found, "client-hellos", "without the host's cgroups", "cgroup")?;
        // The relay needs none of it: its help is all there is to run without an apiserver.
        let output = self
            .podman(store, &[], Some(&profile), false)
            .args(["relay", "--help"])
            .output()?;
        ensure!(output.status.success(), "the relay does not run without capabilities");
        println!("the relay runs without any");
        Ok(())
    }

    fn podman(&self, store: &Store, capabilities: &[&str], profile: Option<&str>, cgroups: bool) -> Command {
        let mut command = store.command("podman");
        command
            .args([
                "--cgroup-manager",
                "cgroupfs",
                "--events-backend",
                "file",
                "--runtime",
                "runc",
            ])
            .args(["run", "--rm", "--pull=never", "--network", "host", "--read-only"])
            // podman's own limits are above what a container in a container may set.
            .args(["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=4096:4096"])
            .args(["--cap-drop", "ALL"]);
        if !capabilities.is_empty() {
            command.args(["--cap-add", &capabilities.join(",")]);
        }
        if let Some(profile) = profile {
            command.args(["--security-opt", profile]);
        }
        if cgroups {
            command.args(["--volume", &format!("{}:/sys/fs/cgroup:ro", cgroup2())]);
        }
        command.arg(&self.name);
        command
    }

    /// What `system-info` finds in such a container.
    fn features(
        &self,
        store: &Store,
        capabilities: &[&str],
        profile: Option<&str>,
        cgroups: bool,
    ) -> anyhow::Result<Value> {
        let mut command = self.podman(store, capabilities, profile, cgroups);
        let output = command.args(["system-info", "--output", "json"]).output()?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("podman: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// Whoever runs in it owns none of its files.
fn nobody_owns(archive: &Path) -> anyhow::Result<()> {
    let tar = |arguments: &[&str]| -> anyhow::Result<Vec<u8>> {
        let output = Command::new("tar").args(arguments).output().context("tar")?;
        ensure!(output.status.success(), "tar {arguments:?} fails");
        Ok(output.stdout)
    };
    let archive = archive.display().to_string();
    let manifest: Value = serde_json::from_slice(&tar(&["-xOf", &archive, "manifest.json"])?)?;
    let mut files = 0;
    for layer in manifest[0]["Layers"].as_array().context("the archive's layers")? {
        let layer = layer.as_str().context("a layer's name")?;
        let script = "tar -xOf \"$0\" \"$1\" | tar -tv --numeric-owner";
        let listed = Command::new("sh").args(["-c", script, &archive, layer]).output()?;
        for line in String::from_utf8_lossy(&listed.stdout)
            .lines()
            .filter(|line| line.starts_with('-'))
        {
            ensure!(
                line.split_whitespace().nth(1) == Some("65532/65532"),
                "its owner: {line}"
            );
            files += 1;
        }
    }
    ensure!(files == 1, "the image has {files} files, and should have one");
    println!("its one file is nobody's who runs it");
    Ok(())
}

/// A feature is lost, and says why.
fn fails(found: &Value, feature: &str, how: &str, reason: &str) -> anyhow::Result<()> {
    let why = found[feature]["why"].as_str().unwrap_or_default();
    ensure!(found[feature]["ok"] != true, "{feature} works {how}");
    ensure!(why.contains(reason), "{feature} {how} does not name {reason}: {why}");
    println!("{how}: {feature} is refused: {why}");
    Ok(())
}

/// Where this machine has its cgroup2 hierarchy.
fn cgroup2() -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let found = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| path.to_owned())
    });
    found.unwrap_or_else(|| "/sys/fs/cgroup".to_owned())
}
