//! HTTP/2 as octets on a wire, for scripted peers of either side.
//!
//! Constants are restated from RFC 9113 and RFC 7541, and nothing is shared with the product: a mistake made there is
//! not made here again. Must never answer anything by itself: the script does.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, RootCertStore, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};

use crate::{
    pki::{Pair, Pki, SERVER_NAME},
    process::end_at_once,
};

/// How long a scripted peer waits for an octet, or for room to write one, before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// RFC 9113, section 3.4.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// RFC 9113, section 6.
#[expect(missing_docs, reason = "the names are those of RFC 9113, section 6")]
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// RFC 9113, section 7.
#[expect(missing_docs, reason = "the names are those of RFC 9113, section 7")]
pub mod code {
    pub const NO_ERROR: u32 = 0;
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const FRAME_SIZE_ERROR: u32 = 6;
    pub const REFUSED_STREAM: u32 = 7;
    pub const CANCEL: u32 = 8;
    pub const COMPRESSION_ERROR: u32 = 9;
    pub const ENHANCE_YOUR_CALM: u32 = 11;
}

/// The flags END_STREAM and ACK.
pub const END_STREAM: u8 = 1;
/// The flag END_HEADERS.
pub const END_HEADERS: u8 = 4;
/// The flag PADDED.
pub const PADDED: u8 = 8;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// One of [`kind`].
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Stream.
    pub stream: u32,
    /// Payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The four octets at `at`, big endian.
    pub fn word(&self, at: usize) -> u32 {
        let octets = self.payload[at..at + 4].try_into().expect("four octets");
        u32::from_be_bytes(octets)
    }
}

/// A frame's octets.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a payload of less than 4 GiB");
    let mut octets = length.to_be_bytes()[1..].to_vec();
    octets.extend([kind, flags]);
    octets.extend(stream.to_be_bytes());
    octets.extend(payload);
    octets
}

/// Fields as literals without indexing and without Huffman coding (RFC 7541, section 6.2.2).
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut octets = Vec::new();
    for (name, value) in fields {
        octets.push(0);
        for text in [name, value] {
            integer(text.len(), 7, &mut octets);
            octets.extend(text.as_bytes());
        }
    }
    octets
}

/// An integer with a prefix of `bits` bits, the bits before it zero (RFC 7541, section 5.1).
pub fn integer(value: usize, bits: u32, octets: &mut Vec<u8>) {
    let mask = (1 << bits) - 1;
    if value < mask {
        octets.push(value as u8);
        return;
    }
    octets.push(mask as u8);
    let mut rest = value - mask;
    while rest >= 128 {
        octets.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    octets.push(rest as u8);
}

/// Reads a block that holds only what [`block`] writes, and literals that are never indexed.
///
/// # Panics
///
/// On anything else.
pub fn fields(block: &[u8]) -> Vec<(String, String)> {
    let mut rest = block;
    let mut list = Vec::new();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if first & 0xe0 == 0x20 {
            // A dynamic table size update.
            continue;
        }
        assert!(
            matches!(first, 0x00 | 0x10),
            "{first:#x} is not a plain literal with a new name"
        );
        let mut text = || {
            let mut length = usize::from(rest[0]);
            assert!(length < 128, "Huffman-coded");
            rest = &rest[1..];
            if length == 127 {
                let mut shift = 0;
                loop {
                    let octet = rest[0];
                    rest = &rest[1..];
                    length += usize::from(octet & 127) << shift;
                    shift += 7;
                    if octet < 128 {
                        break;
                    }
                }
            }
            let (text, after) = rest.split_at(length);
            rest = after;
            String::from_utf8(text.to_vec()).expect("UTF-8")
        };
        let name = text();
        list.push((name, text()));
    }
    list
}

/// A GET of that path.
pub fn get(path: &str) -> Vec<u8> {
    block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", SERVER_NAME),
        (":path", path),
    ])
}

/// The octets of a request without a body.
pub fn request(stream: u32, path: &str) -> Vec<u8> {
    frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &get(path))
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// One end of a TLS connection, read and written by a script.
pub struct Peer {
    stream: Box<dyn Stream>,
    socket: TcpStream,
    /// The protocol ALPN selected.
    pub protocol: Vec<u8>,
    /// Whether the other side brought a certificate.
    pub certified: bool,
    /// Whether the handshake resumed an earlier session.
    pub resumed: bool,
}

impl Peer {
    /// Connects as a client, with both of TLS's versions on offer.
    ///
    /// # Errors
    ///
    /// The connection or the handshake fails.
    pub fn connect(pki: &Pki, server: SocketAddr, identity: Option<&Pair>, protocol: &[u8]) -> anyhow::Result<Self> {
        let config = client_config(pki, identity, protocol)?;
        Self::connect_with(config, server)
    }

    /// Connects as a client with that configuration.
    ///
    /// # Errors
    ///
    /// The connection or the handshake fails.
    pub fn connect_with(config: ClientConfig, server: SocketAddr) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(server).with_context(|| format!("cannot connect to {server}"))?;
        Self::handshake(socket, config)
    }

    /// Goes on as a client on a socket that something was said on before.
    ///
    /// # Errors
    ///
    /// The handshake fails.
    pub fn over(socket: TcpStream, pki: &Pki, identity: Option<&Pair>, protocol: &[u8]) -> anyhow::Result<Self> {
        Self::handshake(socket, client_config(pki, identity, protocol)?)
    }

    /// Goes on as a client with that configuration on a socket of the caller's.
    ///
    /// # Errors
    ///
    /// The handshake fails.
    pub fn handshake(socket: TcpStream, config: ClientConfig) -> anyhow::Result<Self> {
        let socket = patient(socket)?;
        let mut tls = ClientConnection::new(Arc::new(config), ServerName::try_from(SERVER_NAME)?)?;
        tls.complete_io(&mut &socket).context("the client's handshake")?;
        let protocol = tls.alpn_protocol().unwrap_or_default().to_vec();
        let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
        Ok(Self {
            stream: Box::new(StreamOwned::new(tls, socket.try_clone()?)),
            socket,
            protocol,
            certified: true,
            resumed,
        })
    }

    /// Octets without TLS.
    ///
    /// # Errors
    ///
    /// The socket takes no options.
    pub fn plain(socket: TcpStream) -> anyhow::Result<Self> {
        let socket = patient(socket)?;
        Ok(Self {
            stream: Box::new(socket.try_clone()?),
            socket,
            protocol: Vec::new(),
            certified: false,
            resumed: false,
        })
    }

    /// Accepts as a server.
    ///
    /// # Errors
    ///
    /// The handshake fails.
    pub fn accept(mut tls: ServerConnection, socket: TcpStream) -> anyhow::Result<Self> {
        end_at_once();
        let socket = patient(socket)?;
        tls.complete_io(&mut &socket).context("the server's handshake")?;
        let protocol = tls.alpn_protocol().unwrap_or_default().to_vec();
        let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
        let certified = tls.peer_certificates().is_some();
        Ok(Self {
            stream: Box::new(StreamOwned::new(tls, socket.try_clone()?)),
            socket,
            protocol,
            certified,
            resumed,
        })
    }

    /// Its own address and port.
    pub fn local(&self) -> SocketAddr {
        self.socket.local_addr().expect("a connected socket")
    }

    /// Sends octets.
    pub fn send(&mut self, octets: &[u8]) {
        self.try_send(octets).expect("the other side takes them");
    }

    /// Sends octets, or says why not.
    ///
    /// # Errors
    ///
    /// The connection has ended, or there was no room for [`PATIENCE`] or [`Self::impatient`]'s time.
    pub fn try_send(&mut self, octets: &[u8]) -> io::Result<()> {
        self.stream.write_all(octets)?;
        self.stream.flush()
    }

    /// Sends as many of these octets as there is room for, and says how many.
    ///
    /// # Errors
    ///
    /// The connection has ended, or there was no room for a single one in time.
    pub fn try_write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.stream.write(octets)
    }

    /// What it is spoken over.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// From now on a write or a read that finds nothing for so long is given up.
    pub fn impatient(&self, patience: Duration) {
        self.socket.set_write_timeout(Some(patience)).expect("a socket option");
        self.socket.set_read_timeout(Some(patience)).expect("a socket option");
    }

    /// Reads exactly so many octets, or says why not.
    ///
    /// # Errors
    ///
    /// The connection has ended, or nothing came in time.
    pub fn try_read(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut octets = vec![0; count];
        self.stream.read_exact(&mut octets)?;
        Ok(octets)
    }

    /// Reads exactly so many octets.
    pub fn read(&mut self, count: usize) -> Vec<u8> {
        self.try_read(count).expect("octets in time")
    }

    /// Reads an HTTP/1.1 head: up to and with the empty line.
    pub fn read_head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.extend(self.read(1));
        }
        String::from_utf8(head).expect("UTF-8")
    }

    /// The next frame; `None` at the end of the connection, however it ends.
    ///
    /// # Errors
    ///
    /// Nothing came in time.
    pub fn try_next(&mut self) -> io::Result<Option<Frame>> {
        let mut head = [0; 9];
        match self.stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if is_end(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, l0, l1, l2]) as usize];
        match self.stream.read_exact(&mut payload) {
            Ok(()) => {}
            Err(error) if is_end(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        Ok(Some(Frame {
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            payload,
        }))
    }

    /// The next frame, which must come.
    pub fn receive(&mut self) -> Frame {
        self.try_next()
            .expect("a frame in time")
            .expect("a frame and not the end of the connection")
    }

    /// The next frame, which must be of that kind.
    pub fn expect(&mut self, kind: u8) -> Frame {
        let frame = self.receive();
        assert_eq!(frame.kind, kind, "{frame:?}");
        frame
    }

    /// Every frame up to the end of the connection, which must come.
    pub fn rest(&mut self) -> Vec<Frame> {
        std::iter::from_fn(|| self.try_next().expect("the end in time")).collect()
    }

    /// Sends what a client begins with.
    pub fn begin_client(&mut self, settings: &[u8]) {
        self.try_begin_client(settings).expect("the other side takes it");
    }

    /// Sends what a client begins with, or says why not.
    ///
    /// # Errors
    ///
    /// As [`Self::try_send`].
    pub fn try_begin_client(&mut self, settings: &[u8]) -> io::Result<()> {
        self.try_send(&[PREFACE, &frame(kind::SETTINGS, 0, 0, settings)].concat())
    }

    /// Reads what a client begins with, and answers as a server: SETTINGS, and the acknowledgement of the client's.
    pub fn begin_server(&mut self) {
        assert_eq!(self.read(PREFACE.len()), PREFACE);
        let settings = self.expect(kind::SETTINGS);
        assert_eq!(settings.flags, 0);
        self.send(
            &[
                frame(kind::SETTINGS, 0, 0, &[]),
                frame(kind::SETTINGS, END_STREAM, 0, &[]),
            ]
            .concat(),
        );
    }

    /// Ends the sending side in order: TLS's close_notify is not needed for that.
    pub fn shut_down(&self) {
        // It may have ended already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// A client's configuration that trusts the cluster's authority.
///
/// # Errors
///
/// A file cannot be read.
pub fn client_config(pki: &Pki, identity: Option<&Pair>, protocol: &[u8]) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(pki.file("ca.crt"))? {
        roots.add(certificate?)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            // Any certificate is shown, also one that rustls itself would not take.
            let chain = CertificateDer::pem_file_iter(&pair.certificate)?.collect::<Result<Vec<_>, _>>()?;
            let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&PrivateKeyDer::from_pem_file(&pair.key)?)?;
            let certified = rustls::sign::CertifiedKey::new(chain, key);
            builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)))
        }
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

fn patient(socket: TcpStream) -> io::Result<TcpStream> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}
