//! Namespaces, Nodes and Pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use mesh_core::model::workload::Locality;

use super::{Labels, Report, probe};
use crate::source::Object;

/// Label that enrols, on pods and namespaces.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Label that names the Gateway that a pod or Service was made for.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// What a namespace says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// Its labels: enrolment, waypoint, and what `allowedRoutes` selects by.
    pub labels: Labels,
}

/// What a node says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// Where it is.
    pub locality: Locality,
    /// Nothing may run there before the agent is in force.
    pub waits_for_agent: bool,
    /// Its addresses, at which it takes node ports.
    pub addresses: Vec<IpAddr>,
}

/// Service account of the agents, in the install namespace.
pub const AGENT_ACCOUNT: &str = "undermesh-node";
/// Taint of a node whose agent is not in force yet.
pub const AGENT_TAINT: &str = "undermesh.io/agent-not-ready";

/// What a pod says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// UID; empty where none was written.
    pub uid: Arc<str>,
    /// Its node; empty while it is not scheduled.
    pub node: Arc<str>,
    /// Its addresses, never v4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: Labels,
    /// Its service account.
    pub service_account: Arc<str>,
    /// It has ended: phase Succeeded or Failed.
    pub finished: bool,
    /// It is being deleted.
    pub deleting: bool,
    /// It takes connections.
    pub ready: bool,
    /// It shares the node's addresses.
    pub host_network: bool,
    /// It has a sidecar, so the mesh leaves it alone.
    pub sidecar: bool,
    /// Container ports by name, TCP only.
    pub ports: BTreeMap<Arc<str>, u16>,
    /// Ports that the kubelet calls.
    pub probe_ports: BTreeSet<u16>,
    /// Name of the controller.
    pub workload_name: Arc<str>,
    /// UID by which the kubelet knows it: of a mirror, which stands for a static pod.
    pub kubelet_uid: Option<Arc<str>>,
}

/// Translates a Namespace.
pub fn namespace(object: &Object) -> NamespaceFacts {
    NamespaceFacts { labels: object.meta.labels.clone().unwrap_or_default() }
}

/// Translates a Node.
pub fn node(object: &Object, node: &Node) -> NodeFacts {
    let label = |key: &str| Arc::from(object.label(key).unwrap_or_default());
    let mut taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    NodeFacts {
        waits_for_agent: taints.any(|taint| taint.key == AGENT_TAINT),
        locality: Locality {
            region: label("topology.kubernetes.io/region"),
            zone: label("topology.kubernetes.io/zone"),
            subzone: label("topology.istio.io/subzone"),
        },
        addresses: node_addresses(node),
    }
}

/// Names are left out, as is what is no address of a host.
fn node_addresses(node: &Node) -> Vec<IpAddr> {
    let listed = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let mut own: Vec<IpAddr> = Vec::new();
    for address in listed.filter(|address| matches!(&*address.type_, "InternalIP" | "ExternalIP")) {
        let Ok(ip) = address.address.parse::<IpAddr>() else { continue };
        let ip = ip.to_canonical();
        if !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || own.contains(&ip)) {
            own.push(ip);
        }
    }
    own
}

/// Translates a Pod.
pub fn pod(object: &Object, pod: &Pod, report: &mut Report<'_>) -> PodFacts {
    let Pod { metadata: _, spec, status } = pod;
    let text = |value: Option<&String>| Arc::<str>::from(value.map_or("", String::as_str));
    let status = status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let spec = spec.as_ref();
    let service_account = spec
        .and_then(|spec| spec.service_account_name.as_deref().or(spec.service_account.as_deref()))
        .filter(|name| !name.is_empty())
        .unwrap_or("default");
    PodFacts {
        uid: text(object.meta.uid.as_ref()),
        node: text(spec.and_then(|spec| spec.node_name.as_ref())),
        addresses: status.map(|status| addresses(status, report)).unwrap_or_default(),
        labels: object.meta.labels.clone().unwrap_or_default(),
        service_account: service_account.into(),
        finished: matches!(phase, "Succeeded" | "Failed"),
        deleting: object.meta.deletion_timestamp.is_some(),
        ready: status.is_some_and(ready),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
        sidecar: object.annotation("sidecar.istio.io/status").is_some(),
        ports: spec.map(container_ports).unwrap_or_default(),
        probe_ports: spec.map(probe::ports).unwrap_or_default(),
        workload_name: workload_name(object),
        kubelet_uid: object
            .annotation("kubernetes.io/config.mirror")
            .and_then(|_| object.annotation("kubernetes.io/config.hash"))
            .filter(|hash| !hash.is_empty())
            .map(Arc::from),
    }
}

fn addresses(status: &PodStatus, report: &mut Report<'_>) -> Vec<IpAddr> {
    let listed = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in status.pod_ip.as_deref().into_iter().chain(listed) {
        match text.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() => {
                report.error("status.podIPs", format!("{text} cannot be the address of a pod"));
            }
            Ok(ip) if addresses.contains(&ip.to_canonical()) => {}
            Ok(ip) => addresses.push(ip.to_canonical()),
            Err(_) => report.error("status.podIPs", format!("{text:.64?} is not an IP address")),
        }
    }
    addresses
}

/// Kubernetes always writes the condition; for a pod that was written by hand without one, running is enough.
fn ready(status: &PodStatus) -> bool {
    let condition = status.conditions.iter().flatten().find(|condition| condition.type_ == "Ready");
    condition.map_or(status.phase.as_deref() == Some("Running"), |condition| condition.status == "True")
}

fn container_ports(spec: &k8s_openapi::api::core::v1::PodSpec) -> BTreeMap<Arc<str>, u16> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP")
        .filter_map(|port| Some((port.name.as_deref()?.into(), u16::try_from(port.container_port).ok()?)))
        .collect()
}

/// The Deployment behind a ReplicaSet, otherwise the controller, otherwise the pod itself.
fn workload_name(object: &Object) -> Arc<str> {
    if let Some(name) = object.label("service.istio.io/workload-name") {
        return name.into();
    }
    let owner = object.meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    match owner {
        Some(owner) if owner.kind == "ReplicaSet" => {
            let suffix = object.label("pod-template-hash").map(|hash| format!("-{hash}")).unwrap_or_default();
            owner.name.strip_suffix(&suffix).unwrap_or(&owner.name).into()
        }
        Some(owner) => owner.name.as_str().into(),
        None => object.key.name.clone(),
    }
}

impl PodFacts {
    /// A label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    /// Whether it runs and can be reached.
    pub fn alive(&self) -> bool {
        !self.finished && !self.addresses.is_empty()
    }

    /// Whether proxies are told of it: its agent needs its description before its status has an address, since the
    /// kubelet writes that only after the first containers have started and their `postStart` hooks have ended.
    pub fn described(&self) -> bool {
        let placed = !self.addresses.is_empty() || !self.node.is_empty();
        placed && !self.finished
    }

    /// Whether it speaks HBONE by itself.
    pub fn native_tunnel(&self) -> bool {
        self.label("networking.istio.io/tunnel") == Some("http") && !self.host_network
    }

    /// Canonical name and revision, for telemetry.
    pub fn canonical(&self) -> (Arc<str>, Arc<str>) {
        let first = |keys: [&str; 3]| keys.iter().find_map(|key| self.label(key)).map(Arc::from);
        let name = first(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
        let revision = first(["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
        (name.unwrap_or_else(|| self.workload_name.clone()), revision.unwrap_or_else(|| "latest".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Fragment, tests::translated};
    use super::*;

    fn pod_of(meta: &str, spec: &str, status: &str) -> PodFacts {
        let yaml = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-1, {meta}}}\nspec: {spec}\nstatus: {status}\n"
        );
        match translated(&yaml).fragment {
            Fragment::Pod(facts) => *facts,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pod_is_read_in_full() {
        let got = pod_of(
            "uid: u1, labels: {app: web, version: v2, pod-template-hash: abc}, ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-abc, uid: r, controller: true}]",
            "{nodeName: n1, serviceAccountName: sa, containers: [{name: c, ports: [{name: http, containerPort: 8080}, {name: dns, containerPort: 53, protocol: UDP}]}]}",
            "{phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}], conditions: [{type: Ready, status: 'True'}]}",
        );
        assert_eq!(got.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!((&*got.node, &*got.service_account, &*got.uid), ("n1", "sa", "u1"));
        assert_eq!(got.ports, BTreeMap::from([("http".into(), 8080)]));
        assert_eq!(&*got.workload_name, "web");
        assert_eq!(got.canonical(), ("web".into(), "v2".into()));
        assert!(got.ready && got.alive());
    }

    #[test]
    fn readiness_and_end_come_from_the_status() {
        for (meta, status, ready, alive) in [
            ("", "{}", false, false),
            ("", "{phase: Running, podIP: 10.0.0.1}", true, true),
            ("", "{phase: Pending, podIP: 10.0.0.1}", false, true),
            (
                "",
                "{phase: Running, podIP: 10.0.0.1, conditions: [{type: Ready, status: 'False'}]}",
                false,
                true,
            ),
            ("", "{phase: Succeeded, podIP: 10.0.0.1}", false, false),
            ("", "{phase: Failed, podIP: 10.0.0.1}", false, false),
        ] {
            let got = pod_of(meta, "{containers: []}", status);
            assert_eq!((got.ready, got.alive()), (ready, alive), "{status}");
        }
        assert!(pod_of("deletionTimestamp: '2026-01-01T00:00:00Z'", "{containers: []}", "{}").deleting);
    }

    #[test]
    fn addresses_that_no_pod_can_have_are_left_out() {
        for bad in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "x"] {
            let yaml = format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {{containers: []}}\nstatus: {{podIP: '{bad}'}}\n"
            );
            assert_eq!(translated(&yaml).problems.len(), 1, "{bad}");
        }
    }
}
