//! To an endpoint's agent by HBONE, as this waypoint, stating the client; to what is not in the mesh by plain TCP.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    flag::Flag,
    id::Identity,
    model::{TunnelProtocol, Workload},
    tunnel::{HBONE_PORT, ILLEGAL_PORTS, format_authority},
};
use mesh_net::{
    socket::unspecified,
    tunnel::{self, Connector, Hop, Pool, TunnelHeaders},
};

use super::{BoxFuture, BoxStream, Dial, DialFailure, Endpoint};

/// Dials for a waypoint.
pub struct Hbone {
    pool: Pool,
    own: Identity,
    connect: Arc<dyn Connector>,
    /// Describes this waypoint to the endpoint's telemetry.
    baggage: Option<String>,
}

impl Hbone {
    /// Dials through `pool` as `own`.
    pub fn new(pool: Pool, own: Identity, connect: Arc<dyn Connector>, baggage: Option<String>) -> Self {
        Self { pool, own, connect, baggage }
    }

    /// The tunnel stream to an endpoint on behalf of `client`.
    fn tunnel_to(&self, to: &Endpoint, client: &Identity) -> tunnel::Dial {
        let mut expect = vec![to.workload.identity()];
        expect.extend(to.subject_alt_names.iter().cloned());
        tunnel::Dial {
            identity: self.own.clone(),
            hop: Hop { dial: SocketAddr::new(to.address.ip(), HBONE_PORT), expect },
            source: unspecified(to.address.ip()),
            authority: format_authority(to.address),
            headers: TunnelHeaders {
                baggage: self.baggage.clone(),
                forwarded: to.service.as_ref().map(|service| format!("host={}", service.hostname)),
                client_claim: Some(client.clone()),
            },
            connect: self.connect.clone(),
        }
    }
}

/// A port of the mesh itself is never an application's.
fn legal(workload: &Workload, address: SocketAddr) -> Result<(), DialFailure> {
    if ILLEGAL_PORTS.contains(&address.port()) {
        let text = format!("port {} of {} belongs to the mesh", address.port(), workload.name);
        return Err(DialFailure { flag: Flag::IllegalPort, text });
    }
    Ok(())
}

fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    text
}

impl Dial for Hbone {
    fn dial(&self, to: &Endpoint, client: &Identity) -> BoxFuture<Result<BoxStream, DialFailure>> {
        if let Err(illegal) = legal(&to.workload, to.address) {
            return Box::pin(std::future::ready(Err(illegal)));
        }
        match to.workload.tunnel {
            TunnelProtocol::Hbone => {
                let (pool, dial) = (self.pool.clone(), self.tunnel_to(to, client));
                Box::pin(async move {
                    match pool.open(dial).await {
                        Ok(stream) => Ok(Box::new(stream) as BoxStream),
                        Err(error) => Err(DialFailure { flag: error.flag(), text: told(&error) }),
                    }
                })
            }
            TunnelProtocol::None => {
                let (connect, address) = (self.connect.clone(), to.address);
                Box::pin(async move {
                    match connect.connect(address).await {
                        Ok(stream) => Ok(Box::new(stream) as BoxStream),
                        Err(error) => {
                            let flag = match error.kind() {
                                std::io::ErrorKind::ConnectionRefused => Flag::UpstreamRefused,
                                std::io::ErrorKind::TimedOut => Flag::UpstreamTimeout,
                                _ => Flag::UpstreamIo,
                            };
                            Err(DialFailure { flag, text: error.to_string() })
                        }
                    }
                })
            }
        }
    }
}
