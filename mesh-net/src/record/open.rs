//! Records into plaintext.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;

use super::{
    ALERT, APPLICATION_DATA, EXPANSION_BYTES, HANDSHAKE, HEADER_BYTES, KEY_UPDATE, NEW_SESSION_TICKET,
    PLAINTEXT_BYTES, RECORD_BYTES, RecordError, Secrets, TAG_BYTES, key::Key,
};

/// Longest handshake message after the handshake, bytes: a ticket may hold the client's chain of certificates.
const MESSAGE_BYTES: usize = 64 << 10;
/// Records in a row that bring no data: key updates, tickets, empty ones. A peer that sends more wastes our time.
const FRUITLESS_RECORDS: u32 = 32;

/// What one record was.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// There is no whole record yet.
    Short,
    /// Application data; never empty.
    Data(Bytes),
    /// Nothing to tell: an empty record, a ticket, a key that was replaced.
    Nothing,
    /// The peer has replaced its key and asks us to replace ours.
    KeyAsked,
    /// The peer sends nothing more: `close_notify`.
    Closed,
}

/// Opens what the peer sent.
pub struct Opener {
    key: Key,
    secrets: Arc<Mutex<Secrets>>,
    /// A handshake message whose end has not come.
    message: Vec<u8>,
    fruitless: u32,
    closed: bool,
    /// The peer was asked for a new key instead of this one.
    asked: bool,
}

impl Opener {
    pub(super) fn new(key: Key, secrets: Arc<Mutex<Secrets>>) -> Self {
        Self { key, secrets, message: Vec::new(), fruitless: 0, closed: false, asked: false }
    }

    /// How many bytes the record at the front of `buffer` still lacks.
    pub fn lacks(buffer: &[u8]) -> usize {
        let whole = match buffer {
            [_, _, _, high, low, ..] => HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low])),
            _ => HEADER_BYTES,
        };
        whole.min(RECORD_BYTES).saturating_sub(buffer.len())
    }

    /// Whether the peer is to be asked for a new key, once for each: it uses one for more than it should.
    pub fn wants_key(&mut self) -> bool {
        self.key.is_spent() && !std::mem::replace(&mut self.asked, true)
    }

    /// Takes one record from the front of `buffer` and opens it in place.
    ///
    /// # Errors
    /// Whatever is no valid record; the connection must end, and the peer is told by [`super::Sealer::abort`].
    pub fn open(&mut self, buffer: &mut BytesMut) -> Result<Opened, RecordError> {
        if self.closed {
            return Ok(Opened::Closed);
        }
        let Some(&header) = buffer.first_chunk::<HEADER_BYTES>() else { return Ok(Opened::Short) };
        let [content_type, major, _, high, low] = header;
        let size = usize::from(u16::from_be_bytes([high, low]));
        // Looked at before the rest is waited for. What the header says is authenticated below.
        if content_type != APPLICATION_DATA || major != 3 {
            return Err(RecordError::Unexpected("not protected"));
        }
        if size > PLAINTEXT_BYTES + EXPANSION_BYTES {
            return Err(RecordError::Oversized(size));
        }
        if size <= TAG_BYTES {
            return Err(RecordError::Tampered);
        }
        if buffer.len() < HEADER_BYTES + size {
            return Ok(Opened::Short);
        }
        let mut record = buffer.split_to(HEADER_BYTES + size);
        record.advance(HEADER_BYTES);
        let plain = self.key.open(header, &mut record)?;
        record.truncate(plain);
        // Padding is zeros behind the content type.
        let Some(end) = record.iter().rposition(|byte| *byte != 0) else {
            return Err(RecordError::Unexpected("no content type"));
        };
        let content_type = record[end];
        record.truncate(end);
        if record.len() > PLAINTEXT_BYTES {
            return Err(RecordError::Oversized(record.len()));
        }
        self.content(content_type, record)
    }

    fn content(&mut self, content_type: u8, content: BytesMut) -> Result<Opened, RecordError> {
        if content_type == APPLICATION_DATA && !content.is_empty() && self.message.is_empty() {
            self.fruitless = 0;
            return Ok(Opened::Data(content.freeze()));
        }
        self.fruitless += 1;
        if self.fruitless > FRUITLESS_RECORDS {
            return Err(RecordError::Unexpected("too many without data"));
        }
        match content_type {
            HANDSHAKE => self.handshake(&content),
            _ if !self.message.is_empty() => Err(RecordError::Unexpected("inside a handshake message")),
            APPLICATION_DATA => Ok(Opened::Nothing),
            ALERT => self.alert(&content),
            _ => Err(RecordError::Unexpected("content type")),
        }
    }

    fn alert(&mut self, content: &[u8]) -> Result<Opened, RecordError> {
        match content {
            [_, 0] => {
                self.closed = true;
                Ok(Opened::Closed)
            }
            // user_canceled: close_notify follows.
            [_, 90] => Ok(Opened::Nothing),
            [_, description] => Err(RecordError::Alert(*description)),
            _ => Err(RecordError::Unexpected("malformed alert")),
        }
    }

    fn handshake(&mut self, content: &[u8]) -> Result<Opened, RecordError> {
        if content.is_empty() {
            return Err(RecordError::Unexpected("empty handshake record"));
        }
        self.message.extend_from_slice(content);
        let message = std::mem::take(&mut self.message);
        let mut rest = &message[..];
        let mut opened = Opened::Nothing;
        while let [kind, a, b, c, after @ ..] = rest {
            let size = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap_or(usize::MAX);
            if size > MESSAGE_BYTES || !matches!(*kind, NEW_SESSION_TICKET | KEY_UPDATE) {
                return Err(RecordError::Unexpected("handshake message"));
            }
            let Some((payload, later)) = after.split_at_checked(size) else { break };
            if *kind == NEW_SESSION_TICKET {
                self.secrets.lock().ticket(payload)?;
            } else {
                // What follows is under the next key, so a record ends here.
                let ([0 | 1], []) = (payload, later) else {
                    return Err(RecordError::Unexpected("malformed key update"));
                };
                let next = self.secrets.lock().next_rx().map_err(RecordError::Rustls)?;
                self.key = Key::new(next)?;
                self.asked = false;
                if payload == [1] {
                    opened = Opened::KeyAsked;
                }
            }
            rest = later;
        }
        self.message = rest.to_vec();
        Ok(opened)
    }

    #[cfg(test)]
    pub(crate) fn worn_by(&mut self, records: u64) {
        self.key.worn_by(records);
    }
}
