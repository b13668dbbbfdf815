//! Large reads under TLS.
//!
//! rustls asks its transport for 4 KiB at a time. A buffer between the two turns that into one system call per
//! [`READ_BYTES`]; it exists only while it holds something, so that an idle tunnel costs nothing.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// First read after an idle phase.
const SMALL_READ_BYTES: usize = 16 << 10;
/// Largest read.
const READ_BYTES: usize = 256 << 10;

/// A transport whose reads are large and whose writes pass through.
#[derive(Debug)]
pub struct Buffered<T> {
    io: T,
    buffer: Vec<u8>,
    /// Bytes `at..end` of `buffer` are waiting.
    at: usize,
    end: usize,
    want: usize,
}

impl<T> Buffered<T> {
    /// Wraps a transport.
    pub fn new(io: T) -> Self {
        Self { io, buffer: Vec::new(), at: 0, end: 0, want: SMALL_READ_BYTES }
    }

    /// The transport.
    pub fn get_ref(&self) -> &T {
        &self.io
    }
}

impl<T: AsyncRead + Unpin> Buffered<T> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.len() < self.want {
            self.buffer.resize(self.want, 0);
        }
        let mut buf = ReadBuf::new(&mut self.buffer);
        let outcome = Pin::new(&mut self.io).poll_read(cx, &mut buf);
        let got = buf.filled().len();
        match outcome {
            Poll::Pending => {
                // Idle: give the memory back and start small again.
                self.buffer = Vec::new();
                self.want = SMALL_READ_BYTES;
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) => {
                (self.at, self.end) = (0, got);
                if got == self.buffer.len() {
                    self.want = (self.want * 4).min(READ_BYTES);
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Buffered<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.at == this.end {
            ready!(this.poll_fill(cx))?;
        }
        let n = out.remaining().min(this.end - this.at);
        out.put_slice(&this.buffer[this.at..this.at + n]);
        this.at += n;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Buffered<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
