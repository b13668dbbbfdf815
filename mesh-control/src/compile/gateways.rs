//! (pure) What became of GatewayClasses and Gateways.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::{id::ServiceKey, model::Service};

use super::{
    Output,
    index::Index,
    outcome::{ClassOutcome, GatewayOutcome},
};
use crate::translate::gateway::WAYPOINT_CLASSES;

/// Notes the outcome of every class and Gateway of ours.
pub fn outcomes(index: &Index<'_>, services: &BTreeMap<ServiceKey, Arc<Service>>, out: &mut Output) {
    for (name, class) in index.classes.iter().filter(|(_, class)| class.facts.ours) {
        let outcome = ClassOutcome {
            generation: class.object.generation,
            served: WAYPOINT_CLASSES.contains(&&**name),
            parameters: class.facts.parameters,
        };
        out.outcomes.classes.insert(class.object.key.clone(), outcome);
    }
    for (name, gateway) in &index.waypoints {
        let service = services.get(&index.service_key(&name.0, &name.1));
        let pods = index.pods.iter().filter(|(key, pod)| {
            pod.facts.alive()
                && pod.facts.ready
                && !pod.facts.deleting
                && index.waypoint_of_pod(&key.0, pod.facts).as_ref() == Some(name)
        });
        let outcome = GatewayOutcome {
            generation: gateway.object.generation,
            facts: Some(Box::new(gateway.facts.clone())),
            addresses: service.map(|service| service.vips.clone()).unwrap_or_default(),
            attached: attached(out, name),
            pods: pods.count(),
        };
        out.outcomes.gateways.insert(gateway.object.key.clone(), outcome);
    }
    for (object, class) in index.gateways.values() {
        if index.classes.get(class).is_some_and(|class| class.facts.ours) {
            let generation = object.generation;
            let (facts, addresses) = (None, Vec::new());
            let outcome = GatewayOutcome { generation, facts, addresses, attached: 0, pods: 0 };
            out.outcomes.gateways.insert(object.key.clone(), outcome);
        }
    }
}

/// Routes that name the Gateway as their parent and are accepted, counted once.
fn attached(out: &Output, (namespace, name): &super::index::Name) -> usize {
    let routes = out.outcomes.routes.iter().filter(|(_, route)| {
        route.parents.iter().any(|parent| {
            parent.refused.is_none()
                && &*parent.parent.kind == "Gateway"
                && parent.parent.namespace == *namespace
                && parent.parent.name == *name
        })
    });
    routes.map(|(key, _)| key).collect::<BTreeSet<_>>().len()
}
