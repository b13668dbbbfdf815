//! Both roles against the `h2` crate and against peers that say what they like.

mod differential;
mod floods;
mod flow;
mod pieces;
mod protocol;
mod wakes;

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use mesh_core::id::Identity;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex};

use super::{
    frame::{flags, kind},
    hpack::Encoder,
    parse::{Frame, Parser},
    *,
};
use crate::{task::TaskGroup, testing::MiniCa, tls::TlsStream};

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(30);

fn id(sa: &str) -> Identity {
    Identity::new("cluster.local", "shop", sa)
}

/// Two ends of TLS over `near` and `far`.
async fn tls<A, B>(near: A, far: B) -> (TlsStream<A>, TlsStream<B>)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let ca = MiniCa::new();
    let (web, cart) = (ca.certificate(&id("web")), ca.certificate(&id("cart")));
    let client = web.client_tls();
    let (server_tls, expect) = (cart.server_tls(), vec![id("cart")]);
    let (near, far) = tokio::join!(client.connect(near, expect), server_tls.accept(far));
    (near.unwrap().0, far.unwrap().0)
}

/// Reads and writes in pieces of random size, and sometimes makes its user wait.
struct Choppy<T> {
    io: T,
    state: u64,
    most: u64,
}

impl<T> Choppy<T> {
    fn new(io: T, seed: u64, most: u64) -> Self {
        Self { io, state: seed | 1, most }
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % below
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Choppy<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.roll(8) == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let most = self.most;
        let size = usize::try_from(1 + self.roll(most)).unwrap().min(buf.remaining());
        let mut piece = vec![0; size];
        let mut part = ReadBuf::new(&mut piece);
        let outcome = Pin::new(&mut self.io).poll_read(cx, &mut part);
        buf.put_slice(part.filled());
        outcome
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Choppy<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.roll(8) == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let most = self.most;
        let size = usize::try_from(1 + self.roll(most)).unwrap().min(buf.len());
        Pin::new(&mut self.io).poll_write(cx, &buf[..size])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

async fn data(stream: &Stream) -> Result<Bytes, Failure> {
    std::future::poll_fn(|cx| stream.poll_data(cx)).await
}

async fn send(stream: &Stream, mut bytes: &[u8]) -> Result<(), Failure> {
    while !bytes.is_empty() {
        let size = std::future::poll_fn(|cx| stream.poll_send(cx, bytes)).await?;
        bytes = &bytes[size..];
    }
    Ok(())
}

/// Sends back what comes, and ends when the peer does.
async fn echo(stream: Stream) -> Result<(), Failure> {
    stream.answer(&answer(http::StatusCode::OK, &http::HeaderMap::new()), false)?;
    loop {
        let bytes = data(&stream).await?;
        if bytes.is_empty() {
            return stream.finish();
        }
        send(&stream, &bytes).await?;
    }
}

/// Serves `connection` to its end with `handler`; the cause goes to the receiver.
fn serve<H, F>(
    tasks: &TaskGroup,
    mut connection: Connection,
    handler: H,
) -> tokio::sync::oneshot::Receiver<Cause>
where
    H: Fn(Stream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (sender, ended) = tokio::sync::oneshot::channel();
    let group = tasks.clone();
    tasks.spawn(async move {
        loop {
            match connection.next().await {
                Event::Request(Request { stream, .. }) => group.spawn(handler(stream)),
                Event::End(cause) => {
                    let _ = sender.send(cause);
                    return;
                }
            }
        }
    });
    ended
}

async fn echoing(stream: Stream) {
    let _ = echo(stream).await;
}

/// A peer that writes frames by hand.
struct Raw {
    tls: TlsStream<DuplexStream>,
    parser: Parser,
    plain: Bytes,
    seen: VecDeque<Frame>,
}

impl Raw {
    /// A client of a server of ours that runs `handler`, after its preface and `settings`.
    async fn client<H, F>(handler: H) -> (Self, TaskGroup, tokio::sync::oneshot::Receiver<Cause>)
    where
        H: Fn(Stream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (near, far) = duplex(1 << 20);
        let (near, far) = tls(near, far).await;
        let mut raw = Self::new(near, Parser::of_server());
        let mut greeting = frame::PREFACE.to_vec();
        Settings::default().write(&mut greeting);
        raw.write(&greeting).await;
        let tasks = TaskGroup::new();
        let ended = serve(&tasks, server(far).await.unwrap(), handler);
        raw.greeted().await;
        (raw, tasks, ended)
    }

    /// A server of a client of ours.
    async fn server() -> (Self, Handle, TaskGroup, tokio::sync::oneshot::Receiver<Cause>) {
        let (near, far) = duplex(1 << 20);
        let (near, far) = tls(near, far).await;
        let (handle, connection) = client(near);
        let (raw, tasks, ended) = Self::facing(connection, far).await;
        (raw, handle, tasks, ended)
    }

    /// A server at the `far` end of our client's `connection`.
    async fn facing(
        connection: Connection,
        far: TlsStream<DuplexStream>,
    ) -> (Self, TaskGroup, tokio::sync::oneshot::Receiver<Cause>) {
        let tasks = TaskGroup::new();
        let ended = serve(&tasks, connection, |_| async { panic!("a server opens no streams") });
        let mut raw = Self::new(far, Parser::of_client());
        let mut greeting = Vec::new();
        Settings::default().write(&mut greeting);
        raw.write(&greeting).await;
        raw.greeted().await;
        (raw, tasks, ended)
    }

    fn new(tls: TlsStream<DuplexStream>, parser: Parser) -> Self {
        Self { tls, parser, plain: Bytes::new(), seen: VecDeque::new() }
    }

    /// Takes what every connection begins with.
    async fn greeted(&mut self) {
        let mut left = 3;
        while left > 0 {
            let frame = self.read().await.expect("a greeting");
            assert!(
                matches!(frame, Frame::Settings(_) | Frame::SettingsAck | Frame::Window { stream: 0, .. }),
                "{frame:?}"
            );
            left -= 1;
        }
    }

    async fn write(&mut self, bytes: &[u8]) {
        let _ = self.try_write(bytes).await;
    }

    async fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tls.write_all(bytes).await?;
        self.tls.flush().await
    }

    async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.write(&framed(kind, flags, stream, payload)).await;
    }

    async fn connect(&mut self, stream: u32, end: bool) {
        let flags = flags::END_HEADERS | if end { flags::END_STREAM } else { 0 };
        self.frame(kind::HEADERS, flags, stream, &connect_block()).await;
    }

    /// The next frame, if there is one.
    async fn read(&mut self) -> Option<Frame> {
        tokio::time::timeout(LONG, self.read_any()).await.expect("a frame, or the end")
    }

    async fn read_any(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.seen.pop_front() {
                return Some(frame);
            }
            if let Some(frame) = self.parser.next(&mut self.plain).expect("well-formed frames") {
                return Some(frame);
            }
            let mut buffer = vec![0; 64 << 10];
            match self.tls.read(&mut buffer).await {
                Ok(size) if size > 0 => self.plain = buffer[..size].to_vec().into(),
                _ => return None,
            }
        }
    }

    /// Frames until one is as wanted; the others are dropped.
    async fn until(&mut self, wanted: impl Fn(&Frame) -> bool) -> Frame {
        loop {
            let frame = self.read().await.expect("the frame that is waited for");
            if wanted(&frame) {
                return frame;
            }
        }
    }

    /// The connection ends, and the peer says why.
    async fn goes_away(&mut self) -> (u32, Reason) {
        match self.until(|frame| matches!(frame, Frame::GoAway { .. })).await {
            Frame::GoAway { last, reason } => (last, reason),
            _ => unreachable!(),
        }
    }

    /// The peer does everything before it answers this.
    async fn settle(&mut self) {
        self.frame(kind::PING, 0, 0, b"settled?").await;
        self.until(|frame| *frame == Frame::Pong(*b"settled?")).await;
    }
}

fn framed(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = frame::Head { size: payload.len(), kind, flags, stream }.write().to_vec();
    frame.extend(payload);
    frame
}

fn connect_block() -> Vec<u8> {
    Encoder::default().named(2, b"CONNECT").named(1, b"10.0.0.2:80").finish()
}

fn is_reset(stream: u32, reason: Reason) -> impl Fn(&Frame) -> bool {
    move |frame| *frame == Frame::Reset { stream, reason }
}
