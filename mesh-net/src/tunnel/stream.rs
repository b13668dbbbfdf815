//! One tunnelled connection as a byte stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use mesh_core::id::Identity;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::pool::Reservation;
use crate::copy::{Endpoint, Reader};

/// A byte stream inside a tunnel. Shutdown is a half-close; dropping it unfinished cancels the stream.
pub struct TunnelStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Handed to the reader, not yet given back to the peer's window: a reader that stalls pushes back.
    unreleased: usize,
    leftover: Bytes,
    finished: bool,
    peer: Identity,
    baggage: Option<String>,
    /// Counts this stream at its pooled connection.
    _reservation: Option<Reservation>,
}

impl std::fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TunnelStream").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl TunnelStream {
    pub(super) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        peer: Identity,
        baggage: Option<String>,
        reservation: Option<Reservation>,
    ) -> Self {
        Self {
            send,
            recv,
            unreleased: 0,
            leftover: Bytes::new(),
            finished: false,
            peer,
            baggage,
            _reservation: reservation,
        }
    }

    /// Whom the other end proved to be.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// Baggage of the answer (of the client's end), as it is on the wire.
    pub fn baggage(&self) -> Option<&str> {
        self.baggage.as_deref()
    }

    /// Ends the stream at once in both directions: the peer sees the end of the stream.
    pub fn cancel(mut self) {
        self.send.send_reset(Reason::CANCEL);
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if !self.leftover.is_empty() {
            return Poll::Ready(Ok(std::mem::take(&mut self.leftover)));
        }
        if self.unreleased > 0 {
            let size = std::mem::take(&mut self.unreleased);
            // Fails only on a stream that is gone already.
            let _ = self.recv.flow_control().release_capacity(size);
        }
        loop {
            return Poll::Ready(match ready!(self.recv.poll_data(cx)) {
                None => Ok(Bytes::new()),
                Some(Ok(chunk)) if chunk.is_empty() => continue,
                Some(Ok(chunk)) => {
                    self.unreleased = chunk.len();
                    Ok(chunk)
                }
                // H27: a peer that has nothing more to say may say it by a reset.
                Some(Err(error)) => match error.reason() {
                    Some(Reason::NO_ERROR | Reason::CANCEL) => Ok(Bytes::new()),
                    _ => Err(io_error(error)),
                },
            });
        }
    }

    fn poll_take(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<io::Result<()>> {
        self.send.reserve_capacity(chunk.len());
        let mut room = self.send.capacity();
        while room == 0 {
            room = match ready!(self.send.poll_capacity(cx)) {
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                Some(Ok(room)) => room,
            };
        }
        let part = chunk.split_to(room.min(chunk.len()));
        Poll::Ready(self.send.send_data(part, false).map_err(io_error))
    }

    fn finish(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.finished, true) {
            return Ok(());
        }
        self.send.send_data(Bytes::new(), true).map_err(io_error)
    }
}

/// What a broken stream means to whoever copies: a reset of one stream or the loss of the connection is the peer
/// closing; the rest is a fault.
fn io_error(error: h2::Error) -> io::Error {
    match error.reason() {
        Some(Reason::STREAM_CLOSED | Reason::NO_ERROR | Reason::CANCEL) => {
            io::Error::new(io::ErrorKind::BrokenPipe, error)
        }
        Some(_) => io::Error::other(error),
        None if error.is_io() => error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        // Sending on a stream that the peer has closed is a user error to h2.
        None => io::Error::new(io::ErrorKind::BrokenPipe, error),
    }
}

impl Endpoint for TunnelStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, _: &mut Reader) -> Poll<io::Result<Bytes>> {
        self.poll_bytes(cx)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<io::Result<()>> {
        self.poll_take(cx, chunk)
    }

    fn poll_flush_out(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut chunk = ready!(self.poll_bytes(cx))?;
        let n = chunk.len().min(buf.remaining());
        buf.put_slice(&chunk[..n]);
        chunk.advance(n);
        self.leftover = chunk;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        // Copy only what the window takes now.
        self.send.reserve_capacity(buf.len());
        let mut room = self.send.capacity();
        while room == 0 {
            room = match ready!(self.send.poll_capacity(cx)) {
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                Some(Ok(room)) => room,
            };
        }
        let n = room.min(buf.len());
        self.send.send_data(Bytes::copy_from_slice(&buf[..n]), false).map_err(io_error)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}
