use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll},
};

use mesh_core::{
    id::PolicyKey,
    model::{Action, Policy, Scope},
    proto::{self, TYPE_AUTHORIZATION, TYPE_MESH_OPTIONS, discovery::Resource},
    snapshot::PolicyState,
};
use prost_types::Any;
use tokio::net::TcpListener;
use tonic::{Response, body::Body, server::NamedService};

use super::*;
use crate::{
    drain::{self, Drain},
    grpc::{self, GrpcTls, PeerInfo, PemSource},
    task::TaskGroup,
    testing::MiniCa,
};

const SOON: Duration = Duration::from_secs(10);

/// One stream as the server sees it.
struct Stream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    token: String,
}

impl Stream {
    async fn heard(&mut self) -> DeltaDiscoveryRequest {
        tokio::time::timeout(SOON, self.requests.message()).await.unwrap().unwrap().unwrap()
    }

    async fn say(&self, nonce: &str, type_url: &str, resources: Vec<Resource>, removed: &[&str]) {
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            nonce: nonce.to_owned(),
            resources,
            removed_resources: removed.iter().map(ToString::to_string).collect(),
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).await.unwrap();
    }
}

/// Hands each stream to the test.
#[derive(Clone)]
struct Server(mpsc::Sender<Stream>);

impl NamedService for Server {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl tower::Service<http::Request<Body>> for Server {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
            Ok(tonic::server::Grpc::new(codec).streaming(this, request).await)
        })
    }
}

impl tonic::server::StreamingService<DeltaDiscoveryRequest> for Server {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let streams = self.0.clone();
        Box::pin(async move {
            assert!(request.extensions().get::<PeerInfo>().is_some());
            let token = request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned();
            let (responses, outgoing) = mpsc::channel(8);
            let stream = Stream { requests: request.into_inner(), responses, token };
            streams.send(stream).await.map_err(|_| Status::unavailable("test over"))?;
            Ok(Response::new(ReceiverStream::new(outgoing)))
        })
    }
}

/// Takes its time, and fails when told to.
#[derive(Default)]
struct Applying {
    done: AtomicBool,
    broken: AtomicBool,
    /// Nothing can be applied before this is answered.
    needs: parking_lot::Mutex<Option<&'static str>>,
    /// Whether each world had the last of the policies.
    applied: parking_lot::Mutex<Vec<bool>>,
}

impl Apply for Applying {
    fn answered(&self, type_url: &'static str) {
        self.needs.lock().take_if(|needed| *needed == type_url);
    }

    fn waits(&self) -> bool {
        self.needs.lock().is_some()
    }

    fn apply(&self, world: Arc<Snapshot>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            self.applied.lock().push(world.policy(&PolicyKey::parse("shop/bad").unwrap()).is_some());
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            if self.broken.load(Ordering::SeqCst) {
                return Err("map is full".to_owned());
            }
            self.done.store(true, Ordering::SeqCst);
            Ok(())
        })
    }
}

struct World {
    streams: mpsc::Receiver<Stream>,
    handle: FeedHandle,
    applying: Arc<Applying>,
    metrics: Arc<Metrics>,
    addr: SocketAddr,
    drain: Drain,
    tasks: TaskGroup,
    _dir: tempfile::TempDir,
}

async fn world() -> World {
    let ca = MiniCa::new();
    let issued = ca.server(&["undermesh-control.undermesh-system.svc"]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (drain, draining) = drain::channel();
    let tasks = TaskGroup::new();
    let (sender, streams) = mpsc::channel(4);
    let router = tonic::transport::Server::builder().add_service(Server(sender));
    let tls = GrpcTls::new(issued.chain, issued.key).unwrap();
    let served = grpc::serve(listener, tls, router, draining.clone(), tasks.clone());
    tasks.spawn(async move { served.await.unwrap() });
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "secret\n").unwrap();
    let channel = ChannelConfig {
        roots: PemSource::Text(ca.root_pem()),
        server_name: Some("undermesh-control.undermesh-system.svc".into()),
        ..ChannelConfig::new(addr, "unused".into(), Some(token))
    };
    let config = FeedConfig {
        channel,
        node: node("10.0.0.1", "agent", "undermesh-system", &[("NODE_NAME", "a")]),
        types: vec![TYPE_MESH_OPTIONS, TYPE_AUTHORIZATION],
    };
    let applying = Arc::new(Applying::default());
    let metrics = Metrics::new("ztunnel", "test");
    let (feed, handle) = Feed::new(config, applying.clone(), metrics.clone(), Chance::seeded(5)).unwrap();
    tasks.spawn(feed.run(draining));
    World { streams, handle, applying, metrics, addr, drain, tasks, _dir: dir }
}

impl World {
    async fn stream(&mut self) -> Stream {
        tokio::time::timeout(SOON, self.streams.recv()).await.unwrap().unwrap()
    }

    /// A stream on which both types have been asked for.
    async fn asked(&mut self) -> Stream {
        let mut stream = self.stream().await;
        for _ in 0..2 {
            stream.heard().await;
        }
        stream
    }

    fn has(&self, policy: &str) -> bool {
        let world = self.handle.world.borrow();
        matches!(world.policy(&PolicyKey::parse(policy).unwrap()), Some(PolicyState::Valid(_)))
    }
}

fn policy(name: &str, version: &str) -> Resource {
    let policy = Policy {
        key: PolicyKey::parse(name).unwrap(),
        scope: Scope::Global,
        action: Action::Deny,
        rules: vec![],
        dry_run: false,
    };
    let value = proto::security::Authorization::from(&policy).encode_to_vec();
    let any = Any { type_url: TYPE_AUTHORIZATION.to_owned(), value };
    Resource { name: name.to_owned(), version: version.to_owned(), resource: Some(any), aliases: vec![] }
}

fn garbage(name: &str) -> Resource {
    let any = Any { type_url: TYPE_AUTHORIZATION.to_owned(), value: vec![0xff; 7] };
    Resource { name: name.to_owned(), version: "v".to_owned(), resource: Some(any), aliases: vec![] }
}

/// Half a world is not acted on, and so not acknowledged either: neither as in force nor as refused.
#[tokio::test]
async fn what_waits_for_another_type_is_answered_together_with_it() {
    for broken in [false, true] {
        let mut w = world().await;
        let mut stream = w.asked().await;
        *w.applying.needs.lock() = Some(TYPE_MESH_OPTIONS);
        w.applying.broken.store(broken, Ordering::SeqCst);
        stream.say("n1", TYPE_AUTHORIZATION, vec![policy("shop/a", "v1")], &[]).await;
        stream.say("n2", TYPE_AUTHORIZATION, vec![policy("shop/b", "v1"), garbage("shop/bad")], &[]).await;
        stream.say("n3", TYPE_MESH_OPTIONS, vec![], &[]).await;
        for nonce in ["n1", "n2", "n3"] {
            let answer = stream.heard().await;
            assert_eq!(answer.response_nonce, nonce);
            let complaint = answer.error_detail.map(|error| error.message).unwrap_or_default();
            assert_eq!(complaint.contains("not in force: map is full"), broken, "{nonce}: {complaint}");
            assert_eq!(complaint.contains("shop/bad"), nonce == "n2", "{nonce}: {complaint}");
        }
        // Only with all that had come; the bad one marks its policy as invalid.
        assert!(!w.applying.applied.lock().contains(&false));
        assert_eq!(w.handle.is_ready(), !broken);
        // Only what is in force is not asked for again.
        drop(stream);
        let mut stream = w.stream().await;
        let versions = loop {
            let request = stream.heard().await;
            if request.type_url == TYPE_AUTHORIZATION {
                break request.initial_resource_versions;
            }
        };
        assert_eq!(versions["shop/a"], if broken { "" } else { "v1" });
        w.drain.force();
    }
}

#[tokio::test]
async fn an_ack_comes_after_applying_and_ready_after_every_type() {
    let mut w = world().await;
    let mut stream = w.stream().await;
    assert_eq!(stream.token, "Bearer secret");
    for type_url in [TYPE_MESH_OPTIONS, TYPE_AUTHORIZATION] {
        let first = stream.heard().await;
        assert_eq!(first.type_url, type_url);
        assert_eq!(
            first.node.unwrap().id,
            "ztunnel~10.0.0.1~agent.undermesh-system~undermesh-system.svc.cluster.local"
        );
        assert!(first.resource_names_subscribe.is_empty() && first.initial_resource_versions.is_empty());
    }
    stream.say("n1", TYPE_AUTHORIZATION, vec![policy("shop/deny", "v1")], &[]).await;
    let ack = stream.heard().await;
    assert!(w.applying.done.load(Ordering::SeqCst), "an ACK means in force");
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail, ack.node), ("n1", None, None));
    assert!(w.has("shop/deny"));
    assert!(!w.handle.is_ready(), "silence does not count");
    stream.say("n2", TYPE_MESH_OPTIONS, vec![], &[]).await;
    assert_eq!(stream.heard().await.response_nonce, "n2");
    w.handle.ready().await;
    stream.say("n3", "type.googleapis.com/of.the.Future", vec![garbage("x/y")], &[]).await;
    assert_eq!(stream.heard().await.error_detail, None, "an unknown type is acknowledged");
    stream.say("n4", TYPE_AUTHORIZATION, vec![], &["shop/deny"]).await;
    stream.heard().await;
    assert!(!w.has("shop/deny"));
    let text = w.metrics.render();
    assert!(text.contains(&format!("istio_xds_message_total{{url=\"{TYPE_AUTHORIZATION}\"}} 2")), "{text}");
    w.drain.force();
    tokio::time::timeout(SOON, w.tasks.idle()).await.unwrap();
    assert_eq!(w.tasks.panics(), 0);
}

#[tokio::test]
async fn good_resources_of_a_refused_response_are_applied() {
    let mut w = world().await;
    let mut stream = w.stream().await;
    let resources = vec![policy("shop/good", "v1"), garbage("shop/bad"), garbage("shop/worse")];
    stream.say("n1", TYPE_AUTHORIZATION, resources, &[]).await;
    let nack = loop {
        let heard = stream.heard().await;
        if !heard.response_nonce.is_empty() {
            break heard;
        }
    };
    let message = nack.error_detail.unwrap().message;
    assert!(message.starts_with("shop/bad: ") && message.contains("; shop/worse: "), "{message}");
    assert!(w.has("shop/good"));
    let invalid = w.handle.world.borrow().policy(&PolicyKey::parse("shop/bad").unwrap()).cloned();
    assert_eq!(invalid, Some(PolicyState::Invalid), "whoever it would apply to is denied");
    assert!(w.handle.status.borrow().rejected.contains_key("shop/bad"));
    stream.say("n2", TYPE_AUTHORIZATION, vec![policy("shop/bad", "v2")], &["shop/worse"]).await;
    assert_eq!(stream.heard().await.error_detail, None);
    assert!(w.handle.status.borrow().rejected.is_empty());
}

#[tokio::test]
async fn a_reconnect_tells_what_is_held() {
    let mut w = world().await;
    let mut stream = w.stream().await;
    let resources = vec![policy("shop/a", "v1"), policy("shop/b", "v1"), garbage("shop/bad")];
    stream.say("n1", TYPE_AUTHORIZATION, resources, &[]).await;
    stream.say("n2", TYPE_AUTHORIZATION, vec![policy("shop/a", "v2")], &["shop/b"]).await;
    while stream.heard().await.response_nonce != "n2" {}
    drop(stream);
    let mut again = w.stream().await;
    assert!(w.has("shop/a"), "kept while disconnected");
    assert!(again.heard().await.initial_resource_versions.is_empty());
    let versions = again.heard().await.initial_resource_versions;
    let expected = [("shop/a", "v2"), ("shop/bad", "")];
    assert_eq!(versions, expected.map(|(n, v)| (n.to_owned(), v.to_owned())).into());
    let text = w.metrics.render();
    assert!(text.contains("istio_xds_connection_terminations_total{reason="), "{text}");
}

#[tokio::test]
async fn what_cannot_be_put_in_force_is_not_acknowledged() {
    let mut w = world().await;
    let mut stream = w.asked().await;
    w.applying.broken.store(true, Ordering::SeqCst);
    // Nothing to be named in it, and still an answer that readiness waits for.
    stream.say("n0", TYPE_MESH_OPTIONS, vec![], &[]).await;
    assert!(stream.heard().await.error_detail.is_some());
    let resources = vec![policy("shop/a", "v1"), policy("shop/b", "v1")];
    stream.say("n1", TYPE_AUTHORIZATION, resources, &["shop/c"]).await;
    let message = stream.heard().await.error_detail.unwrap().message;
    for name in ["shop/a", "shop/b", "shop/c"] {
        assert!(message.contains(&format!("{name}: not in force: map is full")), "{message}");
    }
    assert!(w.handle.status.borrow().pending.contains(TYPE_AUTHORIZATION));
    w.applying.broken.store(false, Ordering::SeqCst);
    // Nothing was said since: it was tried again without that, and what was refused is asked for to be accepted.
    let asked = stream.heard().await;
    assert_eq!((asked.type_url.as_str(), asked.response_nonce.as_str()), (TYPE_AUTHORIZATION, ""));
    assert_eq!(asked.resource_names_subscribe, ["shop/a", "shop/b", "shop/c"]);
    assert_eq!(w.handle.status.borrow().pending, BTreeSet::from([TYPE_AUTHORIZATION]));
    stream
        .say("n2", TYPE_AUTHORIZATION, vec![policy("shop/a", "v1"), policy("shop/b", "v1")], &["shop/c"])
        .await;
    let answer = stream.heard().await;
    assert_eq!((answer.response_nonce.as_str(), answer.error_detail), ("n2", None));
    assert!(!w.handle.status.borrow().pending.contains(TYPE_AUTHORIZATION));
}

#[tokio::test]
async fn a_response_that_puts_earlier_ones_in_force_takes_their_refusal_back() {
    let mut w = world().await;
    let mut stream = w.asked().await;
    w.applying.broken.store(true, Ordering::SeqCst);
    stream.say("n1", TYPE_AUTHORIZATION, vec![policy("shop/a", "v1")], &[]).await;
    assert!(stream.heard().await.error_detail.is_some());
    w.applying.broken.store(false, Ordering::SeqCst);
    stream.say("n2", TYPE_AUTHORIZATION, vec![policy("shop/b", "v1")], &[]).await;
    // Its own retry may have been first.
    let mut heard = [stream.heard().await, stream.heard().await];
    heard.sort_by_key(|request| request.response_nonce.is_empty());
    let [answer, asked] = heard;
    assert_eq!((answer.response_nonce.as_str(), answer.error_detail), ("n2", None));
    assert_eq!(asked.resource_names_subscribe, ["shop/a"]);
}

#[tokio::test]
async fn a_server_of_another_ca_or_name_gets_no_token() {
    let w = world().await;
    let stranger = MiniCa::new().root_pem();
    let mut config = ChannelConfig::new(w.addr, "unused".into(), None);
    config.roots = PemSource::Text(stranger);
    config.server_name = Some("undermesh-control.undermesh-system.svc".into());
    let mut grpc = Grpc::new(channel(&config).unwrap());
    assert!(grpc.ready().await.is_ok(), "lazy");
    let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
    let path = http::uri::PathAndQuery::from_static(DELTA_PATH);
    let status = grpc.unary(Request::new(DeltaDiscoveryRequest::default()), path, codec).await.unwrap_err();
    assert!(told(&status).contains("invalid peer certificate"), "{}", told(&status));
}
