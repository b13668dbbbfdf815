//! Counters of the waypoint under the names and labels that Istio's dashboards know (`wire-protocol.md` 8.3).
//!
//! Label values come from the control plane, never from a peer, so the number of series is bounded by the mesh's own
//! objects.

use std::sync::Arc;

use mesh_core::{
    id::{Identity, ServiceKey},
    model::{Service, Workload},
};
use mesh_net::telemetry::{self, ConnectionMetrics, Reporter, TcpLabels, WorkloadLabels};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

const UNKNOWN: &str = "unknown";

/// Bucket bounds of Istio's histograms.
const BUCKETS: [f64; 19] = [
    0.5, 1., 5., 10., 25., 50., 100., 250., 500., 1000., 2500., 5000., 10000., 30000., 60000., 300000.,
    600000., 1800000., 3600000.,
];

/// One side of a connection as telemetry names it.
#[derive(Clone, Debug, Default)]
pub struct Party {
    /// The workload, when the control plane described it.
    pub workload: Option<Arc<Workload>>,
    /// The identity that was proven or is expected.
    pub identity: Option<Identity>,
}

/// What a request or connection was about.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// The client.
    pub source: Party,
    /// The chosen endpoint.
    pub destination: Party,
    /// The service that the client addressed.
    pub service: Option<ServiceKey>,
    /// Its description.
    pub described: Option<Arc<Service>>,
}

macro_rules! label_sets {
    ($($(#[$doc:meta])* $set:ident { $($extra:ident),* })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
        #[expect(missing_docs, reason = "fields are label names of wire-protocol.md 8.1")]
        pub struct $set {
            pub reporter: &'static str,
            pub source_workload: Arc<str>,
            pub source_canonical_service: Arc<str>,
            pub source_canonical_revision: Arc<str>,
            pub source_workload_namespace: Arc<str>,
            pub source_principal: Arc<str>,
            pub source_app: Arc<str>,
            pub source_version: Arc<str>,
            pub source_cluster: Arc<str>,
            pub destination_service: Arc<str>,
            pub destination_service_namespace: Arc<str>,
            pub destination_service_name: Arc<str>,
            pub destination_workload: Arc<str>,
            pub destination_canonical_service: Arc<str>,
            pub destination_canonical_revision: Arc<str>,
            pub destination_workload_namespace: Arc<str>,
            pub destination_principal: Arc<str>,
            pub destination_app: Arc<str>,
            pub destination_version: Arc<str>,
            pub destination_cluster: Arc<str>,
            pub request_protocol: &'static str,
            pub response_flags: &'static str,
            pub connection_security_policy: &'static str,
            $(pub $extra: Arc<str>,)*
        }

        impl $set {
            /// The labels of `subject`.
            pub fn new(subject: &Subject, protocol: &'static str, flags: &'static str, $($extra: Arc<str>),*) -> Self {
                let (source, destination) = (Side::of(&subject.source), Side::of(&subject.destination));
                let service = ServiceLabels::of(subject);
                Self {
                    reporter: "waypoint",
                    source_workload: source.workload,
                    source_canonical_service: source.canonical_name.clone(),
                    source_canonical_revision: source.canonical_revision.clone(),
                    source_workload_namespace: source.namespace,
                    source_principal: source.principal,
                    source_app: source.canonical_name,
                    source_version: source.canonical_revision,
                    source_cluster: source.cluster,
                    destination_service: service.hostname,
                    destination_service_namespace: service.namespace,
                    destination_service_name: service.name,
                    destination_workload: destination.workload,
                    destination_canonical_service: destination.canonical_name.clone(),
                    destination_canonical_revision: destination.canonical_revision.clone(),
                    destination_workload_namespace: destination.namespace,
                    destination_principal: destination.principal,
                    destination_app: destination.canonical_name,
                    destination_version: destination.canonical_revision,
                    destination_cluster: destination.cluster,
                    request_protocol: protocol,
                    response_flags: flags,
                    connection_security_policy: "mutual_tls",
                    $($extra,)*
                }
            }
        }
    )* };
}

label_sets! {
    /// Labels of the `istio_requests_total` family.
    RequestLabels { response_code, grpc_response_status }
}

struct Side {
    workload: Arc<str>,
    canonical_name: Arc<str>,
    canonical_revision: Arc<str>,
    namespace: Arc<str>,
    principal: Arc<str>,
    cluster: Arc<str>,
}

fn or_unknown(text: &Arc<str>) -> Arc<str> {
    if text.is_empty() { UNKNOWN.into() } else { text.clone() }
}

impl Side {
    fn of(party: &Party) -> Self {
        let field = |get: fn(&Workload) -> &Arc<str>| {
            party.workload.as_deref().map_or_else(|| UNKNOWN.into(), |workload| or_unknown(get(workload)))
        };
        Self {
            workload: field(|w| &w.workload_name),
            canonical_name: field(|w| &w.canonical_name),
            canonical_revision: field(|w| &w.canonical_revision),
            namespace: match (&party.workload, &party.identity) {
                (Some(workload), _) => workload.namespace.clone(),
                (None, Some(identity)) => identity.namespace.clone(),
                (None, None) => UNKNOWN.into(),
            },
            principal: party.identity.as_ref().map_or_else(|| UNKNOWN.into(), |id| id.to_string().into()),
            cluster: field(|w| &w.cluster),
        }
    }
}

struct ServiceLabels {
    hostname: Arc<str>,
    namespace: Arc<str>,
    name: Arc<str>,
}

impl ServiceLabels {
    fn of(subject: &Subject) -> Self {
        match &subject.service {
            Some(key) => Self {
                hostname: key.hostname.clone(),
                namespace: key.namespace.clone(),
                name: subject.described.as_ref().map_or_else(|| key.hostname.clone(), |s| s.name.clone()),
            },
            None => Self { hostname: UNKNOWN.into(), namespace: UNKNOWN.into(), name: UNKNOWN.into() },
        }
    }
}

type Histograms = Family<RequestLabels, Histogram, fn() -> Histogram>;

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

/// Every counter of the waypoint.
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    duration: Histograms,
    request_bytes: Histograms,
    response_bytes: Histograms,
    /// What every process of the mesh counts; the `istio_tcp_*` families are there.
    pub shared: Arc<telemetry::Metrics>,
    /// Requests and connections that are being served.
    pub open: Gauge,
}

/// How much one request moved and how long it took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Amounts {
    /// Bytes of the request body.
    pub received: u64,
    /// Bytes of the response body.
    pub sent: u64,
    /// Milliseconds.
    pub duration_ms: f64,
}

impl Metrics {
    /// Registers everything beside what is `shared`.
    pub fn new(shared: Arc<telemetry::Metrics>) -> Self {
        let metrics = Self {
            requests: Family::default(),
            duration: Family::new_with_constructor(histogram),
            request_bytes: Family::new_with_constructor(histogram),
            response_bytes: Family::new_with_constructor(histogram),
            shared: shared.clone(),
            open: Gauge::default(),
        };
        shared.register_with(|registry| metrics.register(registry));
        metrics
    }

    fn register(&self, registry: &mut Registry) {
        // The library appends `_total` to counters.
        registry.register("istio_requests", "Requests", self.requests.clone());
        for (name, help, family) in [
            ("istio_request_duration_milliseconds", "Duration of requests", &self.duration),
            ("istio_request_bytes", "Bytes of request bodies", &self.request_bytes),
            ("istio_response_bytes", "Bytes of response bodies", &self.response_bytes),
        ] {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "undermesh_waypoint_open",
            "Requests and connections in progress",
            self.open.clone(),
        );
    }

    /// Counts a finished request.
    pub fn request(&self, labels: &RequestLabels, amounts: Amounts) {
        self.requests.get_or_create(labels).inc();
        self.duration.get_or_create(labels).observe(amounts.duration_ms);
        self.request_bytes.get_or_create(labels).observe(amounts.received as f64);
        self.response_bytes.get_or_create(labels).observe(amounts.sent as f64);
    }

    /// Opens the metrics of a connection that is not HTTP.
    pub fn connection(&self, subject: &Subject) -> ConnectionMetrics {
        let side = |party: &Party| match &party.workload {
            Some(workload) => WorkloadLabels::of(workload, party.identity.as_ref()),
            None => WorkloadLabels {
                principal: party.identity.as_ref().map(ToString::to_string).unwrap_or_default().into(),
                ..WorkloadLabels::default()
            },
        };
        let service = ServiceLabels::of(subject);
        self.shared.connection(TcpLabels {
            source: side(&subject.source),
            destination: side(&subject.destination),
            destination_service: (&service.hostname).into(),
            destination_service_namespace: (&service.namespace).into(),
            destination_service_name: (&service.name).into(),
            mutual_tls: true,
            path: "tunnel",
            ..TcpLabels::new(Reporter::Waypoint)
        })
    }
}
