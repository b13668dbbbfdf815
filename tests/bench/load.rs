//! Generators and measurements. Client and server threads live in the pods' namespaces.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use mesh_tests::{
    Pod, netns,
    peer::{Behaviour, PEER_DEADLINE, Server, dial},
};

use crate::usage::{Processes, softirq_seconds};

/// Port of every server here.
pub const PORT: u16 = 9000;
/// One throughput sample.
const BULK: Duration = Duration::from_millis(1200);
/// Streams of the second throughput sample.
const STREAMS: usize = 8;
/// Round trips of one latency sample.
const ROUND_TRIPS: usize = 1500;
/// Connections of one connection-rate sample.
const CONNECTS: usize = 300;
/// Idle connections for the memory figure.
const IDLE: usize = 1000;
/// Bytes of a ping.
const PING_BYTES: usize = 64;

/// Somewhere to send load, and the processes that carry it.
pub struct Target {
    pub name: &'static str,
    client: Pod,
    to: SocketAddr,
    carriers: Processes,
}

impl Target {
    pub fn new(name: &'static str, client: &Pod, to: SocketAddr, carriers: Processes) -> Self {
        Self { name, client: client.clone(), to, carriers }
    }
}

/// One sample of everything, for one target.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Bytes per second, one stream.
    pub bytes_per_second: f64,
    /// Bytes per second, eight streams together.
    pub bytes_per_second_8: f64,
    /// CPU-seconds of the carriers and of softirq per 10^9 bytes, one stream.
    pub cpu_per_gb: f64,
    /// The same with eight streams.
    pub cpu_per_gb_8: f64,
    /// Round trip of 64 bytes, seconds.
    pub p50: f64,
    /// The same, 99th percentile.
    pub p99: f64,
    /// Connect + 64 bytes + close, per second.
    pub connects_per_second: f64,
    /// CPU-seconds of the carriers and of softirq per connection.
    pub cpu_per_connect: f64,
}

impl Sample {
    /// The mean with another sample of the same round.
    pub fn merge(&mut self, other: &Self) {
        let mean = |a: &mut f64, b: f64| *a = (*a + b) / 2.0;
        mean(&mut self.bytes_per_second, other.bytes_per_second);
        mean(&mut self.bytes_per_second_8, other.bytes_per_second_8);
        mean(&mut self.cpu_per_gb, other.cpu_per_gb);
        mean(&mut self.cpu_per_gb_8, other.cpu_per_gb_8);
        mean(&mut self.p50, other.p50);
        mean(&mut self.p99, other.p99);
        mean(&mut self.connects_per_second, other.connects_per_second);
        mean(&mut self.cpu_per_connect, other.cpu_per_connect);
    }
}

/// Starts the server in each pod: the first byte of a connection says what it wants.
pub fn serve(pods: &[&Pod]) -> anyhow::Result<Vec<Server>> {
    let behaviour: Behaviour = Arc::new(|mut stream, _| {
        let mut wish = [0];
        if stream.read_exact(&mut wish).is_err() {
            return;
        }
        let _ = stream.set_nodelay(true);
        let mut buffer = vec![0; 256 << 10];
        match wish[0] {
            b'd' => while matches!(stream.read(&mut buffer), Ok(n) if n > 0) {},
            _ => {
                let mut ping = [0; PING_BYTES];
                while stream.read_exact(&mut ping).and_then(|()| stream.write_all(&ping)).is_ok() {}
            }
        }
    });
    pods.iter().map(|pod| Server::start(pod, PORT, behaviour.clone())).collect()
}

/// Brings tunnels up and caches warm.
pub fn warm_up(target: &Target) -> anyhow::Result<()> {
    round_trips(target, 50).map(drop)?;
    bulk(target, 1, Duration::from_millis(300)).map(drop)
}

/// One sample of everything.
pub fn measure(target: &Target) -> anyhow::Result<Sample> {
    let name = || target.name.to_owned();
    let (bytes_per_second, cpu_per_gb) = bulk(target, 1, BULK).with_context(name)?;
    let (bytes_per_second_8, cpu_per_gb_8) = bulk(target, STREAMS, BULK).with_context(name)?;
    let mut trips = round_trips(target, ROUND_TRIPS).with_context(name)?;
    trips.sort_by(f64::total_cmp);
    let (connects_per_second, cpu_per_connect) = connects(target).with_context(name)?;
    Ok(Sample {
        bytes_per_second,
        bytes_per_second_8,
        cpu_per_gb,
        cpu_per_gb_8,
        p50: trips[trips.len() / 2],
        p99: trips[trips.len() * 99 / 100],
        connects_per_second,
        cpu_per_connect,
    })
}

/// Upload with `streams` connections: bytes per second and CPU-seconds per 10^9 bytes.
fn bulk(target: &Target, streams: usize, duration: Duration) -> anyhow::Result<(f64, f64)> {
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut threads = Vec::new();
    for _ in 0..streams {
        let mut stream = dial(&target.client, target.to)?;
        stream.write_all(b"d")?;
        let (stop, sent) = (stop.clone(), sent.clone());
        threads.push(thread::spawn(move || {
            let block = vec![0x5a; 128 << 10];
            while !stop.load(Ordering::Relaxed) {
                match stream.write(&block) {
                    Ok(n) => sent.fetch_add(n as u64, Ordering::Relaxed),
                    Err(error) => return Err(error),
                };
            }
            stream.shutdown(Shutdown::Write)
        }));
    }
    // Ramp-up does not count.
    thread::sleep(duration / 4);
    let (began, bytes, cpu) = (Instant::now(), sent.load(Ordering::Relaxed), cpu(target)?);
    thread::sleep(duration);
    let (seconds, bytes) = (began.elapsed().as_secs_f64(), sent.load(Ordering::Relaxed) - bytes);
    let cpu = self::cpu(target)? - cpu;
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a sender failed"))??;
    }
    Ok((bytes as f64 / seconds, cpu / (bytes as f64 / 1e9)))
}

fn round_trips(target: &Target, count: usize) -> anyhow::Result<Vec<f64>> {
    let mut stream = dial(&target.client, target.to)?;
    stream.write_all(b"p")?;
    let mut ping = [7; PING_BYTES];
    (0..count)
        .map(|_| {
            let began = Instant::now();
            stream.write_all(&ping)?;
            stream.read_exact(&mut ping)?;
            Ok(began.elapsed().as_secs_f64())
        })
        .collect()
}

fn connects(target: &Target) -> anyhow::Result<(f64, f64)> {
    netns::within(&target.client.netns, || {
        let (began, cpu) = (Instant::now(), cpu(target)?);
        for _ in 0..CONNECTS {
            let mut stream = TcpStream::connect_timeout(&target.to, PEER_DEADLINE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PEER_DEADLINE))?;
            let mut ping = [7; PING_BYTES + 1];
            stream.write_all(&ping)?;
            stream.read_exact(&mut ping[1..])?;
        }
        let seconds = began.elapsed().as_secs_f64();
        Ok((CONNECTS as f64 / seconds, (self::cpu(target)? - cpu) / CONNECTS as f64))
    })
}

/// Bytes of memory that the carriers hold per idle connection.
pub fn idle_bytes(target: &Target) -> anyhow::Result<f64> {
    let before = target.carriers.resident_bytes()?;
    let mut open = Vec::with_capacity(IDLE);
    for _ in 0..IDLE {
        let mut stream = dial(&target.client, target.to)?;
        let mut ping = [7; PING_BYTES + 1];
        stream.write_all(&ping)?;
        stream.read_exact(&mut ping[1..])?;
        open.push(stream);
    }
    let after = target.carriers.resident_bytes()?;
    Ok((after as f64 - before as f64).max(0.0) / IDLE as f64)
}

fn cpu(target: &Target) -> anyhow::Result<f64> {
    Ok(target.carriers.cpu_seconds()? + softirq_seconds()?)
}
