//! Servers and clients that run inside pods, on plain blocking sockets.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{netns, world::Pod};

/// Every read and connect of a test peer ends after this time: a hang is a failure with a name.
pub const PEER_DEADLINE: Duration = Duration::from_secs(30);

/// What a server does with one connection.
pub type Behaviour = Arc<dyn Fn(TcpStream, SocketAddr) + Send + Sync>;

/// A server inside a pod; ends when dropped.
pub struct Server {
    /// Port that it listens on, v4 and v6.
    pub port: u16,
    accepted: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    wake: Socket,
}

impl Server {
    /// Starts a dual-stack server in `pod`.
    ///
    /// # Errors
    /// When the port cannot be bound there.
    pub fn start(pod: &Pod, port: u16, behaviour: Behaviour) -> anyhow::Result<Self> {
        let listener = netns::within(&pod.netns, || listen(port))?;
        let (accepted, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let wake = Socket::from(listener.try_clone()?);
        let (counter, ended) = (accepted.clone(), stop.clone());
        thread::spawn(move || {
            while let Ok((stream, peer)) = listener.accept() {
                if ended.load(Ordering::Acquire) {
                    return;
                }
                counter.fetch_add(1, Ordering::AcqRel);
                let behaviour = behaviour.clone();
                thread::spawn(move || behaviour(stream, peer));
            }
        });
        Ok(Self { port, accepted, stop, wake })
    }

    /// Connections that reached the application so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Acquire)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the accept call with an error.
        let _ = self.wake.shutdown(Shutdown::Both);
    }
}

fn listen(port: u16) -> anyhow::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    socket.bind(&any.into()).with_context(|| format!("bind {any}"))?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// Says which address the client has, then echoes until the client has finished sending.
pub fn greet_and_echo() -> Behaviour {
    Arc::new(|mut stream, peer| {
        let seen = SocketAddr::new(unmapped(peer.ip()), peer.port());
        if stream.write_all(format!("hello {seen}\n").as_bytes()).is_err() {
            return;
        }
        let _ = echo(&mut stream);
        let _ = stream.shutdown(Shutdown::Write);
    })
}

/// Sends back what arrives, without a word of its own.
pub fn echo_only() -> Behaviour {
    Arc::new(|mut stream, _| {
        let _ = echo(&mut stream);
        let _ = stream.shutdown(Shutdown::Write);
    })
}

fn echo(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

/// The address without the v4-in-v6 form that a dual-stack listener sees.
pub fn unmapped(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// Connects from inside `pod`, with deadlines on connect and on every read.
///
/// # Errors
/// What the application would see.
pub fn dial(pod: &Pod, to: SocketAddr) -> anyhow::Result<TcpStream> {
    netns::within(&pod.netns, || {
        let stream = TcpStream::connect_timeout(&to, PEER_DEADLINE)?;
        stream.set_read_timeout(Some(PEER_DEADLINE))?;
        stream.set_write_timeout(Some(PEER_DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    })
}

/// What became of one attempt to talk.
#[derive(Debug)]
pub enum Outcome {
    /// The greeting of the server, and the connection still open.
    Greeted {
        /// Address that the server saw.
        seen: SocketAddr,
        /// The open connection.
        stream: TcpStream,
    },
    /// No byte of the server arrived: refused at connect, reset or closed.
    Refused(String),
}

impl Outcome {
    /// True when the application answered.
    pub fn greeted(&self) -> bool {
        matches!(self, Self::Greeted { .. })
    }
}

/// Dials a [`greet_and_echo`] server and reads its greeting.
pub fn talk(pod: &Pod, to: SocketAddr) -> Outcome {
    let mut stream = match dial(pod, to) {
        Ok(stream) => stream,
        Err(error) => return Outcome::Refused(format!("connect: {error:#}")),
    };
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(0) => return Outcome::Refused(format!("closed after {} bytes", line.len())),
            Ok(_) if byte[0] == b'\n' => break,
            Ok(_) => line.push(byte[0]),
            Err(error) => return Outcome::Refused(format!("read: {error}")),
        }
    }
    let text = String::from_utf8_lossy(&line);
    match text.strip_prefix("hello ").and_then(|seen| seen.parse().ok()) {
        Some(seen) => Outcome::Greeted { seen, stream },
        None => Outcome::Refused(format!("not a greeting: {text}")),
    }
}

/// One echo on an open connection: the bytes must come back.
///
/// # Errors
/// When they do not.
pub fn ping(stream: &mut TcpStream, message: &[u8]) -> anyhow::Result<()> {
    stream.write_all(message)?;
    let mut back = vec![0; message.len()];
    stream.read_exact(&mut back)?;
    anyhow::ensure!(back == message, "the echo differs");
    Ok(())
}

/// True when the other side has ended the connection (end of file or reset), waiting for it up to the peer deadline.
pub fn ended(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => {
                return !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            }
        }
    }
}

/// An answer to [`http`].
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Status line and headers, as they came.
    pub head: String,
    /// Body, to the end of the connection.
    pub body: String,
}

/// One HTTP/1.1 request on a connection of its own. `lines` are further header lines, each with its line end.
///
/// # Errors
/// When the connection fails or the answer is not HTTP.
pub fn http(pod: &Pod, to: SocketAddr, host: &str, path: &str, lines: &str) -> anyhow::Result<Answer> {
    let mut stream = dial(pod, to)?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{lines}\r\n").as_bytes(),
    )?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let text = String::from_utf8_lossy(&all);
    let (head, body) =
        text.split_once("\r\n\r\n").with_context(|| format!("not an HTTP answer: {text:?}"))?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok(Answer {
        status: status.with_context(|| format!("no status in {head:?}"))?,
        head: head.to_owned(),
        body: body.to_owned(),
    })
}

/// An HTTP/1.1 server that answers every request with `name`, the path and the headers that it got. A path
/// `/delay/N` answers after N seconds.
pub fn http_echo(name: &str) -> Behaviour {
    let name = name.to_owned();
    Arc::new(move |stream, peer| {
        let _ = serve_http(&name, stream, peer);
    })
}

fn serve_http(name: &str, mut stream: TcpStream, peer: SocketAddr) -> anyhow::Result<()> {
    let mut pending = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = pending.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                n => pending.extend_from_slice(&buffer[..n]),
            }
        };
        let head = String::from_utf8_lossy(&pending[..end]).into_owned();
        pending.drain(..end + 4);
        let path = head.split(' ').nth(1).unwrap_or("/");
        if let Some(seconds) = path.strip_prefix("/delay/").and_then(|text| text.parse().ok()) {
            thread::sleep(Duration::from_secs(seconds));
        }
        let body = format!("server: {name}\npeer: {}\n{head}\n", unmapped(peer.ip()));
        let length = body.len();
        stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}").as_bytes())?;
    }
}
