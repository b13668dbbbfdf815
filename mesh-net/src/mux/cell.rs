//! What the reader of a connection and the user of a stream share: what came and was not read, what may be sent.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::Waker,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use super::{Failure, frame::LARGEST, head::Head, window::Window};

/// Bytes that are less than this part of the buffer they came in are copied: they would hold on to all of it, and a peer
/// that sends one at a time would take a hundred times its window.
const COPIED_PART: usize = 16;

/// What reader and holder of a stream share.
#[derive(Debug)]
pub struct Core {
    /// Its number.
    pub id: u32,
    pub(super) cell: Mutex<Cell>,
}

/// What is behind the lock of a stream.
#[derive(Debug)]
pub(super) struct Cell {
    /// The answer to a CONNECT, and whether it was taken.
    pub(super) answer: Option<Option<Box<Head>>>,
    pub(super) queue: VecDeque<Bytes>,
    /// Short ones that came after those in the queue.
    pub(super) tail: BytesMut,
    /// Taken by the reader, which has not asked for more since, bytes.
    pub(super) handed: usize,
    pub(super) window: Window,
    pub(super) received_all: bool,
    pub(super) reader: Option<Waker>,
    /// What the peer takes, bytes; below zero after it has changed its mind.
    pub(super) send_window: i64,
    /// The visit to the socket that it has last sealed bytes for.
    pub(super) visit: u32,
    pub(super) sent_all: bool,
    pub(super) writer: Option<Waker>,
    /// It may be among those who wait for room on the connection.
    pub(super) parked: bool,
    pub(super) failure: Option<Failure>,
}

impl Cell {
    /// The next bytes, if any wait.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let next =
            self.queue.pop_front().or_else(|| (!self.tail.is_empty()).then(|| self.tail.split().freeze()));
        self.handed += next.as_ref().map_or(0, Bytes::len);
        next
    }

    /// The reader is done with what it has taken. How much that was, and what the peer is to be told.
    pub(super) fn give_back(&mut self, round_trip: Duration) -> (usize, Option<u32>) {
        let size = std::mem::take(&mut self.handed);
        if size == 0 {
            return (0, None);
        }
        self.window.release(size);
        let open = !self.received_all && self.failure.is_none();
        (size, if open { self.window.due(Instant::now, round_trip) } else { None })
    }

    fn push(&mut self, payload: Bytes, buffer: usize) {
        if payload.len().saturating_mul(COPIED_PART) < buffer {
            self.tail.extend_from_slice(&payload);
        } else {
            if !self.tail.is_empty() {
                self.queue.push_back(self.tail.split().freeze());
            }
            self.queue.push_back(payload);
        }
    }

    /// Drops what nobody reads or has given back; returns how much it was.
    pub(super) fn clear(&mut self) -> usize {
        let waiting = self.queue.iter().map(Bytes::len).sum::<usize>() + self.tail.len();
        let size = waiting + std::mem::take(&mut self.handed);
        (self.queue, self.tail) = (VecDeque::new(), BytesMut::new());
        size
    }

    /// Both halves have ended, or failed.
    pub(super) fn is_over(&self) -> bool {
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
            handed: 0,
            window: Window::new(window),
            received_all,
            reader: None,
            send_window: i64::from(send_window),
            visit: 0,
            sent_all: false,
            writer: None,
            parked: false,
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
        // The end of its half may have come before, from a peer that does not wait with it.
        cell.received_all |= end;
        Some((Wake([cell.reader.take(), None]), cell.is_over()))
    }

    /// Whether the answer to our CONNECT has come.
    pub fn is_answered(&self) -> bool {
        self.cell.lock().answer.is_some()
    }

    /// Whether nothing has become of it: the peer has sent nothing, or was not answered.
    pub fn is_unused(&self) -> bool {
        let cell = self.cell.lock();
        cell.window.is_untouched() || cell.answer.is_none()
    }

    /// A DATA frame begins, which takes `size` from the window, `padding` of it for nothing.
    pub fn charge(&self, size: u32, padding: u32) -> bool {
        let mut cell = self.cell.lock();
        let fits = cell.window.receive(size);
        cell.window.release(usize::try_from(padding).unwrap_or(0));
        fits
    }

    /// Bytes came, in a buffer of `buffer` bytes; `fits` is what [`Self::charge`] said.
    pub fn receive(&self, (payload, buffer): (Bytes, usize), fits: bool, end: bool) -> Taken {
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
            cell.push(payload, buffer);
        }
        cell.received_all = end;
        Taken::Queued(Wake([cell.reader.take(), None]), cell.is_over())
    }

    /// The peer ends its half without bytes.
    pub fn end(&self) -> Taken {
        self.receive((Bytes::new(), 0), true, true)
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
