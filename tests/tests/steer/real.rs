//! The real kube-apiserver, stripped as released, where the VM carries it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rebalancer_tests::{
    apiserver::{Settings, start_apiserver, start_etcd},
    fixture::Fixture,
    h2client::Client,
    netns::Network,
    skip,
};

use crate::world::{World, feature, kernel_takes_it};

const APISERVER: &str = "/bin/kube-apiserver";
const ETCD: &str = "/bin/etcd";

#[test]
fn a_real_apiserver_tells_only_the_victims() {
    if !kernel_takes_it() {
        return;
    }
    if !Path::new(APISERVER).is_file() || !Path::new(ETCD).is_file() {
        skip(
            "there is no kube-apiserver in this VM: `cargo xtask demo --apiserver real` builds one, or name it by KUBE_APISERVER and ETCD",
        );
        return;
    }
    let mut world = World::with(APISERVER.into());
    let fixture = Fixture {
        apiserver: APISERVER.into(),
        etcd: ETCD.into(),
        swarm: PathBuf::new(),
    };
    let at = |port| SocketAddr::new([127, 0, 0, 1].into(), port);
    let _etcd = start_etcd(&fixture, at(2379), at(2380), &world.directory, Some(world.node())).expect("etcd");
    let settings = Settings {
        fixture: &fixture,
        pki: &world.pki,
        etcd: at(2379),
        listen: world.address(),
        advertise: Network::node_address(0),
        count: 1,
        directory: &world.directory,
        name: "server",
        goaway_chance: 0.02,
        host: None,
        extra: &[],
    };
    let server = start_apiserver(&settings, Some(world.node().fd())).expect("kube-apiserver");
    world.server = Some(server);
    let found = feature("apiserver-binary", &[&format!("--apiserver-binary={APISERVER}")]);
    eprintln!("{}: {}", APISERVER, found["found"]);
    // Its own lottery is on until the agent comes: connections that hear GOAWAY are replaced.
    world.wait("kube-apiserver answers", |world| {
        Client::try_connect(&world.pki, world.hub(), world.address()).ok()
    });
    world.start_agent("steer:auto", &[]);
    world.wait_until_ready();
    let connect = |world: &World| Client::connect(&world.pki, world.hub(), world.address());
    world.wait("kube-apiserver is ready", |world| {
        let mut client = connect(world);
        client.try_get("/readyz").then_some(())
    });
    let mut clients: Vec<Client> = (0..10).map(|_| connect(&world)).collect();
    for client in &mut clients {
        client.get("/version");
    }
    world.wait_until_known(&clients);
    let mut told = 0;
    for (index, client) in clients.iter_mut().enumerate() {
        for _ in 0..30 {
            client.get("/version");
        }
        if index.is_multiple_of(3) {
            world.order(client.address);
            client.get("/version");
            client.wait_for_goaway();
            told += 1;
        }
    }
    for (index, client) in clients.iter_mut().enumerate() {
        if !index.is_multiple_of(3) {
            assert_eq!(client.goaways(), 0);
        }
    }
    let requests: u64 = clients.iter().map(|client| client.requests).sum();
    eprintln!("kube-apiserver: {requests} requests with --goaway-chance=0.02, {told} GOAWAYs, all to victims");
    world.server.as_mut().expect("a server").is_running().expect("it lives");
}
