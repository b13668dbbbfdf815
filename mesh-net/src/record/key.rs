//! One traffic key with its nonces.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;
use zeroize::Zeroizing;

use super::{HEADER_BYTES, RecordError, TAG_BYTES};

/// Records that one key protects before it is replaced: half of what AES-GCM may (RFC 8446 5.5).
pub(super) const KEY_RECORDS: u64 = 1 << 23;
/// Records after which a key seals nothing more, whatever happened to its replacement. What it opens is the peer's to
/// limit, and peers there are that never do: they are asked for a new key then, and go on meanwhile.
const LAST_RECORD: u64 = 1 << 24;

/// A key and the number of its next record. The key is wiped when it is dropped, by aws-lc.
pub(super) struct Key {
    aead: LessSafeKey,
    iv: Zeroizing<[u8; 12]>,
    sequence: u64,
}

impl Key {
    pub(super) fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::Exhausted),
        };
        let aead = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Exhausted)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Exhausted)?;
        Ok(Self { aead: LessSafeKey::new(aead), iv: Zeroizing::new(iv), sequence })
    }

    /// Whether it is time for the next key.
    pub(super) fn is_worn(&self) -> bool {
        self.sequence >= KEY_RECORDS
    }

    /// Whether it has protected all that it should.
    pub(super) fn is_spent(&self) -> bool {
        self.sequence >= LAST_RECORD
    }

    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = *self.iv;
        for (byte, mask) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= mask;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Exhausted)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    fn sealing_nonce(&mut self) -> Result<Nonce, RecordError> {
        if self.is_spent() { Err(RecordError::Exhausted) } else { self.nonce() }
    }

    /// Seals `plain` and the content type into `out`, which has just the room.
    pub(super) fn seal(
        &mut self,
        header: [u8; HEADER_BYTES],
        plain: &[u8],
        content_type: u8,
        out: &mut [u8],
    ) -> Result<(), RecordError> {
        let nonce = self.sealing_nonce()?;
        let (body, end) = out.split_at_mut(plain.len());
        self.aead
            .seal_out_of_place_scatter(nonce, Aad::from(header), plain, body, &[content_type], end)
            .map_err(|_| RecordError::Exhausted)
    }

    /// Seals what lies at the front of `out`, all but the room for content type and tag.
    pub(super) fn seal_in_place(
        &mut self,
        header: [u8; HEADER_BYTES],
        content_type: u8,
        out: &mut [u8],
    ) -> Result<(), RecordError> {
        let nonce = self.sealing_nonce()?;
        let (body, end) = out.split_at_mut(out.len() - TAG_BYTES - 1);
        self.aead
            .seal_in_place_scatter(nonce, Aad::from(header), body, &[content_type], end)
            .map_err(|_| RecordError::Exhausted)
    }

    /// Opens `body` where it lies; returns how long the plaintext is.
    pub(super) fn open(&mut self, header: [u8; HEADER_BYTES], body: &mut [u8]) -> Result<usize, RecordError> {
        let nonce = self.nonce()?;
        self.aead
            .open_in_place(nonce, Aad::from(header), body)
            .map(|plain| plain.len())
            .map_err(|_| RecordError::Tampered)
    }

    /// As if it had protected `records` already.
    #[cfg(test)]
    pub(super) fn worn_by(&mut self, records: u64) {
        self.sequence = records;
    }
}
