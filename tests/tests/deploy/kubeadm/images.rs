//! Images: those of a control plane, each of one static program, and two releases of this project's own.
//!
//! Must never touch the images of this machine: buildah has a store of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use rebalancer_tests::fixture::{Fixture, VERSION};

use crate::succeeds;

/// Archives that `ctr images import` takes.
pub struct Archives {
    control_plane: Vec<PathBuf>,
    /// This release, and one that comes after it: the same program by another name.
    pub releases: [PathBuf; 2],
}

/// The release that is upgraded to.
pub const NEXT: &str = "0.1.1";

impl Archives {
    /// Makes them.
    ///
    /// # Errors
    ///
    /// A file cannot be copied.
    pub fn make(fixture: &Fixture, programs: &Path, release: &Path, directory: &Path) -> anyhow::Result<Self> {
        let store = Store(directory.join("images"));
        fs::create_dir_all(&store.0)?;
        let version = VERSION;
        let mut control_plane = Vec::new();
        for (program, name) in [
            (fixture.etcd.clone(), "etcd:3.6.8-0".to_owned()),
            (fixture.apiserver.clone(), format!("kube-apiserver:{version}")),
            (
                programs.join("kube-controller-manager"),
                format!("kube-controller-manager:{version}"),
            ),
            (programs.join("kube-scheduler"), format!("kube-scheduler:{version}")),
            (programs.join("pause"), "pause:3.10.2".to_owned()),
        ] {
            let inside = name.split(':').next().unwrap_or_default();
            let text = format!(
                "FROM scratch\nENV PATH=/usr/local/bin\nCOPY {inside} /usr/local/bin/\nENTRYPOINT [\"/usr/local/bin/{inside}\"]\n"
            );
            control_plane.push(store.archive(&program, inside, &text, &format!("registry.k8s.io/{name}"))?);
        }
        let next = store.renamed(release, &format!("docker.io/library/rebalancer:{NEXT}"))?;
        Ok(Self {
            control_plane,
            releases: [release.to_owned(), next],
        })
    }

    /// What a node has before anything is installed.
    pub fn all(&self) -> impl Iterator<Item = &PathBuf> {
        self.control_plane.iter()
    }
}

struct Store(PathBuf);

impl Store {
    fn buildah(&self) -> Command {
        let mut command = Command::new("buildah");
        command
            .arg("--root")
            .arg(self.0.join("root"))
            .arg("--runroot")
            .arg(self.0.join("run"))
            .args(["--storage-driver", "vfs"]);
        command
    }

    /// An archive of one program.
    fn archive(&self, program: &Path, inside: &str, containerfile: &str, name: &str) -> anyhow::Result<PathBuf> {
        let context = self.0.join(inside);
        fs::create_dir_all(&context)?;
        fs::copy(program, context.join(inside)).with_context(|| format!("cannot copy {}", program.display()))?;
        fs::write(context.join("Containerfile"), containerfile)?;
        let fixed = ["--isolation", "chroot", "--pull-never", "--timestamp", "0"];
        succeeds(
            self.buildah()
                .args(["bud", "--quiet"])
                .args(fixed)
                .args(["--tag", name])
                .arg(&context),
        );
        fs::remove_dir_all(&context)?;
        Ok(self.pushed(inside, name))
    }

    /// What is in an archive, by another name.
    fn renamed(&self, archive: &Path, name: &str) -> anyhow::Result<PathBuf> {
        let said = succeeds(
            self.buildah()
                .args(["pull", "--quiet"])
                .arg(format!("docker-archive:{}", archive.display())),
        );
        let id = said.lines().last().context("buildah names no image")?;
        succeeds(self.buildah().args(["tag", id.trim(), name]));
        Ok(self.pushed("renamed", name))
    }

    fn pushed(&self, file: &str, name: &str) -> PathBuf {
        let archive = self.0.join(format!("{file}.tar"));
        succeeds(
            self.buildah()
                .args(["push", "--quiet", name])
                .arg(format!("docker-archive:{}:{name}", archive.display())),
        );
        archive
    }
}
