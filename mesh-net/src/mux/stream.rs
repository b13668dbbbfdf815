//! A stream as its user has it.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};

use super::{
    Failure, Shared,
    cell::{Cell, Core},
    frame::{self, Reason},
    head::Head,
    out::Out,
};
use crate::record::RecordError;

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

    /// The next bytes; empty is the end. Who asks for more has read what it was given before: the peer may send as much
    /// again. So a reader that stalls pushes back.
    pub fn poll_data(&self, cx: &Context<'_>) -> Poll<Result<Bytes, Failure>> {
        let ((read, due), outcome) = {
            let mut cell = self.core.cell.lock();
            (cell.give_back(self.shared.round_trip()), poll_cell(&mut cell, cx))
        };
        if read > 0 {
            let mut frames = Vec::new();
            if let Some(increment) = due {
                frame::window(self.core.id, increment, &mut frames);
            }
            self.shared.release(read, &mut frames);
            if !frames.is_empty() {
                self.shared.send_control(&frames);
            }
        }
        outcome
    }

    /// More bytes that have come already.
    pub fn more_data(&self) -> Option<Bytes> {
        self.core.cell.lock().pop()
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
        let room = out.room(data.len(), cell.visit);
        if room == 0 {
            // The end of the stream wakes it as well.
            register(&mut cell.writer, cx);
            cell.parked = true;
            drop(cell);
            out.wait(self.core.id, cx.waker());
            return Poll::Pending;
        }
        let size = data.len().min(window).min(room).min(out.largest());
        cell.send_window -= i64::try_from(size).unwrap_or(i64::MAX);
        cell.visit = out.visit;
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
        out.owe();
        let sealed = out.headers(self.core.id, block, false);
        drop(out);
        self.shared.pump();
        sealed.map_err(Failure::broken)
    }

    /// Seals the last frame of our half.
    fn last(&self, seal: impl FnOnce(&mut Out) -> Result<(), RecordError>) -> Result<(), Failure> {
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
        if self.shared.is_server() {
            out.owe();
        }
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
        let (open, dropped, parked) = {
            let mut cell = self.core.cell.lock();
            let open = !cell.is_over();
            if open {
                cell.failure = Some(Failure::Reset(reason));
            }
            (open, cell.clear(), std::mem::take(&mut cell.parked))
        };
        let mut frames = Vec::new();
        if open {
            self.shared.remove(self.core.id, true);
            frame::reset(self.core.id, reason, &mut frames);
        }
        self.shared.release(dropped, &mut frames);
        if !parked && frames.is_empty() {
            return;
        }
        {
            let mut out = self.shared.out.lock();
            if parked {
                out.forget(self.core.id);
            }
            if open && self.shared.is_server() {
                out.owe();
            }
            // Behind the end there is nobody to tell.
            let _ = out.control(&frames);
        }
        self.shared.pump();
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

fn poll_cell(cell: &mut Cell, cx: &Context<'_>) -> Poll<Result<Bytes, Failure>> {
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

fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(old) => old.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}
