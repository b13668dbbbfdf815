//! HBONE on the wire: byte streams between workloads, multiplexed over mutually authenticated connections.
//!
//! This is a narrow boundary on purpose: open a stream to an authority as an identity, accept streams with the peer's
//! identity, both ends as byte streams with half-close. What is inside (HTTP/2 of our own, `mux`, on records of ours)
//! does not show.

mod dial;
mod pool;
mod serve;
mod stream;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

pub use mesh_core::outbound::Hop;
use mesh_core::{flag::Flag, id::Identity};
use tokio::net::TcpStream;

pub use self::{
    pool::{Certificates, Pool, PoolStatus},
    serve::{Carrier, Ended, Handshakes, Incoming, Serving, serve_connection},
    stream::TunnelStream,
};
use crate::{
    BoxFuture,
    tls::{TlsError, verify::PeerRefused},
};

/// The headers of a CONNECT, beside its authority. Hints of an authenticated peer, not facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelHeaders {
    /// Describes the sender's workload, as it is on the wire.
    pub baggage: Option<String>,
    /// Client address and service, as it is on the wire.
    pub forwarded: Option<String>,
    /// The original client, as a waypoint states it; believed only from the bound waypoint.
    pub client_claim: Option<Identity>,
}

/// Makes TCP connections for the tunnel: in the right network namespace, exempt from capture.
pub trait Connector: Send + Sync + 'static {
    /// Connects; the caller enforces the deadline.
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>>;
}

/// Plain TCP from the process's own network namespace.
#[derive(Clone, Copy, Debug, Default)]
pub struct DirectConnector;

impl Connector for DirectConnector {
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(async move {
            let socket = crate::socket::for_dial(to, &crate::socket::DialOptions::default())?;
            crate::socket::connect(socket, to, mesh_core::limits::CONNECT).await
        })
    }
}

/// One stream to open.
#[derive(Clone)]
pub struct Dial {
    /// Whom we prove to be.
    pub identity: Identity,
    /// Where to, and whom we expect.
    pub hop: Hop,
    /// The address that we dial from: streams of different sources do not share a connection.
    pub source: IpAddr,
    /// The destination inside: `ip:port`, `[v6]:port` or `host:port`.
    pub authority: String,
    /// Headers of the CONNECT.
    pub headers: TunnelHeaders,
    /// Makes the TCP connection when a new one is needed.
    pub connect: Arc<dyn Connector>,
}

/// A step of opening a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// TCP.
    Connect,
    /// TLS.
    Tls,
    /// HTTP/2 preface and settings.
    H2,
    /// Our CONNECT and its answer.
    Answer,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connect => "TCP connect",
            Self::Tls => "TLS handshake",
            Self::H2 => "HTTP/2 handshake",
            Self::Answer => "CONNECT",
        })
    }
}

/// Why a stream could not be opened. Cloned to all who waited for the same connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    /// The peer took too long.
    #[error("{phase} took longer than {after:?}")]
    Deadline {
        /// In which step.
        phase: Phase,
        /// The bound.
        after: Duration,
    },
    /// The peer is authentic, but somebody else.
    #[error("{0}")]
    WrongPeer(PeerRefused),
    /// The TLS handshake failed.
    #[error("TLS handshake failed")]
    Tls(#[source] TlsError),
    /// The connection failed.
    #[error("{phase} failed")]
    Io {
        /// In which step.
        phase: Phase,
        /// How.
        #[source]
        source: Arc<io::Error>,
    },
    /// HTTP/2 broke down, or the peer reset the stream.
    #[error("{phase} failed: {reason}")]
    H2 {
        /// In which step.
        phase: Phase,
        /// How.
        reason: String,
    },
    /// The peer answered with another status than 200.
    #[error("http status: {status}")]
    Status {
        /// The status.
        status: u16,
        /// The peer's flag, if it told and the name is known.
        flag: Option<Flag>,
    },
    /// We have no certificate to prove ourselves with.
    #[error("no certificate: {0}")]
    Certificate(Flag),
    /// The authority or a header cannot be sent.
    #[error("the request cannot be encoded: {0}")]
    Request(String),
    /// We are shutting down.
    #[error("draining")]
    Drain,
    /// The connecting task ended without a result.
    #[error("the connection attempt was abandoned")]
    Abandoned,
}

impl DialError {
    /// The stable code.
    pub fn flag(&self) -> Flag {
        match self {
            Self::Deadline { phase: Phase::Connect | Phase::Answer, .. } => Flag::UpstreamTimeout,
            Self::Deadline { .. } => Flag::HandshakeTimeout,
            Self::WrongPeer(_) => Flag::PeerIdentity,
            Self::Tls(error) => error.flag(),
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::ConnectionRefused => Flag::UpstreamRefused,
                io::ErrorKind::TimedOut => Flag::UpstreamTimeout,
                _ => Flag::UpstreamIo,
            },
            Self::H2 { phase: Phase::H2, .. } => Flag::H2Handshake,
            Self::H2 { .. } => Flag::UpstreamIo,
            Self::Status { .. } => Flag::UpstreamStatus,
            Self::Certificate(flag) => *flag,
            Self::Request(_) => Flag::MalformedRequest,
            Self::Drain => Flag::Drain,
            Self::Abandoned => Flag::Internal,
        }
    }
}

/// The header by which a refusing peer tells its flag (ours; others ignore it).
pub(crate) const FLAG_HEADER: &str = "x-undermesh-flag";

#[cfg(test)]
mod tests;
