//! `--metrics`, scraped from a relay that runs: what docs/relay.md names is there, it counts what happened, and no client
//! chooses a label.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, block, frame, get, kind},
    process::wait_for,
};

use crate::world::{OK, RELAY, World};

const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9471);

fn scrape() -> Option<String> {
    let mut socket = TcpStream::connect(METRICS).ok()?;
    socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert!(body.ends_with("# EOF\n"), "OpenMetrics ends so: {body}");
    Some(body.to_owned())
}

/// The value of a line that begins with that.
fn value(text: &str, line: &str) -> Option<f64> {
    let line = text
        .lines()
        .find_map(|found| found.strip_prefix(line)?.strip_prefix(' '))?;
    line.parse().ok()
}

/// The names in the table of docs/relay.md, without their labels.
fn documented() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/relay.md");
    let text = std::fs::read_to_string(path).expect("the page");
    let (_, table) = text.split_once("| metric (`rebalancer_relay_...`)").expect("the table");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells = rows.filter_map(|row| row.split('|').nth(1));
    cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .map(|name| name.split('{').next().unwrap_or(name).to_owned())
        .collect()
}

#[test]
fn what_happened_is_counted_by_the_names_the_page_gives_and_no_client_chooses_a_label() {
    let world = World::start(&["--metrics=127.0.0.1:9471"]);
    let alice = world
        .pki
        .client("alice-in-labels", "alice-in-labels", &[])
        .expect("a certificate");
    let (mut client, mut server) = world.open(Some(&alice));
    let list = [get("/path-in-labels"), block(&[("user-agent", "agent-in-labels")])].concat();
    client.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &list));
    server.expect(kind::HEADERS);
    server.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &OK));
    client.expect(kind::HEADERS);
    // What is no TLS.
    let mut other = TcpStream::connect(RELAY).expect("the port is open");
    other.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("room");
    other.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    // A reset is an end too.
    let _ = other.read_to_end(&mut Vec::new());
    assert_eq!(world.go_away(client.local()), "sent");
    client.expect(kind::GOAWAY);

    let expected = [
        (r#"connections{protocol="h2",state="draining"}"#, 1.0),
        (r#"places{kind="certificate"}"#, 1.0),
        (r#"handshakes_total{result="ok"}"#, 1.0),
        (r#"handshakes_total{result="failed"}"#, 1.0),
        (r#"rejections_total{cause="tls"}"#, 1.0),
        ("requests_total", 1.0),
        (r#"drains_total{event="told"}"#, 1.0),
        (r#"drains_total{event="ended"}"#, 0.0),
        (r#"upstream{state="ready"}"#, 1.0),
    ];
    let right = |text: &str| {
        let is = |(name, wanted): &(&str, f64)| value(text, &format!("rebalancer_relay_{name}")) == Some(*wanted);
        expected.iter().all(is)
    };
    let text = wait_for(PATIENCE, || scrape().filter(|text| right(text)));
    let text = text.unwrap_or_else(|| panic!("expected {expected:?} of {:?}", scrape()));
    for name in documented() {
        let line = format!("rebalancer_relay_{name}");
        assert!(text.contains(&line), "the page names {line}:\n{text}");
    }
    assert!(text.contains("rebalancer_build_info{version="));
    assert!(documented().len() > 10, "the page's table was read");
    assert!(!text.contains("in-labels") && !text.contains("127.0.0.1"), "{text}");
    let bytes = value(&text, "rebalancer_relay_received_bytes_total").expect("a figure");
    assert!(bytes > 50.0, "{bytes} octets");
    let expiry = r#"rebalancer_relay_certificate_expiry_timestamp_seconds{file="--tls-cert"}"#;
    assert!(value(&text, expiry) > Some(1e9), "{text}");
}
