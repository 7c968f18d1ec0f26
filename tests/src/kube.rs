//! Asking a kube-apiserver as its administrator, and what agents need to ask it themselves.
//!
//! Job: one request a connection, from inside a network namespace; credentials and rights for agents.
//! Must never be the client the product uses: the tests' word on the API is another's.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};

use crate::{
    netns::Namespace,
    pki::{Pair, Pki, SERVER_NAME},
};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The group of the agents' users.
pub const AGENTS: &str = "rebalancer-agents";

/// A way to one apiserver, as its administrator.
#[derive(Clone)]
pub struct Admin {
    namespace: Namespace,
    address: SocketAddr,
    tls: Arc<ClientConfig>,
}

impl Admin {
    /// From inside that namespace.
    ///
    /// # Errors
    ///
    /// The certificates cannot be read.
    pub fn new(pki: &Pki, namespace: &Namespace, address: SocketAddr) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(pki.file("ca.crt"))? {
            roots.add(certificate?)?;
        }
        let admin = pki.pair("admin");
        let chain = CertificateDer::pem_file_iter(&admin.certificate)?.collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_file(&admin.key)?;
        let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        Ok(Self {
            namespace: namespace.clone(),
            address,
            tls: Arc::new(tls),
        })
    }

    /// One request: status and body.
    ///
    /// # Errors
    ///
    /// Nobody answers, or not with JSON.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<(u16, Value)> {
        let (status, text) = self.ask_text(method, path, body)?;
        let value = serde_json::from_str(&text).with_context(|| format!("{path}: {text}"))?;
        Ok((status, value))
    }

    /// One request: status and body as text.
    ///
    /// # Errors
    ///
    /// Nobody answers.
    pub fn ask_text(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<(u16, String)> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {SERVER_NAME}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let this = self.clone();
        // A thread of its own: a namespace is entered for good.
        let asked = thread::spawn(move || -> anyhow::Result<Vec<u8>> {
            this.namespace.enter()?;
            let stream = TcpStream::connect_timeout(&this.address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let connection = ClientConnection::new(this.tls, ServerName::try_from(SERVER_NAME)?)?;
            let mut stream = StreamOwned::new(connection, stream);
            stream.write_all(request.as_bytes())?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        });
        let answer = asked
            .join()
            .map_err(|_| anyhow::anyhow!("the asking thread panicked"))??;
        let answer = String::from_utf8(answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an HTTP answer")?;
        let status = head.split(' ').nth(1).context("a status")?.parse()?;
        let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body = if is_chunked { unchunked(body) } else { body.to_owned() };
        Ok((status, body))
    }

    /// Makes an object, or leaves it as it is.
    ///
    /// # Errors
    ///
    /// It is refused.
    pub fn make(&self, path: &str, object: &Value) -> anyhow::Result<()> {
        let (status, answer) = self.ask("POST", path, Some(object))?;
        anyhow::ensure!(matches!(status, 200..=202 | 409), "{path}: {status}: {answer}");
        Ok(())
    }

    /// Gives the agents of these nodes the rights that docs/membership.md lists, and no others.
    ///
    /// # Errors
    ///
    /// They are refused.
    pub fn let_agents(&self, nodes: &[&str]) -> anyhow::Result<()> {
        let subject = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": AGENTS});
        granted_to_agents(self, "rebalancer", nodes, &subject)
    }
}

/// What agents may do, as docs/membership.md has it, for whoever the subject is.
///
/// # Errors
///
/// It is refused.
pub fn granted_to_agents(admin: &Admin, name: &str, nodes: &[&str], subject: &Value) -> anyhow::Result<()> {
    let leases =
        |verbs: &[&str]| json!({"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": verbs});
    let mut update = leases(&["update"]);
    update["resourceNames"] = nodes.iter().map(|node| json!(format!("rebalancer-{node}"))).collect();
    granted(
        admin,
        "kube-system",
        name,
        &[leases(&["list", "watch", "create"]), update],
        subject,
    )?;
    let events = json!({"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]});
    granted(admin, "default", name, &[events], subject)
}

/// A role of these rules in a namespace, and its binding.
///
/// # Errors
///
/// They are refused.
pub fn granted(admin: &Admin, namespace: &str, name: &str, rules: &[Value], subject: &Value) -> anyhow::Result<()> {
    let group = "rbac.authorization.k8s.io";
    let all = format!("/apis/{group}/v1/namespaces/{namespace}");
    let of = |kind: &str| json!({"apiVersion": format!("{group}/v1"), "kind": kind, "metadata": {"name": name}});
    let mut role = of("Role");
    role["rules"] = json!(rules);
    admin.make(&format!("{all}/roles"), &role)?;
    let mut binding = of("RoleBinding");
    binding["roleRef"] = json!({"apiGroup": group, "kind": "Role", "name": name});
    binding["subjects"] = json!([subject]);
    admin.make(&format!("{all}/rolebindings"), &binding)
}

/// A role of these rules in the whole cluster, and its binding.
///
/// # Errors
///
/// They are refused.
pub fn granted_in_cluster(admin: &Admin, name: &str, rules: &[Value], subject: &Value) -> anyhow::Result<()> {
    let group = "rbac.authorization.k8s.io";
    let all = format!("/apis/{group}/v1");
    let of = |kind: &str| json!({"apiVersion": format!("{group}/v1"), "kind": kind, "metadata": {"name": name}});
    let mut role = of("ClusterRole");
    role["rules"] = json!(rules);
    admin.make(&format!("{all}/clusterroles"), &role)?;
    let mut binding = of("ClusterRoleBinding");
    binding["roleRef"] = json!({"apiGroup": group, "kind": "ClusterRole", "name": name});
    binding["subjects"] = json!([subject]);
    admin.make(&format!("{all}/clusterrolebindings"), &binding)
}

fn unchunked(body: &str) -> String {
    let mut whole = String::new();
    let mut rest = body;
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || size > after.len() {
            break;
        }
        whole.push_str(&after[..size]);
        rest = after[size..].trim_start_matches("\r\n");
    }
    whole
}

/// Writes credentials for an agent, which reach the API by `server`.
///
/// # Errors
///
/// The files cannot be written.
pub fn kubeconfig(pki: &Pki, node: &str, server: SocketAddr) -> anyhow::Result<PathBuf> {
    let Pair { certificate, key } =
        pki.client(&format!("agent-of-{node}"), &format!("rebalancer:{node}"), &[AGENTS])?;
    let path = pki.path().join(format!("agent-of-{node}.kubeconfig"));
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {
            "server": format!("https://{server}"), "certificate-authority": pki.file("ca.crt"),
        }}],
        "users": [{"name": "u", "user": {"client-certificate": certificate, "client-key": key}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    });
    // JSON is YAML.
    std::fs::write(&path, config.to_string())?;
    Ok(path)
}
