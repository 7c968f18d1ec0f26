//! What the page's server answers, to whom, and for how long.

mod browser;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{super::tests::answers, *};

/// Figures of an agent that was asked once; what else there is must not show.
fn all(names: bool) -> Value {
    let mut answers = answers([150, 100, 50]);
    answers.status["secret"] = json!("192.0.2.99");
    answers.status["hold"] =
        json!({"reason": "unmovable", "message": "the heaviest, alice from 192.0.2.7:1, weighs 9"});
    answers.decisions["decisions"][29]["victims"] = json!([{"client": "192.0.2.8:1", "user": "bob"}]);
    figures(Ok(&answers), names)
}

/// Serves figures, and answers what one request brought back.
async fn exchange(shown: &Shown, request: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = tokio::spawn(serve(listener, router(shown.clone(), SILENCE), SILENCE));
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let request = request.replace("HOST", &address.to_string());
    stream
        .write_all(format!("{request}Connection: close\r\n\r\n").as_bytes())
        .await
        .expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("it answers");
    server.abort();
    answer
}

fn shown(figures: Value) -> (watch::Sender<Value>, Shown) {
    let (sender, newest) = watch::channel(figures);
    let history = VecDeque::from([point(&answers([1, 2, 3]))]);
    let shown = Shown {
        history: Arc::new(Mutex::new(history)),
        newest,
        readers: Arc::default(),
    };
    (sender, shown)
}

#[tokio::test]
async fn the_page_and_its_parts_are_there_and_nothing_takes_an_order() {
    let (_sender, shown) = shown(all(false));
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/figures.json", "application/json"),
    ] {
        let answer = exchange(&shown, &format!("GET {path} HTTP/1.1\r\nHost: HOST\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        assert!(answer.contains(&format!("content-type: {kind}")), "{path}: {answer}");
        assert!(answer.contains("content-security-policy: default-src 'none'"), "{path}");
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            let answer = exchange(
                &shown,
                &format!("{method} {path} HTTP/1.1\r\nHost: HOST\r\nContent-Length: 0\r\n"),
            )
            .await;
            assert!(answer.starts_with("HTTP/1.1 405"), "{method} {path}: {answer}");
        }
    }
    let answer = exchange(&shown, "GET /v1/pause HTTP/1.1\r\nHost: HOST\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    // Nothing of the page comes from elsewhere, and nothing that is said is read as a page.
    let page = include_str!("../page/page.html").to_owned() + include_str!("../page/page.js");
    for never in [
        "http://",
        "https://",
        "innerHTML",
        "<style",
        "onclick",
        "<form",
        "<button",
    ] {
        let is_namespace =
            never == "http://" && page.matches(never).count() == page.matches("http://www.w3.org/2000/svg").count();
        assert!(is_namespace || !page.contains(never), "{never}");
    }
}

#[tokio::test]
async fn only_who_calls_it_by_an_address_is_answered() {
    let (_sender, shown) = shown(all(false));
    for host in ["HOST", "localhost:9472", "LocalHost", "[::1]:9472", "10.0.0.7"] {
        let answer = exchange(&shown, &format!("GET / HTTP/1.1\r\nHost: {host}\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
    }
    for host in [
        "rebind.example",
        "rebind.example:9472",
        "localhost.example",
        "127.0.0.1.example:80",
        "",
    ] {
        let answer = exchange(&shown, &format!("GET /figures.json HTTP/1.1\r\nHost: {host}\r\n")).await;
        assert!(
            !answer.starts_with("HTTP/1.1 200") && !answer.contains("cp-1"),
            "{host}: {answer}"
        );
    }
}

#[tokio::test]
async fn clients_are_named_only_where_it_is_allowed() {
    let (_sender, without) = shown(all(false));
    let answer = exchange(&without, "GET /figures.json HTTP/1.1\r\nHost: HOST\r\n").await;
    assert!(
        answer.contains("\"cp-3\"") && answer.contains("hold number 30"),
        "{answer}"
    );
    for secret in ["192.0.2", "user-", "alice", "bob", "kubelet", "secret"] {
        assert!(!answer.contains(secret), "{secret}: {answer}");
    }
    let (_sender, with) = shown(all(true));
    let answer = exchange(&with, "GET /figures.json HTTP/1.1\r\nHost: HOST\r\n").await;
    for named in ["192.0.2.0:4711", "user-0", "alice"] {
        assert!(answer.contains(named), "{named}: {answer}");
    }
    assert!(!answer.contains("secret"), "{answer}");
}

#[tokio::test]
async fn readers_hear_each_look_and_are_bounded() {
    let (sender, shown) = shown(all(false));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let _server = tokio::spawn(serve(listener, router(shown.clone(), SILENCE), SILENCE));
    let open = async || {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let request = format!("GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut octets = vec![0; 4096];
        let length = stream.read(&mut octets).await.expect("a head");
        (stream, String::from_utf8_lossy(&octets[..length]).into_owned())
    };
    let (mut first, head) = open().await;
    assert!(head.contains("text/event-stream"), "{head}");
    sender.send_modify(|figures| figures["fault"] = json!("nobody answers"));
    let mut heard = String::new();
    while !heard.contains("\"fault\":\"nobody answers\"") {
        let mut octets = [0; 4096];
        let length = first.read(&mut octets).await.expect("an event");
        assert!(length > 0, "{heard}");
        heard += &String::from_utf8_lossy(&octets[..length]);
    }
    let mut others = Vec::new();
    for _ in 1..READERS {
        others.push(open().await);
    }
    assert!(others.iter().all(|(_, head)| head.starts_with("HTTP/1.1 200")));
    let (_, refused) = open().await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert_eq!(shown.readers.load(Relaxed), READERS, "who was refused has no place");
}

#[tokio::test]
async fn who_reads_nothing_and_who_asks_nothing_keeps_no_place() {
    let (sender, shown) = shown(all(false));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let silence = Duration::from_millis(300);
    let _server = tokio::spawn(serve(listener, router(shown.clone(), silence), silence));
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let request = format!("GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut head = [0; 12];
    stream.read_exact(&mut head).await.expect("a head");
    assert_eq!(shown.readers.load(Relaxed), 1);
    // More than sockets hold for somebody who does not read.
    let much = "x".repeat(1 << 20);
    let gone = async {
        while shown.readers.load(Relaxed) > 0 {
            sender.send_modify(|figures| figures["fault"] = json!(much));
            tokio::task::yield_now().await;
            sleep(Duration::from_millis(20)).await;
        }
        // What was on its way comes, and then nothing does: an end, or a reset.
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    };
    timeout(Duration::from_secs(60), gone)
        .await
        .expect("its place is free and its connection closed");

    // Who says nothing has a place for a while, and one too many has none.
    let mut silent = Vec::new();
    for _ in 0..PLACES {
        silent.push(TcpStream::connect(address).await.expect("it listens"));
    }
    let mut refused = TcpStream::connect(address).await.expect("the kernel takes it");
    let end = timeout(Duration::from_secs(60), refused.read(&mut [0; 1]))
        .await
        .expect("an end");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    drop(silent);
    let answered = async {
        loop {
            let mut stream = TcpStream::connect(address).await.expect("it listens");
            let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
            let _ = stream.write_all(request.as_bytes()).await;
            let mut answer = String::new();
            if stream.read_to_string(&mut answer).await.is_ok() && answer.starts_with("HTTP/1.1 200") {
                return;
            }
        }
    };
    timeout(Duration::from_secs(60), answered)
        .await
        .expect("places are free again");
}

#[test]
fn an_hour_is_kept_and_no_more() {
    let history = Mutex::new(VecDeque::new());
    for load in 0..=POINTS as u64 {
        keep(&history, &answers([load, 0, 0]));
    }
    let history = history.lock().expect("nobody failed");
    assert_eq!(history.len(), POINTS);
    assert_eq!(history[0]["loads"]["cp-1"], 1);
    assert_eq!(LOOK.as_secs() * POINTS as u64, 3_600);
}

#[test]
fn an_address_may_be_a_port() {
    assert_eq!("9472".parse(), Ok(Address(SocketAddr::from(([127, 0, 0, 1], 9472)))));
    assert_eq!(
        "[::1]:1".parse::<Address>().map(|address| address.0.to_string()),
        Ok("[::1]:1".to_owned())
    );
    assert!(
        "example.org:1"
            .parse::<Address>()
            .expect_err("a name")
            .contains("example.org:1")
    );
}
