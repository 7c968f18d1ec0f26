//! HTTP/1.1 heads of every kind, judged by Go's net/http server as they came and as the relay passes them on: whatever Go
//! serves behind the relay carries the identity and is the request that came, and nothing that Go refuses is served.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use rebalancer_core::{
    wire::h1::{
        forward::{Stays, pass},
        head::Finder,
    },
    wire::rewrite::Policy,
};
use rebalancer_tests::skip;
use serde::Deserialize;

/// How many heads are judged.
const HEADS: usize = 30_000;

/// What Go's server made of a head (tests/go/heads).
#[derive(Clone, Debug, Deserialize)]
struct Verdict {
    served: bool,
    method: String,
    target: String,
    host: String,
    minor: u8,
    fields: Option<BTreeMap<String, Vec<String>>>,
    length: i64,
    coding: Option<Vec<String>>,
}

/// Heads from which others are made.
const BASES: [&[u8]; 12] = [
    b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Remote-User\r\n\r\n",
    b"PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: a\r\nX-Remote-User: root\r\nx-remote-group: system:masters\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: b\r\nAuthorization: Bearer t\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, X-Remote-User\r\nUpgrade: SPDY/3.1\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: a\r\nLong: one\r\n two\r\n\tthree\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nExpect: 100-continue\r\n\r\n",
    b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\nUser-Agent: kubectl/v1.36\r\n\r\n",
];

/// What is put into them.
const PIECES: [&[u8]; 44] = [
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"\0",
    b"\x0b",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"%",
    b"%zz",
    b"#",
    b"?",
    b"//",
    b"http://b/",
    b"\r\n ",
    b"\r\n\t",
    b" HTTP/1.1",
    b"HTTP/1.2",
    b"HTTP/2.0",
    b"HTTP/1.0",
    b"Host: b\r\n",
    b"Host:\r\n",
    b"Host : a\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: +1\r\n",
    b"Content-Length: 1,1\r\n",
    b"Content-Length: 007\r\n",
    b"Content-Length:\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Transfer-Encoding: Chunked\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n",
    b"Transfer-Encoding: \x0bchunked\r\n",
    b"X-Remote-User: root\r\n",
    b"x_remote_user: root\r\n",
    b"X-Remote-User : root\r\n",
    b" X-Remote-User: root\r\n",
    b"X-Remote-Extra-A: b\r\n",
    b"Connection: close\r\n",
];

/// Numbers that are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// A head with up to four changes: something put in, anywhere or where a line begins, something left out, an octet changed.
fn changed(base: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut head = base.to_vec();
    for _ in 0..numbers.below(5) {
        let at = numbers.below(head.len() + 1);
        let lines: Vec<usize> = (0..head.len())
            .filter(|at| head[*at] == b'\n')
            .map(|at| at + 1)
            .collect();
        let piece = PIECES[numbers.below(PIECES.len())];
        match numbers.below(5) {
            0 => drop(head.splice(at..at, piece.iter().copied())),
            1 | 2 if !lines.is_empty() => {
                let at = lines[numbers.below(lines.len())];
                drop(head.splice(at..at, piece.iter().copied()));
            }
            3 if at < head.len() => {
                head.remove(at);
            }
            _ if at < head.len() => head[at] = numbers.below(256) as u8,
            _ => {}
        }
    }
    head
}

/// Asks Go about each; `None` where there is no Go.
fn judge(heads: &[Vec<u8>]) -> Option<Vec<Verdict>> {
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("go/heads");
    let mut go = Command::new("go")
        .args(["run", "."])
        .current_dir(module)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let mut stdin = go.stdin.take().expect("a pipe");
    let stdout = BufReader::new(go.stdout.take().expect("a pipe"));
    let verdicts = thread::scope(|scope| {
        scope.spawn(move || {
            for head in heads {
                stdin.write_all(&(head.len() as u32).to_be_bytes()).expect("Go reads");
                stdin.write_all(head).expect("Go reads");
            }
        });
        let parse = |line: std::io::Result<String>| serde_json::from_str(&line.expect("a line")).expect("JSON");
        stdout.lines().map(parse).collect()
    });
    assert!(go.wait().expect("Go ends").success());
    Some(verdicts)
}

/// Method, target, host, minor version, length, whether chunked, and fields.
type Same<'v> = (
    &'v str,
    &'v str,
    &'v str,
    u8,
    i64,
    bool,
    BTreeMap<&'v str, Vec<&'v str>>,
);

/// What must be the same of a request, the relay's own changes left out.
fn same(verdict: &Verdict) -> Same<'_> {
    const CHANGED: [&str; 7] = [
        "Connection",
        "Content-Length",
        "Keep-Alive",
        "Proxy-Connection",
        "Te",
        "Trailer",
        "X-Forwarded-For",
    ];
    let fields = verdict.fields.iter().flatten();
    let fields = fields
        .filter(|(name, _)| !CHANGED.contains(&name.as_str()) && !name.to_ascii_lowercase().starts_with("x-remote-"))
        .map(|(name, values)| (name.as_str(), values.iter().map(|value| value.trim()).collect()))
        .collect();
    let chunked = verdict.coding.as_ref().is_some_and(|codings| codings == &["chunked"]);
    let Verdict {
        method,
        target,
        host,
        minor,
        length,
        ..
    } = verdict;
    (method, target, host, *minor, *length, chunked, fields)
}

#[test]
fn whatever_go_serves_is_the_request_that_came_with_its_identity() {
    let policy = Policy::new(Default::default(), IpAddr::from([192, 0, 2, 7]))
        .with_identity([("x-remote-user".into(), "alice".to_owned())]);
    let mut numbers = Numbers(1);
    let (mut came, mut went, mut kinds) = (Vec::new(), Vec::new(), BTreeMap::<String, usize>::new());
    while came.len() < HEADS {
        let octets = changed(BASES[numbers.below(BASES.len())], &mut numbers);
        // What is behind a head is the body's, or the next one's.
        let Some(length) = Finder::default().find(&octets) else {
            *kinds.entry("never whole".to_owned()).or_default() += 1;
            continue;
        };
        let head = octets[..length].to_vec();
        went.push(match pass(&head, &policy) {
            Ok(passed) => Ok(passed.head),
            Err(Stays::Malformed(error)) => Err(error.to_string()),
            Err(Stays::Nobody) => panic!("alice is somebody"),
        });
        came.push(head);
    }
    let passed: Vec<Vec<u8>> = went.iter().filter_map(|went| went.clone().ok()).collect();
    let (Some(directly), Some(behind)) = (judge(&came), judge(&passed)) else {
        return skip("there is no `go` on PATH to judge heads with");
    };
    assert_eq!((directly.len(), behind.len()), (came.len(), passed.len()));
    let mut behind = behind.iter();
    let mut differences = Vec::new();
    for ((came, went), directly) in came.iter().zip(&went).zip(&directly) {
        let kind = match went {
            Err(error) if directly.served => format!("Go serves it, the relay does not: {error}"),
            Err(_) => "refused by both".to_owned(),
            Ok(went) => {
                let behind = behind.next().expect("one for each that passed");
                let fields = behind.fields.as_ref();
                let named = |name: &str| fields.and_then(|fields| fields.get(name)).cloned().unwrap_or_default();
                let identities = fields.into_iter().flatten();
                let identities = identities.filter(|(name, _)| name.to_ascii_lowercase().starts_with("x-remote-"));
                let identity_is_right = named("X-Remote-User") == ["alice"]
                    && identities.count() == 1
                    && named("X-Forwarded-For").len() == 1;
                let kind = match (directly.served, behind.served) {
                    (true, true) if identity_is_right && same(directly) == same(behind) => "served alike",
                    (true, true) if identity_is_right => "another request",
                    (_, true) if !identity_is_right => "without its identity",
                    (false, true) => "served behind the relay alone",
                    (true, false) => "served directly alone",
                    (false, false) => "refused by Go both times",
                    (true, true) => unreachable!("seen above"),
                };
                if !matches!(kind, "served alike" | "refused by Go both times") {
                    let text = |octets: &[u8]| octets.escape_ascii().to_string();
                    differences.push(format!(
                        "{kind}: {}\n -> {}\n {directly:?}\n {behind:?}",
                        text(came),
                        text(went)
                    ));
                }
                kind.to_owned()
            }
        };
        *kinds.entry(kind).or_default() += 1;
    }
    println!("{HEADS} heads judged by Go as they came and as they go on: {kinds:#?}");
    let shown = differences.iter().take(10).cloned().collect::<Vec<_>>();
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        shown.join("\n")
    );
    assert!(kinds["served alike"] > HEADS / 10, "{kinds:?}");
}
