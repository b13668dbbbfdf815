//! Waypoints as an operator asks for them: Gateways of our waypoint classes, and the labels that bind to them.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use mesh_control::{status::object::CONTROLLER, translate::gateway::WAYPOINT_CLASSES};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    cluster::{
        Cluster,
        kinds::{self, Kind},
    },
    output::columns,
};

/// The class of the Gateways that are written here.
pub const CLASS: &str = "undermesh-waypoint";
/// Which traffic a waypoint takes.
const FOR: &str = "istio.io/waypoint-for";
/// Binds what bears it to the waypoint of that name.
const USE: &str = "istio.io/use-waypoint";
/// Puts a namespace into the mesh.
const DATAPLANE: &str = "istio.io/dataplane-mode";
/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// Kinds that can be bound.
const BOUND: &[Kind] = &[kinds::NAMESPACE, kinds::SERVICE, kinds::POD];

/// Which traffic a waypoint takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Takes {
    /// What is addressed to Services.
    #[default]
    Service,
    /// What is addressed to pods.
    Workload,
    /// Both.
    All,
    /// Nothing.
    None,
}

impl Takes {
    /// (pure) As the label has it.
    fn label(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Workload => "workload",
            Self::All => "all",
            Self::None => "none",
        }
    }
}

/// (pure) The Gateway that asks for a waypoint.
pub fn gateway(namespace: Option<&str>, name: &str, takes: Option<Takes>) -> Value {
    let listener = json!({"name": "mesh", "port": 15008, "protocol": "HBONE"});
    let mut object = json!({
        "apiVersion": kinds::GATEWAY.api_version(),
        "kind": kinds::GATEWAY.name,
        "metadata": {"name": name},
        "spec": {"gatewayClassName": CLASS, "listeners": [listener]},
    });
    if let Some(namespace) = namespace {
        object["metadata"]["namespace"] = namespace.into();
    }
    if let Some(takes) = takes {
        object["metadata"]["labels"] = json!({FOR: takes.label()});
    }
    object
}

/// A Gateway of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Waypoint {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: String,
    /// Which traffic it takes.
    pub takes: String,
    /// Its condition `Programmed`: `True`, `False`, or `Unknown`.
    pub programmed: String,
    /// Its message when it is not true.
    pub why: String,
}

impl Waypoint {
    /// (pure) What is of interest about a Gateway.
    pub fn of(gateway: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let conditions = gateway["status"]["conditions"].as_array();
        let programmed = conditions.into_iter().flatten().find(|condition| condition["type"] == "Programmed");
        let (state, why) = match programmed {
            Some(condition) if condition["observedGeneration"] != gateway["metadata"]["generation"] => {
                ("Unknown".to_owned(), "the condition Programmed is of an older generation".to_owned())
            }
            Some(condition) if condition["status"] == "True" => ("True".to_owned(), String::new()),
            Some(condition) => (text(&condition["status"]), text(&condition["message"])),
            None => ("Unknown".to_owned(), "no condition Programmed".to_owned()),
        };
        let takes = gateway["metadata"]["labels"][FOR].as_str().unwrap_or(Takes::default().label());
        Self {
            namespace: text(&gateway["metadata"]["namespace"]),
            name: text(&gateway["metadata"]["name"]),
            class: text(&gateway["spec"]["gatewayClassName"]),
            takes: takes.to_owned(),
            programmed: state,
            why,
        }
    }

    /// Traffic can pass it.
    pub fn is_programmed(&self) -> bool {
        self.programmed == "True"
    }
}

/// (pure) For people.
pub fn table(waypoints: &[Waypoint]) -> String {
    let rows = waypoints.iter().cloned();
    let rows = rows.map(|one| [one.namespace, one.name, one.class, one.takes, one.programmed, one.why]);
    columns(["NAMESPACE", "NAME", "CLASS", "TRAFFIC", "PROGRAMMED", "WHY"], rows)
}

/// Gateways of our classes, in a namespace or everywhere.
///
/// # Errors
/// What the server says.
pub async fn list(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Vec<Waypoint>> {
    let ours = classes(cluster).await?;
    let gateways = cluster.list(kinds::GATEWAY, namespace, "").await?;
    let mut found: Vec<_> = gateways.iter().map(Waypoint::of).collect();
    found.retain(|one| ours.contains(&one.class));
    Ok(found)
}

/// Names of the classes whose controller we are.
async fn classes(cluster: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    let classes = cluster.list(kinds::GATEWAY_CLASS, None, "").await?;
    let ours = classes.iter().filter(|class| class["spec"]["controllerName"] == CONTROLLER);
    Ok(ours.filter_map(|class| class["metadata"]["name"].as_str()).map(str::to_owned).collect())
}

/// What `apply` is to do.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Where.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Which traffic it takes; what is written, or services, if not said.
    pub takes: Option<Takes>,
    /// The namespace is bound to it.
    pub enroll_namespace: bool,
    /// A namespace that is bound to another waypoint is bound to this one.
    pub overwrite: bool,
    /// How long to wait until traffic can pass it; not at all when none.
    pub wait: Option<Duration>,
}

/// Writes the Gateway, waits until it is programmed, and binds the namespace then: what is bound before is refused.
///
/// # Errors
/// What stands in the way, before anything is written; what the server says; what keeps it from being programmed.
pub async fn apply(cluster: &Cluster, wish: &Wish) -> anyhow::Result<()> {
    let Wish { namespace, name, .. } = wish;
    ensure!(
        classes(cluster).await?.contains(CLASS),
        "GatewayClass {CLASS}: spec.controllerName: there is none of {CONTROLLER}: `meshctl install` writes it"
    );
    let there = cluster.get(kinds::NAMESPACE, None, namespace).await?;
    let there = there.with_context(|| format!("Namespace {namespace}: it does not exist"))?;
    if let Some(found) = cluster.get(kinds::GATEWAY, Some(namespace), name).await? {
        is_waypoint(&found)?;
    }
    let labels = &there["metadata"]["labels"];
    if wish.enroll_namespace {
        may_bind(namespace, labels, name, wish.overwrite)?;
    }
    cluster.apply(kinds::GATEWAY, &gateway(Some(namespace), name, wish.takes)).await?;
    println!("Gateway {namespace}/{name} applied");
    if let Some(limit) = wish.wait {
        programmed(cluster, namespace, name, limit).await?;
    }
    if wish.enroll_namespace && labels[USE] != name.as_str() {
        let patch = json!({"metadata": {"labels": {USE: name}}});
        cluster.merge(kinds::NAMESPACE, (None, namespace), &patch).await?;
        println!("Namespace {namespace} is bound to it ({USE}: {name})");
    }
    if labels[DATAPLANE] != "ambient" {
        println!(
            "note: namespace {namespace} is not in the mesh: kubectl label namespace {namespace} {DATAPLANE}=ambient"
        );
    }
    Ok(())
}

/// (pure) A Gateway of another class is somebody else's.
fn is_waypoint(gateway: &Value) -> anyhow::Result<()> {
    let Waypoint { namespace, name, class, .. } = Waypoint::of(gateway);
    ensure!(
        WAYPOINT_CLASSES.contains(&class.as_str()),
        "Gateway {namespace}/{name}: spec.gatewayClassName: {class:?} is not the class of a waypoint; nothing was changed"
    );
    Ok(())
}

/// (pure) Whether a namespace with these labels may be bound to this waypoint.
fn may_bind(namespace: &str, labels: &Value, name: &str, overwrite: bool) -> anyhow::Result<()> {
    match labels[USE].as_str() {
        Some(other) if other != name && !overwrite => bail!(
            "Namespace {namespace}: metadata.labels[{USE}]: it is bound to {other:?}; --overwrite binds it to {name:?}; \
             nothing was changed"
        ),
        _ => Ok(()),
    }
}

async fn programmed(cluster: &Cluster, namespace: &str, name: &str, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let mut told = String::new();
    loop {
        let found = cluster.get(kinds::GATEWAY, Some(namespace), name).await?;
        let now =
            Waypoint::of(&found.with_context(|| format!("Gateway {namespace}/{name}: it was deleted"))?);
        if now.is_programmed() {
            println!("Gateway {namespace}/{name} is programmed");
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "Gateway {namespace}/{name}: not programmed within {} seconds: {}",
            limit.as_secs(),
            now.why
        );
        if told != now.why {
            println!("Gateway {namespace}/{name}: {}", now.why);
            told = now.why;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Deletes waypoints and says what is still bound to them; `names` empty means all of the namespace.
///
/// # Errors
/// One that does not exist or is none, before any is deleted; what the server says.
pub async fn delete(cluster: &Cluster, namespace: &str, names: &[String]) -> anyhow::Result<()> {
    let mut doomed = BTreeSet::new();
    for name in names {
        let found = cluster.get(kinds::GATEWAY, Some(namespace), name).await?;
        is_waypoint(&found.with_context(|| format!("Gateway {namespace}/{name}: it does not exist"))?)?;
        doomed.insert(name.clone());
    }
    if names.is_empty() {
        let all = list(cluster, Some(namespace)).await?.into_iter();
        doomed.extend(all.filter(|one| WAYPOINT_CLASSES.contains(&one.class.as_str())).map(|one| one.name));
    }
    for name in &doomed {
        cluster.delete(kinds::GATEWAY, Some(namespace), name).await?;
        println!("Gateway {namespace}/{name} deleted");
        for kind in BOUND {
            for object in cluster.list(*kind, None, &format!("{USE}={name}")).await? {
                if let Some(object) = bound(*kind, &object, namespace) {
                    println!(
                        "note: {object} is still bound to it ({USE}: {name}): what it binds is refused now"
                    );
                }
            }
        }
    }
    if doomed.is_empty() {
        println!("namespace {namespace} has no waypoint");
    }
    Ok(())
}

/// (pure) The name of an object, whose label names a waypoint, if that is one of `namespace`.
fn bound(kind: Kind, object: &Value, namespace: &str) -> Option<String> {
    let metadata = &object["metadata"];
    let (own, name) = (metadata["namespace"].as_str(), metadata["name"].as_str()?);
    let of = metadata["labels"]["istio.io/use-waypoint-namespace"].as_str();
    (of.or(own).unwrap_or(name) == namespace).then(|| match own {
        Some(own) => format!("{} {own}/{name}", kind.name),
        None => format!("{} {name}", kind.name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_is_what_the_control_plane_takes_for_a_waypoint() {
        let object = gateway(Some("shop"), "w", Some(Takes::All));
        let yaml = serde_json::to_string(&object).unwrap();
        let files = [("w.yaml".to_owned(), yaml)].into();
        let problems = mesh_control::analyze(&files, &Default::default());
        let problems: Vec<_> = problems.iter().filter(|problem| problem.field.starts_with("spec")).collect();
        assert!(problems.is_empty(), "{problems:?}");
        let one = Waypoint::of(&object);
        assert_eq!((one.class.as_str(), one.takes.as_str(), one.is_programmed()), (CLASS, "all", false));
        assert!(WAYPOINT_CLASSES.contains(&CLASS));
    }

    #[test]
    fn a_condition_counts_for_its_generation() {
        let check = |condition: Value, programmed: &str, why: &str| {
            let mut gateway = gateway(Some("n"), "g", None);
            gateway["metadata"]["generation"] = 2.into();
            gateway["status"]["conditions"] = json!([condition]);
            let found = Waypoint::of(&gateway);
            assert_eq!((found.programmed.as_str(), found.why.as_str()), (programmed, why));
        };
        let of = |status: &str, generation: u32| json!({"type": "Programmed", "status": status, "message": "m", "observedGeneration": generation});
        check(of("True", 2), "True", "");
        check(of("False", 2), "False", "m");
        check(of("True", 1), "Unknown", "the condition Programmed is of an older generation");
        check(json!({"type": "Accepted", "status": "True"}), "Unknown", "no condition Programmed");
    }

    #[test]
    fn what_is_somebody_else_s_is_left_alone() {
        let mut other = gateway(Some("shop"), "w", None);
        is_waypoint(&other).unwrap();
        other["spec"]["gatewayClassName"] = "nginx".into();
        let error = is_waypoint(&other).unwrap_err().to_string();
        assert!(error.starts_with("Gateway shop/w: spec.gatewayClassName: \"nginx\""), "{error}");
        let labels = json!({USE: "other"});
        may_bind("shop", &labels, "other", false).unwrap();
        may_bind("shop", &labels, "w", true).unwrap();
        may_bind("shop", &Value::Null, "w", false).unwrap();
        assert!(may_bind("shop", &labels, "w", false).is_err());
    }

    #[test]
    fn only_what_names_this_waypoint_is_bound_to_it() {
        let object = |metadata: Value| json!({ "metadata": metadata });
        let check = |kind, metadata, expected: Option<&str>| {
            assert_eq!(bound(kind, &object(metadata), "shop").as_deref(), expected);
        };
        check(kinds::NAMESPACE, json!({"name": "shop"}), Some("Namespace shop"));
        check(kinds::NAMESPACE, json!({"name": "other"}), None);
        check(kinds::SERVICE, json!({"name": "s", "namespace": "shop"}), Some("Service shop/s"));
        let elsewhere = json!({"istio.io/use-waypoint-namespace": "shop"});
        check(
            kinds::POD,
            json!({"name": "p", "namespace": "other", "labels": elsewhere}),
            Some("Pod other/p"),
        );
        let elsewhere = json!({"istio.io/use-waypoint-namespace": "other"});
        check(kinds::POD, json!({"name": "p", "namespace": "shop", "labels": elsewhere}), None);
    }
}
