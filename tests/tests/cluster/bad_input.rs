//! Bad input to an agent that looks for its peers in the API: each is one sentence with what to do, and a hold.
//!
//! By a real apiserver, and by a double that answers late, in halves, and with what nobody understands.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use rebalancer_tests::{kube::granted_to_agents, netns::Network, process::wait_for};
use serde_json::{Value, json};

use super::{
    membership::scene,
    world::{PATIENCE, World, apiserver_address},
};

/// Writes credentials of that user, for that server.
fn credentials(world: &World, server: &str, user: Value) -> PathBuf {
    let path = world.directory.join("odd.kubeconfig");
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": world.pki.file("ca.crt")}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    });
    fs::write(&path, config.to_string()).expect("a file");
    path
}

/// One after the other; none of them leaves anything behind.
pub fn is_said_in_a_sentence_each(world: &World) {
    scene("no rights, no namespace, no address: each is one sentence with what to do");
    let server = format!("https://{}", apiserver_address(0));
    let stranger = world
        .pki
        .client("stranger", "rebalancer:stranger", &["nobody"])
        .expect("a certificate");
    let stranger = json!({"client-certificate": stranger.certificate, "client-key": stranger.key});
    let admin = || json!({"token": "the-admins-token"});
    for (server, user, flags, parts) in [
        (
            server.as_str(),
            stranger,
            &[][..],
            &["forbids it: grant this agent list on leases", "kube-system"][..],
        ),
        (
            &server,
            json!({"token": "expired"}),
            &[],
            &["401", "token or certificate has expired", "renew --kubeconfig"],
        ),
        (
            &server,
            admin(),
            &["--lease-namespace=nowhere"],
            &["namespace nowhere does not exist", "--lease-namespace"],
        ),
        (&server, admin(), &[], &["--node-name", "node-1, node-2, node-3"]),
        (
            "https://10.77.0.1:1",
            admin(),
            &[],
            &[
                "cannot be reached at https://10.77.0.1:1",
                "onnection refused",
                "start it",
            ],
        ),
    ] {
        let agent = world.start_another("node-9", &credentials(world, server, user), flags);
        agent.holds("membership_unknown", parts);
        let troubles = "rebalancer_membership_troubles{kind=\"doubt\"}";
        let counted = wait_for(PATIENCE, || {
            agent.metric(&world.network.hub, troubles).filter(|count| *count == 1.0)
        });
        assert!(counted.is_some(), "{parts:?} is a metric too");
        drop(agent);
        world.forget("node-9");
    }
    a_token_is_renewed(world, &server);
    halves_and_silence(world);
}

/// A service account's token, bound to a Secret: who takes that away ends the token.
fn a_token_is_renewed(world: &World, server: &str) {
    scene("a token is renewed in its file, and the old one is refused");
    let admin = world.admin(0);
    let system = "/api/v1/namespaces/kube-system";
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "rebalancer"}});
    admin
        .make(&format!("{system}/serviceaccounts"), &account)
        .expect("an account");
    let subject = json!({"kind": "ServiceAccount", "name": "rebalancer", "namespace": "kube-system"});
    granted_to_agents(&admin, "rebalancer-account", &["node-9"], &subject).expect("rights");
    let token = |secret: &str| -> String {
        let object = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}});
        let (status, made) = admin
            .ask("POST", &format!("{system}/secrets"), Some(&object))
            .expect("an answer");
        assert_eq!(status, 201, "{made}");
        let uid = &made["metadata"]["uid"];
        let bound = json!({"kind": "Secret", "apiVersion": "v1", "name": secret, "uid": uid});
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": bound}});
        let path = format!("{system}/serviceaccounts/rebalancer/token");
        let (status, made) = admin.ask("POST", &path, Some(&request)).expect("an answer");
        assert_eq!(status, 201, "{made}");
        made["status"]["token"].as_str().expect("a token").to_owned()
    };
    let file = world.directory.join("token");
    let first = token("bound-1");
    fs::write(&file, &first).expect("a file");
    let agent = world.start_another("node-9", &credentials(world, server, json!({"tokenFile": file})), &[]);
    agent.holds("membership_unknown", &["--node-name", "node-1, node-2, node-3"]);
    let renewals = || {
        let line = "rebalancer_kubernetes_requests_total{verb=\"update\",result=\"ok\"}";
        agent.metric(&world.network.hub, line)
    };
    wait_for(PATIENCE, || renewals().filter(|count| *count >= 1.0)).expect("a renewal");
    fs::write(&file, token("bound-2")).expect("a file");
    let (status, _) = admin
        .ask("DELETE", &format!("{system}/secrets/bound-1"), None)
        .expect("an answer");
    assert_eq!(status, 200);
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": first}});
    wait_for(PATIENCE, || {
        let path = "/apis/authentication.k8s.io/v1/tokenreviews";
        let (_, said) = admin.ask("POST", path, Some(&review)).ok()?;
        (said["status"]["authenticated"] != true).then_some(())
    })
    .expect("the end of the old token");
    let before = renewals().expect("a count");
    wait_for(PATIENCE, || renewals().filter(|count| *count >= before + 2.0)).expect("renewals with the new one");
    agent.holds("membership_unknown", &["--node-name", "node-1, node-2, node-3"]);
    drop(agent);
    world.forget("node-9");
}

/// How the double answers.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Silent,
    Html,
    Garbled,
    Cut,
    /// As an apiserver without identity Leases.
    Empty,
}

/// An API that is none.
struct Double {
    address: SocketAddr,
    manner: Arc<AtomicUsize>,
}

impl Double {
    fn start(world: &World) -> Self {
        let namespace = world.network.hub.clone();
        let manner = Arc::new(AtomicUsize::new(0));
        let (told, seen) = (std::sync::mpsc::channel(), Arc::clone(&manner));
        let tell = told.0;
        thread::spawn(move || {
            namespace.enter().expect("root may enter a namespace of its own");
            let listener = TcpListener::bind((Network::HUB, 0)).expect("a port");
            tell.send(listener.local_addr().expect("an address"))
                .expect("the test waits");
            for stream in listener.incoming().flatten() {
                let seen = Arc::clone(&seen);
                // A client that goes away is no fault of the double's.
                thread::spawn(move || answer(stream, MANNERS[seen.load(SeqCst)]));
            }
        });
        Self {
            address: told.1.recv().expect("it starts"),
            manner,
        }
    }
}

const MANNERS: [Manner; 5] = [
    Manner::Silent,
    Manner::Html,
    Manner::Garbled,
    Manner::Cut,
    Manner::Empty,
];

fn answer(mut stream: TcpStream, manner: Manner) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let (head, body) = loop {
            if let Some(end) = request.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&request[..end]).to_lowercase();
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                let whole = end + 4 + length.unwrap_or(0);
                if request.len() >= whole {
                    let body = request[end + 4..whole].to_vec();
                    request.drain(..whole);
                    break (head, body);
                }
            }
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                length => request.extend_from_slice(&buffer[..length]),
            }
        };
        let list = json!({
            "kind": "LeaseList", "apiVersion": "coordination.k8s.io/v1", "metadata": {"resourceVersion": "1"}, "items": [],
        });
        let (kind, said) = match manner {
            // Until the client gives it up.
            Manner::Silent => return stream.read(&mut buffer).map(|_| ()),
            Manner::Empty if head.contains("watch=true") => return stream.read(&mut buffer).map(|_| ()),
            Manner::Html => ("text/html", "<html><body>Sign in</body></html>".to_owned()),
            Manner::Garbled => ("application/json", list.to_string().replace(':', "=")),
            Manner::Empty if head.starts_with("post") => {
                let mut lease: Value = serde_json::from_slice(&body).unwrap_or_default();
                lease["metadata"]["resourceVersion"] = json!("2");
                ("application/json", lease.to_string())
            }
            Manner::Cut | Manner::Empty => ("application/json", list.to_string()),
        };
        let sent = if matches!(manner, Manner::Cut) {
            said.len() / 2
        } else {
            said.len()
        };
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            said.len()
        )?;
        stream.write_all(&said.as_bytes()[..sent])?;
        if sent < said.len() {
            return Ok(());
        }
    }
}

fn halves_and_silence(world: &World) {
    scene("an API that is silent, is none, answers in halves, and has no identity Leases");
    let double = Double::start(world);
    let server = format!("http://{}", double.address);
    for (index, manner) in MANNERS.iter().enumerate() {
        let parts: &[&str] = match manner {
            Manner::Silent => &["gave no answer to list within 5 s", "overloaded"],
            Manner::Html | Manner::Garbled => &[
                "answered list of leases.coordination.k8s.io with what cannot be read",
                "is it a kube-apiserver",
            ],
            Manner::Cut => &["cannot be reached", "start it"],
            Manner::Empty => &["node-9", "is down"],
        };
        double.manner.store(index, SeqCst);
        let agent = world.start_another("node-9", &credentials(world, &server, json!({"token": "x"})), &[]);
        let reason = match manner {
            // Nobody listens where the double is asked from.
            Manner::Empty => "apiserver_starting",
            _ => "membership_unknown",
        };
        agent.holds(reason, parts);
        if let Manner::Empty = manner {
            let status = agent.status().expect("a status");
            assert_eq!(status["membership"]["set_from"], "agents", "{status}");
            for command in ["status", "peers"] {
                let (_, shown, _) = super::operator::ask(&agent.socket, &[command]);
                assert!(shown.contains("an apiserver without an agent is not known"), "{shown}");
            }
        }
    }
}
