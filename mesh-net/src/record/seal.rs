//! Plaintext into records.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{
    ALERT, APPLICATION_DATA, HANDSHAKE, HEADER_BYTES, KEY_UPDATE, Outgoing, PLAINTEXT_BYTES, RecordError,
    Secrets, TAG_BYTES, key::Key,
};

/// Seals what we send. After [`Self::close`] nothing more.
pub struct Sealer {
    key: Key,
    secrets: Arc<Mutex<Secrets>>,
    closed: bool,
}

impl Sealer {
    pub(super) fn new(key: Key, secrets: Arc<Mutex<Secrets>>) -> Self {
        Self { key, secrets, closed: false }
    }

    /// Appends `parts`, one after the other, as records. Long parts are sealed from where they are.
    ///
    /// # Errors
    /// After the end, or without a key.
    pub fn seal(&mut self, parts: &[&[u8]], out: &mut Outgoing) -> Result<(), RecordError> {
        let mut total: usize = parts.iter().map(|part| part.len()).sum();
        let mut parts = parts.iter().copied();
        let mut part: &[u8] = &[];
        while total > 0 {
            while part.is_empty() {
                part = parts.next().ok_or(RecordError::Exhausted)?;
            }
            let size = total.min(PLAINTEXT_BYTES);
            total -= size;
            self.begin(out)?;
            if part.len() >= size {
                let (now, later) = part.split_at(size);
                self.record(APPLICATION_DATA, now, out)?;
                part = later;
                continue;
            }
            let header = header(size);
            let space = out.space(HEADER_BYTES + size + 1 + TAG_BYTES);
            space[..HEADER_BYTES].copy_from_slice(&header);
            let mut at = HEADER_BYTES;
            let end = HEADER_BYTES + size;
            while at < end {
                while part.is_empty() {
                    part = parts.next().ok_or(RecordError::Exhausted)?;
                }
                let n = part.len().min(end - at);
                space[at..at + n].copy_from_slice(&part[..n]);
                part = &part[n..];
                at += n;
            }
            self.key.seal_in_place(header, APPLICATION_DATA, &mut space[HEADER_BYTES..])?;
            out.commit(HEADER_BYTES + size + 1 + TAG_BYTES);
        }
        Ok(())
    }

    /// Replaces the key: the peer is told under the old one. `request` asks it to do the same.
    ///
    /// # Errors
    /// After the end, or without a key.
    pub fn update_key(&mut self, request: bool, out: &mut Outgoing) -> Result<(), RecordError> {
        if self.closed {
            return Err(RecordError::Exhausted);
        }
        self.record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, u8::from(request)], out)?;
        let next = self.secrets.lock().next_tx().map_err(RecordError::Rustls)?;
        self.key = Key::new(next)?;
        Ok(())
    }

    /// Says that nothing more comes: `close_notify`.
    ///
    /// # Errors
    /// Without a key.
    pub fn close(&mut self, out: &mut Outgoing) -> Result<(), RecordError> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        self.record(ALERT, &[1, 0], out)
    }

    /// Says why the connection ends, if it can still be said.
    pub fn abort(&mut self, error: &RecordError, out: &mut Outgoing) {
        if let Some(alert) = error.alert()
            && !std::mem::replace(&mut self.closed, true)
        {
            // Nothing is left to do about an alert that cannot be sealed.
            let _ = self.record(ALERT, &[2, alert], out);
        }
    }

    fn begin(&mut self, out: &mut Outgoing) -> Result<(), RecordError> {
        if self.closed {
            return Err(RecordError::Exhausted);
        }
        if self.key.is_worn() { self.update_key(false, out) } else { Ok(()) }
    }

    fn record(&mut self, content_type: u8, plain: &[u8], out: &mut Outgoing) -> Result<(), RecordError> {
        let header = header(plain.len());
        let size = HEADER_BYTES + plain.len() + 1 + TAG_BYTES;
        let space = out.space(size);
        space[..HEADER_BYTES].copy_from_slice(&header);
        self.key.seal(header, plain, content_type, &mut space[HEADER_BYTES..])?;
        out.commit(size);
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn worn_by(&mut self, records: u64) {
        self.key.worn_by(records);
    }
}

/// The header of a record with `plain` bytes of plaintext, which is at most [`PLAINTEXT_BYTES`].
fn header(plain: usize) -> [u8; HEADER_BYTES] {
    #[expect(clippy::cast_possible_truncation, reason = "a record is shorter than 64 KiB")]
    let size = (plain + 1 + TAG_BYTES) as u16;
    let [high, low] = size.to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}
