//! The control plane as its callers see it: a raw gRPC client over TLS, a directory that is edited, tokens in files.
#![expect(clippy::unwrap_used, reason = "a test panics freely")]

use std::{
    collections::HashMap,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Parser;
use mesh_control::{app::App, config::Settings};
use mesh_core::{
    delta::{Change, prepare},
    id::Identity,
    proto::{
        TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_MESH_OPTIONS, TYPE_WAYPOINT,
        discovery::{DELTA_PATH, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as RpcStatus},
    },
};
use mesh_net::{
    admin,
    drain::{self, Drain},
    grpc::{AuthorizedChannel, ChannelConfig, PemSource, channel},
    identity::{
        CertificateSource, FetchError,
        request::{Asking, CaClient},
    },
    task::TaskGroup,
    tls::verify::identity_of,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, client::Grpc};
use tonic_prost::ProstCodec;

/// Nothing here takes a second; a failure may.
const SOON: Duration = Duration::from_secs(10);

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, serviceAccountName: web, containers: []}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {nodeName: n2, serviceAccountName: cart, containers: []}
status: {phase: Running, podIP: 10.0.0.2}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}]}
";

const WAYPOINT: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: gw, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: gw}}
spec: {clusterIP: 10.96.0.9, selector: {gateway.networking.k8s.io/gateway-name: gw}, ports: [{port: 15008}]}
---
apiVersion: v1
kind: Pod
metadata: {name: gw-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: gw}}
spec: {nodeName: n1, serviceAccountName: gw, containers: []}
status: {phase: Running, podIP: 10.0.0.9}
";

const DENY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, action: DENY, rules: [{}]}
";

struct World {
    dir: tempfile::TempDir,
    addr: SocketAddr,
    drain: Drain,
    tasks: TaskGroup,
}

impl World {
    async fn new(files: &[(&str, &str)], flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["source", "ca", "credentials"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        for (name, text) in files {
            fs::write(dir.path().join("source").join(name), text).unwrap();
        }
        for (digit, caller) in [("1", "node-n1"), ("2", "node-n2"), ("3", "pod-shop.gw-1")] {
            let path = dir.path().join("credentials").join(caller);
            fs::write(&path, digit.repeat(64)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (source, ca, credentials, socket) =
            (path("source"), path("ca"), path("credentials"), path("admin.sock"));
        let mut words =
            vec!["mesh-control", "--listen", "127.0.0.1:0", "--source-dir", &source, "--ca-dir", &ca];
        words.extend(["--credentials", &credentials, "--admin", &socket]);
        words.extend(flags);
        let settings = Settings::try_parse_from(words).unwrap();
        let (drain, tasks) = (drain::channel().0, TaskGroup::new());
        let app = App::start(&settings, &drain, &tasks).await.unwrap();
        Self { addr: app.addr, dir, drain, tasks }
    }

    fn source(&self, name: &str) -> PathBuf {
        self.dir.path().join("source").join(name)
    }

    /// A channel with the token of a caller; digit 0 is nobody's.
    fn channel(&self, digit: Option<&str>) -> AuthorizedChannel {
        channel(&ChannelConfig {
            addr: self.addr.into(),
            roots: PemSource::File(self.dir.path().join("ca/root-cert.pem")),
            server_name: None,
            token: digit.map(|digit| PemSource::Text(digit.repeat(64))),
            cluster: "Kubernetes".to_owned(),
            connector: None,
        })
        .unwrap()
    }

    async fn status(&self) -> serde_json::Value {
        let socket = self.dir.path().join("admin.sock");
        let (code, body) = admin::call(&socket, http::Method::GET, "/status", "", SOON).await.unwrap();
        assert_eq!(code, 200);
        serde_json::from_slice(&body).unwrap()
    }

    /// Asks for the status until it holds.
    async fn until(&self, what: &str, holds: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let deadline = tokio::time::Instant::now() + SOON;
        loop {
            let status = self.status().await;
            if holds(&status) {
                return status;
            }
            assert!(tokio::time::Instant::now() < deadline, "never: {what}: {status:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn end(self) {
        self.drain.force();
        self.tasks.shutdown(SOON).await;
    }
}

/// One delta stream, by hand.
struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    async fn open(channel: AuthorizedChannel) -> Result<Self, tonic::Status> {
        let (requests, receiver) = mpsc::channel(16);
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.unwrap();
        let path = http::uri::PathAndQuery::from_static(DELTA_PATH);
        let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
        let stream = Request::new(ReceiverStream::new(receiver));
        let responses = grpc.streaming(stream, path, codec).await?.into_inner();
        Ok(Self { requests, responses })
    }

    async fn ask(&self, type_url: &str, versions: HashMap<String, String>) {
        let node = Node { id: "ztunnel~1.1.1.1~a.b~b.svc.cluster.local".to_owned(), ..Node::default() };
        let request = DeltaDiscoveryRequest {
            node: Some(node),
            type_url: type_url.to_owned(),
            initial_resource_versions: versions,
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        tokio::time::timeout(SOON, self.responses.message()).await.unwrap().unwrap().unwrap()
    }

    async fn answer(&self, response: &DeltaDiscoveryResponse, rejected: Option<&str>) {
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: rejected.map(|message| RpcStatus { code: 0, message: message.to_owned() }),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }

    /// The next response, acknowledged.
    async fn take(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        self.answer(&response, None).await;
        response
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

fn versions(response: &DeltaDiscoveryResponse) -> HashMap<String, String> {
    response.resources.iter().map(|resource| (resource.name.clone(), resource.version.clone())).collect()
}

fn changes(response: &DeltaDiscoveryResponse) -> Vec<Change> {
    response.resources.iter().map(|resource| prepare(&response.type_url, resource).unwrap()).collect()
}

fn write(path: &Path, text: &str) {
    // As editors do: beside, then renamed.
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_given_everything_and_then_changes() {
    let world = World::new(&[("shop.yaml", SHOP)], &[]).await;
    let mut client = Client::open(world.channel(Some("1"))).await.unwrap();
    // Asked for in this order, and still policies come first.
    client.ask(TYPE_ADDRESS, HashMap::new()).await;
    client.ask(TYPE_AUTHORIZATION, HashMap::new()).await;
    let policies = client.take().await;
    assert_eq!((policies.type_url.as_str(), policies.resources.len()), (TYPE_AUTHORIZATION, 0));
    let first = client.take().await;
    let mut got = names(&first);
    got.sort_unstable();
    assert_eq!(
        got,
        ["Kubernetes//Pod/shop/cart-1", "Kubernetes//Pod/shop/web-1", "shop/cart.shop.svc.cluster.local"]
    );
    let cart = changes(&first).into_iter().find_map(|change| match change {
        Change::Workload(workload) if &*workload.name == "cart-1" => Some(workload),
        _ => None,
    });
    let cart = cart.unwrap();
    assert_eq!(cart.tunnel, mesh_core::model::TunnelProtocol::Hbone);
    assert_eq!(cart.services.values().next().unwrap()[&80], 8080);

    // A policy comes before the workload that names it, and only what changed comes.
    write(&world.source("deny.yaml"), DENY);
    let policies = client.take().await;
    assert_eq!((policies.type_url.as_str(), names(&policies)), (TYPE_AUTHORIZATION, vec!["shop/deny"]));
    let change = client.take().await;
    assert_eq!(names(&change), ["Kubernetes//Pod/shop/cart-1"]);

    // Gone the other way round: the workload first.
    fs::remove_file(world.source("deny.yaml")).unwrap();
    assert_eq!(names(&client.take().await), ["Kubernetes//Pod/shop/cart-1"]);
    let removed = client.take().await;
    assert_eq!(
        (removed.type_url.as_str(), removed.removed_resources),
        (TYPE_AUTHORIZATION, vec!["shop/deny".to_owned()])
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnecting_proxy_gets_only_the_difference() {
    let world = World::new(&[("shop.yaml", SHOP)], &[]).await;
    let mut client = Client::open(world.channel(Some("1"))).await.unwrap();
    client.ask(TYPE_AUTHORIZATION, HashMap::new()).await;
    client.take().await;
    client.ask(TYPE_ADDRESS, HashMap::new()).await;
    let mut held = versions(&client.take().await);
    drop(client);

    held.insert("Kubernetes//Pod/shop/gone".to_owned(), "1".to_owned());
    held.insert("Kubernetes//Pod/shop/web-1".to_owned(), "older".to_owned());
    let mut client = Client::open(world.channel(Some("1"))).await.unwrap();
    client.ask(TYPE_AUTHORIZATION, HashMap::new()).await;
    client.ask(TYPE_ADDRESS, held).await;
    client.take().await;
    let difference = client.take().await;
    assert_eq!(names(&difference), ["Kubernetes//Pod/shop/web-1"]);
    assert_eq!(difference.removed_resources, ["Kubernetes//Pod/shop/gone"]);

    // A proxy that has everything gets an empty answer, not silence.
    let mut other = Client::open(world.channel(Some("2"))).await.unwrap();
    other.ask(TYPE_AUTHORIZATION, HashMap::new()).await;
    assert_eq!(other.take().await.resources.len(), 0);
    // A type of others' is passed over in silence; ours still answers.
    other.ask("type.googleapis.com/envoy.config.cluster.v3.Cluster", HashMap::new()).await;
    other.ask(TYPE_MESH_OPTIONS, HashMap::new()).await;
    assert_eq!(names(&other.take().await), ["mesh"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_force_says_what_the_proxies_said() {
    let world = World::new(&[("shop.yaml", SHOP)], &[]).await;
    let status = world.status().await;
    assert_eq!((status["in_force"].as_bool(), status["rescanned"].as_bool()), (Some(false), Some(true)));
    let mut clients = Vec::new();
    for digit in ["1", "2"] {
        let mut client = Client::open(world.channel(Some(digit))).await.unwrap();
        client.ask(TYPE_AUTHORIZATION, HashMap::new()).await;
        client.ask(TYPE_ADDRESS, HashMap::new()).await;
        client.take().await;
        client.take().await;
        clients.push(client);
    }
    world.until("both have everything", |status| status["in_force"] == true).await;

    // The edit is in the very next answer, and not in force until both hold it.
    write(&world.source("deny.yaml"), DENY);
    let status = world.status().await;
    assert_eq!((status["in_force"].as_bool(), status["revision"].as_u64()), (Some(false), Some(2)));
    for client in &mut clients {
        client.take().await;
    }
    let (mut second, mut first) = (clients.pop().unwrap(), clients.pop().unwrap());
    first.take().await;
    let change = second.next().await;
    second.answer(&change, Some("Kubernetes//Pod/shop/cart-1: addresses[0]: no")).await;
    let status = world
        .until("the rejection, and the policy on both", |status| {
            let condition = &status["objects"]["AuthorizationPolicy shop/deny"]["conditions"][1];
            status["proxies"][1]["nacks"][0]["reason"] == "addresses[0]: no"
                && condition["message"] == "in force on 2 of 2 proxies"
        })
        .await;
    assert_eq!(status["in_force"], false);

    // A late answer to something older changes nothing; a new version heals.
    second.answer(&DeltaDiscoveryResponse { nonce: "0-0".to_owned(), ..change }, None).await;
    fs::remove_file(world.source("deny.yaml")).unwrap();
    for client in [&mut first, &mut second] {
        client.take().await;
        client.take().await;
    }
    world.until("healed", |status| status["in_force"] == true).await;
    drop(first);
    let status = world.until("one is gone", |status| status["in_force"] == false).await;
    assert_eq!(status["why"][0], "node:n1 is not connected");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waypoint_sees_its_own_configuration_and_an_agent_none() {
    let world = World::new(&[("shop.yaml", SHOP), ("gw.yaml", WAYPOINT)], &[]).await;
    for (digit, seen) in [("3", vec!["shop/gw"]), ("1", vec![])] {
        let mut client = Client::open(world.channel(Some(digit))).await.unwrap();
        client.ask(TYPE_WAYPOINT, HashMap::new()).await;
        assert_eq!(names(&client.take().await), seen);
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_is_told_and_keeps_what_was_good() {
    let world = World::new(&[("shop.yaml", SHOP)], &[]).await;
    let before = world.status().await;
    write(&world.source("shop.yaml"), &SHOP.replace("port: 80", "port: eighty"));
    let status = world.status().await;
    assert_eq!(status["revision"], before["revision"]);
    let problem = &status["problems"][0];
    assert_eq!(
        (problem["file"].as_str(), problem["field"].as_str(), problem["object"].as_str()),
        (Some("shop.yaml"), Some("spec.ports[0].port"), Some("Service shop/cart"))
    );
    assert_eq!(problem["line"], 29);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_token_gets_nothing() {
    let world = World::new(&[("shop.yaml", SHOP)], &[]).await;
    for token in [None, Some("0")] {
        let refused = Client::open(world.channel(token)).await.err().unwrap();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        let ca = CaClient::new(world.channel(token), Asking::ForPods);
        let outcome = ca.fetch(&Identity::new("cluster.local", "shop", "web")).await;
        assert!(matches!(outcome, Err(FetchError::Refused(_))), "{:?}", outcome.err());
    }
    let exposed = world.dir.path().join("credentials/node-n1");
    fs::set_permissions(&exposed, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(Client::open(world.channel(Some("1"))).await.is_err());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_for_the_pods_of_the_callers_node() {
    let world =
        World::new(&[("shop.yaml", SHOP), ("gw.yaml", WAYPOINT)], &["--max-certificate-ttl", "30s"]).await;
    let identity = |account: &str| Identity::new("cluster.local", "shop", account);
    for (digit, asking, account, granted) in [
        ("1", Asking::ForPods, "web", true),
        ("2", Asking::ForPods, "cart", true),
        ("1", Asking::ForPods, "cart", false),
        ("2", Asking::ForPods, "web", false),
        ("1", Asking::ForPods, "nobody", false),
        ("3", Asking::ForItself, "gw", true),
        ("3", Asking::ForPods, "gw", true),
        ("3", Asking::ForPods, "web", false),
        ("1", Asking::ForItself, "web", false),
    ] {
        let outcome = CaClient::new(world.channel(Some(digit)), asking).fetch(&identity(account)).await;
        let refusal = outcome.as_ref().err();
        assert_eq!(outcome.is_ok(), granted, "{digit} {asking:?} {account}: {refusal:?}");
        if let Ok(issued) = outcome {
            assert_eq!(identity_of(&issued.chain[0]).unwrap(), identity(account));
            assert_eq!(issued.roots.len(), 1);
        }
    }
    // A pod that is gone takes its identity with it.
    write(
        &world.source("shop.yaml"),
        &SHOP.replace("phase: Running, podIP: 10.0.0.1", "phase: Succeeded, podIP: 10.0.0.1"),
    );
    world.status().await;
    assert!(CaClient::new(world.channel(Some("1")), Asking::ForPods).fetch(&identity("web")).await.is_err());
    world.end().await;
}
