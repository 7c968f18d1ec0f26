//! Why a connection cannot be relayed any further, as RFC 9113 names it.

/// The error codes of RFC 9113, section 7, that the relay itself sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// Graceful shutdown.
    NoError = 0x0,
    /// The peer broke the protocol.
    ProtocolError = 0x1,
    /// A frame on a stream whose sender had ended it.
    StreamClosed = 0x5,
    /// A frame has a size that its type does not allow.
    FrameSizeError = 0x6,
    /// The stream was not processed: the client may send the request again.
    RefusedStream = 0x7,
    /// The stream is no longer wanted.
    Cancel = 0x8,
    /// A header block cannot be decoded.
    CompressionError = 0x9,
    /// The peer asks for more than it may.
    EnhanceYourCalm = 0xb,
}

/// The end of a connection, for one peer's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} (RFC 9113 error code {:#x})", *code as u32)]
pub struct ConnectionError {
    /// What the GOAWAY says.
    pub code: ErrorCode,
    /// What was wrong, in words.
    pub what: &'static str,
}

impl ConnectionError {
    pub(super) const fn protocol(what: &'static str) -> Self {
        Self {
            code: ErrorCode::ProtocolError,
            what,
        }
    }

    pub(super) const fn compression(what: &'static str) -> Self {
        Self {
            code: ErrorCode::CompressionError,
            what,
        }
    }

    pub(super) const fn size(what: &'static str) -> Self {
        Self {
            code: ErrorCode::FrameSizeError,
            what,
        }
    }

    pub(super) const fn calm(what: &'static str) -> Self {
        Self {
            code: ErrorCode::EnhanceYourCalm,
            what,
        }
    }
}
