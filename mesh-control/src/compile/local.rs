//! (pure) What the agent of a node is told of the node's pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::model::{Enrolment, LocalPod};

use super::index::Index;

/// By node, then by UID: every pod that is bound to a node and has not ended, enrolled or not. A pod without a UID was
/// never in a cluster, and has no name here.
pub fn pods(index: &Index<'_>) -> BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<LocalPod>>> {
    let mut by_node: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<LocalPod>>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for ((namespace, name), pod) in &index.pods {
        let facts = pod.facts;
        if facts.finished || facts.node.is_empty() || facts.uid.is_empty() || !seen.insert(&facts.uid) {
            continue;
        }
        let enrolment = match index.enrolment(namespace, facts) {
            Ok(()) => Enrolment::Wanted,
            Err(not) => Enrolment::Not { reason: not.word().into(), text: not.text().into() },
        };
        let local = LocalPod {
            uid: facts.uid.clone(),
            namespace: namespace.clone(),
            name: name.clone(),
            service_account: facts.service_account.clone(),
            ips: if facts.host_network { Vec::new() } else { facts.addresses.clone() },
            enrolment,
            probe_ports: facts.probe_ports.clone(),
            terminating: facts.deleting,
            kubelet_uid: facts.kubelet_uid.clone(),
        };
        by_node.entry(facts.node.clone()).or_default().insert(facts.uid.clone(), Arc::new(local));
    }
    by_node
}
