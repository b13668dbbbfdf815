//! The accept loop, once for everything that listens.

use std::{
    fs::File,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use mesh_core::limits::ACCEPT_BACKOFF;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::{BoxFuture, drain::Draining, task::TaskGroup};

/// What an accept loop takes connections from.
pub trait Accept: Send + Sync + 'static {
    /// A connection.
    type Stream: Send + 'static;
    /// Who connected.
    type Peer: Send + 'static;

    /// The next connection. Cancel safe.
    fn accept(&self) -> BoxFuture<'_, io::Result<(Self::Stream, Self::Peer)>>;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    fn accept(&self) -> BoxFuture<'_, io::Result<(TcpStream, SocketAddr)>> {
        Box::pin(TcpListener::accept(self))
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;
    type Peer = tokio::net::unix::SocketAddr;

    fn accept(&self) -> BoxFuture<'_, io::Result<(UnixStream, tokio::net::unix::SocketAddr)>> {
        Box::pin(UnixListener::accept(self))
    }
}

/// One descriptor kept back: when the process has none left it is given up for the moment that it takes to accept a
/// waiting client and close it, so that clients fail at once instead of hanging in the backlog.
#[derive(Debug)]
pub struct Reserve(Mutex<Option<File>>);

impl Reserve {
    /// Opens the descriptor.
    ///
    /// # Errors
    /// There is already none left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self(Mutex::new(Some(Self::open()?)))))
    }

    fn open() -> io::Result<File> {
        File::open("/dev/null")
    }

    /// Accepts and closes one waiting client of `listener`; false when there was none.
    fn shed<A: Accept>(&self, listener: &A) -> bool {
        let mut held = self.0.lock();
        drop(held.take());
        let shed = matches!(listener.accept().now_or_never(), Some(Ok(_)));
        *held = Self::open().ok();
        shed
    }
}

/// What an accept loop needs beside its listener.
#[derive(Clone, Debug)]
pub struct Accepting {
    /// Names the listener in the log.
    pub name: &'static str,
    /// Ends the loop at its first step.
    pub draining: Draining,
    /// Parent of the connections.
    pub tasks: TaskGroup,
    /// For the time when the process is out of descriptors; shared by all loops of a process.
    pub reserve: Option<Arc<Reserve>>,
}

enum Event<S, P> {
    Drain,
    Accepted(io::Result<(S, P)>),
}

/// Accepts until the drain starts; each connection becomes a task of the group. Errors back off from 10 to 500 ms.
pub async fn accept_loop<A, F, Fut>(listener: A, cx: Accepting, mut serve: F)
where
    A: Accept,
    F: FnMut(A::Stream, A::Peer) -> Fut + Send,
    Fut: Future<Output = ()> + Send + 'static,
{
    let mut backoff = Backoff::default();
    loop {
        let event = tokio::select! {
            biased;
            () = cx.draining.started() => Event::Drain,
            got = listener.accept() => Event::Accepted(got),
        };
        match event {
            Event::Drain => return,
            Event::Accepted(Ok((stream, peer))) => {
                backoff.reset();
                cx.tasks.spawn(serve(stream, peer));
            }
            // The client gave up between SYN and accept: nothing is wrong here.
            Event::Accepted(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Event::Accepted(Err(error)) => {
                let shed = match &cx.reserve {
                    Some(reserve) if out_of_descriptors(&error) => reserve.shed(&listener),
                    _ => false,
                };
                let wait = backoff.failed();
                if backoff.may_log(Instant::now()) {
                    tracing::warn!(listener = cx.name, %error, shed, "accept failed, backing off");
                }
                tokio::select! {
                    () = cx.draining.started() => return,
                    () = tokio::time::sleep(wait) => {}
                }
            }
        }
    }
}

fn out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Doubling waits, and at most one log line per second.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
    logged: Option<Instant>,
}

impl Backoff {
    fn failed(&mut self) -> Duration {
        let (first, last) = ACCEPT_BACKOFF;
        let wait = first.saturating_mul(1 << self.failures.min(16)).min(last);
        self.failures += 1;
        wait
    }

    fn reset(&mut self) {
        self.failures = 0;
    }

    fn may_log(&mut self, now: Instant) -> bool {
        let due = self.logged.is_none_or(|last| now.duration_since(last) >= Duration::from_secs(1));
        if due {
            self.logged = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::drain;

    /// Fails `failures` times, then gives connections for ever after.
    struct Scripted {
        calls: AtomicUsize,
        failures: usize,
        reached: tokio::sync::Notify,
    }

    impl Accept for Arc<Scripted> {
        type Stream = ();
        type Peer = ();

        fn accept(&self) -> BoxFuture<'_, io::Result<((), ())>> {
            Box::pin(async {
                let call = self.calls.fetch_add(1, Ordering::SeqCst);
                if call < self.failures {
                    return Err(io::Error::from_raw_os_error(libc::EMFILE));
                }
                self.reached.notify_one();
                std::future::pending().await
            })
        }
    }

    fn accepting(draining: Draining) -> Accepting {
        Accepting { name: "test", draining, tasks: TaskGroup::new(), reserve: None }
    }

    #[tokio::test(start_paused = true)]
    async fn errors_back_off_to_half_a_second() {
        let listener = Arc::new(Scripted {
            calls: AtomicUsize::new(0),
            failures: 10,
            reached: tokio::sync::Notify::new(),
        });
        let (drain, draining) = drain::channel();
        let cx = accepting(draining);
        let tasks = TaskGroup::new();
        let begin = tokio::time::Instant::now();
        tasks.spawn(accept_loop(listener.clone(), cx, |(), ()| async {}));
        listener.reached.notified().await;
        // 10+20+40+80+160+320 and four times 500.
        assert_eq!(begin.elapsed().as_millis() / 10, 263);
        drain.start();
        tasks.idle().await;
    }

    #[test]
    fn one_log_line_per_second() {
        let mut backoff = Backoff::default();
        let t = Instant::now();
        let lines = (0..40).filter(|i| backoff.may_log(t + Duration::from_millis(100 * i))).count();
        assert_eq!(lines, 4);
    }

    #[tokio::test]
    async fn out_of_descriptors_sheds_a_waiting_client() {
        use tokio::io::AsyncReadExt;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let reserve = Reserve::new().unwrap();
        assert!(reserve.shed(&listener));
        let read = client.read(&mut [0; 1]).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        assert!(!reserve.shed(&listener), "nobody else waits");
    }

    #[tokio::test]
    async fn connections_are_served_until_the_drain() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (drain, draining) = drain::channel();
        let served = Arc::new(AtomicUsize::new(0));
        let count = served.clone();
        let tasks = TaskGroup::new();
        tasks.spawn(accept_loop(listener, accepting(draining), move |_stream, _peer| {
            let count = count.clone();
            async move {
                count.fetch_add(1, Ordering::SeqCst);
            }
        }));
        use tokio::io::AsyncReadExt;
        let mut client = TcpStream::connect(addr).await.unwrap();
        assert!(matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_)));
        drain.start();
        tasks.idle().await;
        assert_eq!(served.load(Ordering::SeqCst), 1);
        assert!(TcpStream::connect(addr).await.is_err(), "the listener is closed");
    }
}
