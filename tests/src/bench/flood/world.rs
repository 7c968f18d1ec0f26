//! etcd with a large list in it, and a fresh apiserver for each row.
//!
//! Input: the fixtures. Output: addresses and processes. Must never leave a manifest for the next row.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use serde_json::{Value, json};

use super::{ACCOUNT, Effort, FLOODER, Heaviest};
use crate::{
    apiserver::{Settings, start_apiserver, start_etcd},
    fixture::Fixture,
    kube::Admin,
    netns::Namespace,
    node::ask,
    pki::{Pair, Pki},
    process::{Process, tail, wait_for},
};

/// What is listed.
pub const LIST: &str = "/apis/cilium.io/v2/ciliumendpoints?resourceVersion=0";

const OBJECTS: &str = "/apis/cilium.io/v2/namespaces/default/ciliumendpoints";

const FLOW_CONTROL: &str = "/apis/flowcontrol.apiserver.k8s.io/v1";

const START: Duration = Duration::from_secs(120);

/// How many threads make the objects.
const MAKERS: usize = 4;

/// A level of its own with few shares, and no limit on what it borrows: what was published when levels did not borrow
/// (palark.com/blog/kubernetes-api-flow-control-management), with the fields of today.
pub const ARTICLE: &str = r#"
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: PriorityLevelConfiguration
metadata: {name: cilium-pods}
spec:
  type: Limited
  limited:
    nominalConcurrencyShares: 5
    limitResponse: {type: Queue, queuing: {handSize: 4, queueLengthLimit: 50, queues: 16}}
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {name: cilium-pods}
spec:
  distinguisherMethod: {type: ByUser}
  matchingPrecedence: 1000
  priorityLevelConfiguration: {name: cilium-pods}
  rules:
  - subjects: [{kind: Group, group: {name: "system:serviceaccounts:d8-cni-cilium"}}]
    resourceRules: [{verbs: [list], apiGroups: [cilium.io], resources: ["*"], namespaces: ["*"], clusterScope: true}]
"#;

/// etcd and the certificates.
pub struct World {
    pub namespace: Namespace,
    pub pki: Pki,
    /// The token of who floods.
    pub token: String,
    pub bystander: Pair,
    rebalancer: PathBuf,
    directory: PathBuf,
    fixture: Fixture,
    levels: PathBuf,
    _etcd: Process,
}

/// One row's processes.
pub struct Running<'w> {
    pub apiserver: Process,
    pub relay: Option<Process>,
    world: &'w World,
    control: PathBuf,
    applied: Vec<String>,
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

impl World {
    /// Starts etcd, and puts the list into it.
    pub fn make(
        rebalancer: &Path,
        effort: &Effort,
        directory: &Path,
        say: impl Fn(&str) + Copy,
    ) -> anyhow::Result<Self> {
        let fixture = Fixture::get(say)?;
        let namespace = Namespace::new()?;
        let pki = Pki::new(&[IpAddr::V4(Ipv4Addr::LOCALHOST)])?;
        let bystander = pki.client("bystander", "system:node:bystander", &["system:nodes"])?;
        let etcd = start_etcd(&fixture, at(2379), at(2380), directory, Some(&namespace))?;
        let mut world = Self {
            namespace,
            pki,
            token: String::new(),
            bystander,
            rebalancer: rebalancer.to_owned(),
            directory: directory.to_owned(),
            fixture,
            levels: directory.join("levels.json"),
            _etcd: etcd,
        };
        say(&format!("{} objects are made", effort.objects));
        let running = world.start("setup", false, "")?;
        world.fill(effort.objects)?;
        world.save_levels()?;
        let token = world.make_token()?;
        running.end()?;
        world.token = token;
        Ok(world)
    }

    /// Makes the account that floods, and asks the apiserver for its token, as a kubelet does for a pod's.
    fn make_token(&self) -> anyhow::Result<String> {
        let admin = self.admin()?;
        let (namespace, name) = ACCOUNT;
        let of = |kind: &str, name: &str| json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}});
        admin.make("/api/v1/namespaces", &of("Namespace", namespace))?;
        let accounts = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        admin.make(&accounts, &of("ServiceAccount", name))?;
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": 7200}});
        let path = format!("{accounts}/{name}/token");
        let (status, answer) = admin.ask("POST", &path, Some(&request))?;
        let token = answer["status"]["token"].as_str();
        token
            .map(str::to_owned)
            .with_context(|| format!("{path}: {status}: {answer}"))
    }

    fn admin(&self) -> anyhow::Result<Admin> {
        Admin::new(&self.pki, &self.namespace, at(6444))
    }

    fn fill(&self, objects: usize) -> anyhow::Result<()> {
        let admin = self.admin()?;
        let group = "rbac.authorization.k8s.io";
        admin.make(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
            &json!({
                "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
                "metadata": {"name": "ciliumendpoints.cilium.io"},
                "spec": {"group": "cilium.io", "scope": "Namespaced",
                    "names": {"plural": "ciliumendpoints", "singular": "ciliumendpoint", "kind": "CiliumEndpoint"},
                    "versions": [{"name": "v2", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                        "type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]},
            }),
        )?;
        admin.make(
            &format!("/apis/{group}/v1/clusterroles"),
            &json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRole", "metadata": {"name": "flooder"},
                "rules": [{"apiGroups": ["cilium.io"], "resources": ["*"], "verbs": ["list"]}]}),
        )?;
        admin.make(
            &format!("/apis/{group}/v1/clusterrolebindings"),
            &json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "flooder"},
                "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "flooder"},
                "subjects": [{"apiGroup": group, "kind": "User", "name": FLOODER}]}),
        )?;
        is_served(&admin)?;
        thread::scope(|scope| {
            let makers: Vec<_> = (0..MAKERS)
                .map(|first| {
                    let admin = admin.clone();
                    scope.spawn(move || {
                        (first..objects)
                            .step_by(MAKERS)
                            .try_for_each(|index| admin.make(OBJECTS, &object(index)))
                    })
                })
                .collect();
            makers.into_iter().try_for_each(|maker| {
                maker
                    .join()
                    .map_err(|_| anyhow::anyhow!("a thread that makes objects panicked"))?
            })
        })
    }

    /// What `kubectl get prioritylevelconfigurations,flowschemas -o json` prints.
    fn save_levels(&self) -> anyhow::Result<()> {
        let admin = self.admin()?;
        let mut items = Vec::new();
        for (kind, plural) in [
            ("PriorityLevelConfiguration", "prioritylevelconfigurations"),
            ("FlowSchema", "flowschemas"),
        ] {
            let (status, mut list) = admin.ask("GET", &format!("{FLOW_CONTROL}/{plural}"), None)?;
            anyhow::ensure!(status == 200, "{plural}: {status}: {list}");
            for item in list["items"].as_array_mut().into_iter().flatten() {
                item["kind"] = json!(kind);
                items.push(item.take());
            }
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        fs::write(&self.levels, list.to_string())?;
        Ok(())
    }

    /// What `rebalancer advise` prints for who floods.
    pub fn advice(&self) -> anyhow::Result<String> {
        let output = Command::new(&self.rebalancer)
            .args(["advise", "--user", FLOODER, "--levels"])
            .arg(&self.levels)
            .output()
            .context("cannot start rebalancer")?;
        anyhow::ensure!(
            output.status.success(),
            "advise: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A fresh apiserver, with that manifest applied, and a relay before it if it is to be.
    pub fn start(&self, name: &str, relayed: bool, manifest: &str) -> anyhow::Result<Running<'_>> {
        let settings = Settings {
            fixture: &self.fixture,
            pki: &self.pki,
            etcd: at(2379),
            listen: at(6444),
            advertise: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            count: 1,
            directory: &self.directory,
            name: &format!("apiserver-{name}"),
            goaway_chance: 0.0,
            host: None,
            extra: &[],
        };
        let mut apiserver = start_apiserver(&settings, Some(self.namespace.fd()))?;
        let admin = self.admin()?;
        let ready = wait_for(START, || {
            if let Err(error) = apiserver.is_running() {
                return Some(Err(error));
            }
            let (status, _) = admin.ask_text("GET", "/readyz", None).ok()?;
            (status == 200).then_some(Ok(()))
        });
        ready.with_context(|| format!("kube-apiserver is not ready:\n{}", tail(&apiserver.log())))??;
        let control = self.directory.join(format!("{name}.sock"));
        let mut running = Running {
            apiserver,
            relay: None,
            world: self,
            control,
            applied: Vec::new(),
        };
        running.apply(&admin, manifest)?;
        if name != "setup" {
            // Until an apiserver has served a custom resource once, it answers 429.
            is_served(&admin)?;
        }
        if relayed {
            let mut relay = Command::new(&self.rebalancer);
            relay
                .args(["relay", "--upstream=127.0.0.1:6444", "--listen=127.0.0.1:6443"])
                .args(self.pki.relay_flags())
                .arg(format!("--control=unix:{}", running.control.display()));
            let relay = Process::start(
                &format!("relay-{name}"),
                relay,
                Some(self.namespace.fd()),
                &self.directory,
            )?;
            running.relay = Some(relay);
            let relayed = Admin::new(&self.pki, &self.namespace, at(6443))?;
            wait_for(START, || {
                (relayed.ask_text("GET", "/readyz", None).ok()?.0 == 200).then_some(())
            })
            .context("the relay does not serve")?;
        }
        Ok(running)
    }
}

impl Running<'_> {
    /// Where clients go.
    pub fn address(&self) -> SocketAddr {
        at(if self.relay.is_some() { 6443 } else { 6444 })
    }

    /// Applies a manifest, and waits until a request of who floods is served by its level.
    fn apply(&mut self, admin: &Admin, manifest: &str) -> anyhow::Result<()> {
        for document in manifest.split("\n---").filter(|text| !text.trim().is_empty()) {
            let object: Value = serde_yaml_ng::from_str(document)?;
            let plural = match object["kind"].as_str() {
                Some("FlowSchema") => "flowschemas",
                Some("PriorityLevelConfiguration") => "prioritylevelconfigurations",
                other => anyhow::bail!("{other:?} in {document}"),
            };
            let (path, name) = (format!("{FLOW_CONTROL}/{plural}"), object["metadata"]["name"].clone());
            let (status, answer) = admin.ask("POST", &path, Some(&object))?;
            anyhow::ensure!(status == 201, "{path}: {status}: {answer}");
            self.applied
                .push(format!("{path}/{}", name.as_str().unwrap_or_default()));
        }
        let Some(schema) = self.applied.last() else {
            return Ok(());
        };
        let name = schema.rsplit('/').next().unwrap_or_default();
        // The apiserver counts a level's requests from the first on.
        let metric = format!("apiserver_flowcontrol_nominal_limit_seats{{priority_level=\"{name}\"}}");
        wait_for(START, || {
            let (_, text) = admin.ask_text("GET", "/metrics", None).ok()?;
            text.contains(&metric).then_some(())
        })
        .with_context(|| format!("the apiserver does not take level {name}"))
    }

    /// Who the relay says has had most.
    pub fn heaviest(&self) -> anyhow::Result<Option<Heaviest>> {
        let flows = ask(&self.control, "/v1/flows")?;
        let row = &flows["rows"][0];
        if !row.is_object() {
            return Ok(None);
        }
        let uid = row["flow_schema"].as_str().unwrap_or_default();
        let (_, schemas) = self
            .world
            .admin()?
            .ask("GET", &format!("{FLOW_CONTROL}/flowschemas"), None)?;
        let named = schemas["items"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|one| one["metadata"]["uid"] == uid);
        let schema = named
            .map_or(uid, |one| one["metadata"]["name"].as_str().unwrap_or(uid))
            .to_owned();
        Ok(Some(Heaviest {
            user: row["user"].as_str().map(str::to_owned),
            user_agent: row["user_agent"].as_str().unwrap_or_default().to_owned(),
            schema,
            megabytes: row["bytes"].as_f64().unwrap_or_default() / 1e6,
        }))
    }

    /// Takes the manifest away again, and ends.
    pub fn end(mut self) -> anyhow::Result<()> {
        let admin = self.world.admin()?;
        for path in &self.applied {
            let (status, answer) = admin.ask("DELETE", path, None)?;
            anyhow::ensure!(status == 200, "{path}: {status}: {answer}");
        }
        self.relay = None;
        self.apiserver.kill();
        Ok(())
    }
}

/// Waits until the list can be had.
fn is_served(admin: &Admin) -> anyhow::Result<()> {
    wait_for(START, || {
        (admin.ask_text("GET", LIST, None).ok()?.0 == 200).then_some(())
    })
    .context("the custom resource is not served")
}

/// An object of about 3 kB, as an endpoint of Cilium is.
fn object(index: usize) -> Value {
    let labels: Vec<String> = (0..30)
        .map(|label| {
            format!(
                "k8s:io.cilium.k8s.namespace.labels.part-{label}=value-{}-{label}",
                index % 50
            )
        })
        .collect();
    json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
        "metadata": {"name": format!("ep-{index:05}"), "namespace": "default"},
        "status": {"id": index, "state": "ready", "identity": {"id": 10_000 + index % 50, "labels": labels},
            "networking": {"addressing": [{"ipv4": format!("10.{}.{}.{}", index / 65_536, index / 256 % 256, index % 256)}]},
            "external-identifiers": {"container-id": format!("{index:064x}"), "pod-name": format!("default/pod-{index:05}")}},
    })
}
