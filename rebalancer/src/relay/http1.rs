//! HTTP/1.1 clients and upgrades (exec, attach, port-forward, websockets), with the same identity.
//!
//! Job: pass each request on over the client's one upstream connection, which is another one after the front proxy's
//! certificate has changed, and each answer back as it came; after `101`
//! pass octets. A client that is to go hears `Connection: close` with its next answer.
//! Must never send a client's identity or address headers as its own claim, nor a request without identity over the
//! front proxy's connection, nor close while a request may be on its way.

use std::{
    convert::Infallible,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use rebalancer_core::{
    wire::h1::{
        body::{Body, Passing},
        forward::{Passed, Stays, pass},
        head::{AnswerHead, Finder, HeadError},
    },
    wire::rewrite::Policy,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf},
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};

mod side;

use self::side::{Side, copy, invalid, send};
use super::{
    pump::End,
    registry::{Connection, Order},
    vigil::{Behind, tell},
};

/// How long a client may take for its next request: kube-apiserver's own `IdleTimeout`
/// (k8s.io/apiserver/pkg/server/secure_serving.go).
const IDLE: Duration = Duration::from_secs(90);

/// How long a request's head may take from its first octet on: kube-apiserver's own `ReadHeaderTimeout`, in the same file.
pub const HEAD: Duration = Duration::from_secs(32);

/// How long a client without a request is waited for when the process ends: one that asks is answered, and told to go.
const LEAVING: Duration = Duration::from_secs(10);

/// How much of a client's next requests is read while one is answered.
const AHEAD: usize = 64 * 1024;

/// How many octets of line ends Go's server skips before the next request, behind a POST alone (net/http/server.go,
/// `readRequest`).
const AFTER_POST: usize = 4;

/// What a request costs beside its octets, in octets that are only passed on, as over HTTP/2.
const REQUEST: usize = 1024;

/// A buffer larger than this is given back between two requests.
const KEPT: usize = 1024;

/// How long a client may take to read its last octets and close, and how many of its own are thrown away meanwhile.
const LINGER: Duration = Duration::from_secs(10);
const LINGER_OCTETS: usize = 256 * 1024;

/// How many octets of a head's bound each field takes besides its own, as in HTTP/2 (RFC 9113, section 6.5.2).
const FIELD: usize = 32;

/// What stands behind connections that can be changed for other ones.
pub trait Renews<S>: Behind {
    /// Another connection to the apiserver, for the request that has come: `None` when the one that is there is right, or is
    /// all that there is. The apiserver judges the front proxy's certificate at each request, and a client of HTTP/1.1 in the
    /// middle of a lasting answer cannot be told to go before it ends.
    fn renewed(&self, connection: &Connection) -> impl Future<Output = Option<S>> + Send;
}

/// What is fixed for one client.
pub struct Settings<'s> {
    /// What is done to its requests.
    pub policy: Policy,
    /// Its entry.
    pub connection: &'s Arc<Connection>,
    /// How many octets a head may have, [`FIELD`] for each field included, either way.
    pub max_header_bytes: usize,
    /// How long it may be without a request; [`IDLE`] at most.
    pub idle: Duration,
}

/// Serves one client, which has sent `first` already, until either side closes.
pub async fn run<C, S>(client: C, first: Vec<u8>, server: S, settings: Settings<'_>, behind: &impl Renews<S>) -> End
where
    C: AsyncRead + AsyncWrite + Unpin + Send,
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let connection = settings.connection;
    let (client, to_client) = tokio::io::split(client);
    let (server, to_server) = tokio::io::split(server);
    connection.add_bytes(first.len(), 0);
    let mut exchanges = Exchanges {
        client: Side::new(client, first),
        server: Side::new(server, Vec::new()),
        to_client,
        to_server,
        skippable: 0,
        asks: false,
        settings,
    };
    let leaving = Leaving::default();
    let orders = async {
        loop {
            match connection.ordered().await {
                Order::Close => return End::Ordered,
                Order::GoAway => leaving.begin(),
                Order::Conclude | Order::HandOver(_) => {}
            }
        }
    };
    let end = tokio::select! {
        end = exchanges.serve(&leaving, behind) => end,
        end = orders => end,
    };
    tell(behind, &end, exchanges.asks).await;
    exchanges.finish(&end).await;
    end
}

/// Set when the process ends.
#[derive(Debug, Default)]
struct Leaving {
    begun: AtomicBool,
    wake: Notify,
}

impl Leaving {
    fn begin(&self) {
        self.begun.store(true, Relaxed);
        self.wake.notify_one();
    }

    async fn begun(&self) {
        while !self.begun.load(Relaxed) {
            self.wake.notified().await;
        }
    }
}

/// Octets of a head's bound: its own, and [`FIELD`] for each line that was found whole.
fn weight(octets: usize, found: &Finder) -> usize {
    octets + FIELD * found.lines()
}

/// What the relay answers itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Malformed(HeadError),
    TooLarge,
    Withdrawn,
}

impl Refusal {
    /// As Go's server words it; the apiserver's own for a request without credentials.
    fn answer(self) -> Vec<u8> {
        let status = match self {
            Self::Malformed(HeadError::TransferEncoding) => "501 Not Implemented",
            Self::Malformed(_) => "400 Bad Request",
            Self::TooLarge => "431 Request Header Fields Too Large",
            Self::Withdrawn => "401 Unauthorized",
        };
        let mut answer = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
        let body = match self {
            Self::Withdrawn => {
                answer.push_str("Content-Type: application/json\r\n");
                r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}"#
            }
            Self::Malformed(_) | Self::TooLarge => {
                answer.push_str("Content-Type: text/plain; charset=utf-8\r\n");
                status
            }
        };
        answer.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        answer.into_bytes()
    }

    fn end(self) -> End {
        End::ClientIo(match self {
            Self::Malformed(error) => invalid(error),
            Self::TooLarge => invalid("a request's head is larger than --max-header-bytes"),
            Self::Withdrawn => io::Error::new(io::ErrorKind::PermissionDenied, "its certificate is no longer accepted"),
        })
    }
}

/// What became of one request.
enum Exchanged {
    /// The next may come.
    Answered,
    /// The answer was the connection's last.
    Last,
    /// Both sides speak something else now.
    Upgraded,
}

struct Exchanges<'s, C, S> {
    client: Side<ReadHalf<C>>,
    server: Side<ReadHalf<S>>,
    to_client: WriteHalf<C>,
    to_server: WriteHalf<S>,
    /// How many octets of line ends may stand before the next head.
    skippable: usize,
    /// Whether a request has no whole answer.
    asks: bool,
    settings: Settings<'s>,
}

impl<C, S> Exchanges<'_, C, S>
where
    C: AsyncRead + AsyncWrite + Unpin + Send,
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    async fn serve(&mut self, leaving: &Leaving, behind: &impl Renews<S>) -> End {
        loop {
            let exchanged = match self.next_head(leaving).await {
                Ok(length) => {
                    if let Some(server) = behind.renewed(self.settings.connection).await {
                        let (server, to_server) = tokio::io::split(server);
                        (self.server, self.to_server) = (Side::new(server, Vec::new()), to_server);
                    }
                    self.asks = true;
                    let exchanged = self.exchange(length, behind).await;
                    self.asks = exchanged.is_err();
                    exchanged
                }
                Err(end) => Err(end),
            };
            match exchanged {
                Ok(Exchanged::Answered) => {}
                Ok(Exchanged::Last) if self.settings.connection.was_told() => return End::Drained,
                Ok(Exchanged::Last) => return End::Server,
                Ok(Exchanged::Upgraded) => return self.splice(behind).await,
                Err(end) => return end,
            }
            for kept in [&mut self.client.ahead, &mut self.server.ahead] {
                if kept.is_empty() && kept.capacity() > KEPT {
                    *kept = Vec::new();
                }
            }
        }
    }

    /// Both sides are told the end: what was written to the client arrives there.
    async fn finish(&mut self, end: &End) {
        let Self {
            client,
            to_client,
            to_server,
            ..
        } = self;
        let last_words = async {
            to_client.shutdown().await?;
            // Closing with unread octets would reset the connection, and the reset could overtake the last ones.
            let mut left = LINGER_OCTETS;
            while left > 0 {
                client.ahead = Vec::new();
                match client.read().await? {
                    0 => break,
                    count => left = left.saturating_sub(count),
                }
            }
            io::Result::Ok(())
        };
        // However it goes, the connection is over.
        if !matches!(end, End::Client) {
            let _ = timeout(LINGER, last_words).await;
        }
        let _ = timeout(LINGER, to_server.shutdown()).await;
    }

    async fn refuse(&mut self, refusal: Refusal) -> End {
        // It may have gone already.
        let _ = timeout(LINGER, send(&mut self.to_client, &refusal.answer())).await;
        refusal.end()
    }

    /// Waits for a request's head: its length.
    async fn next_head(&mut self, leaving: &Leaving) -> Result<usize, End> {
        let mut finder = Finder::default();
        let mut until = Instant::now() + IDLE.min(self.settings.idle);
        let mut begun = false;
        let mut hurried = false;
        loop {
            if self.skippable > 0 && !self.client.ahead.is_empty() {
                self.skippable = self.client.skip_line_ends(self.skippable);
            }
            if !begun && !self.client.ahead.is_empty() {
                begun = true;
                until = Instant::now() + HEAD;
            }
            let found = finder.find(&self.client.ahead);
            let octets = found.unwrap_or(self.client.ahead.len());
            if weight(octets, &finder) > self.settings.max_header_bytes {
                return Err(self.refuse(Refusal::TooLarge).await);
            }
            self.settings.connection.hold(if found.is_none() { octets } else { 0 });
            if let Some(length) = found {
                return Ok(length);
            }
            tokio::select! {
                biased;
                read = self.client.read() => match read {
                    Ok(0) => return Err(End::Client),
                    Ok(count) => self.settings.connection.add_bytes(count, 0),
                    Err(error) => return Err(End::ClientIo(error)),
                },
                // An answer that nobody asked for would be taken for the next one's.
                read = self.server.read() => return Err(match read {
                    Ok(_) => End::Server,
                    Err(error) => End::ServerIo(error),
                }),
                () = leaving.begun(), if !hurried && !begun => {
                    hurried = true;
                    until = until.min(Instant::now() + LEAVING);
                }
                () = sleep_until(until) => return Err(if hurried { End::Drained } else { End::Ordered }),
            }
        }
    }

    /// Passes one request and its answer.
    async fn exchange(&mut self, length: usize, behind: &impl Behind) -> Result<Exchanged, End> {
        self.client.spend(REQUEST);
        let head = self.client.take(length);
        let request = match self.request(&head) {
            Ok(request) => request,
            Err(refusal) => return Err(self.refuse(refusal).await),
        };
        let connection = Arc::clone(self.settings.connection);
        connection.begin_request(request.watch);
        let _in_flight = InFlight(&connection);
        drop(head);

        let sent = AtomicBool::new(false);
        self.skippable = if request.posts { AFTER_POST } else { 0 };
        let (is_upgrade, to_head) = (request.upgrades, request.to_head);
        let (client, to_server) = (&mut self.client, &mut self.to_server);
        let mut sending = pin!(send_request(client, to_server, request, &connection, &sent));
        let answered = {
            let (server, to_client) = (&mut self.server, &mut self.to_client);
            let bound = self.settings.max_header_bytes;
            let mut receiving = pin!(receive(
                server,
                to_client,
                &connection,
                [is_upgrade, to_head],
                bound,
                behind
            ));
            tokio::select! {
                biased;
                answered = &mut receiving => answered?,
                gone = &mut sending => match gone {
                    Ok(never) => match never {},
                    Err(end) => return Err(end),
                },
            }
        };
        if matches!(answered, Exchanged::Answered) {
            // The server reads the rest of a body that it does not want, to be ready for the next request.
            std::future::poll_fn(|context| match sending.as_mut().poll(context) {
                std::task::Poll::Ready(Ok(never)) => match never {},
                std::task::Poll::Ready(Err(end)) => std::task::Poll::Ready(Err(end)),
                std::task::Poll::Pending if sent.load(Relaxed) => std::task::Poll::Ready(Ok(())),
                std::task::Poll::Pending => std::task::Poll::Pending,
            })
            .await?;
        }
        if matches!(answered, Exchanged::Upgraded) {
            connection.set_upgraded();
        }
        Ok(answered)
    }

    /// What goes on to the server.
    fn request(&self, head: &[u8]) -> Result<Passed, Refusal> {
        let Settings { policy, connection, .. } = &self.settings;
        let passed = pass(head, policy).map_err(|stays| match stays {
            Stays::Malformed(error) => Refusal::Malformed(error),
            Stays::Nobody => Refusal::Withdrawn,
        })?;
        // The upstream connection may be the front proxy's: nothing goes over it that names nobody.
        if !connection.is_believed() {
            return Err(Refusal::Withdrawn);
        }
        if let Some(agent) = &passed.user_agent {
            connection.set_user_agent(agent);
        }
        Ok(passed)
    }

    /// Passes octets after `101`, until both sides have ended: it is this connection's to the end, in figures and in the
    /// list.
    async fn splice(&mut self, behind: &impl Behind) -> End {
        self.asks = true;
        let connection = Arc::clone(self.settings.connection);
        connection.begin_stream();
        let _in_flight = InFlight(&connection);
        let Self {
            client,
            server,
            to_client,
            to_server,
            ..
        } = self;
        let up = async {
            let copied = copy(client, to_server, |count| connection.add_bytes(count, 0)).await;
            copied.map_err(|failed| failed.of(End::ClientIo, End::ServerIo))?;
            // Where it has ended too, that is read from it.
            let _ = to_server.shutdown().await;
            Ok(())
        };
        let down = async {
            let copied = copy(server, to_client, |count| connection.add_bytes(0, count)).await;
            copied.map_err(|failed| failed.of(End::ServerIo, End::ClientIo))?;
            behind.leaves();
            to_client.shutdown().await.map_err(End::ClientIo)
        };
        match tokio::try_join!(up, down) {
            Ok(_) => End::Server,
            Err(end) => end,
        }
    }
}

/// Sends a request's head and body, and then watches whether the client leaves. It ends only when the client does.
async fn send_request<C, S>(
    client: &mut Side<ReadHalf<C>>,
    to_server: &mut WriteHalf<S>,
    request: Passed,
    connection: &Connection,
    sent: &AtomicBool,
) -> Result<Infallible, End>
where
    C: AsyncRead + Unpin,
    S: AsyncWrite + Unpin,
{
    let Passed {
        head: mut out, framing, ..
    } = request;
    let mut body = Body::new(framing, Passing::Bare);
    loop {
        client.feed(&mut body, &mut out).map_err(End::ClientIo)?;
        if send(to_server, &out).await.is_err() {
            // It may have answered before it closed, and that answer is on its way.
            return std::future::pending().await;
        }
        out.clear();
        if body.is_done() {
            break;
        }
        match client.read().await {
            Ok(0) => return Err(End::Client),
            Ok(count) => connection.add_bytes(count, 0),
            Err(error) => return Err(End::ClientIo(error)),
        }
    }
    drop(out);
    sent.store(true, Relaxed);
    loop {
        if client.ahead.len() >= AHEAD {
            return std::future::pending().await;
        }
        match client.read().await {
            Ok(0) => {
                // The server sees what it would see directly, and decides what becomes of its answer.
                let _ = to_server.shutdown().await;
                return std::future::pending().await;
            }
            Ok(count) => connection.add_bytes(count, 0),
            Err(error) => return Err(End::ClientIo(error)),
        }
    }
}

/// Passes an answer back, as it came.
async fn receive<C, S>(
    server: &mut Side<ReadHalf<S>>,
    to_client: &mut WriteHalf<C>,
    connection: &Connection,
    [may_upgrade, to_head]: [bool; 2],
    bound: usize,
    behind: &impl Behind,
) -> Result<Exchanged, End>
where
    C: AsyncWrite + Unpin,
    S: AsyncRead + Unpin,
{
    let broken = |error| End::ServerIo(invalid(error));
    loop {
        let mut finder = Finder::default();
        let length = loop {
            let found = finder.find(&server.ahead);
            if weight(found.unwrap_or(server.ahead.len()), &finder) > bound {
                return Err(End::ServerIo(invalid(
                    "an answer's head is larger than --max-header-bytes",
                )));
            }
            if let Some(length) = found {
                break length;
            }
            read_from(server, connection).await?;
        };
        let head = server.take(length);
        let answer = AnswerHead::parse(&head).map_err(broken)?;
        if answer.is_interim() {
            send(to_client, &head).await.map_err(End::ClientIo)?;
            continue;
        }
        let refused = answer.is_refusal();
        if refused {
            connection.refused();
        }
        let flow = connection.begin_answer(answer.flow(), refused);
        if answer.status == 101 {
            if !may_upgrade {
                return Err(End::ServerIo(invalid("an upgrade that nobody asked for")));
            }
            send(to_client, &head).await.map_err(End::ClientIo)?;
            return Ok(Exchanged::Upgraded);
        }
        let framing = answer.framing(to_head).map_err(broken)?;
        let mut last = answer.closes();
        if last {
            behind.leaves();
        }
        let mut out = Vec::new();
        if connection.tell_with_answer() && !last {
            answer.write_closing(&mut out);
            last = true;
        } else {
            out.extend_from_slice(&head);
        }
        drop(head);
        let mut head_length = out.len();
        let mut body = Body::new(framing, Passing::Verbatim);
        let mut lasts = false;
        loop {
            server.feed(&mut body, &mut out).map_err(End::ServerIo)?;
            send(to_client, &out).await.map_err(End::ClientIo)?;
            let octets = (out.len() - head_length) as u64;
            connection.with_flows(|flows| flows.add_octets(flow, octets));
            head_length = 0;
            out.clear();
            if body.is_done() {
                break;
            }
            if !std::mem::replace(&mut lasts, true) {
                connection.set_answering();
            }
            match read_from(server, connection).await {
                Err(End::Server) if body.is_until_close() => {
                    last = true;
                    break;
                }
                read => read?,
            }
        }
        return Ok(if last { Exchanged::Last } else { Exchanged::Answered });
    }
}

async fn read_from<S: AsyncRead + Unpin>(server: &mut Side<ReadHalf<S>>, connection: &Connection) -> Result<(), End> {
    match server.read().await {
        Ok(0) => Err(End::Server),
        Ok(count) => {
            connection.add_bytes(0, count);
            Ok(())
        }
        Err(error) => Err(End::ServerIo(error)),
    }
}

/// A request in flight: an HTTP/1.1 connection has one at most.
struct InFlight<'c>(&'c Arc<Connection>);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.end_request();
    }
}

#[cfg(test)]
mod tests;
