//! Heads of requests and answers, from and to their blocks.

use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};

use super::hpack::{Decoder, Encoder, Malformed};

/// The head of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// `:method`, of requests.
    pub method: Option<String>,
    /// `:authority`, of requests.
    pub authority: Option<String>,
    /// `:status`, of answers.
    pub status: Option<u16>,
    /// `:protocol`: an extended CONNECT.
    pub extended: bool,
    /// The others.
    pub headers: HeaderMap,
    /// `:scheme` and `:path`, whatever they say.
    target: (bool, bool),
}

/// What a block was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Block {
    /// In order.
    Head(Box<Head>),
    /// Headers as they must not be: an error of the stream.
    Bad(&'static str),
    /// More than we take.
    TooLong,
}

/// Reads a block, up to `list` bytes of headers.
///
/// # Errors
/// The block is out of step with the table: the connection must end.
pub fn read(decoder: &mut Decoder, block: &[u8], list: usize) -> Result<Block, Malformed> {
    let (mut head, mut bad) = (Head::default(), None);
    let all = decoder.decode(block, list, |name, value| {
        if bad.is_none() {
            bad = head.add(name, value).err();
        }
    })?;
    Ok(match bad {
        _ if !all => Block::TooLong,
        Some(why) => Block::Bad(why),
        None => Block::Head(Box::new(head)),
    })
}

impl Head {
    /// Whether it is a request as RFC 9113 8.3.1 and 8.5 want it.
    pub fn is_request(&self) -> bool {
        let (scheme, path) = self.target;
        match self.method.as_deref() {
            _ if self.status.is_some() => false,
            Some("CONNECT") if !self.extended => self.authority.is_some() && !scheme && !path,
            Some(_) => scheme && path,
            None => false,
        }
    }

    /// Whether it is an answer.
    pub fn is_answer(&self) -> bool {
        self.status.is_some() && !self.is_any_request()
    }

    /// Whether it is what may follow the bytes of a stream.
    pub fn is_trailers(&self) -> bool {
        self.status.is_none() && !self.is_any_request()
    }

    fn is_any_request(&self) -> bool {
        self.method.is_some() || self.authority.is_some() || self.extended || self.target != (false, false)
    }

    fn add(&mut self, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if let Some(pseudo) = name.strip_prefix(b":") {
            return self.pseudo(pseudo, value);
        }
        if name.iter().any(u8::is_ascii_uppercase) {
            return Err("a name in upper case");
        }
        let name = HeaderName::from_bytes(name).map_err(|_| "a name that is none")?;
        let connection = ["connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"];
        if connection.contains(&name.as_str()) || (name == "te" && value != b"trailers") {
            return Err("a header of the connection");
        }
        let value = HeaderValue::from_bytes(value).map_err(|_| "a value that is none")?;
        self.headers.try_append(name, value).map(drop).map_err(|_| "too many headers")
    }

    fn pseudo(&mut self, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if !self.headers.is_empty() {
            return Err("a pseudo-header behind headers");
        }
        let text = || match std::str::from_utf8(value) {
            Ok(text) if text.bytes().all(|byte| byte > 0x20 && byte != 0x7f) => Ok(text.to_owned()),
            _ => Err("a pseudo-header that is no text"),
        };
        let twice = match name {
            b"method" => self.method.replace(text()?).is_some(),
            b"authority" => self.authority.replace(text()?).is_some(),
            b"scheme" => std::mem::replace(&mut self.target.0, true),
            b"path" => std::mem::replace(&mut self.target.1, true),
            b"protocol" => std::mem::replace(&mut self.extended, true),
            b"status" => {
                let status = StatusCode::from_bytes(value).map_err(|_| "a status that is none")?;
                self.status.replace(status.as_u16()).is_some()
            }
            _ => return Err("an unknown pseudo-header"),
        };
        if twice { Err("a pseudo-header twice") } else { Ok(()) }
    }
}

/// The block of a CONNECT.
pub fn connect(request: &Request<()>) -> Vec<u8> {
    let authority = request.uri().authority().map_or("", |authority| authority.as_str());
    let head = Encoder::default().named(2, b"CONNECT").named(1, authority.as_bytes());
    with(head, request.headers())
}

/// The block of an answer.
pub fn answer(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let head = match status {
        StatusCode::OK => Encoder::default().indexed(8),
        other => Encoder::default().named(8, other.as_str().as_bytes()),
    };
    with(head, headers)
}

fn with(head: Encoder, headers: &HeaderMap) -> Vec<u8> {
    headers
        .iter()
        .fold(head, |head, (name, value)| head.literal(name.as_str().as_bytes(), value.as_bytes()))
        .finish()
}
