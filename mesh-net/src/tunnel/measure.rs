//! What a tunnel costs over loopback, between two runtimes: `cargo test -p mesh-net measure -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    runtime::Runtime,
};

use super::*;
use crate::{
    copy::{Endpoint, Reader},
    drain::Draining,
    task::TaskGroup,
    testing::{FixedCertificates, MiniCa},
};

const RUN: Duration = Duration::from_secs(4);

fn id(sa: &str) -> Identity {
    Identity::new("cluster.local", "shop", sa)
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Sends back what comes.
async fn echo(incoming: Incoming) {
    let mut stream = incoming.accept(None).unwrap();
    let mut reader = Reader::default();
    loop {
        let Ok(mut chunk) = std::future::poll_fn(|cx| stream.poll_chunk(cx, &mut reader)).await else {
            return;
        };
        if chunk.is_empty() {
            return;
        }
        while !chunk.is_empty() {
            if std::future::poll_fn(|cx| stream.poll_send(cx, &mut chunk)).await.is_err() {
                return;
            }
        }
    }
}

/// Memory of the process, bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

struct Nodes {
    client: Runtime,
    _server: Runtime,
    pool: Pool,
    to: SocketAddr,
    _tasks: TaskGroup,
}

impl Nodes {
    fn new() -> Self {
        let (client, server) = (runtime(), runtime());
        let ca = MiniCa::new();
        let (tasks, certificates) = (TaskGroup::new(), FixedCertificates::new([ca.certificate(&id("web"))]));
        let pool = Pool::new(certificates, tasks.clone(), Draining::never());
        let cx = Serving {
            tls: ca.certificate(&id("cart")).server_tls(),
            draining: Draining::never(),
            tasks: tasks.clone(),
        };
        let listener = server.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let to = listener.local_addr().unwrap();
        let group = tasks.clone();
        let _inside = server.enter();
        tasks.spawn(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                tcp.set_nodelay(true).unwrap();
                let carrier = Handshakes::default().admit(tcp, peer).unwrap();
                let cx = cx.clone();
                group.spawn(async move {
                    serve_connection(carrier, cx, echo).await;
                });
            }
        });
        drop(_inside);
        Self { client, _server: server, pool, to, _tasks: tasks }
    }

    fn dial(to: SocketAddr) -> Dial {
        Dial {
            identity: id("web"),
            hop: Hop { dial: to, expect: vec![id("cart")] },
            source: "10.0.0.1".parse().unwrap(),
            authority: "10.0.0.2:80".into(),
            headers: TunnelHeaders::default(),
            connect: Arc::new(DirectConnector),
        }
    }

    async fn open(pool: Pool, to: SocketAddr) -> TunnelStream {
        pool.open(Self::dial(to)).await.unwrap()
    }

    /// Round trips of one byte on `streams` streams, one every `pace` if it is not zero.
    fn ping_pong(&self, streams: usize, pace: Duration) {
        let one = |pool: Pool, to: SocketAddr| async move {
            let mut stream = Self::open(pool, to).await;
            let mut took = Vec::with_capacity(1 << 20);
            let begin = Instant::now();
            while begin.elapsed() < RUN {
                let sent = Instant::now();
                stream.write_all(b"x").await.unwrap();
                stream.read_exact(&mut [0; 1]).await.unwrap();
                took.push(sent.elapsed());
                if !pace.is_zero() {
                    tokio::time::sleep(pace).await;
                }
            }
            took
        };
        let (sender, mut done) = tokio::sync::mpsc::channel(streams);
        for _ in 0..streams {
            let (work, sender) = (one(self.pool.clone(), self.to), sender.clone());
            drop(self.client.spawn(async move { sender.send(work.await).await }));
        }
        drop(sender);
        let mut all = Vec::new();
        while let Some(took) = done.blocking_recv() {
            all.extend(took);
        }
        all.sort();
        let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
        println!(
            "ping-pong, {streams} streams, pace {pace:?}: {:.0}/s, p50 {:.1}, p90 {:.1}, p99 {:.1}, p99.9 {:.1} us",
            all.len() as f64 / RUN.as_secs_f64(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999)
        );
    }

    /// Round trips of one byte beside a stream that carries as much as it can.
    fn mice_and_elephant(&self) {
        let (pool, to) = (self.pool.clone(), self.to);
        let elephant = self.client.spawn(async move {
            let (mut read, mut write) = tokio::io::split(Self::open(pool, to).await);
            let send = async {
                let data = vec![7; 256 << 10];
                while write.write_all(&data).await.is_ok() {}
            };
            let receive = async {
                let mut buffer = vec![0; 256 << 10];
                while read.read(&mut buffer).await.is_ok() {}
            };
            tokio::join!(send, receive);
        });
        print!("beside an elephant: ");
        self.ping_pong(8, Duration::from_millis(4));
        elephant.abort();
    }

    /// What streams and connections without traffic hold, both ends together.
    fn idle(&self) {
        let open = |source: u8, streams: usize| {
            let (pool, to) = (self.pool.clone(), self.to);
            self.client.block_on(async move {
                let mut all = Vec::new();
                for _ in 0..streams {
                    let dial = Dial { source: [10, 0, 1, source].into(), ..Self::dial(to) };
                    let mut stream = pool.open(dial).await.unwrap();
                    stream.write_all(b"x").await.unwrap();
                    stream.read_exact(&mut [0; 1]).await.unwrap();
                    all.push(stream);
                }
                all
            })
        };
        let _warm = open(0, 50);
        let before = resident();
        let connections: Vec<_> = (1..=100).map(|source| open(source, 1)).collect();
        let one_each = resident();
        let streams: Vec<_> = (1..=100).map(|source| open(source, 80)).collect();
        let many = resident();
        println!(
            "idle, both ends: {} bytes a connection, {} a stream with its task",
            (one_each - before) / connections.len(),
            (many - one_each) / streams.iter().map(Vec::len).sum::<usize>()
        );
    }

    /// Bytes there and back again on `streams` streams.
    fn bulk(&self, streams: usize) {
        let one = |pool: Pool, to: SocketAddr| async move {
            let (mut read, mut write) = tokio::io::split(Self::open(pool, to).await);
            let begin = Instant::now();
            let send = async {
                let data = vec![7; 256 << 10];
                while begin.elapsed() < RUN {
                    write.write_all(&data).await.unwrap();
                }
            };
            let receive = async {
                let (mut buffer, mut total) = (vec![0; 256 << 10], 0);
                while begin.elapsed() < RUN {
                    total += read.read(&mut buffer).await.unwrap();
                }
                total
            };
            tokio::select! { total = receive => total, () = async { send.await; std::future::pending().await } => 0 }
        };
        let (sender, mut done) = tokio::sync::mpsc::channel(streams);
        for _ in 0..streams {
            let (work, sender) = (one(self.pool.clone(), self.to), sender.clone());
            drop(self.client.spawn(async move { sender.send(work.await).await }));
        }
        drop(sender);
        let mut total = 0;
        while let Some(bytes) = done.blocking_recv() {
            total += bytes;
        }
        println!("echoed bulk, {streams} streams: {:.0} MB/s", total as f64 / RUN.as_secs_f64() / 1e6);
    }
}

#[test]
#[ignore = "a measurement"]
fn measure() {
    let nodes = Nodes::new();
    nodes.idle();
    for streams in [1, 8, 32] {
        nodes.ping_pong(streams, Duration::ZERO);
    }
    for streams in [1, 8, 32] {
        nodes.ping_pong(streams, Duration::from_millis(4));
    }
    nodes.mice_and_elephant();
    for streams in [1, 8] {
        nodes.bulk(streams);
    }
}
