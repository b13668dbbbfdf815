//! Objects as YAML, told back as one line per condition.

use std::sync::Arc;

use super::*;
use crate::{
    compile::{Fragments, compile},
    source::{Kind as ObjectKind, parse},
    translate::{Mesh, translate},
};

const BASE: &str = "
{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {name: undermesh-waypoint, generation: 2}, spec: {controllerName: undermesh.io/gateway-controller}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Node, metadata: {name: n1}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw, namespace: shop, generation: 3}
spec: {gatewayClassName: undermesh-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: gw, namespace: shop}
spec: {clusterIP: 10.96.0.9, selector: {gateway.networking.k8s.io/gateway-name: gw}, ports: [{port: 15008}]}
---
apiVersion: v1
kind: Pod
metadata: {name: gw-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: gw}}
spec: {nodeName: n1, serviceAccountName: gw, containers: []}
status: {phase: Running, podIP: 10.0.0.9}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, generation: 7, labels: {istio.io/use-waypoint: gw}}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}, {name: grpc, port: 90}]}
---
";

fn published(more: &str) -> Published {
    let mut fragments = Fragments::new();
    for text in [BASE, more] {
        let parsed = parse("t.yaml", text);
        assert!(!parsed.broken(), "{:?}", parsed.problems);
        for object in parsed.objects {
            fragments.insert(object.key.clone(), Arc::new(translate(&object, &Mesh::default())));
        }
    }
    Published::default().next(compile(&fragments, &Mesh::default()))
}

fn told(conditions: &[Condition]) -> Vec<String> {
    let line = |c: &Condition| {
        let sign = if c.status == Truth::True { '+' } else { '-' };
        format!("{sign}{} {} @{}", c.kind, c.reason, c.observed_generation)
    };
    conditions.iter().map(line).collect()
}

fn status(more: &str, kind: ObjectKind, namespace: &str, name: &str) -> Option<ObjectStatus> {
    objects(&published(more), &BTreeMap::new(), &Refused::new())
        .remove(&ObjectKey::new(kind, namespace, name))
}

/// Conditions of a route at its first parent.
fn route(kind: &str, spec: &str, more: &str) -> Option<Vec<String>> {
    let yaml = format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r, namespace: shop, generation: 5, creationTimestamp: '2025-01-01T00:00:00Z'}}\nspec: {spec}\n---\n{more}"
    );
    let of = if kind == "HTTPRoute" { ObjectKind::HttpRoute } else { ObjectKind::GrpcRoute };
    match status(&yaml, of, "shop", "r")? {
        ObjectStatus::Route(RouteStatus { parents }) => Some(told(&parents.first()?.conditions)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_class_of_ours_is_judged_and_another_is_not() {
    let class = |name: &str, controller: &str| {
        format!(
            "---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {{name: {name}, generation: 4}}, spec: {{controllerName: {controller}}}}}\n"
        )
    };
    let of = |yaml: &str, name: &str| match status(yaml, ObjectKind::GatewayClass, "", name) {
        Some(ObjectStatus::Class(class)) => Some((told(&class.conditions), class.supported_features.len())),
        _ => None,
    };
    assert_eq!(
        of("", "undermesh-waypoint"),
        Some((vec!["+Accepted Accepted @2".to_owned()], FEATURES.len()))
    );
    let ingress = of(&class("undermesh", CONTROLLER), "undermesh");
    assert_eq!(ingress, Some((vec!["-Accepted Unsupported @4".to_owned()], 0)));
    assert_eq!(of(&class("nginx", "example.com/c"), "nginx"), None);
    assert!(FEATURES.is_sorted());
}

#[test]
fn a_gateway_for_which_nothing_can_be_made_says_so() {
    let key = ObjectKey::new(ObjectKind::Gateway, "shop", "gw");
    let why = "Service shop/gw is there already and does not belong to the Gateway: left alone";
    let refused = Refused::from([(key.clone(), why.to_owned())]);
    let all = objects(&published(""), &BTreeMap::new(), &refused);
    let Some(ObjectStatus::Gateway(status)) = all.get(&key) else { panic!("{all:?}") };
    assert_eq!(told(&status.conditions), ["+Accepted Accepted @3", "-Programmed NoResources @3"]);
    assert_eq!(status.conditions[1].message, why);
    assert!(told(&status.listeners[0].conditions).contains(&"-Programmed Pending @3".to_owned()));
}

#[test]
fn a_gateway_says_where_it_is_and_what_it_serves() {
    let of = |yaml: &str| match status(yaml, ObjectKind::Gateway, "shop", "gw") {
        Some(ObjectStatus::Gateway(status)) => status,
        other => panic!("{other:?}"),
    };
    let status = of("");
    assert_eq!(told(&status.conditions), ["+Accepted Accepted @3", "+Programmed Programmed @3"]);
    assert_eq!(status.addresses[0].value, "10.96.0.9");
    let listener = &status.listeners[0];
    assert_eq!((listener.supported_kinds.len(), listener.attached_routes), (2, 0));
    assert_eq!(
        told(&listener.conditions),
        [
            "+Accepted Accepted @3",
            "-Conflicted NoConflicts @3",
            "+ResolvedRefs ResolvedRefs @3",
            "+Programmed Programmed @3"
        ]
    );
    let gateway = |listeners: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: gw, namespace: shop, generation: 3}}\nspec: {{gatewayClassName: undermesh-waypoint, listeners: [{listeners}]}}\n"
        )
    };
    let hbone = "{name: mesh, port: 15008, protocol: HBONE}";
    let http = "{name: http, port: 80, protocol: HTTP}";
    for (listeners, conditions) in [
        (format!("{hbone}, {http}"), ["+Accepted ListenersNotValid @3", "+Programmed Programmed @3"]),
        (http.to_owned(), ["-Accepted ListenersNotValid @3", "-Programmed Invalid @3"]),
    ] {
        let status = of(&gateway(&listeners));
        assert_eq!(told(&status.conditions), conditions, "{listeners}");
        let last = status.listeners.last().unwrap();
        assert_eq!(told(&last.conditions)[0], "-Accepted UnsupportedProtocol @3");
    }
    let kinds = of(&gateway(
        "{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {kinds: [{kind: TLSRoute}, {kind: GRPCRoute}]}}",
    ));
    assert_eq!(kinds.listeners[0].supported_kinds, [route_kind(Kind::Grpc)]);
    assert_eq!(told(&kinds.listeners[0].conditions)[2], "-ResolvedRefs InvalidRouteKinds @3");
    let no_service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: gw, namespace: shop}\nspec: {ports: [{port: 15008}]}\n";
    assert_eq!(told(&of(no_service).conditions)[1], "-Programmed AddressNotAssigned @3");
    let attached = "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: shop}, spec: {parentRefs: [{name: gw}], rules: [{backendRefs: [{name: gone, port: 1}]}]}}\n";
    assert_eq!(of(attached).listeners[0].attached_routes, 1);
}

#[test]
fn routes_are_told_for_each_parent_of_ours() {
    let cart = "{group: '', kind: Service, name: cart}";
    let spec = |parent: &str, rules: &str| format!("{{parentRefs: [{parent}], rules: [{rules}]}}");
    let to = "{backendRefs: [{name: cart, port: 80}]}";
    let mirror =
        "{filters: [{type: RequestMirror, requestMirror: {}}], backendRefs: [{name: cart, port: 80}]}";
    let (yes, resolved) = ("+Accepted Accepted @5", "+ResolvedRefs ResolvedRefs @5");
    let held = "-undermesh.io/InForce Pending @5";
    for (parent, rules, want) in [
        (cart, to, vec![yes, resolved, held]),
        ("{group: '', kind: Service, name: cart, sectionName: http}", to, vec![yes, resolved, held]),
        (
            "{group: '', kind: Service, name: cart, sectionName: web}",
            to,
            vec!["-Accepted NoMatchingParent @5", resolved],
        ),
        (
            "{group: '', kind: Service, name: cart, port: 81}",
            to,
            vec!["-Accepted NoMatchingParent @5", resolved],
        ),
        ("{group: '', kind: Service, name: gone}", to, vec!["-Accepted NoMatchingParent @5", resolved]),
        ("{group: '', kind: Service, name: gw}", to, vec!["-Accepted AncestorNotBound @5", resolved]),
        ("{name: gw}", to, vec![yes, resolved, held]),
        ("{name: gw, sectionName: mesh}", to, vec![yes, resolved, held]),
        ("{name: gw, sectionName: http}", to, vec!["-Accepted NoMatchingParent @5", resolved]),
        (
            cart,
            "{backendRefs: [{name: gone, port: 80}]}",
            vec![yes, "-ResolvedRefs BackendNotFound @5", held],
        ),
        (
            cart,
            "{backendRefs: [{kind: X, name: a, port: 80}]}",
            vec![yes, "-ResolvedRefs InvalidKind @5", held],
        ),
        (
            cart,
            "{backendRefs: [{name: a, namespace: bank, port: 80}]}",
            vec![yes, "-ResolvedRefs RefNotPermitted @5", held],
        ),
        (cart, mirror, vec!["-Accepted UnsupportedValue @5", resolved, held]),
        (
            cart,
            &format!("{to}, {mirror}"),
            vec![yes, resolved, "+PartiallyInvalid UnsupportedValue @5", held],
        ),
        // A backend's share alone.
        (
            cart,
            "{backendRefs: [{name: cart, port: 80}, {name: cart, port: 80, filters: [{type: RequestMirror, requestMirror: {}}]}]}",
            vec![yes, resolved, "+PartiallyInvalid UnsupportedValue @5", held],
        ),
        (
            cart,
            "{matches: [{path: {type: Like, value: /}}]}",
            vec!["-Accepted UnsupportedValue @5", resolved],
        ),
    ] {
        assert_eq!(
            route("HTTPRoute", &spec(parent, rules), ""),
            Some(want.iter().map(ToString::to_string).collect()),
            "{parent} {rules}"
        );
    }
    let nginx = "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: other, namespace: shop}, spec: {gatewayClassName: nginx}}\n";
    assert_eq!(route("HTTPRoute", &spec("{name: other}", to), nginx), None, "another controller's parent");
    let narrow = "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: gw, namespace: shop}, spec: {gatewayClassName: undermesh-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {kinds: [{kind: HTTPRoute}]}}]}}\n";
    let grpc = route("GRPCRoute", &spec("{name: gw}", to), narrow);
    assert_eq!(grpc.unwrap()[0], "-Accepted NotAllowedByListeners @5");
}

#[test]
fn of_two_kinds_with_one_hostname_the_older_route_counts() {
    let other = |hostnames: &str, year: &str| {
        format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: h, namespace: shop, creationTimestamp: '{year}-01-01T00:00:00Z'}}, spec: {{parentRefs: [{{group: '', kind: Service, name: cart}}], hostnames: [{hostnames}]}}}}\n"
        )
    };
    let spec = |hostnames: &str| {
        format!(
            "{{parentRefs: [{{group: '', kind: Service, name: cart}}], hostnames: [{hostnames}], rules: [{{backendRefs: [{{name: cart, port: 90}}]}}]}}"
        )
    };
    for (own, theirs, year, accepted) in [
        ("", "", "2024", false),
        ("", "", "2026", true),
        ("a.test", "b.test", "2024", true),
        ("a.test", "'*.test'", "2024", false),
        ("'*.a.test'", "'*.test'", "2024", false),
        ("", "b.test", "2024", false),
    ] {
        let got = route("GRPCRoute", &spec(own), &other(theirs, year)).unwrap();
        let want = if accepted { "+Accepted Accepted @5" } else { "-Accepted Conflicted @5" };
        assert_eq!(got[0], want, "{own} {theirs} {year}");
    }
}

#[test]
fn a_service_says_which_waypoint_it_is_bound_to() {
    let of = |labels: &str| {
        let yaml = format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop, generation: 7, labels: {{{labels}}}}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: 80}}]}}\n"
        );
        match status(&yaml, ObjectKind::Service, "shop", "cart") {
            Some(ObjectStatus::Conditions(status)) => told(&status.conditions),
            None => Vec::new(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(of("istio.io/use-waypoint: gw"), ["+istio.io/WaypointBound WaypointAccepted @7"]);
    assert_eq!(of("istio.io/use-waypoint: gone"), ["-istio.io/WaypointBound WaypointMissing @7"]);
    assert_eq!(of(""), Vec::<String>::new());
    // Written otherwise: it goes on without.
    let yaml = "---\napiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop, labels: {istio.io/use-waypoint: gone, undermesh.io/waypoint-bypass: allow}}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";
    let published = published(yaml);
    let service = published.world.services.values().find(|service| &*service.name == "cart").unwrap();
    assert_eq!(service.waypoint, None);
}

#[test]
fn the_json_is_what_the_api_server_takes() {
    let yaml = "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: shop, generation: 1}, spec: {parentRefs: [{group: '', kind: Service, name: cart, port: 80}]}}\n";
    let status = status(yaml, ObjectKind::HttpRoute, "shop", "r").unwrap();
    let json = serde_json::to_value(&status).unwrap();
    let parent = &json["parents"][0];
    assert_eq!(parent["controllerName"], "undermesh.io/gateway-controller");
    assert_eq!(
        parent["parentRef"],
        serde_json::json!({"group": "", "kind": "Service", "namespace": "shop", "name": "cart", "port": 80})
    );
    let condition = &parent["conditions"][0];
    assert_eq!((&condition["type"], &condition["status"]), (&"Accepted".into(), &"True".into()));
    assert_eq!(condition["observedGeneration"], 1);
}
