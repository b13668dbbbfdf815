use std::{sync::atomic::Ordering, time::Duration};

use mesh_core::{
    delta::Change,
    id::{PolicyKey, WorkloadKey},
    model::{Action, Clause, Locality, Match, NetworkMode, Policy, Rule, Scope, TunnelProtocol},
};

use super::*;

fn owner() -> Arc<Owner> {
    Arc::new(Owner {
        uid: "u1".into(),
        namespace: "shop".into(),
        name: "cart".into(),
        service_account: "cart".into(),
        node: "n1".into(),
        left: AtomicBool::new(false),
    })
}

fn workload(policies: Vec<PolicyKey>) -> Change {
    Change::Workload(Arc::new(Workload {
        uid: WorkloadKey("Kubernetes//Pod/shop/cart".into()),
        name: "cart".into(),
        namespace: "shop".into(),
        addresses: vec!["10.0.0.2".parse().unwrap()],
        network: "".into(),
        tunnel: TunnelProtocol::Hbone,
        trust_domain: "cluster.local".into(),
        service_account: "cart".into(),
        waypoint: None,
        node: "n1".into(),
        canonical_name: "cart".into(),
        canonical_revision: "".into(),
        workload_name: "cart".into(),
        native_tunnel: false,
        policies,
        health: mesh_core::model::Health::Healthy,
        leaving: false,
        cluster: "Kubernetes".into(),
        services: std::collections::BTreeMap::new(),
        locality: Locality::default(),
        network_mode: NetworkMode::Standard,
        capacity: 1,
    }))
}

/// Denies one port of the namespace.
fn deny(port: u16) -> Change {
    let item = Match { destination_ports: vec![port], ..Match::default() };
    Change::Policy(Arc::new(Policy {
        key: PolicyKey::new("shop", "no"),
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![item] }] }],
        dry_run: false,
    }))
}

fn world(changes: Vec<Change>) -> Snapshot {
    Snapshot::default().with(changes)
}

fn plaintext(registry: &Connections, owner: &Arc<Owner>, port: u16) -> Live {
    let (client, dialled) =
        ("10.0.0.9:40000".parse().unwrap(), SocketAddr::new("10.0.0.2".parse().unwrap(), port));
    let subject = Subject::Inbound(crate::inbound::arrival(None, client, dialled, None));
    let owner = owner.clone();
    registry.register(Accepted { owner, side: Side::Inbound, client, dialled, own_tuple: true, subject })
}

fn is_cut(live: &Live) -> bool {
    live.entry.cut.borrow().is_some()
}

#[test]
fn a_change_cuts_what_it_denies_and_nothing_else() {
    let (registry, owner) = (Connections::default(), owner());
    let (denied, kept) = (plaintext(&registry, &owner, 80), plaintext(&registry, &owner, 81));
    let now = Instant::now();
    assert_eq!(registry.sweep(&world(vec![workload(vec![])]), now), Swept::default());
    let swept = registry.sweep(&world(vec![workload(vec![]), deny(80)]), now);
    assert_eq!((swept.cut, swept.again), (1, None));
    assert!(is_cut(&denied) && !is_cut(&kept));
    assert_eq!(registry.list().iter().filter(|one| one.policy.as_deref() == Some("shop/no")).count(), 1);
}

#[test]
fn what_is_not_known_is_held_and_then_cut() {
    let (registry, owner) = (Connections::default(), owner());
    let live = plaintext(&registry, &owner, 80);
    let begin = Instant::now();
    let missing = world(vec![workload(vec![PolicyKey::new("shop", "later")])]);
    let swept = registry.sweep(&missing, begin);
    assert_eq!((swept.cut, swept.again), (0, Some(begin + limits::HOLD)));
    // Known again in between: the time starts anew.
    registry.sweep(&world(vec![workload(vec![])]), begin + Duration::from_secs(1));
    let later = begin + Duration::from_secs(2);
    assert_eq!(registry.sweep(&world(vec![]), later).again, Some(later + limits::HOLD));
    assert!(!is_cut(&live));
    assert_eq!(registry.sweep(&missing, later + limits::HOLD).cut, 1);
    assert!(is_cut(&live));
}

#[test]
fn a_pod_that_left_is_not_decided_about() {
    let (registry, owner) = (Connections::default(), owner());
    let live = plaintext(&registry, &owner, 80);
    owner.left.store(true, Ordering::Relaxed);
    registry.sweep(&world(vec![workload(vec![]), deny(80)]), Instant::now());
    assert!(!is_cut(&live));
    assert_eq!(registry.cut_pod("other", Flag::PodReleased, |_| true), 0);
    assert_eq!(registry.cut_pod("u1", Flag::PodReleased, |path| path == Some(Path::Tunnel)), 0);
    assert_eq!(registry.cut_pod("u1", Flag::PodReleased, |_| true), 1);
}

#[test]
fn a_tuple_is_taken_until_its_last_user_is_gone() {
    let (registry, owner) = (Connections::default(), owner());
    let (client, to): (SocketAddr, SocketAddr) =
        ("10.0.0.9:40000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
    let first = plaintext(&registry, &owner, 80);
    let second = plaintext(&registry, &owner, 80);
    registry.direct(client, to, true);
    drop(first);
    assert!(registry.taken(client, to));
    drop(second);
    assert!(registry.taken(client, to));
    registry.direct(client, to, false);
    // The end of a flow that was open before this process.
    registry.direct(client, to, false);
    assert!(!registry.taken(client, to));
    assert_eq!(registry.count(), 0);
}

#[tokio::test]
async fn being_cut_ends_the_work() {
    let (registry, owner) = (Connections::default(), owner());
    let live = plaintext(&registry, &owner, 80);
    assert_eq!(live.until_cut(async { 7 }).await, Ok(7));
    let (outcome, _) = tokio::join!(live.until_cut(std::future::pending::<()>()), async {
        registry.sweep(&world(vec![workload(vec![]), deny(80)]), Instant::now())
    });
    assert_eq!(outcome.unwrap_err().flag, Flag::PolicyChanged);
}
