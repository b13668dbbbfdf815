//! Ports that do not speak HTTP: the bytes go to one endpoint of the service as they are.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{flag, id::Identity};
use mesh_net::{
    copy::{Plain, TransferCounters, copy_bidirectional},
    drain::Draining,
};

use crate::{
    Waypoint,
    dial::{BoxStream, Stream},
    record::{Flag, Record, TCP},
    view::Unroutable,
};

/// Why bytes stopped flowing before both sides were done.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// An end failed.
    #[error(transparent)]
    Copy(#[from] mesh_net::copy::CopyError),
    /// The drain's deadline passed.
    #[error("connection closed due to connection drain")]
    Drained,
}

/// Carries bytes both ways until both sides are done or the drain is forced.
///
/// # Errors
/// [`CarryError`].
pub async fn carry(
    a: impl Stream,
    b: impl Stream,
    counters: &TransferCounters,
    draining: &Draining,
) -> Result<(), CarryError> {
    let (mut a, mut b) = (Plain(a), Plain(b));
    tokio::select! {
        carried = copy_bidirectional(&mut a, &mut b, counters) => Ok(carried.map(drop)?),
        () = draining.forced() => Err(CarryError::Drained),
    }
}

/// A connection whose endpoint has answered; the client has not been told yet.
pub struct Joined {
    upstream: BoxStream,
    record: Record,
}

/// Chooses an endpoint for a connection of `client` to `authority` and connects to it.
///
/// # Errors
/// The mesh's code for the refusal; the record is closed by then.
pub async fn join(
    waypoint: &Arc<Waypoint>,
    client: &Identity,
    peer: SocketAddr,
    authority: SocketAddr,
) -> Result<Joined, flag::Flag> {
    let mut record = Record::open(&waypoint.metrics, client, peer, authority);
    record.seen.protocol = TCP;
    let view = waypoint.view();
    record.subject.source = view.client(client, peer.ip());
    let endpoint = match view.endpoint_of(authority, &waypoint.chance, &mut record) {
        Ok(endpoint) => endpoint,
        Err(why) => {
            let flag = match &why {
                Unroutable::NoEndpoint(_) => Flag::UH,
                Unroutable::NotReady => Flag::OM,
                _ => Flag::NR,
            };
            record.fail(flag, "no_endpoint", &why);
            return Err(refused(record, why.flag()));
        }
    };
    match waypoint.dial.dial(&endpoint, client).await {
        Ok(upstream) => {
            record.joined();
            Ok(Joined { upstream, record })
        }
        Err(failure) => {
            record.fail(Flag::UF, "connect_failed", &failure);
            Err(refused(record, failure.flag))
        }
    }
}

fn refused(mut record: Record, flag: flag::Flag) -> flag::Flag {
    record.refused = Some(flag);
    record.close();
    flag
}

/// Carries the bytes of a joined connection to their end.
pub async fn serve(joined: Joined, downstream: impl Stream, draining: &Draining) {
    let Joined { upstream, mut record } = joined;
    let counters = record.counters.clone();
    if let Err(error) = carry(downstream, upstream, &counters, draining).await {
        record.fail(Flag::UC, "connection_failed", error);
    }
    record.close();
}

#[cfg(test)]
mod tests {
    use std::io;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn bytes_flow_both_ways_and_half_close_travels() -> io::Result<()> {
        let ((mut client, a), (b, mut server)) = (duplex(64), duplex(64));
        let counters = TransferCounters::default();
        let never = Draining::never();
        let carried = carry(a, b, &counters, &never);
        let talk = async move {
            client.write_all(b"question").await?;
            client.shutdown().await?;
            let mut asked = String::new();
            server.read_to_string(&mut asked).await?;
            assert_eq!(asked, "question");
            server.write_all(b"the answer").await?;
            drop(server);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await?;
            assert_eq!(answer, "the answer");
            Ok::<_, io::Error>(())
        };
        let (carried, talked) = tokio::join!(carried, talk);
        carried.unwrap();
        talked?;
        assert_eq!((counters.transfer().a_to_b, counters.transfer().b_to_a), (8, 10));
        Ok(())
    }
}
