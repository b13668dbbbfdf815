//! Decisions over worlds: tables in the feature's language, and properties over random worlds.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the failure")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    Refusal,
    authz::{self, Subject, Verdict},
    delta::{self, Change},
    flag::Flag,
    id::{Identity, PolicyKey, ServiceKey, WorkloadKey},
    inbound::{self, Arrival, Direct, STRICT_POLICY, admit, direct, ports_of_interest},
    model::{
        Action, Clause, Front, Health, LoadBalancing, Locality, Match, MeshOptions, NetworkMode,
        OutboundMode, Policy, Rule, Scope, Service, ServicePort, StringMatch, TunnelProtocol, Visibility,
        WaypointRef, Workload,
    },
    outbound::{Plan, Request, plan},
    proto,
    snapshot::Snapshot,
};
use proptest::prelude::*;
use prost::Message as _;

fn workload(namespace: &str, name: &str, ip: &str, node: &str) -> Workload {
    let ip: IpAddr = ip.parse().unwrap();
    let addresses = match ip {
        IpAddr::V4(v4) => vec![ip, format!("fd00::{:x}", u32::from(v4) & 0xffff).parse().unwrap()],
        IpAddr::V6(_) => vec![ip],
    };
    Workload {
        uid: WorkloadKey(format!("Kubernetes//Pod/{namespace}/{name}").into()),
        name: name.into(),
        namespace: namespace.into(),
        addresses,
        network: "".into(),
        tunnel: TunnelProtocol::Hbone,
        trust_domain: "cluster.local".into(),
        service_account: name.into(),
        waypoint: None,
        node: node.into(),
        canonical_name: name.into(),
        canonical_revision: "".into(),
        workload_name: name.into(),
        native_tunnel: false,
        policies: vec![],
        health: Health::Healthy,
        leaving: false,
        cluster: "Kubernetes".into(),
        services: BTreeMap::new(),
        locality: Locality::default(),
        network_mode: NetworkMode::Standard,
        capacity: 1,
    }
}

fn service(namespace: &str, name: &str, vip: &str) -> Service {
    Service {
        key: ServiceKey::new(namespace, &format!("{name}.{namespace}.svc.cluster.local")),
        name: name.into(),
        vips: vec![vip.parse().unwrap()],
        fronts: Vec::new(),
        ports: vec![ServicePort { port: 80, target: 8080 }],
        subject_alt_names: vec![],
        waypoint: None,
        load_balancing: LoadBalancing::All,
        sticky: None,
        allow_unhealthy: false,
        canonical: true,
        visibility: Visibility::Public,
    }
}

fn endpoint_of(mut workload: Workload, service: &Service) -> Workload {
    workload.services.insert(service.key.clone(), BTreeMap::from([(80, 8080)]));
    workload
}

fn policy(name: &str, scope: Scope, action: Action, matches: Vec<Match>) -> Policy {
    let rules = if matches.is_empty() { vec![] } else { vec![Rule { clauses: vec![Clause { matches }] }] };
    Policy { key: PolicyKey::new("shop", name), scope, action, rules, dry_run: false }
}

fn from_principal(text: &str) -> Match {
    Match { principals: vec![StringMatch::Exact(text.into())], ..Match::default() }
}

fn strict() -> Policy {
    Policy {
        key: PolicyKey::new("undermesh-system", STRICT_POLICY),
        ..policy(
            "",
            Scope::WorkloadSelector,
            Action::Deny,
            vec![Match { not_principals: vec![StringMatch::Presence], ..Match::default() }],
        )
    }
}

fn world(items: impl IntoIterator<Item = Change>) -> Snapshot {
    Snapshot::default().with(items)
}

fn w(workload: Workload) -> Change {
    Change::Workload(Arc::new(workload))
}
fn s(service: Service) -> Change {
    Change::Service(Arc::new(service))
}
fn p(policy: Policy) -> Change {
    Change::Policy(Arc::new(policy))
}

fn arrival(peer: Option<&str>, port: u16) -> Arrival {
    Arrival {
        peer: peer.map(|account| Identity::new("cluster.local", "shop", account)),
        source_ip: "10.0.0.1".parse().unwrap(),
        destination_ip: "10.0.0.2".parse().unwrap(),
        port,
        claimed_client: None,
    }
}

/// Asks whether `peer` may reach `port` of a workload that names `named`, in a world of `items`.
fn check_admit(
    items: Vec<Change>,
    named: &[&str],
    peer: Option<&str>,
    port: u16,
    expected: Result<(), Flag>,
) {
    let mut local = workload("shop", "web", "10.0.0.2", "n1");
    local.policies = named.iter().map(|name| PolicyKey::parse(name).unwrap()).collect();
    let outcome = admit(&world(items), &local, &arrival(peer, port));
    assert_eq!(outcome.as_ref().map(drop).map_err(|refusal| refusal.flag), expected, "{outcome:?}");
}

#[test]
fn admission_follows_the_policies_that_apply() {
    use {Action::*, Scope::*};
    let client = || from_principal("cluster.local/ns/shop/sa/client");
    let on_port = |port| Match { destination_ports: vec![port], ..Match::default() };
    check_admit(vec![], &[], Some("client"), 8080, Ok(()));
    check_admit(vec![], &[], None, 8080, Ok(()));
    check_admit(vec![p(policy("a", Namespace, Allow, vec![client()]))], &[], Some("client"), 8080, Ok(()));
    check_admit(
        vec![p(policy("a", Namespace, Allow, vec![client()]))],
        &[],
        Some("x"),
        8080,
        Err(Flag::PolicyDenied),
    );
    check_admit(
        vec![p(policy("a", Namespace, Allow, vec![client()]))],
        &[],
        None,
        8080,
        Err(Flag::PolicyDenied),
    );
    // ALLOW without rules allows nothing; DENY without rules denies nothing.
    check_admit(
        vec![p(policy("a", Global, Allow, vec![]))],
        &[],
        Some("client"),
        8080,
        Err(Flag::PolicyDenied),
    );
    check_admit(vec![p(policy("a", Global, Deny, vec![]))], &[], Some("client"), 8080, Ok(()));
    // DENY wins over ALLOW, on its port only.
    let both = || {
        vec![
            p(policy("a", Namespace, Allow, vec![client()])),
            p(policy("d", Namespace, Deny, vec![on_port(8080)])),
        ]
    };
    check_admit(both(), &[], Some("client"), 8080, Err(Flag::PolicyDenied));
    check_admit(both(), &[], Some("client"), 8081, Ok(()));
    // A policy that selects workloads applies to those that name it.
    let selected = || p(policy("d", WorkloadSelector, Deny, vec![on_port(8080)]));
    check_admit(vec![selected()], &[], Some("client"), 8080, Ok(()));
    check_admit(vec![selected()], &["shop/d"], Some("client"), 8080, Err(Flag::PolicyDenied));
    check_admit(vec![], &["shop/d"], Some("client"), 8080, Err(Flag::PolicyPending));
    check_admit(
        vec![Change::InvalidPolicy(PolicyKey::new("shop", "d"))],
        &["shop/d"],
        Some("client"),
        1,
        Err(Flag::PolicyInvalid),
    );
    // A broken policy of unknown scope might have been a global one.
    check_admit(
        vec![Change::InvalidPolicy(PolicyKey::new("other", "d"))],
        &[],
        Some("client"),
        1,
        Err(Flag::PolicyInvalid),
    );
    let named = "undermesh-system/istio_converted_static_strict";
    check_admit(vec![p(strict())], &[named], None, 8080, Err(Flag::MtlsRequired));
    check_admit(vec![p(strict())], &[named], Some("x"), 8080, Ok(()));
    for port in [15001, 15006, 15008] {
        check_admit(vec![], &[], Some("client"), port, Err(Flag::IllegalPort));
    }
    let dry = Policy { dry_run: true, ..policy("d", Namespace, Deny, vec![on_port(8080)]) };
    check_admit(vec![p(dry)], &[], Some("client"), 8080, Ok(()));
}

#[test]
fn a_removed_policy_no_longer_applies() {
    let deny = policy(
        "d",
        Scope::Namespace,
        Action::Deny,
        vec![Match { destination_ports: vec![80], ..Match::default() }],
    );
    let before = world([p(deny)]);
    let after = before.with(delta::removed(proto::TYPE_AUTHORIZATION, "shop/d"));
    let local = workload("shop", "web", "10.0.0.2", "n1");
    assert!(admit(&before, &local, &arrival(Some("client"), 80)).is_err());
    assert!(admit(&after, &local, &arrival(Some("client"), 80)).is_ok());
}

/// A world with a bound service, its waypoint on another node, and a client.
fn bound() -> (Snapshot, Workload) {
    let gate_service = service("shop", "gate", "10.96.0.9");
    let mut gate_service = gate_service;
    gate_service.ports = vec![ServicePort { port: 15008, target: 15008 }];
    let mut gate = workload("shop", "gate", "10.0.0.9", "n2");
    gate.native_tunnel = true;
    gate.services.insert(gate_service.key.clone(), BTreeMap::from([(15008, 15008)]));
    let mut web = service("shop", "web", "10.96.0.1");
    web.waypoint = Some(WaypointRef::Service { service: gate_service.key.clone(), port: 15008 });
    let pod = endpoint_of(workload("shop", "web", "10.0.0.2", "n1"), &web);
    let client = workload("shop", "client", "10.0.0.1", "n1");
    (world([s(gate_service), s(web), w(gate), w(pod.clone()), w(client)]), pod)
}

#[test]
fn the_waypoint_is_on_the_way_in_and_cannot_be_left_out() {
    let (world, pod) = bound();
    let client = world.workload_by_ip("10.0.0.1".parse().unwrap()).unwrap().clone();
    let to = |to: &str| Request { to: to.parse().unwrap(), chosen: None, pick: 3 };
    let Ok(Plan::Waypoint { hop, authority, .. }) = plan(&world, &client, &to("10.96.0.1:80")) else {
        panic!()
    };
    assert_eq!(
        (hop.dial.to_string(), authority.to_string()),
        ("10.0.0.9:15008".into(), "10.96.0.1:80".into())
    );
    assert_eq!(hop.expect, [Identity::new("cluster.local", "shop", "gate")]);
    // The waypoint itself goes to the endpoint.
    let gate = world.workload_by_ip("10.0.0.9".parse().unwrap()).unwrap().clone();
    assert!(matches!(plan(&world, &gate, &to("10.96.0.1:80")), Ok(Plan::Tunnel { .. })));
    // The destination insists, on the bound port only.
    let refused = |arrival: &Arrival| admit(&world, &pod, arrival).err().map(|refusal| refusal.flag);
    assert_eq!(refused(&arrival(Some("client"), 8080)), Some(Flag::WaypointRequired));
    assert_eq!(refused(&arrival(None, 8080)), Some(Flag::WaypointRequired));
    assert_eq!(refused(&arrival(Some("client"), 9090)), None);
    assert_eq!(refused(&arrival(Some("gate"), 8080)), None);
    assert_eq!(direct(&world, &client, &pod, 8080), Direct::Agent);
    assert_eq!(direct(&world, &client, &pod, 9090), Direct::Allow);
    assert!(ports_of_interest(&world, &pod).contains(&8080));
    // Without a ready waypoint nothing goes around it.
    let gone = world.with(delta::removed(proto::TYPE_ADDRESS, "Kubernetes//Pod/shop/gate"));
    let outcome = plan(&gone, &client, &to("10.96.0.1:80")).map_err(|refusal| refusal.flag);
    assert_eq!(outcome, Err(Flag::WaypointUnavailable));
    assert_eq!(
        admit(&gone, &pod, &arrival(Some("gate"), 8080)).map_err(|e| e.flag),
        Err(Flag::WaypointRequired)
    );
}

#[test]
fn either_of_two_waypoints_that_cover_a_port_may_pass() {
    let (world, mut pod) = bound();
    let mut front = service("shop", "gate2", "10.96.0.10");
    front.ports = vec![ServicePort { port: 15008, target: 15008 }];
    let mut gate = workload("shop", "gate2", "10.0.0.10", "n2");
    gate.services.insert(front.key.clone(), BTreeMap::from([(15008, 15008)]));
    pod.waypoint = Some(WaypointRef::Service { service: front.key.clone(), port: 15008 });
    let world = world.with([s(front), w(gate), w(pod.clone())]);
    let refused = |peer, port| admit(&world, &pod, &arrival(peer, port)).err().map(|refusal| refusal.flag);
    assert_eq!(refused(Some("gate"), 8080), None, "addressed to the service");
    assert_eq!(refused(Some("gate2"), 8080), None, "addressed to the workload");
    assert_eq!(refused(Some("client"), 8080), Some(Flag::WaypointRequired));
    assert_eq!(refused(None, 8080), Some(Flag::WaypointRequired));
    // The service's waypoint covers its target ports only.
    assert_eq!(refused(Some("gate2"), 9090), None);
    assert_eq!(refused(Some("gate"), 9090), Some(Flag::WaypointRequired));
}

#[test]
fn a_policy_that_is_named_applies_whatever_its_scope() {
    let deny = |scope| Policy {
        key: PolicyKey::new("other", "d"),
        rules: vec![Rule::default()],
        ..policy("", scope, Action::Deny, vec![])
    };
    for scope in [Scope::Global, Scope::Namespace, Scope::WorkloadSelector] {
        check_admit(vec![p(deny(scope))], &["other/d"], Some("a"), 80, Err(Flag::PolicyDenied));
    }
    check_admit(vec![p(deny(Scope::Namespace))], &[], Some("a"), 80, Ok(()));
}

#[test]
fn the_pod_s_own_listeners_are_no_destination() {
    let client = workload("shop", "client", "10.0.0.1", "n1");
    let world = world([w(client.clone())]);
    for to in ["127.0.0.1:15001", "[::1]:15006", "[::ffff:127.0.0.1]:15008", "0.0.0.0:15001", "[::]:15001"] {
        let request = Request { to: to.parse().unwrap(), chosen: None, pick: 0 };
        let outcome = plan(&world, &client, &request).map_err(|refusal| refusal.flag);
        assert_eq!(outcome, Err(Flag::IllegalPort), "{to}");
    }
}

#[test]
fn a_service_that_is_named_and_not_received_may_be_bound() {
    let (world, pod) = bound();
    let client = world.workload_by_ip("10.0.0.1".parse().unwrap()).unwrap().clone();
    let key = pod.services.keys().next().unwrap().to_string();
    let early = world.with(delta::removed(proto::TYPE_ADDRESS, &key));
    let refused = admit(&early, &pod, &arrival(Some("client"), 8080)).map_err(|refusal| refusal.flag);
    assert_eq!(refused, Err(Flag::PolicyPending));
    assert_eq!(direct(&early, &client, &pod, 8080), Direct::Agent);
}

#[test]
fn only_the_bound_waypoint_may_state_a_client() {
    let (world, pod) = bound();
    let deny =
        policy("d", Scope::Namespace, Action::Deny, vec![from_principal("cluster.local/ns/shop/sa/client")]);
    let world = world.with([p(deny)]);
    let claimed = |peer, port| Arrival {
        claimed_client: Some(Identity::new("cluster.local", "shop", "client")),
        ..arrival(Some(peer), port)
    };
    assert_eq!(admit(&world, &pod, &claimed("gate", 8080)).map_err(|e| e.flag), Err(Flag::PolicyDenied));
    // From anybody else the claim is no identity, neither for nor against.
    let admission = admit(&world, &pod, &claimed("other", 9090)).unwrap();
    assert_eq!(admission.client, Some(Identity::new("cluster.local", "shop", "other")));
    let allow =
        policy("a", Scope::Namespace, Action::Allow, vec![from_principal("cluster.local/ns/shop/sa/client")]);
    let world = world.with([delta::removed(proto::TYPE_AUTHORIZATION, "shop/d").unwrap(), p(allow)]);
    assert!(admit(&world, &pod, &claimed("gate", 8080)).is_ok());
    assert_eq!(admit(&world, &pod, &claimed("other", 9090)).map_err(|e| e.flag), Err(Flag::PolicyDenied));
}

#[test]
fn connections_go_where_the_world_says() {
    let web = service("shop", "web", "10.96.0.1");
    let mut outside = workload("plain", "db", "10.0.0.7", "n1");
    outside.tunnel = TunnelProtocol::None;
    let sick = Workload {
        health: Health::Unhealthy,
        ..endpoint_of(workload("shop", "web-3", "10.0.0.4", "n2"), &web)
    };
    let world = world([
        s(web.clone()),
        w(endpoint_of(workload("shop", "web-1", "10.0.0.2", "n1"), &web)),
        w(endpoint_of(workload("shop", "web-2", "10.0.0.3", "n2"), &web)),
        w(sick),
        w(outside),
    ]);
    let client = workload("shop", "client", "10.0.0.1", "n1");
    let go = |to: &str, chosen: Option<&str>, pick| {
        plan(
            &world,
            &client,
            &Request { to: to.parse().unwrap(), chosen: chosen.map(|at| at.parse().unwrap()), pick },
        )
    };
    let target = |plan: Result<Plan, _>| match plan {
        Ok(Plan::Tunnel { authority, .. }) => authority.to_string(),
        other => format!("{other:?}"),
    };
    assert_eq!(target(go("10.96.0.1:80", None, 0)), "10.0.0.2:8080");
    assert_eq!(target(go("10.96.0.1:80", None, 1)), "10.0.0.3:8080");
    assert_eq!(target(go("[::ffff:10.96.0.1]:80", None, 1)), "10.0.0.3:8080");
    // The kernel's choice is kept while it is a candidate, and never obeyed otherwise.
    assert_eq!(target(go("10.96.0.1:80", Some("10.0.0.3:8080"), 0)), "10.0.0.3:8080");
    assert_eq!(target(go("10.96.0.1:80", Some("10.0.0.4:8080"), 0)), "10.0.0.2:8080");
    assert_eq!(target(go("10.96.0.1:80", Some("169.254.169.254:80"), 0)), "10.0.0.2:8080");
    assert_eq!(target(go("10.0.0.3:9000", None, 0)), "10.0.0.3:9000");
    assert!(matches!(go("10.0.0.7:5432", None, 0), Ok(Plan::Plain { .. })));
    assert!(matches!(go("192.0.2.1:443", None, 0), Ok(Plan::Passthrough { .. })));
    assert_eq!(go("10.96.0.1:81", None, 0).map_err(|e| e.flag), Err(Flag::NoHealthyUpstream));
    assert_eq!(go("10.0.0.2:15008", None, 0).map_err(|e| e.flag), Err(Flag::IllegalPort));
    let only_known = world.with([Change::Options(MeshOptions {
        outbound: OutboundMode::RegistryOnly,
        ..MeshOptions::default()
    })]);
    let request = Request { to: "192.0.2.1:443".parse().unwrap(), chosen: None, pick: 0 };
    assert_eq!(plan(&only_known, &client, &request).map_err(|e| e.flag), Err(Flag::UnknownDestination));
}

fn authority(plan: Result<Plan, Refusal>) -> String {
    match plan {
        Ok(Plan::Tunnel { authority, .. }) => authority.to_string(),
        Ok(Plan::Waypoint { authority, .. }) => format!("waypoint for {authority}"),
        Ok(Plan::Passthrough { to, service }) => format!("{to} of {:?}", service.map(|s| s.key.to_string())),
        Ok(Plan::Plain { to, .. }) => format!("plain {to}"),
        Err(refusal) => refusal.flag.code().to_owned(),
    }
}

fn to(at: &str, pick: u64) -> Request {
    Request { to: at.parse().unwrap(), chosen: None, pick }
}

/// Node ports, load balancers and external IPs are addresses of the service, like its VIP; those of one that stays on
/// the node lead everywhere, since that rule is for clients inside.
#[test]
fn a_service_is_reached_at_every_address_of_it() {
    let front = |at: &str| Front { at: at.parse().unwrap(), port: 80 };
    let web = Service {
        fronts: vec![front("192.0.2.1:30080"), front("198.51.100.7:80"), front("[2001:db8::1]:30080")],
        load_balancing: LoadBalancing::SameNode,
        ..service("shop", "web", "10.96.0.1")
    };
    let gate_service = Service {
        ports: vec![ServicePort { port: 15008, target: 15008 }],
        ..service("shop", "gate", "10.96.0.9")
    };
    let mut gate = workload("shop", "gate", "10.0.0.9", "n2");
    gate.services.insert(gate_service.key.clone(), BTreeMap::from([(15008, 15008)]));
    let near = endpoint_of(workload("shop", "web-1", "10.0.0.2", "n1"), &web);
    let far = endpoint_of(workload("shop", "web-2", "10.0.0.3", "n2"), &web);
    let client = workload("shop", "client", "10.0.0.1", "n1");
    let world = world([s(web.clone()), s(gate_service.clone()), w(near), w(far), w(gate), w(client.clone())]);
    let go = |world: &Snapshot, at, pick| authority(plan(world, &client, &to(at, pick)));
    for pick in [0, 1] {
        assert_eq!(go(&world, "10.96.0.1:80", pick), "10.0.0.2:8080", "inside: the client's node only");
    }
    assert_eq!(go(&world, "[2001:db8::1]:30080", 1), "[fd00::3]:8080", "the family that was dialled");
    for at in ["192.0.2.1:30080", "198.51.100.7:80", "[::ffff:192.0.2.1]:30080"] {
        assert_eq!([go(&world, at, 0), go(&world, at, 1)], ["10.0.0.2:8080", "10.0.0.3:8080"], "{at}");
    }
    for at in ["192.0.2.1:80", "198.51.100.7:30080", "192.0.2.2:30080"] {
        assert_eq!(
            go(&world, at, 0),
            format!("{at} of None"),
            "another port or host is nothing of the service"
        );
    }
    // A waypoint is told the service's own address.
    let bound = Service {
        waypoint: Some(WaypointRef::Service { service: gate_service.key.clone(), port: 15008 }),
        ..web.clone()
    };
    let behind = world.with([s(bound)]);
    assert_eq!(go(&behind, "192.0.2.1:30080", 0), "waypoint for 10.96.0.1:80");
    // Gone with the service.
    let gone = behind.with([delta::removed(proto::TYPE_ADDRESS, &web.key.to_string()).unwrap()]);
    assert_eq!(go(&gone, "192.0.2.1:30080", 0), "192.0.2.1:30080 of None");
}

#[test]
fn a_client_keeps_its_endpoint_where_the_service_says_so() {
    let web = Service { sticky: Some(Duration::from_secs(60)), ..service("shop", "web", "10.96.0.1") };
    let pods: Vec<_> = (2..10)
        .map(|n| endpoint_of(workload("shop", &format!("web-{n}"), &format!("10.0.0.{n}"), "n1"), &web))
        .collect();
    let whole = world([s(web)].into_iter().chain(pods.iter().cloned().map(w)));
    let of = |world: &Snapshot, client: &str| {
        let client = workload("shop", client, "10.0.0.1", "n1");
        let all: BTreeSet<_> =
            (0..20).map(|pick| authority(plan(world, &client, &to("10.96.0.1:80", pick)))).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        all.into_iter().next().unwrap()
    };
    let clients: Vec<String> = (0..40).map(|n| format!("client-{n}")).collect();
    let before: BTreeMap<_, _> = clients.iter().map(|client| (client, of(&whole, client))).collect();
    assert!(before.values().collect::<BTreeSet<_>>().len() > 4, "clients are spread: {before:?}");
    // What it has had before wins over what it would get today.
    for pod in &pods {
        let had = SocketAddr::new(pod.addresses[0], 8080);
        let client = workload("shop", "client-0", "10.0.0.1", "n1");
        let request = Request { chosen: Some(had), ..to("10.96.0.1:80", 0) };
        assert_eq!(authority(plan(&whole, &client, &request)), had.to_string());
    }
    let gone = pods[3].addresses[0];
    let less = whole.with([delta::removed(proto::TYPE_ADDRESS, &pods[3].uid.0).unwrap()]);
    for (client, kept) in before {
        let now = of(&less, client);
        assert!(now == kept || kept == format!("{gone}:8080"), "{client}: {kept} became {now}");
    }
}

/// Endpoints that are about to go are taken when there is no other; services without any endpoint in the mesh are not
/// ours to choose for.
#[test]
fn endpoints_are_taken_as_kubernetes_means_it() {
    let web = service("shop", "web", "10.96.0.1");
    let leaving = |name: &str, ip: &str| Workload {
        health: Health::Unhealthy,
        leaving: true,
        ..endpoint_of(workload("shop", name, ip, "n1"), &web)
    };
    let sick = Workload {
        health: Health::Unhealthy,
        ..endpoint_of(workload("shop", "web-3", "10.0.0.4", "n1"), &web)
    };
    let client = workload("shop", "client", "10.0.0.1", "n1");
    let go = |world: &Snapshot, pick| authority(plan(world, &client, &to("10.96.0.1:80", pick)));
    let base = world([s(web.clone()), w(sick.clone())]);
    assert_eq!(go(&base, 0), "NO_HEALTHY_UPSTREAM");
    let going = base.with([w(leaving("web-1", "10.0.0.2"))]);
    assert_eq!([go(&going, 0), go(&going, 1)], ["10.0.0.2:8080", "10.0.0.2:8080"]);
    let fresh = going.with([w(endpoint_of(workload("shop", "web-2", "10.0.0.3", "n1"), &web))]);
    assert_eq!([go(&fresh, 0), go(&fresh, 1)], ["10.0.0.3:8080", "10.0.0.3:8080"]);
    let all = base.with([s(Service { allow_unhealthy: true, ..web.clone() })]);
    assert_eq!(go(&all, 0), "10.0.0.4:8080");

    let plain = |workload: Workload| Workload { tunnel: TunnelProtocol::None, ..workload };
    let outside = world([s(web.clone()), w(plain(sick))]);
    assert_eq!(go(&outside, 0), "10.96.0.1:80 of Some(\"shop/web.shop.svc.cluster.local\")");
    // As soon as one endpoint is in the mesh the choice is the mesh's, over all of them.
    let mixed = outside.with([
        w(endpoint_of(workload("shop", "web-2", "10.0.0.3", "n1"), &web)),
        w(plain(endpoint_of(workload("shop", "web-4", "10.0.0.5", "n1"), &web))),
    ]);
    assert_eq!([go(&mixed, 0), go(&mixed, 1)], ["10.0.0.3:8080", "plain 10.0.0.5:8080"]);
}

#[test]
fn a_connect_leads_only_to_the_pod_that_was_reached() {
    let own: IpAddr = "10.0.0.2".parse().unwrap();
    let serves =
        |authority| inbound::serves(own, authority).map(|to| to.port()).map_err(|refusal| refusal.flag);
    assert_eq!(serves("10.0.0.2:8080"), Ok(8080));
    assert_eq!(serves("10.0.0.3:8080"), Err(Flag::IllegalAuthority));
    assert_eq!(serves("127.0.0.1:8080"), Err(Flag::IllegalAuthority));
    assert_eq!(serves("169.254.169.254:80"), Err(Flag::IllegalAuthority));
    assert_eq!(serves("10.0.0.2:15008"), Err(Flag::IllegalPort));
    assert_eq!(serves("web.shop:80"), Err(Flag::MalformedRequest));
}

const ACCOUNTS: [&str; 3] = ["a", "b", "c"];

fn strings() -> impl Strategy<Value = Vec<StringMatch>> {
    let one = prop_oneof![
        Just(StringMatch::Exact("cluster.local/ns/shop/sa/a".into())),
        Just(StringMatch::Exact("shop".into())),
        Just(StringMatch::Prefix("cluster.local/ns/shop".into())),
        Just(StringMatch::Prefix("sh".into())),
        Just(StringMatch::Suffix("/sa/b".into())),
        Just(StringMatch::Suffix("op".into())),
        Just(StringMatch::Presence),
    ];
    prop_oneof![3 => Just(vec![]), 1 => proptest::collection::vec(one, 1..3)]
}

fn few<T: Clone + std::fmt::Debug + 'static>(values: &'static [T]) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![3 => Just(vec![]), 1 => proptest::sample::subsequence(values.to_vec(), 1..=values.len())]
}

fn nets() -> impl Strategy<Value = Vec<ipnet::IpNet>> {
    few(&["10.0.0.0/30", "10.0.0.2/32", "::/0", "fd00::1/128"])
        .prop_map(|list| list.into_iter().map(|net| net.parse().unwrap()).collect())
}

prop_compose! {
    fn a_match()(
        namespaces in strings(), not_namespaces in strings(), principals in strings(), not_principals in strings(),
        trust_domains in strings(), source_ips in nets(), not_source_ips in nets(), destination_ips in nets(),
        destination_ports in few(&[80_u16, 8080]), not_destination_ports in few(&[80_u16, 8080]),
        accounts in few(&ACCOUNTS), not_accounts in few(&ACCOUNTS),
    ) -> Match {
        let pairs = |list: Vec<&str>| list.into_iter().map(|account| ("shop".into(), account.into())).collect();
        Match {
            namespaces, not_namespaces, principals, not_principals, trust_domains, not_trust_domains: vec![],
            source_ips, not_source_ips, destination_ips, not_destination_ips: vec![],
            destination_ports, not_destination_ports,
            service_accounts: pairs(accounts), not_service_accounts: pairs(not_accounts),
        }
    }
}

fn policies() -> impl Strategy<Value = Vec<Policy>> {
    let rule =
        proptest::collection::vec(proptest::collection::vec(a_match(), 0..3), 0..3).prop_map(|clauses| {
            Rule { clauses: clauses.into_iter().map(|matches| Clause { matches }).collect() }
        });
    let one = (
        prop_oneof![Just(Scope::Global), Just(Scope::Namespace), Just(Scope::WorkloadSelector)],
        any::<bool>(),
        proptest::collection::vec(rule, 0..3),
        proptest::bool::weighted(0.1),
    );
    proptest::collection::vec(one, 0..4).prop_map(|list| {
        let policy = |(index, (scope, allow, rules, dry_run)): (usize, (_, bool, _, _))| Policy {
            key: PolicyKey::new(["shop", "other"][index % 2], &format!("p{index}")),
            scope,
            action: if allow { Action::Allow } else { Action::Deny },
            rules,
            dry_run,
        };
        list.into_iter().enumerate().map(policy).collect()
    })
}

/// The rules of `wire-protocol.md` 4.3 once more, as plainly as they are written there.
fn naive(
    policies: &[Policy],
    local: &Workload,
    who: Option<&Identity>,
    from: IpAddr,
    to: IpAddr,
    port: u16,
) -> bool {
    let text = |pattern: &StringMatch, text: &str| match pattern {
        StringMatch::Exact(x) => **x == *text,
        StringMatch::Prefix(x) => text.starts_with(&**x),
        StringMatch::Suffix(x) => text.ends_with(&**x),
        StringMatch::Presence => !text.is_empty(),
    };
    let fits = |m: &Match| {
        let namespace = who.map_or("", |id| &*id.namespace);
        let mut ok = m.namespaces.is_empty() || m.namespaces.iter().any(|x| text(x, namespace));
        ok &= !m.not_namespaces.iter().any(|x| text(x, namespace));
        let principal = |x: &StringMatch| who.is_some_and(|id| text(x, &id.principal()));
        ok &= m.principals.is_empty() || m.principals.iter().any(principal);
        ok &= !m.not_principals.iter().any(principal);
        let domain = |x: &StringMatch| who.is_some_and(|id| text(x, &id.trust_domain));
        ok &= m.trust_domains.is_empty() || m.trust_domains.iter().any(domain);
        let account =
            |x: &(Arc<str>, Arc<str>)| who.is_some_and(|id| id.namespace == x.0 && id.service_account == x.1);
        ok &= m.service_accounts.is_empty() || m.service_accounts.iter().any(account);
        ok &= !m.not_service_accounts.iter().any(account);
        ok &= m.source_ips.is_empty() || m.source_ips.iter().any(|net| net.contains(&from));
        ok &= !m.not_source_ips.iter().any(|net| net.contains(&from));
        ok &= m.destination_ips.is_empty() || m.destination_ips.iter().any(|net| net.contains(&to));
        ok &= m.destination_ports.is_empty() || m.destination_ports.contains(&port);
        ok && !m.not_destination_ports.contains(&port)
    };
    let hits = |p: &&Policy| {
        p.rules.iter().any(|rule| {
            rule.clauses.iter().all(|clause| {
                clause.matches.is_empty() || clause.matches.iter().any(|m| *m != Match::default() && fits(m))
            })
        })
    };
    let applies = |p: &&Policy| {
        !p.dry_run
            && match p.scope {
                Scope::Global => true,
                Scope::Namespace => p.key.namespace == local.namespace,
                Scope::WorkloadSelector => local.policies.contains(&p.key),
            }
    };
    let of = |action| policies.iter().filter(applies).filter(move |p| p.action == action);
    !of(Action::Deny).any(|p| hits(&p))
        && (of(Action::Allow).next().is_none() || of(Action::Allow).any(|p| hits(&p)))
}

fn random_world(policies: &[Policy], waypoint: bool) -> (Snapshot, Workload, Workload) {
    let (base, mut web) = bound();
    if !waypoint {
        web.services.clear();
    }
    web.policies =
        policies.iter().filter(|p| p.scope == Scope::WorkloadSelector).map(|p| p.key.clone()).collect();
    let client = Workload { service_account: "a".into(), ..workload("shop", "client", "10.0.0.1", "n1") };
    let changes = policies.iter().cloned().map(p).chain([w(web.clone()), w(client.clone())]);
    (base.with(changes.collect::<Vec<_>>()), client, web)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn evaluation_equals_the_naive_evaluator(policies in policies(), account in proptest::option::of(0..3_usize), port in prop_oneof![Just(80_u16), Just(8080), Just(9)], six: bool) {
        let mut local = workload("shop", "web", "10.0.0.2", "n1");
        local.policies = policies.iter().filter(|p| p.scope == Scope::WorkloadSelector).map(|p| p.key.clone()).collect();
        let who = account.map(|index| Identity::new("cluster.local", "shop", ACCOUNTS[index]));
        let (from, to): (IpAddr, IpAddr) = if six { ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()) } else { ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()) };
        let world = world(policies.iter().cloned().map(p));
        let arrival = Arrival { peer: who.clone(), source_ip: from, destination_ip: to, port, claimed_client: None };
        let expected = naive(&policies, &local, who.as_ref(), from, to, port);
        prop_assert_eq!(admit(&world, &local, &arrival).is_ok(), expected);
        let identities: Vec<_> = who.iter().collect();
        let subject = Subject { identities: &identities, source_ip: from, destination_ip: to, destination_port: port };
        let verdict = authz::evaluate(world.applicable(&local).valid.iter(), &subject);
        prop_assert_eq!(matches!(verdict, Verdict::Allowed(_) | Verdict::AllowedByDefault), expected);
    }

    #[test]
    fn what_may_be_direct_would_be_admitted(policies in policies(), waypoint: bool, port in prop_oneof![Just(80_u16), Just(8080), Just(9), Just(15008)]) {
        let (world, client, web) = random_world(&policies, waypoint);
        let verdict = direct(&world, &client, &web, port);
        for (from, to) in client.addresses.iter().zip(&web.addresses) {
            let arrival = Arrival { peer: Some(client.identity()), source_ip: *from, destination_ip: *to, port, claimed_client: None };
            let admitted = admit(&world, &web, &arrival).is_ok();
            match verdict {
                Direct::Allow => prop_assert!(admitted),
                Direct::Deny => prop_assert!(!admitted),
                Direct::Agent => {}
            }
        }
        // Ports that are of no interest share one verdict.
        let of_interest = ports_of_interest(&world, &web);
        let others: Vec<_> = [1_u16, 9, 81, 9000, 65535].into_iter().filter(|port| !of_interest.contains(port)).collect();
        for other in &others {
            prop_assert_eq!(direct(&world, &client, &web, *other), direct(&world, &client, &web, others[0]));
        }
    }

    #[test]
    fn applying_changes_one_by_one_equals_building_anew(order in proptest::collection::vec((0..6_usize, 0..3_usize, any::<bool>()), 0..40)) {
        let shared = service("shop", "web", "10.96.0.1");
        let mut step = Snapshot::default();
        let mut state: BTreeMap<usize, Change> = BTreeMap::new();
        for (item, variant, gone) in order {
            let change = match item {
                0..=2 => {
                    let mut pod = workload("shop", &format!("pod{item}"), &format!("10.0.{variant}.{item}"), "n1");
                    if variant > 0 { pod = endpoint_of(pod, &shared); }
                    w(pod)
                }
                3 => s(Service { canonical: variant == 0, vips: vec![format!("10.96.0.{variant}").parse().unwrap()], fronts: vec![Front { at: format!("192.0.2.{variant}:30080").parse().unwrap(), port: 80 }], sticky: (variant == 1).then_some(Duration::from_secs(60)), ..shared.clone() }),
                4 => p(policy("x", [Scope::Global, Scope::Namespace, Scope::WorkloadSelector][variant], Action::Deny, vec![])),
                _ => Change::InvalidPolicy(PolicyKey::new("shop", "y")),
            };
            let (type_url, name) = change.resource();
            if gone {
                step = step.with(delta::removed(type_url, &name));
                state.remove(&item);
            } else {
                step = step.with([change.clone()]);
                state.insert(item, change);
            }
        }
        let fresh = world(state.into_values());
        let facts = |world: &Snapshot| {
            let mut facts: Vec<String> = world.workloads().map(|item| format!("{item:?}")).collect();
            facts.extend(world.services().map(|item| format!("{item:?}")));
            facts.extend(world.policies().map(|item| format!("{item:?}")));
            for variant in 0..3 {
                facts.push(format!("{:?}", world.service_at("shop", format!("192.0.2.{variant}:30080").parse().unwrap())));
                facts.push(format!("{:?}", world.service_by_vip("shop", format!("10.96.0.{variant}").parse().unwrap())));
                for item in 0..3 {
                    facts.push(format!("{:?}", world.workload_by_ip(format!("10.0.{variant}.{item}").parse().unwrap())));
                    facts.push(format!("{:?}", world.local_pod("shop", &format!("pod{item}"), &format!("pod{item}"), "n1")));
                }
            }
            let mut endpoints: Vec<_> = world.endpoints(&shared.key).map(|item| item.uid.clone()).collect();
            endpoints.sort();
            facts.push(format!("{endpoints:?}"));
            facts.push(format!("{:?}", world.applicable(&workload("shop", "pod0", "10.0.0.0", "n1"))));
            facts.sort();
            facts
        };
        prop_assert_eq!(facts(&step), facts(&fresh));
    }

    #[test]
    fn messages_round_trip(policies in policies(), waypoint: bool) {
        let (world, _, _) = random_world(&policies, waypoint);
        for workload in world.workloads() {
            let message = proto::workload::Address { r#type: Some(proto::workload::address::Type::Workload((&**workload).into())) };
            prop_assert_eq!(proto::decode(proto::TYPE_ADDRESS, &message.encode_to_vec()), Ok(Change::Workload(workload.clone())));
        }
        for service in world.services() {
            let message = proto::workload::Address { r#type: Some(proto::workload::address::Type::Service((&**service).into())) };
            prop_assert_eq!(proto::decode(proto::TYPE_ADDRESS, &message.encode_to_vec()), Ok(Change::Service(service.clone())));
        }
        for policy in policies {
            let message = proto::security::Authorization::from(&policy);
            prop_assert_eq!(proto::decode(proto::TYPE_AUTHORIZATION, &message.encode_to_vec()), Ok(p(policy)));
        }
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes: Vec<u8>) {
        for type_url in proto::TYPES {
            let _ = proto::decode(type_url, &bytes);
        }
    }
}
