//! The handshake: rustls thinks, this moves the bytes, and the keys are taken over at its end.
//!
//! rustls is given one record at a time. So it never sees a record that is protected by traffic keys: whatever came
//! along with the peer's last handshake message is opened by [`crate::record`], from the first one on.

use std::io;

use bytes::{Buf, BytesMut};
use rustls::{
    ExtractedSecrets,
    client::{ClientConnectionData, UnbufferedClientConnection},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::TlsError;
use crate::record::{HEADER_BYTES, RECORD_BYTES, Secrets};

/// What of a handshake may wait for its end, bytes: the longest message that rustls takes, in its records.
const FLIGHT_BYTES: usize = 2 * (64 << 10);
/// Room for the first read: a hello or a certificate fits.
const READ_BYTES: usize = 4 << 10;

/// Either role of an unbuffered rustls connection.
pub(super) trait Handshaking: Send + Sized {
    type Data: Send;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn finish(self) -> Result<(ExtractedSecrets, Secrets), rustls::Error>;
}

impl Handshaking for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn finish(self) -> Result<(ExtractedSecrets, Secrets), rustls::Error> {
        let (keys, kernel) = self.dangerous_into_kernel_connection()?;
        Ok((keys, Secrets::Client(kernel)))
    }
}

impl Handshaking for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn finish(self) -> Result<(ExtractedSecrets, Secrets), rustls::Error> {
        let (keys, kernel) = self.dangerous_into_kernel_connection()?;
        Ok((keys, Secrets::Server(kernel)))
    }
}

/// A step that involves the peer.
enum Step {
    Send,
    Receive,
    Done,
}

/// Brings the handshake to its end; returns what the peer sent after it, still sealed. No deadline of its own.
pub(super) async fn run<C: Handshaking, T>(connection: &mut C, io: &mut T) -> Result<BytesMut, TlsError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let (mut incoming, mut outgoing) = (BytesMut::new(), Vec::new());
    // How much of `incoming` rustls may see.
    let mut shown = 0;
    loop {
        match advance(connection, &mut incoming, &mut shown, &mut outgoing) {
            Ok(Step::Send) => {
                io.write_all(&outgoing).await.map_err(failed)?;
                io.flush().await.map_err(failed)?;
                outgoing.clear();
            }
            Ok(Step::Receive) => {
                while !reveal(&incoming, &mut shown) {
                    if incoming.len() > FLIGHT_BYTES {
                        return Err(TlsError::Protocol(rustls::Error::General("handshake too long".into())));
                    }
                    incoming.reserve(READ_BYTES);
                    if io.read_buf(&mut incoming).await.map_err(failed)? == 0 {
                        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
            }
            Ok(Step::Done) => return Ok(incoming),
            Err(error) => {
                // The alert that rustls wants sent, as far as the peer takes it.
                outgoing.clear();
                alert(connection, &mut incoming[..shown], &mut outgoing);
                let _ = io.write_all(&outgoing).await;
                let _ = io.flush().await;
                return Err(TlsError::of_rustls(error));
            }
        }
    }
}

/// Lets rustls work until it needs the peer.
fn advance<C: Handshaking>(
    connection: &mut C,
    incoming: &mut BytesMut,
    shown: &mut usize,
    outgoing: &mut Vec<u8>,
) -> Result<Step, rustls::Error> {
    loop {
        let UnbufferedStatus { discard, state } = connection.process(&mut incoming[..*shown]);
        let state = match state {
            Ok(state) => state,
            Err(error) => {
                incoming.advance(discard);
                *shown -= discard;
                return Err(error);
            }
        };
        let step = match state {
            ConnectionState::EncodeTlsData(data) => {
                encode(data, outgoing)?;
                None
            }
            ConnectionState::TransmitTlsData(data) => {
                // They are sent before rustls is asked again.
                data.done();
                Some(Step::Send)
            }
            ConnectionState::BlockedHandshake => Some(Step::Receive),
            ConnectionState::WriteTraffic(_) => Some(Step::Done),
            // Early data is not offered, and what is protected by traffic keys is not shown.
            _ => return Err(rustls::Error::General("out of order".into())),
        };
        incoming.advance(discard);
        *shown -= discard;
        if let Some(step) = step {
            return Ok(step);
        }
    }
}

/// Shows rustls one record more, if a whole one is there. What does not look like one is shown as it is: rustls knows
/// what to say about it.
fn reveal(incoming: &[u8], shown: &mut usize) -> bool {
    let size = match &incoming[*shown..] {
        [20..=23, 3, _, high, low, ..] => HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low])),
        rest if rest.len() < HEADER_BYTES => return false,
        rest => rest.len(),
    };
    if size <= RECORD_BYTES && incoming.len() - *shown < size {
        return false;
    }
    *shown = (*shown + size).min(incoming.len());
    true
}

fn encode<D>(
    mut data: rustls::unbuffered::EncodeTlsData<'_, D>,
    outgoing: &mut Vec<u8>,
) -> Result<(), rustls::Error> {
    let at = outgoing.len();
    loop {
        match data.encode(&mut outgoing[at..]) {
            Ok(size) => {
                outgoing.truncate(at + size);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(short)) => outgoing.resize(at + short.required_size, 0),
            Err(EncodeError::AlreadyEncoded) => return Err(rustls::Error::General("encoded twice".into())),
        }
    }
}

/// What rustls has to say after an error: what it queued comes first when it is asked again.
fn alert<C: Handshaking>(connection: &mut C, incoming: &mut [u8], outgoing: &mut Vec<u8>) {
    if let Ok(ConnectionState::EncodeTlsData(data)) = connection.process(incoming).state {
        // Without it the peer learns only that the connection ends.
        let _ = encode(data, outgoing);
    }
}

fn failed(error: io::Error) -> TlsError {
    TlsError::Io(std::sync::Arc::new(error))
}
