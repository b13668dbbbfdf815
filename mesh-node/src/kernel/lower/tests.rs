//! The kernel never permits what `mesh-core` refuses: `decide()` over lowered maps against `admit()`, in random worlds.

use std::collections::HashMap;

use mesh_core::{
    delta::Change,
    flag::Flag,
    id::{PolicyKey, ServiceKey, WorkloadKey},
    inbound::{Arrival, admit},
    model::{
        Action, Clause, Health, Locality, Match, MeshOptions, NetworkMode, Policy, Rule, Scope, ServicePort,
        StringMatch, TunnelProtocol, WaypointRef,
    },
};
use mesh_ebpf_common::{
    map::{
        CONFIG_NO_DIRECT, Endpoint, EndpointKey, LocalPod, SERVICE_AGENT, Service as MapService,
        ServiceKey as MapServiceKey, VERDICT_AGENT, VERDICT_ALLOW, VERDICT_DENY, VerdictEntry, VerdictKey,
    },
    verdict::{Call, Caller, Transport, Way, World, decide},
    wire::{Ip, PortBe, Target},
};
use proptest::prelude::*;

use super::*;

/// The maps as `sync` would write them.
#[derive(Default)]
struct Maps {
    services: HashMap<MapServiceKey, MapService>,
    endpoints: HashMap<EndpointKey, Endpoint>,
    local: HashMap<Ip, LocalPod>,
    verdicts: HashMap<VerdictKey, VerdictEntry>,
    chance: u32,
}

impl World for Maps {
    fn service(&self, key: &MapServiceKey) -> Option<&MapService> {
        self.services.get(key)
    }
    fn endpoint(&self, key: &EndpointKey) -> Option<&Endpoint> {
        self.endpoints.get(key)
    }
    fn local(&self, ip: &Ip) -> Option<&LocalPod> {
        self.local.get(ip)
    }
    fn verdict(&self, key: &VerdictKey) -> Option<&VerdictEntry> {
        self.verdicts.get(key)
    }
    fn probed(&self, _: &mesh_ebpf_common::map::ProbeKey) -> bool {
        false
    }
    fn chance(&self) -> u32 {
        self.chance
    }
}

impl Maps {
    fn of(state: &KernelState, pods: &[LocalWorkload], chance: u32) -> Self {
        let mut maps = Self { chance, ..Self::default() };
        for pod in pods {
            for ip in &pod.addresses {
                maps.local.insert((*ip).into(), LocalPod { netns: u64::from(pod.id), pod: pod.id, pad: 0 });
            }
        }
        for ((src, dst, port), verdict) in &state.verdicts {
            let key = VerdictKey::new(*src, *dst, PortBe::from_host(*port));
            let verdict = match verdict {
                PairVerdict::Allow => VERDICT_ALLOW,
                PairVerdict::Deny => VERDICT_DENY,
                PairVerdict::Agent => VERDICT_AGENT,
            };
            maps.verdicts.insert(key, VerdictEntry { key, verdict });
        }
        for (id, (at, service)) in (1..).zip(&state.services) {
            let mut entry = MapService { id, count: 0, weight: 0, flags: SERVICE_AGENT };
            if let ServiceState::Endpoints(endpoints) = service {
                entry.flags = 0;
                for (to, weight) in endpoints.iter() {
                    entry.weight += weight;
                    let endpoint = Endpoint { to: Target::from(*to), cumulative: entry.weight };
                    maps.endpoints.insert(EndpointKey { service: id, index: entry.count }, endpoint);
                    entry.count += 1;
                }
            }
            maps.services.insert(MapServiceKey(Target::from(*at)), entry);
        }
        maps
    }
}

fn caller(pod: u32, config: u32) -> Caller {
    Caller { enrolled: true, kubelet: false, exhausted: false, pod, netns: u64::from(pod), config }
}

fn workload(number: u8, account: &str, waypoint: bool, policies: &[PolicyKey]) -> Workload {
    Workload {
        uid: WorkloadKey(format!("Kubernetes//Pod/shop/p{number}").into()),
        name: format!("p{number}").into(),
        namespace: "shop".into(),
        addresses: vec![IpAddr::from([10, 1, 0, number]), format!("fd01::{number}").parse().unwrap()],
        network: "".into(),
        tunnel: TunnelProtocol::Hbone,
        trust_domain: "cluster.local".into(),
        service_account: account.into(),
        waypoint: waypoint
            .then(|| WaypointRef::Service { service: ServiceKey::new("shop", "gw"), port: 15008 }),
        node: "n1".into(),
        canonical_name: "".into(),
        canonical_revision: "".into(),
        workload_name: "".into(),
        native_tunnel: false,
        policies: policies.to_vec(),
        health: Health::Healthy,
        leaving: false,
        cluster: "Kubernetes".into(),
        services: [(ServiceKey::new("shop", "svc"), [(80, 8080)].into())].into(),
        locality: Locality::default(),
        network_mode: NetworkMode::Standard,
        capacity: u32::from(number) + 1,
    }
}

/// What a pod has; on a second network more than the world is told of.
fn addresses(number: u8, second_network: bool) -> Vec<IpAddr> {
    let listed = [IpAddr::from([10, 1, 0, number]), format!("fd01::{number}").parse().unwrap()];
    let unlisted = second_network.then(|| IpAddr::from([10, 2, 0, number]));
    listed.into_iter().chain(unlisted).collect()
}

fn service(waypoint: bool) -> Service {
    Service {
        key: ServiceKey::new("shop", "svc"),
        name: "svc".into(),
        vips: vec![IpAddr::from([10, 96, 0, 1]), "fd96::1".parse().unwrap()],
        fronts: Vec::new(),
        ports: vec![ServicePort { port: 80, target: 8080 }],
        subject_alt_names: Vec::new(),
        waypoint: waypoint
            .then(|| WaypointRef::Service { service: ServiceKey::new("shop", "gw"), port: 15008 }),
        load_balancing: LoadBalancing::All,
        sticky: None,
        allow_unhealthy: false,
        canonical: true,
        visibility: Visibility::Public,
    }
}

fn arbitrary_match() -> impl Strategy<Value = Match> {
    let accounts = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 0..2);
    let ports = || prop::collection::vec(prop::sample::select(vec![80_u16, 8080, 9090, 15008]), 0..2);
    let sources = prop::collection::vec(
        prop::sample::select(vec!["10.1.0.0/31", "10.1.0.0/16", "10.2.0.0/16", "fd01::/64"]),
        0..2,
    );
    (accounts, ports(), ports(), sources).prop_map(|(accounts, ports, not_ports, sources)| Match {
        principals: accounts
            .iter()
            .map(|a| StringMatch::Exact(format!("cluster.local/ns/shop/sa/{a}").into()))
            .collect(),
        destination_ports: ports,
        not_destination_ports: not_ports,
        source_ips: sources.iter().map(|net| net.parse().unwrap()).collect(),
        ..Match::default()
    })
}

fn arbitrary_policy(number: usize) -> impl Strategy<Value = Policy> {
    let scope = prop::sample::select(vec![Scope::Global, Scope::Namespace, Scope::WorkloadSelector]);
    let clauses = prop::collection::vec(prop::collection::vec(arbitrary_match(), 0..3), 0..3);
    let rules = prop::collection::vec(clauses, 0..3);
    (scope, any::<bool>(), rules, prop::bool::weighted(0.1)).prop_map(move |(scope, deny, rules, dry_run)| {
        Policy {
            key: PolicyKey::new("shop", &format!("policy{number}")),
            scope,
            action: if deny { Action::Deny } else { Action::Allow },
            rules: rules
                .into_iter()
                .map(|clauses| Rule {
                    clauses: clauses.into_iter().map(|matches| Clause { matches }).collect(),
                })
                .collect(),
            dry_run,
        }
    })
}

#[derive(Debug)]
struct Case {
    policies: Vec<Policy>,
    missing: bool,
    waypoints: (bool, bool),
    options: MeshOptions,
    chance: u32,
    accounts: [&'static str; 3],
    second_network: bool,
}

fn arbitrary_case() -> impl Strategy<Value = Case> {
    let account = || prop::sample::select(vec!["a", "b", "c"]);
    let policies = (0..4_usize).prop_flat_map(|count| (0..count).map(arbitrary_policy).collect::<Vec<_>>());
    let rare = || prop::bool::weighted(0.15);
    let accounts = [account(), account(), account()];
    (policies, rare(), (rare(), rare()), rare(), any::<u32>(), accounts, any::<bool>()).prop_map(
        |(policies, missing, waypoints, encrypt_same_node, chance, accounts, second_network)| Case {
            policies,
            missing,
            waypoints,
            options: MeshOptions { encrypt_same_node, ..MeshOptions::default() },
            chance,
            accounts,
            second_network,
        },
    )
}

fn check(case: &Case) -> Result<(), TestCaseError> {
    let mut bound: Vec<PolicyKey> = case
        .policies
        .iter()
        .filter(|policy| policy.scope == Scope::WorkloadSelector)
        .map(|p| p.key.clone())
        .collect();
    if case.missing {
        bound.push(PolicyKey::new("shop", "not-yet-received"));
    }
    let pods: Vec<_> = (0..3_u8)
        .zip(case.accounts)
        .map(|(number, account)| LocalWorkload {
            id: u32::from(number) + 1,
            workload: Arc::new(workload(number, account, case.waypoints.0 && number == 1, &bound)),
            addresses: addresses(number, case.second_network),
            probe_ports: BTreeSet::new(),
        })
        .collect();
    let changes = pods.iter().map(|pod| Change::Workload(pod.workload.clone()));
    let changes = changes.chain(case.policies.iter().map(|policy| Change::Policy(Arc::new(policy.clone()))));
    let changes =
        changes.chain([Change::Service(Arc::new(service(case.waypoints.1))), Change::Options(case.options)]);
    let world = Snapshot::default().with(changes);
    let state = lower(&world, "n1", &pods);
    let maps = Maps::of(&state, &pods, case.chance);
    let config = if state.no_direct { CONFIG_NO_DIRECT } else { 0 };
    for source in &pods {
        let caller = caller(source.id, config);
        let vips = [IpAddr::from([10, 96, 0, 1]), "fd96::1".parse().unwrap()];
        let all = pods.iter().flat_map(|pod| pod.addresses.clone()).chain(vips);
        for ip in all {
            for port in [80, 8080, 9090, 15001, 15008, 1] {
                let to = Target::from(SocketAddr::new(ip, port));
                let call = Call { to, transport: Transport::Tcp, own: false };
                let verdict = decide(&call, &caller, &maps);
                if !matches!(verdict.way, Way::Direct | Way::Deny) || verdict.local.pod == source.id {
                    continue;
                }
                let there = pods.iter().find(|pod| pod.id == verdict.local.pod).unwrap();
                let reached = verdict.to.to_socket();
                let of_family = source.addresses.iter().filter(|own| own.is_ipv4() == reached.is_ipv4());
                for source_ip in of_family.copied() {
                    let arrival = Arrival {
                        peer: Some(source.workload.identity()),
                        source_ip,
                        destination_ip: reached.ip(),
                        port: reached.port(),
                        claimed_client: None,
                    };
                    let admitted = admit(&world, &there.workload, &arrival);
                    let said = || format!("{source_ip} -> {reached}: {admitted:?} in {case:?}");
                    match verdict.way {
                        Way::Direct => {
                            prop_assert!(admitted.is_ok(), "{}", said());
                            prop_assert!(!case.options.encrypt_same_node);
                        }
                        _ => {
                            let flag = admitted.as_ref().err().map(|refusal| refusal.flag);
                            let refused = [Flag::PolicyDenied, Flag::MtlsRequired, Flag::IllegalPort];
                            prop_assert!(flag.is_some_and(|flag| refused.contains(&flag)), "{}", said());
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn the_kernel_never_permits_what_core_refuses(case in arbitrary_case()) {
        check(&case)?;
    }
}

/// Pods, policies and services come, change and go; what is kept from one world to the next never shows.
#[derive(Clone, Debug)]
enum Step {
    Policy(Box<Policy>),
    NoPolicy(usize),
    Pod(u8, &'static str, bool),
    Addresses(u8, bool),
    Leaves(u8),
    Service(bool),
    Options(bool),
}

fn arbitrary_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..3_usize).prop_flat_map(arbitrary_policy).prop_map(|policy| Step::Policy(Box::new(policy))),
        (0..3_usize).prop_map(Step::NoPolicy),
        (0..4_u8, prop::sample::select(vec!["a", "b", "c"]), any::<bool>())
            .prop_map(|(number, account, waypoint)| Step::Pod(number, account, waypoint)),
        (0..4_u8, any::<bool>()).prop_map(|(number, second)| Step::Addresses(number, second)),
        (0..4_u8).prop_map(Step::Leaves),
        any::<bool>().prop_map(Step::Service),
        prop::bool::weighted(0.2).prop_map(Step::Options),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn what_is_kept_between_worlds_never_shows(steps in prop::collection::vec(arbitrary_step(), 1..24)) {
        let mut world = Snapshot::default();
        let mut pods: Vec<LocalWorkload> = Vec::new();
        let mut lowering = Lowering::default();
        let bound: Vec<_> = (0..3).map(|number| PolicyKey::new("shop", &format!("policy{number}"))).collect();
        for step in steps {
            let change = match step {
                Step::Policy(policy) => Some(Change::Policy(Arc::new(*policy))),
                Step::NoPolicy(number) => Some(Change::Removed {
                    type_url: mesh_core::proto::TYPE_AUTHORIZATION,
                    name: format!("shop/policy{number}").into(),
                }),
                Step::Pod(number, account, waypoint) => {
                    let workload = Arc::new(workload(number, account, waypoint, &bound));
                    let id = u32::from(number) + 1;
                    pods.retain(|pod| pod.id != id);
                    pods.push(LocalWorkload {
                        id,
                        workload: workload.clone(),
                        addresses: addresses(number, false),
                        probe_ports: [8080, 15008].into(),
                    });
                    Some(Change::Workload(workload))
                }
                Step::Addresses(number, second_network) => {
                    if let Some(pod) = pods.iter_mut().find(|pod| pod.id == u32::from(number) + 1) {
                        pod.addresses = addresses(number, second_network);
                    }
                    None
                }
                Step::Leaves(number) => {
                    pods.retain(|pod| pod.id != u32::from(number) + 1);
                    Some(Change::Removed {
                        type_url: mesh_core::proto::TYPE_ADDRESS,
                        name: format!("Kubernetes//Pod/shop/p{number}").into(),
                    })
                }
                Step::Service(waypoint) => Some(Change::Service(Arc::new(service(waypoint)))),
                Step::Options(encrypt_same_node) => {
                    Some(Change::Options(MeshOptions { encrypt_same_node, ..MeshOptions::default() }))
                }
            };
            world = world.with(change);
            let lowered = lowering.lower(&world, "n1", &pods);
            let declared: BTreeSet<_> = pods.iter().map(|pod| (pod.id, 8080)).collect();
            prop_assert_eq!(&lowered.probes, &declared);
            prop_assert_eq!(lowered, lower(&world, "n1", &pods));
        }
    }
}

/// The property is not empty: an open world is direct, and every kind of hindrance takes that away.
#[test]
fn direct_is_taken_when_and_only_when_nothing_needs_the_agent() {
    let ways = |policies: Vec<Policy>, waypoints: (bool, bool), encrypt_same_node: bool| {
        let pods: Vec<_> = (0..2_u8)
            .map(|number| LocalWorkload {
                id: u32::from(number) + 1,
                workload: Arc::new(workload(number, "a", waypoints.0 && number == 1, &[])),
                addresses: addresses(number, false),
                probe_ports: BTreeSet::new(),
            })
            .collect();
        let changes = pods.iter().map(|pod| Change::Workload(pod.workload.clone()));
        let changes = changes.chain(policies.into_iter().map(|policy| Change::Policy(Arc::new(policy))));
        let options = MeshOptions { encrypt_same_node, ..MeshOptions::default() };
        let changes =
            changes.chain([Change::Service(Arc::new(service(waypoints.1))), Change::Options(options)]);
        let state = lower(&Snapshot::default().with(changes), "n1", &pods);
        let maps = Maps::of(&state, &pods, u32::MAX);
        let config = if state.no_direct { CONFIG_NO_DIRECT } else { 0 };
        let caller = caller(1, config);
        let way = |to: &str| {
            let to = Target::from(to.parse::<SocketAddr>().unwrap());
            decide(&Call { to, transport: Transport::Tcp, own: false }, &caller, &maps).way
        };
        [way("10.1.0.1:8080"), way("[fd01::1]:9090"), way("10.96.0.1:80")]
    };
    let deny = |port| Policy {
        key: PolicyKey::new("shop", "p"),
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: vec![Rule {
            clauses: vec![Clause {
                matches: vec![Match { destination_ports: vec![port], ..Match::default() }],
            }],
        }],
        dry_run: false,
    };
    // u32::MAX % (1 + 2) == 0: the service's endpoint is the caller itself.
    assert_eq!(ways(vec![], (false, false), false), [Way::Direct, Way::Direct, Way::SelfCall]);
    assert_eq!(ways(vec![deny(8080)], (false, false), false)[..2], [Way::Deny, Way::Direct]);
    assert_eq!(ways(vec![deny(9090)], (false, false), false)[..2], [Way::Direct, Way::Deny]);
    assert_eq!(ways(vec![Policy { dry_run: true, ..deny(1) }], (false, false), false)[..2], [Way::Agent; 2]);
    assert_eq!(ways(vec![], (true, false), false)[..2], [Way::Agent; 2]);
    // A service's waypoint covers its own port, reached by the pod's address too.
    assert_eq!(ways(vec![], (false, true), false), [Way::Agent, Way::Direct, Way::Agent]);
    assert_eq!(ways(vec![], (false, false), true)[..2], [Way::Agent; 2]);
}

/// The world is the same, and what it was lowered to before is kept: only the pod's own addresses tell.
#[test]
fn an_address_that_appears_takes_back_what_depends_on_it() {
    let within = |item: Match| Policy {
        key: PolicyKey::new("shop", "p"),
        scope: Scope::Namespace,
        action: Action::Allow,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![item] }] }],
        dry_run: false,
    };
    let network = || vec!["10.1.0.0/16".parse().unwrap(), "fd01::/64".parse().unwrap()];
    let from = Match { source_ips: network(), ..Match::default() };
    let to = Match { destination_ips: network(), ..Match::default() };
    for (policy, changes) in [(from, 0_u8), (to, 1)] {
        let mut pods: Vec<_> = (0..2_u8)
            .map(|number| LocalWorkload {
                id: u32::from(number) + 1,
                workload: Arc::new(workload(number, "a", false, &[])),
                addresses: addresses(number, false),
                probe_ports: BTreeSet::new(),
            })
            .collect();
        let described = pods.iter().map(|pod| Change::Workload(pod.workload.clone()));
        let others = [Change::Policy(Arc::new(within(policy))), Change::Service(Arc::new(service(false)))];
        let world = Snapshot::default().with(described.chain(others));
        let mut lowering = Lowering::default();
        let mut verdict =
            |pods: &[LocalWorkload]| lowering.lower(&world, "n1", pods).verdicts.get(&(1, 2, 0)).copied();
        assert_eq!(verdict(&pods), Some(PairVerdict::Allow));
        pods[usize::from(changes)].addresses = addresses(changes, true);
        assert_eq!(verdict(&pods), None);
        pods[usize::from(changes)].addresses = addresses(changes, false);
        assert_eq!(verdict(&pods), Some(PairVerdict::Allow));
    }
}
