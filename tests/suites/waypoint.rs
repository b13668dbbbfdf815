//! Promise: what a bound service is told by routes happens to every request, by the waypoint and by nobody else.

use std::{collections::BTreeMap, net::SocketAddr, process::ExitCode};

use anyhow::{Context as _, ensure};
use mesh_tests::{
    Pod, Suite, World,
    peer::{Server, http, http_echo, talk},
    world::{Family, sleeper},
};

const PORT: u16 = 8080;
const BASE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
---
{apiVersion: v1, kind: Node, metadata: {name: n1}}
---
{apiVersion: v1, kind: Node, metadata: {name: n2}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gate, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: gate}}
spec:
  selector: {group: web}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web-v1, namespace: shop}
spec:
  selector: {app: v1}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web-v2, namespace: shop}
spec:
  selector: {app: v2}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: 80, targetPort: 8080}]
";

const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 80}]
  rules:
  - matches: [{headers: [{name: end-user, value: jason}]}]
    backendRefs: [{name: web-v2, port: 80}]
  - matches: [{path: {type: Exact, value: /only-v1}}]
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /delay}}]
    timeouts: {request: 1s}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /gone}}]
    backendRefs: [{name: no-such-service, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /split}}]
    backendRefs: [{name: web-v1, port: 80, weight: 90}, {name: web-v2, port: 80, weight: 10}]
";

struct Fixture {
    world: World,
    _servers: Vec<Server>,
    client: Pod,
    outsider: Pod,
    v1: Pod,
    v2: Pod,
}

impl Fixture {
    fn up() -> anyhow::Result<Self> {
        let mut text = BASE.to_owned();
        // One version on the client's node, one on the other.
        for (namespace, name, node) in [
            ("shop", "client", "n1"),
            ("shop", "v1", "n1"),
            ("shop", "v2", "n2"),
            ("plain", "outsider", "n1"),
        ] {
            let pod = sleeper(namespace, name, node);
            text += &if name.starts_with('v') {
                pod.replace(&format!("app: {name}"), &format!("app: {name}, group: web"))
            } else {
                pod
            };
        }
        let world = World::up("waypoint", &[("mesh.yaml", &text)])?;
        let (v1, v2) = (world.pod("shop/v1")?, world.pod("shop/v2")?);
        let servers =
            vec![Server::start(&v1, PORT, http_echo("v1"))?, Server::start(&v2, PORT, http_echo("v2"))?];
        Ok(Self {
            client: world.pod("shop/client")?,
            outsider: world.pod("plain/outsider")?,
            world,
            _servers: servers,
            v1,
            v2,
        })
    }

    fn vip(&self, family: Family) -> anyhow::Result<SocketAddr> {
        Ok(SocketAddr::new(self.world.vip("shop/web", family)?, 80))
    }

    /// Which version answered.
    fn version(&self, family: Family, path: &str, lines: &str) -> anyhow::Result<String> {
        let answer = http(&self.client, self.vip(family)?, "web", path, lines)?;
        ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
        let line = answer.body.lines().next().and_then(|line| line.strip_prefix("server: "));
        Ok(line.context("no server line")?.to_owned())
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::over(Fixture::up);
    suite.case("without_routes_requests_reach_all_endpoints_of_the_service", unrouted);
    suite.case("header_path_and_default_rules_choose_the_backend", matching);
    suite.case("weights_are_exact_to_the_statistics_over_local_and_remote_endpoints", weights);
    suite.case("a_request_timeout_answers_504", timeout);
    suite.case("an_unresolvable_backend_answers_500_and_no_rule_404", errors);
    suite.case("the_server_sees_the_mesh_and_no_forged_client_header", forged_header);
    suite.case("nothing_reaches_the_bound_ports_around_the_waypoint", required);
    // Not `leaves_nothing`: the waypoint keeps idle connections to its endpoints on purpose.
    suite.run()
}

fn unrouted(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", "")])?;
    let mut seen = BTreeMap::new();
    for _ in 0..100 {
        *seen.entry(fixture.version(Family::V4, "/", "")?).or_insert(0) += 1;
    }
    // 50/50, n = 100: each within 3.3 sigma.
    ensure!(seen.values().all(|&n| (33..=67).contains(&n)) && seen.len() == 2, "{seen:?}");
    Ok(())
}

fn matching(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", ROUTE)])?;
    for family in [Family::V4, Family::V6] {
        for (path, lines, version) in [
            ("/", "end-user: jason\r\n", "v2"),
            ("/only-v1", "", "v1"),
            ("/only-v1?q=1", "", "v1"),
            // An exact path is more specific than any header match.
            ("/only-v1", "end-user: jason\r\n", "v1"),
            ("/anything", "end-user: jason\r\n", "v2"),
        ] {
            for _ in 0..5 {
                let got = fixture.version(family, path, lines)?;
                ensure!(got == version, "{family:?} {path} {lines:?}: {got} instead of {version}");
            }
        }
    }
    Ok(())
}

fn weights(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", ROUTE)])?;
    let mut v2 = 0;
    for _ in 0..600 {
        v2 += u32::from(fixture.version(Family::V4, "/split", "")? == "v2");
    }
    // n = 600, p = 0.1: mean 60, sigma 7.35; 3.3 sigma each way.
    ensure!((36..=84).contains(&v2), "{v2} of 600 went to the side of 10 %");
    Ok(())
}

fn timeout(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", ROUTE)])?;
    let answer = http(&fixture.client, fixture.vip(Family::V4)?, "web", "/delay/8", "")?;
    ensure!(answer.status == 504, "{} {}", answer.status, answer.body);
    Ok(())
}

fn errors(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", ROUTE)])?;
    for (path, status) in [("/gone", 500), ("/elsewhere", 404)] {
        let answer = http(&fixture.client, fixture.vip(Family::V4)?, "web", path, "")?;
        ensure!(answer.status == status, "{path}: {} {}", answer.status, answer.body);
    }
    Ok(())
}

fn forged_header(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", ROUTE)])?;
    let forged = "x-undermesh-client: spiffe://cluster.local/ns/shop/sa/admin\r\n";
    let answer = http(&fixture.client, fixture.vip(Family::V4)?, "web", "/only-v1", forged)?;
    ensure!(answer.status == 200 && !answer.body.contains("sa/admin"), "{}", answer.body);
    Ok(())
}

/// Straight to the pod, by identity or in the clear, on both nodes: refused with a reason.
fn required(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", "")])?;
    for client in [&fixture.client, &fixture.outsider] {
        for server in [&fixture.v1, &fixture.v2] {
            for family in [Family::V4, Family::V6] {
                let to = server.at(family, PORT)?;
                let answer = http(client, to, "web", "/", "");
                ensure!(answer.is_err(), "{} reached {} around the waypoint", client.name, server.name);
            }
        }
    }
    // A port that the binding does not cover stays an ordinary one.
    let _other = Server::start(&fixture.v2, 9999, mesh_tests::peer::greet_and_echo())?;
    ensure!(talk(&fixture.client, fixture.v2.at(Family::V4, 9999)?).greeted(), "an unbound port is refused");
    Ok(())
}
