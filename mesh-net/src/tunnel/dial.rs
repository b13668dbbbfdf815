//! One connection of the pool: TCP, TLS, HTTP/2, and its life until it ends.

use std::{io, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use mesh_core::{
    flag::Flag,
    id::Identity,
    limits::{CONNECT, PING_INTERVAL, PING_TIMEOUT, TLS_HANDSHAKE},
    tunnel::CLIENT_HEADER,
};

use super::{Dial, DialError, FLAG_HEADER, Phase, TunnelHeaders};
use crate::{
    identity::WorkloadCertificate,
    mux::{self, Cause, Failure, Pings},
    tls::TlsError,
};

/// Makes one connection. Every step has its deadline.
pub(super) async fn establish(
    dial: &Dial,
    certificate: &WorkloadCertificate,
) -> Result<(mux::Handle, mux::Connection, Identity), DialError> {
    let tcp = within(Phase::Connect, CONNECT, dial.connect.connect(dial.hop.dial))
        .await?
        .map_err(|error| io_failure(Phase::Connect, error))?;
    let tls = certificate.client_tls().connect(tcp, dial.hop.expect.clone());
    let (tls, peer) = within(Phase::Tls, TLS_HANDSHAKE, tls).await?.map_err(|error| match error {
        TlsError::Peer(refused) => DialError::WrongPeer(refused),
        other => DialError::Tls(other),
    })?;
    let (handle, connection) = mux::client(tls);
    Ok((handle, connection, peer))
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
pub(super) fn mux_failure(phase: Phase, failure: &Failure) -> DialError {
    match failure {
        // In TLS 1.3 the server's verdict on our certificate comes after our handshake is done, as an alert.
        Failure::Lost(Cause::Io(io)) if io.kind() == io::ErrorKind::InvalidData => {
            DialError::Tls(TlsError::Protocol(rustls::Error::General(io.to_string())))
        }
        Failure::Lost(Cause::Io(io)) => io_failure(phase, io::Error::new(io.kind(), io.to_string())),
        _ => DialError::H2 { phase, reason: failure.to_string() },
    }
}

/// Sends a PING every interval for as long as answers come; calls `tick` at each.
pub(super) async fn keepalive(mut pings: Pings, mut tick: impl FnMut()) {
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        tick();
        if tokio::time::timeout(PING_TIMEOUT, pings.ping()).await.is_err() {
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
