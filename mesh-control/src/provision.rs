//! Waypoints for Gateways: a Deployment, Service, ServiceAccount and PodDisruptionBudget each.
//!
//! What they look like is decided here, pure; the leader applies them (server-side, so that what a user adds, such as
//! `replicas`, stays). They belong to their Gateway: Kubernetes removes them with it.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            LocalObjectReference, PodTemplateSpec, Service, ServiceAccount, ServicePort, ServiceSpec,
        },
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};

use mesh_net::telemetry::LogFormat;

use crate::{
    source::ObjectKey,
    translate::{Labels, gateway::WaypointFacts, workload::GATEWAY_NAME},
};

pub mod apply;
mod pod;

/// Port of readiness.
pub const READY_PORT: i32 = 15021;
/// Port of metrics.
pub const METRICS_PORT: i32 = 15020;
/// ConfigMap with the roots that the control plane's certificate chains to.
pub const ROOTS: &str = "undermesh-ca-root";
/// `app.kubernetes.io/managed-by` of everything that is made for a Gateway.
pub const MANAGER: &str = "undermesh.io-gateway-controller";
/// The longest name that a Service and a pod's label can have, bytes.
const MAX_NAME_BYTES: usize = 63;

/// What is the same for all waypoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Image of `mesh-waypoint`.
    pub image: String,
    /// `host:port` of discovery and certificates.
    pub control: String,
    /// Name in the control plane's certificate.
    pub control_name: String,
    /// Trust domain of every identity.
    pub trust_domain: String,
    /// Name of the cluster.
    pub cluster: String,
    /// `imagePullPolicy`.
    pub pull_policy: String,
    /// `imagePullSecrets`, Secrets of the Gateway's namespace.
    pub pull_secrets: Vec<LocalObjectReference>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_level: String,
}

/// Everything that is made for one Gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Provisioned {
    /// Its identity.
    pub account: ServiceAccount,
    /// Its address.
    pub service: Service,
    /// Its pods.
    pub deployment: Deployment,
    /// How many of them a drain of nodes may take at once.
    pub budget: PodDisruptionBudget,
}

/// Why nothing can be made for a Gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Services and labels are named after it.
    #[error(
        "the name of a waypoint Gateway is that of its Service: at most 63 of a-z, 0-9 and -, the first one a letter"
    )]
    Name,
    /// The source gives it no UID: nothing could belong to it.
    #[error("the Gateway has no uid")]
    Uid,
}

/// What is to be made for the waypoint Gateway `key`.
///
/// # Errors
/// [`Unfit`].
pub fn provision(key: &ObjectKey, facts: &WaypointFacts, settings: &Settings) -> Result<Provisioned, Unfit> {
    fit(&key.name)?;
    if facts.uid.is_empty() {
        return Err(Unfit::Uid);
    }
    let meta = || ObjectMeta {
        name: Some(key.name.to_string()),
        namespace: Some(key.namespace.to_string()),
        labels: Some(labels(key, facts)),
        annotations: Some(facts.annotations.clone()).filter(|annotations| !annotations.is_empty()),
        owner_references: Some(vec![OwnerReference {
            api_version: "gateway.networking.k8s.io/v1".to_owned(),
            kind: "Gateway".to_owned(),
            name: key.name.to_string(),
            uid: facts.uid.to_string(),
            controller: Some(true),
            block_owner_deletion: None,
        }]),
        ..ObjectMeta::default()
    };
    let selector = Labels::from([(GATEWAY_NAME.to_owned(), key.name.to_string())]);
    let selected = || LabelSelector { match_labels: Some(selector.clone()), ..LabelSelector::default() };
    Ok(Provisioned {
        account: ServiceAccount { metadata: meta(), ..ServiceAccount::default() },
        service: Service { metadata: meta(), spec: Some(service(facts, selector.clone())), status: None },
        deployment: Deployment {
            metadata: meta(),
            spec: Some(DeploymentSpec {
                selector: selected(),
                // A new waypoint takes over before an old one drains.
                strategy: Some(DeploymentStrategy {
                    type_: Some("RollingUpdate".to_owned()),
                    rolling_update: Some(RollingUpdateDeployment {
                        max_surge: Some(IntOrString::Int(1)),
                        max_unavailable: Some(IntOrString::Int(0)),
                    }),
                }),
                template: PodTemplateSpec {
                    metadata: Some(ObjectMeta {
                        labels: Some(labels(key, facts)),
                        annotations: Some(pod_annotations(facts)),
                        ..ObjectMeta::default()
                    }),
                    spec: Some(pod::spec(key, facts, settings, selected())),
                },
                ..DeploymentSpec::default()
            }),
            status: None,
        },
        budget: PodDisruptionBudget {
            metadata: meta(),
            // Not `minAvailable`: one replica must not block the drain of its node for ever.
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(1)),
                selector: Some(selected()),
                ..PodDisruptionBudgetSpec::default()
            }),
            status: None,
        },
    })
}

/// Whether a Service and a label can be called so.
///
/// # Errors
/// [`Unfit::Name`].
pub fn fit(name: &str) -> Result<(), Unfit> {
    let sound = name.len() <= MAX_NAME_BYTES
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if sound { Ok(()) } else { Err(Unfit::Name) }
}

/// The Gateway's own labels for them, then ours, which nobody changes.
fn labels(key: &ObjectKey, facts: &WaypointFacts) -> Labels {
    let mut labels = facts.labels.clone();
    for (name, value) in [
        (GATEWAY_NAME, &*key.name),
        ("gateway.networking.k8s.io/gateway-class-name", &*facts.class),
        // It terminates tunnels itself.
        (crate::translate::workload::DATAPLANE_MODE, "none"),
        // By these two they are found at uninstallation.
        ("app.kubernetes.io/part-of", "undermesh"),
        ("app.kubernetes.io/managed-by", MANAGER),
        ("app.kubernetes.io/component", "waypoint"),
    ] {
        labels.insert(name.to_owned(), value.to_owned());
    }
    labels
}

fn pod_annotations(facts: &WaypointFacts) -> BTreeMap<String, String> {
    let mut annotations = facts.annotations.clone();
    for (name, value) in [("prometheus.io/scrape", "true"), ("prometheus.io/port", "15020")] {
        annotations.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    annotations
}

fn service(facts: &WaypointFacts, selector: Labels) -> ServiceSpec {
    let port = |name: &str, number: i32| ServicePort {
        name: Some(name.to_owned()),
        port: number,
        protocol: Some("TCP".to_owned()),
        target_port: Some(IntOrString::Int(number)),
        ..ServicePort::default()
    };
    ServiceSpec {
        type_: Some("ClusterIP".to_owned()),
        ip_family_policy: Some("PreferDualStack".to_owned()),
        selector: Some(selector),
        ports: Some(vec![port("status-port", READY_PORT), port("mesh", i32::from(facts.port))]),
        ..ServiceSpec::default()
    }
}

#[cfg(test)]
mod tests;
