//! What arrives in tunnels: identity → admit → application → copy.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    explain,
    id::Identity,
    inbound::{self, Arrival},
    model::{Service, Workload},
    snapshot::Snapshot,
    tunnel,
};
use mesh_net::{
    access::{AccessRecord, Path, Side},
    copy::copy_bidirectional,
    socket,
    tunnel::{Ended, Incoming, Serving, serve_connection},
};
use tokio::net::TcpStream;

use crate::{
    agent::Site,
    connections::{Accepted, Live, Subject},
    outbound::ended,
    report::{self, Failure, Told},
};

/// Serves one carrier of tunnels to its end. Each stream has a record of its own; the carrier has one only if it never
/// came to streams.
pub async fn serve(at: &Site, carrier: TcpStream, from: SocketAddr) {
    let Ok(to) = carrier.local_addr().map(socket::canonical) else { return };
    let failure = match accept(at, carrier, from, to).await {
        Ok(ended) => ended.flag().map(|flag| Failure::new(flag, told(&ended))),
        Err(failure) => Some(failure),
    };
    if let Some(failure) = failure {
        at.agent.metrics.refuse(failure.flag);
        let mut record = AccessRecord::open(Side::Inbound, Some(from));
        (record.details.dst.addr, record.details.path) = (Some(to), Some(Path::Tunnel));
        report::close(record, Err(failure));
    }
}

async fn accept(at: &Site, carrier: TcpStream, from: SocketAddr, to: SocketAddr) -> Result<Ended, Failure> {
    let _ = socket::tune(&carrier);
    let carrier = match at.agent.handshakes.admit(carrier, from) {
        Ok(carrier) => carrier,
        Err(ended) => return Ok(ended),
    };
    let own = at.agent.world.decide(|world| at.pod.owner.workload(world)).await?;
    let certificate = at
        .agent
        .certificates
        .get(&own.identity())
        .await
        .map_err(|flag| Failure::new(flag, format!("no certificate of {}", own.identity())))?;
    let serving = Serving {
        tls: certificate.server_tls(),
        draining: at.pod.draining.clone(),
        tasks: at.pod.tasks.clone(),
    };
    let of_streams = at.clone();
    let served = serve_connection(carrier, serving, move |incoming| {
        let at = of_streams.clone();
        async move { stream(&at, incoming, to.ip()).await }
    });
    Ok(served.await)
}

fn told(ended: &Ended) -> String {
    match ended {
        Ended::Tls(error) => crate::pods::chain(error),
        Ended::H2(error) => error.clone(),
        Ended::Deadline => "the peer did not finish its handshake in time".to_owned(),
        Ended::Overload => "too many handshakes at the same time".to_owned(),
        Ended::Closed { .. } | Ended::Drained => String::new(),
    }
}

/// Serves one tunnelled connection to its end.
async fn stream(at: &Site, incoming: Incoming, local: IpAddr) {
    let mut record = AccessRecord::open(Side::Inbound, Some(incoming.peer_addr));
    record.details.path = Some(Path::Tunnel);
    record.details.hbone_addr = Some(incoming.authority.clone());
    record.details.src.identity = Some(incoming.peer.clone());
    let outcome = carry(at, incoming, local, &mut record).await;
    report::close(record, outcome);
}

async fn carry(
    at: &Site,
    incoming: Incoming,
    local: IpAddr,
    record: &mut AccessRecord,
) -> Result<(), Failure> {
    let _place = match at.pod.place() {
        Ok(place) => place,
        Err(failure) => {
            at.agent.metrics.refuse(failure.flag);
            return Err(refuse(incoming, failure));
        }
    };
    let to = match inbound::serves(local, &incoming.authority) {
        Ok(to) => to,
        Err(refusal) => return Err(refuse(incoming, refusal.into())),
    };
    record.details.dst.addr = Some(to);
    let from = incoming.peer_addr;
    let claim = incoming.headers.client_claim.clone();
    let arrival = arrival(Some(incoming.peer.clone()), from, to, claim);
    let live = at.agent.connections.register(Accepted {
        owner: at.pod.owner.clone(),
        side: Side::Inbound,
        client: from,
        dialled: to,
        own_tuple: false,
        subject: Subject::Inbound(arrival.clone()),
    });
    report::show(&live, record);
    tokio::select! {
        outcome = live.until_cut(relay(at, incoming, to, &arrival, record, &live)) => outcome?,
        () = at.pod.draining.forced() => Err(ended(at)),
    }
}

async fn relay(
    at: &Site,
    incoming: Incoming,
    to: SocketAddr,
    arrival: &Arrival,
    record: &mut AccessRecord,
    live: &Live,
) -> Result<(), Failure> {
    let from = incoming.peer_addr;
    let hint = incoming.headers.forwarded.as_deref().and_then(|line| tunnel::forwarded_host(line.as_bytes()));
    if let Err(failure) = admitted(at, arrival, Between { from, to, hint }, record, live).await {
        return Err(refuse(incoming, failure));
    }
    let mut app = match at.agent.dial_app(&at.pod, from.ip(), to).await {
        Ok(app) => app,
        Err(error) => return Err(refuse(incoming, error.into())),
    };
    let baggage = at
        .agent
        .world
        .now()
        .and_then(|world| at.pod.owner.workload(&world).ok())
        .map(|own| tunnel::baggage_of(&own));
    let mut client = incoming
        .accept(baggage.as_deref())
        .map_err(|error| Failure::new(mesh_core::flag::Flag::Aborted, error.to_string()))?;
    copy_bidirectional(&mut client, &mut app, &record.counters()).await?;
    Ok(())
}

fn refuse(incoming: Incoming, failure: Failure) -> Failure {
    incoming.refuse(failure.status(), failure.flag);
    failure
}

/// A connection that wants in, as policy sees it.
pub fn arrival(
    peer: Option<Identity>,
    from: SocketAddr,
    to: SocketAddr,
    claimed_client: Option<Identity>,
) -> Arrival {
    Arrival { peer, source_ip: from.ip(), destination_ip: to.ip(), port: to.port(), claimed_client }
}

/// The service of this pod that the peer says it was asked for; a hint for logs and metrics.
fn hinted(world: &Snapshot, own: &Workload, host: &str) -> Option<Arc<Service>> {
    let key = own.services.keys().find(|key| &*key.hostname == host)?;
    world.service(key).cloned()
}

/// What a connection in runs between, and what its peer says about it.
#[derive(Clone, Copy)]
pub struct Between<'a> {
    /// The client, or the other end of its tunnel.
    pub from: SocketAddr,
    /// The application.
    pub to: SocketAddr,
    /// Host name of the service that was addressed.
    pub hint: Option<&'a str>,
}

/// Asks policy, and tells record, metrics and list what came of it.
///
/// # Errors
/// Policy refuses.
pub async fn admitted(
    at: &Site,
    arrival: &Arrival,
    Between { from, to, hint }: Between<'_>,
    record: &mut AccessRecord,
    live: &Live,
) -> Result<(), Failure> {
    let decided = at
        .agent
        .world
        .decide(|world| {
            let own = at.pod.owner.workload(world)?;
            inbound::admit(world, &own, arrival)
        })
        .await;
    let world = at.agent.world.now();
    let own = world.as_ref().and_then(|world| at.pod.owner.workload(world).ok());
    // Who has that address now, for the log; identity is only what was proven.
    let source = world.as_ref().and_then(|world| world.workload_by_ip(from.ip()).cloned());
    let proven = arrival.peer.clone();
    record.details.src = report::party(from, source.as_deref(), proven.clone());
    let own_identity = own.as_ref().map(|own| own.identity()).filter(|_| proven.is_some());
    record.details.dst = report::party(to, own.as_deref(), own_identity.clone());
    if let Ok(admission) = &decided {
        record.details.policy = admission.decider.as_ref().map(|decider| decider.policy.to_string());
        record.details.reason = Some(explain::admission(admission));
    }
    let service = hint.and_then(|host| hinted(world.as_deref()?, own.as_deref()?, host));
    record.details.service = service.as_ref().map(|service| service.key.hostname.to_string());
    let told = Told {
        source,
        source_identity: proven,
        destination: own,
        destination_identity: own_identity,
        service,
    };
    told.count(record, &at.agent.metrics, Side::Inbound);
    report::show(live, record);
    decided.map(|_| ()).map_err(Failure::from)
}
