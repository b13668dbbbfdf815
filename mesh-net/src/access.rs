//! One record per connection, at its end, whatever the end (`wire-protocol.md` 8.2).

use std::{borrow::Cow, fmt::Write as _, net::SocketAddr, sync::Arc};

use mesh_core::{flag::Flag, id::Identity, limits::LOG_VALUE_BYTES};
use tokio::time::Instant;

use crate::{
    copy::{Transfer, TransferCounters},
    telemetry::{ConnectionMetrics, Metrics, TcpLabels},
};

/// Which side of the connection we report for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The client's agent.
    Outbound,
    /// The server's agent.
    Inbound,
}

impl Side {
    /// As in the log's `direction`.
    pub fn direction(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    /// As in the metrics' `reporter`.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }
}

/// By which way the bytes went (ours, beside the specification's fields).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// Decided by the kernel, plain TCP on one node.
    Direct,
    /// HBONE.
    Tunnel,
    /// Arrived unencrypted.
    Plaintext,
    /// Left for a destination outside the mesh.
    Passthrough,
    /// Left unencrypted for a workload of the cluster that is not in the mesh.
    Plain,
}

impl Path {
    /// The name in logs, status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Tunnel => "tunnel",
            Self::Plaintext => "plaintext",
            Self::Passthrough => "passthrough",
            Self::Plain => "plain",
        }
    }
}

/// One end of a connection as the log tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Party {
    /// Layer 4 peer.
    pub addr: Option<SocketAddr>,
    /// Pod name.
    pub workload: Option<Arc<str>>,
    /// Its namespace.
    pub namespace: Option<Arc<str>>,
    /// Proven by mTLS; never derived from an address.
    pub identity: Option<Identity>,
    /// Its cluster.
    pub cluster: Option<Arc<str>>,
}

/// What the record tells. Fill in as it becomes known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Who connected.
    pub src: Party,
    /// The next hop.
    pub dst: Party,
    /// CONNECT authority, when tunnelled.
    pub hbone_addr: Option<String>,
    /// Host name of the intended service.
    pub service: Option<String>,
    /// By which way.
    pub path: Option<Path>,
    /// The policy that decided, `namespace/name`.
    pub policy: Option<String>,
    /// Why this way.
    pub reason: Option<String>,
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Both directions were done.
    Complete,
    /// Refused, failed or cut.
    Failed {
        /// The stable code.
        flag: Flag,
        /// For people.
        error: String,
    },
}

/// The open record of one connection. Dropped unclosed, it closes as aborted.
pub struct AccessRecord {
    side: Side,
    opened: Instant,
    /// What is known so far.
    pub details: Details,
    counters: Arc<TransferCounters>,
    metrics: Option<ConnectionMetrics>,
    closed: bool,
}

impl AccessRecord {
    /// Opens the record of a connection that was accepted now.
    pub fn open(side: Side, src: Option<SocketAddr>) -> Self {
        let details = Details { src: Party { addr: src, ..Party::default() }, ..Details::default() };
        Self { side, opened: Instant::now(), details, counters: Arc::default(), metrics: None, closed: false }
    }

    /// The same for one that was accepted earlier, by the kernel.
    pub fn open_since(side: Side, src: Option<SocketAddr>, opened: Instant) -> Self {
        let mut record = Self::open(side, src);
        record.opened = opened;
        record
    }

    /// Lets go of a connection that goes on without this process: whoever sees its end closes the record.
    pub fn leave(mut self) {
        self.closed = true;
    }

    /// Names the connection to the metrics, once it is known what it is; counts it as opened. Call before bytes flow.
    pub fn count(&mut self, metrics: &Metrics, labels: TcpLabels) {
        let connection = metrics.connection(labels);
        self.counters = Arc::new(TransferCounters::with_metrics(
            connection.received_bytes.clone(),
            connection.sent_bytes.clone(),
        ));
        self.metrics = Some(connection);
    }

    /// Whether [`count`](Self::count) was called.
    pub fn is_counted(&self) -> bool {
        self.metrics.is_some()
    }

    /// Counters for the copy, readable by others while it runs.
    pub fn counters(&self) -> Arc<TransferCounters> {
        self.counters.clone()
    }

    /// When the connection was accepted.
    pub fn opened(&self) -> Instant {
        self.opened
    }

    /// Which side reports.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Closes the record: one log line, and the metrics.
    pub fn close(mut self, outcome: Outcome) {
        self.finish(&outcome);
    }

    /// Closes the record of a connection that was refused or failed.
    pub fn fail(self, flag: Flag, error: impl Into<String>) {
        self.close(Outcome::Failed { flag, error: error.into() });
    }

    fn finish(&mut self, outcome: &Outcome) {
        self.closed = true;
        let transfer = self.counters.transfer();
        if let Some(metrics) = self.metrics.take() {
            match outcome {
                Outcome::Complete => metrics.closed(None),
                Outcome::Failed { flag, .. } => metrics.closed(Some(*flag)),
            }
        }
        self.log(transfer, outcome);
    }

    fn log(&self, transfer: Transfer, outcome: &Outcome) {
        /// The same fields in the same order for every level; absent ones are left out.
        macro_rules! line {
            ($level:ident, $message:literal, $error:expr, $flag:expr) => {{
                let (src, dst) = (Shown::of(&self.details.src), Shown::of(&self.details.dst));
                let (sent, received) = self.seen(transfer);
                tracing::$level!(
                    target: "access",
                    { src.addr = src.addr,
                    src.workload = src.workload.as_deref(),
                    src.namespace = src.namespace.as_deref(),
                    src.identity = src.identity.as_deref(),
                    src.cluster = src.cluster.as_deref(),
                    dst.addr = dst.addr,
                    dst.hbone_addr = self.details.hbone_addr.as_deref().map(clean).as_deref(),
                    dst.service = self.details.service.as_deref().map(clean).as_deref(),
                    dst.workload = dst.workload.as_deref(),
                    dst.namespace = dst.namespace.as_deref(),
                    dst.identity = dst.identity.as_deref(),
                    dst.cluster = dst.cluster.as_deref(),
                    direction = self.side.direction(),
                    bytes_sent = sent,
                    bytes_recv = received,
                    duration = format!("{}ms", self.opened.elapsed().as_millis()).as_str(),
                    path = self.details.path.map(Path::name),
                    policy = self.details.policy.as_deref().map(clean).as_deref(),
                    reason = self.details.reason.as_deref().map(clean).as_deref(),
                    flag = $flag,
                    error = $error },
                    $message
                )
            }};
        }
        match outcome {
            Outcome::Complete => line!(info, "connection complete", None::<&str>, None::<&str>),
            Outcome::Failed { flag, error } => {
                // Not a level that asks somebody to act: peers set the rate, and metrics count by flag.
                line!(info, "connection complete", Some(&*clean(error)), Some(flag.code()));
            }
        }
    }

    /// `(bytes_sent, bytes_recv)` as the reporting side sees them: the client's agent sends what the client sent, the
    /// server's agent sends what the server answered.
    fn seen(&self, transfer: Transfer) -> (u64, u64) {
        match self.side {
            Side::Outbound => (transfer.a_to_b, transfer.b_to_a),
            Side::Inbound => (transfer.b_to_a, transfer.a_to_b),
        }
    }
}

impl Drop for AccessRecord {
    fn drop(&mut self) {
        if !self.closed {
            let flag = Flag::Aborted;
            self.finish(&Outcome::Failed { flag, error: flag.text().to_owned() });
        }
    }
}

/// A [`Party`] ready to print.
struct Shown<'a> {
    addr: Option<tracing::field::DisplayValue<SocketAddr>>,
    workload: Option<Cow<'a, str>>,
    namespace: Option<Cow<'a, str>>,
    identity: Option<String>,
    cluster: Option<Cow<'a, str>>,
}

impl<'a> Shown<'a> {
    fn of(party: &'a Party) -> Self {
        Self {
            addr: party.addr.map(tracing::field::display),
            workload: party.workload.as_deref().map(clean),
            namespace: party.namespace.as_deref().map(clean),
            identity: party.identity.as_ref().map(ToString::to_string),
            cluster: party.cluster.as_deref().map(clean),
        }
    }
}

/// Makes a value fit for a log line: control characters escaped, at most [`LOG_VALUE_BYTES`] long. Without this a peer
/// could write lines of its own into our log.
pub fn clean(value: &str) -> Cow<'_, str> {
    if value.len() <= LOG_VALUE_BYTES && !value.chars().any(char::is_control) {
        return Cow::Borrowed(value);
    }
    let mut out = String::with_capacity(value.len().min(LOG_VALUE_BYTES));
    for c in value.chars() {
        let before = out.len();
        if c.is_control() {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
        if out.len() > LOG_VALUE_BYTES - 3 {
            out.truncate(before);
            out.push_str("...");
            break;
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests;
