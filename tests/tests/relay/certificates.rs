//! The relay's TLS: which certificate it shows, what it negotiates, and what a change of files does.

use std::{fs, net::TcpStream, sync::Arc};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, Peer, client_config, fields, frame, kind, request},
    pki::{Pki, SERVER_NAME},
    process::wait_for,
};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};

use crate::world::{OK, RELAY, World};

/// A handshake for that name, to its end.
fn handshake(config: ClientConfig, name: &str) -> anyhow::Result<ClientConnection> {
    let socket = TcpStream::connect(RELAY)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut tls = ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned())?)?;
    tls.complete_io(&mut &socket)?;
    Ok(tls)
}

fn shown(world: &World, name: &str) -> Vec<u8> {
    let config = client_config(&world.pki, None, b"h2").expect("certificates");
    let tls = handshake(config, name).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    tls.peer_certificates().expect("a certificate")[0].to_vec()
}

fn stored(pki: &Pki, stem: &str) -> Vec<u8> {
    CertificateDer::from_pem_file(pki.pair(stem).certificate)
        .expect("a certificate")
        .to_vec()
}

#[test]
fn the_certificate_follows_the_name_and_the_files() {
    let world = World::start_prepared(false, |pki| {
        let flag = |stem: &str, names: &[&str], suffix: &str| {
            let pair = pki.serving(stem, names).expect("a certificate");
            let (certificate, key) = (pair.certificate.display(), pair.key.display());
            format!("--tls-sni-cert-key={certificate},{key}{suffix}")
        };
        vec![
            flag("public", &["api.example", "*.apps.example"], ""),
            flag("inner", &["inner.example", "other.example"], ":inner.example"),
        ]
    });
    let pki = &world.pki;
    let mut bystander = world.bystander();
    for (name, stem) in [
        (SERVER_NAME, "apiserver"),
        ("127.0.0.1", "apiserver"),
        ("api.example", "public"),
        ("one.apps.example", "public"),
        ("inner.example", "inner"),
    ] {
        assert_eq!(shown(&world, name), stored(pki, stem), "{name}");
    }
    // A name that no flag lists: as at the apiserver, whichever certificate is for it; for nobody's, the default one.
    assert_eq!(shown(&world, "other.example"), stored(pki, "inner"));
    let config = client_config(pki, None, b"h2").expect("certificates");
    assert!(handshake(config, "nobodys.example").is_err());

    // The files change, while a connection is open.
    let old = stored(pki, "public");
    pki.serving("public", &["api.example"]).expect("another certificate");
    wait_for(PATIENCE, || {
        (shown(&world, "api.example") == stored(pki, "public")).then_some(())
    })
    .expect("new connections get the new certificate");
    assert_ne!(stored(pki, "public"), old);
    bystander.is_served();

    // A change that cannot be loaded leaves the one in use, and the log says so.
    let good = stored(pki, "public");
    let kept = fs::read(pki.file("public.key")).expect("a key");
    fs::write(pki.file("public.key"), "half a file").expect("the file can be written");
    wait_for(PATIENCE, || {
        let log = world.relay.log();
        (log.contains("changed certificates cannot be loaded") && log.contains("--tls-sni-cert-key")).then_some(())
    })
    .expect("the log names the flag");
    assert_eq!(shown(&world, "api.example"), good);
    fs::write(pki.file("public.key"), kept).expect("the file can be written");
    bystander.is_served();

    // So does the client CA: a client of another one is nobody until it is added.
    let stranger = pki.stranger("stranger", |_| ()).expect("a certificate");
    let named = || {
        let client = Peer::connect(pki, RELAY, Some(&stranger), b"h2").expect("a handshake");
        let id = world.id_of(client.local());
        let mut all = world.connections();
        let entry = all
            .iter_mut()
            .find(|entry| entry["id"] == id.as_str())
            .expect("it is open");
        entry["user"].as_str().map(str::to_owned)
    };
    assert_eq!(named(), None);
    let both = [fs::read(pki.file("ca.crt")), fs::read(pki.file("stranger-ca.crt"))].map(|file| file.expect("a file"));
    fs::write(pki.file("ca.crt"), both.concat()).expect("the file can be written");
    wait_for(PATIENCE, || (named().as_deref() == Some("stranger")).then_some(())).expect("the new CA counts");
    bystander.is_served();
}

/// A client of an authority that is taken away, and one of an authority that stays, before and after.
#[test]
fn when_authorities_change_the_next_request_knows_and_those_that_still_verify_are_left_alone() {
    let world = World::start_prepared(false, |pki| {
        pki.stranger("stranger", |_| ()).expect("a certificate");
        let both = [fs::read(pki.file("ca.crt")), fs::read(pki.file("stranger-ca.crt"))];
        let both = both.map(|file| file.expect("a file")).concat();
        fs::copy(pki.file("ca.crt"), pki.file("only.crt")).expect("the file can be written");
        fs::write(pki.file("ca.crt"), both).expect("the file can be written");
        Vec::new()
    });
    let pki = &world.pki;
    let alice = pki.client("alice", "alice", &["dev"]).expect("a certificate");
    let (mut staying, mut staying_server) = world.open(Some(&alice));
    let (mut leaving, mut leaving_server) = world.open(Some(&pki.pair("stranger")));
    let mut http1 = Peer::connect(pki, RELAY, Some(&pki.pair("stranger")), b"http/1.1").expect("a handshake");
    http1.send(b"GET /before HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    let mut http1_server = world.accept().peer;
    http1_server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert!(http1.read_head().starts_with("HTTP/1.1 200"));
    for (client, server) in [(&mut staying, &mut staying_server), (&mut leaving, &mut leaving_server)] {
        client.send(&request(1, "/before"));
        assert_eq!(server.expect(kind::HEADERS).stream, 1);
    }

    fs::copy(pki.file("only.crt"), pki.file("ca.crt")).expect("the file can be written");
    wait_for(PATIENCE, || {
        world
            .relay
            .log()
            .contains("open connections are judged withdrawn")
            .then_some(())
    })
    .expect("the relay judges again");
    leaving.send(&request(3, "/after"));
    let (mut answer, mut told) = (None, false);
    while answer.is_none() || !told {
        let frame = leaving.receive();
        told |= frame.kind == kind::GOAWAY;
        answer = answer.or(Some(frame).filter(|frame| frame.stream == 3));
    }
    // `:status: 401`, the relay's own.
    assert_eq!(answer.expect("an answer").payload, [&[0x08, 3][..], b"401"].concat());
    staying.send(&request(3, "/after"));
    let list = fields(&staying_server.expect(kind::HEADERS).payload);
    assert!(
        list.contains(&("x-remote-user".to_owned(), "alice".to_owned())),
        "{list:?}"
    );
    staying_server.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, 3, &OK));
    // The first it hears: no GOAWAY came before.
    assert_eq!(staying.receive().kind, kind::HEADERS);
    // An idle one over HTTP/1.1 is closed, or answered by the relay.
    let sent = http1.try_send(b"GET /after HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    if let (Ok(()), Ok(head)) = (sent, http1.try_read(12)) {
        assert_eq!(head, b"HTTP/1.1 401");
    }
    drop(leaving);
    let heard = leaving_server.rest();
    assert!(
        heard.iter().all(|frame| frame.kind != kind::HEADERS),
        "the server hears nothing of the request: {heard:?}"
    );
}

#[test]
fn versions_and_key_exchanges_are_the_apiservers_defaults() {
    let world = World::start(&[]);
    let config = || client_config(&world.pki, None, b"h2").expect("certificates");
    let tls = handshake(config(), SERVER_NAME).expect("a handshake");
    assert_eq!(tls.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let group = tls.negotiated_key_exchange_group().expect("a key exchange").name();
    assert_eq!(
        group,
        NamedGroup::X25519MLKEM768,
        "post-quantum when the client offers it"
    );

    let with = |versions: &[&'static rustls::SupportedProtocolVersion], group: Option<NamedGroup>| {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        if let Some(group) = group {
            provider.kx_groups.retain(|known| known.name() == group);
        }
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(world.pki.file("ca.crt")).expect("a certificate"))
            .expect("a root");
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    };
    let tls = handshake(with(&[&rustls::version::TLS12], None), SERVER_NAME).expect("TLS 1.2 is taken");
    assert_eq!(tls.protocol_version(), Some(ProtocolVersion::TLSv1_2));
    for group in [NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::secp384r1] {
        let tls = handshake(with(&[&rustls::version::TLS13], Some(group)), SERVER_NAME).expect("a classical group");
        assert_eq!(
            tls.negotiated_key_exchange_group().expect("a key exchange").name(),
            group
        );
    }
    // ALPN: nothing in common is refused (RFC 7301, section 3.2); none at all is HTTP/1.1.
    let mut other = config();
    other.alpn_protocols = vec![b"spdy/3".to_vec()];
    assert!(handshake(other, SERVER_NAME).is_err());
    let mut none = config();
    none.alpn_protocols.clear();
    let tls = handshake(none, SERVER_NAME).expect("a handshake");
    assert_eq!(tls.alpn_protocol(), None);
}

#[test]
fn a_resumed_session_is_the_same_client() {
    let world = World::start(&[]);
    let alice = world.pki.client("alice", "alice", &["dev"]).expect("a certificate");
    // Sessions are kept with the configuration.
    let config = client_config(&world.pki, Some(&alice), b"h2").expect("certificates");
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let mut client = Peer::connect_with(config.clone(), RELAY).expect("a handshake");
        client.begin_client(&[]);
        let mut server = world.accept().peer;
        assert!(server.certified);
        server.begin_server();
        // The ticket comes with the first octets of the server.
        assert_eq!(client.expect(kind::SETTINGS).flags, 0);
        assert_eq!(client.expect(kind::SETTINGS).flags, 1);
        client.send(&request(1, "/"));
        let list = fields(&server.expect(kind::HEADERS).payload);
        let user = list
            .iter()
            .find(|(name, _)| name == "x-remote-user")
            .map(|(_, user)| user.as_str());
        assert_eq!(user, Some("alice"));
        kinds.push(client.resumed);
    }
    assert_eq!(kinds, [false, true]);
    let tls = handshake(config, SERVER_NAME).expect("a handshake");
    assert_eq!(tls.handshake_kind(), Some(HandshakeKind::Resumed));
}
