//! What becomes of header blocks: requests with the identity, trailers, and what is neither.

use super::*;

#[test]
fn requests_pass_with_identity_and_address_and_keep_the_tables_equal() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    let both = [request(1, &first_block("/api/v1/a?watch=true")), request(3, &AGAIN)].concat();
    relay.client_bytes(&both, &mut out).expect("requests");
    let expected = pairs(&[
        (":path", "/api/v1/a?watch=true"),
        ("accept", "json"),
        ("x-forwarded-for", "192.0.2.7"),
        ("x-remote-user", "alice"),
    ]);
    assert_eq!(
        decoded(&out.to_server, &mut server),
        [(1, expected.clone()), (3, expected)]
    );
    assert_eq!(
        (relay.requests(), relay.open_streams(), relay.open_watches()),
        (2, 2, 2)
    );
    let ended = frame(kind::DATA, flag::END_STREAM, 1, b"x");
    relay.server_bytes(&ended, &mut out).expect("data");
    assert_eq!(out.to_client, ended);
    assert_eq!((relay.open_streams(), relay.open_watches()), (1, 1));
}

#[test]
fn a_forged_identity_is_removed_and_later_references_still_mean_the_same() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    let mut forged = first_block("/a");
    // Indexed, so that the next request could refer to it as well.
    forged.extend_from_slice(&[0x40, 13]);
    forged.extend_from_slice(b"x-remote-user");
    forged.extend_from_slice(&[4]);
    forged.extend_from_slice(b"root");
    relay.client_bytes(&request(1, &forged), &mut out).expect("a request");
    let later = [0x82, 0x87, 0xc0, 0xbf, 0xbe];
    relay.client_bytes(&request(3, &later), &mut out).expect("a request");
    let expected = pairs(&[
        (":path", "/a"),
        ("accept", "json"),
        ("x-forwarded-for", "192.0.2.7"),
        ("x-remote-user", "alice"),
    ]);
    assert_eq!(
        decoded(&out.to_server, &mut server),
        [(1, expected.clone()), (3, expected)]
    );
}

#[test]
fn a_request_without_a_token_is_given_one_and_another_keeps_its_own() {
    let mut out = Output::default();
    let mut relay = Relay::new(Settings {
        policy: Policy::new(Arc::default(), IpAddr::from([192, 0, 2, 7]))
            .with_authorization_unless_token("Bearer none"),
        ..settings()
    });
    relay.client_bytes(PREFACE, &mut out).expect("a preface");
    out.to_server.clear();
    let mut own = vec![0x82, 0x84, 0x87];
    hpack::write_literal(b"authorization", b"Bearer own", &mut own);
    let mut other = vec![0x82, 0x84, 0x87];
    hpack::write_literal(b"authorization", b"x", &mut other);
    let all = [request(1, &[0x82, 0x84, 0x87]), request(3, &own), request(5, &other)];
    relay.client_bytes(&all.concat(), &mut out).expect("requests");
    let values: Vec<_> = decoded(&out.to_server, &mut Decoder::default())
        .into_iter()
        .map(|(_, fields)| {
            let values = fields.into_iter().filter(|(name, _)| name == "authorization");
            values.map(|(_, value)| value).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(values, [["Bearer none"], ["Bearer own"], ["Bearer none"]]);
}

#[test]
fn a_malformed_request_is_reset_here_and_its_stream_is_used_up() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    let mut malformed = first_block("/a");
    malformed.extend_from_slice(&[0x40, 3]);
    malformed.extend_from_slice(b"Bad");
    malformed.extend_from_slice(&[1, b'x']);
    let body = frame(kind::DATA, 0, 3, b"body");
    let window = frame(kind::WINDOW_UPDATE, 0, 3, &[0, 0, 0, 1]);
    let bad = frame(kind::HEADERS, flag::END_HEADERS, 3, &malformed);
    relay
        .client_bytes(&[&bad[..], &body, &window].concat(), &mut out)
        .expect("a stream error");
    assert!(
        out.to_server.is_empty(),
        "the server hears nothing that it could forget"
    );
    assert_eq!(
        told(&mut out),
        [
            (kind::RST_STREAM, 3, ErrorCode::ProtocolError as u32),
            (kind::WINDOW_UPDATE, 0, 4)
        ]
    );
    assert_eq!((relay.requests(), relay.open_streams()), (0, 0));
    // Later references still mean the same, although the server never saw the block they refer to.
    relay
        .client_bytes(&request(5, &[0x82, 0x87, 0xc0, 0xbf]), &mut out)
        .expect("a request");
    let expected = pairs(&[
        (":path", "/a"),
        ("accept", "json"),
        ("x-forwarded-for", "192.0.2.7"),
        ("x-remote-user", "alice"),
    ]);
    assert_eq!(
        decoded(&std::mem::take(&mut out.to_server), &mut server),
        [(5, expected)]
    );
    // The id again, as a request: for the server it would be a new one.
    let error = relay.client_bytes(&request(3, &first_block("/smuggled")), &mut out);
    assert_eq!(error.expect_err("a used stream").code, ErrorCode::ProtocolError);
    assert!(out.to_server.is_empty());
}

#[test]
fn the_highest_stream_used_up_leaves_no_request_that_could_pass_as_trailers() {
    let (mut relay, mut out) = started();
    let highest = frame(
        kind::HEADERS,
        flag::END_HEADERS,
        MAX_STREAM_ID,
        &[0x82, 0x40, 1, b'B', 1, b'x'],
    );
    relay.client_bytes(&highest, &mut out).expect("a stream error");
    relay
        .client_bytes(&request(1, &first_block("/unmarked")), &mut out)
        .expect_err("a lower stream");
    assert!(out.to_server.is_empty());
    relay.fail(ConnectionError::protocol("x"), &mut out);
    let last = told(&mut out).pop().expect("a GOAWAY");
    assert_eq!((last.0, last.2), (kind::GOAWAY, 0), "the server has served none");
}

#[test]
fn trailers_are_those_of_an_open_stream_that_end_it_and_nothing_else() {
    let open = frame(kind::HEADERS, flag::END_HEADERS, 1, &first_block("/a"));
    let trailers = |flags: u8, block: &[u8]| frame(kind::HEADERS, flag::END_HEADERS | flags, 1, block);
    let mut good = Vec::new();
    hpack::write_literal(b"grpc-status", b"0", &mut good);
    hpack::write_literal(b"x-remote-user", b"root", &mut good);
    hpack::write_literal(b"x-forwarded-for", b"10.9.9.9", &mut good);
    let (mut relay, mut out) = started();
    relay.client_bytes(&open, &mut out).expect("a request");
    relay
        .client_bytes(&trailers(flag::END_STREAM, &good), &mut out)
        .expect("trailers");
    let went = decoded(&out.to_server, &mut Decoder::default());
    assert_eq!(went[1], (1, pairs(&[("grpc-status", "0")])));

    // Another block on it: the client has ended it. The server hears of no field, and resets it as for DATA (STREAM_CLOSED).
    out = Output::default();
    relay
        .client_bytes(&trailers(flag::END_STREAM, &good), &mut out)
        .expect("a stream error");
    assert_eq!(out.to_server, frame(kind::DATA, 0, 1, &[]));
    assert!(
        out.to_client.is_empty(),
        "the server's answer is on its way, and its reset comes after it"
    );
    // And another, after that: it crossed the reset.
    out = Output::default();
    relay
        .client_bytes(&trailers(flag::END_STREAM, &good), &mut out)
        .expect("late trailers");
    assert!(out.to_client.is_empty() && out.to_server.is_empty());
    let answer = frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x88]);
    let both = [answer, frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 5])].concat();
    relay.server_bytes(&both, &mut out).expect("an answer and a reset");
    assert_eq!(out.to_client, both);

    let mut upper = Vec::new();
    hpack::write_literal(b"Upper", b"x", &mut upper);
    for (what, refused) in [
        ("without END_STREAM", trailers(0, &good)),
        ("a request again", trailers(flag::END_STREAM, &[0x82, 0x87, 0x84])),
        ("malformed", trailers(flag::END_STREAM, &upper)),
    ] {
        let (mut relay, mut out) = started();
        relay.client_bytes(&open, &mut out).expect("a request");
        out = Output::default();
        relay.client_bytes(&refused, &mut out).expect("a stream error");
        // RFC 9113, section 6.9: a stream error of type PROTOCOL_ERROR.
        assert_eq!(out.to_server, frame(kind::WINDOW_UPDATE, 0, 1, &[0; 4]), "{what}");
        assert!(out.to_client.is_empty(), "{what}");
        assert_eq!(relay.open_streams(), 0, "{what}");
    }
}

#[test]
fn a_server_that_resets_a_stream_gets_neither_its_trailers_nor_a_request_in_their_place() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    relay
        .client_bytes(
            &frame(kind::HEADERS, flag::END_HEADERS, 1, &first_block("/a")),
            &mut out,
        )
        .expect("a request");
    decoded(&std::mem::take(&mut out.to_server), &mut server);
    relay
        .server_bytes(&frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 1]), &mut out)
        .expect("a reset");
    let mut late = vec![0x40, 1];
    late.extend_from_slice(b"t\x01v");
    relay.client_bytes(&request(1, &late), &mut out).expect("late trailers");
    assert!(out.to_server.is_empty());
    // `t: v` is in the client's table, and not in the server's.
    relay
        .client_bytes(&request(3, &[0x82, 0x87, 0xc0, 0xbe]), &mut out)
        .expect("a request");
    let went = decoded(&std::mem::take(&mut out.to_server), &mut server);
    assert_eq!(went[0].1[..2], pairs(&[(":path", "/a"), ("t", "v")]));
    relay
        .client_bytes(&request(1, &[0x82, 0x87, 0x84]), &mut out)
        .expect_err("a request on a used stream");
    assert!(out.to_server.is_empty());
}

#[test]
fn a_withdrawn_identity_is_over_with_the_next_block() {
    let (mut relay, mut out) = started();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    out = Output::default();
    relay.withdraw();
    relay.client_bytes(&request(3, &AGAIN), &mut out).expect("a request");
    assert!(
        out.to_server.is_empty(),
        "nothing without identity goes where identity is expected"
    );
    let answer = frames(&out.to_client);
    assert_eq!(answer.len(), 1);
    assert_eq!(
        (answer[0].0.kind, answer[0].0.stream, answer[0].0.flags),
        (kind::HEADERS, 3, 5)
    );
    let list = Decoder::default()
        .decode(&answer[0].1, 64)
        .expect("the client reads it");
    assert_eq!(list.get(b":status"), Some(&b"401"[..]));
    assert_eq!(relay.open_streams(), 1, "what is under way stays");
}

#[test]
fn a_user_agent_is_told_once_and_cut() {
    let (mut relay, mut out) = started();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    assert_eq!(relay.take_user_agent(), None);
    let with = |agent: &[u8]| {
        let mut block = vec![0x82, 0x87, 0x84];
        hpack::write_literal(b"user-agent", agent, &mut block);
        block
    };
    relay
        .client_bytes(&request(3, &with(&[b'a'; 1000])), &mut out)
        .expect("a request");
    assert_eq!(relay.take_user_agent(), Some("a".repeat(256)));
    relay
        .client_bytes(&request(5, &with(b"another")), &mut out)
        .expect("a request");
    assert_eq!(relay.take_user_agent(), None, "the first is kept");
}
