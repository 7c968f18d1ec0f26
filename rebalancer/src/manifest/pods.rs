//! Pods: agent and relay in one, as a static pod of one node, or as a DaemonSet of all control-plane nodes.
//!
//! Must never be privileged, and never write where the host's files are only read.

use std::fmt::Write as _;

use super::{
    Flags, ManifestError, Mount, Part,
    contradictions::{CGROUPS, check_pod},
};

/// What the pods are made of.
#[derive(Clone, Debug)]
pub struct Pods {
    /// The image both containers run.
    pub image: String,
    /// Where they are.
    pub namespace: String,
    /// The agent's flags.
    pub agent: Flags,
    /// The relay's, where there is one.
    pub relay: Option<Flags>,
}

/// The pod a kubelet starts from a file, without an apiserver.
///
/// # Errors
///
/// Flags that no pod can have.
pub fn static_pod(pods: &Pods) -> Result<String, ManifestError> {
    check_pod(&pods.agent)?;
    let mut text = format!(
        "\
apiVersion: v1
kind: Pod
metadata:
  name: rebalancer
  namespace: {}
  labels:
    app.kubernetes.io/name: rebalancer
    tier: control-plane
spec:
",
        quoted(&pods.namespace)
    );
    spec(&mut text, pods, 2);
    Ok(text)
}

/// The DaemonSet, with the rights its agents and relays need.
///
/// # Errors
///
/// Flags that cannot be the same on all nodes.
pub fn daemonset(pods: &Pods) -> Result<String, ManifestError> {
    if pods.agent.value("peer").is_some() || pods.agent.value("peers") == Some("static") {
        return Err(ManifestError::Peers);
    }
    check_pod(&pods.agent)?;
    if pods.namespace == "kube-system" {
        return Err(ManifestError::Namespace);
    }
    let namespace = quoted(&pods.namespace);
    let mut text = format!(
        "\
apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}
  labels:
    # The host's network and files.
    pod-security.kubernetes.io/enforce: privileged
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: rebalancer
  namespace: {namespace}
---
"
    );
    for (of, right) in [
        (&*namespace, OWN_LEASES),
        (KUBE_SYSTEM, APISERVERS_LEASES),
        ("\"default\"", EVENTS),
    ] {
        text += &granted(of, &namespace, &right);
    }
    if pods.relay.is_some() {
        text += RELAY_READS;
        text += &names_of_flows(&namespace);
    }
    let _ = write!(
        text,
        "\
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: rebalancer
  namespace: {namespace}
  labels:
    app.kubernetes.io/name: rebalancer
spec:
  selector:
    matchLabels:
      app.kubernetes.io/name: rebalancer
  updateStrategy:
    # One node after the other: its clients go to the apiserver itself meanwhile.
    rollingUpdate:
      maxUnavailable: 1
  template:
    metadata:
      labels:
        app.kubernetes.io/name: rebalancer
      annotations:
        kubectl.kubernetes.io/default-container: agent
    spec:
      serviceAccountName: rebalancer
      nodeSelector:
        node-role.kubernetes.io/control-plane: \"\"
"
    );
    spec(&mut text, pods, 6);
    Ok(text)
}

/// Where the apiservers' own Leases are.
const KUBE_SYSTEM: &str = "\"kube-system\"";

/// What agents may do in a namespace.
struct Right {
    role: &'static str,
    group: &'static str,
    resource: &'static str,
    verbs: &'static str,
}

/// Agents write their Leases in a namespace of their own, since no rule can name the one Lease that each may write: in
/// kube-system that right would hold for the Leases of others too.
const OWN_LEASES: Right = Right {
    role: "rebalancer",
    group: "coordination.k8s.io",
    resource: "leases",
    verbs: "[list, watch, create, update]",
};

/// They read which apiservers there are.
const APISERVERS_LEASES: Right = Right {
    verbs: "[list, watch]",
    ..OWN_LEASES
};

/// They say on the Node what has changed: Events of Nodes are in `default`.
const EVENTS: Right = Right {
    role: "rebalancer-events",
    group: "events.k8s.io",
    resource: "events",
    verbs: "[create]",
};

fn granted(of: &str, namespace: &str, right: &Right) -> String {
    let Right {
        role,
        group,
        resource,
        verbs,
    } = right;
    format!(
        "\
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {role}
  namespace: {of}
rules:
  - apiGroups: [{group}]
    resources: [{resource}]
    verbs: {verbs}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {role}
  namespace: {of}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {role}
subjects:
  - kind: ServiceAccount
    name: rebalancer
    namespace: {namespace}
---
"
    )
}

/// The relay compares its flags with what the apiserver says of its own, as a user without other rights.
const RELAY_READS: &str = "\
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: rebalancer-relay
  namespace: kube-system
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: extension-apiserver-authentication-reader
subjects:
  - apiGroup: rbac.authorization.k8s.io
    kind: User
    name: rebalancer-relay
---
";

/// Agents say the names of what the apiserver names in answers to the relay, and reckon with the cluster's own levels.
fn names_of_flows(namespace: &str) -> String {
    format!(
        "\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: rebalancer-flows
rules:
  - apiGroups: [flowcontrol.apiserver.k8s.io]
    resources: [flowschemas, prioritylevelconfigurations]
    verbs: [list]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: rebalancer-flows
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: rebalancer-flows
subjects:
  - kind: ServiceAccount
    name: rebalancer
    namespace: {namespace}
---
"
    )
}

/// How long a relay that ends drains: what has no end of its own, exec and logs -f, is cut then.
const GRACE_SECONDS: u32 = 120;

fn spec(text: &mut String, pods: &Pods, indent: usize) {
    let mut lines = format!(
        "\
hostNetwork: true
{}dnsPolicy: ClusterFirstWithHostNet
priorityClassName: system-node-critical
terminationGracePeriodSeconds: {GRACE_SECONDS}
tolerations:
  - operator: Exists
securityContext:
  seccompProfile:
    type: RuntimeDefault
containers:
",
        // The process of the apiserver is found by its pid.
        if pods.agent.steers() { "hostPID: true\n" } else { "" }
    );
    container(&mut lines, &pods.agent, &pods.image);
    if let Some(relay) = &pods.relay {
        container(&mut lines, relay, &pods.image);
    }
    let mut volumes: Vec<Mount> = Vec::new();
    for mount in mounts(&pods.agent)
        .into_iter()
        .chain(pods.relay.iter().flat_map(mounts))
    {
        if volumes.iter().all(|known| known.path != mount.path) {
            volumes.push(mount);
        }
    }
    lines += "volumes:\n";
    for volume in &volumes {
        let _ = write!(
            lines,
            "  - name: {}\n    hostPath:\n      path: {}\n      type: {}\n",
            volume_name(volume),
            quoted(&volume.path.to_string_lossy()),
            if volume.written {
                "DirectoryOrCreate"
            } else {
                "Directory"
            }
        );
    }
    for line in lines.lines() {
        let _ = writeln!(text, "{:indent$}{line}", "");
    }
}

fn container(text: &mut String, flags: &Flags, image: &str) {
    let part = flags.part();
    let _ = write!(
        text,
        "  - name: {part}\n    image: {}\n    args:\n      - {part}\n",
        quoted(image)
    );
    for word in flags.words() {
        let _ = writeln!(text, "      - {}", quoted(word));
    }
    if part == Part::Agent && flags.value("node-name").is_none() {
        *text += block(NODE_NAME);
    }
    *text += block(CONFINED);
    let capabilities = flags.capabilities();
    if !capabilities.is_empty() {
        let _ = writeln!(text, "        add: [{}]", capabilities.join(", "));
    }
    *text += block(match part {
        Part::Agent => AGENT_RESOURCES,
        Part::Relay => RELAY_RESOURCES,
    });
    probes(text, flags);
    *text += "    volumeMounts:\n";
    for mount in mounts(flags) {
        let _ = write!(
            text,
            "      - name: {}\n        mountPath: {}\n{}",
            volume_name(&mount),
            quoted(&mount.path.to_string_lossy()),
            if mount.written { "" } else { "        readOnly: true\n" }
        );
    }
}

/// Lines that are indented: a line end after the quotation mark keeps the first line's place.
fn block(lines: &str) -> &str {
    lines.strip_prefix('\n').unwrap_or(lines)
}

const NODE_NAME: &str = "
    env:
      - name: REBALANCER_NODE_NAME
        valueFrom:
          fieldRef:
            fieldPath: spec.nodeName
";

const CONFINED: &str = "
    securityContext:
      # A user of its own would get no capabilities: Kubernetes sets no ambient ones.
      runAsUser: 0
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
";

/// Measured: 31 MiB and 0.4 % of a core with 20,000 connections (docs/bench.md).
const AGENT_RESOURCES: &str = "
    resources:
      requests: {cpu: 20m, memory: 64Mi}
      limits: {memory: 256Mi}
";

/// Measured: 15 KiB a watching client (docs/bench.md); a limit would cut every client at once.
const RELAY_RESOURCES: &str = "
    resources:
      requests: {cpu: 100m, memory: 128Mi}
";

/// The agent's say whether its loop goes on, and whether it counts. The relay closes its port when the apiserver is gone,
/// which is no reason to start it again: its probe asks the process.
fn probes(text: &mut String, flags: &Flags) {
    let (address, ready) = match flags.part() {
        Part::Agent => (Some(flags.value("metrics").unwrap_or("127.0.0.1:9470")), true),
        Part::Relay => (flags.value("metrics"), false),
    };
    let Some((host, port)) = address.and_then(|address| address.rsplit_once(':')) else {
        return;
    };
    let host = match host.trim_matches(['[', ']']) {
        "0.0.0.0" => "127.0.0.1",
        "::" => "::1",
        host => host,
    };
    let mut probe = |name: &str, path: &str| {
        let _ = write!(
            text,
            "    {name}:\n      httpGet: {{host: {}, port: {port}, path: {path}}}\n      periodSeconds: 10\n      timeoutSeconds: 5\n",
            quoted(host)
        );
    };
    probe("livenessProbe", "/livez");
    if ready {
        probe("readinessProbe", "/readyz");
    }
}

/// What a container sees of the host: the agent its cgroups too, to which the kernel programs are attached.
fn mounts(flags: &Flags) -> Vec<Mount> {
    let mut mounts = flags.mounts().to_vec();
    if flags.part() == Part::Agent {
        mounts.push(Mount {
            path: CGROUPS.into(),
            written: false,
        });
    }
    mounts
}

/// RFC 1123: a label's characters.
const LONGEST_NAME: usize = 63;

fn volume_name(mount: &Mount) -> String {
    let path = mount.path.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let name = path.to_lowercase().replace(|c| !is_plain(c), "-");
    let name = name.trim_matches('-');
    if name.len() <= LONGEST_NAME && path.chars().all(|c| is_plain(c) || c == '/') {
        return name.to_owned();
    }
    // Another path may come to the same: what they are told apart by is their hash, and the last characters say most.
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, path.as_bytes());
    let hash: String = digest.as_ref()[..3]
        .iter()
        .map(|octet| format!("{octet:02x}"))
        .collect();
    let end = &name[name.len().saturating_sub(LONGEST_NAME - 7)..];
    format!("{}-{hash}", end.trim_matches('-'))
}

/// A string of YAML: JSON's strings are.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
