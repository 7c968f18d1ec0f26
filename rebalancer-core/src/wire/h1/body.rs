//! Where a body ends (RFC 9112, sections 6 and 7).
//!
//! Input: octets as they arrive. Output: how many belong to the body, and for requests the octets that go on.
//! Must never let a request's trailers or chunk extensions on: the server would read them after the fields were checked.

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// After so many octets.
    Length(u64),
    /// By a chunk of length zero.
    Chunked,
    /// With the connection; answers only.
    UntilClose,
}

/// A chunk's line or the trailers may not be longer than this many octets.
const MAX_LINE: usize = 16 * 1024;

/// A chunked body that is none, or one whose lines are too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed chunked body")]
pub struct ChunkError;

/// What is done with the octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// They go on as they came.
    Verbatim,
    /// Chunks go on without extensions and trailers.
    Bare,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Length(u64),
    UntilClose,
    /// In a chunk's first line.
    Size(Line),
    Data(u64),
    /// After a chunk's data.
    DataEnd(u8),
    /// In a line of the trailers.
    Trailer(Line),
    Done,
}

/// A line that is still coming.
#[derive(Debug, Default, PartialEq, Eq)]
struct Line {
    /// The number it begins with.
    size: u64,
    digits: u8,
    /// Octets so far, its end included.
    length: usize,
    /// Behind the number.
    behind: bool,
    cr: bool,
}

/// Follows one body.
#[derive(Debug, PartialEq, Eq)]
pub struct Body {
    state: State,
    passing: Passing,
    /// Octets of trailers so far.
    trailers: usize,
}

impl Body {
    /// A body that has not begun.
    pub fn new(framing: Framing, passing: Passing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size(Line::default()),
            Framing::UntilClose => State::UntilClose,
        };
        Self {
            state,
            passing,
            trailers: 0,
        }
    }

    /// Whether all of it has been taken.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether the connection's end is its end.
    pub fn is_until_close(&self) -> bool {
        self.state == State::UntilClose
    }

    /// Takes octets and appends what goes on; says how many were the body's. The rest is the next message's.
    ///
    /// # Errors
    ///
    /// [`ChunkError`]: where the body ends cannot be told.
    pub fn take(&mut self, octets: &[u8], out: &mut Vec<u8>) -> Result<usize, ChunkError> {
        let mut taken = 0;
        while taken < octets.len() && !self.is_done() {
            let rest = &octets[taken..];
            taken += match &mut self.state {
                State::Done => 0,
                State::UntilClose => {
                    out.extend_from_slice(rest);
                    rest.len()
                }
                State::Length(left) | State::Data(left) => {
                    let count = usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                    out.extend_from_slice(&rest[..count]);
                    *left -= count as u64;
                    if *left == 0 {
                        let chunked = matches!(self.state, State::Data(_));
                        self.state = if chunked { State::DataEnd(0) } else { State::Done };
                    }
                    count
                }
                State::Size(_) | State::DataEnd(_) | State::Trailer(_) => {
                    self.control(rest[0], out)?;
                    1
                }
            };
        }
        debug_assert!(taken == octets.len() || self.is_done(), "nothing of the body is left");
        Ok(taken)
    }

    /// One octet between the data.
    fn control(&mut self, octet: u8, out: &mut Vec<u8>) -> Result<(), ChunkError> {
        if self.passing == Passing::Verbatim {
            out.push(octet);
        }
        let next = match &mut self.state {
            State::Size(line) => {
                if !line.take(octet)? {
                    return Ok(());
                }
                if line.digits == 0 {
                    return Err(ChunkError);
                }
                let size = line.size;
                if self.passing == Passing::Bare && size > 0 {
                    out.extend_from_slice(format!("{size:x}\r\n").as_bytes());
                }
                if size > 0 {
                    State::Data(size)
                } else {
                    State::Trailer(Line::default())
                }
            }
            State::DataEnd(seen) => match (*seen, octet) {
                (0, b'\r') => State::DataEnd(1),
                (1, b'\n') => {
                    if self.passing == Passing::Bare {
                        out.extend_from_slice(b"\r\n");
                    }
                    State::Size(Line::default())
                }
                _ => return Err(ChunkError),
            },
            State::Trailer(line) => {
                self.trailers += 1;
                if self.trailers > MAX_LINE {
                    return Err(ChunkError);
                }
                if !line.end(octet)? {
                    return Ok(());
                }
                if line.length == 2 {
                    if self.passing == Passing::Bare {
                        out.extend_from_slice(b"0\r\n\r\n");
                    }
                    State::Done
                } else {
                    State::Trailer(Line::default())
                }
            }
            State::Length(_) | State::UntilClose | State::Data(_) | State::Done => return Ok(()),
        };
        self.state = next;
        Ok(())
    }
}

impl Line {
    /// Takes an octet; `true` at the end, which is CRLF and nothing else.
    fn end(&mut self, octet: u8) -> Result<bool, ChunkError> {
        self.length += 1;
        match (self.cr, octet) {
            (true, b'\n') => Ok(true),
            (true, _) | (false, b'\n') => Err(ChunkError),
            _ if self.length > MAX_LINE => Err(ChunkError),
            (false, b'\r') => {
                self.cr = true;
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    /// The same in a chunk's line: a hexadecimal number, and whatever is behind it.
    fn take(&mut self, octet: u8) -> Result<bool, ChunkError> {
        let ended = self.end(octet)?;
        if ended || self.cr || self.behind {
            return Ok(ended);
        }
        match char::from(octet).to_digit(16) {
            Some(digit) if self.digits < 15 => {
                self.size = self.size << 4 | u64::from(digit);
                self.digits += 1;
            }
            None if self.digits > 0 && matches!(octet, b';' | b' ' | b'\t') => self.behind = true,
            _ => return Err(ChunkError),
        }
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same at every cut.
    fn taken(passing: Passing, octets: &[u8]) -> (Vec<u8>, usize) {
        let mut whole = Vec::new();
        let mut body = Body::new(Framing::Chunked, passing);
        let count = body.take(octets, &mut whole).expect("chunks");
        assert!(body.is_done());
        for cut in 0..count {
            let mut body = Body::new(Framing::Chunked, passing);
            let mut out = Vec::new();
            assert_eq!(body.take(&octets[..cut], &mut out), Ok(cut));
            assert!(!body.is_done());
            assert_eq!(body.take(&octets[cut..], &mut out), Ok(count - cut));
            assert_eq!(out, whole, "{cut}");
        }
        (whole, count)
    }

    #[test]
    fn a_requests_chunks_go_on_without_extensions_and_trailers() {
        let came = b"3;x=\"y\"\r\nabc\r\n00A \r\n0123456789\r\n0;z\r\nX-Remote-User: root\r\nb: c\r\n\r\nGET / ";
        let (went, count) = taken(Passing::Bare, came);
        assert_eq!(went, b"3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n");
        assert_eq!(&came[count..], b"GET / ");
    }

    #[test]
    fn an_answers_chunks_go_on_as_they_came() {
        let came = b"3;x\r\nabc\r\n0\r\nChecksum: 1\r\n\r\n";
        let (went, count) = taken(Passing::Verbatim, came);
        assert_eq!((&went[..], count), (&came[..], came.len()));
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for octets in [
            &b"\r\n"[..],
            b"g\r\n",
            b"-1\r\n",
            b"0x1\r\n",
            b"1\nabc",
            b"1\r\nab",
            b"1\r\na\n",
            b"1\rx",
            b"1000000000000000\r\n",
            b"0\r\na: b\nc: d\r\n",
        ] {
            let mut body = Body::new(Framing::Chunked, Passing::Bare);
            let refused = body.take(octets, &mut Vec::new());
            assert_eq!(refused, Err(ChunkError), "{}", String::from_utf8_lossy(octets));
        }
        let endless = [b"0\r\n".to_vec(), b"a: b\r\n".repeat(MAX_LINE)].concat();
        assert!(
            Body::new(Framing::Chunked, Passing::Bare)
                .take(&endless, &mut Vec::new())
                .is_err()
        );
        let wide = [b"1;".to_vec(), vec![b'x'; 2 * MAX_LINE]].concat();
        assert!(
            Body::new(Framing::Chunked, Passing::Bare)
                .take(&wide, &mut Vec::new())
                .is_err()
        );
    }

    #[test]
    fn a_length_is_counted_and_the_rest_left() {
        let mut body = Body::new(Framing::Length(5), Passing::Bare);
        let mut out = Vec::new();
        assert_eq!(body.take(b"abc", &mut out), Ok(3));
        assert_eq!(body.take(b"defgh", &mut out), Ok(2));
        assert_eq!((&out[..], body.is_done()), (&b"abcde"[..], true));
        assert!(Body::new(Framing::None, Passing::Bare).is_done());
    }
}
