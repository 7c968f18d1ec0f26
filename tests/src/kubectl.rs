//! kubectl against one address, and what it answered.
//!
//! Must never read the caller's own kubeconfig.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::Context as _;

use crate::{
    pki::{Pair, Pki, SERVER_NAME},
    process::Process,
};

/// Who asks.
#[derive(Clone, Debug)]
pub enum Who {
    /// A client certificate.
    Certificate(Pair),
    /// A bearer token.
    Token(String),
    /// Nobody.
    Anonymous,
}

/// One address and one user.
pub struct Kubectl {
    kubeconfig: PathBuf,
}

/// Whether kubectl is on PATH.
pub fn is_installed() -> bool {
    Command::new("kubectl")
        .args(["version", "--client"])
        .output()
        .is_ok_and(|output| output.status.success())
}

impl Kubectl {
    /// Writes a kubeconfig into the directory of the certificates.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn new(pki: &Pki, server: SocketAddr, who: &Who) -> anyhow::Result<Self> {
        let user = match who {
            Who::Certificate(pair) => format!(
                "client-certificate: {}, client-key: {}",
                pair.certificate.display(),
                pair.key.display()
            ),
            Who::Token(token) => format!("token: {token}"),
            Who::Anonymous => String::new(),
        };
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: it\n\
             clusters: [{{name: it, cluster: {{server: 'https://{server}', tls-server-name: {SERVER_NAME}, certificate-authority: {ca}}}}}]\n\
             users: [{{name: it, user: {{{user}}}}}]\n\
             contexts: [{{name: it, context: {{cluster: it, user: it}}}}]\n",
            ca = pki.file("ca.crt").display()
        );
        let file = tempfile::Builder::new().prefix("kubeconfig-").tempfile_in(pki.path())?;
        let (_, kubeconfig) = file.keep()?;
        std::fs::write(&kubeconfig, text)?;
        Ok(Self { kubeconfig })
    }

    /// The command with its kubeconfig.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("KUBECACHEDIR", self.kubeconfig.with_extension("cache"))
            .args(arguments);
        command
    }

    /// Runs it: stdout, or stderr when it failed.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<Result<String, String>> {
        let output = self.command(arguments).output().context("cannot start kubectl")?;
        let text = |octets| String::from_utf8_lossy(octets).into_owned();
        Ok(if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        })
    }

    /// Starts it and leaves it running, its output in a log.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(
        &self,
        name: &str,
        arguments: &[&str],
        namespace: Option<&Arc<OwnedFd>>,
        logs: &Path,
    ) -> anyhow::Result<Process> {
        Process::start(name, self.command(arguments), namespace, logs)
    }
}
