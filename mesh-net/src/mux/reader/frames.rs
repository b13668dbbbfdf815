//! What each frame does.

use std::{sync::atomic::Ordering, task::Waker};

use http::{HeaderMap, StatusCode};
use mesh_core::limits::{HEADER_LIST_BYTES, STREAM_WINDOW_BYTES};

use super::{Reader, Request};
use crate::mux::{
    DRAIN_PING, Failure, HELD_STREAMS, Pings, STREAMS,
    cell::{Core, Taken, Wake},
    frame::{self, Broken, LARGEST, Reason, Settings, flags},
    head::{self, Block},
    hpack::Encoder,
    out::wake_all,
    parse::{Data, Frame},
    stream::Stream,
    table::{Found, Stage},
};

impl Reader {
    /// Does what `frame` asks for; the request is one that it begins.
    pub(super) fn handle(&mut self, frame: Frame) -> Result<Option<Request>, Broken> {
        if !self.greeted && !matches!(frame, Frame::Settings(_)) {
            return Err(Broken::protocol("no SETTINGS at first"));
        }
        match frame {
            Frame::Data(data) => self.data(data)?,
            Frame::Headers { stream, block, end } => return self.headers(stream, &block, end),
            Frame::Reset { stream, reason } => self.peer_resets(stream, reason)?,
            Frame::Settings(settings) => {
                self.idle()?;
                self.settings(settings)?;
            }
            Frame::SettingsAck => self.shared.measured(self.begun.elapsed()),
            Frame::Ping(payload) => {
                self.idle()?;
                frame::ping(payload, flags::ACK, &mut self.replies.0);
                self.replies.1 += 1;
            }
            Frame::Pong(DRAIN_PING) => {
                let announced = self.shared.table.lock().stage == Stage::Announced;
                if announced {
                    self.shared.leave();
                }
            }
            Frame::Pong(payload) => {
                self.idle()?;
                // Another number than the one asked about is no answer.
                let asked = u64::from_be_bytes(payload);
                let none = Pings::NONE;
                if self
                    .shared
                    .asked
                    .compare_exchange(asked, none, Ordering::Relaxed, Ordering::Relaxed)
                    .is_ok()
                {
                    self.shared.pong.notify_one();
                }
            }
            Frame::GoAway { last, reason } => self.peer_leaves(last, reason),
            Frame::Window { stream: 0, increment } => {
                let waiting = {
                    let mut out = self.shared.out.lock();
                    out.window += i64::from(increment);
                    if out.window > i64::from(LARGEST) {
                        return Err(Broken::window("the connection's"));
                    }
                    if out.has_room() { out.waiting() } else { Vec::new() }
                };
                wake_all(waiting);
            }
            Frame::Window { stream, increment } => match self.find(stream)? {
                Found::Open(core) => match core.widen(i64::from(increment)) {
                    Some(wake) => wake.now(),
                    None => self.reset(stream, Some(&core), Reason::FLOW_CONTROL_ERROR)?,
                },
                Found::Late | Found::Closed => self.idle()?,
            },
            Frame::BadStream { stream, reason } => match self.find(stream)? {
                Found::Open(core) => self.reset(stream, Some(&core), reason)?,
                Found::Late | Found::Closed => self.idle()?,
            },
            Frame::Ignored => self.idle()?,
        }
        Ok(None)
    }

    /// A frame that brings nothing.
    fn idle(&mut self) -> Result<(), Broken> {
        if self.floods.idle() { Ok(()) } else { Err(Broken::flood("too many frames that bring nothing")) }
    }

    fn find(&self, stream: u32) -> Result<Found, Broken> {
        self.shared.table.lock().find(stream)
    }

    /// Breaks one stream, for something the peer has done.
    fn reset(&mut self, stream: u32, core: Option<&Core>, reason: Reason) -> Result<(), Broken> {
        if !self.floods.broken() {
            return Err(Broken::flood("too many broken streams"));
        }
        self.end_stream(stream, core, reason);
        Ok(())
    }

    fn end_stream(&mut self, stream: u32, core: Option<&Core>, reason: Reason) {
        if let Some(core) = core {
            core.fail(Failure::Reset(reason)).now();
        }
        if core.is_some() {
            self.shared.remove(stream, true)
        } else {
            self.shared.table.lock().forget(stream)
        }
        frame::reset(stream, reason, &mut self.replies.0);
        self.replies.1 += 1;
    }

    fn data(&mut self, data: Data) -> Result<(), Broken> {
        let Data { stream, payload, charge, end } = data;
        if let Some((size, padding)) = charge {
            let due = {
                let mut window = self.shared.window.lock();
                if !window.receive(size) {
                    return Err(Broken::window("of the connection"));
                }
                window.release(usize::try_from(padding).unwrap_or(0));
                window.relieve()
            };
            if let Some(increment) = due {
                frame::window(0, increment, &mut self.replies.0);
            }
            if payload.is_empty() && size <= padding && !end {
                self.idle()?;
            }
        }
        let size = payload.len();
        match self.find(stream)? {
            Found::Open(core) => {
                let fits = charge.is_none_or(|(size, padding)| core.charge(size, padding));
                match core.receive((payload, self.buffer), fits, end) {
                    Taken::Queued(wake, over) => {
                        wake.now();
                        if over {
                            self.shared.remove(stream, false);
                        }
                        return Ok(());
                    }
                    Taken::AfterEnd => self.reset(stream, Some(&core), Reason::STREAM_CLOSED)?,
                    Taken::TooMuch => self.reset(stream, Some(&core), Reason::FLOW_CONTROL_ERROR)?,
                    Taken::Unwanted => {}
                }
            }
            Found::Late => {}
            Found::Closed => self.reset(stream, None, Reason::STREAM_CLOSED)?,
        }
        self.shared.release(size, &mut self.replies.0);
        Ok(())
    }

    fn headers(&mut self, stream: u32, block: &[u8], end: bool) -> Result<Option<Request>, Broken> {
        let broken = |_| Broken { reason: Reason::COMPRESSION_ERROR, what: "headers" };
        let list = usize::try_from(HEADER_LIST_BYTES).unwrap_or(usize::MAX);
        // Read whatever becomes of it: the next ones depend on it.
        let block = head::read(&mut self.decoder, block, list).map_err(broken)?;
        let found = {
            let mut table = self.shared.table.lock();
            match table.find(stream) {
                Ok(Found::Late) if stream <= table.last_of_peer() || !self.shared.is_server() => Found::Late,
                Ok(Found::Open(core)) => Found::Open(core),
                Ok(Found::Closed) => Found::Closed,
                _ if !table.is_new(stream)? => Found::Closed,
                _ if table.stage == Stage::Leaving => Found::Late,
                _ => {
                    drop(table);
                    return self.request(stream, block, end);
                }
            }
        };
        match found {
            Found::Open(core) => self.later_headers(&core, block, end)?,
            // A block is more work than other frames that come to nothing.
            Found::Late if !self.floods.broken() => {
                return Err(Broken::flood("too many headers of streams that are over"));
            }
            Found::Late => {}
            Found::Closed => self.reset(stream, None, Reason::STREAM_CLOSED)?,
        }
        Ok(None)
    }

    /// A stream that the peer opens.
    fn request(&mut self, stream: u32, block: Block, end: bool) -> Result<Option<Request>, Broken> {
        self.shared.out.lock().is_read()?;
        let head = match block {
            Block::Head(head) if head.is_request() => head,
            Block::TooLong => {
                let block = head::answer(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, &HeaderMap::new());
                // It may be the first block of all.
                let block = [&[Encoder::NO_TABLE], &block[..]].concat();
                let limits = (true, frame::DEFAULT_FRAME_BYTES);
                frame::headers(stream, &block, limits, &mut self.replies.0);
                self.replies.1 += 1;
                self.reset(stream, None, Reason::NO_ERROR)?;
                return Ok(None);
            }
            Block::Head(_) | Block::Bad(_) => {
                self.reset(stream, None, Reason::PROTOCOL_ERROR)?;
                return Ok(None);
            }
        };
        let core = {
            let mut table = self.shared.table.lock();
            if table.len() < STREAMS && table.held < HELD_STREAMS {
                let core = Core::new(stream, table.window, STREAM_WINDOW_BYTES, end);
                table.insert(core.clone());
                table.held += 1;
                Some(core)
            } else {
                None
            }
        };
        let Some(core) = core else {
            // Nothing is broken: it may try elsewhere.
            self.idle()?;
            self.end_stream(stream, None, Reason::REFUSED_STREAM);
            return Ok(None);
        };
        self.floods.stream();
        Ok(Some(Request { head, stream: Stream::new(self.shared.clone(), core) }))
    }

    /// The answer to a CONNECT of ours, or trailers, which say nothing to a tunnel but that it ends.
    fn later_headers(&mut self, core: &Core, block: Block, end: bool) -> Result<(), Broken> {
        let awaited = !self.shared.is_server() && !core.is_answered();
        let head = match block {
            Block::Head(head) if awaited && head.is_answer() => head,
            Block::Head(head) if !awaited && head.is_trailers() && end => {
                match core.end() {
                    Taken::Queued(wake, over) => {
                        wake.now();
                        if over {
                            self.shared.remove(core.id, false);
                        }
                    }
                    _ => self.reset(core.id, Some(core), Reason::STREAM_CLOSED)?,
                }
                return Ok(());
            }
            _ => return self.reset(core.id, Some(core), Reason::PROTOCOL_ERROR),
        };
        if head.status.is_some_and(|status| status < 200) {
            // A word in between; the answer is still to come.
            if end {
                return self.reset(core.id, Some(core), Reason::PROTOCOL_ERROR);
            }
            return self.idle();
        }
        self.floods.stream();
        if let Some((wake, over)) = core.answered(head, end) {
            wake.now();
            if over {
                self.shared.remove(core.id, false);
            }
        }
        Ok(())
    }

    fn peer_resets(&mut self, stream: u32, reason: Reason) -> Result<(), Broken> {
        let Found::Open(core) = self.find(stream)? else { return self.idle() };
        if self.shared.is_server() && core.is_unused() && !self.floods.reset() {
            return Err(Broken::flood("streams are opened to be reset"));
        }
        core.fail(Failure::Reset(reason)).now();
        self.shared.remove(stream, false);
        Ok(())
    }

    fn settings(&mut self, settings: Settings) -> Result<(), Broken> {
        if !self.shared.is_server() && settings.push == Some(true) {
            return Err(Broken::protocol("ENABLE_PUSH of a server"));
        }
        if let Some(size) = settings.frame {
            self.shared.out.lock().frame = usize::try_from(size).unwrap_or(frame::DEFAULT_FRAME_BYTES);
        }
        let (mut wakes, mut opening, mut broken) = (Vec::new(), Vec::new(), Ok(()));
        {
            let mut table = self.shared.table.lock();
            if let Some(window) = settings.window {
                let by = i64::from(window) - i64::from(std::mem::replace(&mut table.window, window));
                for core in table.iter() {
                    match core.widen(by) {
                        Some(wake) => wakes.push(wake),
                        None => broken = Err(Broken::window("INITIAL_WINDOW_SIZE")),
                    }
                }
            }
            let first = !std::mem::replace(&mut self.greeted, true);
            match settings.streams {
                Some(streams) => table.permitted = usize::try_from(streams).unwrap_or(usize::MAX),
                // Who says nothing permits any number.
                None if first => table.permitted = usize::MAX,
                None => {}
            }
            if table.len() < table.permitted {
                opening = table.opening();
            }
        }
        wakes.into_iter().for_each(Wake::now);
        opening.into_iter().for_each(Waker::wake);
        broken?;
        frame::settings_ack(&mut self.replies.0);
        self.replies.1 += 1;
        Ok(())
    }

    fn peer_leaves(&mut self, last: u32, reason: Reason) {
        tracing::debug!(%reason, "the peer of a tunnel is going away");
        let (gone, opening) = {
            let mut table = self.shared.table.lock();
            table.peer_leaves = Some(table.peer_leaves.map_or(last, |before| before.min(last)));
            // Of a client, it is about streams that a server would have pushed.
            let gone = if self.shared.is_server() { Vec::new() } else { table.beyond(last) };
            (gone, table.opening())
        };
        for core in gone {
            core.fail(Failure::GoAway).now();
        }
        opening.into_iter().for_each(Waker::wake);
    }
}
