//! An apiserver that reads who asks from headers of other names than kubeadm's, and a relay that is told so.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use rebalancer_tests::{
    apiserver::{Settings, start_apiserver, start_etcd},
    fixture::Fixture,
    kube::Admin,
    netns::Namespace,
    pki::Pki,
    process::{log_directory, tail, wait_for},
    skip,
};
use serde_json::json;

use crate::world::{START, relay_before};

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

#[test]
fn whatever_the_headers_are_called_the_port_opens_and_the_identity_arrives() {
    let fixture = match Fixture::get(|line| eprintln!("{line}")) {
        Ok(fixture) => fixture,
        Err(error) => return skip(&format!("{error:#}")),
    };
    let namespace = Namespace::new().expect("a network namespace");
    namespace.enter().expect("its own namespace");
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let at = |port| SocketAddr::new(loopback, port);
    let logs = log_directory("rebalancer-names-").expect("a directory");
    let pki = Pki::new(&[loopback]).expect("certificates");
    let _etcd = start_etcd(&fixture, at(2379), at(2380), &logs, None).expect("etcd");
    let mut processes = Vec::new();
    for (index, names) in NAMES.iter().enumerate() {
        let port = 6444 + 100 * index as u16;
        // Each is a cluster of its own: the authentication ConfigMap holds the names of all apiservers of one.
        let mut extra: Vec<String> = names.iter().map(|flag| (*flag).to_owned()).collect();
        extra.push(format!("--etcd-prefix=/cluster-{index}"));
        let settings = Settings {
            fixture: &fixture,
            pki: &pki,
            etcd: at(2379),
            listen: at(port),
            advertise: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            count: 1,
            directory: &logs,
            name: &format!("apiserver-{index}"),
            goaway_chance: 0.0,
            host: None,
            extra: &extra,
        };
        let apiserver = start_apiserver(&settings, None).expect("an apiserver");
        let control = logs.join(format!("relay-{index}.sock"));
        let upstream = format!("--upstream={}", at(port));
        let flags = [&names[..], &[&upstream]].concat();
        let name = format!("relay-{index}");
        let relay = relay_before(&name, at(port - 1), &control, &pki, &logs, &flags).expect("a relay");
        processes.push((relay, apiserver));
    }
    for (index, (relay, apiserver)) in processes.iter_mut().enumerate() {
        let admin = Admin::new(&pki, &namespace, at(6443 + 100 * index as u16)).expect("an administrator");
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
        let answer = wait_for(START, || {
            relay.is_running().expect("the relay runs");
            apiserver.is_running().expect("the apiserver runs");
            let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
            let (status, body) = admin.ask("POST", path, Some(&review)).ok()?;
            (status == 201).then_some(body)
        });
        let answer = answer.unwrap_or_else(|| panic!("{:?}:\n{}", NAMES[index], tail(&relay.log())));
        let user = &answer["status"]["userInfo"];
        assert_eq!(user["username"], "admin", "{answer}");
        let groups = user["groups"].as_array().expect("groups");
        assert!(groups.contains(&json!("system:masters")), "{answer}");
        let credential = &user["extra"]["authentication.kubernetes.io/credential-id"][0];
        assert!(credential.is_string(), "{answer}");
    }
}
