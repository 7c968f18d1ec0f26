//! What answers say of flows, and what each flow comes to.

use super::*;
use crate::wire::{
    flow::{Figures, Flow, LEVEL, SCHEMA},
    h2::hpack::write_literal,
};

fn uid(number: u8) -> String {
    format!("0000000{number}-0000-4000-8000-000000000000")
}

fn flow(number: u8) -> Flow {
    let uid = uid(number);
    Flow::of(Some(uid.as_bytes()), Some(uid.as_bytes())).expect("a UID")
}

fn head(status: &str, flow: Option<u8>, more: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    write_literal(b":status", status.as_bytes(), &mut block);
    if let Some(number) = flow {
        for name in [SCHEMA, LEVEL] {
            write_literal(name.as_bytes(), uid(number).as_bytes(), &mut block);
        }
    }
    for (name, value) in more {
        write_literal(name.as_bytes(), value.as_bytes(), &mut block);
    }
    block
}

fn figures(requests: u64, octets: u64, refused: u64, open: u32) -> Figures {
    Figures {
        requests,
        octets,
        refused,
        open,
        watches: 0,
    }
}

fn shown(relay: &mut Relay) -> Vec<(Option<Flow>, Figures)> {
    let flows = relay.take_flows().expect("something has changed");
    flows.iter().map(|(flow, figures)| (flow, *figures)).collect()
}

fn asked(streams: u32) -> (Relay, Output) {
    let (mut relay, mut out) = started();
    for index in 0..streams {
        let block = if index == 0 {
            first_block("/api")
        } else {
            AGAIN.to_vec()
        };
        let flags = flag::END_HEADERS | flag::END_STREAM;
        let request = frame(kind::HEADERS, flags, 2 * index + 1, &block);
        relay.client_bytes(&request, &mut out).expect("a request");
    }
    (relay, out)
}

#[test]
fn requests_octets_and_refusals_count_for_the_flow_their_answer_names() {
    let (mut relay, mut out) = asked(4);
    assert_eq!(shown(&mut relay), [(None, figures(0, 0, 0, 4))], "they wait");
    assert!(relay.take_flows().is_none());
    let end = flag::END_HEADERS | flag::END_STREAM;
    let early = frame(kind::HEADERS, flag::END_HEADERS, 1, &head("103", Some(9), &[]));
    let answers = [
        early,
        frame(kind::HEADERS, flag::END_HEADERS, 1, &head("200", Some(1), &[])),
        frame(kind::DATA, 0, 1, &[0; 70]),
        frame(
            kind::HEADERS,
            flag::END_HEADERS,
            3,
            &head("429", Some(1), &[("retry-after", "1")]),
        ),
        frame(kind::DATA, flag::END_STREAM, 3, &[0; 5]),
        frame(kind::HEADERS, end, 5, &head("404", Some(2), &[])),
        frame(kind::DATA, 0, 1, &[0; 30]),
    ];
    // However it is cut.
    for octet in answers.concat() {
        relay.server_bytes(&[octet], &mut out).expect("frames");
    }
    assert_eq!(
        shown(&mut relay),
        [
            (None, figures(0, 0, 0, 1)),
            (Some(flow(1)), figures(2, 105, 1, 1)),
            (Some(flow(2)), figures(1, 0, 0, 0)),
        ]
    );
    // Trailers are no answer; a stream that the client resets is over.
    let trailers = frame(kind::HEADERS, end, 1, &{
        let mut block = Vec::new();
        write_literal(SCHEMA.as_bytes(), uid(3).as_bytes(), &mut block);
        block
    });
    relay.server_bytes(&trailers, &mut out).expect("trailers");
    relay
        .client_bytes(&frame(kind::RST_STREAM, 0, 7, &8_u32.to_be_bytes()), &mut out)
        .expect("a reset");
    let open: u32 = shown(&mut relay).iter().map(|(_, figures)| figures.open).sum();
    assert_eq!((open, relay.open_streams()), (0, 0));
}

proptest! {
    #[test]
    fn as_many_are_open_by_flow_as_are_open(steps in proptest::collection::vec((0_u8..6, 0_u32..8, 0_u8..40), 0..60)) {
        let (mut relay, mut out) = asked(8);
        for (what, stream, number) in steps {
            let stream = 2 * stream + 1;
            let end = flag::END_HEADERS | flag::END_STREAM;
            let flow = (number % 10 != 0).then_some(number % 10);
            let octets = match what {
                0 => frame(kind::HEADERS, flag::END_HEADERS, stream, &head("200", flow, &[])),
                1 => frame(kind::HEADERS, end, stream, &head("503", flow, &[("retry-after", "1")])),
                2 => frame(kind::DATA, 0, stream, &[0; 9]),
                3 => frame(kind::DATA, flag::END_STREAM, stream, b"end"),
                4 => frame(kind::RST_STREAM, 0, stream, &8_u32.to_be_bytes()),
                _ => frame(kind::GOAWAY, 0, 0, &[stream.to_be_bytes(), [0; 4]].concat()),
            };
            relay.server_bytes(&octets, &mut out).expect("frames");
            let open: u32 = relay.streams.flows().iter().map(|(_, figures)| figures.open).sum();
            prop_assert_eq!(open, relay.open_streams());
        }
    }
}
