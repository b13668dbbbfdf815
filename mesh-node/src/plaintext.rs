//! What arrives without a tunnel: admit or refuse, then copy to the application.

use std::net::SocketAddr;

use mesh_core::{flag::Flag, inbound::Arrival, tunnel::ILLEGAL_PORTS};
use mesh_net::{
    access::{AccessRecord, Path, Side},
    copy::copy_bidirectional,
    socket,
};
use tokio::net::TcpStream;

use crate::{
    agent::Site,
    connections::{Accepted, Live, Subject},
    inbound::{Between, admitted, arrival},
    outbound::ended,
    report::{self, Failure},
};

/// Serves one plaintext connection to its end.
pub async fn serve(at: &Site, mut client: TcpStream, from: SocketAddr) {
    let mut record = AccessRecord::open(Side::Inbound, Some(from));
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
    record.details.path = Some(Path::Plaintext);
    if ILLEGAL_PORTS.contains(&to.port()) {
        return Err(Failure::new(Flag::IllegalPort, format!("port {} is the mesh's own", to.port())));
    }
    if !at.pod.kept.load().pod.ips.contains(&to.ip()) {
        return Err(Failure::new(
            Flag::IllegalAuthority,
            format!("{} is not an address of this pod", to.ip()),
        ));
    }
    let arrival = arrival(None, from, to, None);
    let live = at.agent.connections.register(Accepted {
        owner: at.pod.owner.clone(),
        side: Side::Inbound,
        client: from,
        dialled: to,
        own_tuple: true,
        subject: Subject::Inbound(arrival.clone()),
    });
    tokio::select! {
        outcome = live.until_cut(relay(at, client, (from, to), &arrival, record, &live)) => outcome?,
        () = at.pod.draining.forced() => Err(ended(at)),
    }
}

async fn relay(
    at: &Site,
    client: &mut TcpStream,
    (from, to): (SocketAddr, SocketAddr),
    arrival: &Arrival,
    record: &mut AccessRecord,
    live: &Live,
) -> Result<(), Failure> {
    let _ = socket::tune(client);
    report::show(live, record);
    admitted(at, arrival, Between { from, to, hint: None }, record, live).await?;
    let mut app = at.agent.dial_app(&at.pod, from.ip(), to).await?;
    copy_bidirectional(client, &mut app, &record.counters()).await?;
    Ok(())
}
