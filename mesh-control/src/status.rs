//! (pure) Problems and acknowledgements → what an operator is told: is it in force everywhere, and why not.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::proto::{TYPE_AUTHORIZATION, TYPE_WAYPOINT};
use serde::Serialize;

use crate::{
    compile::World,
    credentials::Principal,
    publish::Published,
    serve::proxies::Proxy,
    source::{Problem, Severity},
};

pub mod object;
pub mod objects;

pub use objects::objects;

/// The answer of `/status`.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The published revision.
    pub revision: u64,
    /// The directory was read again for this answer.
    pub rescanned: bool,
    /// Every expected proxy is connected and holds this revision, nothing rejected.
    pub in_force: bool,
    /// Why not.
    pub why: Vec<String>,
    /// What is wrong with the input.
    pub problems: Vec<Problem>,
    /// Every proxy that is expected or connected.
    pub proxies: Vec<ProxyStatus>,
    /// Conditions by object.
    pub objects: BTreeMap<String, ObjectStatus>,
}

/// One proxy.
#[derive(Clone, Debug, Serialize)]
pub struct ProxyStatus {
    /// `node:<name>` or `pod:<namespace>/<name>`.
    pub id: Principal,
    /// What it is.
    pub kind: &'static str,
    /// It should be there.
    pub expected: bool,
    /// It is there.
    pub connected: bool,
    /// The newest revision of which it acknowledged everything.
    pub acked_revision: Option<u64>,
    /// Resources that were sent and not answered.
    pub pending: Vec<Arc<str>>,
    /// Resources that it rejected.
    pub nacks: Vec<NackStatus>,
}

/// One rejection.
#[derive(Clone, Debug, Serialize)]
pub struct NackStatus {
    /// The resource.
    pub name: Arc<str>,
    /// Why.
    pub reason: String,
}

/// One object.
#[derive(Clone, Debug, Serialize)]
pub struct ObjectStatus {
    /// As Kubernetes has them.
    pub conditions: Vec<Condition>,
}

/// A condition of an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `True` or `False`.
    pub status: &'static str,
    /// One word.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// The proxies that should be connected: an agent for every node that has pods, and every waypoint's pods.
pub fn expected(world: &World) -> BTreeSet<Principal> {
    let mut expected = BTreeSet::new();
    for ((namespace, name), pod) in &world.pods {
        if pod.finished || pod.node.is_empty() {
            continue;
        }
        if world.nodes.contains(&pod.node) {
            expected.insert(Principal::Node(pod.node.clone()));
        }
        if pod.waypoint.is_some() && !pod.deleting {
            expected.insert(Principal::Pod { namespace: namespace.clone(), name: name.clone() });
        }
    }
    expected
}

/// Puts everything together.
pub fn status(published: &Published, known: &BTreeMap<Principal, Proxy>, rescanned: bool) -> Status {
    let expected = expected(&published.world);
    let absent = Proxy::default();
    let ids: BTreeSet<&Principal> =
        expected.iter().chain(known.iter().filter(|(_, proxy)| proxy.connected).map(|(id, _)| id)).collect();
    let mut why = missing_waypoints(&published.world);
    let mut proxies = Vec::new();
    for id in ids {
        let proxy = known.get(id).unwrap_or(&absent);
        let wanted = expected.contains(id);
        let current = current_nacks(published, proxy);
        if wanted {
            if !proxy.connected {
                why.push(format!("{id} is not connected"));
            } else if !current.is_empty() {
                why.push(format!("{id} rejected {} resources", current.len()));
            } else if proxy.acked_revision != Some(published.revision) {
                why.push(format!("{id} has not acknowledged revision {}", published.revision));
            }
        }
        proxies.push(ProxyStatus {
            id: id.clone(),
            kind: if matches!(id, Principal::Node(_)) { "agent" } else { "waypoint" },
            expected: wanted,
            connected: proxy.connected,
            acked_revision: proxy.acked_revision,
            pending: proxy.pending.iter().cloned().collect(),
            nacks: current,
        });
    }
    Status {
        revision: published.revision,
        rescanned,
        in_force: why.is_empty(),
        why,
        problems: published.world.problems.clone(),
        proxies,
        objects: flat(published, known, &expected),
    }
}

/// A waypoint that nobody runs can enforce nothing.
fn missing_waypoints(world: &World) -> Vec<String> {
    let served: BTreeSet<_> =
        world.pods.values().filter(|pod| !pod.finished).filter_map(|pod| pod.waypoint.as_ref()).collect();
    let missing = world
        .waypoints
        .iter()
        .filter(|(name, config)| !config.listeners.is_empty() && !served.contains(name));
    missing.map(|(name, _)| format!("waypoint {name} has no pods")).collect()
}

/// Rejections of what is published now; older ones are history.
fn current_nacks(published: &Published, proxy: &Proxy) -> Vec<NackStatus> {
    let current = proxy.nacks.iter().filter(|((type_url, name), (version, _))| {
        published.set(type_url).get(name).map_or(version.is_empty(), |resource| resource.version == *version)
    });
    current
        .map(|((_, name), (_, reason))| NackStatus { name: name.clone(), reason: reason.clone() })
        .collect()
}

fn flat(
    published: &Published,
    known: &BTreeMap<Principal, Proxy>,
    expected: &BTreeSet<Principal>,
) -> BTreeMap<String, ObjectStatus> {
    let mut complaints: BTreeMap<&str, Vec<&Problem>> = BTreeMap::new();
    for problem in published.world.problems.iter().filter(|problem| problem.severity > Severity::Info) {
        complaints.entry(&problem.object).or_default().push(problem);
    }
    let mut objects = BTreeMap::new();
    for (key, carried) in &published.world.carried {
        let name = key.to_string();
        let mut conditions = vec![accepted(complaints.remove(name.as_str()).unwrap_or_default())];
        if !carried.resources.is_empty() {
            conditions.push(in_force(published, known, expected, &carried.resources));
        }
        objects.insert(name, ObjectStatus { conditions });
    }
    // Kinds that are not followed one by one still show what is wrong with them.
    for (name, problems) in complaints.into_iter().filter(|(name, _)| !name.is_empty()) {
        objects.insert(name.to_owned(), ObjectStatus { conditions: vec![accepted(problems)] });
    }
    objects
}

fn accepted(problems: Vec<&Problem>) -> Condition {
    let failed = problems.iter().any(|problem| problem.severity == Severity::Error);
    let text = problems.iter().map(|problem| {
        let field = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
        format!("{field}{}", problem.reason)
    });
    // Reasons that have a name of their own start with it.
    let named = problems.iter().filter(|problem| problem.severity == Severity::Error).find_map(|problem| {
        let (word, _) = problem.reason.split_once(':')?;
        (word.starts_with(|c: char| c.is_ascii_uppercase())
            && word.chars().all(|c| c.is_ascii_alphanumeric()))
        .then(|| word.to_owned())
    });
    Condition {
        kind: "Accepted",
        status: if failed { "False" } else { "True" },
        reason: if failed { named.unwrap_or_else(|| "Invalid".to_owned()) } else { "Accepted".to_owned() },
        message: text.collect::<Vec<_>>().join("; "),
    }
}

/// How many of the proxies that need an object hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    needed: usize,
    held: usize,
}

impl Held {
    /// Nobody to enforce it is not the same as enforced by all.
    pub fn everywhere(self) -> bool {
        self.needed > 0 && self.held == self.needed
    }

    /// One word.
    pub fn reason(self) -> &'static str {
        match self.needed {
            0 => "NoProxy",
            _ if self.everywhere() => "Acknowledged",
            _ => "Pending",
        }
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "in force on {} of {} proxies", self.held, self.needed)
    }
}

fn held(
    published: &Published,
    known: &BTreeMap<Principal, Proxy>,
    expected: &BTreeSet<Principal>,
    resources: &BTreeSet<(&'static str, Arc<str>)>,
) -> Held {
    let (mut needed, mut held) = (0, 0);
    for id in expected {
        // A waypoint enforces its own configuration and asks for no policy; an agent sees no waypoint's.
        let sees = |type_url: &str, name: &Arc<str>| match (type_url, id) {
            (TYPE_AUTHORIZATION, Principal::Pod { .. }) => false,
            (TYPE_WAYPOINT, _) => published.visible(id, type_url).any(|resource| resource.name == *name),
            _ => true,
        };
        let mine: Vec<_> = resources.iter().filter(|(type_url, name)| sees(type_url, name)).collect();
        if mine.is_empty() {
            continue;
        }
        needed += 1;
        let holds = |(type_url, name): &(&'static str, Arc<str>)| {
            let version = published.set(type_url).get(name).map(|resource| &resource.version);
            let proxy = known.get(id).filter(|proxy| proxy.connected);
            version.is_some()
                && proxy.and_then(|proxy| proxy.holds.get(&(*type_url, name.clone()))) == version
        };
        held += usize::from(mine.into_iter().all(holds));
    }
    Held { needed, held }
}

fn in_force(
    published: &Published,
    known: &BTreeMap<Principal, Proxy>,
    expected: &BTreeSet<Principal>,
    resources: &BTreeSet<(&'static str, Arc<str>)>,
) -> Condition {
    let held = held(published, known, expected, resources);
    Condition {
        kind: "InForce",
        status: if held.everywhere() { "True" } else { "False" },
        reason: held.reason().to_owned(),
        message: held.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compile::PodFact, source::ObjectKey};

    fn published() -> Published {
        let mut world = World::default();
        world.nodes.extend(["n1".into(), "n2".into(), "empty".into()]);
        for (name, node) in [("a", "n1"), ("b", "n2"), ("c", "unlisted")] {
            let fact = PodFact {
                uid: "".into(),
                node: node.into(),
                service_account: "default".into(),
                finished: false,
                deleting: false,
                meshed: true,
                waypoint: None,
            };
            world.pods.insert(("shop".into(), name.into()), fact);
        }
        world.problems.push(Problem {
            file: "a.yaml".to_owned(),
            line: 1,
            object: "HTTPRoute shop/r".to_owned(),
            field: "spec.x".to_owned(),
            reason: "NoMatchingParent: none".to_owned(),
            severity: Severity::Error,
        });
        world.carried.insert(ObjectKey::new(crate::source::Kind::HttpRoute, "shop", "r"), Default::default());
        Published::default().next(world)
    }

    fn proxy(connected: bool, acked_revision: Option<u64>) -> Proxy {
        Proxy { connected, acked_revision, ..Proxy::default() }
    }

    #[test]
    fn in_force_means_every_expected_proxy() {
        let published = published();
        let node = |name: &str| Principal::Node(name.into());
        let now = Some(published.revision);
        for (n1, n2, in_force) in [
            (proxy(true, now), proxy(true, now), true),
            (proxy(true, now), proxy(false, now), false),
            (proxy(true, now), proxy(true, None), false),
            (proxy(true, now), proxy(true, Some(0)), false),
        ] {
            let known = BTreeMap::from([(node("n1"), n1), (node("n2"), n2)]);
            let got = status(&published, &known, true);
            assert_eq!((got.in_force, got.why.is_empty()), (in_force, in_force), "{:?}", got.why);
            assert_eq!(got.proxies.len(), 2);
        }
        let got = status(&published, &BTreeMap::new(), true);
        assert_eq!(got.why, ["node:n1 is not connected", "node:n2 is not connected"]);
        let route = &got.objects["HTTPRoute shop/r"].conditions[0];
        assert_eq!((route.status, route.reason.as_str()), ("False", "NoMatchingParent"));
    }

    #[test]
    fn a_policy_needs_the_agents_and_no_waypoint() {
        let published = published();
        let expected = BTreeSet::from([
            Principal::Node("n1".into()),
            Principal::Pod { namespace: "shop".into(), name: "gw-1".into() },
        ]);
        let resources = BTreeSet::from([(TYPE_AUTHORIZATION, Arc::from("shop/p"))]);
        let told = held(&published, &BTreeMap::new(), &expected, &resources).to_string();
        assert_eq!(told, "in force on 0 of 1 proxies");
    }

    #[test]
    fn a_rejection_of_what_is_published_now_is_not_in_force() {
        let published = published();
        let mut n1 = proxy(true, Some(published.revision));
        let options = mesh_core::proto::TYPE_MESH_OPTIONS;
        let version = published.set(options)["mesh"].version.clone();
        n1.nacks.insert((options, "mesh".into()), (version, "no".to_owned()));
        let known = BTreeMap::from([
            (Principal::Node("n1".into()), n1.clone()),
            (Principal::Node("n2".into()), proxy(true, Some(published.revision))),
        ]);
        let got = status(&published, &known, false);
        assert_eq!((got.in_force, got.proxies[0].nacks.len()), (false, 1));
        n1.nacks.insert((options, "mesh".into()), ("older".into(), "no".to_owned()));
        let known = BTreeMap::from([
            (Principal::Node("n1".into()), n1),
            (Principal::Node("n2".into()), proxy(true, Some(published.revision))),
        ]);
        assert!(status(&published, &known, false).in_force);
    }
}
