//! The page in a headless Chromium, driven by its DevTools protocol over two pipes: what it draws, loads, says to a screen
//! reader and does on keys; and its pictures in `docs/`.
//!
//! `cargo xtask test deploy --pictures` installs Chromium, runs this, and has the pictures written.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime::Runtime};

use super::{
    super::super::{model::Answers, tests::answers},
    *,
};

/// How long a state of the page may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A browser with one page.
struct Browser {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    session: Option<String>,
    asked: u64,
    /// What it told without being asked.
    events: Vec<Value>,
}

impl Browser {
    fn start(program: &str, directory: &Path) -> Self {
        // It reads from descriptor 3 and writes to 4.
        let script = "exec \"$0\" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
                      --remote-debugging-pipe --user-data-dir=\"$1\" about:blank 3<&0 4>&1 1>&2";
        let log = fs::File::create(directory.join("chromium.log")).expect("a log");
        let mut child = Command::new("sh")
            .args(["-c", script, program])
            .arg(directory.join("profile"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("sh starts");
        let to = child.stdin.take().expect("it is piped");
        let from = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut browser = Self {
            child,
            to,
            from,
            session: None,
            asked: 0,
            events: Vec::new(),
        };
        let target = browser.ask("Target.createTarget", json!({"url": "about:blank"}));
        let attached = browser.ask(
            "Target.attachToTarget",
            json!({"targetId": target["targetId"], "flatten": true}),
        );
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Network", "Log", "Runtime"] {
            browser.ask(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    fn ask(&mut self, method: &str, parameters: Value) -> Value {
        self.asked += 1;
        let mut message = json!({"id": self.asked, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        write!(self.to, "{message}\0").expect("it reads");
        loop {
            let mut octets = Vec::new();
            self.from.read_until(0, &mut octets).expect("it writes");
            assert_eq!(octets.pop(), Some(0), "Chromium ended at {method}");
            let mut said: Value = serde_json::from_slice(&octets).expect("JSON");
            if said["id"] == self.asked {
                assert!(said["error"].is_null(), "{method}: {}", said["error"]);
                return said["result"].take();
            }
            self.events.push(said);
        }
    }

    /// What an expression of the page comes to.
    fn value(&mut self, expression: &str) -> Value {
        let mut answer = self.ask(
            "Runtime.evaluate",
            json!({"expression": expression, "returnByValue": true}),
        );
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    fn until(&mut self, expression: &str) {
        let began = Instant::now();
        while self.value(expression) != true {
            if began.elapsed() > PATIENCE {
                let screen = self.value("document.body.innerText");
                panic!("never: {expression}: {screen}\n{:#?}", self.faults());
            }
            thread::park_timeout(Duration::from_millis(100));
        }
    }

    /// What was refused, could not be loaded, or failed.
    fn faults(&self) -> Vec<&Value> {
        let kinds = ["Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"];
        let is_fault = |event: &&Value| kinds.iter().any(|kind| event["method"] == *kind);
        self.events.iter().filter(is_fault).collect()
    }

    fn press(&mut self, key: &str, code: u8, text: &str) {
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            self.ask(
                "Input.dispatchKeyEvent",
                json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}),
            );
        }
    }

    fn picture(&mut self, scheme: &str) -> String {
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.ask("Emulation.setEmulatedMedia", features);
        let shot = self.ask("Page.captureScreenshot", json!({"captureBeyondViewport": true}));
        shot["data"].as_str().expect("a picture").to_owned()
    }

    /// What a screen reader is given: role and name of each thing.
    fn read_aloud(&mut self) -> Vec<(String, String)> {
        let tree = self.ask("Accessibility.getFullAXTree", json!({}));
        let nodes = tree["nodes"].as_array().expect("nodes").iter();
        let shown = nodes.filter(|node| node["ignored"] != true);
        let text = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        shown.map(|node| (text(&node["role"]), text(&node["name"]))).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its pipe's end is its end; it may have gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Loads so many minutes ago: one apiserver goes away and comes back empty, and is level a few minutes later.
fn loads(minutes: u64) -> [u64; 3] {
    match minutes {
        48.. => [101, 98, 101],
        45.. => [150, 0, 150],
        38.. => [149, 2, 149],
        _ => {
            let back = (4 + (38 - minutes) * 24).min(100);
            [150 - back / 2, back, 150 - back / 2]
        }
    }
}

/// The agent's answers now.
fn told() -> Answers {
    let mut told = answers(loads(0));
    told.status["skew"] = json!(0.0);
    told.status["hold"] = json!({"reason": "below_threshold", "message": "skew +0.0 % is within 10.0 %"});
    told.status["hold_since_s"] = json!(2_040);
    told.status["version"] = json!(env!("CARGO_PKG_VERSION"));
    told.status["outcomes"] = json!({"moved": 98, "returned": 0, "lost": 0});
    told.status["goaways_total"] = json!(98);
    told.status["warnings"] = json!([]);
    told.status["peers"] = json!([{"apiserver": "cp-2", "fault": null}, {"apiserver": "cp-3", "fault": null}]);
    for entry in told.status["view"].as_array_mut().expect("a view") {
        entry["draining"] = json!(0);
        entry["state"] = json!("ready");
    }
    let decision = |id: u64, skew: f64, victims: u64, hold: Value| {
        json!({"id": id, "at": format!("2026-01-01T09:{:02}:00Z", 20 + id), "mode": "active", "skew": skew, "mean": 100.0,
            "threshold": 0.1, "noise_floor": 0.07, "rho": 1.0, "quota": victims, "hold": hold,
            "victims": vec![json!({"client": "192.0.2.8:1", "user": "bob"}); victims as usize],
            "derivation": {"donors": ["cp-1", "cp-3"], "needed": 49, "surplus": 98},
            "outcomes": {"pending": 0, "draining": 0, "moved": victims, "returned": 0, "lost": 0}})
    };
    let probing = json!({"reason": "probing", "message": "none of 3 told landed elsewhere; does the load balancer send clients \
        there yet? next try in 10 s"});
    told.decisions = json!({"decisions": [
        decision(1, 0.5, 3, Value::Null),
        decision(2, 0.49, 0, probing),
        decision(3, 0.46, 46, Value::Null),
        decision(4, 0.0, 0, told.status["hold"].clone()),
    ]});
    told
}

#[test]
#[ignore = "it needs Chromium: `cargo xtask test deploy --pictures`"]
fn a_browser_draws_the_page_without_help_from_elsewhere_and_leaves_who_reads_it_in_place() {
    let program = env::var("REBALANCER_CHROMIUM").unwrap_or_else(|_| "chromium".to_owned());
    let directory = tempfile::tempdir().expect("a directory");
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let history = (0..POINTS as u64).rev().map(|look| {
        let ago = look * LOOK.as_secs();
        let [one, two, three] = loads(ago / 60);
        json!({"t": now - ago, "loads": {"cp-1": one, "cp-2": two, "cp-3": three}})
    });
    let told = told();
    let (sender, newest) = watch::channel(figures(Ok(&told), false));
    let shown = Shown {
        history: Arc::new(Mutex::new(history.collect())),
        newest,
        readers: Arc::default(),
    };
    let runtime = Runtime::new().expect("a runtime");
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address");
    runtime.spawn(serve(listener, router(shown.clone(), SILENCE), SILENCE));

    let mut browser = Browser::start(&program, directory.path());
    let size = json!({"width": 1000, "height": 1080, "deviceScaleFactor": 1, "mobile": false});
    browser.ask("Emulation.setDeviceMetricsOverride", size);
    browser.ask("Page.navigate", json!({"url": format!("http://{address}/")}));
    browser.until("document.querySelectorAll('#hour polyline').length === 3");

    // Light and dark are two pages to look at, and to look different.
    let paper = "getComputedStyle(document.body).backgroundColor";
    let pictures = ["light", "dark"].map(|scheme| (scheme, browser.picture(scheme), browser.value(paper)));
    assert_ne!(pictures[0].2, pictures[1].2);
    if let Some(docs) = env::var_os("REBALANCER_PICTURES") {
        for (scheme, picture, _) in &pictures {
            let path = Path::new(&docs).join(format!("page-{scheme}.png"));
            let decoded = format!("base64 -d > '{}'", path.display());
            let mut decoder = Command::new("sh")
                .args(["-c", &decoded])
                .stdin(Stdio::piped())
                .spawn()
                .expect("sh");
            decoder
                .stdin
                .take()
                .expect("it is piped")
                .write_all(picture.as_bytes())
                .expect("it reads");
            assert!(decoder.wait().expect("it ends").success(), "{}", path.display());
        }
    }

    // What a screen reader is given.
    let aloud = browser.read_aloud();
    let says = |role: &str, name: &str| aloud.iter().any(|(is, named)| is == role && named.contains(name));
    for (role, name) in [
        ("heading", "rebalancer cp-1"),
        ("region", "Load of the apiservers"),
        ("region", "The last hour"),
        ("image", "cp-2 100"),
        ("columnheader", "Skew"),
        ("rowheader", "cp-2"),
        ("DisclosureTriangle", "46 told to go"),
    ] {
        assert!(says(role, name), "no {role} {name}: {aloud:?}");
    }
    for hidden in ["192.0.2", "bob", "user-"] {
        let text = browser.value("document.documentElement.outerHTML");
        assert!(!text.as_str().expect("text").contains(hidden), "{hidden}");
    }

    // By keys alone: to the second decision, opened, and its derivation is there.
    let focused = "document.activeElement.closest('li')?.dataset.id ?? ''";
    browser.press("Tab", 9, "");
    browser.press("Tab", 9, "");
    assert_eq!(browser.value(focused), "3");
    browser.press("Enter", 13, "\r");
    browser.until("document.querySelector('details[open]')?.innerText.includes('cp-1, cp-3') ?? false");

    // New figures come by themselves; who reads stays where they are.
    sender.send_modify(|figures| {
        figures["status"]["view"][1]["load"] = json!(77);
        figures["status"]["hold"] = json!({"reason": "paused", "message": "paused by an operator"});
        let mut newest = figures["decisions"][3].clone();
        newest["id"] = json!(5);
        figures["decisions"].as_array_mut().expect("decisions").push(newest);
    });
    browser.until("document.querySelectorAll('#decisions > li').length === 5");
    browser.until("document.querySelector('#load tbody').rows[1].cells[2].textContent === '77'");
    assert_eq!(browser.value(focused), "3", "the focus stays");
    assert_eq!(browser.value("document.querySelectorAll('details[open]').length"), 1);
    assert_eq!(
        browser.value("document.getElementById('said').textContent"),
        "Hold: paused by an operator"
    );

    // Nothing came from elsewhere, nothing was refused, nothing failed.
    let events = browser.events.iter();
    let loaded: Vec<&str> = events
        .filter(|event| event["method"] == "Network.requestWillBeSent")
        .filter_map(|event| event["params"]["request"]["url"].as_str())
        .collect();
    assert!(loaded.len() >= 5, "{loaded:?}");
    let here = format!("http://{address}/");
    assert!(loaded.iter().all(|url| url.starts_with(&here)), "{loaded:?}");
    assert!(browser.faults().is_empty(), "{:#?}", browser.faults());
}
