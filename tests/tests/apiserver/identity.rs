//! Who a client is, through the relay and directly: a real kube-apiserver is asked, and its audit log is read.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose};
use rebalancer_tests::{
    binary,
    h2wire::{END_HEADERS, END_STREAM, Peer, block, client_config, frame, kind},
    kubectl::{Kubectl, Who},
    pki::{Pair, SERVER_NAME},
    process::{Process, wait_for},
};
use serde_json::Value;

use crate::{PATIENCE, world::World};

const REVIEWS: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
const BODY: &str = r#"{"kind":"SelfSubjectReview","apiVersion":"authentication.k8s.io/v1"}"#;

/// Where the client connects from: another address than the relay's own.
const CLIENT: &str = "127.0.0.9:0";

type Fields<'a> = &'a [(&'a str, &'a str)];

/// One kind of client.
struct Kind<'a> {
    name: &'a str,
    certificate: Option<Pair>,
    headers: Fields<'a>,
    trailers: Fields<'a>,
    http1: bool,
    /// What the audit log calls it; `None` when the answer is 401.
    user: Option<&'a str>,
}

fn connect(world: &World, kind: &Kind<'_>, server: SocketAddr) -> Peer {
    let protocol: &[u8] = if kind.http1 { b"http/1.1" } else { b"h2" };
    let config = client_config(&world.pki, kind.certificate.as_ref(), protocol).expect("certificates");
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket
        .bind(&CLIENT.parse::<SocketAddr>().expect("an address").into())
        .expect("loopback has many addresses");
    socket.connect(&server.into()).expect("the port is open");
    Peer::handshake(socket.into(), config).expect("a handshake")
}

/// Asks who one is: the answer.
fn review(world: &World, kind: &Kind<'_>, server: SocketAddr, agent: &str) -> Value {
    let mut peer = connect(world, kind, server);
    let body = if kind.http1 {
        let mut head =
            format!("POST {REVIEWS} HTTP/1.1\r\nHost: {SERVER_NAME}\r\nConnection: close\r\nUser-Agent: {agent}\r\n");
        head += "Content-Type: application/json\r\nAccept: application/json\r\n";
        for (name, value) in kind.headers {
            head += &format!("{name}: {value}\r\n");
        }
        peer.send(format!("{head}Content-Length: {}\r\n\r\n{BODY}", BODY.len()).as_bytes());
        let head = peer.read_head().to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length = length.unwrap_or_else(|| panic!("{}: no length in {head}", kind.name));
        peer.read(length.parse().expect("a length"))
    } else {
        peer.begin_client(&[]);
        let mut list = vec![
            (":method", "POST"),
            (":scheme", "https"),
            (":authority", SERVER_NAME),
            (":path", REVIEWS),
            ("user-agent", agent),
            ("content-type", "application/json"),
            ("accept", "application/json"),
        ];
        list.extend(kind.headers);
        peer.send(&frame(kind::HEADERS, END_HEADERS, 1, &block(&list)));
        if kind.trailers.is_empty() {
            peer.send(&frame(kind::DATA, END_STREAM, 1, BODY.as_bytes()));
        } else {
            peer.send(&frame(kind::DATA, 0, 1, BODY.as_bytes()));
            peer.send(&frame(
                kind::HEADERS,
                END_HEADERS | END_STREAM,
                1,
                &block(kind.trailers),
            ));
        }
        let mut body = Vec::new();
        loop {
            let got = peer.receive();
            if got.stream != 1 {
                continue;
            }
            assert!(matches!(got.kind, kind::HEADERS | kind::DATA), "{}: {got:?}", kind.name);
            if got.kind == kind::DATA {
                body.extend(&got.payload);
            }
            if got.flags & END_STREAM != 0 {
                break body;
            }
        }
    };
    serde_json::from_slice(&body)
        .unwrap_or_else(|error| panic!("{}: {error}: {}", kind.name, String::from_utf8_lossy(&body)))
}

/// The audit log's event of that user agent.
fn audited(world: &World, agent: &str) -> Value {
    let found = wait_for(PATIENCE, || {
        let log = fs::read_to_string(&world.audit).ok()?;
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.into_iter().find(|event| event["userAgent"] == agent)
    });
    found.unwrap_or_else(|| panic!("no audit event of {agent}"))
}

#[test]
fn every_kind_of_client_is_the_same_through_the_relay_as_directly() {
    let Some(world) = World::get() else { return };
    let pki = &world.pki;
    let made = |pair: anyhow::Result<Pair>| Some(pair.expect("a certificate"));
    let uid = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 57683, 2]);
    let expired = |params: &mut CertificateParams| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    };
    let server_only = |params: &mut CertificateParams| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    };
    let any_usage = |params: &mut CertificateParams| params.extended_key_usages = Vec::new();
    let admin = made(Ok(pki.pair("admin")));
    let plain =
        |name: &'static str, certificate: Option<Pair>, headers: Fields<'static>, user: Option<&'static str>| Kind {
            name,
            certificate,
            headers,
            trailers: &[],
            http1: false,
            user,
        };
    const TOKEN: Fields<'_> = &[("authorization", "Bearer token-3")];
    const WRONG_TOKEN: Fields<'_> = &[("authorization", "Bearer no-such-token")];
    const FORGED: Fields<'_> = &[
        ("x-remote-user", "root"),
        ("x-remote-group", "system:masters"),
        ("x-remote-uid", "0"),
        ("x-remote-extra-scopes", "all"),
    ];
    const TOKEN_AND_FORGED: Fields<'_> = &[TOKEN[0], FORGED[0], FORGED[1]];
    // As HTTP/1.1 allows them; HTTP/2 has lower case alone.
    const SPELLED: Fields<'_> = &[
        ("X-Remote-User", "root"),
        ("X-REMOTE-GROUP", "system:masters"),
        ("x-Remote-Uid", "0"),
        ("X-remote-EXTRA-scopes", "all"),
    ];
    let mut kinds = vec![
        plain(
            "two organizations",
            made(pki.client("two", "two", &["dev", "ops"])),
            &[],
            Some("two"),
        ),
        plain(
            "a UID",
            made(pki.client_with("uid", |params| params.distinguished_name.push(uid, "u-77"))),
            &[],
            Some("uid"),
        ),
        plain(
            "letters beyond ASCII",
            made(pki.client("letters", "zoë", &["größe"])),
            &[],
            Some("zoë"),
        ),
        plain(
            "no usage named",
            made(pki.client_with("any", any_usage)),
            &[],
            Some("any"),
        ),
        plain("expired", made(pki.client_with("expired", expired)), &[], None),
        plain("another authority", made(pki.stranger("stranger", |_| ())), &[], None),
        plain(
            "no client-auth usage",
            made(pki.client_with("server", server_only)),
            &[],
            None,
        ),
        plain(
            "no common name",
            made(pki.client("nameless", "", &["system:masters"])),
            &[],
            None,
        ),
        plain("a token", None, TOKEN, Some("token-user-3")),
        plain("a wrong token", None, WRONG_TOKEN, None),
        plain(
            "a token and a certificate",
            made(pki.client("both", "both", &[])),
            TOKEN,
            Some("both"),
        ),
        plain(
            "a token and an expired certificate",
            made(pki.client_with("late", expired)),
            TOKEN,
            Some("token-user-3"),
        ),
        plain(
            "a token and a stranger's certificate",
            made(pki.stranger("odd", |_| ())),
            TOKEN,
            Some("token-user-3"),
        ),
        plain(
            "a wrong token and a certificate",
            made(pki.client("mixed", "mixed", &[])),
            WRONG_TOKEN,
            Some("mixed"),
        ),
        plain("nobody", None, &[], Some("system:anonymous")),
        plain("nobody, forging", None, FORGED, Some("system:anonymous")),
        plain("a token, forging", None, TOKEN_AND_FORGED, Some("token-user-3")),
        plain(
            "a certificate, forging",
            made(pki.client("forger", "forger", &[])),
            FORGED,
            Some("forger"),
        ),
        plain("a stranger, forging", made(pki.stranger("thief", |_| ())), FORGED, None),
        plain(
            "an address, forged",
            None,
            &[("x-forwarded-for", "192.0.2.9")],
            Some("system:anonymous"),
        ),
        plain(
            "an administrator who impersonates",
            admin,
            &[("impersonate-user", "jane")],
            Some("jane"),
        ),
    ];
    kinds.push(Kind {
        trailers: FORGED,
        ..plain(
            "nobody, forging in trailers",
            None,
            &[("trailer", "x-remote-user")],
            Some("system:anonymous"),
        )
    });
    kinds.push(Kind {
        trailers: FORGED,
        ..plain(
            "a certificate, forging in trailers",
            made(pki.client("sly", "sly", &[])),
            &[],
            Some("sly"),
        )
    });
    // What Go's crypto/x509 takes or refuses, and other libraries do not.
    let v1 = made(pki.client_v1("first", "dev"));
    let needless = made(pki.client("needless", "needless", &["dev"])).inspect(|pair| {
        let chain = [fs::read(&pair.certificate), fs::read(pki.file("ghost-ca.crt"))].map(|file| file.expect("a file"));
        fs::write(&pair.certificate, chain.concat()).expect("the file can be written");
    });
    let ghost = made(Ok(pki.pair("ghost")));
    let proxy = made(Ok(pki.pair("front-proxy-client")));
    const NAMED: Fields<'_> = &[
        ("x-remote-user", "erin"),
        ("x-remote-group", "dev"),
        ("x-auth-group", "ops"),
        ("x-remote-extra-scopes", "some"),
    ];
    const NAMED_WITH_TOKEN: Fields<'_> = &[NAMED[0], NAMED[1], TOKEN[0]];
    const OTHER_GROUPS: Fields<'_> = &[("x-auth-group", "system:masters")];
    const BASIC: Fields<'_> = &[("authorization", "Basic YTpi")];
    const EMPTY: Fields<'_> = &[("authorization", "")];
    let blank_uid = |params: &mut CertificateParams| {
        let uid = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 57683, 2]);
        params.distinguished_name.push(uid, "");
    };
    let latin = |params: &mut CertificateParams| {
        let text =
            rcgen::DnValue::BmpString(rcgen::string::BmpString::try_from("zoë-bmp").expect("it is in the plane"));
        params.distinguished_name.push(DnType::CommonName, text);
    };
    for (name, certificate, headers, user) in [
        ("version 1", v1.clone(), &[][..], Some("first")),
        ("version 1, and a token", v1.clone(), TOKEN, Some("first")),
        ("an expired authority", ghost.clone(), &[], None),
        (
            "an expired authority, and a token",
            ghost.clone(),
            TOKEN,
            Some("token-user-3"),
        ),
        ("an expired authority, and no token", ghost.clone(), BASIC, None),
        (
            "an expired authority, and an empty authorization",
            ghost.clone(),
            EMPTY,
            None,
        ),
        (
            "an expired certificate that is not needed",
            needless.clone(),
            &[],
            Some("needless"),
        ),
        ("an empty UID", made(pki.client_with("blank-uid", blank_uid)), &[], None),
        (
            "a name in another kind of string",
            made(pki.client_with("latin", latin)),
            &[],
            Some("zoë-bmp"),
        ),
        ("a front proxy", proxy.clone(), NAMED, Some("erin")),
        (
            "a front proxy, and a token",
            proxy.clone(),
            NAMED_WITH_TOKEN,
            Some("erin"),
        ),
        ("a proxy of another name", made(pki.proxy("sidecar")), NAMED, None),
        (
            "a certificate, forging under another name",
            made(pki.client("grouped", "grouped", &["dev"])),
            OTHER_GROUPS,
            Some("grouped"),
        ),
    ] {
        kinds.push(plain(name, certificate, headers, user));
    }
    for (name, certificate, headers, user) in [
        ("HTTP/1.1, version 1", v1, &[][..], Some("first")),
        ("HTTP/1.1, an expired authority", ghost, &[], None),
        (
            "HTTP/1.1, an expired certificate that is not needed",
            needless,
            &[],
            Some("needless"),
        ),
        ("HTTP/1.1, a front proxy", proxy, NAMED, Some("erin")),
        (
            "HTTP/1.1, two organizations",
            made(pki.client("old", "old", &["dev", "ops"])),
            &[],
            Some("old"),
        ),
        ("HTTP/1.1, nobody, forging", None, SPELLED, Some("system:anonymous")),
        (
            "HTTP/1.1, a certificate, forging",
            made(pki.client("older", "older", &[])),
            SPELLED,
            Some("older"),
        ),
        ("HTTP/1.1, a stranger", made(pki.stranger("oldest", |_| ())), &[], None),
        ("HTTP/1.1, a token", None, TOKEN, Some("token-user-3")),
    ] {
        kinds.push(Kind {
            http1: true,
            ..plain(name, certificate, headers, user)
        });
    }

    for (index, kind) in kinds.iter().enumerate() {
        let agents = [format!("parity-{index}-direct"), format!("parity-{index}-relay")];
        let direct = review(world, kind, world.apiserver, &agents[0]);
        let relayed = review(world, kind, world.relay, &agents[1]);
        let name = kind.name;
        assert_eq!(direct["code"] == 401, kind.user.is_none(), "{name}: {direct}");
        assert_eq!(relayed["code"], direct["code"], "{name}: {relayed}");
        assert_eq!(relayed["status"], direct["status"], "{name}");

        let (direct, relayed) = (audited(world, &agents[0]), audited(world, &agents[1]));
        let named = match &direct["impersonatedUser"] {
            Value::Null => &direct["user"]["username"],
            impersonated => &impersonated["username"],
        };
        assert_eq!(named.as_str(), kind.user, "{name}: {direct}");
        for part in ["user", "impersonatedUser", "responseStatus", "verb", "requestURI"] {
            assert_eq!(relayed[part], direct[part], "{name}: the audit log's {part}");
        }
        // The relay's own address comes last, as any proxy's does; the client's place is the same.
        let mut sources = direct["sourceIPs"].as_array().expect("addresses").clone();
        assert!(sources.contains(&"127.0.0.9".into()), "{name}: {sources:?}");
        sources.push("127.0.0.1".into());
        assert_eq!(
            relayed["sourceIPs"],
            Value::Array(sources),
            "{name}: the audit log's addresses"
        );
    }
}

/// Directly an authenticator says no; here it never gets so far. The audit log knows only the first.
#[test]
fn a_front_proxy_that_names_nobody_is_nobody() {
    let Some(world) = World::get() else { return };
    for server in [world.apiserver, world.relay] {
        let kind = Kind {
            name: "a front proxy that names nobody",
            certificate: Some(world.pki.pair("front-proxy-client")),
            headers: &[("x-remote-group", "system:masters")],
            trailers: &[],
            http1: true,
            user: None,
        };
        assert_eq!(review(world, &kind, server, "nameless-proxy")["code"], 401, "{server}");
    }
}

#[test]
fn flags_that_are_not_the_apiservers_are_refused_at_start() {
    let Some(world) = World::get() else { return };
    let said = |text: &str| {
        wait_for(PATIENCE, || {
            fs::read_to_string(world.logs.join("relay.log"))
                .ok()?
                .contains(text)
                .then_some(())
        })
    };
    said("extension-apiserver-authentication cannot be read").expect("a user without rights cannot read it");
    let admin =
        Kubectl::new(&world.pki, world.apiserver, &Who::Certificate(world.pki.pair("admin"))).expect("a kubeconfig");
    let bound = admin
        .run(&[
            "create",
            "rolebinding",
            "-n",
            "kube-system",
            "rebalancer-relay",
            "--role=extension-apiserver-authentication-reader",
            "--user=rebalancer-relay",
        ])
        .expect("kubectl runs");
    assert!(bound.is_ok(), "{bound:?}");
    let proxies = world.pki.file("front-proxy-ca.crt");
    let as_theirs = "--requestheader-group-headers=X-Remote-Group,X-Auth-Group".to_owned();
    for (name, flags, expected) in [
        ("names", vec![], "the apiserver also believes `X-Auth-Group`"),
        (
            "anybody",
            vec![
                as_theirs.clone(),
                format!("--requestheader-client-ca-file={}", proxies.display()),
            ],
            "--requestheader-allowed-names",
        ),
        (
            "authority",
            vec![as_theirs, format!("--client-ca={}", proxies.display())],
            "the apiserver does not believe the authority `front-proxy-ca`",
        ),
    ] {
        let mut relay = Command::new(binary());
        relay
            .args(["relay", "--listen=127.0.0.1:6543", "--upstream=127.0.0.1:6444"])
            .args(
                world
                    .pki
                    .relay_flags_without(if name == "authority" { "--client-ca" } else { "" }),
            )
            .args(flags)
            .arg(format!("--control=unix:{}", world.logs.join("other.sock").display()));
        // It reads what a user without rights may not until the binding is known.
        let mut found = None;
        let refused = wait_for(PATIENCE, || {
            let mut process = Process::start(name, clone(&relay), None, &world.logs).expect("the relay starts");
            let ended = wait_for(Duration::from_secs(2), || process.is_running().is_err().then_some(()));
            found = Some(process.log());
            process.kill();
            ended
        });
        let log = found.unwrap_or_default();
        assert!(refused.is_some() && log.contains(expected), "{name}: {log}");
    }
}

fn clone(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    copy
}

#[test]
fn a_name_that_no_header_can_carry_is_refused_rather_than_changed() {
    let Some(world) = World::get() else { return };
    for user in [" padded", "padded ", "two\nlines"] {
        let kind = Kind {
            name: user,
            certificate: Some(world.pki.client("unusual", user, &[]).expect("a certificate")),
            headers: &[],
            trailers: &[],
            http1: false,
            user: None,
        };
        let direct = review(world, &kind, world.apiserver, "unusual");
        assert_eq!(
            direct["status"]["userInfo"]["username"], user,
            "directly it names somebody"
        );
        assert_eq!(review(world, &kind, world.relay, "unusual")["code"], 401);
    }
}
