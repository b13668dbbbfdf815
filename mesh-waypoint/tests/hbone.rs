//! The tunnel port over real TLS on loopback: what a CONNECT gets, and what the endpoint's agent is told.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "the scenery of tests may panic and spawn"
)]
#![expect(dead_code, reason = "this file uses a part of the harness")]

mod harness;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
};

use harness::*;
use mesh_core::{flag::Flag, id::Identity, model::Health};
use mesh_net::{
    BoxFuture,
    drain::Draining,
    identity::WorkloadCertificate,
    task::TaskGroup,
    testing::{FixedCertificates, MiniCa},
    tunnel::{
        Certificates, Connector, Dial, DialError, Handshakes, Hop, Incoming, Pool, Serving, TunnelHeaders,
        TunnelStream, serve_connection,
    },
};
use mesh_waypoint::{
    dial::hbone::Hbone,
    listeners::{self, Tunnels},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Every address leads here.
struct Only(SocketAddr);

impl Connector for Only {
    fn connect(&self, _: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(self.0))
    }
}

/// What the endpoint's agent saw of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    peer: Identity,
    claim: Option<Identity>,
    authority: String,
}

struct Scene {
    world: World,
    certificates: Arc<FixedCertificates>,
    waypoint_at: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    tasks: TaskGroup,
}

/// The agent of every endpoint: it plays an HTTP application, or sends bytes back.
async fn agent(incoming: Incoming, seen: Arc<Mutex<Vec<Seen>>>) {
    seen.lock().unwrap().push(Seen {
        peer: incoming.peer.clone(),
        claim: incoming.headers.client_claim.clone(),
        authority: incoming.authority.clone(),
    });
    let mut stream = incoming.accept(None).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
            break;
        }
    }
    if head.starts_with(b"GET ") {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
    } else {
        stream.write_all(&head).await.unwrap();
    }
    let _ = stream.shutdown().await;
    let _ = stream.read_to_end(&mut head).await;
}

async fn scene(declare: impl FnOnce(World) -> World) -> Scene {
    let ca = MiniCa::new();
    let certificates = FixedCertificates::new(
        ["gw", "web", "mallory", "reviews-v1"].map(|name| ca.certificate(&identity(name))),
    );
    let (tasks, seen) = (TaskGroup::new(), Arc::new(Mutex::default()));

    let agent_socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let agent_at = agent_socket.local_addr().unwrap();
    let serving = Serving {
        tls: certificates.get(&identity("reviews-v1")).await.unwrap().server_tls(),
        draining: Draining::never(),
        tasks: tasks.clone(),
    };
    let (saw, group) = (seen.clone(), tasks.clone());
    tasks.spawn(async move {
        while let Ok((stream, peer)) = agent_socket.accept().await {
            let (serving, saw) = (serving.clone(), saw.clone());
            group.spawn(async move {
                let carrier = Handshakes::default().admit(stream, peer).unwrap();
                serve_connection(carrier, serving, move |incoming| agent(incoming, saw.clone())).await;
            });
        }
    });

    let pool = Pool::new(certificates.clone(), tasks.clone(), Draining::never());
    let reach = Arc::new(Hbone::new(pool, identity("gw"), Arc::new(Only(agent_at)), None));
    let world = declare(World::over(Arc::default(), reach)).apply();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let waypoint_at = socket.local_addr().unwrap();
    let tunnels = Tunnels {
        waypoint: world.waypoint.clone(),
        certificates: certificates.clone(),
        handshakes: Handshakes::default(),
    };
    tasks.spawn(listeners::run(tunnels, socket, None));
    Scene { world, certificates, waypoint_at, seen, tasks }
}

impl Scene {
    /// A CONNECT of `client` to `authority` through the waypoint.
    async fn connect(&self, client: &str, authority: &str) -> Result<TunnelStream, DialError> {
        let pool = Pool::new(self.certificates.clone(), self.tasks.clone(), Draining::never());
        let dial = Dial {
            identity: identity(client),
            hop: Hop { dial: self.waypoint_at, expect: vec![identity("gw")] },
            source: IpAddr::from([0, 0, 0, 0]),
            authority: authority.to_owned(),
            // What a client states about itself here is a lie of its own making.
            headers: TunnelHeaders { client_claim: Some(identity("admin")), ..TunnelHeaders::default() },
            connect: Arc::new(Only(self.waypoint_at)),
        };
        pool.open(dial).await
    }
}

async fn ask(mut stream: TunnelStream, bytes: &[u8]) -> String {
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn the_agent_is_told_the_proven_client_by_the_waypoint() {
    let scene =
        scene(|world| world.service("reviews").pod_without_app("reviews-v1", &["reviews"], Health::Healthy))
            .await;
    for client in ["web", "mallory"] {
        let stream = scene.connect(client, &authority("reviews").to_string()).await.unwrap();
        let answer = ask(stream, b"GET / HTTP/1.1\r\nHost: reviews\r\nConnection: close\r\n\r\n").await;
        assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
    }
    let seen = scene.seen.lock().unwrap().clone();
    let expected = ["web", "mallory"].map(|client| Seen {
        peer: identity("gw"),
        claim: Some(identity(client)),
        authority: "10.244.1.2:8080".to_owned(),
    });
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn bytes_of_other_protocols_are_carried() {
    let scene = scene(|world| {
        world.service("redis").tcp().pod_without_app("reviews-v1", &["redis"], Health::Healthy)
    })
    .await;
    let stream = scene.connect("web", &authority("redis").to_string()).await.unwrap();
    assert_eq!(ask(stream, b"PING\r\n\r\n").await, "PING\r\n\r\n");
    scene
        .world
        .counted(&["istio_tcp_received_bytes_total", "reporter=\"waypoint\"", "reviews-v1", "} 8"])
        .await;
}

#[tokio::test]
async fn a_bound_workload_is_reached_by_its_own_address_and_another_is_not() {
    let scene = scene(|world| {
        world
            .service("gw")
            .pod_without_app("reviews-v1", &[], Health::Healthy)
            .bound_to("gw")
            .pod_without_app("elsewhere", &[], Health::Healthy)
            .bound_to("another")
    })
    .await;
    let stream = scene.connect("web", "10.244.1.2:9000").await.unwrap();
    assert_eq!(ask(stream, b"PING\r\n\r\n").await, "PING\r\n\r\n");
    let seen = scene.seen.lock().unwrap().clone();
    let expected =
        Seen { peer: identity("gw"), claim: Some(identity("web")), authority: "10.244.1.2:9000".to_owned() };
    assert_eq!(seen, [expected]);
    match scene.connect("web", "10.244.1.3:9000").await {
        Err(DialError::Status { status: 400, flag: Some(Flag::IllegalAuthority) }) => {}
        other => panic!("{:?}", other.map(drop)),
    }
}

#[tokio::test]
async fn what_is_not_ours_is_refused_and_dials_nobody() {
    let scene = scene(|world| {
        world
            .service("reviews")
            .pod_without_app("reviews-v1", &["reviews"], Health::Healthy)
            .service("empty")
            .tcp()
    })
    .await;
    for (authority, status, flag) in [
        ("10.96.0.1:81".to_owned(), 400, Flag::IllegalAuthority),
        ("10.244.1.2:8080".to_owned(), 400, Flag::IllegalAuthority),
        ("169.254.169.254:80".to_owned(), 400, Flag::IllegalAuthority),
        ("127.0.0.1:15000".to_owned(), 400, Flag::IllegalAuthority),
        ("reviews:80".to_owned(), 400, Flag::MalformedRequest),
        ("10.96.0.1:080".to_owned(), 400, Flag::MalformedRequest),
        (format!("{}:15008", authority("reviews").ip()), 503, Flag::IllegalPort),
        (authority("empty").to_string(), 503, Flag::NoHealthyUpstream),
    ] {
        match scene.connect("web", &authority).await {
            Err(DialError::Status { status: got, flag: told }) => {
                assert_eq!((got, told), (status, Some(flag)), "{authority}");
            }
            other => panic!("{authority}: {:?}", other.map(drop)),
        }
        scene.world.counted(&["undermesh_refused_total", flag.code()]).await;
    }
    assert!(scene.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_endpoint_that_is_somebody_else_is_not_used() {
    // The agent proves `reviews-v1`; the control plane says that the endpoint is `ratings-v1`.
    let scene =
        scene(|world| world.service("ratings").pod_without_app("ratings-v1", &["ratings"], Health::Healthy))
            .await;
    let stream = scene.connect("web", &authority("ratings").to_string()).await.unwrap();
    let answer = ask(stream, b"GET / HTTP/1.1\r\nHost: ratings\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(scene.seen.lock().unwrap().is_empty());
    scene.world.counted(&["istio_requests_total", "response_flags=\"UF\""]).await;
}

/// A control plane that does not answer.
#[derive(Debug)]
struct Never;

impl Certificates for Never {
    fn get<'a>(&'a self, _: &'a Identity) -> BoxFuture<'a, Result<Arc<WorkloadCertificate>, Flag>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn connections_that_wait_for_a_certificate_are_bounded() {
    let world = World::new().service("reviews").apply();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let waypoint = world.waypoint.clone();
    let tunnels = Tunnels { waypoint, certificates: Arc::new(Never), handshakes: Handshakes::new(2, 2) };
    let tasks = TaskGroup::new();
    tasks.spawn(listeners::run(tunnels, socket, None));
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(TcpStream::connect(at).await.unwrap());
    }
    world.counted(&["undermesh_refused_total", Flag::Overload.code(), "} 1"]).await;
    assert_eq!(clients[2].read(&mut [0]).await.unwrap(), 0);
    drop(clients);
}
