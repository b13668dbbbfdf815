//! Carries bytes both ways between two ends until both directions are done, with true half-close.
//!
//! A chunk is read once and handed over as [`Bytes`]: towards the tunnel without a copy, and out of it as the slices
//! that HTTP/2 received. An idle connection holds no buffer; a busy one grows it up to [`LARGEST_READ_BYTES`].

mod chunks;

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use mesh_core::{flag::Flag, limits::COPY_BUFFER_BYTES};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::io::poll_read_buf;

pub use self::chunks::Chunks;

/// First read of a connection that was idle: most messages are small.
const FIRST_READ_BYTES: usize = 8 << 10;
/// Largest read: four records' worth per system call beyond [`COPY_BUFFER_BYTES`], still inside a core's cache.
pub const LARGEST_READ_BYTES: usize = 4 * COPY_BUFFER_BYTES;
/// A direction gives way to the other and to other tasks after this many bytes.
const TURN_BYTES: usize = 1 << 20;

/// Bytes carried so far, readable while the copy runs.
#[derive(Debug, Default)]
pub struct TransferCounters {
    a_to_b: AtomicU64,
    b_to_a: AtomicU64,
    metrics: Option<(Counter, Counter)>,
}

impl TransferCounters {
    /// Counts into `a_to_b` and `b_to_a` of the registry as well.
    pub fn with_metrics(a_to_b: Counter, b_to_a: Counter) -> Self {
        Self { metrics: Some((a_to_b, b_to_a)), ..Self::default() }
    }

    /// Bytes so far.
    pub fn transfer(&self) -> Transfer {
        Transfer { a_to_b: self.a_to_b.load(Ordering::Relaxed), b_to_a: self.b_to_a.load(Ordering::Relaxed) }
    }

    /// Counts bytes from the first end to the second.
    pub fn add_a_to_b(&self, bytes: u64) {
        self.a_to_b.fetch_add(bytes, Ordering::Relaxed);
        if let Some((counter, _)) = &self.metrics {
            counter.inc_by(bytes);
        }
    }

    /// Counts bytes from the second end to the first.
    pub fn add_b_to_a(&self, bytes: u64) {
        self.b_to_a.fetch_add(bytes, Ordering::Relaxed);
        if let Some((_, counter)) = &self.metrics {
            counter.inc_by(bytes);
        }
    }
}

/// Bytes carried. By convention the first end, `a`, is the side that connected (downstream).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Transfer {
    /// From the first end to the second: client to server.
    pub a_to_b: u64,
    /// From the second end to the first: server to client.
    pub b_to_a: u64,
}

/// A copy that ended by a fault other than an end closing or resetting its connection.
#[derive(Debug, thiserror::Error)]
#[error("carrying bytes {direction} failed")]
pub struct CopyError {
    /// Which way.
    pub direction: Direction,
    /// What happened.
    #[source]
    pub source: io::Error,
}

impl CopyError {
    /// The stable code.
    pub fn flag(&self) -> Flag {
        Flag::UpstreamIo
    }
}

/// One of the two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the first end to the second.
    AToB,
    /// From the second end to the first.
    BToA,
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AToB => "to the server",
            Self::BToA => "to the client",
        })
    }
}

/// Read buffer of one direction. Empty while there is nothing to read.
#[derive(Debug)]
pub struct Reader {
    buffer: BytesMut,
    want: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), want: FIRST_READ_BYTES }
    }
}

impl Reader {
    /// Space for the next read.
    fn space(&mut self) -> &mut BytesMut {
        if self.buffer.capacity() < self.want.min(FIRST_READ_BYTES) {
            self.buffer.reserve(self.want);
        }
        &mut self.buffer
    }

    /// What was read, and a guess about the next read.
    fn take(&mut self, filled: bool) -> Bytes {
        let chunk = self.buffer.split().freeze();
        if filled {
            self.want = (self.want * 2).min(LARGEST_READ_BYTES);
            self.buffer = BytesMut::new();
        } else if chunk.len() < self.want / 4 {
            self.want = (self.want / 2).max(FIRST_READ_BYTES);
        }
        chunk
    }

    fn idle(&mut self) {
        self.buffer = BytesMut::new();
    }
}

/// One end of a copy.
pub trait Endpoint: Send + Unpin {
    /// The next bytes; an empty chunk is the end. `reader` keeps buffers between calls for ends that need one.
    fn poll_chunk(&mut self, cx: &mut Context<'_>, reader: &mut Reader) -> Poll<io::Result<Bytes>>;

    /// More bytes that are here already; never empty.
    fn more(&mut self) -> Option<Bytes> {
        None
    }

    /// Takes at least one byte from the front of `chunk`, which is not empty.
    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<io::Result<()>>;

    /// Takes at least one byte from the front of `chunks`, which are not empty.
    fn poll_send_all(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx, chunks.first()))?;
        chunks.settle();
        Poll::Ready(Ok(()))
    }

    /// Pushes out what was taken.
    fn poll_flush_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Half-close: nothing more will be sent.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

impl Endpoint for TcpStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, reader: &mut Reader) -> Poll<io::Result<Bytes>> {
        // Readiness first, so that a connection that waits owns no buffer.
        if self.poll_read_ready(cx)?.is_pending() {
            reader.idle();
            return Poll::Pending;
        }
        // Not `try_read_buf`: after a short read that one asks the socket once more, to hear that there is nothing.
        let space = reader.space();
        if poll_read_buf(Pin::new(self), cx, space)?.is_pending() {
            // It only seemed ready.
            reader.idle();
            return Poll::Pending;
        }
        let filled = space.len() == space.capacity();
        Poll::Ready(Ok(reader.take(filled)))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<io::Result<()>> {
        let written = ready!(Pin::new(self).poll_write(cx, chunk))?;
        chunk.advance(written);
        Poll::Ready(Ok(()))
    }

    fn poll_send_all(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<()>> {
        if chunks.is_one() {
            ready!(self.poll_send(cx, chunks.first()))?;
            chunks.settle();
            return Poll::Ready(Ok(()));
        }
        let written = ready!(Pin::new(self).poll_write_vectored(cx, &chunks.slices()))?;
        chunks.advance(written);
        Poll::Ready(Ok(()))
    }

    fn poll_flush_out(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self).poll_shutdown(cx)
    }
}

/// Any other byte stream as an [`Endpoint`].
#[derive(Debug)]
pub struct Plain<T>(pub T);

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Endpoint for Plain<T> {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, reader: &mut Reader) -> Poll<io::Result<Bytes>> {
        let space = reader.space();
        let room = space.capacity();
        space.resize(room, 0);
        let mut buf = ReadBuf::new(space);
        let outcome = Pin::new(&mut self.0).poll_read(cx, &mut buf);
        let filled = buf.filled().len();
        space.truncate(filled);
        match outcome {
            Poll::Pending => {
                reader.idle();
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) => Poll::Ready(Ok(reader.take(filled == room))),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<io::Result<()>> {
        let written = ready!(Pin::new(&mut self.0).poll_write(cx, chunk))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        chunk.advance(written);
        Poll::Ready(Ok(()))
    }

    fn poll_flush_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Carries bytes between `a` (the side that connected) and `b` until both directions are done. FIN travels as
/// half-close; a reset of one end becomes a half-close of the other (`wire-protocol.md` H26, H28).
///
/// # Cancel safety
/// Dropping the future loses bytes that are in its buffers: it means cutting the connection.
///
/// # Errors
/// Anything but an end closing or resetting.
pub async fn copy_bidirectional<A: Endpoint, B: Endpoint>(
    a: &mut A,
    b: &mut B,
    counters: &TransferCounters,
) -> Result<Transfer, CopyError> {
    let (mut up, mut down) = (Way::default(), Way::default());
    std::future::poll_fn(|cx| {
        let up_done = up
            .poll(cx, a, b, |n| counters.add_a_to_b(n))
            .map_err(|source| CopyError { direction: Direction::AToB, source })?;
        let down_done = down
            .poll(cx, b, a, |n| counters.add_b_to_a(n))
            .map_err(|source| CopyError { direction: Direction::BToA, source })?;
        if up_done.is_ready() && down_done.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await?;
    Ok(counters.transfer())
}

/// One direction.
///
/// ```text
/// Carrying ──EOF or reset of the source──► Finishing ──FIN sent──► Done
///     └──────────reset of the target─────────────────────────────────▲
/// ```
#[derive(Default)]
struct Way {
    reader: Reader,
    chunks: Chunks,
    unflushed: bool,
    stage: Stage,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Carrying,
    Finishing,
    Done,
}

impl Way {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut impl Endpoint,
        to: &mut impl Endpoint,
        count: impl Fn(u64),
    ) -> Poll<io::Result<()>> {
        let mut turn = 0;
        loop {
            match self.stage {
                Stage::Done => return Poll::Ready(Ok(())),
                Stage::Finishing => {
                    unless_reset(ready!(to.poll_finish(cx)))?;
                    self.done();
                }
                Stage::Carrying if self.chunks.is_empty() => {
                    let got = ready!(self.next_chunk(cx, from, to));
                    self.read(got)?;
                    while !self.chunks.is_empty() && self.chunks.len() < LARGEST_READ_BYTES {
                        let Some(more) = from.more() else { break };
                        self.chunks.push(more);
                    }
                }
                Stage::Carrying => {
                    let before = self.chunks.len();
                    if unless_reset(ready!(to.poll_send_all(cx, &mut self.chunks)))?.is_none() {
                        self.done();
                        continue;
                    }
                    self.unflushed = true;
                    let moved = before - self.chunks.len();
                    count(moved as u64);
                    turn += moved;
                    if turn >= TURN_BYTES {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn next_chunk(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut impl Endpoint,
        to: &mut impl Endpoint,
    ) -> Poll<io::Result<Bytes>> {
        match from.poll_chunk(cx, &mut self.reader) {
            Poll::Pending => {
                self.chunks.clear();
                // Nothing more for now: what was handed over must not wait in a buffer.
                if self.unflushed && to.poll_flush_out(cx).is_ready() {
                    self.unflushed = false;
                }
                Poll::Pending
            }
            ready => ready,
        }
    }

    fn read(&mut self, got: io::Result<Bytes>) -> io::Result<()> {
        match unless_reset(got)? {
            Some(chunk) if !chunk.is_empty() => self.chunks.push(chunk),
            _ => {
                self.stage = Stage::Finishing;
                self.reader.idle();
            }
        }
        Ok(())
    }

    fn done(&mut self) {
        self.stage = Stage::Done;
        self.chunks.clear();
        self.reader.idle();
    }
}

/// An end that closed or reset its connection is no fault of the copy: `None`.
fn unless_reset<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if matches!(
                error.kind(),
                BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    async fn carry(mut a: TcpStream, b: DuplexStream) -> Transfer {
        copy_bidirectional(&mut a, &mut Plain(b), &TransferCounters::default()).await.unwrap()
    }

    #[tokio::test]
    async fn each_direction_closes_by_itself() {
        let (mut client, a) = pair().await;
        let (b, mut server) = duplex(1024);
        let talk = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"question");
            // The other way is still open.
            server.write_all(b"the answer").await.unwrap();
            server.shutdown().await.unwrap();
            got.clear();
            client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"the answer");
        };
        let (transfer, ()) = tokio::join!(carry(a, b), talk);
        assert_eq!(transfer, Transfer { a_to_b: 8, b_to_a: 10 });
    }

    #[tokio::test]
    async fn a_reset_becomes_a_half_close() {
        let (client, a) = pair().await;
        let (b, mut server) = duplex(1024);
        let talk = async {
            crate::socket::reset_on_close(&client).unwrap();
            drop(client);
            assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
            // Into the void, but no error of the copy.
            server.write_all(b"late").await.unwrap();
            drop(server);
        };
        tokio::join!(carry(a, b), talk);
    }

    #[tokio::test]
    async fn bulk_both_ways_arrives_whole_and_counts_live() {
        const N: usize = 8 << 20;
        let (client, mut a) = pair().await;
        let (mut b, server) = pair().await;
        let counters = TransferCounters::default();
        let pump = |stream: TcpStream, seed: u8| async move {
            let (mut read, mut write) = stream.into_split();
            let data: Vec<u8> = (0..N).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
            let sent = data.clone();
            let writer = async move {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (got_n, ()) = tokio::join!(read.read_to_end(&mut got), writer);
            assert_eq!(got_n.unwrap(), N);
            got
        };
        let (transfer, from_server, from_client) =
            tokio::join!(copy_bidirectional(&mut a, &mut b, &counters), pump(client, 1), pump(server, 2));
        assert_eq!(transfer.unwrap(), Transfer { a_to_b: N as u64, b_to_a: N as u64 });
        assert_eq!(counters.transfer().a_to_b, N as u64);
        assert!(
            from_server.iter().enumerate().all(|(i, b)| *b == (i as u8).wrapping_mul(31).wrapping_add(2))
        );
        assert!(
            from_client.iter().enumerate().all(|(i, b)| *b == (i as u8).wrapping_mul(31).wrapping_add(1))
        );
    }

    #[tokio::test]
    async fn an_idle_connection_holds_no_buffer() {
        let (mut client, mut a) = pair().await;
        let mut reader = Reader::default();
        client.write_all(&[7; 100]).await.unwrap();
        let chunk = std::future::poll_fn(|cx| a.poll_chunk(cx, &mut reader)).await.unwrap();
        assert_eq!(chunk.len(), 100);
        let idle = std::future::poll_fn(|cx| Poll::Ready(a.poll_chunk(cx, &mut reader).is_pending())).await;
        assert!(idle);
        assert_eq!(reader.buffer.capacity(), 0);
    }
}
