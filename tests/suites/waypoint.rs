//! Promise: what a bound service is told by routes happens to every request, by the waypoint and by nobody else.

use std::{collections::BTreeMap, net::SocketAddr, process::ExitCode};

use anyhow::{Context as _, ensure};
use mesh_tests::{
    Pod, Suite, World,
    grpc::{Calls, call, grpc_echo},
    peer::{Server, http, http_echo, talk},
    world::{Family, sleeper},
};

const PORT: u16 = 8080;
const RPC_PORT: u16 = 7070;
const BASE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
---
apiVersion: v1
kind: Namespace
metadata: {name: meshed, labels: {istio.io/dataplane-mode: ambient}}
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
  ports: [{name: http, port: 80, targetPort: 8080}, {name: rpc, port: 7070}]
---
apiVersion: v1
kind: Service
metadata: {name: web-v1, namespace: shop}
spec:
  selector: {app: v1}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: 80, targetPort: 8080}, {name: rpc, port: 7070}]
---
apiVersion: v1
kind: Service
metadata: {name: web-v2, namespace: shop}
spec:
  selector: {app: v2}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: 80, targetPort: 8080}, {name: rpc, port: 7070}]
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

/// What the official suite does not compare: where a redirect leads, and which path the application sees.
const FILTERS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: filters, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, sectionName: http}]
  rules:
  - name: moved
    matches: [{path: {type: PathPrefix, value: /old}}]
    filters:
    - type: RequestRedirect
      requestRedirect: {hostname: example.org, statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}
  - matches: [{path: {type: PathPrefix, value: /secure}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 308}}]
  - matches: [{path: {type: PathPrefix, value: /port}}]
    filters: [{type: RequestRedirect, requestRedirect: {port: 8083, statusCode: 307, path: {type: ReplaceFullPath, replaceFullPath: /whole}}}]
  - matches: [{path: {type: PathPrefix, value: /prefix}}]
    filters:
    - {type: URLRewrite, urlRewrite: {hostname: other.test, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Set, value: rule}], remove: [x-gone]}}
    - {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-answer, value: rule}]}}
    backendRefs: [{name: web-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /own}}]
    backendRefs:
    - name: web-v1
      port: 80
      filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-own, value: v1}]}}]
  - matches: [{path: {type: PathPrefix, value: /query}, queryParams: [{name: a, value: 'b c'}, {name: n, type: RegularExpression, value: '[0-9]+'}]}]
    backendRefs: [{name: web-v2, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /mirror}}]
    filters: [{type: RequestMirror, requestMirror: {backendRef: {name: web-v2, port: 80}}}]
    backendRefs: [{name: web-v1, port: 80}]
";

const CALLS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: calls, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 7070}]
  rules:
  - matches: [{method: {service: pkg.Echo, method: Say}}]
    backendRefs:
    - {name: web-v1, port: 7070, weight: 70}
    - {name: web-v2, port: 7070, weight: 30}
    - {name: gone, port: 7070, weight: 0}
  - matches: [{method: {type: RegularExpression, method: 'Only.*'}, headers: [{name: tenant, value: b}]}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-seen, value: 'yes'}]}}]
    backendRefs: [{name: web-v2, port: 7070}]
  - matches: [{method: {service: pkg.Gone}}]
    backendRefs: [{name: gone, port: 7070}]
";

/// For clients of the namespace that wrote it, and nobody else.
const CONSUMER: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: mine, namespace: meshed}
spec:
  parentRefs: [{group: '', kind: Service, name: web, namespace: shop, port: 80}]
  rules:
  - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-mine, value: 'yes'}]}}]
    backendRefs: [{name: web, namespace: shop, port: 80}]
";

struct Fixture {
    world: World,
    _servers: Vec<Server>,
    client: Pod,
    /// Enrolled, of another namespace.
    consumer: Pod,
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
            ("meshed", "consumer", "n1"),
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
        let servers = vec![
            Server::start(&v1, PORT, http_echo("v1"))?,
            Server::start(&v2, PORT, http_echo("v2"))?,
            Server::start(&v1, RPC_PORT, grpc_echo("v1"))?,
            Server::start(&v2, RPC_PORT, grpc_echo("v2"))?,
        ];
        Ok(Self {
            client: world.pod("shop/client")?,
            consumer: world.pod("meshed/consumer")?,
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
    suite.case("a_redirect_names_the_whole_location", redirects);
    suite.case("rewrites_header_changes_and_query_matches_are_what_the_server_sees", filters);
    suite.case("a_filter_that_is_not_supported_is_never_skipped", unsupported);
    suite.case("grpc_calls_of_one_connection_are_split_and_refused_as_grpc", calls);
    suite.case("a_route_of_another_namespace_is_for_its_own_clients", consumers);
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

fn redirects(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", FILTERS)])?;
    for (path, status, location) in [
        ("/old/a?q=1", 301, "http://example.org/new/a?q=1"),
        ("/secure/x", 308, "https://web/secure/x"),
        ("/port/x?q", 307, "http://web:8083/whole?q"),
    ] {
        let answer = http(&fixture.client, fixture.vip(Family::V4)?, "web", path, "")?;
        ensure!(answer.status == status, "{path}: {}", answer.head);
        ensure!(header(&answer.head, "location") == [location], "{path}: {}", answer.head);
    }
    Ok(())
}

/// Values of one header field.
fn header<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
}

fn filters(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", FILTERS)])?;
    let get = |path: &str, lines: &str| http(&fixture.client, fixture.vip(Family::V6)?, "web", path, lines);
    let answer = get("/prefix/a/b?q=1", "x-gone: 1\r\nx-set: client\r\n")?;
    ensure!(answer.status == 200 && answer.body.contains("GET /a/b?q=1 HTTP/1.1"), "{}", answer.body);
    for (name, values) in [("host", &["other.test"][..]), ("x-set", &["rule"]), ("x-gone", &[])] {
        ensure!(header(&answer.body, name) == values, "{name}: {}", answer.body);
    }
    ensure!(header(&answer.head, "x-answer") == ["rule"], "{}", answer.head);
    let answer = get("/own", "")?;
    ensure!(header(&answer.body, "x-own") == ["v1"], "{}", answer.body);
    for (path, status) in
        [("/query?a=b+c&n=12", 200), ("/query?n=12&a=b%20c", 200), ("/query?a=b+c&n=x", 404), ("/query", 404)]
    {
        let answer = get(path, "")?;
        ensure!(answer.status == status, "{path}: {}", answer.status);
    }
    Ok(())
}

fn unsupported(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", FILTERS)])?;
    let answer = http(&fixture.client, fixture.vip(Family::V4)?, "web", "/mirror", "")?;
    ensure!(answer.status == 500, "{} {}", answer.status, answer.body);
    Ok(())
}

fn calls(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", ""), ("calls.yaml", CALLS)])?;
    for family in [Family::V4, Family::V6] {
        let to = SocketAddr::new(fixture.world.vip("shop/web", family)?, RPC_PORT);
        // One connection for all of them: what is split is calls, not connections.
        let calls = |method: &str, count, headers: &[(&str, &str)]| {
            call(&fixture.client, to, &Calls { authority: "web", method, count, headers })
        };
        let answers = calls("/pkg.Echo/Say", 500, &[])?;
        ensure!(answers.iter().all(|answer| answer.status == Some(0)), "{:?}", answers.first());
        let second = answers.iter().filter(|answer| answer.body.starts_with("v2 ")).count();
        // n = 500, p = 0.3: mean 150, sigma 10.2; 3.3 sigma each way.
        ensure!((116..=184).contains(&second), "{second} of 500 calls went to the side of 30 %");
        let answer = &calls("/pkg.Any/OnlyThis", 1, &[("tenant", "b")])?[0];
        ensure!(answer.status == Some(0) && answer.body.contains("x-seen: yes"), "{answer:?}");
        // 12 = unimplemented, 14 = unavailable (no such backend): as gRPC, whatever HTTP would say.
        for (method, status) in [("/pkg.Any/OnlyThis", 12), ("/pkg.Echo/Else", 12), ("/pkg.Gone/Any", 14)] {
            let answer = &calls(method, 1, &[])?[0];
            ensure!(answer.status == Some(status) && answer.http == 200, "{method}: {answer:?}");
        }
    }
    fixture.world.apply(&[("calls.yaml", "")])?;
    Ok(())
}

fn consumers(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("route.yaml", ""), ("consumer.yaml", CONSUMER)])?;
    let mine = |pod: &Pod| {
        let answer = http(pod, fixture.vip(Family::V4)?, "web", "/", "")?;
        ensure!(answer.status == 200, "{}: {} {}", pod.name, answer.status, answer.body);
        Ok(header(&answer.head, "x-mine") == ["yes"])
    };
    ensure!(mine(&fixture.consumer)?, "the route has no effect on the clients of its namespace");
    ensure!(!mine(&fixture.client)?, "the route has an effect on other clients");
    fixture.world.apply(&[("consumer.yaml", "")])?;
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
