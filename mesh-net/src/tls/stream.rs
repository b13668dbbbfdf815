//! A byte stream in records.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::record::{Opened, Opener, Outgoing, RECORD_BYTES, RecordError, Sealer};

/// Sealed bytes that may wait for the socket before the writer has to.
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// Largest read.
const READ_BYTES: usize = 256 << 10;

/// TLS of either role over `T`, after its handshake.
pub struct TlsStream<T> {
    io: T,
    sealer: Sealer,
    opener: Opener,
    outgoing: Outgoing,
    incoming: BytesMut,
    plain: Bytes,
    want: usize,
    /// Nothing was sent since the reader last ran dry.
    quiet: bool,
    ended: bool,
    /// Why nothing more is read.
    broken: Option<RecordError>,
    /// The peer's wish for a new key was answered, and the answer still waits.
    rekeyed: bool,
}

impl<T> std::fmt::Debug for TlsStream<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStream").finish_non_exhaustive()
    }
}

impl<T> TlsStream<T> {
    /// `incoming` came along with the handshake.
    pub(super) fn new(io: T, sealer: Sealer, opener: Opener, incoming: BytesMut) -> Self {
        Self {
            io,
            sealer,
            opener,
            outgoing: Outgoing::default(),
            incoming,
            plain: Bytes::new(),
            want: RECORD_BYTES,
            quiet: true,
            ended: false,
            broken: None,
            rekeyed: false,
        }
    }

    /// For those who make and take records by themselves; what came along with the handshake is still sealed.
    pub(crate) fn into_parts(self) -> (T, Sealer, Opener, BytesMut) {
        (self.io, self.sealer, self.opener, self.incoming)
    }

    /// What waits for the socket, bytes.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.outgoing.len()
    }

    /// The transport.
    pub fn get_ref(&self) -> &T {
        &self.io
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> TlsStream<T> {
    /// The next plaintext; empty is the end.
    fn poll_plain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            if !self.plain.is_empty() {
                return Poll::Ready(Ok(std::mem::take(&mut self.plain)));
            }
            if self.ended {
                return Poll::Ready(Ok(Bytes::new()));
            }
            if let Some(error) = &self.broken {
                return Poll::Ready(Err(error.clone().into()));
            }
            match self.opener.open(&mut self.incoming) {
                Ok(Opened::Data(plain)) => {
                    self.plain = plain;
                    if self.opener.wants_key() {
                        self.rekey(true, cx)?;
                    }
                }
                Ok(Opened::Nothing) => {}
                Ok(Opened::Closed) => self.ended = true,
                // One answer stands for all wishes until it is out (RFC 8446 4.6.3): a peer that asks and does not read
                // must not fill our memory.
                Ok(Opened::KeyAsked) if self.rekeyed => {}
                Ok(Opened::KeyAsked) => {
                    self.rekeyed = true;
                    self.rekey(false, cx)?;
                }
                Ok(Opened::Short) => {
                    if ready!(self.poll_fill(cx))? == 0 {
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
                Err(error) => return Poll::Ready(Err(self.fail(cx, error))),
            }
        }
    }

    /// Replaces our key: because the peer asks for it, or to `ask` it for the same.
    fn rekey(&mut self, ask: bool, cx: &mut Context<'_>) -> io::Result<()> {
        self.sealer.update_key(ask, &mut self.outgoing)?;
        // It goes out now if it can, else with the next bytes.
        let _ = self.poll_drain(cx)?;
        Ok(())
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let lacks = Opener::lacks(&self.incoming);
        self.incoming.reserve(self.want.max(lacks));
        let room = self.incoming.capacity() - self.incoming.len();
        match poll_read_buf(Pin::new(&mut self.io), cx, &mut self.incoming) {
            Poll::Ready(Ok(got)) => {
                self.want = if got == room { (self.want * 4).min(READ_BYTES) } else { self.want };
                Poll::Ready(Ok(got))
            }
            Poll::Pending => {
                // Idle: give the memory back and start small again.
                if self.incoming.is_empty() {
                    self.incoming = BytesMut::new();
                    self.want = RECORD_BYTES;
                }
                if std::mem::replace(&mut self.quiet, true) {
                    self.outgoing.release();
                }
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        }
    }

    /// Tells the peer as far as it listens.
    fn fail(&mut self, cx: &mut Context<'_>, error: RecordError) -> io::Error {
        self.sealer.abort(&error, &mut self.outgoing);
        let _ = self.poll_drain(cx);
        let _ = Pin::new(&mut self.io).poll_flush(cx);
        self.broken = Some(error.clone());
        error.into()
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outgoing.is_empty() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, self.outgoing.pending()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                size => self.outgoing.consume(size),
            }
        }
        self.rekeyed = false;
        Poll::Ready(Ok(()))
    }

    fn poll_seal(&mut self, cx: &mut Context<'_>, parts: &[&[u8]]) -> Poll<io::Result<()>> {
        if self.outgoing.len() >= SEND_BUFFER_BYTES {
            ready!(self.poll_drain(cx))?;
        }
        self.quiet = false;
        self.sealer.seal(parts, &mut self.outgoing)?;
        // What the socket does not take now waits for the flush.
        match self.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut plain = ready!(self.poll_plain(cx))?;
        let size = plain.len().min(out.remaining());
        out.put_slice(&plain[..size]);
        plain.advance(size);
        self.plain = plain;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let size = buf.len().min(SEND_BUFFER_BYTES);
        ready!(self.poll_seal(cx, &[&buf[..size]]))?;
        Poll::Ready(Ok(size))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut room = SEND_BUFFER_BYTES;
        let mut parts: Vec<&[u8]> = Vec::with_capacity(bufs.len());
        for buf in bufs {
            let part = &buf[..buf.len().min(room)];
            room -= part.len();
            parts.push(part);
        }
        ready!(self.poll_seal(cx, &parts))?;
        Poll::Ready(Ok(SEND_BUFFER_BYTES - room))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.sealer.close(&mut this.outgoing)?;
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
