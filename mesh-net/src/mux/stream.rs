//! One stream: what came and was not read, what may be sent, how it ended.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use super::{
    Failure, Shared,
    frame::{self, LARGEST, Reason},
    head::Head,
    out::TURN_BYTES,
    window::Window,
};

/// Shorter bytes that have to wait are copied: they would hold on to the whole buffer that they came in, and a peer
/// that sends one at a time would take a hundred times its window.
const COPIED_BYTES: usize = 4 << 10;

/// What reader and holder of a stream share.
#[derive(Debug)]
pub struct Core {
    /// Its number.
    pub id: u32,
    cell: Mutex<Cell>,
}

#[derive(Debug)]
struct Cell {
    /// The answer to a CONNECT, and whether it was taken.
    answer: Option<Option<Box<Head>>>,
    queue: VecDeque<Bytes>,
    /// Short ones that came after those in the queue.
    tail: BytesMut,
    window: Window,
    received_all: bool,
    reader: Option<Waker>,
    /// What the peer takes, bytes; below zero after it has changed its mind.
    send_window: i64,
    sent_all: bool,
    writer: Option<Waker>,
    failure: Option<Failure>,
}

impl Cell {
    fn pop(&mut self) -> Option<Bytes> {
        self.queue.pop_front().or_else(|| (!self.tail.is_empty()).then(|| self.tail.split().freeze()))
    }

    fn push(&mut self, payload: Bytes) {
        if self.queue.is_empty() && self.tail.is_empty() {
            self.queue.push_back(payload);
        } else if payload.len() < COPIED_BYTES {
            self.tail.extend_from_slice(&payload);
        } else {
            if !self.tail.is_empty() {
                self.queue.push_back(self.tail.split().freeze());
            }
            self.queue.push_back(payload);
        }
    }

    /// Drops what nobody reads; returns how much it was.
    fn clear(&mut self) -> usize {
        let size = self.queue.iter().map(Bytes::len).sum::<usize>() + self.tail.len();
        (self.queue, self.tail) = (VecDeque::new(), BytesMut::new());
        size
    }

    fn is_over(&self) -> bool {
        self.failure.is_some() || (self.received_all && self.sent_all)
    }
}

/// Wakes after the lock is let go.
#[must_use]
pub struct Wake([Option<Waker>; 2]);

impl Wake {
    /// Does it.
    pub fn now(self) {
        for waker in self.0.into_iter().flatten() {
            waker.wake();
        }
    }
}

/// What came of bytes.
pub enum Taken {
    /// Someone will read them. Whether the stream is over with them.
    Queued(Wake, bool),
    /// The peer had said that there were no more.
    AfterEnd,
    /// More than we permitted.
    TooMuch,
    /// Nobody reads them.
    Unwanted,
}

impl Core {
    /// A stream that begins.
    pub fn new(id: u32, send_window: u32, window: u32, received_all: bool) -> Arc<Self> {
        let cell = Cell {
            answer: None,
            queue: VecDeque::new(),
            tail: BytesMut::new(),
            window: Window::new(window),
            received_all,
            reader: None,
            send_window: i64::from(send_window),
            sent_all: false,
            writer: None,
            failure: None,
        };
        Arc::new(Self { id, cell: Mutex::new(cell) })
    }

    /// The answer came; the stream may end with it. Whether it is the first one, and the stream over.
    pub fn answered(&self, head: Box<Head>, end: bool) -> Option<(Wake, bool)> {
        let mut cell = self.cell.lock();
        if cell.answer.is_some() {
            return None;
        }
        cell.answer = Some(Some(head));
        cell.received_all = end;
        Some((Wake([cell.reader.take(), None]), cell.is_over()))
    }

    /// Whether the answer to our CONNECT has come.
    pub fn is_answered(&self) -> bool {
        self.cell.lock().answer.is_some()
    }

    /// A DATA frame begins, which takes `size` from the window, `padding` of it for nothing.
    pub fn charge(&self, size: u32, padding: u32) -> bool {
        let mut cell = self.cell.lock();
        let fits = cell.window.receive(size);
        cell.window.release(usize::try_from(padding).unwrap_or(0));
        fits
    }

    /// Bytes came; `fits` is what [`Self::charge`] said.
    pub fn receive(&self, payload: Bytes, fits: bool, end: bool) -> Taken {
        let mut cell = self.cell.lock();
        if cell.failure.is_some() {
            return Taken::Unwanted;
        }
        if cell.received_all {
            return Taken::AfterEnd;
        }
        if !fits {
            return Taken::TooMuch;
        }
        if !payload.is_empty() {
            cell.push(payload);
        }
        cell.received_all = end;
        Taken::Queued(Wake([cell.reader.take(), None]), cell.is_over())
    }

    /// The peer ends its half without bytes.
    pub fn end(&self) -> Taken {
        self.receive(Bytes::new(), true, true)
    }

    /// The peer takes more, or less. Whether the window is still one.
    pub fn widen(&self, by: i64) -> Option<Wake> {
        let mut cell = self.cell.lock();
        cell.send_window += by;
        if cell.send_window > i64::from(LARGEST) {
            return None;
        }
        Some(Wake([if cell.send_window > 0 { cell.writer.take() } else { None }, None]))
    }

    /// The stream is over by `failure`, unless it was over before. Bytes that came before may still be read.
    pub fn fail(&self, failure: Failure) -> Wake {
        let mut cell = self.cell.lock();
        if !(cell.received_all && cell.sent_all) {
            cell.failure.get_or_insert(failure);
        }
        Wake([cell.reader.take(), cell.writer.take()])
    }
}

/// A stream in the hand of its user. Dropped unfinished, it is reset.
pub struct Stream {
    shared: Arc<Shared>,
    core: Arc<Core>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("id", &self.core.id).finish_non_exhaustive()
    }
}

impl Stream {
    /// Takes hold of `core`, which the table counts as held.
    pub(super) fn new(shared: Arc<Shared>, core: Arc<Core>) -> Self {
        Self { shared, core }
    }

    /// The answer to our CONNECT.
    pub fn poll_answer(&self, cx: &Context<'_>) -> Poll<Result<Box<Head>, Failure>> {
        let mut cell = self.core.cell.lock();
        if let Some(head) = cell.answer.as_mut().and_then(Option::take) {
            return Poll::Ready(Ok(head));
        }
        if let Some(failure) = &cell.failure {
            return Poll::Ready(Err(failure.clone()));
        }
        register(&mut cell.reader, cx);
        Poll::Pending
    }

    /// The next bytes; empty is the end.
    pub fn poll_data(&self, cx: &Context<'_>) -> Poll<Result<Bytes, Failure>> {
        let mut cell = self.core.cell.lock();
        if let Some(bytes) = cell.pop() {
            return Poll::Ready(Ok(bytes));
        }
        // Nothing waits: keep no room for it.
        if cell.queue.capacity() > 4 {
            cell.queue = VecDeque::new();
        }
        cell.tail = BytesMut::new();
        if cell.received_all {
            return Poll::Ready(Ok(Bytes::new()));
        }
        if let Some(failure) = &cell.failure {
            return Poll::Ready(Err(failure.clone()));
        }
        register(&mut cell.reader, cx);
        Poll::Pending
    }

    /// More bytes that have come already.
    pub fn more_data(&self) -> Option<Bytes> {
        self.core.cell.lock().pop()
    }

    /// `size` bytes were read: the peer may send as much again.
    pub fn release(&self, size: usize) {
        let round_trip = self.shared.round_trip();
        let due = {
            let mut cell = self.core.cell.lock();
            cell.window.release(size);
            if cell.received_all || cell.failure.is_some() {
                None
            } else {
                cell.window.due(Instant::now, round_trip)
            }
        };
        let mut frames = Vec::new();
        if let Some(increment) = due {
            frame::window(self.core.id, increment, &mut frames);
        }
        self.shared.release(size, &mut frames);
        if !frames.is_empty() {
            self.shared.send_control(&frames);
        }
    }

    /// Sends from the front of `data`, which is not empty; returns how much. It is on its way then.
    pub fn poll_send(&self, cx: &Context<'_>, data: &[u8]) -> Poll<Result<usize, Failure>> {
        let mut out = self.shared.out.lock();
        let mut cell = self.core.cell.lock();
        if let Some(failure) = &cell.failure {
            return Poll::Ready(Err(failure.clone()));
        }
        if cell.sent_all {
            return Poll::Ready(Err(Failure::Reset(Reason::STREAM_CLOSED)));
        }
        let window = usize::try_from(cell.send_window).unwrap_or(0);
        if window == 0 {
            register(&mut cell.writer, cx);
            return Poll::Pending;
        }
        let room = out.room();
        if room == 0 {
            drop(cell);
            out.wait(self.core.id, cx.waker());
            return Poll::Pending;
        }
        let size = data.len().min(window).min(room).min(out.frame).min(TURN_BYTES);
        cell.send_window -= i64::try_from(size).unwrap_or(i64::MAX);
        drop(cell);
        let sealed = out.data(self.core.id, data.get(..size).unwrap_or(data), false);
        drop(out);
        self.shared.pump();
        Poll::Ready(match sealed {
            Ok(()) => Ok(size),
            Err(error) => Err(Failure::broken(error)),
        })
    }

    /// Says that nothing more is sent.
    pub fn finish(&self) -> Result<(), Failure> {
        self.last(|out| out.data(self.core.id, &[], true))
    }

    /// Answers the peer's CONNECT; the stream may end with it.
    pub fn answer(&self, block: &[u8], end: bool) -> Result<(), Failure> {
        if end {
            return self.last(|out| out.headers(self.core.id, block, true));
        }
        let mut out = self.shared.out.lock();
        {
            let mut cell = self.core.cell.lock();
            if let Some(failure) = &cell.failure {
                return Err(failure.clone());
            }
            cell.answer.get_or_insert(None);
        }
        let sealed = out.headers(self.core.id, block, false);
        drop(out);
        self.shared.pump();
        sealed.map_err(Failure::broken)
    }

    /// Seals the last frame of our half.
    fn last(
        &self,
        seal: impl FnOnce(&mut super::out::Out) -> Result<(), crate::record::RecordError>,
    ) -> Result<(), Failure> {
        let mut out = self.shared.out.lock();
        let mut cell = self.core.cell.lock();
        if let Some(failure) = &cell.failure {
            return Err(failure.clone());
        }
        if std::mem::replace(&mut cell.sent_all, true) {
            return Ok(());
        }
        let over = cell.is_over();
        drop(cell);
        let sealed = seal(&mut out);
        drop(out);
        self.shared.pump();
        if over {
            self.shared.remove(self.core.id, false);
        }
        sealed.map_err(Failure::broken)
    }

    /// Ends both halves at once.
    pub fn reset(&self, reason: Reason) {
        let (open, dropped) = {
            let mut cell = self.core.cell.lock();
            let open = !cell.is_over();
            if open {
                cell.failure = Some(Failure::Reset(reason));
            }
            (open, cell.clear())
        };
        let mut frames = Vec::new();
        if open {
            self.shared.remove(self.core.id, true);
            frame::reset(self.core.id, reason, &mut frames);
        }
        self.shared.release(dropped, &mut frames);
        if !frames.is_empty() {
            self.shared.send_control(&frames);
        }
    }

    /// Whether our half has ended and the peer's has not.
    fn is_answered_only(&self) -> bool {
        let cell = self.core.cell.lock();
        cell.sent_all && !cell.received_all
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let server = self.shared.is_server();
        // A server that has said all it has to say asks the peer to stop, which is no error.
        let reason = if server && self.is_answered_only() { Reason::NO_ERROR } else { Reason::CANCEL };
        self.reset(reason);
        self.shared.let_go();
    }
}

fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(old) => old.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}
