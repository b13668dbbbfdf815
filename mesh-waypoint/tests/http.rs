//! The L7 proxy end to end, in memory: a client's bytes in, an application's bytes out.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "the scenery of tests may panic and spawn"
)]
#![expect(dead_code, reason = "this file uses a part of the harness")]

mod harness;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use harness::*;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{body::Frame, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::model::{HeaderMatch, Health, PathMatch, RequestMatch, ValueMatch};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn path(path: PathMatch) -> RequestMatch {
    RequestMatch { path, ..any() }
}

/// First line of an echo: who answered.
fn who(got: &Got) -> &str {
    assert_eq!(got.status, 200, "{got:?}");
    got.body.lines().next().unwrap()
}

async fn exchange_raw(world: &World, service: &str, bytes: &[u8]) -> String {
    let mut io = world.connect(service);
    io.write_all(bytes).await.unwrap();
    io.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let read = io.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(5), read).await.expect("an answer and its end");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_service_without_routes_reaches_its_own_endpoints() {
    let world = World::new().service("reviews").pod("reviews-v1", &["reviews"], echo("v1")).apply();
    let mut client = world.client("reviews").await;
    let got = client.get("/reviews/0?x=1", &[("user-agent", "test")]).await;
    assert_eq!(who(&got), "v1");
    assert!(got.body.contains("GET /reviews/0?x=1\n"), "{}", got.body);
    assert!(got.body.contains("host: shop.test\n"), "{}", got.body);
    world
        .counted(&[
            "istio_requests_total",
            "reporter=\"waypoint\"",
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/web\"",
            "destination_service=\"reviews.shop.svc.cluster.local\"",
            "destination_workload=\"reviews-v1\"",
            "response_code=\"200\"",
            "response_flags=\"-\"",
        ])
        .await;
}

#[tokio::test]
async fn requests_of_one_connection_are_split_by_weight() {
    let world = World::new()
        .service("v1")
        .pod("v1-a", &["v1"], echo("v1"))
        .service("v2")
        .pod("v2-a", &["v2"], echo("v2"))
        .service("reviews")
        .route("split", vec![rule(vec![any()], vec![backend("v1", 90), backend("v2", 10)])])
        .apply();
    let mut client = world.client("reviews").await;
    let mut second = 0;
    for _ in 0..1000 {
        second += u32::from(who(&client.get("/", &[]).await) == "v2");
    }
    // Five standard deviations around 100.
    assert!((53..=147).contains(&second), "{second} of 1000");
    assert!(world.dials() < 20, "{} dials: keep-alive connections are used again", world.dials());
}

#[tokio::test]
async fn routing_by_header_method_path_and_query() {
    let header =
        |name: &str, value: &str| HeaderMatch { name: name.into(), value: ValueMatch::Exact(value.into()) };
    let to = |service: &str, m: RequestMatch| rule(vec![m], vec![backend(service, 1)]);
    let world = ["v1", "v2", "v3", "v4", "v5"]
        .into_iter()
        .fold(World::new(), |world, name| world.service(name).pod(name, &[name], echo(name)))
        .service("reviews")
        .route(
            "by-everything",
            vec![
                to("v1", any()),
                to("v2", RequestMatch { headers: vec![header("end-user", "jason")], ..any() }),
                to("v3", RequestMatch { method: Some("POST".into()), ..any() }),
                to("v4", path(PathMatch::Prefix("/api".into()))),
                to("v5", path(PathMatch::Exact("/api/health".into()))),
            ],
        )
        .apply();
    let mut client = world.client("reviews").await;
    assert_eq!(who(&client.get("/", &[]).await), "v1");
    assert_eq!(who(&client.get("/", &[("end-user", "jason")]).await), "v2");
    assert_eq!(who(&client.get("/", &[("End-User", "jason")]).await), "v2");
    assert_eq!(who(&client.get("/", &[("end-user", "mary")]).await), "v1");
    assert_eq!(who(&client.get("/api/x", &[("end-user", "jason")]).await), "v4", "longest path first");
    assert_eq!(who(&client.get("/apix", &[]).await), "v1", "prefixes are by path element");
    assert_eq!(who(&client.get("/api/health", &[]).await), "v5");
    let post = Request::post("/").header("host", "a").body(Full::from("body")).unwrap();
    let got = collect(client.send(post).await.unwrap()).await.unwrap();
    assert_eq!(who(&got), "v3");
}

#[tokio::test]
async fn what_cannot_be_routed_is_refused_with_its_flag() {
    let mut unresolved = backend("v1", 1);
    unresolved.target = Err("no such service".into());
    let only_api = path(PathMatch::Prefix("/api".into()));
    let world = World::new()
        .service("v1")
        .pod_without_app("down", &["v1"], Health::Healthy)
        .service("nobody")
        .pod_without_app("unready", &["nobody"], Health::Unhealthy)
        .service("unmatched")
        .route("r", vec![rule(vec![only_api], vec![backend("v1", 1)])])
        .service("unresolved")
        .route("r", vec![rule(vec![any()], vec![unresolved])])
        .service("weightless")
        .route("r", vec![rule(vec![any()], vec![backend("v1", 0)])])
        .service("empty")
        .route("r", vec![rule(vec![any()], vec![])])
        .service("refusing")
        .route("r", vec![rule(vec![any()], vec![backend("v1", 1)])])
        .apply();
    for (service, status, flag) in [
        ("nobody", 503, "UH"),
        ("unmatched", 404, "NR"),
        ("unresolved", 500, "NC"),
        ("weightless", 500, "NC"),
        ("empty", 500, "NC"),
        ("refusing", 503, "UF"),
    ] {
        let mut client = world.client(service).await;
        let got = client.get("/", &[]).await;
        assert_eq!(got.status, status, "{service}: {got:?}");
        let (code, flag) = (format!("response_code=\"{status}\""), format!("response_flags=\"{flag}\""));
        world.counted(&["istio_requests_total", &format!("\"{service}.shop"), &code, &flag]).await;
    }
    assert_eq!(who_refuses(&world, "nobody").await, "no healthy upstream");
}

async fn who_refuses(world: &World, service: &str) -> String {
    world.client(service).await.get("/", &[]).await.body
}

#[tokio::test]
async fn without_configuration_everything_is_refused() {
    let world = World::new();
    let got = world.client("reviews").await.get("/", &[]).await;
    assert_eq!(got.status, 503);
    world.counted(&["response_flags=\"OM\""]).await;
    let world = World::new().service("other").apply();
    assert_eq!(world.client("reviews").await.get("/", &[]).await.status, 404);
}

#[tokio::test]
async fn grpc_clients_get_their_refusals_as_grpc() {
    let world = World::new().service("nobody").apply();
    let mut client = Client::http2(world.connect("nobody")).await;
    let got = client.get("/pkg.Service/Method", &[("content-type", "application/grpc")]).await;
    assert_eq!((got.status, &got.headers["grpc-status"]), (200, &"14".parse().unwrap()));
    world
        .counted(&["istio_requests_total", "request_protocol=\"grpc\"", "grpc_response_status=\"14\""])
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_application_times_out() {
    let mut slow = rule(vec![any()], vec![backend("slow", 1)]);
    slow.request_timeout = Some(Duration::from_secs(2));
    let mut impatient = rule(vec![path(PathMatch::Prefix("/try".into()))], vec![backend("slow", 1)]);
    impatient.backend_timeout = Some(Duration::from_millis(500));
    let world = World::new()
        .service("slow")
        .pod("slow-a", &["slow"], silent())
        .service("reviews")
        .route("r", vec![slow, impatient])
        .apply();
    for (path, after) in [("/", 2000), ("/try", 500)] {
        let started = tokio::time::Instant::now();
        let got = world.client("reviews").await.get(path, &[]).await;
        expect(&got, StatusCode::GATEWAY_TIMEOUT, "upstream request timeout");
        let took = started.elapsed().as_millis();
        assert!((after..after + 100).contains(&took), "{path}: {took} ms");
    }
    world.counted(&["response_flags=\"UT\"", "response_code=\"504\""]).await;
}

#[tokio::test(start_paused = true)]
async fn a_timeout_after_the_head_breaks_the_response_off() {
    let mut limited = rule(vec![any()], vec![backend("drip", 1)]);
    limited.request_timeout = Some(Duration::from_secs(2));
    let drip = raw(|mut io| async move {
        let mut seen = vec![0; 4096];
        let _ = io.read(&mut seen).await;
        let _ = io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegin").await;
        std::future::pending().await
    });
    let world = World::new()
        .service("drip")
        .pod("drip-a", &["drip"], drip)
        .service("reviews")
        .route("r", vec![limited])
        .apply();
    let mut client = world.client("reviews").await;
    let request = Request::get("/").header("host", "a").body(Full::default()).unwrap();
    let response = client.send(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(collect(response).await.is_err());
    world.counted(&["istio_requests_total", "response_flags=\"UT\"", "response_code=\"200\""]).await;
}

#[tokio::test]
async fn a_broken_application_is_a_clear_error() {
    for (bytes, status, flag) in [
        (&b""[..], 503, "UC"),
        (&b"HTTP/1.1 200 OK\r\ncontent-"[..], 503, "UC"),
        (&b"not http at all\r\n\r\n"[..], 502, "UPE"),
        (&b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"[..], 502, "UPE"),
    ] {
        let world = World::new().service("bad").pod("bad-a", &["bad"], answers(bytes)).apply();
        let got = world.client("bad").await.get("/", &[]).await;
        assert_eq!(got.status, status, "{bytes:?}: {got:?}");
        world.counted(&["istio_requests_total", &format!("response_flags=\"{flag}\"")]).await;
    }
}

#[tokio::test]
async fn smuggled_requests_never_reach_an_application() {
    let second = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let heads = [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /a%00b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nConnection: close\r\n\r\n",
        "GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
    ];
    let reached = Arc::new(AtomicUsize::new(0));
    let count = reached.clone();
    let app = raw(move |_io| {
        let count = count.clone();
        async move {
            count.fetch_add(1, SeqCst);
        }
    });
    let world = World::new().service("reviews").pod("v1", &["reviews"], app).apply();
    for head in heads {
        let close = head.contains("Connection: close");
        let sent = if close { head.to_owned() } else { format!("{head}{second}") };
        let answer = exchange_raw(&world, "reviews", sent.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{head:?} got {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{head:?} got {answer:?}");
        assert_eq!(reached.load(SeqCst), 0, "{head:?} reached the application");
    }
    world.counted(&["istio_requests_total", "response_flags=\"DPE\"", "response_code=\"400\""]).await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let world = World::new().service("reviews").pod("v1", &["reviews"], echo("v1")).apply();
    let sent = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\
                POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n\
                POST /3 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
                GET /4 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = exchange_raw(&world, "reviews", sent.as_bytes()).await;
    let asked: Vec<_> =
        answer.lines().filter(|line| line.starts_with("GET /") || line.starts_with("POST /")).collect();
    assert_eq!(asked, ["GET /1", "POST /2", "POST /3", "GET /4"], "{answer}");
}

#[tokio::test]
async fn a_client_that_half_closes_gets_its_answer() {
    let world = World::new().service("reviews").pod("v1", &["reviews"], echo("v1")).apply();
    let answer = exchange_raw(&world, "reviews", b"GET /half HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(answer.contains("GET /half"), "{answer}");
}

#[tokio::test]
async fn too_much_head_is_431() {
    let world = World::new().service("reviews").pod("v1", &["reviews"], echo("v1")).apply();
    let mut io = world.connect("reviews");
    let huge = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(80 << 10));
    // The proxy stops reading: the rest of what we send may have nowhere to go.
    let _ = tokio::time::timeout(Duration::from_secs(1), io.write_all(huge.as_bytes())).await;
    let mut answer = vec![0; 64];
    let count = tokio::time::timeout(Duration::from_secs(5), io.read(&mut answer)).await.unwrap().unwrap();
    assert!(answer[..count].starts_with(b"HTTP/1.1 431 "), "{:?}", String::from_utf8_lossy(&answer[..count]));
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_is_cut_off_and_an_idle_connection_is_not() {
    let world = World::new().service("reviews").pod("v1", &["reviews"], echo("v1")).apply();
    let mut client = world.client("reviews").await;
    client.get("/", &[]).await;
    tokio::time::sleep(Duration::from_secs(1800)).await;
    assert_eq!(client.get("/", &[]).await.status, 200, "half an hour later");

    let mut io = world.connect("reviews");
    io.write_all(b"GET / HTTP/1.1\r\nHos").await.unwrap();
    let started = tokio::time::Instant::now();
    let mut answer = Vec::new();
    let _ = io.read_to_end(&mut answer).await;
    assert!((15..17).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_claimed_client_is_the_proven_one() {
    let world = World::new().service("reviews").pod("v1", &["reviews"], echo("v1")).apply();
    for client in ["web", "batch"] {
        let mut http = Client::http1(world.connect_as(client, "reviews")).await;
        let forged = "spiffe://cluster.local/ns/shop/sa/admin";
        let got = http
            .get(
                "/",
                &[("x-undermesh-client", forged), ("x-forwarded-client-cert", &format!("URI={forged}"))],
            )
            .await;
        assert!(!got.body.contains("admin"), "{}", got.body);
        assert!(
            got.body.contains(&format!("URI=spiffe://cluster.local/ns/shop/sa/{client}")),
            "{}",
            got.body
        );
    }
    let dialled: Vec<_> =
        world.dial.dialled.lock().unwrap().iter().map(|(_, client)| client.clone()).collect();
    assert_eq!(dialled, [identity("web"), identity("batch")], "clients do not share upstream connections");
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_is_replaced_unseen() {
    let once = answers(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    let world = World::new().service("reviews").pod("v1", &["reviews"], once).apply();
    let mut client = world.client("reviews").await;
    for _ in 0..20 {
        assert_eq!(client.get("/", &[]).await.body, "ok");
    }
}

fn grpc_like() -> App {
    raw(|io| async move {
        let service = service_fn(|request: Request<hyper::body::Incoming>| async move {
            let body = request.into_body().collect().await?.to_bytes();
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            trailers.insert("grpc-message", "fine".parse().unwrap());
            let frames: Vec<Result<Frame<Bytes>, hyper::Error>> =
                vec![Ok(Frame::data(body)), Ok(Frame::trailers(trailers))];
            let body = StreamBody::new(futures_util::stream::iter(frames));
            Ok::<_, hyper::Error>(
                Response::builder().header("content-type", "application/grpc").body(body).unwrap(),
            )
        });
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(io), service)
            .await;
    })
}

#[tokio::test]
async fn grpc_passes_with_its_trailers() {
    let world = World::new().service("ratings").pod("r", &["ratings"], grpc_like()).apply();
    let mut client = Client::http2(world.connect("ratings")).await;
    for _ in 0..5 {
        let request = Request::post("http://ratings/pkg.Service/Method")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::from("message"))
            .unwrap();
        let got = collect(client.send(request).await.unwrap()).await.unwrap();
        assert_eq!((got.status, got.body.as_str()), (200, "message"));
        assert_eq!(got.trailers.unwrap()["grpc-status"], "0");
    }
    assert_eq!(world.dials(), 1, "one HTTP/2 connection is shared");
    world
        .counted(&["istio_requests_total", "grpc_response_status=\"0\"", "request_protocol=\"grpc\"", "} 5"])
        .await;
}

#[tokio::test]
async fn an_upgrade_carries_bytes_both_ways() {
    let app = raw(|mut io| async move {
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n") {
            if io.read_buf(&mut seen).await.unwrap() == 0 {
                return;
            }
        }
        let seen = String::from_utf8(seen).unwrap().to_ascii_lowercase();
        assert!(seen.contains("upgrade: websocket") && seen.contains("connection: upgrade"), "{seen}");
        let answer =
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello ";
        io.write_all(answer.as_bytes()).await.unwrap();
        let (mut read, mut write) = tokio::io::split(io);
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let world = World::new().service("chat").pod("c", &["chat"], app).apply();
    let mut io = world.connect("chat");
    // The first frame comes before the answer: it must wait for the 101.
    let asked = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst ";
    io.write_all(asked.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        assert!(io.read_buf(&mut head).await.unwrap() > 0, "{}", String::from_utf8_lossy(&head));
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    io.write_all(b"GET /smuggled HTTP/1.1\r\n\r\n").await.unwrap();
    io.shutdown().await.unwrap();
    let end = head.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let mut rest = head.split_off(end);
    io.read_to_end(&mut rest).await.unwrap();
    assert_eq!(String::from_utf8(rest).unwrap(), "hello first GET /smuggled HTTP/1.1\r\n\r\n");
    world.counted(&["istio_requests_total", "response_code=\"101\"", "response_flags=\"-\""]).await;
}

/// Sends as much as it can; what it got rid of is in the counter.
fn fountain(sent: Arc<AtomicUsize>, total: usize) -> App {
    raw(move |mut io| {
        let sent = sent.clone();
        async move {
            let mut seen = vec![0; 4096];
            let _ = io.read(&mut seen).await;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {total}\r\n\r\n");
            if io.write_all(head.as_bytes()).await.is_err() {
                return;
            }
            let piece = vec![b'x'; 16 << 10];
            while sent.load(SeqCst) < total {
                let want = piece.len().min(total - sent.load(SeqCst));
                match io.write(&piece[..want]).await {
                    Ok(count) => sent.fetch_add(count, SeqCst),
                    Err(_) => return,
                };
            }
            let _ = io.read(&mut seen).await;
        }
    })
}

#[tokio::test]
async fn a_large_body_streams_through_whole() {
    let total = 32 << 20;
    let sent = Arc::new(AtomicUsize::new(0));
    let world = World::new().service("big").pod("b", &["big"], fountain(sent, total)).apply();
    let mut client = world.client("big").await;
    let got = client.get("/", &[]).await;
    assert_eq!((got.status, got.body.len()), (200, total));
}

#[tokio::test]
async fn a_reader_that_stops_stops_the_sender() {
    let total = 256 << 20;
    let sent = Arc::new(AtomicUsize::new(0));
    let world = World::new().service("big").pod("b", &["big"], fountain(sent.clone(), total)).apply();
    let mut io = world.connect("big");
    io.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut first = vec![0; 1024];
    assert!(io.read(&mut first).await.unwrap() > 0);
    // Wait until nothing moves any more.
    let mut before = usize::MAX;
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = sent.load(SeqCst);
        if now == before {
            break;
        }
        before = now;
    }
    assert!(before < 2 << 20, "{before} bytes are held for a client that does not read");
}

#[tokio::test]
async fn a_large_upload_is_not_collected_either() {
    let (seen, wait) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Notify::new()));
    let (count, go) = (seen.clone(), wait.clone());
    let app = raw(move |mut io| {
        let (count, go) = (count.clone(), go.clone());
        async move {
            go.notified().await;
            let mut sink = vec![0; 64 << 10];
            while let Ok(read @ 1..) = io.read(&mut sink).await {
                if count.fetch_add(read, SeqCst) + read > 8 << 20 {
                    let _ = io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
                }
            }
        }
    });
    let world = World::new().service("sink").pod("s", &["sink"], app).apply();
    let mut io = world.connect("sink");
    let total = 8 << 20;
    io.write_all(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {total}\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let piece = vec![b'x'; 64 << 10];
    let mut pushed = 0;
    while let Ok(Ok(count)) = tokio::time::timeout(Duration::from_millis(200), io.write(&piece)).await {
        pushed += count;
    }
    assert!(pushed < 2 << 20, "{pushed} bytes are held for an application that does not read");
    wait.notify_one();
    while pushed < total {
        pushed += io.write(&piece[..piece.len().min(total - pushed)]).await.unwrap();
    }
    let mut answer = vec![0; 64];
    let count = io.read(&mut answer).await.unwrap();
    assert!(answer[..count].starts_with(b"HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_client_that_leaves_is_recorded() {
    let world = World::new().service("slow").pod("s", &["slow"], silent()).apply();
    let mut client = Client::http2(world.connect("slow")).await;
    let request = Request::get("http://slow/").body(Full::default()).unwrap();
    let pending = client.send(request);
    assert!(tokio::time::timeout(Duration::from_millis(50), pending).await.is_err());
    drop(client);
    world.counted(&["istio_requests_total", "response_flags=\"DC\"", "response_code=\"0\""]).await;
}

#[tokio::test]
async fn draining_lets_the_running_exchange_finish() {
    let go = Arc::new(tokio::sync::Notify::new());
    let (wait, asked) = (go.clone(), Arc::new(tokio::sync::Notify::new()));
    let seen = asked.clone();
    let app = raw(move |mut io| {
        let (wait, seen) = (wait.clone(), seen.clone());
        async move {
            let mut sink = vec![0; 4096];
            let _ = io.read(&mut sink).await;
            seen.notify_one();
            wait.notified().await;
            let _ = io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await;
        }
    });
    let world = World::new().service("slow").pod("s", &["slow"], app).apply();
    let mut client = world.client("slow").await;
    let request = Request::get("/").header("host", "a").body(Full::default()).unwrap();
    let (response, ()) = tokio::join!(client.send(request), async {
        asked.notified().await;
        world.drain.start();
        go.notify_one();
    });
    let got = collect(response.unwrap()).await.unwrap();
    assert_eq!(got.body, "done");
    assert_eq!(got.headers["connection"], "close");
}
