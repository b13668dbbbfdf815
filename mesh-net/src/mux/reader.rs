//! The way in: the driver of a connection reads records as large as the flow deserves, opens them where they lie, and
//! hands each frame to whom it concerns. What the peer asks for is answered before the socket is waited for.

mod frames;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

use super::{
    Cause, Shared, flood::Floods, frame::Broken, head::Head, hpack::Decoder, parse::Parser, stream::Stream,
};
use crate::record::{Opened, Opener, RecordError};

/// First read of a connection that was idle, bytes.
const FIRST_READ_BYTES: usize = 4 << 10;
/// Largest read, bytes.
const READ_BYTES: usize = 256 << 10;
/// What the driver reads before it gives way, bytes: those whom it has woken must get their turn.
const TURN_BYTES: usize = 256 << 10;

/// How long a peer may take to close after us.
const LINGER: Duration = Duration::from_secs(1);

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
    /// The buffer that the last bytes came in, bytes.
    buffer: usize,
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
    linger: Option<Pin<Box<tokio::time::Sleep>>>,
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
            buffer: 0,
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
            linger: None,
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
                if self.closing {
                    return Poll::Ready(Event::End(Cause::Closed));
                }
                return Poll::Ready(Event::End(self.fail(Cause::Io(error))));
            }
            if self.is_done() {
                if !std::mem::replace(&mut self.closing, true) {
                    self.shared.leave();
                    self.shared.end(&Cause::Closed, None);
                    self.shared.out.lock().close(None);
                    self.shared.pump();
                }
                if self.poll_linger(cx).is_ready() {
                    return Poll::Ready(Event::End(Cause::Closed));
                }
            }
            match ready!(self.poll_frame(cx)) {
                Err(_) if self.closing => return Poll::Ready(Event::End(Cause::Closed)),
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

    /// All is said: the socket is closed one way, and read until the peer closes it as well. Bytes that nobody has read
    /// when a socket is closed make the kernel drop those that the peer has not read.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.linger.is_none() {
            let mut out = self.shared.out.lock();
            if !out.is_drained() {
                return Poll::Pending;
            }
            out.shut(cx);
        }
        self.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER))).as_mut().poll(cx)
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
                Ok(Opened::Data(plain)) => {
                    self.plain = plain;
                    if self.opener.wants_key() {
                        self.rekey(true)?;
                    }
                }
                Ok(Opened::Nothing) => {}
                Ok(Opened::KeyAsked) => self.rekey(false)?,
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

    fn rekey(&self, ask: bool) -> Result<(), Cause> {
        let outcome = self.shared.out.lock().rekey(ask);
        self.shared.pump();
        outcome.map_err(|error| Cause::Io(Arc::new(error.into())))
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
        self.buffer = self.incoming.capacity();
        let room = self.buffer - self.incoming.len();
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
}
