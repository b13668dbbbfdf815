//! TLS 1.3 records on keys that rustls agreed on.
//!
//! The handshake and every check of identity are rustls's. Then its interface for kernel offload hands over the traffic
//! keys, and from the first protected byte on the records are ours: opened where they lie, sealed many at a time, so
//! that a byte of a tunnel is touched once per side. rustls keeps the secrets from which the next keys come.
//!
//! Pure: bytes in, bytes out. Whatever is no valid record ends the connection with a reason.

mod key;
mod open;
mod outgoing;
mod seal;

use std::sync::Arc;

use parking_lot::Mutex;
use rustls::{
    ConnectionTrafficSecrets, ExtractedSecrets, client::ClientConnectionData, kernel::KernelConnection,
    server::ServerConnectionData,
};

pub use self::{
    open::{Opened, Opener},
    outgoing::Outgoing,
    seal::Sealer,
};

/// Plaintext of a record, bytes (RFC 8446 5.1).
pub const PLAINTEXT_BYTES: usize = 16 << 10;
/// What a record may add to its plaintext, bytes (RFC 8446 5.2).
const EXPANSION_BYTES: usize = 256;
/// Type, version, length.
pub const HEADER_BYTES: usize = 5;
/// Authentication tag of every cipher of TLS 1.3.
const TAG_BYTES: usize = 16;
/// Largest record with its header, bytes.
pub const RECORD_BYTES: usize = HEADER_BYTES + PLAINTEXT_BYTES + EXPANSION_BYTES;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Why records cannot go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RecordError {
    /// The bytes are no record, or not one that may come now.
    #[error("unexpected TLS record: {0}")]
    Unexpected(&'static str),
    /// Longer than a record may be.
    #[error("TLS record of {0} bytes")]
    Oversized(usize),
    /// Not sealed by the peer with the current key, or changed on the way.
    #[error("TLS record does not authenticate")]
    Tampered,
    /// The peer gave up.
    #[error("TLS alert from the peer: {:?}", rustls::AlertDescription::from(*.0))]
    Alert(u8),
    /// The key has protected as much as it may, or there is no next one.
    #[error("no key for further TLS records")]
    Exhausted,
    /// rustls refused what the peer sent, or the next key.
    #[error("TLS")]
    Rustls(#[source] rustls::Error),
}

impl RecordError {
    /// The alert that tells the peer, if it should be told.
    pub fn alert(&self) -> Option<u8> {
        match self {
            Self::Unexpected(_) => Some(10),
            Self::Tampered => Some(20),
            Self::Oversized(_) => Some(22),
            Self::Exhausted | Self::Rustls(_) => Some(80),
            Self::Alert(_) => None,
        }
    }
}

impl From<RecordError> for std::io::Error {
    fn from(error: RecordError) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}

/// What rustls keeps for us after the handshake.
pub enum Secrets {
    /// We dialled.
    Client(KernelConnection<ClientConnectionData>),
    /// We accepted.
    Server(KernelConnection<ServerConnectionData>),
}

impl Secrets {
    fn next_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
    }

    fn next_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
    }

    /// A session ticket; only clients get them.
    fn ticket(&mut self, payload: &[u8]) -> Result<(), RecordError> {
        match self {
            Self::Client(kernel) => kernel.handle_new_session_ticket(payload).map_err(RecordError::Rustls),
            Self::Server(_) => Err(RecordError::Unexpected("a session ticket from a client")),
        }
    }
}

/// Both directions of a connection whose handshake is done.
///
/// # Errors
/// A cipher that is none of TLS 1.3's three.
pub fn take_over(keys: ExtractedSecrets, secrets: Secrets) -> Result<(Sealer, Opener), RecordError> {
    // Each direction is used by itself; they meet only when a key is replaced.
    let secrets = Arc::new(Mutex::new(secrets));
    let sealer = Sealer::new(key::Key::new(keys.tx)?, secrets.clone());
    Ok((sealer, Opener::new(key::Key::new(keys.rx)?, secrets)))
}
