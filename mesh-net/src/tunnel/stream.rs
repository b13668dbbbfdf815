//! One tunnelled connection as a byte stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use mesh_core::id::Identity;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::pool::Reservation;
use crate::{
    copy::{Endpoint, Reader},
    mux::{Cause, Failure, Reason, Stream},
};

/// A byte stream inside a tunnel. Shutdown is a half-close; dropping it unfinished cancels the stream.
pub struct TunnelStream {
    stream: Stream,
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
        stream: Stream,
        peer: Identity,
        baggage: Option<String>,
        reservation: Option<Reservation>,
    ) -> Self {
        Self { stream, leftover: Bytes::new(), finished: false, peer, baggage, _reservation: reservation }
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
    pub fn cancel(self) {
        self.stream.reset(Reason::CANCEL);
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if !self.leftover.is_empty() {
            return Poll::Ready(Ok(std::mem::take(&mut self.leftover)));
        }
        Poll::Ready(match ready!(self.stream.poll_data(cx)) {
            // H27: a peer that has nothing more to say may say it by a reset.
            Err(Failure::Reset(Reason::NO_ERROR | Reason::CANCEL)) => Ok(Bytes::new()),
            other => other.map_err(io_error),
        })
    }

    fn finish(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.finished, true) {
            return Ok(());
        }
        self.stream.finish().map_err(io_error)
    }
}

/// What a broken stream means to whoever copies: a reset of one stream or the loss of the connection is the peer
/// closing; the rest is a fault.
fn io_error(failure: Failure) -> io::Error {
    match &failure {
        Failure::Reset(Reason::STREAM_CLOSED | Reason::NO_ERROR | Reason::CANCEL)
        | Failure::GoAway
        | Failure::Lost(Cause::Closed) => io::Error::new(io::ErrorKind::BrokenPipe, failure),
        Failure::Reset(_) | Failure::Lost(Cause::Broken(_)) => io::Error::other(failure),
        Failure::Lost(Cause::Io(error)) => io::Error::new(error.kind(), error.to_string()),
    }
}

impl Endpoint for TunnelStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, _: &mut Reader) -> Poll<io::Result<Bytes>> {
        self.poll_bytes(cx)
    }

    fn more(&mut self) -> Option<Bytes> {
        self.stream.more_data()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<io::Result<()>> {
        let size = ready!(self.stream.poll_send(cx, chunk)).map_err(io_error)?;
        chunk.advance(size);
        Poll::Ready(Ok(()))
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
        // An empty slice would still hold on to the buffer that it was cut from.
        self.leftover = if chunk.is_empty() { Bytes::new() } else { chunk };
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.stream.poll_send(cx, buf).map_err(io_error)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}
