//! Clusters of their own, for what changes an apiserver: headers of other names than kubeadm's, and an etcd that goes away.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use rebalancer_tests::{
    apiserver::{Settings, start_apiserver, start_etcd},
    fixture::Fixture,
    kube::Admin,
    netns::Namespace,
    pki::Pki,
    process::{Process, log_directory, tail, wait_for},
    skip,
};
use serde_json::{Value, json};

use crate::{
    World,
    world::{START, control, relay_command},
};

/// The flags of both: names that have nothing of kubeadm's, but for the one that kube-apiserver insists on, and two names of
/// which the first is the one to write.
const NAMES: [[&str; 4]; 2] = [
    [
        "--requestheader-username-headers=X-Auth-User",
        "--requestheader-group-headers=X-Auth-Group",
        "--requestheader-uid-headers=X-Auth-Uid,X-Remote-Uid",
        "--requestheader-extra-headers-prefix=X-Auth-Extra-",
    ],
    [
        "--requestheader-username-headers=X-Proxy-User,X-Auth-User",
        "--requestheader-group-headers=X-Proxy-Group,X-Auth-Group",
        "--requestheader-uid-headers=X-Proxy-Uid,X-Remote-Uid",
        "--requestheader-extra-headers-prefix=X-Proxy-Extra-,X-Auth-Extra-",
    ],
];

/// One etcd in a namespace of its own, and apiservers that know nothing of each other, each behind a relay.
struct Clusters {
    fixture: Fixture,
    namespace: Namespace,
    pki: Pki,
    logs: PathBuf,
    etcd: Process,
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

impl Clusters {
    /// `None` when they cannot be made here, which is counted.
    fn start() -> Option<Self> {
        // What is started without a namespace is in that of the test that began first: the others' world.
        World::get()?;
        let fixture = match Fixture::get(|line| eprintln!("{line}")) {
            Ok(fixture) => fixture,
            Err(error) => {
                skip(&format!("{error:#}"));
                return None;
            }
        };
        let namespace = Namespace::new().expect("a network namespace");
        namespace.enter().expect("its own namespace");
        let logs = log_directory("rebalancer-clusters-").expect("a directory");
        let etcd = start_etcd(&fixture, at(2379), at(2380), &logs, Some(&namespace)).expect("etcd");
        Some(Self {
            fixture,
            namespace,
            pki: Pki::new(&[at(0).ip()]).expect("certificates"),
            logs,
            etcd,
        })
    }

    /// Starts an apiserver and its relay, both with those flags.
    fn add(&self, index: u16, flags: &[&str]) -> Cluster<'_> {
        let port = 6444 + 100 * index;
        // The authentication ConfigMap holds the names of all apiservers of one cluster.
        let prefix = format!("--etcd-prefix=/cluster-{index}");
        let extra: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).chain([prefix]).collect();
        let settings = Settings {
            fixture: &self.fixture,
            pki: &self.pki,
            etcd: at(2379),
            listen: at(port),
            advertise: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            count: 1,
            directory: &self.logs,
            name: &format!("apiserver-{index}"),
            goaway_chance: 0.0,
            host: None,
            extra: &extra,
        };
        let apiserver = start_apiserver(&settings, Some(self.namespace.fd())).expect("an apiserver");
        let control = self.logs.join(format!("relay-{index}.sock"));
        let upstream = format!("--upstream={}", at(port));
        let flags = [flags, &[&upstream]].concat();
        let name = format!("relay-{index}");
        let relay = relay_command(at(port - 1), &control, &self.pki, &flags);
        let relay = Process::start(&name, relay, Some(self.namespace.fd()), &self.logs).expect("a relay");
        Cluster {
            clusters: self,
            address: at(port - 1),
            control,
            relay,
            apiserver,
        }
    }
}

/// An apiserver and its relay.
struct Cluster<'c> {
    clusters: &'c Clusters,
    address: SocketAddr,
    control: PathBuf,
    relay: Process,
    apiserver: Process,
}

impl Cluster<'_> {
    /// Whom the apiserver takes an administrator for who comes by the relay, as soon as it takes anybody.
    fn user(&mut self) -> Value {
        let admin = Admin::new(&self.clusters.pki, &self.clusters.namespace, self.address).expect("an administrator");
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
        let answer = wait_for(START, || {
            self.relay.is_running().expect("the relay runs");
            self.apiserver.is_running().expect("the apiserver runs");
            let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
            let (status, body) = admin.ask("POST", path, Some(&review)).ok()?;
            (status == 201).then_some(body)
        });
        let answer = answer.unwrap_or_else(|| panic!("nobody is taken:\n{}", tail(&self.relay.log())));
        answer["status"]["userInfo"].clone()
    }

    /// Waits until the relay says that of its apiserver.
    fn is(&self, state: &str) {
        let seen = wait_for(START, || {
            let all = control(&self.control, "GET /v1/connections", "");
            (all["upstream"] == state).then_some(())
        });
        assert!(seen.is_some(), "it is not {state}:\n{}", tail(&self.relay.log()));
    }
}

#[test]
fn whatever_the_headers_are_called_the_port_opens_and_the_identity_arrives() {
    let Some(clusters) = Clusters::start() else { return };
    for (index, names) in NAMES.iter().enumerate() {
        let user = clusters.add(index as u16, names).user();
        assert_eq!(user["username"], "admin", "{user}");
        let groups = user["groups"].as_array().expect("groups");
        assert!(groups.contains(&json!("system:masters")), "{user}");
        let credential = &user["extra"]["authentication.kubernetes.io/credential-id"][0];
        assert!(credential.is_string(), "{user}");
    }
}

#[test]
fn an_apiserver_whose_etcd_is_away_is_overloaded_and_does_not_start() {
    let Some(clusters) = Clusters::start() else { return };
    let mut cluster = clusters.add(0, &[]);
    cluster.user();
    cluster.is("ready");
    let before = cluster.relay.log().len();
    clusters.etcd.signal(libc::SIGKILL);
    cluster.is("overloaded");
    let since = &cluster.relay.log()[before..];
    assert!(since.contains("Overloaded") && !since.contains("Starting"), "{since}");
}
