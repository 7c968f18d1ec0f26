//! HTTP/1.1 clients and upgrades (exec, attach, port-forward, websockets), with the same identity.
//!
//! Job: pass each request on over the client's one upstream connection; after `101` pass bytes.
//! Must never send a client's identity or address headers as its own claim.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1::SendRequest,
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rebalancer_core::h2::{
    policy::{IdentityNames, user_agent},
    relay::is_refusal,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Mutex,
};

use super::{
    identity::{Claim, REJECTED},
    pump::End,
    registry::{Connection, Order},
    tls::Reloader,
    unix_now,
};

/// How long a client may take for its next request: kube-apiserver's own `IdleTimeout`
/// (k8s.io/apiserver/pkg/server/secure_serving.go).
const IDLE: Duration = Duration::from_secs(90);

type Body = BoxBody<Bytes, hyper::Error>;

/// Serves one client until either side closes.
pub async fn run<C, S>(client: C, server: S, claim: Arc<Claim>, connection: &Arc<Connection>, tls: &Reloader) -> End
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, upstream) = match hyper::client::conn::http1::handshake(TokioIo::new(server)).await {
        Ok(pair) => pair,
        Err(error) => return End::ServerIo(std::io::Error::other(error)),
    };
    let sender = Arc::new(Mutex::new(sender));
    let upgraded: Arc<Mutex<Option<Upgraded>>> = Arc::default();
    let service = service_fn(|request| {
        forward(
            request,
            Arc::clone(&sender),
            still_believed(&claim, connection, tls),
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

/// What the certificate says now: it may have expired, or its CA be gone, since the handshake.
fn still_believed(claim: &Arc<Claim>, connection: &Connection, tls: &Reloader) -> Arc<Claim> {
    match **claim {
        Claim::Accepted(_) if !connection.is_trusted(unix_now(), tls.current().generation) => Arc::new(Claim::Rejected),
        _ => Arc::clone(claim),
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
    claim: Arc<Claim>,
    connection: Arc<Connection>,
    upgraded: Arc<Mutex<Option<Upgraded>>>,
) -> Result<Response<Body>, hyper::Error> {
    if connection.requests() == 0
        && let Some(agent) = request.headers().get(header::USER_AGENT)
    {
        connection.set_user_agent(user_agent(agent.as_bytes()));
    }
    let in_flight = InFlight::begin(&connection);
    rewrite(&mut request, &claim, &connection);
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

/// Replaces what the client says about itself by what the relay knows.
fn rewrite(request: &mut Request<Incoming>, claim: &Claim, connection: &Connection) {
    let headers = request.headers_mut();
    let names = IdentityNames::default();
    let claims: Vec<_> = headers
        .keys()
        .filter(|name| names.covers(name.as_str().as_bytes()))
        .cloned()
        .collect();
    for name in claims {
        headers.remove(name);
    }
    let mut chain = Vec::new();
    for value in headers.get_all("x-forwarded-for") {
        chain.extend_from_slice(value.as_bytes());
        chain.extend_from_slice(b", ");
    }
    chain.extend_from_slice(connection.client().ip().to_canonical().to_string().as_bytes());
    if let Ok(chain) = HeaderValue::from_bytes(&chain) {
        headers.insert("x-forwarded-for", chain);
    }
    match claim {
        Claim::Absent => {}
        Claim::Accepted(identity) => {
            // Appended one by one: a user has several groups.
            for (name, value) in identity.headers() {
                headers.append(name, value);
            }
        }
        Claim::Rejected => {
            headers
                .entry(header::AUTHORIZATION)
                .or_insert(HeaderValue::from_static(REJECTED));
        }
    }
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
