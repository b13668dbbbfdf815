//! (pure) The version that a TLS handshake offers or chooses, out of its first bytes.

/// A hello of one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// Versions on offer.
    Client(Vec<u16>),
    /// The version chosen.
    Server(u16),
}

/// TLS 1.3.
pub const TLS13: u16 = 0x0304;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const SUPPORTED_VERSIONS: u16 = 43;

/// Reads the hello at the start of a stream. `None`: this is no TLS, or the bytes end too early.
pub fn hello(stream: &[u8]) -> Option<Hello> {
    let mut message = handshake_bytes(stream)?;
    let kind = message.byte()?;
    let mut body = message.block(3)?;
    let legacy = body.number(2)?;
    body.take(32)?;
    body.block(1)?;
    match kind {
        CLIENT_HELLO => {
            body.block(2)?;
            body.block(1)?;
        }
        SERVER_HELLO => drop(body.take(3)?),
        _ => return None,
    }
    let mut versions = match kind {
        CLIENT_HELLO => Hello::Client(vec![legacy]),
        _ => Hello::Server(legacy),
    };
    let mut extensions = body.block(2)?;
    while let Some(number) = extensions.number(2) {
        let mut extension = extensions.block(2)?;
        if number != SUPPORTED_VERSIONS {
            continue;
        }
        versions = match kind {
            CLIENT_HELLO => {
                let mut list = extension.block(1)?;
                Hello::Client(std::iter::from_fn(|| list.number(2)).collect())
            }
            _ => Hello::Server(extension.number(2)?),
        };
    }
    Some(versions)
}

/// The handshake message at the start, out of as many records as are there.
fn handshake_bytes(stream: &[u8]) -> Option<Reader> {
    let mut records = Reader(stream.to_vec());
    let mut message = Vec::new();
    while let Some(kind) = records.byte() {
        if kind != HANDSHAKE {
            break;
        }
        if records.number(2)? >> 8 != 3 {
            return None;
        }
        let Some(record) = records.block(2) else { break };
        message.extend(record.0);
    }
    (!message.is_empty()).then_some(Reader(message))
}

/// Takes bytes from the front.
struct Reader(Vec<u8>);

impl Reader {
    fn take(&mut self, length: usize) -> Option<Vec<u8>> {
        (length <= self.0.len()).then(|| self.0.drain(..length).collect())
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn number(&mut self, bytes: usize) -> Option<u16> {
        Some(self.take(bytes)?.into_iter().fold(0, |number, byte| (number << 8) | u16::from(byte)))
    }

    /// Bytes behind a length of so many bytes.
    fn block(&mut self, bytes: usize) -> Option<Self> {
        let length = self.take(bytes)?.into_iter().fold(0, |number, byte| (number << 8) | usize::from(byte));
        self.take(length).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, u8::try_from(body.len()).expect("short")];
        message.extend(body);
        let mut record = vec![22, 3, 1, 0, u8::try_from(message.len()).expect("short")];
        record.extend(message);
        record
    }

    fn body(middle: &[u8], extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend(middle);
        body.extend([0, u8::try_from(extensions.len()).expect("short")]);
        body.extend(extensions);
        body
    }

    #[test]
    fn versions_are_read() {
        let client = body(&[0, 2, 0x13, 1, 1, 0], &[0, 0, 0, 1, 9, 0, 43, 0, 3, 2, 3, 4]);
        assert_eq!(hello(&record(1, &client)), Some(Hello::Client(vec![TLS13])));
        let old = body(&[0, 2, 0x13, 1, 1, 0], &[]);
        assert_eq!(hello(&record(1, &old)), Some(Hello::Client(vec![0x0303])));
        let server = body(&[0x13, 1, 0], &[0, 43, 0, 2, 3, 4]);
        assert_eq!(hello(&record(2, &server)), Some(Hello::Server(TLS13)));
        assert_eq!(hello(b"GET / HTTP/1.1\r\n"), None);
        let whole = record(1, &client);
        for end in 0..whole.len() {
            assert_eq!(hello(&whole[..end]), None, "cut at {end}");
        }
    }
}
