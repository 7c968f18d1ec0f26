//! What stands behind is told of each end as it is, and before the client.

use std::{net::IpAddr, net::SocketAddr, sync::Mutex};

use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};

use super::*;
use crate::relay::registry::Registry;

/// What was said of the apiserver's end.
#[derive(Default)]
struct Told(Mutex<Vec<&'static str>>);

impl Told {
    fn say(&self, what: &'static str) {
        self.0.lock().expect("nobody panics").push(what);
    }

    fn all(&self) -> Vec<&'static str> {
        self.0.lock().expect("nobody panics").clone()
    }
}

impl Behind for Told {
    fn leaves(&self) {
        self.say("leaves");
    }

    async fn breaks(&self) {
        self.say("breaks");
    }
}

impl Renews<DuplexStream> for Told {
    async fn renewed(&self, _: &Connection) -> Option<DuplexStream> {
        None
    }
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const WHOLE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// A client that asks once, an apiserver that answers this to it and ends: what was told.
async fn told_of(answer: &[u8]) -> Vec<&'static str> {
    let registry = Registry::new("test".to_owned());
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let connection = registry.open(1, nowhere, nowhere);
    let (mut client, client_side) = duplex(1 << 16);
    let (mut server, server_side) = duplex(1 << 16);
    let told = Told::default();
    let settings = Settings {
        policy: Policy::new(Arc::default(), IpAddr::from([192, 0, 2, 7])),
        connection: &connection,
        max_header_bytes: 1 << 16,
        idle: IDLE,
    };
    let relay = run(client_side, REQUEST.to_vec(), server_side, settings, &told);
    let apiserver = async {
        let mut asked = vec![0; 4096];
        assert!(server.read(&mut asked).await.expect("a request") > 0);
        server.write_all(answer).await.expect("an answer");
        let mut read = vec![0; answer.len()];
        client.read_exact(&mut read).await.expect("the answer");
        let before = told.all();
        drop(server);
        let mut rest = Vec::new();
        // The end of the connection, whichever way.
        let _ = client.read_to_end(&mut rest).await;
        drop(client);
        before
    };
    let (end, before) = tokio::join!(relay, apiserver);
    assert!(matches!(end, End::Server | End::ServerIo(_)), "{end:?}");
    let mut all = told.all();
    if !before.is_empty() {
        all.insert(0, "before the answer:");
    }
    all
}

#[tokio::test]
async fn an_idle_connection_that_ends_keeps_nobody_waiting() {
    assert_eq!(told_of(WHOLE).await, ["leaves"]);
}

#[tokio::test]
async fn one_that_breaks_in_an_answer_is_looked_at_until_it_is_known_why() {
    assert_eq!(
        told_of(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhal").await,
        ["breaks"]
    );
}

#[tokio::test]
async fn whoever_reads_that_an_answer_is_the_last_reads_it_after_the_look() {
    let last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(told_of(last).await, ["before the answer:", "leaves", "leaves"]);
}
