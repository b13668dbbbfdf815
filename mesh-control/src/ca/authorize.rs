//! (pure) Who may have which identity: a node those of the pods that are bound to it and have not ended, a pod its own.

use mesh_core::id::Identity;

use crate::{
    compile::{PodFact, World},
    credentials::Principal,
};

/// Why an identity is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A node must name an identity.
    #[error("the request names no identity")]
    NoIdentity,
    /// Not a SPIFFE identity of the exact form.
    #[error("the requested identity is malformed")]
    Malformed,
    /// Another trust domain.
    #[error("{0} is not of this trust domain")]
    TrustDomain(Identity),
    /// No pod on this node that has not ended has the identity.
    #[error("no pod on node {node} that has not ended has {identity}")]
    NotOnNode {
        /// The caller's node.
        node: String,
        /// What was asked for.
        identity: Identity,
    },
    /// The calling pod is not there, or has ended.
    #[error("{0} is not a live pod")]
    NoPod(String),
    /// A pod asked for another identity than its own.
    #[error("{0} is not the caller's own identity")]
    NotOwn(Identity),
}

/// Decides which identity `caller` gets, if any.
///
/// # Errors
/// [`Refused`] says why not.
pub fn authorize(
    world: &World,
    trust_domain: &str,
    caller: &Principal,
    requested: Option<&str>,
) -> Result<Identity, Refused> {
    let requested = requested.map(|uri| Identity::parse(uri).map_err(|_| Refused::Malformed)).transpose()?;
    if let Some(identity) = requested.as_ref().filter(|identity| &*identity.trust_domain != trust_domain) {
        return Err(Refused::TrustDomain(identity.clone()));
    }
    match caller {
        Principal::Node(node) => {
            let identity = requested.ok_or(Refused::NoIdentity)?;
            let runs = world.pods.iter().any(|((namespace, _), pod)| {
                pod.node == *node
                    && live(pod)
                    && *namespace == identity.namespace
                    && pod.service_account == identity.service_account
            });
            if runs { Ok(identity) } else { Err(Refused::NotOnNode { node: node.to_string(), identity }) }
        }
        Principal::Pod { namespace, name } => {
            let pod = world.pods.get(&(namespace.clone(), name.clone())).filter(|pod| live(pod));
            let pod = pod.ok_or_else(|| Refused::NoPod(caller.to_string()))?;
            let own = Identity::new(trust_domain, namespace, &pod.service_account);
            match requested {
                Some(other) if other != own => Err(Refused::NotOwn(other)),
                _ => Ok(own),
            }
        }
    }
}

/// Pending counts: a pod's first connection comes before it is Running. So does terminating: it serves to its end, also
/// when its agent starts anew meanwhile.
fn live(pod: &PodFact) -> bool {
    !pod.finished
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world() -> World {
        let pod = |node: &str, account: &str, finished: bool, deleting: bool| PodFact {
            uid: "u".into(),
            node: node.into(),
            service_account: account.into(),
            finished,
            deleting,
            meshed: true,
            waypoint: None,
        };
        let mut world = World::default();
        for (name, fact) in [
            ("web", pod("n1", "web", false, false)),
            ("db", pod("n2", "db", false, false)),
            ("job", pod("n1", "job", true, false)),
            ("leaving", pod("n1", "leaving", false, true)),
            ("gw", pod("n1", "gw", false, false)),
            ("unbound", pod("", "unbound", false, false)),
        ] {
            world.pods.insert(("shop".into(), name.into()), fact);
        }
        world
    }

    fn node(name: &str) -> Principal {
        Principal::Node(name.into())
    }

    fn pod(name: &str) -> Principal {
        Principal::Pod { namespace: "shop".into(), name: name.into() }
    }

    #[test]
    fn only_identities_that_live_where_the_caller_is() {
        for (caller, requested, granted) in [
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/web"), true),
            (node("n2"), Some("spiffe://cluster.local/ns/shop/sa/db"), true),
            // Another node's pod, also when the caller names a node that nobody knows.
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/db"), false),
            (node("n3"), Some("spiffe://cluster.local/ns/shop/sa/web"), false),
            (node(""), Some("spiffe://cluster.local/ns/shop/sa/web"), false),
            // Ended, terminating, never there.
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/job"), false),
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/leaving"), true),
            (node("n2"), Some("spiffe://cluster.local/ns/shop/sa/leaving"), false),
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/gone"), false),
            (node("n1"), Some("spiffe://cluster.local/ns/bank/sa/web"), false),
            (node("n1"), Some("spiffe://cluster.local/ns/undermesh-system/sa/mesh-node"), false),
            // Foreign or malformed.
            (node("n1"), Some("spiffe://other/ns/shop/sa/web"), false),
            (node("n1"), Some("spiffe://CLUSTER.LOCAL/ns/shop/sa/web"), false),
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/web/"), false),
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/../sa/web"), false),
            (node("n1"), Some("spiffe://cluster.local/ns//sa/web"), false),
            (node("n1"), Some("spiffe://cluster.local/ns/shop/sa/%77eb"), false),
            (
                node("n1"),
                Some("spiffe://cluster.local/ns/shop/sa/web,spiffe://cluster.local/ns/shop/sa/db"),
                false,
            ),
            (node("n1"), Some(""), false),
            (node("n1"), None, false),
            // A pod gets its own and nothing else.
            (pod("gw"), None, true),
            (pod("gw"), Some("spiffe://cluster.local/ns/shop/sa/gw"), true),
            (pod("gw"), Some("spiffe://cluster.local/ns/shop/sa/web"), false),
            (pod("gw"), Some("spiffe://other/ns/shop/sa/gw"), false),
            (pod("job"), None, false),
            (pod("leaving"), None, true),
            (pod("gone"), None, false),
        ] {
            let got = authorize(&world(), "cluster.local", &caller, requested);
            assert_eq!(got.is_ok(), granted, "{caller} {requested:?}: {got:?}");
        }
    }
}
