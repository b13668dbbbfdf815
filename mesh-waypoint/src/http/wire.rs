//! The bytes of one downstream HTTP connection, before the HTTP library sees them.
//!
//! hyper is lenient where two parsers may disagree: it accepts `Transfer-Encoding` together with `Content-Length`,
//! repeated equal lengths, and lines that end in a bare LF. Each of these is harmless in one parser and a smuggled
//! request behind two. So [`Wire`] follows the framing of HTTP/1.1 strictly, judges every head, and hands hyper at most
//! one message at a time; the service asks [`Wire`]'s [`Judge`] for the verdict of the head that it was called with.
//! A disagreement about where messages end shows as a call without a verdict, and that is refused as well.
//!
//! ```text
//!  Head ──complete──► Body(Framing) ──end of body──► Head       bad head ──► Poisoned (nothing more is read)
//!    └──── after 101 ────────────────► Opaque (bytes as they are; HTTP/2 is Opaque from the start)
//! ```

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use super::framing::{Body, Head, Malformed, find_head_end, read_head};
use crate::limits;

/// What an HTTP/2 client says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Which protocol a client opened its connection with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0 or HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// Told to [`Wire`] by the service, and asked by it.
#[derive(Clone, Default)]
pub struct Judge(Arc<Shared>);

#[derive(Default)]
struct Shared {
    verdicts: Mutex<VecDeque<Result<(), Malformed>>>,
    in_flight: AtomicUsize,
    begun: AtomicUsize,
    opaque: AtomicBool,
}

/// While it lives, the connection is not idle.
pub struct Busy(Arc<Shared>);

impl Judge {
    /// The verdict about the head of the request that the service was called with.
    ///
    /// # Errors
    /// [`Malformed`] when the head broke a rule or was never seen.
    pub fn next(&self) -> Result<(), Malformed> {
        self.0.verdicts.lock().pop_front().unwrap_or(Err(Malformed::Desynchronised))
    }

    /// Marks one exchange as running.
    pub fn busy(&self) -> Busy {
        self.0.in_flight.fetch_add(1, Relaxed);
        self.0.begun.fetch_add(1, Relaxed);
        Busy(self.0.clone())
    }

    /// How many exchanges run.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.load(Relaxed)
    }

    /// How many exchanges have begun so far.
    pub fn begun(&self) -> usize {
        self.0.begun.load(Relaxed)
    }

    /// From now on the bytes are not HTTP any more (after `101 Switching Protocols`).
    pub fn upgraded(&self) {
        self.0.opaque.store(true, Relaxed);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Collecting a head.
    Head,
    /// Inside a body.
    Body(Body),
    /// Not looked at.
    Opaque,
    /// A head was refused: the rest of the input is not read.
    Poisoned,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// For a peer that is in the middle of something we do not time.
    Untimed,
    /// For the rest of a head.
    Head,
    /// For the next request.
    Idle,
}

/// One downstream connection.
pub struct Wire<S> {
    io: S,
    /// Read from the peer, not yet handed on.
    pending: BytesMut,
    /// How much of `pending` is a judged head that may be handed on.
    cleared: usize,
    phase: Phase,
    judge: Judge,
    waiting: Waiting,
    deadline: Pin<Box<Sleep>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Waits for the first bytes and tells which protocol they speak.
    ///
    /// # Errors
    /// The stream's error, end of stream before a byte, or a deadline.
    pub async fn open(mut io: S) -> io::Result<(Version, Self)> {
        let mut pending = BytesMut::with_capacity(FIRST_READ_BYTES);
        let first = tokio::time::timeout(limits::IDLE, io.read_buf(&mut pending)).await??;
        if first == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let preface = async {
            while pending.len() < PREFACE.len() && PREFACE.starts_with(&pending) {
                if io.read_buf(&mut pending).await? == 0 {
                    break;
                }
            }
            Ok::<_, io::Error>(())
        };
        tokio::time::timeout(limits::PREFACE, preface).await??;
        let version = if pending.starts_with(PREFACE) { Version::Http2 } else { Version::Http1 };
        let phase = if version == Version::Http2 { Phase::Opaque } else { Phase::Head };
        let deadline = Box::pin(sleep_until(Instant::now()));
        let wire = Self {
            io,
            pending,
            cleared: 0,
            phase,
            judge: Judge::default(),
            waiting: Waiting::Untimed,
            deadline,
        };
        Ok((version, wire))
    }

    /// The service's end.
    pub fn judge(&self) -> Judge {
        self.judge.clone()
    }

    /// Looks at what was read: judges a head as soon as it is complete.
    fn judge_pending(&mut self) {
        if self.phase != Phase::Head || self.cleared > 0 {
            return;
        }
        // Empty lines before a request are allowed (RFC 9112, 2.2) and of no use to anyone.
        while self.pending.starts_with(b"\r\n") {
            self.pending.advance(2);
        }
        let verdict = match find_head_end(&self.pending) {
            Some(end) => {
                self.cleared = end;
                read_head(&self.pending[..end])
            }
            None if self.pending.len() < limits::HEADER_BYTES => return,
            // hyper's own limit is the same: it answers 431.
            None => {
                self.cleared = self.pending.len();
                Err(Malformed::TooLarge)
            }
        };
        self.phase = match &verdict {
            Ok(Head { body }) => body.map_or(Phase::Head, Phase::Body),
            Err(_) => Phase::Poisoned,
        };
        self.judge.0.verdicts.lock().push_back(verdict.map(drop));
    }

    /// Hands on what is buffered and allowed; false when there is nothing.
    fn hand_on(&mut self, out: &mut ReadBuf<'_>) -> io::Result<bool> {
        let cleared = if self.cleared > 0 {
            self.cleared
        } else {
            match self.phase {
                Phase::Head | Phase::Poisoned => 0,
                Phase::Opaque => self.pending.len(),
                Phase::Body(_) => self.pending.len().min(out.remaining()),
            }
        };
        let mut count = cleared.min(out.remaining());
        if count == 0 {
            return Ok(false);
        }
        if self.cleared > 0 {
            self.cleared -= count;
        } else if let Phase::Body(body) = &mut self.phase {
            let taken = body.take(&self.pending[..count])?;
            count = taken.bytes;
            if taken.finished {
                self.phase = Phase::Head;
            }
        }
        out.put_slice(&self.pending[..count]);
        self.pending.advance(count);
        Ok(true)
    }

    fn wait_for(&mut self, waiting: Waiting) {
        let after = match waiting {
            Waiting::Untimed => Duration::ZERO,
            Waiting::Head => limits::HEAD,
            Waiting::Idle => limits::IDLE,
        };
        if self.waiting != waiting {
            self.waiting = waiting;
            self.deadline.as_mut().reset(Instant::now() + after);
        }
    }

    /// Nothing came: is it too late?
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wait_for(match self.phase {
            Phase::Head if !self.pending.is_empty() => Waiting::Head,
            Phase::Head if self.judge.in_flight() == 0 => Waiting::Idle,
            _ => Waiting::Untimed,
        });
        if self.waiting == Waiting::Untimed {
            return Poll::Pending;
        }
        ready!(self.deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Enough for the head of most requests.
const FIRST_READ_BYTES: usize = 4096;
/// Most that one read of body bytes takes through the buffer.
const READ_BYTES: usize = 16 << 10;

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.judge.0.opaque.load(Relaxed) {
            this.phase = Phase::Opaque;
        }
        loop {
            this.judge_pending();
            if this.hand_on(out)? {
                return Poll::Ready(Ok(()));
            }
            if out.remaining() == 0 || this.phase == Phase::Poisoned {
                return Poll::Ready(Ok(()));
            }
            if this.phase == Phase::Opaque {
                return Pin::new(&mut this.io).poll_read(cx, out);
            }
            this.pending.reserve(READ_BYTES);
            let before = this.pending.len();
            let read = {
                let mut source = Pin::new(&mut this.io);
                tokio_util::io::poll_read_buf(source.as_mut(), cx, &mut this.pending)
            };
            match read {
                Poll::Pending => return this.poll_deadline(cx),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                // The end of the stream. A head that was begun is handed on as it is: hyper reports it.
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(_)) if before == 0 => this.waiting = Waiting::Untimed,
                Poll::Ready(Ok(_)) => {}
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
