//! One access record per request or connection, written at its end, whatever the end (`semantics.md` D14).

use std::{
    fmt::{self, Write as _},
    net::SocketAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body::Frame;
use mesh_core::{flag, id::Identity};
use mesh_net::{copy::TransferCounters, telemetry::ConnectionMetrics};

use crate::{
    limits,
    metrics::{Amounts, Metrics, RequestLabels, Subject},
};

/// Why an answer is not simply the application's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    /// No healthy upstream.
    UH,
    /// Connect to the upstream failed.
    UF,
    /// No route.
    NR,
    /// Upstream timeout.
    UT,
    /// Upstream closed the connection.
    UC,
    /// Upstream broke the protocol.
    UPE,
    /// The client closed early.
    DC,
    /// The client broke the protocol.
    DPE,
    /// The configuration has no usable backend.
    NC,
    /// The proxy is overloaded or not ready.
    OM,
}

impl Flag {
    /// As logged and counted.
    pub const fn code(self) -> &'static str {
        match self {
            Self::UH => "UH",
            Self::UF => "UF",
            Self::NR => "NR",
            Self::UT => "UT",
            Self::UC => "UC",
            Self::UPE => "UPE",
            Self::DC => "DC",
            Self::DPE => "DPE",
            Self::NC => "NC",
            Self::OM => "OM",
        }
    }
}

/// Text from a peer, made fit for a log line: bounded, and no control character, quote or backslash as it is.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = limits::LOG_VALUE_BYTES;
        for c in self.0.chars() {
            let Some(rest) = left.checked_sub(c.len_utf8()) else { return f.write_str("...") };
            left = rest;
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "\\x{:02x}", u32::from(c))?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// `-` for nothing.
fn dash(text: &str) -> Escaped<'_> {
    Escaped(if text.is_empty() { "-" } else { text })
}

/// What a request looked like when it came in.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Method.
    pub method: String,
    /// Path and query as received.
    pub path: String,
    /// `HTTP/1.1`, `HTTP/2`; for connections `TCP`.
    pub protocol: &'static str,
    /// The authority.
    pub authority: String,
    /// `user-agent`.
    pub user_agent: String,
    /// `x-request-id`.
    pub request_id: String,
    /// `x-forwarded-for`.
    pub forwarded_for: String,
    /// A gRPC request.
    pub grpc: bool,
}

/// The record of one request or connection; dropped unclosed means that the client went away.
pub struct Record {
    metrics: Arc<Metrics>,
    started: Instant,
    start_time: SystemTime,
    /// Addresses of the downstream connection: the client's and the one that it dialled.
    downstream: (SocketAddr, SocketAddr),
    client: Identity,
    /// The request as it came in.
    pub seen: Seen,
    /// For labels.
    pub subject: Subject,
    /// Bytes so far, the client being the first end.
    pub counters: Arc<TransferCounters>,
    /// Status sent to the client, once there is one.
    pub status: Option<StatusCode>,
    /// Why the answer is not the application's.
    pub flag: Option<Flag>,
    /// What exactly happened.
    pub details: &'static str,
    /// Transport failure, as text.
    pub failure: String,
    /// The endpoint's address.
    pub upstream: Option<SocketAddr>,
    /// `namespace/name` of the route and index of the rule.
    pub route: String,
    /// Cluster in Istio's notation.
    pub cluster: String,
    /// When the response head came.
    pub responded: Option<Instant>,
    /// gRPC status, from headers or trailers.
    pub grpc_status: Option<u16>,
    /// The mesh's code, for connections that are not HTTP.
    pub refused: Option<flag::Flag>,
    connection: Option<ConnectionMetrics>,
    closed: bool,
}

/// Protocol of connections that are not HTTP, as the log has it.
pub const TCP: &str = "TCP";

impl Record {
    /// Opens the record of something that `client` began.
    pub fn open(metrics: &Arc<Metrics>, client: &Identity, peer: SocketAddr, dialled: SocketAddr) -> Self {
        metrics.open.inc();
        Self {
            metrics: metrics.clone(),
            started: Instant::now(),
            start_time: SystemTime::now(),
            downstream: (peer, dialled),
            client: client.clone(),
            seen: Seen::default(),
            subject: Subject::default(),
            counters: Arc::default(),
            status: None,
            flag: None,
            details: "via_upstream",
            failure: String::new(),
            upstream: None,
            route: String::new(),
            cluster: String::new(),
            responded: None,
            grpc_status: None,
            refused: None,
            connection: None,
            closed: false,
        }
    }

    /// The connection reached its endpoint: from here on its bytes are counted as they flow.
    pub fn joined(&mut self) {
        let connection = self.metrics.connection(&self.subject);
        let (received, sent) = (connection.received_bytes.clone(), connection.sent_bytes.clone());
        self.counters = Arc::new(TransferCounters::with_metrics(received, sent));
        self.connection = Some(connection);
    }

    /// Notes a failure; the first one counts.
    pub fn fail(&mut self, flag: Flag, details: &'static str, failure: impl fmt::Display) {
        if self.flag.is_none() {
            self.flag = Some(flag);
            self.details = details;
            self.failure = failure.to_string();
        }
    }

    /// One frame of the response went to the client.
    pub fn passed(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.counters.add_b_to_a(data.len() as u64);
        } else if let Some(trailers) = frame.trailers_ref() {
            self.grpc_status = grpc_status(trailers).or(self.grpc_status);
        }
    }

    /// A response head went to the client.
    pub fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.status = Some(status);
        self.grpc_status = grpc_status(headers);
    }

    /// The answer has no body, whatever its head says.
    pub fn expects_no_body(&self) -> bool {
        matches!(self.status, Some(StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED))
            || self.seen.method == "HEAD"
    }

    /// Closes the record: it was carried to its end.
    pub fn close(&mut self) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        self.metrics.open.dec();
        let transfer = self.counters.transfer();
        let amounts = Amounts {
            received: transfer.a_to_b,
            sent: transfer.b_to_a,
            duration_ms: self.started.elapsed().as_secs_f64() * 1000.,
        };
        let flags = self.flag.map_or("-", Flag::code);
        if self.seen.protocol == TCP {
            let connection = self.connection.take().unwrap_or_else(|| self.metrics.connection(&self.subject));
            connection.closed(self.refused);
        } else {
            let protocol = if self.seen.grpc { "grpc" } else { "http" };
            let code = self.status.map_or(0, |status| status.as_u16());
            let grpc = self.grpc_status.map_or_else(String::new, |status| status.to_string());
            let labels =
                RequestLabels::new(&self.subject, protocol, flags, code.to_string().into(), grpc.into());
            self.metrics.request(&labels, amounts);
        }
        tracing::info!(
            target: "access",
            client = %self.client,
            flag = flags,
            "{}", Line { record: self, amounts }
        );
    }
}

/// Status of a gRPC call, from a header or trailer section.
fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.closed {
            self.fail(Flag::DC, "downstream_remote_disconnect", "");
            self.close();
        }
    }
}

/// Istio's text form.
struct Line<'a> {
    record: &'a Record,
    amounts: Amounts,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = self.record;
        let time = time::OffsetDateTime::from(r.start_time);
        let time = time.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
        let code = r.status.map_or(0, |status| status.as_u16());
        let flags = r.flag.map_or("-", Flag::code);
        let Amounts { received, sent, duration_ms } = self.amounts;
        write!(f, "[{time}] \"{} {} {}\" ", dash(&r.seen.method), dash(&r.seen.path), r.seen.protocol)?;
        write!(
            f,
            "{code} {flags} {} - \"{}\" {received} {sent} {duration_ms:.0} ",
            r.details,
            dash(&r.failure)
        )?;
        match r.responded {
            Some(at) => write!(f, "{} ", at.duration_since(r.started).as_millis())?,
            None => f.write_str("- ")?,
        }
        let seen = &r.seen;
        write!(f, "\"{}\" \"{}\" ", dash(&seen.forwarded_for), dash(&seen.user_agent))?;
        write!(f, "\"{}\" \"{}\" ", dash(&seen.request_id), dash(&seen.authority))?;
        match r.upstream {
            Some(to) => write!(f, "\"{to}\" ")?,
            None => f.write_str("\"-\" ")?,
        }
        let (peer, dialled) = r.downstream;
        write!(f, "{} - {dialled} {peer} - {}", dash(&r.cluster), dash(&r.route))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let metrics = Arc::new(Metrics::new(mesh_net::telemetry::Metrics::new("proxy", "test")));
        let client = Identity::new("cluster.local", "shop", "web");
        Record::open(&metrics, &client, "10.244.1.2:4000".parse().unwrap(), "10.96.0.1:80".parse().unwrap())
    }

    #[test]
    fn a_line_holds_no_bytes_of_a_peer_as_they_are() {
        let mut record = record();
        record.seen.path = format!("/\r\nforged \"line\" \x1b[2J{}", "x".repeat(1000));
        record.seen.protocol = "HTTP/1.1";
        let line = Line { record: &record, amounts: Amounts::default() }.to_string();
        assert!(!line.contains(['\r', '\n', '\x1b']), "{line}");
        assert!(line.contains("\\\"line\\\""), "{line}");
        assert!(line.len() < 700, "{}", line.len());
    }

    #[test]
    fn a_dropped_record_is_a_client_that_left_and_is_counted_once() {
        let record = record();
        let metrics = record.metrics.clone();
        assert_eq!(metrics.open.get(), 1);
        drop(record);
        assert_eq!(metrics.open.get(), 0);
    }
}
