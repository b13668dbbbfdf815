//! HTTP/2 for tunnels: streams of CONNECT over one connection of [`crate::record`]s, either role (RFC 9113).
//!
//! There is no task in the way of bytes that go out: whoever has them seals them and writes them to the socket
//! ([`out`]). What comes in is read by the task that drives the connection ([`reader`]), opened where it lies, and
//! handed to its stream as slices. Locks are held for the few lines that need them, never over a system call:
//!
//! | Lock | Guards | May be taken inside |
//! | --- | --- | --- |
//! | [`Shared::out`] | sealing, the window of the connection | |
//! | [`Shared::table`] | which streams there are | `out` |
//! | a stream's cell | its bytes, windows, wakers | `out` or `table` |
//! | [`Shared::window`] | what the peer may send | |
//!
//! What a peer can make us do or keep is bounded where it is done: frames in [`parse`], floods in [`flood`], answers
//! that it does not read in [`out`], bytes in [`window`], streams in [`table`].

mod cell;
mod connection;
mod flood;
mod frame;
mod head;
mod hpack;
mod out;
mod parse;
mod reader;
mod stream;
mod table;
mod window;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use mesh_core::limits::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES, HEADER_LIST_BYTES, STREAM_WINDOW_BYTES, TUNNEL_STREAMS,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

use self::{
    cell::Core,
    frame::{Broken, Settings},
    out::{Out, wake_all},
    table::{Role, Stage, Table},
    window::Window,
};
pub use self::{
    connection::{Connection, Handle, Pings, client, server},
    frame::Reason,
    head::{Head, answer, connect},
    reader::{Event, Request},
    stream::Stream,
};
use crate::record::RecordError;

/// Streams that a peer may open at once: twice what our own client uses (`wire-protocol.md` H31).
const STREAMS: usize = 2 * TUNNEL_STREAMS;
/// Streams whose users may still hold them, open or not: a peer that opens and resets makes work all the same.
const HELD_STREAMS: usize = 2 * STREAMS;
/// The PING that stands between the two GOAWAYs.
const DRAIN_PING: [u8; 8] = *b"leaving?";

/// Why a connection ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Cause {
    /// It was lost, or its records are not in order.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// The peer broke the protocol.
    #[error("{}: {}", .0.reason, .0.what)]
    Broken(Broken),
    /// All is done, or we gave up.
    #[error("the connection is closed")]
    Closed,
}

impl Cause {
    fn io(kind: io::ErrorKind) -> Self {
        Self::Io(Arc::new(kind.into()))
    }
}

/// Why a stream ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// It was reset.
    #[error("the stream was reset: {0}")]
    Reset(Reason),
    /// The peer leaves and has not acted on it.
    #[error("the peer is going away")]
    GoAway,
    /// With its connection.
    #[error(transparent)]
    Lost(Cause),
}

impl Failure {
    fn broken(error: RecordError) -> Self {
        Self::Lost(Cause::Io(Arc::new(error.into())))
    }
}

/// What a connection is, to its streams and to its driver.
pub struct Shared {
    role: Role,
    out: Mutex<Out>,
    table: Mutex<Table>,
    window: Mutex<Window>,
    /// The driver has to look after the way out when it is woken.
    stuck: AtomicBool,
    /// The socket has failed.
    failed: AtomicBool,
    /// The task that drives the connection, whichever it is.
    driver: Waker,
    driving: Arc<Driving>,
    /// Shortest round trip seen, microseconds; 0 is none.
    round_trip: AtomicU64,
    /// What the PING of ours says that is not answered yet; [`Pings::NONE`] if there is none.
    asked: AtomicU64,
    pong: Notify,
}

/// Wakes the task that drives a connection.
#[derive(Default)]
struct Driving(AtomicWaker);

impl Wake for Driving {
    fn wake(self: Arc<Self>) {
        self.0.wake();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.wake();
    }
}

impl Shared {
    fn new(role: Role, out: Out) -> Arc<Self> {
        let driving = Arc::new(Driving::default());
        // A client may not have heard yet what the server permits.
        Arc::new(Self {
            role,
            out: Mutex::new(out),
            table: Mutex::new(Table::new(role, TUNNEL_STREAMS)),
            window: Mutex::new(Window::new(CONNECTION_WINDOW_BYTES)),
            stuck: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            driver: driving.clone().into(),
            driving,
            round_trip: AtomicU64::new(0),
            asked: AtomicU64::new(Pings::NONE),
            pong: Notify::new(),
        })
    }

    fn is_server(&self) -> bool {
        self.role == Role::Server
    }

    fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip.load(Ordering::Relaxed))
    }

    fn measured(&self, round_trip: Duration) {
        let micros = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX).max(1);
        let shorter = |now: u64| (now == 0 || micros < now).then_some(micros);
        let _ = self.round_trip.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shorter);
    }

    /// Says what we are, first of all.
    fn greet(&self) {
        let mut frames = Vec::with_capacity(128);
        let server = self.is_server();
        if !server {
            frames.extend_from_slice(frame::PREFACE);
        }
        let streams = if server { u32::try_from(STREAMS).ok() } else { None };
        let settings = Settings {
            streams,
            window: Some(STREAM_WINDOW_BYTES),
            frame: Some(FRAME_BYTES),
            headers: Some(HEADER_LIST_BYTES),
            push: if server { None } else { Some(false) },
        };
        settings.write(&mut frames);
        frame::window(0, CONNECTION_WINDOW_BYTES - frame::DEFAULT_WINDOW_BYTES, &mut frames);
        self.send_control(&frames);
    }

    /// Seals and sends frames of ours. Behind the end there is nobody to tell.
    fn send_control(&self, frames: &[u8]) {
        let _ = self.out.lock().control(frames);
        self.pump();
    }

    /// `size` bytes of any stream were read or dropped; appends what the peer is to be told.
    fn release(&self, size: usize, frames: &mut Vec<u8>) {
        if size == 0 {
            return;
        }
        let round_trip = self.round_trip();
        let due = {
            let mut window = self.window.lock();
            window.release(size);
            window.due(std::time::Instant::now, round_trip)
        };
        if let Some(increment) = due {
            frame::window(0, increment, frames);
        }
    }

    /// The stream is over; `reset` if by us.
    fn remove(&self, stream: u32, reset: bool) {
        let (waiting, done) = {
            let mut table = self.table.lock();
            (table.remove(stream, reset), table.is_done())
        };
        waiting.into_iter().for_each(Waker::wake);
        if done {
            self.driver.wake_by_ref();
        }
    }

    /// A user has let go of a stream.
    fn let_go(&self) {
        let mut table = self.table.lock();
        table.held = table.held.saturating_sub(1);
    }

    /// Opens a stream with the block of a CONNECT, once there is a place for it.
    fn poll_open(self: &Arc<Self>, cx: &Context<'_>, block: &[u8]) -> Poll<Result<Stream, Failure>> {
        let mut out = self.out.lock();
        let core = {
            let mut table = self.table.lock();
            if let Some(cause) = &table.ended {
                return Poll::Ready(Err(Failure::Lost(cause.clone())));
            }
            if table.peer_leaves.is_some() {
                return Poll::Ready(Err(Failure::GoAway));
            }
            let Some(number) = table.next_number(cx.waker()) else { return Poll::Pending };
            let Some(number) = number else { return Poll::Ready(Err(Failure::GoAway)) };
            let core = Core::new(number, table.window, STREAM_WINDOW_BYTES, false);
            table.insert(core.clone());
            table.held += 1;
            core
        };
        let number = core.id;
        let stream = Stream::new(self.clone(), core);
        let sealed = out.headers(number, block, false);
        drop(out);
        self.pump();
        Poll::Ready(sealed.map(|()| stream).map_err(Failure::broken))
    }

    /// Takes no more streams from the peer, in two steps: it may have opened some that are still under way.
    fn drain(&self) {
        let mut frames = Vec::new();
        {
            let mut table = self.table.lock();
            if table.stage != Stage::Staying {
                return;
            }
            table.stage = Stage::Announced;
        }
        frame::goaway(frame::LARGEST, Reason::NO_ERROR, &mut frames);
        frame::ping(DRAIN_PING, 0, &mut frames);
        self.send_control(&frames);
    }

    /// The second step.
    fn leave(&self) {
        let last = {
            let mut table = self.table.lock();
            if table.stage == Stage::Leaving {
                return;
            }
            table.stage = Stage::Leaving;
            table.last_of_peer()
        };
        let mut frames = Vec::new();
        frame::goaway(last, Reason::NO_ERROR, &mut frames);
        self.send_control(&frames);
        self.driver.wake_by_ref();
    }

    /// Everything ends for `cause`: streams fail, and the peer is told with `goodbye` as far as it listens.
    fn end(&self, cause: &Cause, goodbye: Option<Reason>) {
        let (streams, opening, last) = {
            let mut table = self.table.lock();
            table.ended.get_or_insert_with(|| cause.clone());
            (table.beyond(0), table.opening(), table.last_of_peer())
        };
        // Before those who wait for room are woken: whoever looks once more finds the failure, and waits for nothing.
        for core in streams {
            core.fail(Failure::Lost(cause.clone())).now();
        }
        let waiting = {
            let mut out = self.out.lock();
            if let Some(reason) = goodbye {
                let mut frames = Vec::new();
                frame::goaway(last, reason, &mut frames);
                let _ = out.control(&frames);
                out.close(None);
            }
            out.waiting()
        };
        opening.into_iter().for_each(Waker::wake);
        wake_all(waiting);
        self.pump();
    }

    /// How the socket failed, if it did.
    fn lost(&self) -> Option<Arc<io::Error>> {
        if self.failed.load(Ordering::SeqCst) { self.out.lock().failure() } else { None }
    }

    /// Closes the socket.
    fn close(&self) {
        self.out.lock().give_up(Arc::new(io::ErrorKind::BrokenPipe.into()));
    }
}

#[cfg(test)]
mod tests;
