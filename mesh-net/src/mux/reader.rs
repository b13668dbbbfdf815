//! The way in: the driver of a connection reads records as large as the flow deserves, opens them where they lie, and
//! hands each frame to whom it concerns. What the peer asks for is answered before the socket is waited for.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker, ready},
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use mesh_core::limits::{HEADER_LIST_BYTES, STREAM_WINDOW_BYTES};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

use super::{
    Cause, DRAIN_PING, Failure, HELD_STREAMS, STREAMS, Shared,
    flood::Floods,
    frame::{self, Broken, LARGEST, Reason, Settings, flags},
    head::{self, Block, Head},
    hpack::Decoder,
    out::wake_all,
    parse::{Data, Frame, Parser},
    stream::{Core, Stream, Taken},
    table::{Found, Stage},
};
use crate::record::{Opened, Opener, RecordError};

/// First read of a connection that was idle, bytes.
const FIRST_READ_BYTES: usize = 4 << 10;
/// Largest read, bytes.
const READ_BYTES: usize = 256 << 10;
/// What the driver reads before it gives way, bytes: those whom it has woken must get their turn.
const TURN_BYTES: usize = 256 << 10;

/// The half of a transport that is read from.
pub type ReadHalf = Box<dyn AsyncRead + Send + Unpin>;

/// A request of the peer.
#[derive(Debug)]
pub struct Request {
    /// Its head.
    pub head: Box<Head>,
    /// The rest.
    pub stream: Stream,
}

/// What a connection comes to.
#[derive(Debug)]
pub enum Event {
    /// The peer opens a stream.
    Request(Request),
    /// Nothing more comes.
    End(Cause),
}

/// Reads one connection.
pub struct Reader {
    io: ReadHalf,
    opener: Opener,
    incoming: BytesMut,
    want: usize,
    /// What is left of the last record.
    plain: Bytes,
    parser: Parser,
    decoder: Decoder,
    shared: Arc<Shared>,
    /// Answers to be sent, and how many.
    replies: (Vec<u8>, usize),
    floods: Floods,
    begun: Instant,
    /// The peer has told its settings.
    greeted: bool,
    turn: usize,
    closing: bool,
}

impl Reader {
    /// `incoming` came along with the handshake.
    pub fn new(shared: Arc<Shared>, io: ReadHalf, (opener, incoming): (Opener, BytesMut)) -> Self {
        let parser = if shared.is_server() { Parser::of_client() } else { Parser::of_server() };
        let begun = Instant::now();
        Self {
            io,
            opener,
            incoming,
            want: FIRST_READ_BYTES,
            plain: Bytes::new(),
            parser,
            decoder: Decoder::default(),
            shared,
            replies: (Vec::new(), 0),
            floods: Floods::new(begun),
            begun,
            greeted: false,
            turn: 0,
            closing: false,
        }
    }

    /// Goes on until the peer has told its settings.
    pub fn poll_greeting(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Cause>> {
        self.attend(cx);
        while !self.greeted {
            if let Err(cause) = ready!(self.poll_frame(cx)) {
                return Poll::Ready(Err(self.fail(cause)));
            }
        }
        Poll::Ready(self.flush().map_err(|broken| self.fail(Cause::Broken(broken))))
    }

    /// Goes on until something happens. To be polled all the time, whatever is done with what happens.
    pub fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        self.attend(cx);
        loop {
            if let Some(error) = self.shared.lost() {
                return Poll::Ready(Event::End(self.fail(Cause::Io(error))));
            }
            if self.is_done() {
                if !std::mem::replace(&mut self.closing, true) {
                    self.shared.leave();
                    self.shared.end(&Cause::Closed, None);
                    self.shared.out.lock().close(None);
                    self.shared.pump();
                }
                if self.shared.out.lock().is_drained() {
                    return Poll::Ready(Event::End(Cause::Closed));
                }
            }
            match ready!(self.poll_frame(cx)) {
                Ok(None) => {}
                Ok(Some(request)) => {
                    return Poll::Ready(match self.flush() {
                        Ok(()) => Event::Request(request),
                        Err(broken) => Event::End(self.fail(Cause::Broken(broken))),
                    });
                }
                Err(cause) => return Poll::Ready(Event::End(self.fail(cause))),
            }
        }
    }

    fn attend(&mut self, cx: &Context<'_>) {
        self.turn = 0;
        self.shared.driving.0.register(cx.waker());
        self.shared.drive();
    }

    fn is_done(&self) -> bool {
        self.closing || self.shared.table.lock().is_done()
    }

    fn fail(&mut self, cause: Cause) -> Cause {
        let goodbye = match &cause {
            Cause::Broken(broken) => Some(broken.reason),
            _ => None,
        };
        self.shared.end(&cause, goodbye);
        cause
    }

    /// Handles one frame, or what else a record may be.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Request>, Cause>> {
        loop {
            match self.parser.next(&mut self.plain) {
                Ok(Some(frame)) => return Poll::Ready(self.handle(frame).map_err(Cause::Broken)),
                Ok(None) => {}
                Err(broken) => return Poll::Ready(Err(Cause::Broken(broken))),
            }
            match self.opener.open(&mut self.incoming) {
                Ok(Opened::Data(plain)) => self.plain = plain,
                Ok(Opened::Nothing) => {}
                Ok(Opened::KeyAsked) => {
                    let outcome = self.shared.out.lock().rekey();
                    self.shared.pump();
                    outcome.map_err(|error| Cause::Io(Arc::new(error.into())))?;
                }
                Ok(Opened::Closed) => {
                    return Poll::Ready(Err(Cause::io(std::io::ErrorKind::BrokenPipe)));
                }
                Ok(Opened::Short) => {
                    self.flush().map_err(Cause::Broken)?;
                    ready!(self.poll_fill(cx))?;
                }
                Err(error) => return Poll::Ready(Err(self.tampered(error))),
            }
        }
    }

    fn tampered(&mut self, error: RecordError) -> Cause {
        self.shared.out.lock().close(Some(&error));
        self.shared.pump();
        Cause::Io(Arc::new(error.into()))
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Cause>> {
        if self.turn >= TURN_BYTES {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let lacks = Opener::lacks(&self.incoming);
        self.incoming.reserve(self.want.max(lacks));
        let room = self.incoming.capacity() - self.incoming.len();
        match poll_read_buf(Pin::new(&mut self.io), cx, &mut self.incoming) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(Cause::io(std::io::ErrorKind::UnexpectedEof))),
            Poll::Ready(Ok(size)) => {
                self.turn += size;
                if size == room {
                    self.want = (self.want * 4).min(READ_BYTES);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(Cause::Io(Arc::new(error)))),
            Poll::Pending => {
                if self.incoming.is_empty() {
                    // Idle: the memory goes back, and the next read is smaller.
                    self.incoming = BytesMut::new();
                    self.plain = Bytes::new();
                    self.want = (self.want / 2).max(FIRST_READ_BYTES);
                }
                // Who holds the lock has work, so it is no time to rest.
                if let Some(mut out) = self.shared.out.try_lock() {
                    out.rest();
                }
                Poll::Pending
            }
        }
    }

    /// Sends what the peer has asked for.
    fn flush(&mut self) -> Result<(), Broken> {
        if self.replies.0.is_empty() {
            return Ok(());
        }
        let (frames, count) = std::mem::take(&mut self.replies);
        self.shared.out.lock().reply(&frames, count)?;
        self.shared.pump();
        Ok(())
    }

    fn handle(&mut self, frame: Frame) -> Result<Option<Request>, Broken> {
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
                self.shared.answered.fetch_max(u64::from_be_bytes(payload), Ordering::Relaxed);
                self.shared.pong.notify_one();
            }
            Frame::GoAway { last, reason } => self.peer_leaves(last, reason),
            Frame::Window { stream: 0, increment } => {
                let waiting = {
                    let mut out = self.shared.out.lock();
                    out.window += i64::from(increment);
                    if out.window > i64::from(LARGEST) {
                        return Err(Broken::window("the connection's"));
                    }
                    if out.room() > 0 { out.waiting() } else { Vec::new() }
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
                match core.receive(payload, fits, end) {
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
            Found::Late => self.idle()?,
            Found::Closed => self.reset(stream, None, Reason::STREAM_CLOSED)?,
        }
        Ok(None)
    }

    /// A stream that the peer opens.
    fn request(&mut self, stream: u32, block: Block, end: bool) -> Result<Option<Request>, Broken> {
        let head = match block {
            Block::Head(head) if head.is_request() => head,
            Block::TooLong => {
                let block = head::answer(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, &HeaderMap::new());
                let limits = (true, frame::DEFAULT_FRAME_BYTES);
                frame::headers(stream, &block, limits, &mut self.replies.0);
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
        if self.shared.is_server() && !core.is_answered() && !self.floods.reset() {
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
        let (mut wakes, mut opening) = (Vec::new(), Vec::new());
        {
            let mut table = self.shared.table.lock();
            if let Some(window) = settings.window {
                let by = i64::from(window) - i64::from(std::mem::replace(&mut table.window, window));
                for core in table.iter() {
                    wakes.push(core.widen(by).ok_or(Broken::window("INITIAL_WINDOW_SIZE"))?);
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
        wakes.into_iter().for_each(super::stream::Wake::now);
        opening.into_iter().for_each(Waker::wake);
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
