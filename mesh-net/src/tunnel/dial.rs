//! One connection of the pool: TCP, TLS, HTTP/2, and its life until it ends.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{
    Ping, PingPong,
    client::{Builder, Connection, SendRequest},
};
use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use mesh_core::{
    flag::Flag,
    id::Identity,
    limits::{
        CONNECT, CONNECTION_WINDOW_BYTES, FRAME_BYTES, H2_HANDSHAKE, HEADER_LIST_BYTES, PING_INTERVAL,
        PING_TIMEOUT, STREAM_WINDOW_BYTES, TLS_HANDSHAKE, TUNNEL_STREAMS,
    },
    tunnel::CLIENT_HEADER,
};
use tokio::net::TcpStream;

use super::{Dial, DialError, FLAG_HEADER, Phase, TunnelHeaders};
use crate::{
    identity::WorkloadCertificate,
    tls::{TlsError, TlsStream},
};

/// Bytes of one stream that wait inside our end for the connection to send them. Small enough that a stalled peer
/// costs little, large enough to keep a fast one busy.
pub(super) const SEND_BUFFER_BYTES: usize = 1 << 20;
/// Streams that were reset and whose late frames are still tolerated.
pub(super) const RESET_STREAMS: usize = 50;
/// Protocol errors by the peer's streams that end the connection (T-26).
pub(super) const ERROR_RESETS: usize = 200;

/// What many small DATA frames that wait for a stalled reader may cost, bytes; 256 each. The default of half a window
/// would end the whole connection when one application reads slowly what another writes by tens of bytes.
pub(super) const SMALL_FRAME_BUDGET_BYTES: usize = 32 << 20;

type Driver = Connection<TlsStream<TcpStream>, Bytes>;

/// Makes one connection. Every step has its deadline.
pub(super) async fn establish(
    dial: &Dial,
    certificate: &WorkloadCertificate,
) -> Result<(SendRequest<Bytes>, Driver, Identity), DialError> {
    let tcp = within(Phase::Connect, CONNECT, dial.connect.connect(dial.hop.dial))
        .await?
        .map_err(|error| io_failure(Phase::Connect, error))?;
    let tls = certificate.client_tls().connect(tcp, dial.hop.expect.clone());
    let (tls, peer) = within(Phase::Tls, TLS_HANDSHAKE, tls).await?.map_err(|error| match error {
        TlsError::Peer(refused) => DialError::WrongPeer(refused),
        other => DialError::Tls(other),
    })?;
    let handshake = Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .initial_max_send_streams(TUNNEL_STREAMS)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(SMALL_FRAME_BUDGET_BYTES)
        .enable_push(false)
        .handshake::<_, Bytes>(tls);
    let (request, connection) =
        within(Phase::H2, H2_HANDSHAKE, handshake).await?.map_err(|error| h2_failure(Phase::H2, &error))?;
    Ok((request, connection, peer))
}

/// Runs `work` under a deadline.
pub(super) async fn within<T>(
    phase: Phase,
    after: Duration,
    work: impl Future<Output = T>,
) -> Result<T, DialError> {
    tokio::time::timeout(after, work).await.map_err(|_| DialError::Deadline { phase, after })
}

fn io_failure(phase: Phase, error: io::Error) -> DialError {
    DialError::Io { phase, source: Arc::new(error) }
}

/// Sorts an HTTP/2 failure.
pub(super) fn h2_failure(phase: Phase, error: &h2::Error) -> DialError {
    match error.get_io() {
        // In TLS 1.3 the server's verdict on our certificate comes after our handshake is done, as an alert.
        Some(io) if io.kind() == io::ErrorKind::InvalidData => {
            DialError::Tls(TlsError::Protocol(rustls::Error::General(io.to_string())))
        }
        Some(io) => io_failure(phase, io::Error::new(io.kind(), io.to_string())),
        None => DialError::H2 { phase, reason: error.to_string() },
    }
}

/// Sends a PING every interval for as long as answers come; calls `tick` at each.
pub(super) async fn keepalive(pings: Option<PingPong>, mut tick: impl FnMut()) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        tick();
        if !matches!(tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await, Ok(Ok(_))) {
            return;
        }
    }
}

/// The CONNECT of a stream.
pub(super) fn request(authority: &str, headers: &TunnelHeaders) -> Result<Request<()>, DialError> {
    let invalid = |what: &str| DialError::Request(format!("{what} is not valid"));
    let uri = Uri::builder().authority(authority).build().map_err(|_| invalid("the authority"))?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    let value = |text: &str, name: &str| HeaderValue::from_str(text).map_err(|_| invalid(name));
    let map = request.headers_mut();
    if let Some(baggage) = &headers.baggage {
        map.insert("baggage", value(baggage, "baggage")?);
    }
    if let Some(forwarded) = &headers.forwarded {
        map.insert("forwarded", value(forwarded, "forwarded")?);
    }
    if let Some(client) = &headers.client_claim {
        map.insert(CLIENT_HEADER, value(&client.to_string(), CLIENT_HEADER)?);
    }
    Ok(request)
}

/// All `baggage` lines as one, or none if any is not text (`wire-protocol.md` 2.4).
pub(super) fn baggage(headers: &HeaderMap) -> Option<String> {
    let lines: Option<Vec<&str>> = headers.get_all("baggage").iter().map(|v| v.to_str().ok()).collect();
    lines.filter(|lines| !lines.is_empty()).map(|lines| lines.join(","))
}

/// The flag that a peer of our kind told with its refusal.
pub(super) fn told_flag(headers: &HeaderMap) -> Option<Flag> {
    let code = headers.get(FLAG_HEADER)?.to_str().ok()?;
    Flag::ALL.iter().copied().find(|flag| flag.code() == code)
}
