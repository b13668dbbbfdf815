//! Promise: a captured connection behaves like TCP. Bytes, half-close, server-first, many at once, many in a row,
//! on every path.

use std::{
    hash::{DefaultHasher, Hasher as _},
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    process::ExitCode,
    sync::Arc,
    thread,
};

use anyhow::{Context as _, ensure};
use mesh_tests::{
    Pod, Suite, World, netns,
    peer::{Outcome, PEER_DEADLINE, Server, dial, greet_and_echo, ping, talk},
    world::{Family, two_nodes},
};

/// Pods of the suite: namespace, name, node.
const PODS: &[(&str, &str, &str)] = &[
    ("mesh", "client", "n1"),
    ("mesh", "near", "n1"),
    ("mesh", "far", "n2"),
    ("mesh", "far2", "n2"),
    ("plain", "outsider", "n1"),
];

const PORT: u16 = 8080;
const GIB: u64 = 1 << 30;
/// Connections open at the same time.
const CONCURRENT: usize = 1000;
/// Short connections in a row: more than one pair of addresses has ports for.
const SHORT: usize = 60_000;

fn main() -> ExitCode {
    let mut suite = Suite::over(Fixture::up);
    suite.case("half_close_is_kept_in_both_directions", half_close);
    suite.case("a_server_may_speak_first", server_first);
    suite.case("a_gibibyte_arrives_unchanged_each_way", gibibyte);
    suite.case("a_reset_ends_the_other_side", reset);
    suite.case("a_thousand_tunnelled_connections_at_once_show_the_clients_address", thousand_tunnelled);
    suite.case("a_thousand_plaintext_connections_at_once_show_the_clients_address", thousand_plaintext);
    suite.case("sixty_thousand_short_connections_without_an_address_error", short_connections);
    suite.case("a_client_keeps_its_endpoint_when_others_come", affinity);
    suite.leaves_nothing(|fixture: &Fixture| &fixture.world);
    suite.run()
}

struct Fixture {
    world: World,
    client: Pod,
    near: Pod,
    far: Pod,
    far2: Pod,
    outsider: Pod,
}

impl Fixture {
    fn up() -> anyhow::Result<Self> {
        let text = two_nodes(PODS, PORT);
        let world = World::up("traffic", &[("mesh.yaml", &text)])?;
        Ok(Self {
            client: world.pod("mesh/client")?,
            near: world.pod("mesh/near")?,
            far: world.pod("mesh/far")?,
            far2: world.pod("mesh/far2")?,
            outsider: world.pod("plain/outsider")?,
            world,
        })
    }

    /// A client and a server for each path that carries bytes.
    fn paths(&self) -> [(&'static str, &Pod, &Pod); 4] {
        [
            ("direct", &self.client, &self.near),
            ("tunnel", &self.client, &self.far),
            ("plaintext", &self.outsider, &self.near),
            ("passthrough", &self.client, &self.outsider),
        ]
    }
}

fn each_path(
    fixture: &Fixture,
    server: impl Fn(&Pod) -> anyhow::Result<Server>,
    client: impl Fn(&Pod, SocketAddr) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for (path, from, to) in fixture.paths() {
        let _server = server(to)?;
        for family in [Family::V4, Family::V6] {
            client(from, to.at(family, PORT)?).with_context(|| format!("{path} {family:?}"))?;
        }
    }
    Ok(())
}

/// The client finishes sending first; the server answers only after it has seen the end.
fn half_close(fixture: &Fixture) -> anyhow::Result<()> {
    let answer_after_end: mesh_tests::peer::Behaviour = Arc::new(|mut stream, _| {
        let mut all = Vec::new();
        if stream.read_to_end(&mut all).is_ok() {
            let _ = stream.write_all(format!("{} bytes, then the end", all.len()).as_bytes());
        }
    });
    each_path(
        fixture,
        |pod| Server::start(pod, PORT, answer_after_end.clone()),
        |from, to| {
            let mut stream = dial(from, to)?;
            stream.write_all(b"question")?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer == "8 bytes, then the end", "got {answer:?}");
            Ok(())
        },
    )
}

fn server_first(fixture: &Fixture) -> anyhow::Result<()> {
    each_path(
        fixture,
        |pod| Server::start(pod, PORT, greet_and_echo()),
        |from, to| match talk(from, to) {
            Outcome::Greeted { mut stream, .. } => ping(&mut stream, b"and then the client"),
            Outcome::Refused(why) => anyhow::bail!("refused: {why}"),
        },
    )
}

/// Services that let clients keep their endpoint, each with its own first one.
fn affinity(fixture: &Fixture) -> anyhow::Result<()> {
    let pods = [&fixture.near, &fixture.far, &fixture.far2];
    let servers = pods.map(|pod| Server::start(pod, PORT, greet_and_echo()));
    let servers = servers.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let (mut alone, mut together) = (String::new(), String::new());
    for (number, pod) in pods.iter().enumerate() {
        let name = format!("kept-{number}");
        alone += &sticky(&name, &[pod])?;
        together += &sticky(&name, &pods)?;
    }
    fixture.world.apply(&[("kept.yaml", &alone)])?;
    let ask = || -> anyhow::Result<()> {
        for (number, server) in servers.iter().enumerate() {
            let vip = fixture.world.vip(&format!("mesh/kept-{number}"), Family::V4)?;
            let before = server.accepted();
            ensure!(talk(&fixture.client, SocketAddr::new(vip, PORT)).greeted(), "kept-{number} is refused");
            ensure!(server.accepted() == before + 1, "kept-{number} went to another endpoint");
        }
        Ok(())
    };
    ask().context("the only one")?;
    fixture.world.apply(&[("kept.yaml", &together)])?;
    for _ in 0..5 {
        ask().context("of three")?;
    }
    fixture.world.apply(&[("kept.yaml", "")])?;
    Ok(())
}

fn sticky(name: &str, pods: &[&Pod]) -> anyhow::Result<String> {
    let mut text = format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: mesh}}
spec: {{sessionAffinity: ClientIP, ports: [{{name: tcp, port: {PORT}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-v4, namespace: mesh, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: tcp, port: {PORT}}}]
endpoints:
"
    );
    for pod in pods {
        let ip = pod.at(Family::V4, PORT)?.ip();
        let target = format!("{{kind: Pod, namespace: mesh, name: {}}}", pod.name);
        text += &format!("- {{addresses: ['{ip}'], conditions: {{ready: true}}, targetRef: {target}}}\n");
    }
    Ok(text)
}

/// Both directions at once, so that neither may wait for the other.
fn gibibyte(fixture: &Fixture) -> anyhow::Result<()> {
    let behaviour: mesh_tests::peer::Behaviour = Arc::new(|stream, _| {
        let Ok(reading) = stream.try_clone() else { return };
        let sending = thread::spawn(move || send(&stream, GIB));
        let received = receive(&reading, GIB);
        let sent = sending.join();
        assert_eq!(received.ok(), sent.ok().and_then(Result::ok), "the server's two directions differ");
    });
    for (path, from, to) in [fixture.paths()[0], fixture.paths()[1]] {
        let _server = Server::start(to, PORT, behaviour.clone())?;
        let stream = dial(from, to.at(Family::V4, PORT)?)?;
        let sending = stream.try_clone()?;
        let sent = thread::spawn(move || send(&sending, GIB));
        let received = receive(&stream, GIB).with_context(|| path.to_owned())?;
        let sent = sent.join().map_err(|_| anyhow::anyhow!("the sender failed"))??;
        ensure!(received == sent, "{path}: the checksums differ");
    }
    Ok(())
}

/// Sends `total` bytes that differ everywhere, and gives their checksum.
fn send(mut stream: &TcpStream, total: u64) -> anyhow::Result<u64> {
    let (mut hasher, mut state, mut sent) = (DefaultHasher::new(), 0x9e37_79b9_7f4a_7c15_u64, 0);
    let mut block = vec![0_u8; 256 << 10];
    while sent < total {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        stream.write_all(&block)?;
        hasher.write(&block);
        sent += block.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(hasher.finish())
}

/// Receives exactly `total` bytes and the end, and gives their checksum.
fn receive(mut stream: &TcpStream, total: u64) -> anyhow::Result<u64> {
    stream.set_read_timeout(Some(PEER_DEADLINE))?;
    let (mut hasher, mut block, mut got) = (DefaultHasher::new(), vec![0_u8; 256 << 10], 0);
    while got < total {
        stream.read_exact(&mut block)?;
        hasher.write(&block);
        got += block.len() as u64;
    }
    ensure!(stream.read(&mut block)? == 0, "more bytes than were sent");
    Ok(hasher.finish())
}

/// A server that dies with unread data must not leave its client waiting.
fn reset(fixture: &Fixture) -> anyhow::Result<()> {
    let slam: mesh_tests::peer::Behaviour = Arc::new(|stream, _| {
        let socket = socket2::Socket::from(stream);
        let _ = socket.set_linger(Some(std::time::Duration::ZERO));
    });
    each_path(
        fixture,
        |pod| Server::start(pod, PORT, slam.clone()),
        |from, to| {
            let Ok(mut stream) = dial(from, to) else { return Ok(()) };
            let _ = stream.write_all(b"into the void");
            ensure!(mesh_tests::peer::ended(&mut stream), "the client still waits");
            Ok(())
        },
    )
}

fn thousand_tunnelled(fixture: &Fixture) -> anyhow::Result<()> {
    thousand(&fixture.client, &fixture.far)
}

fn thousand_plaintext(fixture: &Fixture) -> anyhow::Result<()> {
    thousand(&fixture.outsider, &fixture.far)
}

fn thousand(from: &Pod, to: &Pod) -> anyhow::Result<()> {
    let server = Server::start(to, PORT, greet_and_echo())?;
    for family in [Family::V4, Family::V6] {
        let client = family.of(&from.ips)?;
        let mut open = Vec::with_capacity(CONCURRENT);
        for number in 0..CONCURRENT {
            match talk(from, to.at(family, PORT)?) {
                Outcome::Greeted { seen, stream } => {
                    ensure!(seen.ip() == client, "{number}: the server saw {seen} instead of {client}");
                    open.push(stream);
                }
                Outcome::Refused(why) => anyhow::bail!("{number} of {CONCURRENT} {family:?}: {why}"),
            }
        }
        for (number, stream) in open.iter_mut().enumerate() {
            ping(stream, format!("number {number}").as_bytes())
                .with_context(|| format!("{number} {family:?}"))?;
        }
    }
    ensure!(server.accepted() == 2 * CONCURRENT as u64, "the server saw {} connections", server.accepted());
    Ok(())
}

/// From one pod, spread over destinations as plain TCP would need too (28,232 ephemeral ports per destination).
fn short_connections(fixture: &Fixture) -> anyhow::Result<()> {
    const WORKERS: usize = 8;
    let targets = [&fixture.near, &fixture.far, &fixture.far2];
    let _servers = targets
        .iter()
        .map(|pod| Server::start(pod, PORT, greet_and_echo()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut addresses = Vec::new();
    for pod in targets {
        addresses.extend([pod.at(Family::V4, PORT)?, pod.at(Family::V6, PORT)?]);
    }
    let addresses = Arc::new(addresses);
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let addresses = addresses.clone();
            netns::spawn_within(&fixture.client.netns, move || {
                (worker..SHORT).step_by(WORKERS).try_for_each(|n| short(addresses[n % addresses.len()]))
            })
        })
        .collect::<Result<_, _>>()?;
    for worker in workers {
        worker.join().map_err(|_| anyhow::anyhow!("a worker failed"))???;
    }
    Ok(())
}

fn short(to: SocketAddr) -> anyhow::Result<()> {
    let mut stream =
        TcpStream::connect_timeout(&to, PEER_DEADLINE).with_context(|| format!("connect {to}"))?;
    stream.set_read_timeout(Some(PEER_DEADLINE))?;
    let mut hello = [0; 6];
    stream.read_exact(&mut hello).with_context(|| format!("read {to}"))?;
    ensure!(&hello == b"hello ", "not a greeting");
    Ok(())
}
