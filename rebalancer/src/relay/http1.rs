//! HTTP/1.1 clients and upgrades (exec, attach, port-forward, websockets), with the same identity.
//!
//! Job: pass each request on over the client's one upstream connection; after `101` pass bytes.
//! Must never send a client's identity or address headers as its own claim.

use std::{sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1::SendRequest,
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rebalancer_core::h2::{
    policy::{FORWARDED_FOR, Fate, Policy, user_agent},
    relay::is_refusal,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Mutex,
};

use super::{
    pump::End,
    registry::{Connection, Order},
};

/// How long a client may take for its next request: kube-apiserver's own `IdleTimeout`
/// (k8s.io/apiserver/pkg/server/secure_serving.go).
const IDLE: Duration = Duration::from_secs(90);

type Body = BoxBody<Bytes, hyper::Error>;

/// Serves one client until either side closes.
pub async fn run<C, S>(client: C, server: S, policy: Policy, connection: &Arc<Connection>) -> End
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, upstream) = match hyper::client::conn::http1::handshake(TokioIo::new(server)).await {
        Ok(pair) => pair,
        Err(error) => return End::ServerIo(std::io::Error::other(error)),
    };
    let sender = Arc::new(Mutex::new(sender));
    let policy = Arc::new(policy);
    let upgraded: Arc<Mutex<Option<Upgraded>>> = Arc::default();
    let service = service_fn(|request| {
        forward(
            request,
            Arc::clone(&sender),
            Arc::clone(&policy),
            Arc::clone(connection),
            Arc::clone(&upgraded),
        )
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(client), service)
        .with_upgrades();
    let exchange = async {
        let mut upstream = std::pin::pin!(upstream.with_upgrades());
        let mut served = std::pin::pin!(served);
        let end = tokio::select! {
            result = &mut served => match result {
                Ok(()) => End::Client,
                Err(error) => End::ClientIo(std::io::Error::other(error)),
            },
            _ = &mut upstream => {
                // The answer's last bytes may still be on their way to the client.
                served.as_mut().graceful_shutdown();
                let _ = served.await;
                return match upgraded.lock().await.take() {
                    Some(upgraded) => upgraded.splice().await,
                    None => End::Server,
                };
            }
        };
        match upgraded.lock().await.take() {
            // The server's half becomes bytes only when its connection is driven to that point.
            Some(upgraded) => tokio::join!(upgraded.splice(), upstream).0,
            None => end,
        }
    };
    let ordered = async { while connection.ordered().await != Order::Close {} };
    tokio::select! {
        end = exchange => end,
        () = ordered => End::Ordered,
    }
}

/// Both halves of a connection after `101`: it is this connection's to the end, in figures and in the list.
struct Upgraded {
    client: OnUpgrade,
    server: OnUpgrade,
    in_flight: InFlight,
}

impl Upgraded {
    async fn splice(self) -> End {
        let joined = async {
            let (client, server) = tokio::try_join!(self.client, self.server)?;
            let copied = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(server)).await;
            anyhow::Ok(copied?)
        };
        match joined.await {
            Ok((from_client, to_client)) => {
                self.in_flight
                    .connection
                    .add_bytes(from_client as usize, to_client as usize);
            }
            Err(error) => tracing::debug!(%error, "an upgraded connection ended"),
        }
        End::Client
    }
}

async fn forward(
    mut request: Request<Incoming>,
    sender: Arc<Mutex<SendRequest<Incoming>>>,
    policy: Arc<Policy>,
    connection: Arc<Connection>,
    upgraded: Arc<Mutex<Option<Upgraded>>>,
) -> Result<Response<Body>, hyper::Error> {
    if connection.requests() == 0
        && let Some(agent) = request.headers().get(header::USER_AGENT)
    {
        connection.set_user_agent(user_agent(agent.as_bytes()));
    }
    if !connection.is_believed() || rewrite(&mut request, &policy).is_none() {
        return Ok(unauthorized());
    }
    let in_flight = InFlight::begin(&connection);
    let from_client = hyper::upgrade::on(&mut request);
    let sent = {
        let mut sender = sender.lock().await;
        match sender.ready().await {
            Ok(()) => sender.send_request(request).await,
            Err(error) => Err(error),
        }
    };
    let mut answer = match sent {
        Ok(answer) => answer,
        Err(error) => {
            let mut refused = Response::new(
                Full::new(Bytes::from(format!("the apiserver did not answer: {error}\n")))
                    .map_err(|never| match never {})
                    .boxed(),
            );
            *refused.status_mut() = StatusCode::BAD_GATEWAY;
            // Its connection is gone, and so is this one.
            refused
                .headers_mut()
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
            return Ok(refused);
        }
    };
    if is_refusal(
        answer.status().as_str().as_bytes(),
        answer.headers().contains_key(header::RETRY_AFTER),
    ) {
        connection.refused();
    }
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let from_server = hyper::upgrade::on(&mut answer);
        *upgraded.lock().await = Some(Upgraded {
            client: from_client,
            server: from_server,
            in_flight,
        });
        return Ok(answer.map(|body| body.boxed()));
    }
    Ok(answer.map(|body| {
        body.map_frame(move |frame| {
            // Held until the body ends.
            let _ = &in_flight;
            frame
        })
        .boxed()
    }))
}

/// The relay's own answer where nobody asks any more: nothing without identity goes over a connection with the front-proxy
/// certificate.
fn unauthorized() -> Response<Body> {
    const BODY: &str = concat!(
        r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Unauthorized","#,
        r#""reason":"Unauthorized","code":401}"#,
        "\n"
    );
    let mut answer = Response::new(
        Full::new(Bytes::from_static(BODY.as_bytes()))
            .map_err(|never| match never {})
            .boxed(),
    );
    *answer.status_mut() = StatusCode::UNAUTHORIZED;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Does to a request what the policy says; `None` when nobody asks.
fn rewrite(request: &mut Request<Incoming>, policy: &Policy) -> Option<()> {
    let headers = request.headers_mut();
    let rewrite = policy.request(|name| headers.get(name).map(HeaderValue::as_bytes))?;
    let adds: Vec<_> = rewrite.adds().collect();
    let names: Vec<_> = headers.keys().cloned().collect();
    let (mut gone, mut merged) = (Vec::new(), Vec::new());
    for name in names {
        match rewrite.fate(name.as_str().as_bytes()) {
            Fate::Passes => {}
            Fate::Removed => gone.push(name),
            Fate::Merged => {
                merged.extend(headers.get_all(&name).iter().map(|value| value.as_bytes().to_vec()));
                gone.push(name);
            }
        }
    }
    let chain = policy.forwarded_for(merged.iter().map(Vec::as_slice));
    for name in gone {
        headers.remove(name);
    }
    if let Ok(chain) = HeaderValue::from_bytes(&chain) {
        headers.insert(FORWARDED_FOR, chain);
    }
    // Appended one by one: a user has several groups.
    for (name, value) in adds {
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(name.as_bytes()),
            HeaderValue::from_bytes(value.as_bytes()),
        ) {
            headers.append(name, value);
        }
    }
    Some(())
}

/// A request in flight: an HTTP/1.1 connection has one at most.
struct InFlight {
    connection: Arc<Connection>,
}

impl InFlight {
    fn begin(connection: &Arc<Connection>) -> Self {
        connection.set_streams(connection.requests() + 1, 1, 0);
        connection.add_bytes(0, 0);
        Self {
            connection: Arc::clone(connection),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.connection.set_streams(self.connection.requests(), 0, 0);
    }
}
