//! The way out: frames are sealed by whoever has them, and one of those carries the records to the socket.
//!
//! ```text
//!  stream ──seal──┐                       ┌─ swapped when the writer's is empty
//!  stream ──seal──┼──► sealed ──(lock)────┴──► writer.sealed ──► socket
//!  reader ──seal──┘
//! ```
//! The lock is held while frames are sealed, at most [`TURN_BYTES`] of them, and never over a system call: who finds the
//! writer away leaves its records to whoever took it, who looks again before it goes. When the socket is full, the
//! task that drives the connection is woken by it and goes on. So no bytes wait for anybody who sleeps.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker},
};

use tokio::io::AsyncWrite;

use super::{
    Shared,
    frame::{self, Broken, Head, flags, kind},
};
use crate::record::{Outgoing, PLAINTEXT_BYTES, RecordError, Sealer};

/// Sealed bytes beyond which streams wait.
const SEALED_BYTES: usize = 128 << 10;
/// What a stream seals all the same, once between two visits to the socket: a few bytes do not wait for room that
/// others, who carry much, take as soon as there is any.
const FAIR_BYTES: usize = 4 << 10;
/// What one stream seals before others may.
const TURN_BYTES: usize = 64 << 10;
/// What one task writes to the socket, for itself and others, before the driver goes on.
const WRITE_BYTES: usize = 256 << 10;
/// Answers that a peer may have asked for and not read, streams that it has opened included.
const REPLIES: usize = 1000;

/// The half of a transport that is written to.
pub type WriteHalf = Box<dyn AsyncWrite + Send + Unpin>;

/// The socket and what it is to take first.
pub struct Writer {
    io: WriteHalf,
    sealed: Outgoing,
}

/// Everything that is sealed and sent, in its order.
pub struct Out {
    sealer: Sealer,
    sealed: Outgoing,
    /// Away while somebody writes.
    writer: Option<Writer>,
    /// Whoever has the writer is to look again.
    again: bool,
    /// Counts what is carried to the socket at once.
    pub visit: u32,
    /// Streams that wait for room here or for the window of the connection.
    waiting: Vec<(u32, Waker)>,
    /// What the peer takes on the connection, bytes.
    pub window: i64,
    /// Largest frame that the peer takes, bytes.
    pub frame: usize,
    /// Answers in `sealed` and with the writer.
    replies: (usize, usize),
    /// An answer to the peer's wish for a new key is under way; it stands for all wishes until it is out.
    rekeyed: bool,
    /// No stream has sent anything since the reader last ran dry. PINGs and their answers do not count.
    quiet: bool,
    /// The first block has said that no table is used.
    declared: bool,
    /// The socket has failed or was given up.
    gone: Option<Arc<io::Error>>,
}

impl Out {
    /// Of a connection that has sent nothing.
    pub fn new(sealer: Sealer, io: WriteHalf) -> Self {
        Self {
            sealer,
            sealed: Outgoing::default(),
            writer: Some(Writer { io, sealed: Outgoing::default() }),
            again: false,
            visit: 1,
            waiting: Vec::new(),
            window: i64::from(frame::DEFAULT_WINDOW_BYTES),
            frame: frame::DEFAULT_FRAME_BYTES,
            replies: (0, 0),
            rekeyed: false,
            quiet: true,
            declared: false,
            gone: None,
        }
    }

    /// How much of `size` bytes a stream may seal now that has last sealed for visit `last` to the socket. Who has more
    /// than a few stands in line: in small frames it would cost everybody.
    pub fn room(&self, size: usize, last: u32) -> usize {
        let room = match self.sealed.len() {
            ..SEALED_BYTES => TURN_BYTES,
            _ if size <= FAIR_BYTES && last != self.visit => FAIR_BYTES,
            _ => 0,
        };
        usize::try_from(self.window).map_or(0, |window| window.min(room))
    }

    /// What one DATA frame carries at most, bytes: with its head it fills whole records, if it fills any.
    pub fn largest(&self) -> usize {
        let most = self.frame.min(TURN_BYTES);
        let whole = (most + frame::HEAD_BYTES) / PLAINTEXT_BYTES * PLAINTEXT_BYTES;
        if whole == 0 { most } else { whole - frame::HEAD_BYTES }
    }

    /// Whether any stream may seal anything.
    pub fn has_room(&self) -> bool {
        self.room(usize::MAX, self.visit) > 0
    }

    /// Wakes `waker`, of `stream`, when there may be room.
    pub fn wait(&mut self, stream: u32, waker: &Waker) {
        match self.waiting.iter_mut().find(|(other, _)| *other == stream) {
            Some((_, old)) => old.clone_from(waker),
            None => self.waiting.push((stream, waker.clone())),
        }
    }

    /// `stream` waits no more.
    pub fn forget(&mut self, stream: u32) {
        self.waiting.retain(|(other, _)| *other != stream);
    }

    /// One more answer to what the peer has begun.
    pub fn owe(&mut self) {
        self.replies.0 += 1;
    }

    /// Whether the peer reads its answers.
    ///
    /// # Errors
    /// It does not, and asks for more.
    pub fn is_read(&self) -> Result<(), Broken> {
        if self.replies.0 + self.replies.1 > REPLIES {
            return Err(Broken::flood("answers are not read"));
        }
        Ok(())
    }

    /// Everybody who waits for room.
    pub fn waiting(&mut self) -> Vec<(u32, Waker)> {
        std::mem::take(&mut self.waiting)
    }

    /// Seals a DATA frame; `data` is no longer than [`Self::room`].
    pub fn data(&mut self, stream: u32, data: &[u8], end: bool) -> Result<(), RecordError> {
        self.window -= i64::try_from(data.len()).unwrap_or(i64::MAX);
        let flags = if end { flags::END_STREAM } else { 0 };
        let head = Head { size: data.len(), kind: kind::DATA, flags, stream }.write();
        self.quiet = false;
        self.sealer.seal(&[&head, data], &mut self.sealed)
    }

    /// Seals a block of headers.
    pub fn headers(&mut self, stream: u32, block: &[u8], end: bool) -> Result<(), RecordError> {
        let mut frames = Vec::with_capacity(block.len() + 2 * frame::HEAD_BYTES);
        self.quiet = false;
        if std::mem::replace(&mut self.declared, true) {
            frame::headers(stream, block, (end, self.frame), &mut frames);
        } else {
            let block = [&[super::hpack::Encoder::NO_TABLE], block].concat();
            frame::headers(stream, &block, (end, self.frame), &mut frames);
        }
        self.control(&frames)
    }

    /// Seals frames that are written already.
    pub fn control(&mut self, frames: &[u8]) -> Result<(), RecordError> {
        self.sealer.seal(&[frames], &mut self.sealed)
    }

    /// Seals frames that the peer has asked for, `count` of them.
    ///
    /// # Errors
    /// It asks and does not read.
    pub fn reply(&mut self, frames: &[u8], count: usize) -> Result<(), Broken> {
        self.replies.0 += count;
        self.is_read()?;
        // What cannot be sealed is behind the end; the socket tells its own story.
        let _ = self.control(frames);
        Ok(())
    }

    /// Replaces our key: because the peer asks for it, or to `ask` it for the same.
    pub fn rekey(&mut self, ask: bool) -> Result<(), RecordError> {
        if !ask && std::mem::replace(&mut self.rekeyed, true) {
            return Ok(());
        }
        self.sealer.update_key(ask, &mut self.sealed)
    }

    /// Says that nothing more comes, or why.
    pub fn close(&mut self, error: Option<&RecordError>) {
        match error {
            Some(error) => self.sealer.abort(error, &mut self.sealed),
            // Without a key there is nothing to say.
            None => drop(self.sealer.close(&mut self.sealed)),
        }
    }

    /// Everything is with the socket, or it never will be.
    pub fn is_drained(&self) -> bool {
        let written = self.writer.as_ref().is_some_and(|writer| writer.sealed.is_empty());
        self.gone.is_some() || (written && self.sealed.is_empty())
    }

    /// Closes the socket to the peer, which may still send.
    pub fn shut(&mut self, cx: &mut Context<'_>) {
        if let Some(writer) = &mut self.writer {
            // If it fails or takes its time, the end of the connection does it.
            let _ = Pin::new(&mut writer.io).poll_shutdown(cx);
        }
    }

    /// How writing failed, if it did.
    pub fn failure(&self) -> Option<Arc<io::Error>> {
        self.gone.clone()
    }

    /// Closes the socket; what waits is lost.
    pub fn give_up(&mut self, error: Arc<io::Error>) {
        self.gone.get_or_insert(error);
        self.writer = None;
        self.sealed = Outgoing::default();
    }

    /// Gives the memory back after a while of silence.
    pub fn rest(&mut self) {
        if std::mem::replace(&mut self.quiet, true) {
            self.sealed.release();
            if let Some(writer) = &mut self.writer {
                writer.sealed.release();
            }
            if self.waiting.is_empty() {
                self.waiting = Vec::new();
            }
        }
    }

    /// The writer, if it is here and there is work for it.
    fn take(&mut self) -> Option<Writer> {
        let Some(mut writer) = self.writer.take() else {
            self.again = true;
            return None;
        };
        if writer.sealed.is_empty() {
            std::mem::swap(&mut writer.sealed, &mut self.sealed);
            self.visit = self.visit.wrapping_add(1);
            self.replies = (0, self.replies.0);
            self.rekeyed = false;
        }
        if writer.sealed.is_empty() {
            self.writer = Some(writer);
            return None;
        }
        self.again = false;
        Some(writer)
    }

    /// The writer comes back, unless the socket was given up meanwhile.
    pub(super) fn put_back(&mut self, writer: Writer) {
        if self.gone.is_none() {
            self.writer = Some(writer);
        }
    }

    /// As somebody does who is at the socket.
    #[cfg(test)]
    pub(super) fn take_writer(&mut self) -> Option<Writer> {
        self.writer.take()
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.sealed.capacity() + self.writer.as_ref().map_or(0, |writer| writer.sealed.capacity())
    }
}

impl Shared {
    /// Carries what is sealed to the socket, unless somebody is at it: then they look again. To be called after
    /// everything that seals.
    pub fn pump(&self) {
        let mut left = WRITE_BYTES;
        let mut out = self.out.lock();
        while let Some(mut writer) = out.take() {
            if left == 0 {
                // Enough for one task; the driver's turn. It is told before the lock is let go, so it must look.
                out.put_back(writer);
                self.stuck.store(true, Ordering::SeqCst);
                drop(out);
                self.driver.wake_by_ref();
                return;
            }
            let room = if out.has_room() { out.waiting() } else { Vec::new() };
            // Before the socket is asked: its answer may come at once.
            self.stuck.store(true, Ordering::SeqCst);
            drop(out);
            wake_all(room);
            let outcome = writer.write(&mut Context::from_waker(&self.driver));
            out = self.out.lock();
            out.put_back(writer);
            match outcome {
                Poll::Ready(Ok(size)) => left = left.saturating_sub(size),
                Poll::Ready(Err(error)) => {
                    out.give_up(Arc::new(error));
                    self.failed.store(true, Ordering::SeqCst);
                    let waiting = out.waiting();
                    drop(out);
                    wake_all(waiting);
                    self.driver.wake_by_ref();
                    return;
                }
                Poll::Pending if out.again => {}
                Poll::Pending => return,
            }
        }
        if out.writer.is_some() {
            self.stuck.store(false, Ordering::SeqCst);
        }
    }

    /// What the driver does about the way out whenever it is woken.
    pub fn drive(&self) {
        if self.stuck.load(Ordering::SeqCst) {
            self.pump();
        }
    }
}

impl Writer {
    fn write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.io).poll_write(cx, self.sealed.pending()) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(size)) => {
                self.sealed.consume(size);
                // A TCP socket has nothing to flush; what else tests write to may.
                match Pin::new(&mut self.io).poll_flush(cx) {
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    _ => Poll::Ready(Ok(size)),
                }
            }
            other => other,
        }
    }
}

/// Wakes them in their order.
pub fn wake_all(waiting: Vec<(u32, Waker)>) {
    for (_, waker) in waiting {
        waker.wake();
    }
}
