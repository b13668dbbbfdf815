//! The agent's sockets inside a pod: opened in its namespace, served from this process.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    sync::Arc,
};

use mesh_core::tunnel::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use mesh_net::{
    access::Side,
    listen::{Accepting, accept_loop},
    socket::{self, ListenOptions},
};

use crate::{
    agent::{Agent, Site},
    inbound,
    kernel::{PodIdentity, PodListeners},
    outbound, plaintext,
    pods::{
        EnrolError, Pod,
        netns::{Netns, NetnsError},
        record::Kept,
    },
    report,
};

/// One port, both families; no IPv6 where the namespace has none.
struct Pair {
    v4: TcpListener,
    v6: Option<TcpListener>,
}

/// All listeners of a pod.
pub struct Listeners {
    outbound: Pair,
    plaintext: Pair,
    hbone: Pair,
}

impl Listeners {
    /// As the kernel takes them.
    pub fn for_kernel(&self) -> PodListeners<'_> {
        PodListeners {
            outbound_v4: &self.outbound.v4,
            outbound_v6: self.outbound.v6.as_ref(),
            plaintext_v4: &self.plaintext.v4,
            plaintext_v6: self.plaintext.v6.as_ref(),
            hbone_v4: &self.hbone.v4,
            hbone_v6: self.hbone.v6.as_ref(),
        }
    }
}

/// The pod as the kernel's side takes it.
///
/// # Errors
/// No descriptor left.
pub fn identity(kept: &Kept, netns: &Netns) -> Result<PodIdentity, EnrolError> {
    let file = netns
        .file()
        .try_clone()
        .map_err(|source| EnrolError::Netns(NetnsError::Open { path: netns.path().to_owned(), source }))?;
    Ok(PodIdentity { uid: kept.pod.uid.clone(), netns: file, ips: kept.pod.ips.clone() })
}

/// Opens all of them in the namespace.
///
/// # Errors
/// A port is taken by the pod, or the namespace cannot be entered.
pub fn open(netns: &Netns) -> Result<Listeners, EnrolError> {
    netns.on_thread(|| {
        Ok(Listeners {
            outbound: pair(OUTBOUND_PORT)?,
            plaintext: pair(INBOUND_PORT)?,
            hbone: pair(HBONE_PORT)?,
        })
    })?
}

fn pair(port: u16) -> Result<Pair, EnrolError> {
    // Transparent: what is handed over keeps the addresses that the application dialled.
    let options = ListenOptions { transparent: true, ..ListenOptions::default() };
    let at = |address: IpAddr| socket::listener(SocketAddr::new(address, port), &options);
    let failed = |source| EnrolError::Listen { port, source };
    let v4 = at(Ipv4Addr::UNSPECIFIED.into()).map_err(failed)?;
    let v6 = match at(Ipv6Addr::UNSPECIFIED.into()) {
        Ok(listener) => Some(listener),
        Err(error) if without_ipv6(&error) => None,
        Err(error) => return Err(failed(error)),
    };
    Ok(Pair { v4, v6 })
}

/// No IPv6 in this kernel, or switched off in this namespace.
fn without_ipv6(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

/// Starts the accept loops.
///
/// # Errors
/// The runtime cannot take a listener.
pub fn serve(agent: &Arc<Agent>, pod: &Arc<Pod>, listeners: Listeners) -> Result<(), EnrolError> {
    let Listeners { outbound, plaintext, hbone } = listeners;
    each(agent, pod, OUTBOUND_PORT, outbound, |at, stream, peer| async move {
        outbound::serve(&at, stream, peer).await;
    })?;
    each(agent, pod, INBOUND_PORT, plaintext, |at, stream, peer| async move {
        plaintext::serve(&at, stream, peer).await;
    })?;
    each(agent, pod, HBONE_PORT, hbone, |at, stream, peer| async move {
        inbound::serve(&at, stream, peer).await;
    })
}

fn each<F, Fut>(agent: &Arc<Agent>, pod: &Arc<Pod>, port: u16, pair: Pair, serve: F) -> Result<(), EnrolError>
where
    F: Fn(Site, tokio::net::TcpStream, SocketAddr) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let side = if port == OUTBOUND_PORT { Side::Outbound } else { Side::Inbound };
    for listener in [Some(pair.v4), pair.v6].into_iter().flatten() {
        let listener = socket::into_tokio(listener).map_err(|source| EnrolError::Listen { port, source })?;
        let accepting = Accepting {
            name: match port {
                OUTBOUND_PORT => "outbound",
                INBOUND_PORT => "plaintext",
                _ => "tunnel",
            },
            draining: pod.draining.clone(),
            tasks: pod.tasks.clone(),
            reserve: agent.reserve.clone(),
        };
        let (agent, pod_of_loop, serve) = (agent.clone(), Arc::downgrade(pod), serve.clone());
        // The loop is a task of the pod: it must not keep the pod alive.
        pod.tasks.spawn(accept_loop(listener, accepting, move |stream, peer| {
            let (agent, pod, serve) = (agent.clone(), pod_of_loop.upgrade(), serve.clone());
            async move {
                let Some(pod) = pod else { return };
                let peer = socket::canonical(peer);
                // A carrier of tunnels takes no place, only its streams do: peers that have proven nothing yet would
                // take them all. Their handshakes have a bound of their own.
                let place = if port == HBONE_PORT { Ok(None) } else { pod.place().map(Some) };
                match place {
                    Ok(_place) => serve(Site { agent, pod: pod.clone() }, stream, peer).await,
                    Err(failure) => report::turn_away(&agent.metrics, side, &stream, peer, failure),
                }
            }
        }));
    }
    Ok(())
}
