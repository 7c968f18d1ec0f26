//! TLS over a socket, without buffers of its own while nothing is on the way.
//!
//! Job: both handshakes, and records in and out of one scratch buffer a thread: as much is read at once as is there,
//! and what is to be sent goes in one call.
//! Must never hold a byte back: what is decrypted is handed over, and what is encrypted is sent, before it waits.

use std::{
    cell::RefCell,
    io, mem,
    ops::Deref,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{
    CertificateError, ClientConfig, CommonState, OtherError, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::ServerName,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
};

use super::socket::Socket;

/// The largest record on the wire (RFC 5246, section 6.2.3; TLS 1.3's are smaller).
const MAX_RECORD: usize = 5 + (1 << 14) + 2048;

/// How much is encrypted at once.
const CHUNK: usize = 64 * 1024;

/// What the records of one chunk need beyond it: header, content type and tag, or TLS 1.2's explicit nonce.
const EXPANSION: usize = 64 * (CHUNK / (1 << 14) + 1);

/// How much a handshake reads at once.
const HANDSHAKE_READ: usize = 4096;

/// A handshake message may span records; no peer needs more.
const MAX_HANDSHAKE: usize = 128 * 1024;

thread_local! {
    /// Records as they came.
    static INCOMING: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_RECORD + CHUNK]);
    /// Records to be sent.
    static OUTGOING: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK + EXPANSION]);
}

/// Either side's session, as rustls gives it.
pub trait Session: Deref<Target: Deref<Target = CommonState>> + Unpin {
    /// Which side.
    type Data;

    /// Takes records, or says what is due.
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Session for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl Session for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

/// A stream whose handshake is done.
#[derive(Debug)]
pub struct TlsStream<S> {
    socket: Socket,
    /// Large, and moved from hand to hand.
    session: Box<S>,
    /// The beginning of a record that is not complete.
    incoming: Vec<u8>,
    /// Decrypted, and more than the reader had room for.
    plain: Vec<u8>,
    /// Encrypted, and more than the socket took.
    outgoing: Vec<u8>,
    sent: usize,
    peer_closed: bool,
    closed: bool,
}

/// Towards a client.
pub type ServerStream = TlsStream<UnbufferedServerConnection>;

/// Towards the apiserver.
pub type ClientStream = TlsStream<UnbufferedClientConnection>;

/// Shakes hands with a client; `holds` hears how many octets of its messages wait to be whole.
///
/// # Errors
///
/// The socket's, or [`io::ErrorKind::InvalidData`] with what TLS says.
pub async fn accept(
    config: Arc<ServerConfig>,
    socket: TcpStream,
    holds: impl FnMut(usize),
) -> io::Result<ServerStream> {
    let session = UnbufferedServerConnection::new(config).map_err(invalid)?;
    TlsStream::handshake(socket, session, holds).await
}

/// Shakes hands with the apiserver, and offers one protocol.
///
/// # Errors
///
/// The socket's, or [`io::ErrorKind::InvalidData`] with what TLS says.
pub async fn connect(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    protocol: &[u8],
    socket: TcpStream,
) -> io::Result<ClientStream> {
    let session = UnbufferedClientConnection::new_with_alpn(config, name, vec![protocol.to_vec()]).map_err(invalid)?;
    TlsStream::handshake(socket, session, |_| {}).await
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Why a handshake fails, where this program has said it itself in its own words.
fn refused(error: rustls::Error) -> io::Error {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => invalid(why.to_string()),
        error => invalid(error),
    }
}

/// Appends a record of the handshake or an alert.
fn encode<Data>(mut data: EncodeTlsData<'_, Data>, out: &mut Vec<u8>) -> io::Result<()> {
    let begin = out.len();
    let mut written = data.encode(&mut []);
    if let Err(EncodeError::InsufficientSize(needed)) = &written {
        out.resize(begin + needed.required_size, 0);
        written = data.encode(&mut out[begin..]);
    }
    out.truncate(begin + written.map_err(invalid)?);
    Ok(())
}

/// A session that is not established yet.
struct Handshake<S> {
    session: Box<S>,
    incoming: Vec<u8>,
    /// What the peer sent right behind its last message.
    plain: Vec<u8>,
    outgoing: Vec<u8>,
}

impl<S: Session> Handshake<S> {
    /// Does what can be done without the peer; whether the handshake is done.
    fn step(&mut self) -> io::Result<bool> {
        let mut consumed = 0;
        let mut failed = None;
        let done = loop {
            let UnbufferedStatus { discard, state } = self.session.process(&mut self.incoming[consumed..]);
            consumed += discard;
            match state {
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.outgoing)?,
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        self.plain.extend_from_slice(record.map_err(invalid)?.payload);
                    }
                }
                Ok(ConnectionState::WriteTraffic(_)) => break !self.session.is_handshaking(),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(_) => break false,
                // Once more: its alert is due.
                Err(error) if failed.is_none() => failed = Some(error),
                Err(error) => return Err(refused(error)),
            }
        };
        if let Some(error) = failed {
            return Err(refused(error));
        }
        self.incoming.drain(..consumed);
        if done {
            self.incoming.shrink_to_fit();
        }
        Ok(done)
    }
}

impl<S: Session> TlsStream<S> {
    async fn handshake(mut socket: TcpStream, session: S, mut holds: impl FnMut(usize)) -> io::Result<Self> {
        let mut shaking = Handshake {
            session: Box::new(session),
            incoming: Vec::new(),
            plain: Vec::new(),
            outgoing: Vec::new(),
        };
        loop {
            let due = shaking.step();
            // An alert goes out before its reason is told.
            let outgoing = mem::take(&mut shaking.outgoing);
            if !outgoing.is_empty() {
                let sent = socket.write_all(&outgoing).await;
                if due.is_ok() {
                    sent?;
                }
            }
            holds(shaking.incoming.len());
            if due? {
                holds(0);
                return Ok(Self {
                    socket: Socket::new(socket.into_std()?)?,
                    session: shaking.session,
                    incoming: shaking.incoming,
                    plain: shaking.plain,
                    outgoing: Vec::new(),
                    sent: 0,
                    peer_closed: false,
                    closed: false,
                });
            }
            if shaking.incoming.len() > MAX_HANDSHAKE {
                return Err(invalid("a handshake message is larger than any needs to be"));
            }
            shaking.incoming.reserve(HANDSHAKE_READ);
            if socket.read_buf(&mut shaking.incoming).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Goes on on the thread that calls.
    ///
    /// # Errors
    ///
    /// What epoll_ctl(2) says.
    pub fn settle(&mut self) -> io::Result<()> {
        self.socket.settle()
    }

    /// What was agreed on, and who the peer is.
    pub fn state(&self) -> &CommonState {
        &self.session
    }

    /// Takes whole records from `records`: their content to `buffer` and what finds no room there to `plain`, answers to
    /// `outgoing`; how much was taken.
    fn take(&mut self, records: &mut [u8], buffer: &mut ReadBuf<'_>) -> io::Result<usize> {
        let mut consumed = 0;
        let mut failed = None;
        loop {
            let UnbufferedStatus { discard, state } = self.session.process(&mut records[consumed..]);
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let payload = record.map_err(invalid)?.payload;
                        // Behind what waits already, its order kept.
                        let room = if self.plain.is_empty() { buffer.remaining() } else { 0 };
                        let (fits, rest) = payload.split_at(room.min(payload.len()));
                        buffer.put_slice(fits);
                        self.plain.extend_from_slice(rest);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.outgoing)?,
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => self.peer_closed = true,
                Ok(_) => {
                    consumed += discard;
                    break;
                }
                // Once more: its alert is due.
                Err(error) if failed.is_none() => failed = Some(error),
                Err(_) => break,
            }
            consumed += discard;
        }
        match failed {
            Some(error) => Err(invalid(error)),
            None => Ok(consumed),
        }
    }

    /// Reads once from the socket; how many octets, 0 at its end.
    fn poll_fill(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        INCOMING.with_borrow_mut(|scratch| {
            let have = self.incoming.len();
            // A record decrypts to less than it was: what is read fits, but for readers with small buffers.
            let wanted = buffer.remaining().max(MAX_RECORD).min(scratch.len() - have);
            let count = ready!(self.socket.poll_read(context, &mut scratch[have..have + wanted]))?;
            if count == 0 {
                return Poll::Ready(Ok(0));
            }
            scratch[..have].copy_from_slice(&self.incoming);
            let records = &mut scratch[..have + count];
            let taken = self.take(records, buffer);
            if !self.outgoing.is_empty() {
                // What it cannot send now goes before the next write.
                let _ = self.poll_send(context)?;
            }
            let rest = &records[taken?..];
            if rest.len() > MAX_RECORD {
                return Poll::Ready(Err(invalid("a record is larger than any may be")));
            }
            self.incoming.clear();
            self.incoming.extend_from_slice(rest);
            if self.incoming.is_empty() {
                self.incoming = Vec::new();
            }
            Poll::Ready(Ok(count))
        })
    }

    /// Sends what is encrypted.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.outgoing.len() {
            let rest = &self.outgoing[self.sent..];
            let sent = ready!(self.socket.poll_write(context, rest))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += sent;
        }
        if self.sent > 0 {
            self.outgoing = Vec::new();
            self.sent = 0;
            self.socket.all_sent(context)?;
        }
        Poll::Ready(Ok(()))
    }

    /// Encrypts into `out`, and says how much that made.
    fn encrypt(&mut self, bytes: &[u8], out: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.process(&mut []).state.map_err(invalid)? {
                ConnectionState::WriteTraffic(mut traffic) => {
                    return traffic.encrypt(bytes, out).map_err(|error| match error {
                        EncryptError::EncryptExhausted => io::Error::other("the connection's keys are spent"),
                        EncryptError::InsufficientSize(_) => invalid(error),
                    });
                }
                ConnectionState::EncodeTlsData(data) => encode(data, &mut self.outgoing)?,
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed => self.peer_closed = true,
                _ => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }
}

impl<S: Session> AsyncRead for TlsStream<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.plain.is_empty() {
                let count = buffer.remaining().min(this.plain.len());
                buffer.put_slice(&this.plain[..count]);
                this.plain.drain(..count);
                if this.plain.is_empty() {
                    this.plain = Vec::new();
                }
                return Poll::Ready(Ok(()));
            }
            if this.peer_closed {
                return Poll::Ready(Ok(()));
            }
            let before = buffer.filled().len();
            if ready!(this.poll_fill(context, buffer))? == 0 {
                return Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the peer closed the connection without saying so in TLS",
                )));
            }
            if buffer.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: Session> AsyncWrite for TlsStream<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.outgoing.is_empty() {
            ready!(this.poll_send(context))?;
        }
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        OUTGOING.with_borrow_mut(|scratch| {
            let length = this.encrypt(chunk, scratch)?;
            let records = &scratch[..length];
            if !this.outgoing.is_empty() {
                // A key update goes first.
                this.outgoing.extend_from_slice(records);
                let _ = this.poll_send(context)?;
                return Poll::Ready(Ok(chunk.len()));
            }
            let sent = match this.socket.poll_write(context, records)? {
                Poll::Ready(sent) => sent,
                Poll::Pending => 0,
            };
            this.outgoing.extend_from_slice(&records[sent..]);
            Poll::Ready(Ok(chunk.len()))
        })
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !mem::replace(&mut this.closed, true)
            && let Ok(ConnectionState::WriteTraffic(mut traffic)) = this.session.process(&mut []).state
        {
            // An alert with its record's header and tag.
            let mut alert = [0; 64];
            if let Ok(length) = traffic.queue_close_notify(&mut alert) {
                this.outgoing.extend_from_slice(&alert[..length]);
            }
        }
        ready!(this.poll_send(context))?;
        match this.socket.shutdown() {
            // It was not ours to close any more.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            ended => Poll::Ready(ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::{RootCertStore, SupportedProtocolVersion, version};
    use tokio::net::TcpListener;

    use super::*;

    const NAME: &str = "kubernetes";

    fn configurations(protocol_version: &'static SupportedProtocolVersion) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let signed = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
        let mut roots = RootCertStore::empty();
        roots.add(signed.cert.der().clone()).expect("a root");
        let key = signed.signing_key.serialize_der().try_into().expect("a key");
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[protocol_version])
            .expect("a version")
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key)
            .expect("a pair");
        server.alpn_protocols = vec![b"h2".to_vec()];
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[protocol_version])
            .expect("a version")
            .with_root_certificates(roots)
            .with_no_client_auth();
        (Arc::new(server), Arc::new(client))
    }

    /// More than the kernel's buffers hold, and different everywhere.
    fn body() -> Vec<u8> {
        (0..12_000_000_u32).map(|index| (index / 251 + index) as u8).collect()
    }

    async fn pair(protocol_version: &'static SupportedProtocolVersion) -> (ServerStream, ClientStream) {
        let (server, client) = configurations(protocol_version);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let serving = async {
            let (socket, _) = listener.accept().await.expect("a connection");
            accept(server, socket, |_| {}).await.expect("a handshake")
        };
        let connecting = async {
            let socket = TcpStream::connect(address).await.expect("a connection");
            let name = ServerName::try_from(NAME).expect("a name");
            connect(client, name, b"h2", socket).await.expect("a handshake")
        };
        tokio::join!(serving, connecting)
    }

    #[tokio::test]
    async fn all_that_is_written_arrives_in_order_and_the_end_is_told() {
        for protocol_version in [&version::TLS12, &version::TLS13] {
            let (mut server, mut client) = pair(protocol_version).await;
            assert_eq!(server.state().alpn_protocol(), Some(&b"h2"[..]));
            assert_eq!(client.state().protocol_version(), Some(protocol_version.version));
            let writing = async {
                client.write_all(&body()).await.expect("the other end reads");
                client.shutdown().await.expect("an end");
                let mut answer = Vec::new();
                client
                    .read_to_end(&mut answer)
                    .await
                    .expect("the other end closes in order");
                answer
            };
            let reading = async {
                let mut seen = Vec::new();
                // A reader that has less room than a record, and one that has more.
                for room in [100, 70_000].into_iter().cycle() {
                    let mut part = vec![0; room];
                    let count = server.read(&mut part).await.expect("an end that is told");
                    if count == 0 {
                        break;
                    }
                    seen.extend_from_slice(&part[..count]);
                }
                server.write_all(b"all of it").await.expect("half is still open");
                server.shutdown().await.expect("an end");
                seen
            };
            let (answer, seen) = tokio::join!(writing, reading);
            assert!(seen == body(), "{} octets arrived, or others", seen.len());
            assert_eq!(answer, b"all of it");
            assert_eq!(
                server.incoming.capacity() + server.plain.capacity() + server.outgoing.capacity(),
                0
            );
            assert_eq!(
                client.incoming.capacity() + client.plain.capacity() + client.outgoing.capacity(),
                0
            );
        }
    }

    /// rustls's own client asks for new keys of both sides before each message (RFC 8446, section 4.6.3).
    #[tokio::test]
    async fn keys_change_between_two_messages_both_ways() {
        const ROUNDS: u8 = 20;
        const LENGTH: usize = 50_000;
        let (server, client) = configurations(&version::TLS13);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let peer = std::thread::spawn(move || {
            let name = ServerName::try_from(NAME).expect("a name");
            let mut session = rustls::ClientConnection::new(client, name).expect("a session");
            let mut socket = std::net::TcpStream::connect(address).expect("a connection");
            let mut stream = rustls::Stream::new(&mut session, &mut socket);
            for round in 0..ROUNDS {
                let said = [round; LENGTH];
                // The first makes the handshake, before which there is no key to change.
                if round > 0 {
                    stream.conn.refresh_traffic_keys().expect("keys that may change");
                }
                std::io::Write::write_all(&mut stream, &said).expect("the other end reads");
                let mut heard = [0; LENGTH];
                std::io::Read::read_exact(&mut stream, &mut heard).expect("an answer");
                assert!(heard == said, "round {round}");
            }
        });
        let (socket, _) = listener.accept().await.expect("a connection");
        let mut server = accept(server, socket, |_| {}).await.expect("a handshake");
        for round in 0..ROUNDS {
            let mut heard = vec![0; LENGTH];
            server.read_exact(&mut heard).await.expect("all of it");
            assert!(heard == [round; LENGTH], "round {round}");
            server.write_all(&heard).await.expect("the other end reads");
            server.flush().await.expect("it is sent");
        }
        peer.join().expect("it has heard what it said");
    }

    #[tokio::test]
    async fn a_connection_that_is_cut_does_not_look_ended() {
        let (mut server, client) = pair(&version::TLS13).await;
        client.socket.shutdown().expect("a connection to cut");
        let error = server.read(&mut [0; 16]).await.expect_err("no end was told");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
