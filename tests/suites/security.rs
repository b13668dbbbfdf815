//! Promise: identity cannot be forged and the mesh's own ports lead nowhere, not even for a pod that is root in its
//! own namespace.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, ensure};
use mesh_tests::{
    Pod, Suite, World, netns,
    peer::{Outcome, PEER_DEADLINE, Server, dial, ended, greet_and_echo, ping, talk},
    wire::Wire,
    world::{Family, two_nodes},
};
use socket2::{Domain, Protocol, Socket, Type};

const PORT: u16 = 8080;
/// The mesh's own ports: outbound, inbound plaintext, HBONE.
const OWN_PORTS: [u16; 3] = [15001, 15006, 15008];
const CANARY: &[u8] = b"PLAINTEXT-CANARY-of-the-security-suite";
const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: mesh}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-client, namespace: mesh}
spec:
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/mesh/sa/client]}}]
";

struct Fixture {
    world: World,
    near_server: Server,
    far_server: Server,
    client: Pod,
    intruder: Pod,
    outsider: Pod,
    near: Pod,
    far: Pod,
}

impl Fixture {
    fn up() -> anyhow::Result<Self> {
        let pods = [
            ("mesh", "client", "n1"),
            ("mesh", "near", "n1"),
            ("mesh", "far", "n2"),
            // Enrolled, but named by no policy.
            ("mesh", "intruder", "n1"),
            ("plain", "outsider", "n1"),
        ];
        let text = two_nodes(&pods, PORT);
        let world = World::up("security", &[("mesh.yaml", &text), ("policy.yaml", POLICY)])?;
        let (near, far) = (world.pod("mesh/near")?, world.pod("mesh/far")?);
        Ok(Self {
            near_server: Server::start(&near, PORT, greet_and_echo())?,
            far_server: Server::start(&far, PORT, greet_and_echo())?,
            client: world.pod("mesh/client")?,
            intruder: world.pod("mesh/intruder")?,
            outsider: world.pod("plain/outsider")?,
            near,
            far,
            world,
        })
    }

    fn accepted(&self) -> u64 {
        self.near_server.accepted() + self.far_server.accepted()
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::over(Fixture::up);
    suite.case("only_the_named_identity_is_served", baseline);
    suite.case("no_relay_through_the_meshs_own_ports", no_relay);
    suite.case("a_pods_own_listeners_are_closed_to_itself", own_listeners);
    suite.case("a_forged_mark_gains_nothing", forged_mark);
    suite.case("a_forged_source_address_gains_nothing", forged_source);
    suite.case("a_stolen_address_gains_nothing", stolen_address);
    suite.case("between_nodes_only_tls_1_3_on_15008_is_seen", wire);
    suite.leaves_nothing(|fixture: &Fixture| &fixture.world);
    suite.run()
}

fn baseline(fixture: &Fixture) -> anyhow::Result<()> {
    for family in [Family::V4, Family::V6] {
        for server in [&fixture.near, &fixture.far] {
            let to = server.at(family, PORT)?;
            ensure!(talk(&fixture.client, to).greeted(), "client to {} is refused", server.name);
            ensure!(!talk(&fixture.intruder, to).greeted(), "intruder reached {}", server.name);
            ensure!(!talk(&fixture.outsider, to).greeted(), "outsider reached {}", server.name);
        }
    }
    Ok(())
}

fn no_relay(fixture: &Fixture) -> anyhow::Result<()> {
    let before = fixture.accepted();
    for attacker in [&fixture.outsider, &fixture.intruder, &fixture.client] {
        for server in [&fixture.near, &fixture.far] {
            for family in [Family::V4, Family::V6] {
                for port in OWN_PORTS {
                    knock(attacker, server.at(family, port)?)
                        .with_context(|| format!("{} at {}:{port} {family:?}", attacker.name, server.name))?;
                }
            }
        }
    }
    ensure!(fixture.accepted() == before, "an application was reached through a port of the mesh");
    Ok(())
}

/// Speaks plaintext to a port of the mesh: nothing may come back but the end (or a TLS alert).
fn knock(from: &Pod, to: SocketAddr) -> anyhow::Result<()> {
    let Ok(mut stream) = dial(from, to) else { return Ok(()) };
    let _ = stream.write_all(b"CONNECT 127.0.0.1:8080 HTTP/1.1\r\nhost: x\r\n\r\n");
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
        {
            anyhow::bail!("the connection hangs")
        }
        _ => {}
    }
    ensure!(answer.is_empty() || answer[0] == 0x15, "answered {:?}", String::from_utf8_lossy(&answer));
    Ok(())
}

fn own_listeners(fixture: &Fixture) -> anyhow::Result<()> {
    let own = &fixture.client;
    let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for ip in loopback.into_iter().chain(own.ips.iter().copied()) {
        for port in OWN_PORTS {
            ensure!(dial(own, SocketAddr::new(ip, port)).is_err(), "{ip}:{port} accepts the pod's own calls");
        }
    }
    Ok(())
}

fn stream_socket(to: SocketAddr) -> anyhow::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_read_timeout(Some(PEER_DEADLINE))?;
    Ok(socket)
}

/// Whatever mark a pod sets, it is treated as the one that it is.
fn forged_mark(fixture: &Fixture) -> anyhow::Result<()> {
    let before = fixture.accepted();
    let marks = [1, 0x111, 0x539, 0x400, mesh_ebpf_common::CAPTURE_MARK, u32::MAX];
    for attacker in [&fixture.intruder, &fixture.outsider] {
        for server in [&fixture.near, &fixture.far] {
            for family in [Family::V4, Family::V6] {
                for mark in marks {
                    let to = server.at(family, PORT)?;
                    let greeted = netns::within(&attacker.netns, || {
                        let socket = stream_socket(to)?;
                        socket.set_mark(mark)?;
                        if socket.connect_timeout(&to.into(), PEER_DEADLINE).is_err() {
                            return Ok(false);
                        }
                        Ok(greeted(socket.into()))
                    })?;
                    ensure!(!greeted, "{} with mark {mark:#x} reached {to}", attacker.name);
                }
            }
        }
    }
    ensure!(fixture.accepted() == before, "an application accepted a marked connection");
    Ok(())
}

fn greeted(mut stream: TcpStream) -> bool {
    let mut hello = [0; 6];
    stream.read_exact(&mut hello).is_ok() && &hello == b"hello "
}

/// IP_TRANSPARENT with the address of the identity that would be served.
fn forged_source(fixture: &Fixture) -> anyhow::Result<()> {
    let before = fixture.accepted();
    for attacker in [&fixture.intruder, &fixture.outsider] {
        for server in [&fixture.near, &fixture.far] {
            let (source, to) = (fixture.client.at(Family::V4, 0)?, server.at(Family::V4, PORT)?);
            let greeted = netns::within(&attacker.netns, || {
                let socket = stream_socket(to)?;
                socket.set_ip_transparent_v4(true)?;
                socket.bind(&source.into())?;
                let connected = socket.connect_timeout(&to.into(), std::time::Duration::from_secs(3));
                Ok(connected.is_ok() && greeted(socket.into()))
            })?;
            ensure!(!greeted, "{} as {source} reached {to}", attacker.name);
        }
    }
    ensure!(fixture.accepted() == before, "an application accepted a forged source");
    Ok(())
}

/// A pod outside the mesh takes the client's address for its own.
fn stolen_address(fixture: &Fixture) -> anyhow::Result<()> {
    let before = fixture.accepted();
    let address = format!("{}/32", Family::V4.of(&fixture.client.ips)?);
    let ip = |verb: &str| {
        netns::within(&fixture.outsider.netns, || {
            let status = Command::new("ip").args(["address", verb, &address, "dev", "eth0"]).status()?;
            ensure!(status.success(), "ip address {verb}");
            Ok(())
        })
    };
    ip("add")?;
    let (source, to) = (fixture.client.at(Family::V4, 0)?, fixture.near.at(Family::V4, PORT)?);
    let outcome = netns::within(&fixture.outsider.netns, || {
        let socket = stream_socket(to)?;
        socket.bind(&source.into())?;
        let connected = socket.connect_timeout(&to.into(), std::time::Duration::from_secs(3));
        Ok(connected.is_ok() && greeted(socket.into()))
    });
    ip("del")?;
    ensure!(!outcome?, "the stolen address was served");
    ensure!(fixture.accepted() == before, "an application accepted the stolen address");
    // The rightful owner is not harmed for longer than the neighbours' caches last.
    mesh_tests::wait::until_true("the client to be served again", || talk(&fixture.client, to).greeted())
}

fn wire(fixture: &Fixture) -> anyhow::Result<()> {
    let tap = Wire::tap(&fixture.world.node("n2")?.netns)?;
    for family in [Family::V4, Family::V6] {
        let Outcome::Greeted { mut stream, .. } = talk(&fixture.client, fixture.far.at(family, PORT)?) else {
            anyhow::bail!("{family:?}: refused")
        };
        for _ in 0..50 {
            ping(&mut stream, CANARY)?;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        ensure!(ended(&mut stream), "the echo does not end");
    }
    let frames = tap.finish();
    ensure!(
        frames.segments().any(|segment| segment.destination_port == 15008),
        "no segment on 15008 was captured"
    );
    ensure!(frames.holding(CANARY) == 0, "{} frames hold the marker in clear", frames.holding(CANARY));
    for segment in frames.segments() {
        let own = segment.destination_port == PORT || segment.source_port == PORT;
        ensure!(!own, "a segment of the application's port is on the wire");
    }
    // The first bytes of a tunnel, where this capture saw one begin, are a TLS handshake record.
    Ok(())
}
