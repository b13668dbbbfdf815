use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_core::limits::{TLS_HANDSHAKE, TUNNEL_IDLE, TUNNEL_STREAMS};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::TcpListener,
    sync::mpsc,
};

use super::*;
use crate::{
    copy::{Plain, TransferCounters, copy_bidirectional},
    drain::{self, Drain, Draining},
    identity::WorkloadCertificate,
    task::TaskGroup,
    testing::{FixedCertificates, MiniCa},
    tls::Ciphers,
};

fn id(sa: &str) -> Identity {
    Identity::new("cluster.local", "shop", sa)
}

/// Counts TCP connections.
#[derive(Default)]
struct Counting(AtomicUsize);

impl Connector for Counting {
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(TcpStream::connect(to))
    }
}

impl Counting {
    fn made(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// A client `web` and a server `cart`.
struct World {
    ca: MiniCa,
    certificates: Arc<FixedCertificates>,
    tcp: Arc<Counting>,
    tasks: TaskGroup,
    drain: Drain,
    draining: Draining,
    pool: Pool,
}

impl World {
    fn new() -> Self {
        let ca = MiniCa::new();
        let certificates = FixedCertificates::new([ca.certificate(&id("web"))]);
        let tasks = TaskGroup::new();
        let pool = Pool::new(certificates.clone(), tasks.clone(), Draining::never());
        let (drain, draining) = drain::channel();
        Self { ca, certificates, tcp: Arc::default(), tasks, drain, draining, pool }
    }

    fn serving(&self, certificate: &WorkloadCertificate) -> Serving {
        Serving { tls: certificate.server_tls(), draining: self.draining.clone(), tasks: self.tasks.clone() }
    }

    /// A server that runs `handler` for each stream, and a channel of how its connections ended.
    async fn serve<H, F>(&self, handler: H) -> (SocketAddr, mpsc::Receiver<Ended>)
    where
        H: Fn(Incoming) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let cx = self.serving(&self.ca.certificate(&id("cart")));
        let (sender, ended) = mpsc::channel(16);
        let tasks = self.tasks.clone();
        self.tasks.spawn(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                let (cx, handler, sender) = (cx.clone(), handler.clone(), sender.clone());
                tasks.spawn(async move {
                    let end = serve_connection(arrived(tcp, peer), cx, handler).await;
                    let _ = sender.send(end).await;
                });
            }
        });
        (addr, ended)
    }

    fn dial(&self, to: SocketAddr) -> Dial {
        Dial {
            identity: id("web"),
            hop: Hop { dial: to, expect: vec![id("cart")] },
            source: "10.0.0.1".parse().unwrap(),
            authority: "10.0.0.2:80".into(),
            headers: TunnelHeaders::default(),
            connect: self.tcp.clone(),
        }
    }
}

fn arrived<T>(io: T, peer: SocketAddr) -> Carrier<T> {
    Handshakes::default().admit(io, peer).unwrap()
}

/// Sends back what comes, and half-closes when the peer does.
async fn echo(incoming: Incoming) {
    let mut stream = incoming.accept(Some("service.name=cart")).unwrap();
    let mut buffer = vec![0; 16 << 10];
    while let Ok(n) = stream.read(&mut buffer).await {
        if n == 0 {
            let _ = stream.shutdown().await;
            return;
        }
        if stream.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

async fn round_trip(stream: &mut TunnelStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(back, text);
}

#[tokio::test]
async fn a_stream_carries_bytes_headers_and_identities() {
    let world = World::new();
    let (seen, mut heard) = mpsc::channel(1);
    let (addr, _ended) = world
        .serve(move |incoming: Incoming| {
            let seen = seen.clone();
            async move {
                let facts = (incoming.authority.clone(), incoming.headers.clone(), incoming.peer.clone());
                seen.send(facts).await.unwrap();
                echo(incoming).await;
            }
        })
        .await;
    let headers = TunnelHeaders {
        baggage: Some("service.name=web".into()),
        forwarded: Some("for=\"10.0.0.1:5\"".into()),
        client_claim: Some(id("original")),
    };
    for authority in ["10.0.0.2:80", "[fd00::1]:8080", "cart.shop.svc:80"] {
        let dial = Dial { headers: headers.clone(), authority: authority.into(), ..world.dial(addr) };
        let mut stream = world.pool.open(dial).await.unwrap();
        assert_eq!(heard.recv().await.unwrap(), (authority.to_owned(), headers.clone(), id("web")));
        assert_eq!((stream.peer(), stream.baggage()), (&id("cart"), Some("service.name=cart")));
        round_trip(&mut stream, b"hello").await;
        // Half-close: our end is done, the answer still comes.
        stream.write_all(b"last words").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"last words");
    }
    assert_eq!(world.tcp.made(), 1, "one connection carries them all");
}

#[tokio::test]
async fn the_wrong_peer_gets_no_stream() {
    let world = World::new();
    let (addr, _ended) = world.serve(|_| async { panic!("must not be reached") }).await;
    let mut dial = world.dial(addr);
    dial.hop.expect = vec![id("reviews")];
    let error = world.pool.open(dial).await.unwrap_err();
    assert!(matches!(error, DialError::WrongPeer(_)), "{error}");
    assert_eq!(error.flag(), Flag::PeerIdentity);
    assert_eq!(world.tasks.panics(), 0);
}

#[tokio::test]
async fn without_a_certificate_nothing_is_dialled() {
    let world = World::new();
    let dial = Dial { identity: id("nobody"), ..world.dial("127.0.0.1:1".parse().unwrap()) };
    let error = world.pool.open(dial).await.unwrap_err();
    assert_eq!((error.flag(), world.tcp.made()), (Flag::CertificateMissing, 0));
}

#[tokio::test]
async fn the_servers_verdict_on_our_certificate_is_a_tls_failure() {
    let world = World::new();
    let stranger = World::new();
    let (addr, mut ended) = stranger.serve(echo).await;
    // The client trusts the server's CA, but not the reverse.
    let mut issued = world.ca.issue(crate::testing::Leaf::of(&id("web")));
    issued.roots = vec![stranger.ca.root()];
    world.certificates.replace(Arc::new(WorkloadCertificate::new(issued, 77, Ciphers::default()).unwrap()));
    let error = world.pool.open(world.dial(addr)).await.unwrap_err();
    assert_eq!(error.flag(), Flag::TlsFailure, "{error:?}");
    assert_eq!(ended.recv().await.unwrap().flag(), Some(Flag::TlsFailure));
}

#[tokio::test]
async fn a_refusal_tells_status_and_flag() {
    let world = World::new();
    let (addr, _ended) =
        world.serve(|incoming: Incoming| async { incoming.refuse(401, Flag::PolicyDenied) }).await;
    let error = world.pool.open(world.dial(addr)).await.unwrap_err();
    assert!(matches!(error, DialError::Status { status: 401, flag: Some(Flag::PolicyDenied) }), "{error:?}");
    assert_eq!(error.flag(), Flag::UpstreamStatus);
}

#[tokio::test]
async fn many_at_once_share_one_handshake() {
    let world = World::new();
    let (addr, _ended) = world.serve(echo).await;
    let opens = (0..50).map(|_| world.pool.open(world.dial(addr)));
    let streams = futures_util::future::join_all(opens).await;
    assert!(streams.iter().all(Result::is_ok));
    assert_eq!(world.tcp.made(), 1);
    assert_eq!(world.pool.status()[0].streams, 50);
    drop(streams);
    assert_eq!(world.pool.status()[0].streams, 0);
}

#[tokio::test]
async fn everyone_who_waits_learns_of_the_failure() {
    let world = World::new();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let outcomes = futures_util::future::join_all((0..20).map(|_| world.pool.open(world.dial(closed)))).await;
    assert!(outcomes.iter().all(|o| o.as_ref().is_err_and(|e| e.flag() == Flag::UpstreamRefused)));
    assert_eq!(world.tcp.made(), 1);
}

#[tokio::test]
async fn the_hundredth_stream_retires_a_connection() {
    let world = World::new();
    let (addr, _ended) = world.serve(echo).await;
    let mut streams = Vec::new();
    for _ in 0..TUNNEL_STREAMS {
        streams.push(world.pool.open(world.dial(addr)).await.unwrap());
    }
    assert_eq!(world.tcp.made(), 1);
    // Even when places become free again: it has served its time.
    streams.truncate(50);
    let mut next = world.pool.open(world.dial(addr)).await.unwrap();
    assert_eq!((world.tcp.made(), world.pool.status().len()), (2, 1));
    round_trip(&mut next, b"on the second").await;
    round_trip(&mut streams[0], b"on the first").await;
}

#[tokio::test]
async fn each_source_identity_and_generation_has_its_own_connection() {
    let world = World::new();
    let (addr, _ended) = world.serve(echo).await;
    let _first = world.pool.open(world.dial(addr)).await.unwrap();
    let other = Dial { source: "10.0.0.9".parse().unwrap(), ..world.dial(addr) };
    let _second = world.pool.open(other).await.unwrap();
    assert_eq!(world.tcp.made(), 2);
    world.certificates.replace(world.ca.certificate(&id("web")));
    let _third = world.pool.open(world.dial(addr)).await.unwrap();
    assert_eq!(world.tcp.made(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_black_hole_costs_ten_seconds_once() {
    let world = World::new();
    // Accepts TCP by its backlog, and never says anything.
    let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dial = world.dial(hole.local_addr().unwrap());
    let begin = tokio::time::Instant::now();
    let both = futures_util::future::join_all([world.pool.open(dial.clone()), world.pool.open(dial.clone())]);
    for outcome in both.await {
        let error = outcome.unwrap_err();
        assert!(matches!(error, DialError::Deadline { phase: Phase::Tls, .. }), "{error:?}");
        assert_eq!(error.flag(), Flag::HandshakeTimeout);
    }
    assert_eq!(begin.elapsed().as_secs(), TLS_HANDSHAKE.as_secs());
    // The next one fails at once instead of queueing up behind another ten seconds.
    assert!(world.pool.open(dial.clone()).await.is_err());
    assert_eq!(begin.elapsed().as_secs(), TLS_HANDSHAKE.as_secs());
    assert_eq!(world.tcp.made(), 1);
    tokio::time::advance(std::time::Duration::from_secs(2)).await;
    assert!(world.pool.open(dial).await.is_err());
    assert_eq!(world.tcp.made(), 2, "and later it is tried again");
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_cut_by_the_deadline() {
    let world = World::new();
    let (_client, server) = duplex(1024);
    let cx = world.serving(&world.ca.certificate(&id("cart")));
    let begin = tokio::time::Instant::now();
    let end = serve_connection(arrived(server, "10.0.0.1:5".parse().unwrap()), cx, echo).await;
    assert!(matches!(end, Ended::Deadline), "{end:?}");
    assert_eq!(begin.elapsed(), TLS_HANDSHAKE);
}

#[tokio::test]
async fn plaintext_is_a_tls_failure() {
    let world = World::new();
    let (mut client, server) = duplex(1024);
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let cx = world.serving(&world.ca.certificate(&id("cart")));
    let end = serve_connection(arrived(server, "10.0.0.1:5".parse().unwrap()), cx, echo).await;
    assert_eq!(end.flag(), Some(Flag::TlsFailure));
}

#[test]
fn handshakes_are_bounded_in_all_and_per_source() {
    let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
    let handshakes = Handshakes::new(3, 2);
    let first = handshakes.begin(a).unwrap();
    let _second = handshakes.begin(a).unwrap();
    assert!(handshakes.begin(a).is_none(), "two per source");
    let third = handshakes.begin(b).unwrap();
    assert!(handshakes.begin(b).is_none(), "three in all");
    drop((first, third));
    assert!(handshakes.begin(a).is_some());
}

#[tokio::test]
async fn a_drain_lets_streams_finish_and_takes_no_new_ones() {
    let world = World::new();
    let (addr, mut ended) = world.serve(echo).await;
    let mut stream = world.pool.open(world.dial(addr)).await.unwrap();
    round_trip(&mut stream, b"before").await;
    world.drain.start();
    // The server refuses new connections at once; the old one says GOAWAY, so that the pool must leave it.
    let wait = async {
        while world.pool.open(world.dial(addr)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), wait).await.unwrap();
    round_trip(&mut stream, b"after").await;
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    drop(stream);
    loop {
        if let Ended::Closed { peer, streams } = ended.recv().await.unwrap() {
            assert_eq!(peer, id("web"));
            assert!(streams >= 1);
            return;
        }
    }
}

#[tokio::test]
async fn force_cuts_what_is_left() {
    let world = World::new();
    let (addr, mut ended) = world.serve(echo).await;
    let mut stream = world.pool.open(world.dial(addr)).await.unwrap();
    round_trip(&mut stream, b"before").await;
    world.drain.force();
    assert!(matches!(stream.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    assert!(matches!(ended.recv().await.unwrap(), Ended::Closed { .. }));
}

#[tokio::test]
async fn a_cancelled_stream_ends_as_if_closed() {
    let world = World::new();
    let (addr, _ended) = world
        .serve(|incoming: Incoming| async {
            let mut stream = incoming.accept(None).unwrap();
            stream.read_exact(&mut [0; 2]).await.unwrap();
            stream.cancel();
        })
        .await;
    let mut stream = world.pool.open(world.dial(addr)).await.unwrap();
    stream.write_all(b"hi").await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    let mut other = world.pool.open(world.dial(addr)).await.unwrap();
    other.write_all(b"ok").await.unwrap();
    assert_eq!(world.tcp.made(), 1, "the connection survives");
}

#[tokio::test]
async fn a_hundred_streams_carry_their_bytes_apart() {
    let world = World::new();
    let (addr, _ended) = world.serve(echo).await;
    let one = |n: u8| {
        let open = world.pool.open(world.dial(addr));
        async move {
            let stream = open.await.unwrap();
            let (mut read, mut write) = tokio::io::split(stream);
            let data: Vec<u8> = (0..64 << 10).map(|i: u32| (i.wrapping_mul(31) as u8) ^ n).collect();
            let sent = data.clone();
            let send = async move {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let mut back = Vec::new();
            let (got, ()) = tokio::join!(read.read_to_end(&mut back), send);
            got.unwrap();
            assert!(back == data, "stream {n}");
        }
    };
    futures_util::future::join_all((0..100).map(one)).await;
    assert_eq!(world.tcp.made(), 1);
}

/// Application → copy → tunnel → copy → application, 16 MiB each way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_through_both_copies_arrives_whole() {
    const N: usize = 16 << 20;
    let world = World::new();
    let (addr, _ended) = world
        .serve(|incoming: Incoming| async {
            let mut tunnel = incoming.accept(None).unwrap();
            let (app, agent) = duplex(1 << 20);
            let counters = TransferCounters::default();
            let mut agent = Plain(agent);
            let carry = copy_bidirectional(&mut tunnel, &mut agent, &counters);
            let serve = async move {
                let (mut read, mut write) = tokio::io::split(app);
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let (done, ()) = tokio::join!(carry, serve);
            assert_eq!(done.unwrap().a_to_b, N as u64);
        })
        .await;
    let mut tunnel = world.pool.open(world.dial(addr)).await.unwrap();
    let (app, agent) = duplex(1 << 20);
    let client = async move {
        let (mut read, mut write) = tokio::io::split(app);
        let send = async move {
            for i in 0..N / 4096 {
                write.write_all(&[i as u8; 4096]).await.unwrap();
            }
            write.shutdown().await.unwrap();
        };
        let mut back = Vec::new();
        let (got, ()) = tokio::join!(read.read_to_end(&mut back), send);
        assert_eq!(got.unwrap(), N);
        assert!(back.chunks(4096).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
    };
    let counters = TransferCounters::default();
    let mut agent = Plain(agent);
    let (done, ()) = tokio::join!(copy_bidirectional(&mut agent, &mut tunnel, &counters), client);
    assert_eq!(done.unwrap().b_to_a, N as u64);
    assert_eq!(world.tasks.panics(), 0);
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_five_minutes() {
    let world = World::new();
    let (addr, mut ended) = world.serve(echo).await;
    let mut stream = world.pool.open(world.dial(addr)).await.unwrap();
    round_trip(&mut stream, b"hi").await;
    drop(stream);
    // Not earlier: a paused clock runs ahead whenever a handshake waits for its socket.
    tokio::time::pause();
    let begin = tokio::time::Instant::now();
    assert!(matches!(ended.recv().await.unwrap(), Ended::Closed { .. }));
    let after = begin.elapsed();
    assert!(after >= TUNNEL_IDLE && after < TUNNEL_IDLE * 2, "{after:?}");
    assert!(world.pool.status().is_empty());
}

/// A raw HTTP/2 client with a good certificate.
async fn raw(world: &World, addr: SocketAddr) -> h2::client::SendRequest<bytes::Bytes> {
    let tcp = TcpStream::connect(addr).await.unwrap();
    let certificate = world.ca.certificate(&id("web"));
    let (tls, _) = certificate.client_tls().connect(tcp, vec![id("cart")]).await.unwrap();
    let (request, connection) = h2::client::handshake(tls).await.unwrap();
    world.tasks.spawn(async move {
        let _ = connection.await;
    });
    request
}

#[tokio::test]
async fn anything_but_a_plain_connect_is_a_bad_request() {
    let world = World::new();
    let (addr, _ended) = world.serve(|_| async { panic!("must not be reached") }).await;
    let get = http::Request::get("https://10.0.0.2/").body(()).unwrap();
    let claim = |claims: &[&str]| {
        let mut request = dial::request("10.0.0.2:80", &TunnelHeaders::default()).unwrap();
        for claim in claims {
            request.headers_mut().append(mesh_core::tunnel::CLIENT_HEADER, claim.parse().unwrap());
        }
        request
    };
    let twice = claim(&["spiffe://td/ns/a/sa/b", "spiffe://td/ns/a/sa/c"]);
    for request in [get, twice, claim(&["somebody"])] {
        let (answer, _) = raw(&world, addr).await.send_request(request, false).unwrap();
        assert_eq!(answer.await.unwrap().status(), 400);
    }
    assert_eq!(world.tasks.panics(), 0);
}

#[tokio::test]
async fn a_rapid_reset_ends_the_connection_not_the_server() {
    let world = World::new();
    let (addr, mut ended) = world.serve(echo).await;
    let mut attacker = raw(&world, addr).await;
    let attack = async {
        loop {
            let request = dial::request("10.0.0.2:80", &TunnelHeaders::default()).unwrap();
            let Ok(mut ready) = attacker.clone().ready().await else { return };
            let Ok((_, mut send)) = ready.send_request(request, false) else { return };
            send.send_reset(h2::Reason::CANCEL);
            attacker = ready;
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), attack).await.expect("the attacker is cut");
    assert!(matches!(ended.recv().await.unwrap(), Ended::Closed { .. }));
    let mut stream = world.pool.open(world.dial(addr)).await.unwrap();
    round_trip(&mut stream, b"others are served").await;
}
