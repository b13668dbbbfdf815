//! The accepting side: one connection, many streams.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    server::{Builder, Connection, SendResponse},
};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use mesh_core::{
    flag::Flag,
    id::Identity,
    limits::{
        CONNECTION_WINDOW_BYTES, FRAME_BYTES, H2_HANDSHAKE, HEADER_LIST_BYTES, STREAM_WINDOW_BYTES,
        TLS_HANDSHAKE, TUNNEL_STREAMS,
    },
    tunnel::CLIENT_HEADER,
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    time::Instant,
};

use super::{
    FLAG_HEADER, TunnelHeaders, TunnelStream,
    dial::{ERROR_RESETS, RESET_STREAMS, SEND_BUFFER_BYTES, SMALL_FRAME_BUDGET_BYTES, baggage, keepalive},
};
use crate::{
    drain::Draining,
    task::TaskGroup,
    tls::{ServerTls, TlsError, TlsStream},
};

/// Streams that a peer may open at once: twice what our own client uses (`wire-protocol.md` H31).
const STREAMS: usize = 2 * TUNNEL_STREAMS;

/// Bounds handshakes that run at the same time, in all and per source address (T-29).
#[derive(Clone, Debug)]
pub struct Handshakes {
    all: Arc<Semaphore>,
    per_source: usize,
    sources: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Default for Handshakes {
    fn default() -> Self {
        // A handshake holds some 32 KiB: 1024 of them are 32 MiB, a quarter of which one source may take.
        Self::new(1024, 256)
    }
}

impl Handshakes {
    /// At most `all` at the same time, `per_source` of them from one address.
    pub fn new(all: usize, per_source: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), per_source, sources: Arc::default() }
    }

    /// A connection that has arrived, with its slot. To be asked for before anything is waited for on its behalf: what
    /// waits for a certificate is as expensive as what waits for its peer.
    ///
    /// # Errors
    /// [`Ended::Overload`]; `io` is closed.
    pub fn admit<T>(&self, io: T, peer_addr: SocketAddr) -> Result<Carrier<T>, Ended> {
        let slot = self.begin(peer_addr.ip()).ok_or(Ended::Overload)?;
        Ok(Carrier { io, peer_addr, slot })
    }

    /// A slot, or none: the connection is closed rather than queued, its client may come again.
    pub fn begin(&self, source: IpAddr) -> Option<HandshakeSlot> {
        let permit = self.all.clone().try_acquire_owned().ok()?;
        let mut sources = self.sources.lock();
        let count = sources.entry(source).or_default();
        if *count >= self.per_source {
            return None;
        }
        *count += 1;
        drop(sources);
        Some(HandshakeSlot { source, sources: self.sources.clone(), _permit: permit })
    }
}

/// A running handshake.
#[derive(Debug)]
pub struct HandshakeSlot {
    source: IpAddr,
    sources: Arc<Mutex<HashMap<IpAddr, usize>>>,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Drop for HandshakeSlot {
    fn drop(&mut self) {
        let mut sources = self.sources.lock();
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

/// A connection whose handshake may begin.
#[derive(Debug)]
pub struct Carrier<T> {
    io: T,
    peer_addr: SocketAddr,
    slot: HandshakeSlot,
}

/// What a tunnel server needs beside a connection.
#[derive(Clone)]
pub struct Serving {
    /// Whom the server proves to be.
    pub tls: Arc<ServerTls>,
    /// First step: GOAWAY, what runs finishes; second: everything is cut.
    pub draining: Draining,
    /// Parent of the streams.
    pub tasks: TaskGroup,
}

/// How a connection ended.
#[derive(Debug)]
pub enum Ended {
    /// Either side was done, or the connection was lost after it had been established.
    Closed {
        /// Whom the peer proved to be.
        peer: Identity,
        /// Streams it opened.
        streams: u64,
    },
    /// The TLS handshake failed.
    Tls(TlsError),
    /// A handshake took too long.
    Deadline,
    /// HTTP/2 did not start.
    H2(String),
    /// Too many handshakes at the same time.
    Overload,
    /// The drain came first.
    Drained,
}

impl Ended {
    /// The stable code of a failure; none when the connection was established.
    pub fn flag(&self) -> Option<Flag> {
        match self {
            Self::Closed { .. } | Self::Drained => None,
            Self::Tls(error) => Some(error.flag()),
            Self::Deadline => Some(Flag::HandshakeTimeout),
            Self::H2(_) => Some(Flag::H2Handshake),
            Self::Overload => Some(Flag::Overload),
        }
    }
}

/// A CONNECT that waits for its answer. Dropped unanswered, it is reset.
#[derive(Debug)]
pub struct Incoming {
    /// The destination as the peer wrote it.
    pub authority: String,
    /// The other headers.
    pub headers: TunnelHeaders,
    /// Whom the peer proved to be.
    pub peer: Identity,
    /// Where the connection comes from.
    pub peer_addr: SocketAddr,
    respond: SendResponse<Bytes>,
    recv: RecvStream,
}

impl Incoming {
    /// Answers 200 and turns the stream into bytes. `baggage` describes our workload.
    ///
    /// # Errors
    /// The stream or its connection is gone, or the baggage cannot be sent.
    pub fn accept(mut self, baggage: Option<&str>) -> std::io::Result<TunnelStream> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            let value = HeaderValue::from_str(baggage).map_err(std::io::Error::other)?;
            response.headers_mut().insert("baggage", value);
        }
        let send = self.respond.send_response(response, false).map_err(std::io::Error::other)?;
        Ok(TunnelStream::new(send, self.recv, self.peer, None, None))
    }

    /// Answers `status` and tells `flag`.
    pub fn refuse(mut self, status: u16, flag: Flag) {
        refuse(&mut self.respond, status, flag);
    }
}

fn refuse(respond: &mut SendResponse<Bytes>, status: u16, flag: Flag) {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    response.headers_mut().insert(FLAG_HEADER, HeaderValue::from_static(flag.code()));
    if let Err(error) = respond.send_response(response, true) {
        tracing::debug!(%error, "a refusal could not be sent");
    }
}

/// Serves one connection to its end; each stream becomes a task that runs `handler`.
pub async fn serve_connection<T, H, F>(carrier: Carrier<T>, cx: Serving, handler: H) -> Ended
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    H: Fn(Incoming) -> F + Send,
    F: Future<Output = ()> + Send + 'static,
{
    let Carrier { io, peer_addr, slot } = carrier;
    let established = tokio::select! {
        biased;
        () = cx.draining.started() => return Ended::Drained,
        done = establish(io, &cx.tls) => done,
    };
    drop(slot);
    let (connection, peer) = match established {
        Ok(established) => established,
        Err(ended) => return ended,
    };
    let streams = streams(connection, &peer, peer_addr, &cx, handler).await;
    Ended::Closed { peer, streams }
}

type ServerConnection<T> = Connection<TlsStream<T>, Bytes>;

async fn establish<T>(io: T, tls: &ServerTls) -> Result<(ServerConnection<T>, Identity), Ended>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let begin = Instant::now();
    let (tls, peer) = tokio::time::timeout_at(begin + TLS_HANDSHAKE, tls.accept(io))
        .await
        .map_err(|_| Ended::Deadline)?
        .map_err(Ended::Tls)?;
    let handshake = Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .max_concurrent_streams(u32::try_from(STREAMS).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_pending_accept_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(SMALL_FRAME_BUDGET_BYTES)
        .handshake::<_, Bytes>(tls);
    let connection = tokio::time::timeout(H2_HANDSHAKE, handshake)
        .await
        .map_err(|_| Ended::Deadline)?
        .map_err(|error| Ended::H2(error.to_string()))?;
    Ok((connection, peer))
}

enum Event<S> {
    Forced,
    Drain,
    PeerLost,
    Stream(S),
}

async fn streams<T, H, F>(
    mut connection: ServerConnection<T>,
    peer: &Identity,
    peer_addr: SocketAddr,
    cx: &Serving,
    handler: H,
) -> u64
where
    T: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut alive = std::pin::pin!(keepalive(connection.ping_pong(), || ()));
    let (mut leaving, mut count) = (false, 0);
    loop {
        let event = tokio::select! {
            biased;
            () = cx.draining.forced() => Event::Forced,
            () = cx.draining.started(), if !leaving => Event::Drain,
            () = &mut alive => Event::PeerLost,
            got = connection.accept() => Event::Stream(got),
        };
        match event {
            Event::Drain => {
                leaving = true;
                connection.graceful_shutdown();
            }
            Event::Forced | Event::PeerLost => {
                connection.abrupt_shutdown(Reason::NO_ERROR);
                // Let the GOAWAY out; the peer may not be reading.
                let goodbye = std::future::poll_fn(|cx| connection.poll_closed(cx));
                let _ = tokio::time::timeout(std::time::Duration::from_millis(100), goodbye).await;
                return count;
            }
            Event::Stream(None) => return count,
            Event::Stream(Some(Err(error))) => {
                tracing::debug!(peer = %peer_addr, %error, "tunnel ended");
                return count;
            }
            Event::Stream(Some(Ok((request, mut respond)))) => {
                count += 1;
                match read(request) {
                    Ok((authority, headers, recv)) => {
                        let peer = peer.clone();
                        let incoming = Incoming { authority, headers, peer, peer_addr, respond, recv };
                        cx.tasks.spawn(handler(incoming));
                    }
                    Err(()) => refuse(&mut respond, 400, Flag::MalformedRequest),
                }
            }
        }
    }
}

/// A CONNECT as we understand it.
fn read(request: Request<RecvStream>) -> Result<(String, TunnelHeaders, RecvStream), ()> {
    let (head, recv) = request.into_parts();
    let extended = head.extensions.get::<h2::ext::Protocol>().is_some();
    if head.method != Method::CONNECT || extended {
        return Err(());
    }
    let authority = head.uri.authority().ok_or(())?.as_str().to_owned();
    let forwarded = match head.headers.get("forwarded") {
        // A hint for telemetry: what is no text is as good as absent.
        Some(value) => value.to_str().ok().map(ToOwned::to_owned),
        None => None,
    };
    let mut claims = head.headers.get_all(CLIENT_HEADER).iter();
    let client_claim = match (claims.next(), claims.next()) {
        (None, _) => None,
        (Some(one), None) => {
            let text = one.to_str().map_err(|_| ())?;
            Some(Identity::parse(text).map_err(|_| ())?)
        }
        // Two claims: which one would be believed?
        (Some(_), Some(_)) => return Err(()),
    };
    Ok((authority, TunnelHeaders { baggage: baggage(&head.headers), forwarded, client_claim }, recv))
}
