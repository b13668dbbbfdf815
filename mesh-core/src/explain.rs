//! Decisions told as sentences: what `meshctl explain` prints and access records quote.

use crate::{
    id::Identity,
    inbound::Admission,
    outbound::{Hop, Plan},
};

/// Where a connection goes, and why.
pub fn plan(plan: &Plan) -> String {
    let of = |service: &Option<std::sync::Arc<crate::model::Service>>| match service {
        Some(service) => format!(" for {}", service.key),
        None => String::new(),
    };
    match plan {
        Plan::Passthrough { to, service: None } => {
            format!("passed through to {to}: not known to the mesh")
        }
        Plan::Passthrough { to, service: Some(service) } => {
            format!("passed through to {to}: {} has no endpoint in the mesh", service.key)
        }
        Plan::Plain { to, workload, service } => {
            format!(
                "plain TCP to {}/{} at {to}{}: not in the mesh",
                workload.namespace,
                workload.name,
                of(service)
            )
        }
        Plan::Tunnel { hop, authority, workload, service } => format!(
            "tunnel to {}/{} at {authority}{}, through {}",
            workload.namespace,
            workload.name,
            of(service),
            met(hop)
        ),
        Plan::Waypoint { hop, authority, workload, service } => format!(
            "waypoint {}/{}{} for {authority}, through {}",
            workload.namespace,
            workload.name,
            of(service),
            met(hop)
        ),
    }
}

fn met(hop: &Hop) -> String {
    let names: Vec<_> = hop.expect.iter().map(Identity::to_string).collect();
    format!("{} as {}", hop.dial, names.join(" or "))
}

/// Why a connection was admitted.
pub fn admission(admission: &Admission) -> String {
    let by = match &admission.decider {
        Some(decider) => format!("allowed by rule {} of {}", decider.rule, decider.policy),
        None => "allowed: no ALLOW policy applies".to_owned(),
    };
    if admission.via_waypoint { format!("{by}, through the waypoint") } else { by }
}
