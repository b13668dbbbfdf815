//! Resources of the control plane: decoded, prepared, applied, compiled. The first byte chooses the type.

use mesh_core::{
    delta::{Change, prepare},
    model,
    proto::{
        self, TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_MESH_OPTIONS, TYPE_WAYPOINT, discovery::Resource, node,
        security, waypoint, workload,
    },
    route,
    snapshot::Snapshot,
};
use prost::Message;

pub const TARGET: crate::Target = crate::Target {
    name: "xds_resource",
    seeds,
    dictionary: &[
        b"cluster.local",
        b"default/",
        b"Kubernetes//Pod/default/web",
        b"\x0a",
        b"\x12",
        b"\x1a",
        b"\x22",
        b"\x08",
        b"\xff\xff\xff\xff\x0f",
        b"\x80\x80\x80\x80\x10",
        b"\x00",
        b"(a+)+$",
        b"[",
        b"*.",
        b"/",
    ],
    run,
};

const TYPES: [&str; 4] = [TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_WAYPOINT, TYPE_MESH_OPTIONS];

fn typed(kind: u8, message: &impl Message) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(message.encode_to_vec());
    bytes
}

fn seeds() -> Vec<Vec<u8>> {
    let workload = workload::Workload {
        uid: "Kubernetes//Pod/default/web".into(),
        name: "web".into(),
        namespace: "default".into(),
        addresses: vec![vec![10, 244, 1, 2], [0xfd; 16].to_vec()],
        trust_domain: "cluster.local".into(),
        service_account: "web".into(),
        node: "a".into(),
        ..Default::default()
    };
    let service = workload::Service {
        name: "web".into(),
        namespace: "default".into(),
        hostname: "web.default.svc.cluster.local".into(),
        ..Default::default()
    };
    let address = |kind| workload::Address { r#type: Some(kind) };
    vec![
        typed(0, &address(workload::address::Type::Workload(workload))),
        typed(0, &address(workload::address::Type::Service(service))),
        typed(1, &security::Authorization::from(&policy())),
        typed(2, &waypoint::WaypointConfig::from(&config())),
        vec![3],
    ]
}

fn policy() -> model::Policy {
    let matched = model::Match {
        namespaces: vec![model::StringMatch::Exact("shop".into())],
        not_principals: vec![model::StringMatch::Prefix("cluster.local/ns/".into())],
        source_ips: vec!["10.0.0.0/8".parse().expect("a network")],
        destination_ports: vec![80],
        ..Default::default()
    };
    model::Policy {
        key: mesh_core::id::PolicyKey::new("default", "p"),
        scope: model::Scope::WorkloadSelector,
        action: model::Action::Deny,
        rules: vec![model::Rule { clauses: vec![model::Clause { matches: vec![matched] }] }],
        dry_run: false,
    }
}

fn config() -> model::WaypointConfig {
    let service = mesh_core::id::ServiceKey::new("default", "web.default.svc.cluster.local");
    let target = model::BackendTarget {
        service: service.clone(),
        port: 80,
        http2: true,
        subject_alt_names: Vec::new(),
    };
    let value = model::ValueMatch::Regex("a.*b".into());
    let matched = model::RequestMatch {
        path: model::PathMatch::Regex("/a(b|c)*".into()),
        method: Some("GET".into()),
        headers: vec![model::HeaderMatch { name: "end-user".into(), value }],
        query: Vec::new(),
    };
    let edit = model::HeaderEdit {
        remove: vec!["x-gone".into()],
        set: vec![("x-set".into(), "1".into())],
        add: vec![("x-more".into(), "2".into())],
    };
    let filters = model::Filters {
        request: edit.clone(),
        response: edit,
        rewrite: Some(model::Rewrite {
            hostname: Some("other".into()),
            path: Some(model::PathEdit::Prefix("/b".into())),
        }),
        redirect: Some(model::Redirect {
            scheme: Some("https".into()),
            hostname: None,
            path: Some(model::PathEdit::Full("/c".into())),
            port: Some(8443),
            status: 308,
        }),
    };
    let rule = model::RouteRule {
        name: Some("first".into()),
        filters: filters.clone(),
        matches: vec![matched],
        backends: vec![
            model::Backend { weight: 90, filters, target: Ok(target) },
            model::Backend {
                weight: 10,
                filters: model::Filters::default(),
                target: Err("no such service".into()),
            },
        ],
        request_timeout: Some(std::time::Duration::from_secs(1)),
        backend_timeout: None,
    };
    let route = model::Route {
        kind: model::RouteKind::Grpc,
        namespace: "default".into(),
        name: "r".into(),
        created: 1,
        hostnames: vec!["*.example.org".into()],
        rules: vec![rule],
    };
    let vips = vec!["10.96.0.1".parse().expect("an address")];
    let listener = model::Listener { service, vips, port: 80, http: true, routes: vec![route] };
    model::WaypointConfig { namespace: "default".into(), name: "gw".into(), listeners: vec![listener] }
}

fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    let type_url = TYPES[usize::from(*kind) % TYPES.len()];
    let decoded = proto::decode(type_url, bytes);
    let name = decoded.as_ref().map_or_else(|_| "x".to_owned(), |change| change.resource().1);
    let resource = Resource {
        name,
        resource: Some(prost_types::Any { type_url: type_url.to_owned(), value: bytes.to_vec() }),
        ..Resource::default()
    };
    let prepared = prepare(type_url, &resource);
    assert!(decoded.is_ok() || prepared.is_err());
    let Ok(change) = prepared else { return };
    again(type_url, &change);
    if let Change::Waypoint(config) = &change {
        for listener in &config.listeners {
            let _table = route::compile(listener);
        }
    }
    // In and out again leaves nothing behind.
    let (type_url, name) = change.resource();
    let world = Snapshot::default().with([change.clone(), change]);
    let gone = mesh_core::delta::removed(type_url, &name);
    let world = world.with(gone);
    let left = world.workloads().count()
        + world.services().count()
        + world.policies().count()
        + world.pods().count();
    assert_eq!(left, 0, "{name:?} of {type_url} stays: {:?}", world.services().next());
}

/// What was understood is sent and understood in the same way.
fn again(type_url: &str, change: &Change) {
    let bytes = match change {
        Change::Policy(policy) => security::Authorization::from(&**policy).encode_to_vec(),
        Change::Waypoint(config) => waypoint::WaypointConfig::from(&**config).encode_to_vec(),
        Change::Workload(item) => {
            let kind = workload::address::Type::Workload(workload::Workload::from(&**item));
            workload::Address { r#type: Some(kind) }.encode_to_vec()
        }
        Change::Service(item) => {
            let kind = workload::address::Type::Service(workload::Service::from(&**item));
            workload::Address { r#type: Some(kind) }.encode_to_vec()
        }
        Change::LocalPod(pod) => node::LocalPod::from(&**pod).encode_to_vec(),
        _ => return,
    };
    assert_eq!(proto::decode(type_url, &bytes).as_ref(), Ok(change));
}
