//! Worlds written as YAML, told back in one line per fact.

use std::collections::BTreeMap;

use mesh_core::model::{Action, Enrolment, Health, Scope, TunnelProtocol, WaypointRef};

use super::*;
use crate::{
    source::{Severity, parse},
    translate::translate,
};

/// The smallest mesh that most rules need: two namespaces, a waypoint, a bound service and its pods.
const BASE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bank, labels: {team: money}}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {nodeName: n1, serviceAccountName: cart, containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-2, namespace: shop, labels: {app: cart, version: v2}}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.0.0.2, conditions: [{type: Ready, status: 'False'}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, labels: {istio.io/use-waypoint: gw}}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: web}, {name: tcp-x, port: 81}, {port: 82}]}
---
apiVersion: v1
kind: Service
metadata: {name: plain, namespace: shop}
spec: {clusterIP: 10.96.0.2, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: vault, namespace: bank}
spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: istio-waypoint}
spec: {controllerName: undermesh.io/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: gw, namespace: shop}
spec: {clusterIP: 10.96.0.9, selector: {gateway.networking.k8s.io/gateway-name: gw}, ports: [{port: 15008}]}
---
apiVersion: v1
kind: Pod
metadata: {name: gw-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: gw, istio.io/dataplane-mode: none, app: cart}}
spec: {nodeName: n1, serviceAccountName: gw, containers: []}
status: {phase: Running, podIP: 10.0.0.9}
";

/// The world of the base and `more`, whose objects replace those of the base.
fn world(more: &str) -> World {
    let mut fragments = Fragments::new();
    for text in [BASE, more] {
        let parsed = parse("t.yaml", text);
        assert!(!parsed.broken(), "{:?}", parsed.problems);
        for object in parsed.objects {
            fragments.insert(object.key.clone(), Arc::new(translate(&object, &Mesh::default())));
        }
    }
    compile(&fragments, &Mesh::default())
}

fn pod<'a>(world: &'a World, name: &str) -> &'a Workload {
    &world.workloads[&WorkloadKey(format!("Kubernetes//Pod/{name}").into())]
}

fn service<'a>(world: &'a World, namespace: &str, name: &str) -> &'a Service {
    &world.services[&ServiceKey::new(namespace, &format!("{name}.{namespace}.svc.cluster.local"))]
}

/// Problems that are worse than a remark, as `object field: reason`.
fn complaints(world: &World) -> Vec<String> {
    let bad = world.problems.iter().filter(|problem| problem.severity > Severity::Info);
    bad.map(|problem| format!("{} {}: {}", problem.object, problem.field, problem.reason)).collect()
}

fn object(kind: &str, name: &str, namespace: &str, spec: &str) -> String {
    let api = match kind {
        "HTTPRoute" | "GRPCRoute" | "Gateway" | "ReferenceGrant" => "gateway.networking.k8s.io/v1",
        "AuthorizationPolicy" | "PeerAuthentication" => "security.istio.io/v1",
        "EndpointSlice" => "discovery.k8s.io/v1",
        _ => "v1",
    };
    format!(
        "apiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\n{spec}\n---\n"
    )
}

#[test]
fn the_base_is_as_it_was_written() {
    let world = world("");
    assert_eq!(complaints(&world), Vec::<String>::new());
    let cart = pod(&world, "shop/cart-1");
    assert_eq!(
        (cart.tunnel, cart.native_tunnel, &*cart.service_account),
        (TunnelProtocol::Hbone, false, "cart")
    );
    assert_eq!((cart.addresses.len(), &*cart.locality.zone, &*cart.node), (2, "z1", "n1"));
    let key = &service(&world, "shop", "cart").key;
    assert_eq!(cart.services[key], BTreeMap::from([(80, 8080), (81, 81), (82, 82)]));
    // A pod without the named port has no endpoint for it.
    let second = pod(&world, "shop/cart-2");
    assert_eq!(second.services[key], BTreeMap::from([(81, 81), (82, 82)]));
    assert_eq!(second.health, mesh_core::model::Health::Unhealthy);
    let gw = pod(&world, "shop/gw-1");
    assert_eq!((gw.tunnel, gw.native_tunnel, gw.waypoint.clone()), (TunnelProtocol::Hbone, true, None));
    let ports: Vec<_> =
        service(&world, "shop", "cart").ports.iter().map(|port| (port.port, port.target)).collect();
    assert_eq!(ports, [(80, 0), (81, 81), (82, 82)]);
}

#[test]
fn compiling_twice_gives_the_same() {
    assert_eq!(world(""), world(""));
}

#[test]
fn a_service_is_bound_by_its_nearest_label() {
    let bound = |service_labels: &str, namespace_labels: &str, gateway: &str| {
        let more = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{istio.io/dataplane-mode: ambient, {namespace_labels}}}}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop, labels: {{{service_labels}}}}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: 80}}]}}\n---\n{gateway}"
        );
        let world = world(&more);
        let service = service(&world, "shop", "cart").clone();
        let reference = service.waypoint.map(|waypoint| match waypoint {
            WaypointRef::Service { service, port } => format!("{service}:{port}"),
            WaypointRef::Address { address, port } => format!("{address}:{port}"),
        });
        let told =
            complaints(&world).into_iter().find(|complaint| complaint.starts_with("Service shop/cart "));
        let reason = told.and_then(|complaint| Some(complaint.split(": ").nth(1)?.to_owned()));
        (reference, reason)
    };
    let gw = Some("shop/gw.shop.svc.cluster.local:15008".to_owned());
    let nowhere = |gateway: &str| Some(format!("shop/unbound.{gateway}.svc.cluster.local:15008"));
    let far = object(
        "Gateway",
        "far",
        "bank",
        "spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}",
    );
    let open = far.replace("protocol: HBONE", "protocol: HBONE, allowedRoutes: {namespaces: {from: All}}");
    let workloads = object(
        "Gateway",
        "gw",
        "shop",
        "spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}",
    )
    .replace("name: gw,", "name: gw, labels: {istio.io/waypoint-for: workload},");
    let nothing = workloads.replace("waypoint-for: workload", "waypoint-for: none");
    let of_class = "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {name: istio-waypoint, labels: {istio.io/waypoint-for: workload}}\nspec: {controllerName: undermesh.io/gateway-controller}\n";
    for (own, inherited, more, reference, reason) in [
        ("", "", "", None, None),
        ("istio.io/use-waypoint: gw", "", "", gw.clone(), None),
        ("", "istio.io/use-waypoint: gw", "", gw.clone(), None),
        ("istio.io/use-waypoint: none", "istio.io/use-waypoint: gw", "", None, None),
        ("istio.io/use-waypoint: gw", "istio.io/use-waypoint: other", "", gw.clone(), None),
        (
            "istio.io/use-waypoint: gone",
            "istio.io/use-waypoint: gw",
            "",
            nowhere("gone.shop"),
            Some("WaypointMissing"),
        ),
        (
            "istio.io/use-waypoint: far, istio.io/use-waypoint-namespace: bank",
            "",
            &*far,
            nowhere("far.bank"),
            Some("AttachmentDenied"),
        ),
        (
            "istio.io/use-waypoint: far, istio.io/use-waypoint-namespace: bank",
            "",
            &*open,
            Some("bank/far.bank.svc.cluster.local:15008".to_owned()),
            Some("WaypointIsNotReady"),
        ),
        // Named by the object itself, it is meant; by the namespace, it may be meant for others.
        ("istio.io/use-waypoint: gw", "", &*workloads, nowhere("gw.shop"), Some("UnsupportedTrafficType")),
        ("", "istio.io/use-waypoint: gw", &*workloads, None, None),
        ("istio.io/use-waypoint: gw", "", &*nothing, None, None),
        // What the Gateway does not say, its class may.
        ("", "istio.io/use-waypoint: gw", of_class, None, None),
    ] {
        let got = bound(own, inherited, more);
        assert_eq!((got.0, got.1.as_deref()), (reference, reason), "{own} | {inherited}");
    }
}

#[test]
fn a_service_of_a_waypoint_is_never_bound_and_a_headless_one_neither() {
    let more = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/use-waypoint: gw}}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: plain, namespace: shop}\nspec: {clusterIP: None, ports: [{port: 80}]}\n";
    let world = world(more);
    assert_eq!(service(&world, "shop", "gw").waypoint, None);
    assert_eq!(service(&world, "shop", "plain").waypoint, None);
    // The namespace's waypoint takes services only, so its pods are not bound.
    assert_eq!(pod(&world, "shop/cart-1").waypoint, None);
}

/// Policies of `cart-1` with what they deny plaintext on: `name: only=… except=…`.
fn plaintext(world: &World, pod_name: &str) -> Vec<String> {
    let policies = pod(world, pod_name).policies.iter().map(|key| {
        let policy = &world.policies[key];
        assert_eq!((policy.action, policy.scope), (Action::Deny, Scope::WorkloadSelector));
        let clauses = &policy.rules[0].clauses;
        let (ports, last) = clauses.split_at(clauses.len() - 1);
        assert_eq!(last[0].matches[0].not_principals, [mesh_core::model::StringMatch::Presence]);
        let on: Vec<_> = ports.iter().flat_map(|c| c.matches[0].destination_ports.clone()).collect();
        let except: Vec<_> = ports.iter().flat_map(|c| c.matches[0].not_destination_ports.clone()).collect();
        format!("{key} on={on:?} except={except:?}")
    });
    policies.collect()
}

#[test]
fn peer_authentication_is_decided_by_the_nearest_level() {
    let mesh = |mode: &str| {
        object("PeerAuthentication", "m", "undermesh-system", &format!("spec: {{mtls: {{mode: {mode}}}}}"))
    };
    let namespace =
        |mode: &str| object("PeerAuthentication", "n", "shop", &format!("spec: {{mtls: {{mode: {mode}}}}}"));
    let workload = |mode: &str, ports: &str| {
        let ports = if ports.is_empty() { String::new() } else { format!(", portLevelMtls: {{{ports}}}") };
        object(
            "PeerAuthentication",
            "w",
            "shop",
            &format!("spec: {{selector: {{matchLabels: {{app: cart}}}}, mtls: {{mode: {mode}}}{ports}}}"),
        )
    };
    let strict = "undermesh-system/istio_converted_static_strict on=[] except=[]";
    let own = "shop/converted_peer_authentication_w";
    for (objects, want) in [
        (vec![], None),
        (vec![mesh("STRICT")], Some(strict.to_owned())),
        (vec![mesh("PERMISSIVE")], None),
        (vec![mesh("STRICT"), namespace("PERMISSIVE")], None),
        (vec![mesh("STRICT"), namespace("UNSET")], Some(strict.to_owned())),
        (vec![mesh("PERMISSIVE"), namespace("STRICT")], Some(strict.to_owned())),
        (vec![namespace("STRICT"), workload("PERMISSIVE", "")], None),
        (vec![namespace("STRICT"), workload("DISABLE", "")], None),
        (vec![namespace("STRICT"), workload("UNSET", "")], Some(strict.to_owned())),
        (vec![namespace("PERMISSIVE"), workload("STRICT", "")], Some(strict.to_owned())),
        (vec![workload("STRICT", "8080: {mode: PERMISSIVE}")], Some(format!("{own} on=[] except=[8080]"))),
        (vec![workload("STRICT", "8080: {mode: DISABLE}")], Some(format!("{own} on=[] except=[8080]"))),
        (vec![workload("STRICT", "8080: {mode: STRICT}")], Some(strict.to_owned())),
        (
            vec![workload("PERMISSIVE", "8080: {mode: STRICT}, 9: {mode: DISABLE}")],
            Some(format!("{own} on=[8080] except=[]")),
        ),
        (vec![workload("PERMISSIVE", "8080: {mode: PERMISSIVE}")], None),
        (
            vec![namespace("STRICT"), workload("UNSET", "8080: {mode: PERMISSIVE}")],
            Some(format!("{own} on=[] except=[8080]")),
        ),
        // A lone DISABLE port under an UNSET object makes no exception.
        (vec![namespace("STRICT"), workload("UNSET", "8080: {mode: DISABLE}")], Some(strict.to_owned())),
        (vec![workload("UNSET", "8080: {mode: STRICT}")], Some(format!("{own} on=[8080] except=[]"))),
        (vec![workload("STRICT", "8080: {mode: UNSET}")], Some(strict.to_owned())),
    ] {
        let world = world(&objects.concat());
        assert_eq!(plaintext(&world, "shop/cart-1"), Vec::from_iter(want), "{objects:?}");
        // Waypoints take only tunnels, so plaintext policy is not for them.
        assert_eq!(plaintext(&world, "shop/gw-1"), Vec::<String>::new());
    }
}

#[test]
fn of_one_level_the_oldest_peer_authentication_counts() {
    let dated = |name: &str, date: &str, mode: &str| {
        object("PeerAuthentication", name, "shop", &format!("spec: {{mtls: {{mode: {mode}}}}}"))
            .replace("namespace: shop", &format!("namespace: shop, creationTimestamp: '{date}'"))
    };
    let (old, new) = ("2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z");
    for (objects, strict) in [
        (dated("b", old, "STRICT") + &dated("a", new, "PERMISSIVE"), true),
        (dated("b", new, "STRICT") + &dated("a", old, "PERMISSIVE"), false),
        (dated("a", old, "PERMISSIVE") + &dated("b", old, "STRICT"), false),
    ] {
        assert_eq!(!plaintext(&world(&objects), "shop/cart-1").is_empty(), strict, "{objects}");
    }
}

#[test]
fn selectors_bind_policies_to_pods_of_their_reach() {
    let policy =
        |namespace: &str, spec: &str| object("AuthorizationPolicy", "p", namespace, &format!("spec: {spec}"));
    for (yaml, scope, named) in [
        (policy("shop", "{}"), Some(Scope::Namespace), false),
        (policy("undermesh-system", "{}"), Some(Scope::Global), false),
        (policy("shop", "{selector: {matchLabels: {app: cart}}}"), Some(Scope::WorkloadSelector), true),
        (policy("shop", "{selector: {matchLabels: {app: other}}}"), Some(Scope::WorkloadSelector), false),
        (policy("bank", "{selector: {matchLabels: {app: cart}}}"), Some(Scope::WorkloadSelector), false),
        (
            policy("undermesh-system", "{selector: {matchLabels: {app: cart}}}"),
            Some(Scope::WorkloadSelector),
            true,
        ),
        (policy("shop", "{action: AUDIT, rules: [{}]}"), None, false),
    ] {
        let world = world(&yaml);
        assert_eq!(world.policies.values().next().map(|policy| policy.scope), scope, "{yaml}");
        assert_eq!(!pod(&world, "shop/cart-1").policies.is_empty(), named, "{yaml}");
        assert!(pod(&world, "shop/gw-1").policies.is_empty(), "{yaml}");
    }
}

#[test]
fn a_policy_for_a_waypoint_denies_the_ports_of_its_targets() {
    let service_target = "{targetRefs: [{group: '', kind: Service, name: cart}], rules: [{}]}";
    for (spec, ports) in [
        (service_target, Some(vec![81, 82, 8080])),
        (
            "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gw}], rules: [{}]}",
            Some(vec![81, 82, 8080]),
        ),
        ("{targetRefs: [{group: '', kind: Service, name: gone}], rules: [{}]}", None),
        ("{targetRefs: [{group: '', kind: Service, name: cart}], action: AUDIT, rules: [{}]}", None),
    ] {
        let world = world(&object("AuthorizationPolicy", "p", "shop", &format!("spec: {spec}")));
        let key = PolicyKey::new("shop", "converted_waypoint_policy_p");
        assert!(!world.policies.contains_key(&PolicyKey::new("shop", "p")), "{spec}");
        let denied = world
            .policies
            .get(&key)
            .map(|policy| policy.rules[0].clauses[0].matches[0].destination_ports.clone());
        assert_eq!(denied, ports, "{spec}");
        assert_eq!(pod(&world, "shop/cart-2").policies.contains(&key), ports.is_some(), "{spec}");
    }
}

#[test]
fn a_policy_for_a_waypoint_denies_the_pods_that_are_bound_to_it_by_themselves() {
    let gateway =
        "spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}";
    let gateway = |takes: &str| {
        object("Gateway", "gw", "shop", gateway)
            .replace("name: gw,", &format!("name: gw, labels: {{istio.io/waypoint-for: {takes}}},"))
    };
    let pod_2 = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: cart-2, namespace: shop, labels: {app: cart, istio.io/use-waypoint: gw}}\nspec: {nodeName: n1, containers: []}\nstatus: {phase: Running, podIP: 10.0.0.2}\n";
    let of_class = "{targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}], rules: [{}]}";
    let of_gateway =
        "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gw}], rules: [{}]}";
    let of_another =
        "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: other}], rules: [{}]}";
    for (takes, namespace, spec, denied) in [
        ("workload", "shop", of_gateway, true),
        ("all", "shop", of_gateway, true),
        ("all", "undermesh-system", of_class, true),
        ("service", "shop", of_gateway, false),
        ("all", "shop", of_class, false),
        ("all", "shop", of_another, false),
    ] {
        let policy = object("AuthorizationPolicy", "p", namespace, &format!("spec: {spec}"));
        let world = world(&format!("{policy}{}{pod_2}", gateway(takes)));
        let key = PolicyKey::new(namespace, "converted_waypoint_policy_p_pods");
        let everything =
            world.policies.get(&key).map(|policy| (policy.action, policy.rules[0].clauses.len()));
        assert_eq!(everything, denied.then_some((Action::Deny, 0)), "{takes}: {spec}");
        assert_eq!(pod(&world, "shop/cart-2").policies.contains(&key), denied, "{takes}: {spec}");
        // Not bound by itself.
        assert!(!pod(&world, "shop/cart-1").policies.contains(&key), "{takes}: {spec}");
    }
}

#[test]
fn a_policy_for_a_waypoint_closes_it_where_no_agent_can_deny() {
    let policy = object(
        "AuthorizationPolicy",
        "p",
        "shop",
        "spec: {targetRefs: [{group: '', kind: Service, name: cart}], rules: [{}]}",
    );
    // In the base the waypoint's own pod, which has no agent, is an endpoint too.
    let apart = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: gw-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: gw, istio.io/dataplane-mode: none}}\nspec: {nodeName: n1, serviceAccountName: gw, containers: []}\nstatus: {phase: Running, podIP: 10.0.0.9}\n";
    let policy = format!("{policy}{apart}");
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s, namespace: shop, labels: {kubernetes.io/service-name: cart}}\naddressType: IPv4\nports: [{name: http, port: 8080}]\nendpoints: [{addresses: [10.9.9.9]}]\n";
    assert_eq!(listeners(&world(&policy)).len(), 3);
    assert_eq!(listeners(&world(&format!("{policy}{slice}"))), Vec::<String>::new());
}

/// Routes of the listeners of `shop/gw`, as `port http? route…`.
fn listeners(world: &World) -> Vec<String> {
    let config = &world.waypoints["shop/gw"];
    let told = config.listeners.iter().map(|listener| {
        let routes: Vec<_> = listener.routes.iter().map(|route| route.name.to_string()).collect();
        let kind = if listener.http { "http" } else { "tcp" };
        format!("{} {kind} {}", listener.port, routes.join(",")).trim_end().to_owned()
    });
    told.collect()
}

#[test]
fn routes_attach_to_the_ports_of_bound_services() {
    let route = |name: &str, namespace: &str, parent: &str| {
        object("HTTPRoute", name, namespace, &format!("spec: {{parentRefs: [{parent}]}}"))
    };
    let cart = "group: '', kind: Service, name: cart";
    let (none, all) = (["80 http", "81 tcp", "82 tcp"], ["80 http r", "81 tcp", "82 http r"]);
    for (yaml, want, complaint) in [
        (String::new(), none, ""),
        (route("r", "shop", &format!("{{{cart}}}")), all, ""),
        (route("r", "shop", &format!("{{{cart}}}, {{{cart}, port: 80}}")), all, ""),
        (route("r", "shop", &format!("{{{cart}, port: 80}}")), ["80 http r", "81 tcp", "82 tcp"], ""),
        (route("r", "shop", &format!("{{{cart}, port: 81}}")), none, "declared as something else"),
        (route("r", "shop", &format!("{{{cart}, port: 99}}")), none, "NoMatchingParent"),
        (route("r", "shop", "{group: '', kind: Service, name: gone}"), none, "NoMatchingParent"),
        (route("r", "shop", "{group: '', kind: Service, name: plain}"), none, "bound to no waypoint"),
        // A consumer route: for clients of its own namespace, and so no reason for others to speak HTTP.
        (
            route("r", "bank", &format!("{{{cart}, namespace: shop}}")),
            ["80 http r", "81 tcp", "82 tcp r"],
            "",
        ),
        (route("r", "shop", "{name: gw}"), all, ""),
        (route("r", "shop", "{name: gw, port: 15008}"), all, ""),
        (route("r", "shop", "{name: gw, port: 80}"), none, "NoMatchingParent"),
        (route("r", "bank", "{name: gw, namespace: shop}"), none, "NotAllowedByListeners"),
        (route("r", "shop", "{name: gone}"), none, "NoMatchingParent"),
        (route("r", "shop", "{group: x, kind: Mesh, name: y}"), none, "not supported"),
    ] {
        let world = world(&yaml);
        assert_eq!(listeners(&world), want, "{yaml}");
        let complaints = complaints(&world).join("\n");
        assert_eq!(complaints.is_empty(), complaint.is_empty(), "{yaml}: {complaints}");
        assert!(complaints.contains(complaint), "{yaml}: {complaints}");
    }
}

/// What the status denies is in force nowhere: not on the ports where nothing is in its way either.
#[test]
fn a_route_that_is_refused_on_one_port_is_on_none() {
    let older = object(
        "HTTPRoute",
        "h",
        "shop",
        "spec: {parentRefs: [{group: '', kind: Service, name: cart, port: 80}]}",
    )
    .replace("namespace: shop", "namespace: shop, creationTimestamp: '2024-01-01T00:00:00Z'");
    let younger =
        object("GRPCRoute", "g", "shop", "spec: {parentRefs: [{group: '', kind: Service, name: cart}]}")
            .replace("namespace: shop", "namespace: shop, creationTimestamp: '2025-01-01T00:00:00Z'");
    let world = world(&(older + &younger));
    assert_eq!(listeners(&world), ["80 http h", "81 tcp", "82 tcp"]);
    let said = complaints(&world).join("\n");
    assert!(said.contains("Conflicted"), "{said}");
}

/// A cluster may have another controller whose class is not there yet.
#[test]
fn a_gateway_of_a_class_that_is_not_there_is_nobodys() {
    let of = |mesh: &Mesh, class: &str| {
        let parsed = parse(
            "t.yaml",
            &object(
                "Gateway",
                "w",
                "shop",
                &format!(
                    "spec: {{gatewayClassName: {class}, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}"
                ),
            ),
        );
        let translated = parsed.objects.iter().map(|one| (one.key.clone(), Arc::new(translate(one, mesh))));
        compile(&translated.collect(), mesh).waypoints.contains_key("shop/w")
    };
    let (cluster, directory) = (Mesh { needs_classes: true, ..Mesh::default() }, Mesh::default());
    assert!(!of(&cluster, "istio-waypoint") && of(&cluster, "undermesh-waypoint"));
    assert!(of(&directory, "istio-waypoint"));
}

#[test]
fn the_older_route_comes_first() {
    let route = |name: &str, date: &str| {
        object(
            "HTTPRoute",
            name,
            "shop",
            "spec: {parentRefs: [{group: '', kind: Service, name: cart, port: 80}]}",
        )
        .replace("namespace: shop", &format!("namespace: shop, creationTimestamp: '{date}'"))
    };
    let world = world(&(route("a", "2025-01-01T00:00:00Z") + &route("b", "2024-01-01T00:00:00Z")));
    assert_eq!(listeners(&world)[0], "80 http b,a");
}

#[test]
fn a_backend_that_cannot_be_found_keeps_its_share() {
    let backend = |backend: &str, more: &str| {
        let route = object(
            "HTTPRoute",
            "r",
            "shop",
            &format!(
                "spec: {{parentRefs: [{{group: '', kind: Service, name: cart, port: 80}}], rules: [{{backendRefs: [{backend}]}}]}}"
            ),
        );
        let world = world(&(route + more));
        let backend = world.waypoints["shop/gw"].listeners[0].routes[0].rules[0].backends[0].clone();
        (
            backend.weight,
            backend
                .target
                .map(|target| target.service.to_string())
                .map_err(|reason| reason.split(':').next().unwrap_or_default().to_owned()),
        )
    };
    let grant = |to: &str, from: &str| {
        object(
            "ReferenceGrant",
            "g",
            "bank",
            &format!(
                "spec: {{from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {from}}}], to: [{{group: '', kind: Service{to}}}]}}"
            ),
        )
    };
    let (vault, refused) =
        ("bank/vault.bank.svc.cluster.local".to_owned(), Err("RefNotPermitted".to_owned()));
    let far = "{name: vault, namespace: bank, port: 80, weight: 7}";
    for (refer, more, want) in [
        ("{name: plain, port: 80}", String::new(), (1, Ok("shop/plain.shop.svc.cluster.local".to_owned()))),
        ("{name: plain, port: 81, weight: 5}", String::new(), (5, Err("BackendNotFound".to_owned()))),
        ("{name: gone, port: 80}", String::new(), (1, Err("BackendNotFound".to_owned()))),
        (far, String::new(), (7, refused.clone())),
        (far, grant("", "shop"), (7, Ok(vault.clone()))),
        (far, grant(", name: vault", "shop"), (7, Ok(vault))),
        (far, grant(", name: other", "shop"), (7, refused.clone())),
        (far, grant("", "other"), (7, refused)),
    ] {
        assert_eq!(backend(refer, &more), want, "{refer} {more}");
    }
}

#[test]
fn endpoint_slices_replace_the_selector() {
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: cart-x, namespace: shop, labels: {kubernetes.io/service-name: cart}}\naddressType: IPv4\nports: [{name: http, port: 9090}]\nendpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: cart-1}}, {addresses: [192.0.2.1], conditions: {ready: false}}]\n";
    let world = world(slice);
    let key = service(&world, "shop", "cart").key.clone();
    assert_eq!(pod(&world, "shop/cart-1").services[&key], BTreeMap::from([(80, 9090)]));
    assert!(!pod(&world, "shop/cart-2").services.contains_key(&key));
    let other = &world.workloads
        [&WorkloadKey("Kubernetes/discovery.k8s.io/EndpointSlice/shop/cart-x/192.0.2.1".into())];
    assert_eq!((other.tunnel, other.health), (TunnelProtocol::None, mesh_core::model::Health::Unhealthy));
    assert_eq!(other.network_mode, mesh_core::model::NetworkMode::HostNetwork);
}

/// Node ports at every node, load balancers' and external addresses at the service's own ports; the oldest service has
/// an address and port, a pod's address stays the pod's.
#[test]
fn a_service_has_fronts_at_nodes_and_external_addresses() {
    let node = |name: &str, addresses: &str| {
        object("Node", name, "", &format!("status: {{addresses: [{addresses}]}}"))
            .replace("namespace: , ", "")
    };
    let service_of = |name: &str, age: &str, spec: &str| {
        object("Service", name, "bank", &format!("spec: {{{spec}}}")).replace(
            "namespace: bank",
            &format!("namespace: bank, creationTimestamp: '{age}-01-01T00:00:00Z'"),
        )
    };
    let world = world(
        &(BASE.to_owned()
            + "---\n"
            + &node(
                "n1",
                "{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: '2001:db8::1'}, {type: Hostname, address: n1}",
            )
            + &node("n2", "{type: InternalIP, address: 192.0.2.2}")
            + &service_of(
                "old",
                "2020",
                "clusterIP: 10.96.7.1, externalIPs: [198.51.100.7, 10.0.0.1], sessionAffinity: ClientIP, ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 81}]",
            )
            + &service_of(
                "new",
                "2021",
                "clusterIP: 10.96.7.2, externalIPs: [198.51.100.7], ports: [{name: a, port: 80}, {name: c, port: 82}]",
            )),
    );
    let fronts = |name| -> Vec<String> {
        let service = service(&world, "bank", name);
        service.fronts.iter().map(|front| format!("{} {}", front.at, front.port)).collect()
    };
    assert_eq!(
        fronts("old"),
        [
            "198.51.100.7:80 80",
            "198.51.100.7:81 81",
            "192.0.2.1:30080 80",
            "[2001:db8::1]:30080 80",
            "192.0.2.2:30080 80"
        ]
    );
    assert_eq!(fronts("new"), ["198.51.100.7:82 82"]);
    assert!(
        service(&world, "bank", "old").sticky.is_some() && service(&world, "bank", "new").sticky.is_none()
    );
    let told = complaints(&world);
    assert_eq!(told.iter().filter(|complaint| complaint.contains("AddressConflict")).count(), 1, "{told:?}");
}

#[test]
fn an_address_belongs_to_whoever_had_it_first() {
    let pod_of = |name: &str, ip: &str| {
        object(
            "Pod",
            name,
            "bank",
            &format!("spec: {{containers: []}}\nstatus: {{phase: Running, podIP: {ip}}}"),
        )
    };
    let service_of = object("Service", "fake", "bank", "spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}")
        .replace("namespace: bank", "namespace: bank, creationTimestamp: '2030-01-01T00:00:00Z'");
    let aged = BASE.replace(
        "{name: cart, namespace: shop,",
        "{name: cart, namespace: shop, creationTimestamp: '2020-01-01T00:00:00Z',",
    );
    let late = pod_of("zz", "10.0.0.1").replace("namespace: bank", "namespace: zoo");
    let thief = object("Service", "thief", "bank", "spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}")
        .replace("namespace: bank", "namespace: bank, creationTimestamp: '2001-01-01T00:00:00Z'");
    let world = world(&(aged + "---\n" + &late + &service_of + &thief));
    assert!(pod(&world, "zoo/zz").addresses.is_empty());
    assert_eq!(pod(&world, "shop/cart-1").addresses.len(), 2);
    assert!(service(&world, "bank", "fake").vips.is_empty());
    assert!(service(&world, "bank", "thief").vips.is_empty(), "a Service does not take a pod's address");
    assert_eq!(service(&world, "shop", "cart").vips.len(), 1);
    let told = complaints(&world);
    assert_eq!(told.iter().filter(|complaint| complaint.contains("AddressConflict")).count(), 3, "{told:?}");
}

#[test]
fn host_network_pods_and_the_unlabelled_are_plain() {
    let host = object(
        "Pod",
        "host",
        "shop",
        "spec: {hostNetwork: true, containers: []}\nstatus: {phase: Running, podIP: 192.0.2.9}",
    );
    let plain =
        object("Pod", "plain", "bank", "spec: {containers: []}\nstatus: {phase: Running, podIP: 10.0.1.1}");
    let ended =
        object("Pod", "ended", "shop", "spec: {containers: []}\nstatus: {phase: Succeeded, podIP: 10.0.1.2}");
    let world = world(&(host + &plain + &ended));
    assert_eq!(pod(&world, "shop/host").tunnel, TunnelProtocol::None);
    assert_eq!(pod(&world, "shop/host").network_mode, mesh_core::model::NetworkMode::HostNetwork);
    assert_eq!(pod(&world, "bank/plain").tunnel, TunnelProtocol::None);
    assert!(!world.workloads.contains_key(&WorkloadKey("Kubernetes//Pod/shop/ended".into())));
    assert!(world.pods[&("shop".into(), "ended".into())].finished);
}

/// The kubelet writes the address after the first containers have started, hooks included, and they connect before.
#[test]
fn a_pod_without_an_address_yet_has_all_that_its_agent_needs() {
    let starting = object(
        "Pod",
        "starting",
        "shop",
        "spec: {nodeName: n1, containers: [{name: c, startupProbe: {tcpSocket: {port: 9000}}}]}\nstatus: {phase: Pending}",
    )
    .replace("{name: starting,", "{name: starting, uid: u9, labels: {app: cart},");
    let unbound = object("Pod", "unbound", "shop", "spec: {containers: []}\nstatus: {phase: Pending}");
    let strict = object("PeerAuthentication", "default", "shop", "spec: {mtls: {mode: STRICT}}");
    let world = world(&format!("{BASE}---\n{starting}{unbound}{strict}"));
    let pod = pod(&world, "shop/starting");
    assert_eq!((pod.tunnel, pod.health, pod.addresses.len()), (TunnelProtocol::Hbone, Health::Unhealthy, 0));
    assert!(!pod.policies.is_empty(), "described, but not what it refuses");
    assert!(pod.services.is_empty(), "nobody can reach it");
    assert!(world.local["n1"]["u9"].probe_ports.contains(&9000));
    assert!(!world.workloads.contains_key(&WorkloadKey("Kubernetes//Pod/shop/unbound".into())));
}

#[test]
fn a_node_is_told_of_every_pod_of_it_that_has_not_ended() {
    let pod = |name: &str, meta: &str, spec: &str, status: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, {meta}}}\nspec: {{containers: [], {spec}}}\nstatus: {{{status}}}\n"
        )
    };
    let yaml = [
        pod("new", "uid: u1", "nodeName: n1, serviceAccountName: cart", "phase: Pending"),
        pod("host", "uid: u2", "nodeName: n1, hostNetwork: true", "podIP: 10.9.9.9"),
        pod(
            "leaving",
            "uid: u3, deletionTimestamp: '2026-01-01T00:00:00Z'",
            "nodeName: n2",
            "podIP: 10.0.1.3",
        ),
        pod("ended", "uid: u4", "nodeName: n1", "phase: Succeeded"),
        pod("unbound", "uid: u5", "", ""),
        pod("gw-1", "uid: u6, labels: {gateway.networking.k8s.io/gateway-name: gw}", "nodeName: n1", ""),
        pod("twice", "uid: u6", "nodeName: n2", ""),
    ];
    let world = world(&format!("{BASE}{}", yaml.concat()));
    let told: Vec<String> = world
        .local
        .iter()
        .flat_map(|(node, pods)| {
            pods.values().map(move |pod| {
                let why = match &pod.enrolment {
                    Enrolment::Wanted => "wanted",
                    Enrolment::Not { reason, .. } => reason,
                };
                let (ips, leaving) = (pod.ips.len(), if pod.terminating { ", leaving" } else { "" });
                format!(
                    "{node} {} {}/{}: {why}, {ips} addresses{leaving}",
                    pod.uid, pod.name, pod.service_account
                )
            })
        })
        .collect();
    let expected = [
        "n1 u1 new/cart: wanted, 0 addresses",
        "n1 u2 host/default: HostNetwork, 0 addresses",
        "n1 u6 gw-1/default: Waypoint, 0 addresses",
        "n2 u3 leaving/default: wanted, 1 addresses, leaving",
    ];
    assert_eq!(told, expected);
}

/// It has the feed before the plugin is in the chain: until then pods would start without it.
#[test]
fn a_node_is_set_free_when_its_agent_is_ready() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\nspec: {taints: [{key: undermesh.io/agent-not-ready, effect: NoExecute}]}\n---\n";
    let agent = |namespace: &str, node: &str, ready: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: undermesh-node-x, namespace: {namespace}}}\nspec: {{nodeName: {node}, hostNetwork: true, serviceAccountName: undermesh-node, containers: []}}\nstatus: {{phase: Running, podIP: 192.168.0.1, conditions: [{{type: Ready, status: '{ready}'}}]}}\n"
        )
    };
    let waiting = |more: &str| world(&format!("{node}{more}")).waiting.len();
    assert_eq!(waiting(""), 0);
    assert_eq!(waiting(&agent("undermesh-system", "n2", "False")), 0);
    assert_eq!(waiting(&agent("undermesh-system", "n1", "True")), 0);
    assert_eq!(waiting(&agent("shop", "n2", "True")), 0);
    assert_eq!(waiting(&agent("undermesh-system", "n2", "True")), 1);
}
