//! What a pod sends: accept → flow record → plan → dial → copy.

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use mesh_core::{
    explain,
    flag::Flag,
    limits,
    model::{Service, Workload},
    outbound::{self, Plan, Request},
    tunnel,
};
use mesh_net::{
    BoxFuture,
    access::{AccessRecord, Path, Side},
    copy::copy_bidirectional,
    socket::{self, DialOptions},
    tunnel::{Connector, Dial, TunnelHeaders},
};
use tokio::net::TcpStream;

use crate::{
    agent::{Agent, Site},
    connections::{Accepted, Live, Subject},
    pods::netns::Netns,
    report::{self, Failure, Told},
    source::AppError,
};

/// Serves one connection that the kernel handed to the outbound listener, to its end.
pub async fn serve(at: &Site, mut client: TcpStream, from: SocketAddr) {
    let mut record = AccessRecord::open(Side::Outbound, Some(from));
    let outcome = carry(at, &mut client, from, &mut record).await;
    report::conclude(&client, record, outcome);
}

async fn carry(
    at: &Site,
    client: &mut TcpStream,
    from: SocketAddr,
    record: &mut AccessRecord,
) -> Result<(), Failure> {
    let to = client.local_addr().map_err(|error| Failure::new(Flag::Internal, error.to_string()))?;
    let to = socket::canonical(to);
    record.details.dst.addr = Some(to);
    let flow = at.agent.kernel.flow(at.pod.slot, from, to).ok_or_else(|| {
        Failure::new(
            Flag::NoFlowRecord,
            format!("the kernel has no record of a connection from {from} to {to}"),
        )
    })?;
    let chosen = flow.chosen.or_else(|| at.pod.affinity.of(flow.dialled, Instant::now()));
    let request = Request { to: flow.dialled, chosen, pick: at.agent.chance.next() };
    let live = at.agent.connections.register(Accepted {
        owner: at.pod.owner.clone(),
        side: Side::Outbound,
        client: from,
        dialled: flow.dialled,
        own_tuple: false,
        subject: Subject::Outbound(request),
    });
    tokio::select! {
        outcome = live.until_cut(planned(at, client, from, request, record, &live)) => outcome?,
        () = at.pod.draining.forced() => Err(ended(at)),
    }
}

/// Why a forced drain ends a connection.
pub fn ended(at: &Site) -> Failure {
    let flag = if at.pod.is_released(&at.agent.draining) { Flag::PodReleased } else { Flag::Drain };
    Failure::new(flag, flag.text())
}

async fn planned(
    at: &Site,
    client: &mut TcpStream,
    from: SocketAddr,
    request: Request,
    record: &mut AccessRecord,
    live: &Live,
) -> Result<(), Failure> {
    let _ = socket::tune(client);
    let decided = at
        .agent
        .world
        .decide(|world| {
            let own = at.pod.owner.workload(world)?;
            let plan = outbound::plan(world, &own, &request)?;
            Ok((own, plan))
        })
        .await;
    let (own, plan) = match decided {
        Ok(decided) => decided,
        Err(refusal) => {
            let source = at.agent.world.now().and_then(|world| at.pod.owner.workload(&world).ok());
            record.details.src = report::party(from, source.as_deref(), None);
            Told { source, ..Told::default() }.count(record, &at.agent.metrics, Side::Outbound);
            return Err(refusal.into());
        }
    };
    keep(at, &request, &plan);
    let route = Route::of(&plan, &own);
    route.tell(record, from);
    route.told.count(record, &at.agent.metrics, Side::Outbound);
    report::show(live, record);
    match plan {
        Plan::Passthrough { to, .. } | Plan::Plain { to, .. } => {
            let mut server = dial_plain(at, to).await?;
            copy_bidirectional(client, &mut server, &record.counters()).await?;
        }
        Plan::Tunnel { hop, authority, service, .. } | Plan::Waypoint { hop, authority, service, .. } => {
            let host = service.as_ref().map(|service| &*service.key.hostname);
            let dial = Dial {
                identity: own.identity(),
                hop: mesh_net::tunnel::Hop { dial: hop.dial, expect: hop.expect },
                source: from.ip(),
                authority: tunnel::format_authority(authority),
                headers: TunnelHeaders {
                    baggage: Some(tunnel::baggage_of(&own)),
                    forwarded: Some(tunnel::forwarded(from, host)),
                    client_claim: None,
                },
                connect: Arc::new(InPod { agent: at.agent.clone(), netns: at.pod.netns.clone() }),
            };
            let mut server = at.pod.pool.open(dial).await?;
            record.details.dst.identity = Some(server.peer().clone());
            report::show(live, record);
            copy_bidirectional(client, &mut server, &record.counters()).await?;
        }
    }
    Ok(())
}

/// Remembers which endpoint the client has got of a service that lets it keep one.
fn keep(at: &Site, request: &Request, plan: &Plan) {
    let affinity = &at.pod.affinity;
    match plan {
        Plan::Tunnel { authority: endpoint, service: Some(service), .. }
        | Plan::Plain { to: endpoint, service: Some(service), .. } => match service.sticky {
            Some(time) => affinity.keep(request.to, *endpoint, time, Instant::now()),
            None if request.chosen.is_some() => affinity.forget(request.to),
            None => {}
        },
        _ => {}
    }
}

async fn dial_plain(at: &Site, to: SocketAddr) -> Result<TcpStream, AppError> {
    let opened = at.pod.netns.run(|| socket::for_dial(to, &DialOptions::default()))?;
    let opened = opened.map_err(|source| AppError::Io { to, source })?;
    at.agent.exempt(&opened).map_err(AppError::Exempt)?;
    socket::connect(opened, to, limits::CONNECT).await.map_err(|source| AppError::connect(to, source))
}

/// Makes the carrier of a tunnel inside the pod's namespace.
struct InPod {
    agent: Arc<Agent>,
    netns: Netns,
}

impl Connector for InPod {
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(async move {
            let opened = self
                .netns
                .run(|| socket::for_dial(to, &DialOptions::default()))
                .map_err(io::Error::other)??;
            self.agent.exempt(&opened).map_err(io::Error::other)?;
            socket::connect(opened, to, limits::CONNECT).await
        })
    }
}

/// A plan as it is told.
struct Route {
    path: Path,
    hop: SocketAddr,
    authority: Option<SocketAddr>,
    reason: String,
    told: Told,
}

impl Route {
    fn of(plan: &Plan, own: &Arc<Workload>) -> Self {
        let told = |destination: Option<&Arc<Workload>>, service: Option<&Arc<Service>>, proven: bool| Told {
            source: Some(own.clone()),
            source_identity: proven.then(|| own.identity()),
            destination: destination.cloned(),
            destination_identity: destination.filter(|_| proven).map(|workload| workload.identity()),
            service: service.cloned(),
        };
        let reason = explain::plan(plan);
        match plan {
            Plan::Passthrough { to, service } => Self {
                path: Path::Passthrough,
                hop: *to,
                authority: None,
                reason,
                told: told(None, service.as_ref(), false),
            },
            Plan::Plain { to, workload, service } => Self {
                // For whoever looks at it, a workload outside the mesh is passed through like any other address.
                path: Path::Passthrough,
                hop: *to,
                authority: None,
                reason,
                told: told(Some(workload), service.as_ref(), false),
            },
            Plan::Tunnel { hop, authority, workload, service }
            | Plan::Waypoint { hop, authority, workload, service } => Self {
                path: Path::Tunnel,
                hop: hop.dial,
                authority: Some(*authority),
                reason,
                told: told(Some(workload), service.as_ref(), true),
            },
        }
    }

    fn tell(&self, record: &mut AccessRecord, from: SocketAddr) {
        let details = &mut record.details;
        details.src = report::party(from, self.told.source.as_deref(), self.told.source_identity.clone());
        // Its identity is told once it has been proven.
        details.dst = report::party(self.hop, self.told.destination.as_deref(), None);
        details.hbone_addr = self.authority.map(tunnel::format_authority);
        details.service = self.told.service.as_ref().map(|service| service.key.hostname.to_string());
        details.path = Some(self.path);
        details.reason = Some(self.reason.clone());
    }
}
