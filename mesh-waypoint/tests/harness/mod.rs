//! A waypoint in memory: services and pods by name, applications as functions, clients on in-memory streams.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::{
    delta::Change,
    flag::Flag,
    id::{Identity, ServiceKey, WorkloadKey},
    model::{
        Backend, BackendTarget, Filters, Health, Listener, PathMatch, RequestMatch, Route, RouteKind,
        RouteRule, Service, ServicePort, TunnelProtocol, WaypointConfig, WaypointRef, Workload,
    },
    snapshot::Snapshot,
};
use mesh_net::{clock::Chance, drain, drain::Drain, task::TaskGroup, telemetry};
use mesh_waypoint::{
    Waypoint,
    dial::{BoxFuture, BoxStream, Dial, DialFailure, Endpoint},
    http::{Downstream, server, upstream::Upstream},
    metrics::Metrics,
    view::{Gateway, View},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::watch,
};

/// Plays one application on one connection.
pub type App = Arc<dyn Fn(DuplexStream) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Buffer of every in-memory connection: small, so that back-pressure shows.
pub const PIPE_BYTES: usize = 16 << 10;

#[derive(Default)]
pub struct FakeDial {
    pub apps: Mutex<HashMap<String, App>>,
    /// Endpoint and client of every dial.
    pub dialled: Mutex<Vec<(String, Identity)>>,
}

impl Dial for FakeDial {
    fn dial(&self, to: &Endpoint, client: &Identity) -> BoxFuture<Result<BoxStream, DialFailure>> {
        let name = to.workload.name.to_string();
        self.dialled.lock().unwrap().push((name.clone(), client.clone()));
        let app = self.apps.lock().unwrap().get(&name).cloned();
        Box::pin(async move {
            let app =
                app.ok_or_else(|| DialFailure { flag: Flag::UpstreamRefused, text: "refused".into() })?;
            let (near, far) = duplex(PIPE_BYTES);
            tokio::task::spawn(app(far));
            Ok(Box::new(near) as BoxStream)
        })
    }
}

pub struct World {
    pub waypoint: Arc<Waypoint>,
    pub dial: Arc<FakeDial>,
    pub views: watch::Sender<Arc<View>>,
    pub drain: Drain,
    listeners: Vec<Listener>,
    changes: Vec<Change>,
}

pub fn identity(name: &str) -> Identity {
    Identity::new("cluster.local", "shop", name)
}

pub fn service_key(name: &str) -> ServiceKey {
    ServiceKey::new("shop", &format!("{name}.shop.svc.cluster.local"))
}

fn vip(name: &str) -> IpAddr {
    let hash = name.bytes().fold(7u16, |sum, b| sum.wrapping_mul(31).wrapping_add(b.into()));
    let [high, low] = hash.to_be_bytes();
    IpAddr::from([10, 96, high, low])
}

/// `vip:80` of a service.
pub fn authority(service: &str) -> SocketAddr {
    SocketAddr::new(vip(service), 80)
}

impl World {
    /// Applications are functions.
    pub fn new() -> Self {
        let dial = Arc::new(FakeDial::default());
        Self::over(dial.clone(), dial)
    }

    /// Endpoints are reached by `reach`.
    pub fn over(dial: Arc<FakeDial>, reach: Arc<dyn Dial>) -> Self {
        let (drain, draining) = drain::channel();
        let tasks = TaskGroup::new();
        let (views, receiver) = watch::channel(Arc::new(View::not_ready()));
        let waypoint = Waypoint {
            views: receiver,
            dial: reach.clone(),
            upstream: Upstream::new(reach, tasks.clone()),
            metrics: Arc::new(Metrics::new(telemetry::Metrics::new("proxy", "test"))),
            chance: Chance::seeded(7),
            own: identity("gw"),
            tasks,
            draining,
        };
        Self { waypoint: Arc::new(waypoint), dial, views, drain, listeners: Vec::new(), changes: Vec::new() }
    }

    /// A service with port 80 that is bound to the waypoint.
    pub fn service(mut self, name: &str) -> Self {
        let key = service_key(name);
        self.changes.push(Change::Service(Arc::new(Service {
            key: key.clone(),
            name: name.into(),
            vips: vec![vip(name)],
            fronts: Vec::new(),
            ports: vec![ServicePort { port: 80, target: 8080 }],
            subject_alt_names: Vec::new(),
            waypoint: None,
            load_balancing: Default::default(),
            sticky: None,
            allow_unhealthy: false,
            canonical: true,
            visibility: Default::default(),
        })));
        self.listeners.push(Listener {
            service: key,
            vips: vec![vip(name)],
            port: 80,
            http: true,
            routes: Vec::new(),
        });
        self
    }

    /// The service that was declared last does not speak HTTP.
    pub fn tcp(mut self) -> Self {
        self.listeners.last_mut().unwrap().http = false;
        self
    }

    /// A pod of services, played by `app`.
    pub fn pod(self, name: &str, services: &[&str], app: App) -> Self {
        self.dial.apps.lock().unwrap().insert(name.to_owned(), app);
        self.pod_without_app(name, services, Health::Healthy)
    }

    /// A pod that refuses connections.
    pub fn pod_without_app(mut self, name: &str, services: &[&str], health: Health) -> Self {
        let number = u8::try_from(self.changes.len() + 1).unwrap();
        let ports = BTreeMap::from([(80, 8080)]);
        self.changes.push(Change::Workload(Arc::new(Workload {
            uid: WorkloadKey(format!("Kubernetes//Pod/shop/{name}").into()),
            name: name.into(),
            namespace: "shop".into(),
            addresses: vec![IpAddr::from([10, 244, 1, number])],
            network: "".into(),
            tunnel: TunnelProtocol::Hbone,
            trust_domain: "cluster.local".into(),
            service_account: name.into(),
            waypoint: None,
            node: "a".into(),
            canonical_name: name.into(),
            canonical_revision: "v1".into(),
            workload_name: name.into(),
            native_tunnel: false,
            policies: Vec::new(),
            health,
            leaving: false,
            cluster: "Kubernetes".into(),
            services: services.iter().map(|service| (service_key(service), ports.clone())).collect(),
            locality: Default::default(),
            network_mode: Default::default(),
            capacity: 1,
        })));
        self
    }

    /// Binds the pod that was declared last to the waypoint behind `service`.
    pub fn bound_to(mut self, service: &str) -> Self {
        let Some(Change::Workload(workload)) = self.changes.last_mut() else { panic!("no pod") };
        Arc::make_mut(workload).waypoint =
            Some(WaypointRef::Service { service: service_key(service), port: 15008 });
        self
    }

    /// A route of the service that was declared last.
    pub fn route(mut self, name: &str, rules: Vec<RouteRule>) -> Self {
        let created = self.listeners.len() as i64;
        self.listeners.last_mut().unwrap().routes.push(Route {
            kind: RouteKind::Http,
            namespace: "shop".into(),
            name: name.into(),
            created,
            hostnames: Vec::new(),
            rules,
        });
        self
    }

    /// Puts everything declared so far in force.
    pub fn apply(self) -> Self {
        let config =
            WaypointConfig { namespace: "shop".into(), name: "gw".into(), listeners: self.listeners.clone() };
        let changes = self.changes.iter().cloned().chain([Change::Waypoint(Arc::new(config))]);
        let snapshot = Arc::new(Snapshot::default().with(changes));
        let gateway = Gateway { namespace: "shop".into(), name: "gw".into(), node: "a".into() };
        let (view, problems) = View::new(snapshot, &gateway, &View::not_ready());
        assert!(problems.is_empty(), "{problems:?}");
        self.views.send_replace(Arc::new(view));
        self
    }

    /// A raw connection of `client` to port 80 of `service`.
    pub fn connect_as(&self, client: &str, service: &str) -> DuplexStream {
        let (near, far) = duplex(PIPE_BYTES);
        let downstream = Downstream {
            waypoint: self.waypoint.clone(),
            client: identity(client),
            peer: "10.244.9.9:40000".parse().unwrap(),
            authority: authority(service),
        };
        let draining = self.drain.watch();
        self.waypoint.tasks.spawn(server::serve(Arc::new(downstream), far, draining));
        near
    }

    pub fn connect(&self, service: &str) -> DuplexStream {
        self.connect_as("web", service)
    }

    /// An HTTP/1.1 client of port 80 of `service`.
    pub async fn client(&self, service: &str) -> Client {
        Client::http1(self.connect(service)).await
    }

    /// Everything counted, as Prometheus text.
    pub fn metrics(&self) -> String {
        self.waypoint.metrics.shared.render()
    }

    /// Waits until the metrics hold a line with all of `parts`.
    pub async fn counted(&self, parts: &[&str]) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        loop {
            let text = self.metrics();
            if text.lines().any(|line| parts.iter().all(|part| line.contains(part))) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "no line with {parts:?} in\n{text}");
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub fn dials(&self) -> usize {
        self.dial.dialled.lock().unwrap().len()
    }
}

/// An HTTP client on one connection.
pub enum Client {
    Http1(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Http2(hyper::client::conn::http2::SendRequest<Full<Bytes>>),
}

/// A whole response.
#[derive(Debug)]
pub struct Got {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub body: String,
    pub trailers: Option<http::HeaderMap>,
}

impl Client {
    pub async fn http1(io: DuplexStream) -> Self {
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::task::spawn(connection.with_upgrades());
        Self::Http1(sender)
    }

    pub async fn http2(io: DuplexStream) -> Self {
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
        tokio::task::spawn(connection);
        Self::Http2(sender)
    }

    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }

    pub async fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> Got {
        self.call("GET", path, headers).await
    }

    pub async fn post(&mut self, path: &str, headers: &[(&str, &str)]) -> Got {
        self.call("POST", path, headers).await
    }

    async fn call(&mut self, method: &str, path: &str, headers: &[(&str, &str)]) -> Got {
        let uri = match self {
            Self::Http1(_) => path.to_owned(),
            Self::Http2(_) => format!("http://shop.test{path}"),
        };
        let mut request = Request::builder().method(method).uri(uri);
        if matches!(self, Self::Http1(_)) {
            request = request.header("host", "shop.test");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(request.body(Full::default()).unwrap()).await.unwrap();
        collect(response).await.unwrap()
    }
}

pub async fn collect(response: Response<Incoming>) -> hyper::Result<Got> {
    let (parts, body) = response.into_parts();
    let collected = body.collect().await?;
    let trailers = collected.trailers().cloned();
    Ok(Got {
        status: parts.status.as_u16(),
        headers: parts.headers,
        body: String::from_utf8_lossy(&collected.to_bytes()).into_owned(),
        trailers,
    })
}

/// An application that answers with its name, then the request line and header fields that it saw, one per line.
pub fn echo(name: &'static str) -> App {
    Arc::new(move |io| {
        Box::pin(async move {
            let service = service_fn(move |request: Request<Incoming>| async move {
                let mut text = format!("{name}\n{} {}\n", request.method(), request.uri());
                for (field, value) in request.headers() {
                    text.push_str(&format!("{field}: {}\n", String::from_utf8_lossy(value.as_bytes())));
                }
                let _body = request.into_body().collect().await?;
                Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from(text))))
            });
            let io = TokioIo::new(io);
            let _ended = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                .serve_connection(io, service)
                .await;
        })
    })
}

/// An application that is played by hand on the raw stream.
pub fn raw<F, Fut>(play: F) -> App
where
    F: Fn(DuplexStream) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    Arc::new(move |io| Box::pin(play(io)))
}

/// An application that never answers.
pub fn silent() -> App {
    raw(|mut io| async move {
        let mut sink = vec![0; 4096];
        while io.read(&mut sink).await.is_ok_and(|count| count > 0) {}
        std::future::pending().await
    })
}

/// Reads a request head and answers with fixed bytes.
pub fn answers(bytes: &'static [u8]) -> App {
    raw(move |mut io| async move {
        let mut seen = Vec::new();
        while !seen.windows(4).any(|window| window == b"\r\n\r\n") {
            if io.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let _ = io.write_all(bytes).await;
        let _ = io.shutdown().await;
    })
}

pub fn backend(service: &str, weight: u32) -> Backend {
    let target = BackendTarget {
        service: service_key(service),
        port: 80,
        http2: false,
        subject_alt_names: Vec::new(),
    };
    Backend { weight, filters: Filters::default(), target: Ok(target) }
}

pub fn any() -> RequestMatch {
    RequestMatch { path: PathMatch::Prefix("/".into()), method: None, headers: Vec::new(), query: Vec::new() }
}

pub fn rule(matches: Vec<RequestMatch>, backends: Vec<Backend>) -> RouteRule {
    RouteRule {
        name: None,
        matches,
        filters: Filters::default(),
        backends,
        request_timeout: None,
        backend_timeout: None,
    }
}

pub fn expect(got: &Got, status: StatusCode, body: &str) {
    assert_eq!((got.status, got.body.as_str()), (status.as_u16(), body), "{got:?}");
}
