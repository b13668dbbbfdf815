//! The ends of a connection: what drives it, what opens streams, what asks whether the peer is alive.

use std::{
    any::Any,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use super::{
    Cause, Event, Failure, Reason, Shared, Stream,
    out::{Out, WriteHalf},
    reader::{ReadHalf, Reader},
    table::Role,
};
use crate::tls::TlsStream;

/// How long a goodbye may take: the peer may not be reading.
const GOODBYE: Duration = Duration::from_millis(100);

/// A connection, to be driven by one task: dropped, it ends, with all its streams.
pub struct Connection {
    reader: Reader,
    pub(super) shared: Arc<Shared>,
}

/// Opens streams. When it is dropped, the connection ends with its last stream.
pub struct Handle {
    pub(super) shared: Arc<Shared>,
}

/// Asks the peer whether it is there.
pub struct Pings {
    shared: Arc<Shared>,
}

/// Our end of a connection that we dialled. Says what we are and waits for nothing.
pub fn client<T>(tls: TlsStream<T>) -> (Handle, Connection)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let connection = begin(Role::Client, tls);
    (Handle { shared: connection.shared.clone() }, connection)
}

/// Our end of a connection that we accepted, once the peer has said what it is. The caller has the deadline.
///
/// # Errors
/// The peer does not speak HTTP/2, or is gone.
pub async fn server<T>(tls: TlsStream<T>) -> Result<Connection, Cause>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut connection = begin(Role::Server, tls);
    let greeting = std::future::poll_fn(|cx| connection.reader.poll_greeting(cx)).await;
    match greeting {
        Ok(()) => Ok(connection),
        Err(cause) => {
            connection.farewell().await;
            Err(cause)
        }
    }
}

fn begin<T>(role: Role, tls: TlsStream<T>) -> Connection
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (io, sealer, opener, incoming) = tls.into_parts();
    let (read, write) = split(io);
    let shared = Shared::new(role, Out::new(sealer, write));
    let reader = Reader::new(shared.clone(), read, (opener, incoming));
    shared.greet();
    Connection { reader, shared }
}

/// Both halves by themselves: without a lock if they are TCP's.
fn split<T>(io: T) -> (ReadHalf, WriteHalf)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut io = Some(io);
    let tcp = (&mut io as &mut dyn Any).downcast_mut::<Option<TcpStream>>().and_then(Option::take);
    if let Some(tcp) = tcp {
        let (read, write) = tcp.into_split();
        return (Box::new(read), Box::new(write));
    }
    match io {
        Some(io) => {
            let (read, write) = tokio::io::split(io);
            (Box::new(read), Box::new(write))
        }
        None => (Box::new(tokio::io::empty()), Box::new(tokio::io::empty())),
    }
}

impl Connection {
    /// Drives the connection until something happens.
    ///
    /// # Cancel safety
    /// Nothing is lost when it is dropped and called again; but meanwhile nothing is read.
    pub async fn next(&mut self) -> Event {
        let event = std::future::poll_fn(|cx| self.reader.poll_event(cx)).await;
        if let Event::End(Cause::Broken(_)) = &event {
            self.farewell().await;
        }
        event
    }

    /// Takes no more streams; [`Self::next`] ends when those that run have ended.
    pub fn drain(&self) {
        self.shared.drain();
    }

    /// Ends everything now.
    pub async fn abort(&mut self) {
        self.shared.end(&Cause::Closed, Some(Reason::NO_ERROR));
        self.farewell().await;
    }

    /// Asks whether the peer is there.
    pub fn pings(&self) -> Pings {
        Pings { shared: self.shared.clone() }
    }

    /// Lets the last words out.
    async fn farewell(&mut self) {
        let out = std::future::poll_fn(|cx| {
            self.shared.driving.0.register(cx.waker());
            self.shared.drive();
            if self.shared.out.lock().is_drained() {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        });
        // What is not out by then never will be.
        let _ = tokio::time::timeout(GOODBYE, out).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.end(&Cause::io(std::io::ErrorKind::BrokenPipe), None);
        self.shared.close();
    }
}

impl Handle {
    /// Opens a stream with the block of a CONNECT, as soon as the peer permits another one. The caller has the deadline.
    ///
    /// # Errors
    /// This connection opens none any more. The peer has heard nothing of it.
    pub async fn open(&self, block: &[u8]) -> Result<Stream, Failure> {
        std::future::poll_fn(|cx| self.shared.poll_open(cx, block)).await
    }

    /// Streams that the peer permits, as far as we have heard.
    pub fn permitted(&self) -> usize {
        self.shared.table.lock().permitted
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.table.lock().abandoned = true;
        self.shared.driver.wake_by_ref();
    }
}

impl Pings {
    /// No question.
    pub(super) const NONE: u64 = 0;

    /// A number that the peer cannot answer before it has heard it.
    fn question() -> u64 {
        let mut bytes = [0; 8];
        // Without randomness it can be guessed, which is all that is lost: no key is made of it.
        let _ = aws_lc_rs::rand::fill(&mut bytes);
        u64::from_be_bytes(bytes).max(Self::NONE + 1)
    }

    /// Returns when the peer has answered. The caller has the deadline.
    pub async fn ping(&mut self) {
        let begun = Instant::now();
        let asked = Self::question();
        self.shared.asked.store(asked, Ordering::Relaxed);
        let mut frames = Vec::new();
        super::frame::ping(asked.to_be_bytes(), 0, &mut frames);
        self.shared.send_control(&frames);
        while self.shared.asked.load(Ordering::Relaxed) == asked {
            self.shared.pong.notified().await;
        }
        self.shared.measured(begun.elapsed());
    }
}
