//! Puts the mesh into a cluster: look first, then definitions, rights, control plane, agents, each when the former is
//! ready. Every step may be repeated.

pub mod check;
pub mod crds;
pub mod facts;
pub mod progress;
pub mod record;
pub mod status;
pub mod uninstall;
pub mod wait;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use mesh_control::status::object::CONTROLLER;
use serde_json::Value;

use crate::{
    chart::{self, Profile, VERSION, values::Values},
    cluster::{
        Cluster,
        kinds::{self, Kind},
    },
};
use check::{Finding, Severity, Wish};
use facts::Facts;
use record::{ObjectId, Record};

/// Between two looks at what the server makes of definitions.
const LOOK: Duration = Duration::from_millis(250);

/// What is to be installed.
#[derive(Debug)]
pub struct Plan {
    /// Where.
    pub namespace: String,
    /// The profile.
    pub profile: Profile,
    /// What was set above it.
    pub layer: Value,
    /// All values.
    pub values: Values,
    /// Go on in spite of errors of the checks.
    pub force: bool,
    /// How long all of it may take.
    pub timeout: Duration,
}

impl Plan {
    /// (pure) The objects, in the order in which they are needed.
    ///
    /// # Errors
    /// A value that makes no object.
    pub fn objects(&self) -> anyhow::Result<Vec<Value>> {
        chart::objects(&self.values, &self.namespace)
    }

    /// (pure) What is to be remembered of it.
    fn record(&self, objects: &[Value]) -> Record {
        let profile = clap::ValueEnum::to_possible_value(&self.profile);
        Record {
            version: VERSION.to_owned(),
            profile: profile.map(|value| value.get_name().to_owned()).unwrap_or_default(),
            values: self.layer.clone(),
            objects: objects.iter().map(ObjectId::of).collect(),
            ..Record::default()
        }
    }

    fn wish(&self) -> Wish<'_> {
        Wish {
            namespace: &self.namespace,
            version: VERSION,
            istio_classes: self.values.gateway_classes.istio,
            controller: CONTROLLER,
        }
    }

    /// Leaves Istio's classes to an istiod that is there, unless the user wrote otherwise.
    fn yield_to_istio(&mut self, facts: &Facts) {
        let asked = !self.layer["gatewayClasses"]["istio"].is_null();
        let istiod = facts.others.iter().any(|other| matches!(other, facts::Other::Istiod { .. }));
        if istiod && !asked && self.values.gateway_classes.istio {
            println!("istiod is there: the GatewayClasses istio and istio-waypoint are left to it");
            self.values.gateway_classes.istio = false;
        }
    }
}

/// Looks at the cluster and says what stands in the way.
///
/// # Errors
/// When the server does not answer.
pub async fn examine(cluster: &Cluster, plan: &mut Plan) -> anyhow::Result<(Facts, Vec<Finding>)> {
    let facts = facts::gather(cluster, &plan.objects()?).await?;
    plan.yield_to_istio(&facts);
    let findings = check::findings(&facts, plan.wish());
    Ok((facts, findings))
}

/// Installs, or makes an installation be as planned.
///
/// # Errors
/// What stands in the way or failed, and what to do about it.
pub async fn run(cluster: &Cluster, mut plan: Plan, former: Option<Record>) -> anyhow::Result<()> {
    let deadline = Instant::now() + plan.timeout;
    let (facts, findings) = examine(cluster, &mut plan).await?;
    for finding in &findings {
        println!("{finding}");
    }
    if findings.iter().any(|finding| finding.severity == Severity::Error) {
        if !plan.force {
            bail!("nothing was changed: see the errors above");
        }
        println!("going on, as --force says");
    }
    write_definitions(cluster, &facts.definitions.write, deadline).await?;

    let objects = plan.objects()?;
    let mut record = plan.record(&objects);
    match &former {
        Some(former) => {
            record.namespace_was_there = former.namespace_was_there;
            record.namespace_labels.clone_from(&former.namespace_labels);
        }
        None => before(cluster, &plan.namespace, &objects, &mut record).await?,
    }
    let (agents, others): (Vec<&Value>, Vec<&Value>) =
        objects.iter().partition(|object| object["kind"] == "DaemonSet");
    println!("writing {} objects", objects.len());
    let mut written = BTreeSet::new();
    for (number, object) in others.iter().enumerate() {
        apply(cluster, object).await?;
        written.insert(ObjectId::of(object));
        // Once there is a namespace to write into: from here on an interrupted installation can be found and removed.
        if number == 0 {
            let mut both = record.clone();
            both.objects.extend(former.iter().flat_map(|former| former.objects.iter().cloned()));
            apply(cluster, &both.object(&plan.namespace)?).await?;
        }
    }
    wait::ready(cluster, &plan.namespace, wait::CONTROL, deadline).await?;
    // Agents follow the control plane: a newer one understands older agents, not the other way round.
    for object in &agents {
        apply(cluster, object).await?;
        written.insert(ObjectId::of(object));
    }
    wait::ready(cluster, &plan.namespace, wait::NODE, deadline).await?;
    for obsolete in former.iter().flat_map(|former| former.obsolete(&written)) {
        println!("removing {obsolete}");
        remove(cluster, &obsolete).await?;
    }
    apply(cluster, &record.object(&plan.namespace)?).await?;
    println!(
        "Undermesh {VERSION} is installed in {}. Next:\n  kubectl label namespace NAMESPACE \
         istio.io/dataplane-mode=ambient",
        plan.namespace
    );
    Ok(())
}

/// Remembers how a namespace was that is there and that no installation has made.
async fn before(
    cluster: &Cluster,
    namespace: &str,
    objects: &[Value],
    record: &mut Record,
) -> anyhow::Result<()> {
    let found = cluster.get(kinds::NAMESPACE, None, namespace).await?;
    let of_others = |found: &Value| found["metadata"]["labels"][crds::PART_OF.0] != crds::PART_OF.1;
    if let Some(found) = found.filter(of_others) {
        record.namespace_was_there = true;
        let ours = objects.iter().find(|object| object["kind"] == "Namespace");
        record.namespace_labels = ours.map(|ours| record::overwritten(&found, ours)).unwrap_or_default();
    }
    Ok(())
}

/// Writes definitions and waits until the server serves them.
async fn write_definitions(
    cluster: &Cluster,
    definitions: &[Value],
    deadline: Instant,
) -> anyhow::Result<()> {
    println!("writing {} definitions of kinds", definitions.len());
    for definition in definitions {
        apply(cluster, &crds::labelled(definition.clone())).await?;
    }
    for definition in definitions {
        let name = definition["metadata"]["name"].as_str().unwrap_or_default();
        while !served(cluster, name).await? {
            if Instant::now() >= deadline {
                bail!("the API server does not serve {name}: kubectl describe crd {name}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
    Ok(())
}

async fn served(cluster: &Cluster, name: &str) -> anyhow::Result<bool> {
    let found = cluster.get(kinds::CUSTOM_RESOURCE, None, name).await?.unwrap_or_default();
    let conditions = found["status"]["conditions"].as_array();
    Ok(conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Established" && condition["status"] == "True"))
}

/// Applies one object.
///
/// # Errors
/// What the server says, with the object.
pub async fn apply(cluster: &Cluster, object: &Value) -> anyhow::Result<()> {
    let id = ObjectId::of(object);
    let kind = Kind::of(object).with_context(|| format!("{id}: a kind that is not known here"))?;
    cluster.apply(kind, object).await.with_context(|| format!("write {id}"))
}

/// Removes one object; it may be gone already.
///
/// # Errors
/// What the server says, with the object.
pub async fn remove(cluster: &Cluster, id: &ObjectId) -> anyhow::Result<bool> {
    let Some(kind) = id.kind() else { bail!("{id}: a kind that is not known here: remove it by hand") };
    cluster.delete(kind, id.namespace.as_deref(), &id.name).await.with_context(|| format!("remove {id}"))
}
