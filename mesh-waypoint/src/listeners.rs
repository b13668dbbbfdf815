//! The tunnel port: HBONE connections, and what each of their streams asks for.

use std::{io, net::SocketAddr, sync::Arc};

use mesh_core::{
    flag::Flag,
    id::Identity,
    tunnel::{ILLEGAL_PORTS, parse_authority},
};
use mesh_net::{
    listen::{Accepting, Reserve, accept_loop},
    socket::{ListenOptions, canonical, into_tokio, listener, tune},
    tunnel::{Certificates, Ended, Handshakes, Incoming, Serving, serve_connection},
};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    Waypoint,
    http::{Downstream, server},
    record::{self, Record},
    tcp,
    view::{Target, Unroutable},
};

/// What the tunnel port needs beside the waypoint.
#[derive(Clone)]
pub struct Tunnels {
    /// The program.
    pub waypoint: Arc<Waypoint>,
    /// Proves who we are.
    pub certificates: Arc<dyn Certificates>,
    /// Bounds handshakes.
    pub handshakes: Handshakes,
}

/// Opens the listeners for `at`; the v6 wildcard stands for both families.
///
/// # Errors
/// The address cannot be bound. A machine without one of the families is served in the other.
pub fn bind(at: SocketAddr) -> io::Result<Vec<TcpListener>> {
    let open = |at| into_tokio(listener(at, &ListenOptions::default())?);
    let wildcard = at.is_ipv6() && at.ip().is_unspecified();
    if !wildcard {
        return Ok(vec![open(at)?]);
    }
    let v6 = open(at);
    let v4 = open(SocketAddr::from(([0, 0, 0, 0], at.port())));
    match (v6, v4) {
        (Ok(v6), Ok(v4)) => Ok(vec![v6, v4]),
        (Err(error), Ok(only)) | (Ok(only), Err(error)) if no_such_family(&error) => Ok(vec![only]),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

fn no_such_family(error: &io::Error) -> bool {
    // EAFNOSUPPORT, EADDRNOTAVAIL.
    matches!(error.raw_os_error(), Some(97 | 99))
}

/// Accepts until the drain starts.
pub async fn run(cx: Tunnels, socket: TcpListener, reserve: Option<Arc<Reserve>>) {
    let accepting = Accepting {
        name: "hbone",
        draining: cx.waypoint.draining.clone(),
        tasks: cx.waypoint.tasks.clone(),
        reserve,
    };
    accept_loop(socket, accepting, move |stream, peer| serve(cx.clone(), stream, canonical(peer))).await;
}

/// Serves one HBONE connection to its end.
async fn serve(cx: Tunnels, stream: TcpStream, peer: SocketAddr) {
    if let Err(error) = tune(&stream) {
        tracing::debug!(%error, %peer, "cannot tune a socket");
    }
    if let Err((flag, why)) = serve_carrier(&cx, stream, peer).await {
        cx.waypoint.metrics.shared.refuse(flag);
        tracing::debug!(%flag, %peer, why, "connection failed");
    }
}

async fn serve_carrier(cx: &Tunnels, stream: TcpStream, peer: SocketAddr) -> Result<(), (Flag, String)> {
    let failed = |ended: Ended| ended.flag().map_or(Ok(()), |flag| Err((flag, format!("{ended:?}"))));
    let carrier = match cx.handshakes.admit(stream, peer) {
        Ok(carrier) => carrier,
        Err(ended) => return failed(ended),
    };
    let certificate = cx.certificates.get(&cx.waypoint.own).await;
    let certificate = certificate.map_err(|flag| (flag, "no certificate".to_owned()))?;
    let serving = Serving {
        tls: certificate.server_tls(),
        draining: cx.waypoint.draining.clone(),
        tasks: cx.waypoint.tasks.clone(),
    };
    let waypoint = cx.waypoint.clone();
    let handler = move |incoming| serve_stream(waypoint.clone(), incoming);
    failed(serve_connection(carrier, serving, handler).await)
}

/// What a CONNECT asks for.
enum Asked {
    Http,
    Tcp,
}

/// One CONNECT to its end: refused, or carried as HTTP or as bytes.
pub async fn serve_stream(waypoint: Arc<Waypoint>, incoming: Incoming) {
    let (client, peer) = (incoming.peer.clone(), canonical(incoming.peer_addr));
    let Ok(authority) = parse_authority(&incoming.authority) else {
        let nowhere = SocketAddr::new(mesh_net::socket::unspecified(peer.ip()), 0);
        return refuse(&waypoint, incoming, nowhere, 400, Flag::MalformedRequest);
    };
    match asked(&waypoint, &client, authority) {
        Ok(Asked::Http) => {
            // The head of the tunnel may claim another client (`x-undermesh-client`); from a client it means nothing.
            let stream = match incoming.accept(None) {
                Ok(stream) => stream,
                Err(error) => return tracing::debug!(%error, %peer, "the client is gone"),
            };
            let draining = waypoint.draining.clone();
            let downstream = Downstream { waypoint, client, peer, authority };
            server::serve(Arc::new(downstream), stream, draining).await;
        }
        Ok(Asked::Tcp) => serve_tcp(&waypoint, incoming, &client, peer, authority).await,
        Err((status, flag)) => refuse(&waypoint, incoming, authority, status, flag),
    }
}

fn asked(waypoint: &Waypoint, client: &Identity, authority: SocketAddr) -> Result<Asked, (u16, Flag)> {
    if ILLEGAL_PORTS.contains(&authority.port()) {
        return Err((503, Flag::IllegalPort));
    }
    match waypoint.view().target(authority) {
        Ok(Target::Service(bound)) if bound.is_http_for(&client.namespace) => Ok(Asked::Http),
        Ok(Target::Service(_) | Target::Workload(_)) => Ok(Asked::Tcp),
        Err(why @ Unroutable::NotReady) => Err((503, why.flag())),
        Err(why) => Err((400, why.flag())),
    }
}

async fn serve_tcp(
    waypoint: &Arc<Waypoint>,
    incoming: Incoming,
    client: &Identity,
    peer: SocketAddr,
    authority: SocketAddr,
) {
    // The client hears 200 only when its bytes have somewhere to go.
    let joined = match tcp::join(waypoint, client, peer, authority).await {
        Ok(joined) => joined,
        Err(flag) => return incoming.refuse(503, flag),
    };
    match incoming.accept(None) {
        Ok(stream) => tcp::serve(joined, stream, &waypoint.draining).await,
        Err(error) => tracing::debug!(%error, %peer, "the client is gone"),
    }
}

fn refuse(waypoint: &Arc<Waypoint>, incoming: Incoming, authority: SocketAddr, status: u16, flag: Flag) {
    let mut record =
        Record::open(&waypoint.metrics, &incoming.peer, canonical(incoming.peer_addr), authority);
    record.seen.protocol = record::TCP;
    record.seen.authority.clone_from(&incoming.authority);
    record.subject.source = waypoint.view().client(&incoming.peer, incoming.peer_addr.ip());
    record.refused = Some(flag);
    let short = if status == 503 { record::Flag::OM } else { record::Flag::NR };
    record.fail(short, "connect_refused", flag.text());
    record.close();
    incoming.refuse(status, flag);
}
