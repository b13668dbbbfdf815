//! What is asked of a cluster before anything is written.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Value, json};

use super::crds::{self, Decision, PART_OF};
use crate::cluster::{
    Cluster,
    kinds::{self, Kind},
};

/// Facts about a cluster.
#[derive(Debug)]
pub struct Facts {
    /// Version of Kubernetes.
    pub kubernetes: String,
    /// Nodes.
    pub nodes: Vec<NodeFact>,
    /// What the user may not do and needs to, as `verb resources`.
    pub denied: Vec<String>,
    /// Installations: namespace and version.
    pub installed: Vec<(String, String)>,
    /// Other meshes, and a container network that is in the way.
    pub others: Vec<Other>,
    /// GatewayClasses with their controllers.
    pub classes: BTreeMap<String, String>,
    /// What to write of the definitions.
    pub definitions: Decision,
}

/// A node.
#[derive(Clone, Debug)]
pub struct NodeFact {
    /// Its name.
    pub name: String,
    /// Version of its kernel.
    pub kernel: String,
    /// Its operating system.
    pub os: String,
    /// Its container runtime with version.
    pub runtime: String,
    /// The kubelet says that it is ready.
    pub ready: bool,
}

/// Something that takes over connections as well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Other {
    /// Istio's control plane.
    Istiod {
        /// Where.
        namespace: String,
    },
    /// Istio's ambient mode.
    Ztunnel {
        /// Where.
        namespace: String,
    },
    /// Linkerd.
    Linkerd {
        /// Where.
        namespace: String,
    },
    /// Kmesh.
    Kmesh {
        /// Where.
        namespace: String,
    },
    /// Cilium as container network.
    Cilium {
        /// It translates service addresses in pods' sockets.
        socket_lb: bool,
        /// It removes configurations that are not its own.
        exclusive: bool,
    },
}

/// Asks all of it.
///
/// # Errors
/// When the server does not answer, or lets nothing be read.
pub async fn gather(cluster: &Cluster, objects: &[Value]) -> anyhow::Result<Facts> {
    let kubernetes = cluster.version().await.context("reach the API server")?;
    let nodes = cluster.list(kinds::NODE, None, "").await.context("list nodes")?;
    let definitions =
        cluster.list(kinds::CUSTOM_RESOURCE, None, "").await.context("list definitions of kinds")?;
    let definitions = crds::decide(&crds::bundled()?, &definitions);
    let classes = cluster.list(kinds::GATEWAY_CLASS, None, "").await.context("list GatewayClasses")?;
    let class = |class: &Value| Some((name(class)?, class["spec"]["controllerName"].as_str()?.to_owned()));
    Ok(Facts {
        kubernetes,
        nodes: nodes.iter().filter_map(node).collect(),
        denied: denied(cluster, objects).await?,
        installed: installed(cluster).await?,
        others: others(cluster).await?,
        classes: classes.iter().filter_map(class).collect(),
        definitions,
    })
}

/// (pure) What is of interest about a node.
pub fn node(node: &Value) -> Option<NodeFact> {
    let info = &node["status"]["nodeInfo"];
    let text = |field: &str| info[field].as_str().unwrap_or_default().to_owned();
    let ready = node["status"]["conditions"].as_array().is_some_and(|conditions| {
        conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    });
    Some(NodeFact {
        name: name(node)?,
        kernel: text("kernelVersion"),
        os: text("operatingSystem"),
        runtime: text("containerRuntimeVersion"),
        ready,
    })
}

/// Installations of ours, told by their control planes.
///
/// # Errors
/// What the server says.
pub async fn installed(cluster: &Cluster) -> anyhow::Result<Vec<(String, String)>> {
    let ours = format!("{}={},app.kubernetes.io/name=undermesh-control", PART_OF.0, PART_OF.1);
    let found = cluster.list(kinds::DEPLOYMENT, None, &ours).await.context("list Deployments")?;
    let one = |deployment: &Value| {
        let version =
            deployment["metadata"]["labels"]["app.kubernetes.io/version"].as_str().unwrap_or("unknown");
        Some((deployment["metadata"]["namespace"].as_str()?.to_owned(), version.to_owned()))
    };
    Ok(found.iter().filter_map(one).collect())
}

async fn others(cluster: &Cluster) -> anyhow::Result<Vec<Other>> {
    let mut others = Vec::new();
    let namespace = |object: &Value| object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    for deployment in cluster.list(kinds::DEPLOYMENT, None, "app=istiod").await? {
        others.push(Other::Istiod { namespace: namespace(&deployment) });
    }
    let linkerd = "linkerd.io/control-plane-component=destination";
    for deployment in cluster.list(kinds::DEPLOYMENT, None, linkerd).await? {
        others.push(Other::Linkerd { namespace: namespace(&deployment) });
    }
    for set in cluster.list(kinds::DAEMON_SET, None, "").await? {
        match name(&set).as_deref() {
            Some("ztunnel") => others.push(Other::Ztunnel { namespace: namespace(&set) }),
            Some("kmesh") => others.push(Other::Kmesh { namespace: namespace(&set) }),
            Some("cilium") => {
                let namespace = namespace(&set);
                let config = cluster.get(kinds::CONFIG_MAP, Some(&namespace), "cilium-config").await?;
                others.push(cilium(&config.unwrap_or_default()["data"]));
            }
            _ => {}
        }
    }
    Ok(others)
}

/// (pure) Cilium's settings that matter, with its defaults.
fn cilium(data: &Value) -> Other {
    let is = |key: &str, default: bool| match data[key].as_str() {
        Some(text) => text == "true",
        None => default,
    };
    let replaces = is("kube-proxy-replacement", false) || data["kube-proxy-replacement"] == "strict";
    let in_pods = !is("bpf-lb-sock-hostns-only", false);
    Other::Cilium {
        socket_lb: (replaces || is("bpf-lb-sock", false)) && in_pods,
        exclusive: is("cni-exclusive", true),
    }
}

/// Which of the rights are missing that an installation needs.
async fn denied(cluster: &Cluster, objects: &[Value]) -> anyhow::Result<Vec<String>> {
    let mut denied = Vec::new();
    for (verb, kind, namespace) in needed(objects) {
        let attributes = json!({
            "verb": verb, "group": kind.group, "resource": kind.plural,
            "namespace": namespace.clone().unwrap_or_default(),
        });
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {},
            "spec": {"resourceAttributes": attributes},
        });
        let answer = cluster.create(kinds::ACCESS_REVIEW, &review).await.context("ask for rights")?;
        if answer["status"]["allowed"] != true {
            let place = namespace.map(|namespace| format!(" in {namespace}")).unwrap_or_default();
            denied.push(format!("{verb} {}{place}", kind.plural));
        }
    }
    Ok(denied)
}

/// (pure) Verb, kind and namespace of everything that an installation writes.
fn needed(objects: &[Value]) -> BTreeSet<(&'static str, Kind, Option<String>)> {
    let mut needed = BTreeSet::new();
    let kinds = objects.iter().filter_map(|object| {
        let namespace = object["metadata"]["namespace"].as_str().map(str::to_owned);
        Some((Kind::of(object)?, namespace))
    });
    for (kind, namespace) in kinds.chain([(kinds::CUSTOM_RESOURCE, None)]) {
        // Server-side apply is a patch; what is not there yet needs create as well.
        for verb in ["create", "patch"] {
            needed.insert((verb, kind, namespace.clone()));
        }
    }
    needed
}

fn name(object: &Value) -> Option<String> {
    object["metadata"]["name"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ciliums_settings() {
        let check = |data: Value, socket_lb: bool, exclusive: bool| {
            assert_eq!(cilium(&data), Other::Cilium { socket_lb, exclusive }, "{data}");
        };
        check(json!({}), false, true);
        check(json!({"kube-proxy-replacement": "true"}), true, true);
        check(json!({"kube-proxy-replacement": "true", "bpf-lb-sock-hostns-only": "true"}), false, true);
        check(json!({"bpf-lb-sock": "true", "cni-exclusive": "false"}), true, false);
    }

    #[test]
    fn rights_are_asked_once_per_kind_and_place() {
        let account = |namespace: &str| json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"namespace": namespace}});
        let all = needed(&[account("a"), account("a"), account("b")]);
        let all: Vec<String> =
            all.iter().map(|(verb, kind, place)| format!("{verb} {} {place:?}", kind.plural)).collect();
        assert_eq!(all.len(), 6, "{all:?}");
        assert!(all.contains(&"patch serviceaccounts Some(\"b\")".to_owned()));
    }
}
