//! How a connection is told: its access record, its metrics and its place in the list of live ones.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    Refusal,
    flag::Flag,
    id::Identity,
    model::{Service, Workload},
};
use mesh_net::{
    access::{AccessRecord, Outcome, Party, Path, Side},
    copy::CopyError,
    socket,
    telemetry::{Metrics, TcpLabels, Text, WorkloadLabels},
    tunnel::DialError,
};
use tokio::net::TcpStream;

use crate::{
    connections::{Cut, Live},
    pods::{chain, netns::NetnsError},
    source::AppError,
};

/// Why a connection did not end well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The stable code.
    pub flag: Flag,
    /// For people.
    pub error: String,
    /// The policy that decided.
    pub policy: Option<String>,
}

impl Failure {
    /// Without a policy.
    pub fn new(flag: Flag, error: impl Into<String>) -> Self {
        Self { flag, error: error.into(), policy: None }
    }

    /// The status that tells the peer of a tunnel (`wire-protocol.md` 2.3).
    pub fn status(&self) -> u16 {
        match self.flag {
            Flag::IllegalAuthority | Flag::MalformedRequest => 400,
            Flag::IllegalPort => 503,
            flag if flag.response_flag() == "DENY" => 401,
            _ => 503,
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self { flag: refusal.flag, error: refusal.why, policy: refusal.policy.map(|key| key.to_string()) }
    }
}

impl From<DialError> for Failure {
    fn from(error: DialError) -> Self {
        let flag = match &error {
            // The peer told why.
            DialError::Status { flag: Some(flag), .. } => *flag,
            other => other.flag(),
        };
        Self::new(flag, chain(&error))
    }
}

impl From<AppError> for Failure {
    fn from(error: AppError) -> Self {
        Self::new(error.flag(), chain(&error))
    }
}

impl From<NetnsError> for Failure {
    fn from(error: NetnsError) -> Self {
        Self::new(Flag::Internal, chain(&error))
    }
}

impl From<CopyError> for Failure {
    fn from(error: CopyError) -> Self {
        Self::new(error.flag(), chain(&error))
    }
}

impl From<Cut> for Failure {
    fn from(cut: Cut) -> Self {
        Self { flag: cut.flag, error: cut.why, policy: cut.policy.map(|key| key.to_string()) }
    }
}

/// Ends a connection that was served: its client believed to be connected, so a reset says where it never was, or is no
/// longer.
pub fn conclude(client: &TcpStream, record: AccessRecord, outcome: Result<(), Failure>) {
    if outcome.is_err() {
        let _ = socket::reset_on_close(client);
    }
    close(record, outcome);
}

/// Closes a record with how it went.
pub fn close(mut record: AccessRecord, outcome: Result<(), Failure>) {
    match outcome {
        Ok(()) => record.close(Outcome::Complete),
        Err(failure) => {
            if failure.policy.is_some() {
                record.details.policy = failure.policy;
            }
            record.fail(failure.flag, failure.error);
        }
    }
}

/// Refuses a connection that was accepted and will not be served.
pub fn turn_away(metrics: &Metrics, side: Side, stream: &TcpStream, peer: SocketAddr, failure: Failure) {
    let mut record = AccessRecord::open(side, Some(peer));
    record.details.dst.addr = stream.local_addr().ok().map(socket::canonical);
    metrics.refuse(failure.flag);
    let _ = socket::reset_on_close(stream);
    close(record, Err(failure));
}

/// Shows in the list of live connections what the record knows by now.
pub fn show(live: &Live, record: &AccessRecord) {
    live.show(&record.details, record.counters());
}

/// One end, as far as it is known.
pub fn party(addr: SocketAddr, workload: Option<&Workload>, identity: Option<Identity>) -> Party {
    Party {
        addr: Some(addr),
        workload: workload.map(|w| w.name.clone()),
        namespace: workload.map(|w| w.namespace.clone()),
        identity,
        cluster: workload.map(|w| w.cluster.clone()).filter(|cluster| !cluster.is_empty()),
    }
}

/// What the metrics are told about a connection.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// The client.
    pub source: Option<Arc<Workload>>,
    /// What it proved.
    pub source_identity: Option<Identity>,
    /// The next hop.
    pub destination: Option<Arc<Workload>>,
    /// What it proved, or must prove.
    pub destination_identity: Option<Identity>,
    /// The service that was addressed.
    pub service: Option<Arc<Service>>,
}

impl Told {
    /// Counts the connection as opened, once.
    pub fn count(&self, record: &mut AccessRecord, metrics: &Metrics, side: Side) {
        if !record.is_counted() {
            let path = record.details.path.map_or("", Path::name);
            record.count(metrics, self.labels(side, path));
        }
    }

    /// The labels of `wire-protocol.md` T2.
    pub fn labels(&self, side: Side, path: &'static str) -> TcpLabels {
        let of = |workload: &Option<Arc<Workload>>, identity: &Option<Identity>| {
            workload.as_ref().map_or_else(
                || WorkloadLabels {
                    principal: identity.as_ref().map(|id| Text::from(id.to_string())).unwrap_or_default(),
                    ..WorkloadLabels::default()
                },
                |workload| WorkloadLabels::of(workload, identity.as_ref()),
            )
        };
        let mut labels = TcpLabels::new(side);
        labels.source = of(&self.source, &self.source_identity);
        labels.destination = of(&self.destination, &self.destination_identity);
        labels.mutual_tls = self.source_identity.is_some() && self.destination_identity.is_some();
        labels.path = path;
        if let Some(service) = &self.service {
            labels.destination_service = (&service.key.hostname).into();
            labels.destination_service_namespace = (&service.key.namespace).into();
            labels.destination_service_name = (&service.name).into();
        }
        labels
    }
}
