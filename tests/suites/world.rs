//! Promise: policy holds on every path. {same node, cross node, oneself} × {v4, v6} × {service VIP, pod IP} ×
//! {client enrolled, not} × {allow, deny, STRICT, PERMISSIVE}: the outcome and the path that was taken.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::ensure;
use mesh_tests::{
    Pod, Suite, World,
    peer::{Outcome, Server, greet_and_echo, ping, talk},
    world::{Family, two_nodes},
};

const PORT: u16 = 8080;
/// What the namespace `mesh` is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// Nothing is written.
    None,
    /// ALLOW for the enrolled client's identity only.
    Allow,
    /// DENY on the servers' port.
    Deny,
    Strict,
    Permissive,
}

impl Policy {
    const ALL: [Self; 5] = [Self::None, Self::Allow, Self::Deny, Self::Strict, Self::Permissive];

    fn yaml(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Allow => {
                "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-client, namespace: mesh}
spec:
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/mesh/sa/client]}}]
"
            }
            Self::Deny => {
                "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: mesh}
spec:
  action: DENY
  rules:
  - to: [{operation: {ports: ['8080']}}]
"
            }
            Self::Strict => {
                "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: mesh}
spec: {mtls: {mode: STRICT}}
"
            }
            Self::Permissive => {
                "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: mesh}
spec: {mtls: {mode: PERMISSIVE}}
"
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    SameNode,
    CrossNode,
    Oneself,
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    policy: Policy,
    place: Place,
    family: Family,
    by_vip: bool,
    enrolled: bool,
}

/// What must be seen: `None` = refused, else the path at the agent that sees the connection (`-`: no agent does).
fn expected(cell: &Cell) -> Option<&'static str> {
    match (cell.place, cell.enrolled, cell.policy) {
        // A pod's calls to itself never leave it and are nobody's business.
        (Place::Oneself, _, _) => Some("-"),
        (_, _, Policy::Deny) | (_, false, Policy::Allow | Policy::Strict) => None,
        (_, false, _) => Some("plaintext"),
        (Place::SameNode, true, _) => Some("direct"),
        (Place::CrossNode, true, _) => Some("tunnel"),
    }
}

struct Fixture {
    world: World,
    _servers: Vec<Server>,
    client: Pod,
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
            ("plain", "outsider", "n1"),
        ];
        let text = two_nodes(&pods, PORT);
        let world = World::up("world", &[("mesh.yaml", &text)])?;
        let pod = |key| world.pod(key);
        let (client, outsider) = (pod("mesh/client")?, pod("plain/outsider")?);
        let (near, far) = (pod("mesh/near")?, pod("mesh/far")?);
        let servers = [&client, &outsider, &near, &far]
            .into_iter()
            .map(|pod| Server::start(pod, PORT, greet_and_echo()))
            .collect::<Result<_, _>>()?;
        Ok(Self { world, _servers: servers, client, outsider, near, far })
    }

    fn check(&self, cell: &Cell) -> anyhow::Result<()> {
        let from = if cell.enrolled { &self.client } else { &self.outsider };
        let to = match cell.place {
            Place::SameNode => &self.near,
            Place::CrossNode => &self.far,
            Place::Oneself => from,
        };
        let address = if cell.by_vip {
            let vip = self.world.vip(&format!("{}/{}", to.namespace, to.name), cell.family)?;
            SocketAddr::new(vip, PORT)
        } else {
            to.at(cell.family, PORT)?
        };
        match (talk(from, address), expected(cell)) {
            (Outcome::Refused(_), None) => Ok(()),
            (Outcome::Refused(why), Some(path)) => anyhow::bail!("refused ({why}), but {path} was expected"),
            (Outcome::Greeted { seen, .. }, None) => anyhow::bail!("reached the application as {seen}"),
            (Outcome::Greeted { seen, mut stream }, Some(path)) => {
                ping(&mut stream, b"the connection is live")?;
                ensure!(
                    stream.peer_addr()?.ip().to_canonical() == address.ip(),
                    "the client sees another peer"
                );
                // Outside the mesh a VIP is served by the stand-in for kube-proxy, with the node's address.
                if cell.by_vip && !cell.enrolled {
                    return Ok(());
                }
                let own = from.at(cell.family, 0)?.ip();
                ensure!(seen.ip() == own, "the server saw {seen} instead of {own}");
                self.check_path(cell, path, &stream)
            }
        }
    }

    fn check_path(&self, cell: &Cell, path: &str, stream: &std::net::TcpStream) -> anyhow::Result<()> {
        let source = SocketAddr::new(stream.local_addr()?.ip().to_canonical(), stream.local_addr()?.port());
        if path == "-" {
            for node in ["n1", "n2"] {
                let listed = self.world.connections(node)?.into_iter().find(|found| found.src.addr == source);
                ensure!(listed.is_none(), "an agent carries a pod's call to itself: {listed:?}");
            }
            return Ok(());
        }
        // The client's agent sees what it sends; plaintext is seen only where it arrives.
        let node = if path == "plaintext" && cell.place == Place::CrossNode { "n2" } else { "n1" };
        let listed = self.world.connection_from(node, source)?;
        ensure!(listed.path.as_deref() == Some(path), "went by {:?} instead of {path}", listed.path);
        if path == "plaintext" {
            ensure!(listed.src.identity.is_none(), "plaintext has the identity {:?}", listed.src.identity);
        } else {
            let identity = listed.src.identity.as_deref();
            ensure!(identity == Some("spiffe://cluster.local/ns/mesh/sa/client"), "identity {identity:?}");
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::over(Fixture::up);
    for policy in Policy::ALL {
        suite.case(format!("every_pair_under_{policy:?}").to_lowercase(), move |fixture: &Fixture| {
            fixture.world.apply(&[("policy.yaml", policy.yaml())])?;
            each_cell(policy, |cell| fixture.check(cell))
        });
    }
    suite.case("out_of_the_mesh_is_passed_through", passthrough);
    suite.case("a_service_is_one_at_all_its_addresses", fronts);
    suite.case("a_service_without_endpoints_in_the_mesh_stays_the_node_s_proxy_s", left_alone);
    suite.leaves_nothing(|fixture: &Fixture| &fixture.world);
    suite.run()
}

fn passthrough(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("policy.yaml", "")])?;
    for family in [Family::V4, Family::V6] {
        let Outcome::Greeted { seen, stream } = talk(&fixture.client, fixture.outsider.at(family, PORT)?)
        else {
            anyhow::bail!("{family:?}: refused");
        };
        ensure!(seen.ip() == family.of(&fixture.client.ips)?, "the server saw {seen}");
        let listed = fixture.world.connection_from("n1", stream.local_addr()?)?;
        ensure!(listed.path.as_deref() == Some("passthrough"), "went by {:?}", listed.path);
    }
    Ok(())
}

/// A service by the name of its pods, with a node port and external addresses.
fn outside(name: &str, number: u8) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: out-{name}, namespace: mesh}}
spec:
  type: NodePort
  selector: {{app: {name}}}
  ipFamilyPolicy: PreferDualStack
  externalIPs: [198.51.100.{number}, '2001:db8:7::{number}']
  ports:
  - {{name: tcp, port: 80, targetPort: {PORT}, nodePort: 3008{number}}}
"
    )
}

/// Node ports and external IPs are addresses of the service: direct where its VIP is direct, tunnelled where that is,
/// and under the same policy.
fn fronts(fixture: &Fixture) -> anyhow::Result<()> {
    let addresses = "{type: InternalIP, address: 192.0.2.9}, {type: InternalIP, address: '2001:db8::9'}";
    let node = format!(
        "{{apiVersion: v1, kind: Node, metadata: {{name: n3}}, status: {{addresses: [{addresses}]}}}}\n"
    );
    let text = node + &outside("near", 1) + &outside("far", 2);
    fixture.world.apply(&[("policy.yaml", ""), ("outside.yaml", &text)])?;
    let reached = || -> anyhow::Result<usize> {
        let mut reached = 0;
        for (number, to, path) in [(1, &fixture.near, "direct"), (2, &fixture.far, "tunnel")] {
            for address in [
                format!("198.51.100.{number}:80"),
                format!("[2001:db8:7::{number}]:80"),
                format!("192.0.2.9:3008{number}"),
                format!("[2001:db8::9]:3008{number}"),
            ] {
                let Outcome::Greeted { seen, mut stream } = talk(&fixture.client, address.parse()?) else {
                    continue;
                };
                ping(&mut stream, b"the connection is live")?;
                ensure!(fixture.client.ips.contains(&seen.ip()), "{address}: the server saw {seen}");
                ensure!(stream.peer_addr()? == address.parse()?, "{address}: the client sees another peer");
                let listed = fixture.world.connection_from("n1", stream.local_addr()?)?;
                ensure!(listed.path.as_deref() == Some(path), "{address} went by {:?}", listed.path);
                ensure!(to.ips.contains(&listed.dst.addr.ip()), "{address} led to {}", listed.dst.addr);
                reached += 1;
            }
        }
        Ok(reached)
    };
    let all = reached()?;
    ensure!(all == 8, "{all} of 8 addresses lead to the service");
    fixture.world.apply(&[("policy.yaml", Policy::Deny.yaml())])?;
    let denied = reached()?;
    ensure!(denied == 0, "{denied} addresses get round a policy");
    fixture.world.apply(&[("policy.yaml", ""), ("outside.yaml", "")])?;
    Ok(())
}

/// The stand-in for kube-proxy gets what was dialled, and serves it with the node's address.
fn left_alone(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("policy.yaml", "")])?;
    for family in [Family::V4, Family::V6] {
        let vip = SocketAddr::new(fixture.world.vip("plain/outsider", family)?, PORT);
        let Outcome::Greeted { stream, .. } = talk(&fixture.client, vip) else {
            anyhow::bail!("{family:?}: refused");
        };
        let listed = fixture.world.connection_from("n1", stream.local_addr()?)?;
        ensure!(listed.path.as_deref() == Some("passthrough"), "went by {:?}", listed.path);
        ensure!(listed.dst.addr == vip, "the agent chose {} for {vip}", listed.dst.addr);
    }
    Ok(())
}

/// Runs every cell of one policy and reports all that fail, not only the first.
fn each_cell(policy: Policy, check: impl Fn(&Cell) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut failures = Vec::new();
    for place in [Place::SameNode, Place::CrossNode, Place::Oneself] {
        for family in [Family::V4, Family::V6] {
            for by_vip in [false, true] {
                for enrolled in [false, true] {
                    let cell = Cell { policy, place, family, by_vip, enrolled };
                    if let Err(error) = check(&cell) {
                        failures.push(format!("{cell:?}: {error:#}"));
                    }
                }
            }
        }
    }
    ensure!(failures.is_empty(), "{} cells failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}
