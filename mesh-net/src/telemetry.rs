//! Logs and metrics under the names of `wire-protocol.md` 8, so that existing dashboards work.

pub mod log;

use std::{
    fmt::{self, Write as _},
    sync::Arc,
};

use mesh_core::flag::Flag;
use parking_lot::Mutex;
use prometheus_client::{
    encoding::{
        EncodeLabelKey, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder, text::encode,
    },
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Metric, Registry},
};

pub use self::log::{LogControl, LogFormat, init_tracing};
use crate::access::Side;

/// Value of labels that are not known.
const UNKNOWN: &str = "unknown";

/// A label value: shared text, or unknown. Values come from the control plane and from verified certificates, never
/// from a peer's headers, so their number is bounded by the mesh's size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Text(Option<Arc<str>>);

impl From<&Arc<str>> for Text {
    fn from(value: &Arc<str>) -> Self {
        Self((!value.is_empty()).then(|| value.clone()))
    }
}

impl From<&str> for Text {
    fn from(value: &str) -> Self {
        Self((!value.is_empty()).then(|| value.into()))
    }
}

impl From<String> for Text {
    fn from(value: String) -> Self {
        Self::from(value.as_str())
    }
}

impl EncodeLabelValue for Text {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), fmt::Error> {
        encoder.write_str(self.0.as_deref().unwrap_or(UNKNOWN))
    }
}

/// One side's workload in the labels of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct WorkloadLabels {
    /// Controller name.
    pub workload: Text,
    /// Canonical service name; also the `app` label.
    pub canonical_service: Text,
    /// Canonical revision; also the `version` label.
    pub canonical_revision: Text,
    /// Namespace.
    pub namespace: Text,
    /// Identity proven by mTLS.
    pub principal: Text,
    /// Cluster.
    pub cluster: Text,
    /// Region and zone, once the workload is known.
    pub locality: Option<(Text, Text)>,
}

impl WorkloadLabels {
    /// The labels of a workload; `principal` is its identity where mTLS proved it.
    pub fn of(workload: &mesh_core::model::Workload, principal: Option<&mesh_core::id::Identity>) -> Self {
        Self {
            workload: (&workload.workload_name).into(),
            canonical_service: (&workload.canonical_name).into(),
            canonical_revision: (&workload.canonical_revision).into(),
            namespace: (&workload.namespace).into(),
            principal: principal.map(|id| Text::from(id.to_string())).unwrap_or_default(),
            cluster: (&workload.cluster).into(),
            locality: Some(((&workload.locality.region).into(), (&workload.locality.zone).into())),
        }
    }
}

/// Labels of one connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// Which side reports.
    pub reporter: Reporter,
    /// Who connected.
    pub source: WorkloadLabels,
    /// The next hop.
    pub destination: WorkloadLabels,
    /// Host name of the intended service.
    pub destination_service: Text,
    /// Its namespace.
    pub destination_service_namespace: Text,
    /// Its Kubernetes name.
    pub destination_service_name: Text,
    /// Both ends proved their identity.
    pub mutual_tls: bool,
    /// Ours: direct, tunnel, plaintext, passthrough, plain; empty is left out.
    pub path: &'static str,
    /// `-`, or why it failed.
    pub response_flags: &'static str,
}

/// Value of the label `reporter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's agent.
    Source,
    /// The server's agent.
    Destination,
    /// A waypoint.
    Waypoint,
}

impl Reporter {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Waypoint => "waypoint",
        }
    }
}

impl From<Side> for Reporter {
    fn from(side: Side) -> Self {
        match side {
            Side::Outbound => Self::Source,
            Side::Inbound => Self::Destination,
        }
    }
}

impl TcpLabels {
    /// Labels of an ordinary connection; everything else is unknown until it is filled in.
    pub fn new(reporter: impl Into<Reporter>) -> Self {
        Self {
            reporter: reporter.into(),
            source: WorkloadLabels::default(),
            destination: WorkloadLabels::default(),
            destination_service: Text::default(),
            destination_service_namespace: Text::default(),
            destination_service_name: Text::default(),
            mutual_tls: false,
            path: "",
            response_flags: "-",
        }
    }
}

fn label(
    encoder: &mut LabelSetEncoder<'_>,
    name: &str,
    value: &impl EncodeLabelValue,
) -> Result<(), fmt::Error> {
    let mut label = encoder.encode_label();
    let mut key = label.encode_label_key()?;
    EncodeLabelKey::encode(&name, &mut key)?;
    let mut text = key.encode_label_value()?;
    value.encode(&mut text)?;
    text.finish()
}

fn workload(
    encoder: &mut LabelSetEncoder<'_>,
    side: &str,
    labels: &WorkloadLabels,
) -> Result<(), fmt::Error> {
    for (name, value) in [
        ("workload", &labels.workload),
        ("canonical_service", &labels.canonical_service),
        ("canonical_revision", &labels.canonical_revision),
        ("workload_namespace", &labels.namespace),
        ("principal", &labels.principal),
        ("app", &labels.canonical_service),
        ("version", &labels.canonical_revision),
        ("cluster", &labels.cluster),
    ] {
        label(encoder, &format!("{side}_{name}"), value)?;
    }
    Ok(())
}

impl EncodeLabelSet for TcpLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        label(encoder, "reporter", &self.reporter.name())?;
        workload(encoder, "source", &self.source)?;
        label(encoder, "destination_service", &self.destination_service)?;
        label(encoder, "destination_service_namespace", &self.destination_service_namespace)?;
        label(encoder, "destination_service_name", &self.destination_service_name)?;
        workload(encoder, "destination", &self.destination)?;
        label(encoder, "request_protocol", &"tcp")?;
        label(encoder, "response_flags", &self.response_flags)?;
        let security = if self.mutual_tls { "mutual_tls" } else { UNKNOWN };
        label(encoder, "connection_security_policy", &security)?;
        if self.source.locality.is_some() || self.destination.locality.is_some() {
            let unknown = (Text::default(), Text::default());
            for (side, labels) in [("source", &self.source), ("destination", &self.destination)] {
                let (region, zone) = labels.locality.as_ref().unwrap_or(&unknown);
                label(encoder, &format!("{side}_region"), region)?;
                label(encoder, &format!("{side}_zone"), zone)?;
            }
        }
        if !self.path.is_empty() {
            label(encoder, "undermesh_path", &self.path)?;
        }
        Ok(())
    }
}

/// A new metric that `registry` exports.
fn registered<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

type OneLabel = [(&'static str, String); 1];

/// Everything that is exported.
pub struct Metrics {
    registry: Mutex<Registry>,
    opened: Family<TcpLabels, Counter>,
    closed: Family<TcpLabels, Counter>,
    received_bytes: Family<TcpLabels, Counter>,
    sent_bytes: Family<TcpLabels, Counter>,
    failed: Family<TcpLabels, Counter>,
    sockets: Family<[(&'static str, &'static str); 1], Gauge>,
    refused: Family<OneLabel, Counter>,
    terminations: Family<OneLabel, Counter>,
    messages: Family<OneLabel, Counter>,
    message_bytes: Family<OneLabel, Counter>,
    /// Pods that are served.
    pub active_proxies: Gauge,
    /// Pods that wait to be served.
    pub pending_proxies: Gauge,
    /// Pods that began to be served.
    pub proxies_started: Counter,
    /// Pods that ceased to be served.
    pub proxies_stopped: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// A registry. `component` is `ztunnel` for agents (dashboards expect it) and `proxy` for waypoints.
    pub fn new(component: &'static str, version: &str) -> Arc<Self> {
        let mut registry = Registry::default();
        let istio = registry.sub_registry_with_prefix("istio");
        // The encoder appends `_total` to counters by itself.
        let opened = registered(istio, "tcp_connections_opened", "TCP connections opened");
        let closed = registered(istio, "tcp_connections_closed", "TCP connections closed");
        let received_bytes = registered(istio, "tcp_received_bytes", "Bytes from client to server");
        let sent_bytes = registered(istio, "tcp_sent_bytes", "Bytes from server to client");
        let failed =
            registered(istio, "tcp_connections_failed", "TCP connections that were refused or failed");
        let sockets = registered(istio, "tcp_sockets_open", "Connections that are open now");
        let terminations =
            registered(istio, "xds_connection_terminations", "Streams to the control plane that ended");
        let messages = registered(istio, "xds_message", "Messages from the control plane");
        let message_bytes =
            registered(istio, "xds_message_bytes", "Bytes of messages from the control plane");
        let build = Family::<[(&'static str, String); 2], Gauge>::default();
        build.get_or_create(&[("component", component.to_owned()), ("tag", version.to_owned())]).set(1);
        istio.register("build", "Build of this process", build);
        let metrics = Self {
            opened,
            closed,
            received_bytes,
            sent_bytes,
            failed,
            sockets,
            refused: Family::default(),
            terminations,
            messages,
            message_bytes,
            active_proxies: Gauge::default(),
            pending_proxies: Gauge::default(),
            proxies_started: Counter::default(),
            proxies_stopped: Counter::default(),
            registry: Mutex::default(),
        };
        metrics.register_own(&mut registry);
        *metrics.registry.lock() = registry;
        Arc::new(metrics)
    }

    fn register_own(&self, registry: &mut Registry) {
        let (active, pending) = (self.active_proxies.clone(), self.pending_proxies.clone());
        registry.register("workload_manager_active_proxy_count", "Pods that are served", active);
        registry.register("workload_manager_pending_proxy_count", "Pods that wait to be served", pending);
        let (started, stopped) = (self.proxies_started.clone(), self.proxies_stopped.clone());
        registry.register("workload_manager_proxies_started", "Pods that began to be served", started);
        registry.register("workload_manager_proxies_stopped", "Pods that ceased to be served", stopped);
        registry.register(
            "undermesh_refused",
            "Connections refused or failed, by the stable code of docs/flags.md",
            self.refused.clone(),
        );
    }

    /// Adds metrics of a process of its own kind.
    pub fn register_with(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock());
    }

    /// Opens the metrics of one connection: it counts as opened, and as open until it is closed or dropped.
    pub fn connection(self: &Metrics, labels: TcpLabels) -> ConnectionMetrics {
        self.opened.get_or_create(&labels).inc();
        let sockets = self.sockets.get_or_create_owned(&[("reporter", labels.reporter.name())]);
        sockets.inc();
        ConnectionMetrics {
            received_bytes: self.received_bytes.get_or_create_owned(&labels),
            sent_bytes: self.sent_bytes.get_or_create_owned(&labels),
            closed: self.closed.clone(),
            failed: self.failed.clone(),
            refused: self.refused.clone(),
            sockets,
            labels,
        }
    }

    /// Counts a refusal that has no connection labels (before anything is known about it).
    pub fn refuse(&self, flag: Flag) {
        self.refused.get_or_create(&[("flag", flag.code().to_owned())]).inc();
    }

    /// Counts the end of a stream to the control plane.
    pub fn feed_terminated(&self, reason: FeedTermination) {
        self.terminations.get_or_create(&[("reason", reason.name().to_owned())]).inc();
    }

    /// Counts a message of the control plane.
    pub fn feed_message(&self, type_url: &str, bytes: usize) {
        let url = [("url", type_url.to_owned())];
        self.messages.get_or_create(&url).inc();
        self.message_bytes.get_or_create(&url).inc_by(bytes as u64);
    }

    /// Everything as OpenMetrics text, with the process's descriptors.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a string fails only if a metric's own encoding does.
        if encode(&mut out, &self.registry.lock()).is_err() {
            tracing::debug!("a metric could not be encoded");
        }
        let end = "# EOF\n";
        if out.ends_with(end) {
            out.truncate(out.len() - end.len());
        }
        for (name, value) in [("process_open_fds", open_fds()), ("process_max_fds", max_fds())] {
            if let Some(value) = value {
                let _ = writeln!(out, "# TYPE {name} gauge\n{name} {value}");
            }
        }
        out.push_str(end);
        out
    }
}

/// Value of the label `reason` of ended control-plane streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedTermination {
    /// Could not connect.
    ConnectionError,
    /// The stream failed.
    Error,
    /// The server asked to come again.
    Reconnect,
    /// The stream ended cleanly.
    Complete,
}

impl FeedTermination {
    fn name(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

fn open_fds() -> Option<u64> {
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count() as u64)
}

fn max_fds() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

/// Metrics of one open connection. Byte counters are handles: adding costs one atomic operation.
pub struct ConnectionMetrics {
    /// Bytes from client to server.
    pub received_bytes: Counter,
    /// Bytes from server to client.
    pub sent_bytes: Counter,
    closed: Family<TcpLabels, Counter>,
    failed: Family<TcpLabels, Counter>,
    refused: Family<OneLabel, Counter>,
    sockets: Gauge,
    labels: TcpLabels,
}

impl ConnectionMetrics {
    /// Counts the connection as closed, and as failed if it was.
    pub fn closed(self, failure: Option<Flag>) {
        let mut labels = self.labels.clone();
        if let Some(flag) = failure {
            labels.response_flags = flag.response_flag();
            self.failed.get_or_create(&labels).inc();
            self.refused.get_or_create(&[("flag", flag.code().to_owned())]).inc();
        }
        self.closed.get_or_create(&labels).inc();
    }
}

impl Drop for ConnectionMetrics {
    fn drop(&mut self) {
        self.sockets.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(text: &str, line: &str) -> bool {
        text.lines().any(|l| l == line)
    }

    #[test]
    fn names_and_labels_are_those_of_the_specification() {
        let metrics = Metrics::new("ztunnel", "1.0");
        let mut labels = TcpLabels::new(Side::Outbound);
        labels.source.workload = "web".into();
        labels.source.canonical_service = "web".into();
        labels.destination_service = "cart.shop.svc.cluster.local".into();
        labels.mutual_tls = true;
        let connection = metrics.connection(labels);
        connection.received_bytes.inc_by(7);
        let open = metrics.render();
        assert!(has(&open, "istio_tcp_sockets_open{reporter=\"source\"} 1"), "{open}");
        connection.closed(Some(Flag::PolicyDenied));
        metrics.feed_message("type", 3);
        let text = metrics.render();
        let common = "reporter=\"source\",source_workload=\"web\",source_canonical_service=\"web\",\
            source_canonical_revision=\"unknown\",source_workload_namespace=\"unknown\",\
            source_principal=\"unknown\",source_app=\"web\",source_version=\"unknown\",\
            source_cluster=\"unknown\",destination_service=\"cart.shop.svc.cluster.local\",\
            destination_service_namespace=\"unknown\",destination_service_name=\"unknown\",\
            destination_workload=\"unknown\",destination_canonical_service=\"unknown\",\
            destination_canonical_revision=\"unknown\",destination_workload_namespace=\"unknown\",\
            destination_principal=\"unknown\",destination_app=\"unknown\",\
            destination_version=\"unknown\",destination_cluster=\"unknown\",request_protocol=\"tcp\"";
        for (name, flags, value) in [
            ("istio_tcp_connections_opened_total", "-", 1),
            ("istio_tcp_connections_closed_total", "DENY", 1),
            ("istio_tcp_connections_failed_total", "DENY", 1),
            ("istio_tcp_received_bytes_total", "-", 7),
        ] {
            let line = format!(
                "{name}{{{common},response_flags=\"{flags}\",connection_security_policy=\"mutual_tls\"}} {value}"
            );
            assert!(has(&text, &line), "missing {line}\nin {text}");
        }
        for line in [
            "istio_tcp_sockets_open{reporter=\"source\"} 0",
            "istio_build{component=\"ztunnel\",tag=\"1.0\"} 1",
            "istio_xds_message_total{url=\"type\"} 1",
            "istio_xds_message_bytes_total{url=\"type\"} 3",
            "workload_manager_proxies_started_total 0",
            "undermesh_refused_total{flag=\"POLICY_DENIED\"} 1",
        ] {
            assert!(has(&text, line), "missing {line}\nin {text}");
        }
        assert!(text.contains("\nprocess_open_fds ") && text.ends_with("# EOF\n"));
    }
}
