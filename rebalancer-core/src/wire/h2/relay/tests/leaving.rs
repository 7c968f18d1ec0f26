//! GOAWAY in two phases, and everything that comes between or behind them.

use super::*;

#[test]
fn a_goaway_of_the_servers_between_the_relays_two_is_not_raised() {
    let goaway = |last: u32| frame(kind::GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat());
    let (mut relay, mut out) = started();
    let both = [request(1, &first_block("/a")), request(3, &AGAIN)].concat();
    relay.client_bytes(&both, &mut out).expect("requests");
    relay.go_away(&mut out);
    relay.server_bytes(&goaway(1), &mut out).expect("a GOAWAY");
    out = Output::default();
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    assert_eq!(told(&mut out), [(kind::GOAWAY, 0, 1)]);
    assert_eq!(relay.drain(), Drain::Final { last: 1 });
    relay
        .server_bytes(&frame(kind::DATA, flag::END_STREAM, 1, b""), &mut out)
        .expect("an answer");
    assert!(relay.is_finished(), "stream 3 was given up by everybody");

    let (mut relay, mut out) = started();
    relay.client_bytes(&both, &mut out).expect("requests");
    relay.server_bytes(&goaway(1), &mut out).expect("a GOAWAY");
    out = Output::default();
    relay.fail(ConnectionError::protocol("x"), &mut out);
    assert_eq!(told(&mut out)[0].2, 1, "last words raise nothing either");
}

#[test]
fn goaway_has_two_phases_and_no_request_is_lost_between_them() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    assert!(relay.go_away(&mut out));
    assert!(!relay.go_away(&mut out), "once is enough");
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!(told.len(), 2);
    assert_eq!(
        (told[0].0.kind, &told[0].1[..4]),
        (kind::GOAWAY, &MAX_STREAM_ID.to_be_bytes()[..])
    );
    assert_eq!((told[1].0.kind, &told[1].1[..]), (kind::PING, &PING[..]));

    // A request that crossed the GOAWAY on the wire is served; the client's answer to the PING stays here.
    let crossed = [request(3, &AGAIN), frame(kind::PING, flag::ACK, 0, &PING)].concat();
    relay.client_bytes(&crossed, &mut out).expect("a crossed request");
    assert_eq!(relay.drain(), Drain::Final { last: 3 });
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!(told.len(), 1);
    assert_eq!(
        (told[0].0.kind, &told[0].1[..4]),
        (kind::GOAWAY, &3_u32.to_be_bytes()[..])
    );
    assert_eq!(decoded(&std::mem::take(&mut out.to_server), &mut server).len(), 2);

    // A later one is refused so that the client may send it elsewhere, and gets its window back.
    let late = [
        frame(kind::HEADERS, flag::END_HEADERS, 5, &first_block("/late")),
        frame(kind::DATA, flag::END_STREAM, 5, b"body"),
    ];
    relay.client_bytes(&late.concat(), &mut out).expect("a late request");
    assert!(out.to_server.is_empty());
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!((told[0].0.kind, told[0].0.stream), (kind::RST_STREAM, 5));
    assert_eq!(
        (told[1].0.kind, &told[1].1[..]),
        (kind::WINDOW_UPDATE, &4_u32.to_be_bytes()[..])
    );

    assert!(!relay.is_finished());
    for stream in [1, 3] {
        relay
            .server_bytes(&frame(kind::DATA, flag::END_STREAM, stream, b""), &mut out)
            .expect("an answer");
    }
    assert!(relay.is_finished());
}

#[test]
fn a_draining_connections_watches_end_between_events_and_windows_are_given_back() {
    let mut relay = Relay::new(Settings {
        watch_handover: true,
        ..settings()
    });
    let mut out = Output::default();
    let begin = frame(kind::SETTINGS, 0, 0, &[]);
    relay
        .client_bytes(&[&PREFACE[..], &begin].concat(), &mut out)
        .expect("a preface");
    relay.server_bytes(&begin, &mut out).expect("settings");
    let both = [
        request(1, &first_block("/api/v1/pods?watch=true&resourceVersion=5")),
        request(3, &first_block("/a")),
    ]
    .concat();
    relay.client_bytes(&both, &mut out).expect("requests");
    let mut answer = vec![0x88];
    hpack::write_literal(b"content-type", b"application/json", &mut answer);
    let answered = frame(kind::HEADERS, flag::END_HEADERS, 1, &answer);
    let event = frame(kind::DATA, 0, 1, b"{}\n");
    relay
        .server_bytes(&[&answered[..], &event, &event[..11]].concat(), &mut out)
        .expect("one event and half of another");
    relay.hand_over(1, &mut out);
    relay.go_away(&mut out);
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    relay.hand_over(1, &mut out);
    out = Output::default();
    assert_eq!(relay.open_watches(), 1, "it stands inside an event");

    // The client is inside a frame of its own when the event ends: the server's RST_STREAM waits for its rest.
    let window = frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 9]);
    relay.client_bytes(&window[..10], &mut out).expect("half a frame");
    relay
        .server_bytes(&event[11..], &mut out)
        .expect("the rest of the event");
    assert_eq!(out.to_server, window[..10]);
    relay
        .client_bytes(&window[10..], &mut out)
        .expect("the rest of the frame");
    let reset = frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 8]);
    assert_eq!(out.to_server, [window, reset].concat());
    let told = frames(&out.to_client[1..]);
    let last = &told.last().expect("the end of the watch").0;
    assert_eq!(
        (last.kind, last.flags, last.stream, last.length),
        (kind::DATA, flag::END_STREAM, 1, 0)
    );
    assert_eq!((relay.open_streams(), relay.open_watches()), (1, 0));
    assert!(!relay.is_finished());

    // What the server had sent by then stays here, and its window goes back.
    out = Output::default();
    let answered = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 3, &[0x88]);
    relay
        .server_bytes(&[&event[..], &answered].concat(), &mut out)
        .expect("a late event");
    assert_eq!(out.to_client, answered);
    assert_eq!(out.to_server, frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 3]));
    assert!(relay.is_finished());

    // Trailers of the ended watch: the client has seen its end, and its table needs nothing of them.
    out = Output::default();
    let mut trailers = Vec::new();
    hpack::write_literal(b"late", b"1", &mut trailers);
    let last = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &trailers);
    relay.server_bytes(&last, &mut out).expect("late trailers");
    assert!(out.to_client.is_empty() && relay.is_finished());
}

#[test]
fn a_client_that_never_answers_hears_the_last_goaway_all_the_same() {
    let (mut relay, mut out) = started();
    relay.conclude(&mut out);
    assert!(out.to_client.is_empty(), "nothing was announced");
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    relay.go_away(&mut out);
    out = Output::default();
    relay.conclude(&mut out);
    assert_eq!(relay.drain(), Drain::Final { last: 1 });
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!(told[0].1[..4], 1_u32.to_be_bytes());
    // Its answer comes late, and is no business of the server's.
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    assert!(out.to_client.is_empty() && out.to_server.is_empty());
}

#[test]
fn the_relays_frames_wait_for_a_place_between_the_servers() {
    let mut fresh = relay();
    let mut out = Output::default();
    assert!(fresh.go_away(&mut out));
    assert!(out.to_client.is_empty(), "SETTINGS come first");

    let (mut relay, mut out) = started();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    let head = frame(kind::HEADERS, 0, 1, &[0x88]);
    let tail = frame(kind::CONTINUATION, flag::END_HEADERS, 1, &[0x88]);
    let data = frame(kind::DATA, 0, 1, b"abcdef");
    relay.server_bytes(&head, &mut out).expect("half a block");
    relay.go_away(&mut out);
    assert_eq!(out.to_client, head);
    relay.server_bytes(&tail[..10], &mut out).expect("the other half");
    relay.server_bytes(&data[..11], &mut out).expect("half a frame");
    let kinds: Vec<u8> = {
        relay.server_bytes(&data[11..], &mut out).expect("the rest");
        frames(&out.to_client).iter().map(|(header, _)| header.kind).collect()
    };
    assert_eq!(
        kinds,
        [kind::HEADERS, kind::CONTINUATION, kind::GOAWAY, kind::PING, kind::DATA]
    );
}

#[test]
fn the_servers_own_goaway_passes_but_never_raises_what_was_said() {
    let goaway = |last: u32| frame(kind::GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat());
    let (mut relay, mut out) = started();
    relay.server_bytes(&goaway(9), &mut out).expect("a GOAWAY");
    assert_eq!((relay.drain(), &out.to_client), (Drain::ByServer, &goaway(9)));
    assert!(!relay.go_away(&mut out), "the client is leaving already");

    let (mut relay, mut out) = started();
    relay.go_away(&mut out);
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    out.to_client.clear();
    relay.server_bytes(&goaway(MAX_STREAM_ID), &mut out).expect("a GOAWAY");
    assert_eq!(out.to_client, goaway(0));
}
