//! The accepting side: one connection, many streams.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderMap, HeaderValue, StatusCode};
use mesh_core::{
    flag::Flag,
    id::Identity,
    limits::{H2_HANDSHAKE, TLS_HANDSHAKE},
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
    dial::{baggage, keepalive},
};
use crate::{
    drain::Draining,
    mux::{self, Connection, Event, Head, Request, Stream},
    task::TaskGroup,
    tls::{ServerTls, TlsError},
};

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
    stream: Stream,
}

impl Incoming {
    /// Answers 200 and turns the stream into bytes. `baggage` describes our workload.
    ///
    /// # Errors
    /// The stream or its connection is gone, or the baggage cannot be sent.
    pub fn accept(self, baggage: Option<&str>) -> std::io::Result<TunnelStream> {
        let mut headers = HeaderMap::new();
        if let Some(baggage) = baggage {
            headers.insert("baggage", HeaderValue::from_str(baggage).map_err(std::io::Error::other)?);
        }
        let block = mux::answer(StatusCode::OK, &headers);
        self.stream.answer(&block, false).map_err(std::io::Error::other)?;
        Ok(TunnelStream::new(self.stream, self.peer, None, None))
    }

    /// Answers `status` and tells `flag`.
    pub fn refuse(self, status: u16, flag: Flag) {
        refuse(&self.stream, status, flag);
    }
}

fn refuse(stream: &Stream, status: u16, flag: Flag) {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let mut headers = HeaderMap::new();
    headers.insert(FLAG_HEADER, HeaderValue::from_static(flag.code()));
    if let Err(error) = stream.answer(&mux::answer(status, &headers), true) {
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

async fn establish<T>(io: T, tls: &ServerTls) -> Result<(Connection, Identity), Ended>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let begin = Instant::now();
    let (tls, peer) = tokio::time::timeout_at(begin + TLS_HANDSHAKE, tls.accept(io))
        .await
        .map_err(|_| Ended::Deadline)?
        .map_err(Ended::Tls)?;
    let connection = tokio::time::timeout(H2_HANDSHAKE, mux::server(tls))
        .await
        .map_err(|_| Ended::Deadline)?
        .map_err(|cause| Ended::H2(cause.to_string()))?;
    Ok((connection, peer))
}

enum Turn {
    Forced,
    Drain,
    PeerLost,
    Peer(Event),
}

async fn streams<H, F>(
    mut connection: Connection,
    peer: &Identity,
    peer_addr: SocketAddr,
    cx: &Serving,
    handler: H,
) -> u64
where
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut alive = std::pin::pin!(keepalive(connection.pings(), || ()));
    let (mut leaving, mut count) = (false, 0);
    loop {
        let turn = tokio::select! {
            biased;
            () = cx.draining.forced() => Turn::Forced,
            () = cx.draining.started(), if !leaving => Turn::Drain,
            () = &mut alive => Turn::PeerLost,
            event = connection.next() => Turn::Peer(event),
        };
        match turn {
            Turn::Drain => {
                leaving = true;
                connection.drain();
            }
            Turn::Forced | Turn::PeerLost => {
                connection.abort().await;
                return count;
            }
            Turn::Peer(Event::End(cause)) => {
                tracing::debug!(peer = %peer_addr, %cause, "tunnel ended");
                return count;
            }
            Turn::Peer(Event::Request(Request { head, stream })) => {
                count += 1;
                match read(&head) {
                    Ok((authority, headers)) => {
                        let peer = peer.clone();
                        cx.tasks.spawn(handler(Incoming { authority, headers, peer, peer_addr, stream }));
                    }
                    Err(()) => refuse(&stream, 400, Flag::MalformedRequest),
                }
            }
        }
    }
}

/// A CONNECT as we understand it.
fn read(head: &Head) -> Result<(String, TunnelHeaders), ()> {
    if head.method.as_deref() != Some("CONNECT") || head.extended {
        return Err(());
    }
    let authority: http::uri::Authority = head.authority.as_deref().ok_or(())?.parse().map_err(|_| ())?;
    let authority = authority.as_str().to_owned();
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
    Ok((authority, TunnelHeaders { baggage: baggage(&head.headers), forwarded, client_claim }))
}
