//! HTTP/1.1 message framing, strictly (RFC 9112): where a head ends, how long its body is, where that ends.
//! Pure: bytes in, verdict out.

use std::io;

/// Why a message is refused with 400 (431 when too large).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A line ends in LF without CR, or holds a CR that ends no line.
    #[error("line endings other than CRLF")]
    LineEnding,
    /// A header line begins with white space (obsolete folding).
    #[error("folded header line")]
    Folded,
    /// A header line without a colon, or with something other than a token before it.
    #[error("malformed header name")]
    Name,
    /// A request line that is not three parts.
    #[error("malformed request line")]
    RequestLine,
    /// Both `Transfer-Encoding` and `Content-Length`.
    #[error("both transfer-encoding and content-length")]
    TwoFramings,
    /// `Content-Length` is repeated or no plain number.
    #[error("malformed content-length")]
    ContentLength,
    /// `Transfer-Encoding` is repeated or not exactly `chunked`.
    #[error("unsupported transfer-encoding")]
    TransferEncoding,
    /// Not exactly one `Host`.
    #[error("not exactly one host")]
    Host,
    /// A control character where none may be.
    #[error("control character")]
    Control,
    /// The head is longer than we read.
    #[error("header section too large")]
    TooLarge,
    /// Two readers of the same bytes disagree about where a message ends.
    #[error("message framing out of step")]
    Desynchronised,
}

/// What of a head matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The body that follows, if any.
    pub body: Option<Body>,
}

/// The body that is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// So many bytes are left.
    Length(u64),
    /// Chunked coding.
    Chunked(Chunk),
}

/// Where in the chunked coding we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// In the digits of a size; the value so far and the number of digits.
    Size(u64, u8),
    /// In a chunk extension of a chunk of this size; bytes of the extension so far.
    Extension(u64, u16),
    /// LF expected after the CR of a size line.
    SizeLf(u64),
    /// So many data bytes are left.
    Data(u64),
    /// CR, then LF, expected after data.
    DataCr,
    /// LF expected after data.
    DataLf,
    /// At the start of a line of the trailer section; bytes of the section so far.
    TrailerStart(u16),
    /// Inside a trailer line.
    Trailer(u16),
    /// LF expected after the CR of a trailer line.
    TrailerLf(u16),
    /// LF expected after the CR of the last, empty line.
    EndLf,
}

/// How far [`Body::take`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Bytes of the input that belong to the body.
    pub bytes: usize,
    /// The body is complete.
    pub finished: bool,
}

/// The length of the head at the start of `bytes`, with its empty line; lenient about line endings, so that a head
/// that a lenient parser would see is never missed.
pub fn find_head_end(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|b| *b == b'\n').map(|i| from + i) {
        match bytes.get(at + 1..) {
            Some([b'\n', ..]) => return Some(at + 2),
            Some([b'\r', b'\n', ..]) => return Some(at + 3),
            _ => from = at + 1,
        }
    }
    None
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Judges a complete head.
///
/// # Errors
/// [`Malformed`] names the first rule that it breaks.
pub fn read_head(head: &[u8]) -> Result<Head, Malformed> {
    let head = head.strip_suffix(b"\r\n\r\n").ok_or(Malformed::LineEnding)?;
    let mut lines = Vec::with_capacity(32);
    let mut rest = head;
    while let Some(at) = rest.iter().position(|b| matches!(b, b'\r' | b'\n')) {
        if rest[at..].first_chunk() != Some(b"\r\n") {
            return Err(Malformed::LineEnding);
        }
        lines.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    lines.push(rest);
    let (request, headers) = lines.split_first().ok_or(Malformed::RequestLine)?;
    let http11 = read_request_line(request)?;
    let mut length = None;
    let mut chunked = false;
    let mut hosts = 0;
    for line in headers {
        if matches!(line.first(), Some(b' ' | b'\t')) {
            return Err(Malformed::Folded);
        }
        let colon = line.iter().position(|b| *b == b':').ok_or(Malformed::Name)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.is_empty() || !name.iter().all(|b| is_token(*b)) {
            return Err(Malformed::Name);
        }
        if value.iter().any(|b| (*b < 0x20 && *b != b'\t') || *b == 0x7f) {
            return Err(Malformed::Control);
        }
        if name.eq_ignore_ascii_case(b"content-length") {
            if length.is_some() {
                return Err(Malformed::ContentLength);
            }
            length = Some(read_length(value)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if chunked || !http11 || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed::TransferEncoding);
            }
            chunked = true;
        } else if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
        }
    }
    if hosts > 1 || (http11 && hosts == 0) {
        return Err(Malformed::Host);
    }
    let body = match (chunked, length) {
        (true, Some(_)) => return Err(Malformed::TwoFramings),
        (true, None) => Some(Body::Chunked(Chunk::Size(0, 0))),
        (false, Some(0) | None) => None,
        (false, Some(length)) => Some(Body::Length(length)),
    };
    Ok(Head { body })
}

/// Three parts with one space between them; whether it is HTTP/1.1.
fn read_request_line(line: &[u8]) -> Result<bool, Malformed> {
    let mut parts = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Malformed::RequestLine);
    };
    // A fragment is never sent by an honest client, and parsers differ in what they do with it (CVE-2021-39156).
    let bad = |b: &u8| *b <= 0x20 || *b == 0x7f || *b == b'#';
    if method.is_empty()
        || !method.iter().all(|b| is_token(*b))
        || target.is_empty()
        || target.iter().any(bad)
    {
        return Err(Malformed::RequestLine);
    }
    match version {
        b"HTTP/1.1" => Ok(true),
        b"HTTP/1.0" => Ok(false),
        _ => Err(Malformed::RequestLine),
    }
}

fn read_length(value: &[u8]) -> Result<u64, Malformed> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Malformed::ContentLength);
    }
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or(Malformed::ContentLength)
}

/// Most digits of a chunk size: 15 hexadecimal digits cannot overflow 64 bits.
const SIZE_DIGITS: u8 = 15;
/// Most bytes of one chunk extension.
const EXTENSION_BYTES: u16 = 256;
/// Most bytes of a trailer section.
const TRAILER_BYTES: u16 = 16 << 10;

impl Body {
    /// Takes from `bytes` what belongs to this body.
    ///
    /// # Errors
    /// `InvalidData` when the chunked coding is broken.
    pub fn take(&mut self, bytes: &[u8]) -> io::Result<Taken> {
        match self {
            Self::Length(left) => {
                let bytes = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                *left -= bytes as u64;
                Ok(Taken { bytes, finished: *left == 0 })
            }
            Self::Chunked(chunk) => chunk.take(bytes),
        }
    }
}

impl Chunk {
    fn take(&mut self, bytes: &[u8]) -> io::Result<Taken> {
        let mut at = 0;
        while at < bytes.len() {
            if let Self::Data(left) = self {
                let step = usize::try_from(*left).map_or(bytes.len() - at, |left| left.min(bytes.len() - at));
                *left -= step as u64;
                at += step;
                if *left == 0 {
                    *self = Self::DataCr;
                }
                continue;
            }
            let byte = bytes[at];
            at += 1;
            match self.step(byte) {
                Some(Some(next)) => *self = next,
                Some(None) => return Ok(Taken { bytes: at, finished: true }),
                None => return Err(io::Error::new(io::ErrorKind::InvalidData, "broken chunked coding")),
            }
        }
        Ok(Taken { bytes: at, finished: false })
    }

    /// One byte outside data: `None` = broken, `Some(None)` = the body ends here.
    fn step(self, byte: u8) -> Option<Option<Self>> {
        let short = |used: u16| (used < TRAILER_BYTES).then_some(used + 1);
        let next = match (self, byte) {
            (Self::Size(value, digits), b) if b.is_ascii_hexdigit() && digits < SIZE_DIGITS => {
                let digit = u64::from(char::from(b).to_digit(16)?);
                Self::Size(value << 4 | digit, digits + 1)
            }
            (Self::Size(value, 1..), b'\r') | (Self::Extension(value, _), b'\r') => Self::SizeLf(value),
            (Self::Size(value, 1..), b';' | b' ' | b'\t') => Self::Extension(value, 0),
            (Self::Extension(value, used), b) if b != b'\n' && used < EXTENSION_BYTES => {
                Self::Extension(value, used + 1)
            }
            (Self::SizeLf(0), b'\n') => Self::TrailerStart(0),
            (Self::SizeLf(size), b'\n') => Self::Data(size),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size(0, 0),
            (Self::TrailerStart(_), b'\r') => Self::EndLf,
            (Self::TrailerStart(_), b' ' | b'\t' | b'\n') => return None,
            (Self::Trailer(used), b'\r') => Self::TrailerLf(used),
            (Self::Trailer(_), b'\n') => return None,
            (Self::TrailerStart(used) | Self::Trailer(used), _) => Self::Trailer(short(used)?),
            (Self::TrailerLf(used), b'\n') => Self::TrailerStart(used),
            (Self::EndLf, b'\n') => return Some(None),
            _ => return None,
        };
        Some(Some(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: &str) -> Result<Option<Body>, Malformed> {
        read_head(lines.as_bytes()).map(|head| head.body)
    }

    #[test]
    fn a_head_tells_the_length_of_its_body() {
        for (text, body) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", None),
            ("GET / HTTP/1.0\r\n\r\n", None),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n", Some(Body::Length(7))),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\t0 \r\n\r\n", None),
            (
                "POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: Chunked\r\n\r\n",
                Some(Body::Chunked(Chunk::Size(0, 0))),
            ),
        ] {
            assert_eq!(head(text), Ok(body), "{text:?}");
        }
    }

    #[test]
    fn what_two_parsers_may_read_differently_is_refused() {
        use Malformed::*;
        for (text, why) in [
            (
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n",
                TwoFramings,
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 7\r\n\r\n",
                TwoFramings,
            ),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\nContent-Length: 7\r\n\r\n", ContentLength),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7, 7\r\n\r\n", ContentLength),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +7\r\n\r\n", ContentLength),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x7\r\n\r\n", ContentLength),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551616\r\n\r\n", ContentLength),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", TransferEncoding),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", Control),
            ("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", TransferEncoding),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", Name),
            ("GET / HTTP/1.1\r\nHost: a\r\nx: 1\r\n folded\r\n\r\n", Folded),
            ("GET / HTTP/1.1\r\nHost: a\nx: 1\r\n\r\n", LineEnding),
            ("GET / HTTP/1.1\r\nHost: a\rx: 1\r\n\r\n", LineEnding),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", LineEnding),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", Host),
            ("GET / HTTP/1.1\r\n\r\n", Host),
            ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", RequestLine),
            ("GET /#x HTTP/1.1\r\nHost: a\r\n\r\n", RequestLine),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", RequestLine),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", RequestLine),
            ("GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", Name),
            ("GET / HTTP/1.1\r\nHost: a\r\nx: a\0b\r\n\r\n", Control),
        ] {
            assert_eq!(head(text), Err(why), "{text:?}");
        }
    }

    #[test]
    fn the_end_of_a_head_is_found_leniently() {
        for (text, end) in [
            ("GET / HTTP/1.1\r\n\r\nrest", Some(18)),
            ("GET /\n\nrest", Some(7)),
            ("GET /\n\r\nrest", Some(8)),
            ("GET / HTTP/1.1\r\nHost: a\r\n", None),
        ] {
            assert_eq!(find_head_end(text.as_bytes()), end, "{text:?}");
        }
    }

    fn chunked(bytes: &[u8], step: usize) -> Result<Option<usize>, ()> {
        let mut body = Body::Chunked(Chunk::Size(0, 0));
        let mut at = 0;
        while at < bytes.len() {
            let taken = body.take(&bytes[at..bytes.len().min(at + step)]).map_err(drop)?;
            at += taken.bytes;
            if taken.finished {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    #[test]
    fn chunks_end_where_they_end_however_they_are_cut() {
        for (text, want) in [
            ("0\r\n\r\nGET", Ok(Some(5))),
            ("5\r\nhello\r\n0\r\n\r\nGET", Ok(Some(15))),
            ("A;x=y\r\n0123456789\r\n0\r\nt: 1\r\nu: 2\r\n\r\nGET", Ok(Some(36))),
            ("5\r\nhello\r\n0\r\n", Ok(None)),
            ("5\nhello\r\n0\r\n\r\n", Err(())),
            ("5\r\nhelloX\r\n0\r\n\r\n", Err(())),
            ("5;a\nb\r\nhello\r\n0\r\n\r\n", Err(())),
            ("\r\n", Err(())),
            ("-1\r\n", Err(())),
            ("1000000000000000\r\n", Err(())),
            ("0\r\nt: 1\n\r\n", Err(())),
            ("0\r\n folded\r\n\r\n", Err(())),
        ] {
            for step in [1, 2, 3, 7, 1000] {
                assert_eq!(chunked(text.as_bytes(), step), want, "{text:?} by {step}");
            }
        }
    }
}
