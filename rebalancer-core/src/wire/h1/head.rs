//! Heads of requests and answers (RFC 9112, sections 2 to 5), as Go's net/http reads them.
//!
//! Input: a head's octets, up to and with its empty line. Output: its parts, borrowed.
//! Must never judge what the server judges: a target, a method, a version or a value goes on as it came unless it could
//! be taken for the end of its line.

use super::body::Framing;
use crate::wire::{
    flow::{self, Flow},
    h2::relay::is_refusal,
};

/// What is wrong with a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Not `METHOD TARGET HTTP/1.x`.
    #[error("malformed request line")]
    RequestLine,
    /// Not `HTTP/1.x NNN REASON`.
    #[error("malformed status line")]
    StatusLine,
    /// No name and colon, an octet that no name has, or a line that goes on nothing.
    #[error("malformed field")]
    Field,
    /// A control character in a value.
    #[error("a field's value holds a control character")]
    Value,
    /// More than one length, or one that is no number.
    #[error("malformed Content-Length")]
    ContentLength,
    /// Anything but one `chunked`, or one of HTTP/1.0.
    #[error("unsupported Transfer-Encoding")]
    TransferEncoding,
}

/// Finds where a head ends while it arrives, and looks at no octet twice.
#[derive(Debug, Default)]
pub struct Finder {
    scanned: usize,
    /// Where the line begins that is still coming.
    line: usize,
    lines: usize,
}

impl Finder {
    /// The length of the head that `octets` begin with, once it is there whole: up to the first empty line. A head that
    /// begins with one is none, for Go too, although RFC 9112, section 2.2, would have it skipped.
    pub fn find(&mut self, octets: &[u8]) -> Option<usize> {
        while let Some(at) = octets[self.scanned..].iter().position(|octet| *octet == b'\n') {
            let end = self.scanned + at;
            let empty = matches!(&octets[self.line..end], b"" | b"\r");
            self.lines += 1;
            self.scanned = end + 1;
            self.line = end + 1;
            if empty {
                return Some(end + 1);
            }
        }
        self.scanned = octets.len();
        None
    }

    /// How many lines are whole so far.
    pub fn lines(&self) -> usize {
        self.lines
    }
}

/// One field. A value that went over several lines is joined with spaces, as Go joins it and RFC 9112, section 5.2, says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field<'h> {
    /// As it came: case is kept.
    pub name: &'h [u8],
    /// Without the white space around it.
    pub value: std::borrow::Cow<'h, [u8]>,
}

impl Field<'_> {
    /// Whether this is its name, in any case.
    pub fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name.as_bytes())
    }

    fn tokens(&self) -> impl Iterator<Item = &[u8]> {
        self.value.split(|octet| *octet == b',').map(<[u8]>::trim_ascii)
    }
}

/// A request's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead<'h> {
    /// As it came.
    pub method: &'h [u8],
    /// As it came.
    pub target: &'h [u8],
    /// The digit after `HTTP/1.`.
    pub minor: u8,
    /// In order.
    pub fields: Vec<Field<'h>>,
}

/// An answer's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerHead<'h> {
    /// The whole first line without its end.
    pub line: &'h [u8],
    /// 100 to 999.
    pub status: u16,
    /// The digit after `HTTP/1.`.
    pub minor: u8,
    /// In order.
    pub fields: Vec<Field<'h>>,
}

/// A character of a method or a field's name (RFC 9110, section 5.6.2).
fn is_token(octets: &[u8]) -> bool {
    let is_one = |octet: &u8| octet.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(octet);
    !octets.is_empty() && octets.iter().all(is_one)
}

fn is_value(octets: &[u8]) -> bool {
    octets.iter().all(|octet| *octet == b'\t' || !octet.is_ascii_control())
}

fn minor_of(version: &[u8]) -> Option<u8> {
    match version {
        b"HTTP/1.0" => Some(0),
        b"HTTP/1.1" => Some(1),
        _ => None,
    }
}

/// The lines of a head without their ends, empty ones left out.
fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    head.split(|octet| *octet == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter(|line| !line.is_empty())
}

fn fields<'h>(lines: impl Iterator<Item = &'h [u8]>) -> Result<Vec<Field<'h>>, HeadError> {
    let mut fields: Vec<Field<'h>> = Vec::new();
    for line in lines {
        if !is_value(line) {
            return Err(HeadError::Value);
        }
        if line.starts_with(b" ") || line.starts_with(b"\t") {
            let value = fields.last_mut().ok_or(HeadError::Field)?.value.to_mut();
            let more = line.trim_ascii();
            // To Go the value ends with a space then, which no line of its own could say.
            if more.is_empty() {
                return Err(HeadError::Field);
            }
            if !value.is_empty() {
                value.push(b' ');
            }
            value.extend_from_slice(more);
            continue;
        }
        let colon = line.iter().position(|octet| *octet == b':').ok_or(HeadError::Field)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if !is_token(name) {
            return Err(HeadError::Field);
        }
        let value = value.into();
        fields.push(Field { name, value });
    }
    Ok(fields)
}

fn named<'f, 'h>(fields: &'f [Field<'h>], name: &'static str) -> impl Iterator<Item = &'f Field<'h>> {
    fields.iter().filter(move |field| field.is(name))
}

fn has_token(fields: &[Field<'_>], name: &'static str, token: &str) -> bool {
    named(fields, name)
        .flat_map(Field::tokens)
        .any(|found| found.eq_ignore_ascii_case(token.as_bytes()))
}

/// The length that `Content-Length` gives: the same value may stand there several times, as Go takes it.
fn content_length(fields: &[Field<'_>]) -> Result<Option<u64>, HeadError> {
    let mut length = None;
    for field in named(fields, "content-length") {
        let digits = std::str::from_utf8(&field.value).map_err(|_| HeadError::ContentLength)?;
        let is_number = !digits.is_empty() && digits.bytes().all(|octet| octet.is_ascii_digit());
        let value = digits
            .parse::<u64>()
            .ok()
            .filter(|value| is_number && *value <= i64::MAX as u64);
        let value = value.ok_or(HeadError::ContentLength)?;
        if length.is_some_and(|before| before != value) {
            return Err(HeadError::ContentLength);
        }
        length = Some(value);
    }
    Ok(length)
}

impl<'h> RequestHead<'h> {
    /// Reads a head that [`Finder`] found.
    ///
    /// # Errors
    ///
    /// See [`HeadError`].
    pub fn parse(head: &'h [u8]) -> Result<Self, HeadError> {
        let mut lines = lines(head);
        let line = lines.next().ok_or(HeadError::RequestLine)?;
        // Two spaces, and no more: as Go cuts it.
        let mut parts = line.split(|octet| *octet == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(HeadError::RequestLine);
        };
        let minor = minor_of(version).ok_or(HeadError::RequestLine)?;
        // The server says what a target may be; here it must only stay one.
        let target_is_one = !target.is_empty() && !target.iter().any(u8::is_ascii_control);
        if !is_token(method) || !target_is_one {
            return Err(HeadError::RequestLine);
        }
        Ok(Self {
            method,
            target,
            minor,
            fields: fields(lines)?,
        })
    }

    /// Where its body ends.
    ///
    /// # Errors
    ///
    /// Said in a way that the server might understand otherwise.
    pub fn framing(&self) -> Result<Framing, HeadError> {
        let length = content_length(&self.fields)?;
        let mut codings = named(&self.fields, "transfer-encoding");
        match (codings.next(), codings.next()) {
            (None, _) => Ok(length.map_or(Framing::None, Framing::Length)),
            // A length beside it is no longer said (RFC 9112, section 6.3).
            (Some(coding), None) if self.minor == 1 && coding.value.eq_ignore_ascii_case(b"chunked") => {
                Ok(Framing::Chunked)
            }
            _ => Err(HeadError::TransferEncoding),
        }
    }

    /// Whether it wants to speak something else from here on.
    pub fn upgrades(&self) -> bool {
        has_token(&self.fields, "connection", "upgrade") && named(&self.fields, "upgrade").next().is_some()
    }

    /// The value of the first field of that name.
    pub fn value(&self, name: &str) -> Option<&[u8]> {
        let first = self.fields.iter().find(|field| field.is(name));
        first.map(|field| &*field.value)
    }

    /// The values of the fields of that name, in order.
    pub fn values(&self, name: &'static str) -> impl Iterator<Item = &[u8]> {
        named(&self.fields, name).map(|field| &*field.value)
    }

    /// Writes what goes on to the server: the line as it came, the fields that `passes` lets through, the connection
    /// options a server acts on, how the body is sent on, and `more` (complete lines).
    ///
    /// Trailers do not go on, so nothing announces or asks for them. A field that the client's `Connection` names is
    /// none of its hop's: it goes on, as the server would have seen it.
    pub fn write(&self, framing: Framing, mut passes: impl FnMut(&Field<'h>) -> bool, more: &[u8], out: &mut Vec<u8>) {
        const OF_THE_HOP: [&str; 7] = [
            "connection",
            "content-length",
            "keep-alive",
            "proxy-connection",
            "te",
            "trailer",
            "transfer-encoding",
        ];
        for part in [
            self.method,
            b" ",
            self.target,
            b" HTTP/1.",
            &[b'0' + self.minor],
            b"\r\n",
        ] {
            out.extend_from_slice(part);
        }
        for field in &self.fields {
            if !OF_THE_HOP.iter().any(|name| field.is(name)) && passes(field) {
                write_field(field.name, &field.value, out);
            }
        }
        for option in ["close", "keep-alive", "upgrade"] {
            if has_token(&self.fields, "connection", option) {
                write_field(b"Connection", option.as_bytes(), out);
            }
        }
        match framing {
            Framing::None | Framing::UntilClose => {}
            Framing::Length(length) => write_field(b"Content-Length", length.to_string().as_bytes(), out),
            Framing::Chunked => write_field(b"Transfer-Encoding", b"chunked", out),
        }
        out.extend_from_slice(more);
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends a field's line.
pub fn write_field(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    debug_assert!(is_token(name) && is_value(value), "a line of its own");
    for part in [name, b": ", value, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

impl<'h> AnswerHead<'h> {
    /// Reads a head that [`Finder`] found.
    ///
    /// # Errors
    ///
    /// See [`HeadError`].
    pub fn parse(head: &'h [u8]) -> Result<Self, HeadError> {
        let mut lines = lines(head);
        let line = lines.next().ok_or(HeadError::StatusLine)?;
        let mut parts = line.splitn(3, |octet| *octet == b' ');
        let minor = parts.next().and_then(minor_of).ok_or(HeadError::StatusLine)?;
        let status = parts.next().filter(|digits| digits.len() == 3);
        let status = status.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        let status = status.filter(|status| *status >= 100).ok_or(HeadError::StatusLine)?;
        if !is_value(line) {
            return Err(HeadError::StatusLine);
        }
        Ok(Self {
            line,
            status,
            minor,
            fields: fields(lines)?,
        })
    }

    /// Whether another head follows for the same request.
    pub fn is_interim(&self) -> bool {
        self.status < 200 && self.status != 101
    }

    /// Where its body ends (RFC 9112, section 6.3).
    ///
    /// # Errors
    ///
    /// It cannot be told.
    pub fn framing(&self, to_head: bool) -> Result<Framing, HeadError> {
        if to_head || self.status < 200 || matches!(self.status, 204 | 304) {
            return Ok(Framing::None);
        }
        if named(&self.fields, "transfer-encoding").next().is_some() {
            return if has_token(&self.fields, "transfer-encoding", "chunked") {
                Ok(Framing::Chunked)
            } else {
                Ok(Framing::UntilClose)
            };
        }
        Ok(content_length(&self.fields)?.map_or(Framing::UntilClose, Framing::Length))
    }

    /// Whether the server ends the connection after it.
    pub fn closes(&self) -> bool {
        has_token(&self.fields, "connection", "close")
            || self.minor == 0 && !has_token(&self.fields, "connection", "keep-alive")
    }

    /// The flow of its request, where the apiserver names it.
    pub fn flow(&self) -> Option<Flow> {
        let value = |name| named(&self.fields, name).next().map(|field| &*field.value);
        Flow::of(value(flow::SCHEMA), value(flow::LEVEL))
    }

    /// Whether it refuses a request for overload (see [`is_refusal`]).
    pub fn is_refusal(&self) -> bool {
        let says_when = named(&self.fields, "retry-after").next().is_some();
        let kind = named(&self.fields, "content-type").next();
        is_refusal(
            self.status.to_string().as_bytes(),
            says_when,
            kind.map(|field| field.value.as_ref()),
        )
    }

    /// Writes it with `Connection: close`, whatever it said of the connection.
    pub fn write_closing(&self, out: &mut Vec<u8>) {
        for part in [self.line, b"\r\n"] {
            out.extend_from_slice(part);
        }
        let kept = self.fields.iter();
        for field in kept.filter(|field| !field.is("connection") && !field.is("keep-alive")) {
            write_field(field.name, &field.value, out);
        }
        write_field(b"Connection", b"close", out);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(head: &[u8]) -> String {
        let head = RequestHead::parse(head).expect("a head");
        let framing = head.framing().expect("a framing");
        let mut out = Vec::new();
        let passes = |field: &Field<'_>| !field.name.to_ascii_lowercase().starts_with(b"x-remote-");
        head.write(framing, passes, b"x-remote-user: a\r\n", &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn a_head_is_found_at_any_cut_and_only_when_it_is_whole() {
        for head in [
            &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
            b"\r\n",
            b"GET / HTTP/1.1\nHost: a\n\n",
        ] {
            let mut more = head.to_vec();
            more.extend(b"body\r\n\r\n");
            let mut finder = Finder::default();
            for cut in 0..=more.len() {
                let found = finder.find(&more[..cut]);
                assert_eq!(found, (cut >= head.len()).then_some(head.len()), "{cut}");
                if found.is_some() {
                    break;
                }
            }
        }
    }

    #[test]
    fn what_the_server_judges_goes_on_as_it_came() {
        // Octets that Go's url.ParseRequestURI takes, and a method of its own.
        let mut head = b"pAtCh /a\"<>^`{|}\\\xff\xc3\xa9%20?q=<1>#f HTTP/1.1\r\nHost: a\r\nX-Case: B\r\n".to_vec();
        head.extend(b"Odd:\t v\xe9 \r\nFolded: one\r\n  two\r\n\r\n");
        assert_eq!(
            passed(&head),
            String::from_utf8_lossy(
                b"pAtCh /a\"<>^`{|}\\\xff\xc3\xa9%20?q=<1>#f HTTP/1.1\r\nHost: a\r\nX-Case: B\r\nOdd: v\xe9\r\n\
                  Folded: one two\r\nx-remote-user: a\r\n\r\n"
            )
        );
    }

    #[test]
    fn trailers_and_the_hops_own_options_do_not_go_on() {
        let went = passed(
            b"POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTrailer: X-Remote-User\r\nConnection: X-Remote-Group, Upgrade\r\n\
              Connection: authorization\r\nUpgrade: SPDY/3.1\r\nAuthorization: Bearer t\r\nX-REMOTE-user: root\r\n\
              Transfer-Encoding: Chunked\r\nContent-Length: 3\r\n\r\n",
        );
        let lines: Vec<&str> = went.split("\r\n").collect();
        assert_eq!(
            lines,
            [
                "POST / HTTP/1.1",
                "Host: a",
                "Upgrade: SPDY/3.1",
                "Authorization: Bearer t",
                "Connection: upgrade",
                "Transfer-Encoding: chunked",
                "x-remote-user: a",
                "",
                ""
            ]
        );
    }

    #[test]
    fn heads_that_two_readers_could_take_differently_are_refused() {
        let refused = |head: &[u8]| match RequestHead::parse(head) {
            Err(error) => error,
            Ok(head) => head.framing().expect_err("it is refused"),
        };
        let cases: [(&[u8], HeadError); 16] = [
            (b"GET  / HTTP/1.1\r\n\r\n", HeadError::RequestLine),
            (b"GET / HTTP/1.1 x\r\n\r\n", HeadError::RequestLine),
            (b"GET / HTTP/2.0\r\n\r\n", HeadError::RequestLine),
            (b"GET /\r\n\r\n", HeadError::RequestLine),
            (b"GE(T / HTTP/1.1\r\n\r\n", HeadError::RequestLine),
            (b"GET /a\rb HTTP/1.1\r\n\r\n", HeadError::RequestLine),
            (b"GET / HTTP/1.1\r\n folded: a\r\n\r\n", HeadError::Field),
            (b"GET / HTTP/1.1\r\nX-Remote-User : a\r\n\r\n", HeadError::Field),
            (b"GET / HTTP/1.1\r\n: a\r\n\r\n", HeadError::Field),
            (b"GET / HTTP/1.1\r\nhost\r\n\r\n", HeadError::Field),
            (b"GET / HTTP/1.1\r\na: b\rc\r\n\r\n", HeadError::Value),
            (b"GET / HTTP/1.1\r\na: b\0\r\n\r\n", HeadError::Value),
            (
                b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                HeadError::ContentLength,
            ),
            (
                b"GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
                HeadError::ContentLength,
            ),
            (
                b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
                HeadError::TransferEncoding,
            ),
            (
                b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
                HeadError::TransferEncoding,
            ),
        ];
        for (head, expected) in cases {
            assert_eq!(refused(head), expected, "{}", String::from_utf8_lossy(head));
        }
    }

    #[test]
    fn an_answers_body_ends_where_the_rfc_says() {
        let framing = |head: &str, to_head| {
            AnswerHead::parse(head.as_bytes())
                .expect("a head")
                .framing(to_head)
                .expect("a framing")
        };
        assert_eq!(
            framing("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", false),
            Framing::Length(7)
        );
        assert_eq!(
            framing("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", true),
            Framing::None
        );
        assert_eq!(framing("HTTP/1.1 204 No Content\r\n\r\n", false), Framing::None);
        assert_eq!(
            framing("HTTP/1.1 304\r\nContent-Length: 7\r\n\r\n", false),
            Framing::None
        );
        assert_eq!(framing("HTTP/1.1 200 OK\r\n\r\n", false), Framing::UntilClose);
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 7\r\n\r\n";
        assert_eq!(framing(chunked, false), Framing::Chunked);
    }

    #[test]
    fn an_answer_is_told_to_be_the_last() {
        let came =
            b"HTTP/1.1 200 Fine\r\nWarning: 1\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nWarning: 2\r\n\r\n";
        let head = AnswerHead::parse(came).expect("a head");
        assert!(!head.closes());
        let mut out = Vec::new();
        head.write_closing(&mut out);
        let went = b"HTTP/1.1 200 Fine\r\nWarning: 1\r\nWarning: 2\r\nConnection: close\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&out), String::from_utf8_lossy(went));
        assert!(AnswerHead::parse(&out).expect("a head").closes());
        assert!(AnswerHead::parse(b"HTTP/1.0 200 OK\r\n\r\n").expect("a head").closes());
    }
}
