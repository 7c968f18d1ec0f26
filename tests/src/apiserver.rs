//! Real control-plane processes: etcd and kube-apiserver, with the flags kubeadm gives them.
//!
//! Input: binaries, certificates, namespaces. Output: running processes.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    fixture::Fixture,
    netns::Namespace,
    pki::Pki,
    process::{Process, on_host, tail, wait_for},
};

/// How long etcd may take to listen, on a machine that is emulated and busy.
const LISTENS: Duration = Duration::from_secs(180);

/// Starts an etcd of one member on that client address, with its data in `directory`, and waits until it listens: an apiserver
/// that does not reach it within twenty seconds gives up.
///
/// # Errors
///
/// It cannot be started, or ends.
pub fn start_etcd(
    fixture: &Fixture,
    client: SocketAddr,
    peer: SocketAddr,
    directory: &Path,
    namespace: Option<&Namespace>,
) -> anyhow::Result<Process> {
    let mut member = start_member(fixture, &[Member { client, peer }], 0, directory, namespace)?;
    member_listens(&mut member, client, namespace)?;
    Ok(member)
}

/// Where a member of an etcd is reached, by its clients and by the others (plain HTTP).
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// By apiservers.
    pub client: SocketAddr,
    /// By the other members.
    pub peer: SocketAddr,
}

/// Starts one of the members of an etcd, anew or with the data it had. It listens when most of them run.
///
/// # Errors
///
/// It cannot be started.
pub fn start_member(
    fixture: &Fixture,
    members: &[Member],
    index: usize,
    directory: &Path,
    namespace: Option<&Namespace>,
) -> anyhow::Result<Process> {
    let name = |index: usize| format!("etcd-{}", index + 1);
    let Member { client, peer } = members[index];
    let all: Vec<String> = members
        .iter()
        .enumerate()
        .map(|(index, member)| format!("{}=http://{}", name(index), member.peer))
        .collect();
    let mut command = Command::new(&fixture.etcd);
    command
        .arg(format!("--name={}", name(index)))
        .arg(format!("--data-dir={}", directory.join(name(index)).display()))
        .arg(format!("--listen-client-urls=http://{client}"))
        .arg(format!("--advertise-client-urls=http://{client}"))
        .arg(format!("--listen-peer-urls=http://{peer}"))
        .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
        .arg(format!("--initial-cluster={}", all.join(",")))
        .args(["--unsafe-no-fsync", "--log-level=warn"]);
    Process::start(&name(index), command, namespace.map(Namespace::fd), directory)
}

/// Waits until a member listens on its client address.
///
/// # Errors
///
/// It ends, or does not.
pub fn member_listens(member: &mut Process, client: SocketAddr, namespace: Option<&Namespace>) -> anyhow::Result<()> {
    let reaches = |address| {
        namespace.map_or_else(
            || TcpStream::connect(address).is_ok(),
            |namespace| namespace.reaches(address),
        )
    };
    let listening = wait_for(LISTENS, || {
        if let Err(ended) = member.is_running() {
            return Some(Err(ended));
        }
        reaches(client).then_some(Ok(()))
    });
    listening.with_context(|| format!("etcd does not listen on {client}:\n{}", tail(&member.log())))?
}

/// What one kube-apiserver is started with.
pub struct Settings<'a> {
    /// The binaries.
    pub fixture: &'a Fixture,
    /// The certificates.
    pub pki: &'a Pki,
    /// etcd's client address.
    pub etcd: SocketAddr,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The address it names itself by.
    pub advertise: std::net::IpAddr,
    /// How many apiservers there are.
    pub count: usize,
    /// Logs.
    pub directory: &'a Path,
    /// A name for its log.
    pub name: &'a str,
    /// `--goaway-chance`.
    pub goaway_chance: f64,
    /// The name of its host, where it is to have one of its own: it goes by it in its identity Lease.
    pub host: Option<&'a str>,
    /// More flags; one of those below replaces it.
    pub extra: &'a [String],
}

/// Starts a kube-apiserver.
///
/// # Errors
///
/// It cannot be started.
pub fn start_apiserver(settings: &Settings<'_>, namespace: Option<&Arc<OwnedFd>>) -> anyhow::Result<Process> {
    let pki = |name: &str| settings.pki.file(name).display().to_string();
    let tokens = settings.pki.file("tokens.csv");
    if !tokens.exists() {
        let mut lines = String::from("the-admins-token,token-admin,uid-1,\"system:masters\"\n");
        for index in 0..TOKENS {
            lines.push_str(&format!(
                "token-{index},token-user-{index},uid-t{index},\"swarm-clients\"\n"
            ));
        }
        fs::write(&tokens, lines)?;
    }
    let mut command = Command::new(&settings.fixture.apiserver);
    command
        .arg(format!("--etcd-servers=http://{}", settings.etcd))
        .arg(format!("--bind-address={}", settings.listen.ip()))
        .arg(format!("--secure-port={}", settings.listen.port()))
        .arg(format!("--advertise-address={}", settings.advertise))
        .arg(format!("--apiserver-count={}", settings.count))
        .arg(format!("--tls-cert-file={}", pki("apiserver.crt")))
        .arg(format!("--tls-private-key-file={}", pki("apiserver.key")))
        .arg(format!("--client-ca-file={}", pki("ca.crt")))
        .arg(format!("--token-auth-file={}", tokens.display()))
        .arg(format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")))
        .args(identity_flags(settings.extra))
        .arg(format!("--service-account-issuer=https://{}", crate::pki::SERVER_NAME))
        .arg(format!("--service-account-key-file={}", pki("sa.pub")))
        .arg(format!("--service-account-signing-key-file={}", pki("sa.key")))
        .arg("--service-cluster-ip-range=10.96.0.0/16")
        .arg("--endpoint-reconciler-type=lease")
        .arg("--authorization-mode=Node,RBAC")
        .arg(format!("--goaway-chance={}", settings.goaway_chance))
        .arg("--v=1")
        .args(settings.extra);
    if let Some(host) = settings.host {
        on_host(&mut command, host);
    }
    Process::start(settings.name, command, namespace, settings.directory)
}

/// The names of the identity's headers: the apiserver adds a list that is given twice to the first.
fn identity_flags(extra: &[String]) -> impl Iterator<Item = String> {
    let flags = [
        ("--requestheader-allowed-names", "front-proxy-client"),
        ("--requestheader-username-headers", "X-Remote-User"),
        ("--requestheader-group-headers", "X-Remote-Group"),
        ("--requestheader-uid-headers", "X-Remote-Uid"),
        ("--requestheader-extra-headers-prefix", "X-Remote-Extra-"),
    ];
    let given = |flag: &str| extra.iter().any(|one| one.split('=').next() == Some(flag));
    flags
        .into_iter()
        .filter(move |(flag, _)| !given(flag))
        .map(|(flag, value)| format!("{flag}={value}"))
}

/// How many tokens `token-0` and so on there are.
pub const TOKENS: usize = 50;
