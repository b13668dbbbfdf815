//! The feed from the control plane: delta xDS over one stream (`wire-protocol.md` 5.3).
//!
//! Each response is prepared off to the side, item by item; what is good makes the next [`Snapshot`], which is swapped
//! once and applied; only then comes the answer. An ACK means that the resources are in force. State is kept while
//! disconnected, and a reconnect asks only for what changed.

mod batch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    delta::{Change, Rejected},
    limits::{FEED_BACKOFF, FEED_MESSAGE_BYTES, HOLD},
    proto::discovery::{
        DELTA_PATH, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as RpcStatus,
    },
    snapshot::Snapshot,
};
use prost::Message as _;
use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, client::Grpc};
use tonic_prost::ProstCodec;

use self::batch::Batch;
use crate::{
    BoxFuture,
    clock::Chance,
    drain::Draining,
    grpc::{AuthorizedChannel, ChannelConfig, GrpcError, channel},
    telemetry::{FeedTermination, Metrics},
};

/// The server's first sign of life on a new stream.
const OPEN: Duration = Duration::from_secs(30);
/// Requests that wait to be sent: one per type at the start, then answers one by one.
const REQUESTS: usize = 16;
/// Longest error text of a NACK, bytes: the server logs it and shows it in status.
const NACK_BYTES: usize = 16 << 10;
/// Retries are spread by this share of the wait.
const JITTER: f64 = 0.2;

/// What one proxy subscribes to, and where.
#[derive(Clone)]
pub struct FeedConfig {
    /// The control plane.
    pub channel: ChannelConfig,
    /// Who asks.
    pub node: Node,
    /// Types to subscribe to, in the order in which they are asked for.
    pub types: Vec<&'static str>,
}

/// A node's description of itself (`wire-protocol.md` X6).
pub fn node(instance: &str, pod: &str, namespace: &str, metadata: &[(&str, &str)]) -> Node {
    let fields = metadata.iter().map(|(key, value)| {
        let value =
            prost_types::Value { kind: Some(prost_types::value::Kind::StringValue((*value).to_owned())) };
        ((*key).to_owned(), value)
    });
    Node {
        id: format!("ztunnel~{instance}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
        cluster: "ztunnel".to_owned(),
        metadata: Some(prost_types::Struct { fields: fields.collect::<BTreeMap<_, _>>() }),
    }
}

/// Puts a new world in force: kernel maps, routes, live connections.
pub trait Apply: Send + Sync + 'static {
    /// Returns when `world` is in force, or why it is not; then it is asked again after a while, with the newest world.
    fn apply(&self, world: Arc<Snapshot>) -> BoxFuture<'_, Result<(), String>>;

    /// The server answered for this type; comes before the [`apply`](Self::apply) of what it said, for those who must
    /// not act on half a world.
    fn answered(&self, _type_url: &'static str) {}

    /// After `world` was put in force: those of the changed resources that are not, each with the reason; they are
    /// refused, the others acknowledged. Returns when that is certain, within a bound of its own.
    fn not_in_force<'a>(
        &'a self,
        _world: Arc<Snapshot>,
        _type_url: &'static str,
        _changes: &'a [Change],
    ) -> BoxFuture<'a, Vec<Rejected>> {
        Box::pin(async { Vec::new() })
    }

    /// Nothing can be put in force yet: another type has to be answered first. Until then nothing is applied, and
    /// nothing acknowledged.
    fn waits(&self) -> bool {
        false
    }
}

/// A resource that is asked for once more: its type and name.
pub type Again = (&'static str, Arc<str>);

/// For those who only read the snapshot.
#[derive(Clone, Copy, Debug, Default)]
pub struct NothingToApply;

impl Apply for NothingToApply {
    fn apply(&self, _: Arc<Snapshot>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
}

/// How the feed is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FeedStatus {
    /// A stream is open.
    pub connected: bool,
    /// Types that have not been answered since the process started; empty means ready.
    pub pending: BTreeSet<&'static str>,
    /// Attempts that failed since the last response.
    pub failures: u32,
    /// The last failure.
    pub error: Option<String>,
    /// Resources that were rejected and have not been replaced by good ones, with the reason.
    pub rejected: BTreeMap<String, String>,
}

/// What the rest of the process sees of the feed.
#[derive(Clone, Debug)]
pub struct FeedHandle {
    /// The newest world.
    pub world: watch::Receiver<Arc<Snapshot>>,
    /// How the feed is doing.
    pub status: watch::Receiver<FeedStatus>,
}

impl FeedHandle {
    /// Whether every type was answered once.
    pub fn is_ready(&self) -> bool {
        self.status.borrow().pending.is_empty()
    }

    /// Waits until every type was answered once.
    pub async fn ready(&self) {
        let mut status = self.status.clone();
        // Fails only when the feed is gone; then nobody becomes ready any more.
        if status.wait_for(|status| status.pending.is_empty()).await.is_err() {
            std::future::pending().await
        }
    }
}

/// The client side of the feed; the one writer of the snapshot.
pub struct Feed {
    types: Vec<&'static str>,
    node: Node,
    channel: AuthorizedChannel,
    apply: Arc<dyn Apply>,
    metrics: Arc<Metrics>,
    chance: Chance,
    world: watch::Sender<Arc<Snapshot>>,
    status: watch::Sender<FeedStatus>,
    /// Per type, every name that we hold or have rejected, with its version; empty asks to send it again.
    versions: HashMap<&'static str, HashMap<String, String>>,
    /// Resources that were refused and are in force after all: sent again, they are acknowledged.
    again: Option<mpsc::Receiver<Again>>,
    /// Types of which something was refused because the world could not be put in force, and the names. Once it is, they
    /// are asked for again.
    owed: BTreeMap<&'static str, BTreeSet<String>>,
    /// When a world that could not be put in force is tried again, and how often it was in vain.
    retry: Option<(Instant, u32)>,
    /// Answers of this stream that wait for the other types.
    held: Vec<Held>,
}

/// A response whose answer waits until it can be put in force.
struct Held {
    type_url: &'static str,
    batch: Batch,
    answer: DeltaDiscoveryRequest,
}

/// How a stream ended.
enum StreamEnd {
    Drain,
    Closed,
    NoConnection(Status),
    Failed(Status),
}

enum Event {
    Drain,
    Response(Result<Option<DeltaDiscoveryResponse>, Status>),
    Again(Again),
    Retry,
}

impl Feed {
    /// A feed that has not begun.
    ///
    /// # Errors
    /// The channel's configuration is wrong.
    pub fn new(
        config: FeedConfig,
        apply: Arc<dyn Apply>,
        metrics: Arc<Metrics>,
        chance: Chance,
    ) -> Result<(Self, FeedHandle), GrpcError> {
        let channel = channel(&config.channel)?;
        let (world, world_rx) = watch::channel(Arc::new(Snapshot::default()));
        let pending = config.types.iter().copied().collect();
        let (status, status_rx) = watch::channel(FeedStatus { pending, ..FeedStatus::default() });
        let feed = Self {
            types: config.types,
            node: config.node,
            channel,
            apply,
            metrics,
            chance,
            world,
            status,
            versions: HashMap::new(),
            again: None,
            owed: BTreeMap::new(),
            retry: None,
            held: Vec::new(),
        };
        Ok((feed, FeedHandle { world: world_rx, status: status_rx }))
    }

    /// Asks once more for the resources that come through here.
    #[must_use]
    pub fn asking_again(mut self, again: mpsc::Receiver<Again>) -> Self {
        self.again = Some(again);
        self
    }

    /// Runs until the drain is forced: what drains still wants to know of policy changes.
    pub async fn run(mut self, draining: Draining) {
        loop {
            let before = self.status.borrow().failures;
            let end = self.stream(&draining).await;
            let (reason, error) = match end {
                StreamEnd::Drain => return,
                StreamEnd::Closed => (FeedTermination::Complete, "the server ended the stream".to_owned()),
                StreamEnd::NoConnection(status) => (FeedTermination::ConnectionError, told(&status)),
                StreamEnd::Failed(status) => (FeedTermination::Error, told(&status)),
            };
            self.metrics.feed_terminated(reason);
            let mut failures = 0;
            self.status.send_modify(|status| {
                status.connected = false;
                status.failures += 1;
                status.error = Some(error.clone());
                failures = status.failures;
            });
            let wait = self.wait(failures);
            // One line per outage, and one when it is over.
            if before == 0 {
                tracing::warn!(%error, "the control plane is lost; what was received stays in force");
            } else {
                tracing::debug!(%error, ?wait, "no stream to the control plane");
            }
            tokio::select! {
                () = draining.forced() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn wait(&self, failures: u32) -> Duration {
        let (first, last) = FEED_BACKOFF;
        let base = first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(last);
        self.chance.jitter(base, JITTER)
    }

    /// One stream, from its opening to its end.
    async fn stream(&mut self, draining: &Draining) -> StreamEnd {
        let opened = tokio::select! {
            () = draining.forced() => return StreamEnd::Drain,
            opened = tokio::time::timeout(OPEN, self.open()) => opened,
        };
        let (requests, mut responses) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(status)) => return StreamEnd::NoConnection(status),
            Err(_) => return StreamEnd::NoConnection(Status::deadline_exceeded("no answer to the stream")),
        };
        self.status.send_modify(|status| status.connected = true);
        // Those of a former stream are asked for again.
        self.held.clear();
        self.owed.clear();
        loop {
            let event = tokio::select! {
                () = draining.forced() => Event::Drain,
                got = responses.message() => Event::Response(got),
                again = next(&mut self.again) => Event::Again(again),
                () = due(self.retry) => Event::Retry,
            };
            let requests_now = match event {
                Event::Drain => return StreamEnd::Drain,
                Event::Response(Ok(Some(response))) => self.response(response).await,
                Event::Response(Ok(None)) => return StreamEnd::Closed,
                Event::Response(Err(status)) => return StreamEnd::Failed(status),
                Event::Again((type_url, name)) => vec![once_more(type_url, [name.to_string()])],
                Event::Retry => self.try_again().await,
            };
            for request in requests_now {
                if !matches!(tokio::time::timeout(HOLD, requests.send(request)).await, Ok(Ok(()))) {
                    return StreamEnd::Failed(Status::unavailable("the server does not take answers"));
                }
            }
        }
    }

    async fn open(
        &self,
    ) -> Result<(mpsc::Sender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>), Status> {
        let (requests, outgoing) = mpsc::channel(REQUESTS.max(self.types.len()));
        for type_url in &self.types {
            let request = DeltaDiscoveryRequest {
                node: Some(self.node.clone()),
                type_url: (*type_url).to_owned(),
                initial_resource_versions: self.versions.get(type_url).cloned().unwrap_or_default(),
                ..DeltaDiscoveryRequest::default()
            };
            // The channel was made large enough.
            requests.try_send(request).map_err(|error| Status::internal(error.to_string()))?;
        }
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(FEED_MESSAGE_BYTES);
        grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
        let path = http::uri::PathAndQuery::from_static(DELTA_PATH);
        let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
        let answer = grpc.streaming(Request::new(ReceiverStream::new(outgoing)), path, codec).await?;
        Ok((requests, answer.into_inner()))
    }

    /// Puts one response in force, with those that waited for it, and builds their answers: none while it waits itself.
    async fn response(&mut self, response: DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryRequest> {
        self.metrics.feed_message(&response.type_url, response.encoded_len());
        let answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        // X10: what we do not know we did not ask for; it is nobody's fault.
        let Some(type_url) = self.types.iter().copied().find(|known| *known == response.type_url) else {
            return vec![answer];
        };
        let batch = Batch::prepare(type_url, &response);
        let next = Arc::new(self.world.borrow().with(batch.changes.iter().cloned()));
        self.world.send_replace(next.clone());
        self.apply.answered(type_url);
        if self.apply.waits() {
            batch.remember(self.versions.entry(type_url).or_default(), false);
            self.note(type_url, &batch, false);
            self.held.push(Held { type_url, batch, answer });
            return Vec::new();
        }
        let applied = self.put_in_force(next.clone()).await;
        let mut held = std::mem::take(&mut self.held);
        held.push(Held { type_url, batch, answer });
        let mut answers = Vec::with_capacity(held.len());
        for held in held {
            answers.push(self.answer(held, &next, &applied).await);
        }
        if applied.is_ok() {
            answers.extend(self.owed_now());
        }
        answers
    }

    async fn put_in_force(&mut self, world: Arc<Snapshot>) -> Result<(), String> {
        let applied = self.apply.apply(world).await;
        match &applied {
            Ok(()) => self.retry = None,
            Err(reason) => {
                let failures = self.retry.map_or(0, |(_, failures)| failures) + 1;
                self.retry = Some((Instant::now() + self.wait(failures), failures));
                tracing::error!(reason, failures, "an update is not in force");
            }
        }
        applied
    }

    /// The next response may be hours away: what was refused is tried again without one, and its refusal taken back by
    /// asking for it once more.
    async fn try_again(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let world = self.world.borrow().clone();
        match self.put_in_force(world).await {
            Ok(()) => self.owed_now(),
            Err(_) => Vec::new(),
        }
    }

    fn owed_now(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let (named, nameless): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.owed).into_iter().partition(|(_, names)| !names.is_empty());
        // Nothing is there to be sent again: the type is in force as it was answered.
        self.status.send_modify(|status| {
            status.pending.retain(|kind| !nameless.iter().any(|(owed, _)| owed == kind))
        });
        named.into_iter().map(|(type_url, names)| once_more(type_url, names)).collect()
    }

    /// ACK or NACK.
    async fn answer(
        &mut self,
        Held { type_url, mut batch, mut answer }: Held,
        world: &Arc<Snapshot>,
        applied: &Result<(), String>,
    ) -> DeltaDiscoveryRequest {
        batch.remember(self.versions.entry(type_url).or_default(), applied.is_ok());
        if applied.is_ok() {
            let refused = self.apply.not_in_force(world.clone(), type_url, &batch.changes).await;
            let versions = self.versions.entry(type_url).or_default();
            // Without a version it is sent again by the next stream, too.
            versions.extend(refused.iter().map(|refused| (refused.name.clone(), String::new())));
            batch.refuse(refused);
        }
        let mut complaints: Vec<String> = batch.rejected.iter().map(ToString::to_string).collect();
        if let Err(reason) = applied {
            // By name each of them: those that a rejection does not name are taken for accepted.
            complaints.extend(batch.settled().map(|name| format!("{name}: not in force: {reason}")));
            self.owed.entry(type_url).or_default().extend(batch.settled().map(str::to_owned));
            if complaints.is_empty() {
                complaints.push(format!("{type_url}: not in force: {reason}"));
            }
        }
        self.note(type_url, &batch, applied.is_ok());
        if !complaints.is_empty() {
            answer.error_detail = Some(RpcStatus { code: 0, message: joined(&complaints) });
        }
        answer
    }

    fn note(&self, type_url: &'static str, batch: &Batch, in_force: bool) {
        self.status.send_modify(|status| {
            if status.failures > 0 {
                tracing::info!("the control plane is back");
            }
            status.failures = 0;
            status.error = None;
            if in_force {
                status.pending.remove(type_url);
            }
            for name in batch.settled() {
                status.rejected.remove(name);
            }
            for rejected in &batch.rejected {
                status.rejected.insert(rejected.name.clone(), rejected.reason.clone());
            }
        });
    }
}

/// Asks once more for resources of a type.
fn once_more(type_url: &str, names: impl IntoIterator<Item = String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: names.into_iter().collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

async fn due(retry: Option<(Instant, u32)>) {
    match retry {
        Some((at, _)) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn next(again: &mut Option<mpsc::Receiver<Again>>) -> Again {
    match again {
        Some(receiver) => match receiver.recv().await {
            Some(again) => again,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// The complaints of a NACK as one text of bounded length.
fn joined(complaints: &[String]) -> String {
    let mut text = complaints.join("; ");
    if text.len() > NACK_BYTES {
        text.truncate(text.floor_char_boundary(NACK_BYTES));
        text.push_str("...");
    }
    text
}

/// A status with its causes: tonic's own text for a failed connect says only "transport error".
fn told(status: &Status) -> String {
    let mut text = format!("{}: {}", status.code(), status.message());
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
