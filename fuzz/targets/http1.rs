//! Heads of HTTP/1.1 requests: what goes on of one is a head that reads back as the same request with one identity; where a
//! head ends does not depend on how it arrives. `cargo xtask test relay` has Go's own server judge the same.
#![no_main]

use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use rebalancer_core::{
    wire::h1::{
        body::{Body, Passing},
        forward::pass,
        head::{AnswerHead, Finder, RequestHead},
    },
    wire::rewrite::Policy,
};

fuzz_target!(|data: &[u8]| {
    let found = Finder::default().find(data);
    let mut slow = Finder::default();
    let first = (0..=data.len()).find_map(|end| slow.find(&data[..end]));
    assert_eq!(first, found, "how it arrives changes nothing");
    let Some(length) = found else { return };
    let (head, rest) = data.split_at(length);
    // An answer is read by the same rules.
    if let Ok(answer) = AnswerHead::parse(head) {
        let mut closing = Vec::new();
        answer.write_closing(&mut closing);
        let again = AnswerHead::parse(&closing).expect("it is still an answer");
        assert!(again.closes());
        assert_eq!(again.status, answer.status);
        assert_eq!(again.framing(false), answer.framing(false));
    }
    let policy = Policy::new(Default::default(), IpAddr::from([192, 0, 2, 7]))
        .with_identity([("x-remote-user".into(), "alice".to_owned())]);
    let Ok(passed) = pass(head, &policy) else { return };
    assert_eq!(
        Finder::default().find(&passed.head),
        Some(passed.head.len()),
        "it is one head"
    );
    let came = RequestHead::parse(head).expect("it passed");
    let went = RequestHead::parse(&passed.head).expect("a head goes on");
    assert_eq!(
        (went.method, went.target, went.minor),
        (came.method, came.target, came.minor)
    );
    assert_eq!(went.framing(), Ok(passed.framing));
    assert_eq!(came.framing(), Ok(passed.framing));
    assert_eq!(went.upgrades(), came.upgrades());
    let identities: Vec<_> = went
        .fields
        .iter()
        .filter(|field| field.name.to_ascii_lowercase().starts_with(b"x-remote-"))
        .collect();
    assert_eq!(identities.len(), 1);
    assert!(identities[0].is("x-remote-user") && &*identities[0].value == b"alice");
    assert_eq!(went.values("x-forwarded-for").count(), 1);
    // The body: what is taken goes on as a body of the same kind, however it is cut.
    let mut whole = (Body::new(passed.framing, Passing::Bare), Vec::new());
    let taken = whole.0.take(rest, &mut whole.1);
    let mut parts = (Body::new(passed.framing, Passing::Bare), Vec::new());
    let mut counted = Ok(0);
    for octet in rest {
        match parts.0.take(&[*octet], &mut parts.1) {
            Ok(0) => break,
            Ok(count) => counted = counted.map(|counted| counted + count),
            Err(error) => counted = Err(error),
        }
        if counted.is_err() {
            break;
        }
    }
    assert_eq!(taken, counted);
    if let Ok(taken) = taken {
        assert_eq!(whole, parts);
        let mut again = (Body::new(passed.framing, Passing::Bare), Vec::new());
        assert_eq!(again.0.take(&whole.1, &mut again.1), Ok(whole.1.len()), "{taken}");
        assert_eq!(again.1, whole.1, "a bare body stays as it is");
    }
});
