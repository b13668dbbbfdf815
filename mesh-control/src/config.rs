//! Flags of `mesh-control`, each also by environment.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use clap::{Parser, ValueEnum};
use k8s_openapi::api::core::v1::LocalObjectReference;
use mesh_core::limits::CERTIFICATE_TTL;
use mesh_net::telemetry::LogFormat;

use crate::translate::Mesh;

/// Where objects come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceKind {
    /// The API server of the cluster that this runs in, or of KUBECONFIG.
    Kubernetes,
}

/// The control plane of Undermesh: configuration, certificates and status from the Kubernetes API or from a directory
/// of Kubernetes YAML.
#[derive(Clone, Debug, Parser)]
#[command(name = "mesh-control", version)]
pub struct Settings {
    /// Where objects come from, instead of a directory.
    #[arg(long, env = "UNDERMESH_SOURCE", conflicts_with_all = ["source_dir", "ca_dir", "credentials"])]
    pub source: Option<SourceKind>,
    /// Directory of YAML (or JSON) that says what the mesh is; watched.
    #[arg(long, env = "UNDERMESH_SOURCE_DIR", required_unless_present = "source")]
    pub source_dir: Option<PathBuf>,
    /// Where discovery and certificates are served.
    #[arg(long, env = "UNDERMESH_LISTEN", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Directory of the root key and certificate; made when neither is there.
    #[arg(long, env = "UNDERMESH_CA_DIR", required_unless_present = "source")]
    pub ca_dir: Option<PathBuf>,
    /// Directory of the callers' tokens: one file of mode 0600 per caller, `node-<node>` or `pod-<namespace>.<pod>`.
    #[arg(long, env = "UNDERMESH_CREDENTIALS", required_unless_present = "source")]
    pub credentials: Option<PathBuf>,
    /// Name of this pod, on Kubernetes.
    #[arg(long, env = "POD_NAME", required_if_eq("source", "kubernetes"))]
    pub pod_name: Option<String>,
    /// Namespace of this pod, on Kubernetes: where the mesh is installed.
    #[arg(long, env = "POD_NAMESPACE", required_if_eq("source", "kubernetes"))]
    pub pod_namespace: Option<String>,
    /// Where `GET /healthz/ready` is answered over TCP.
    #[arg(long, env = "UNDERMESH_READY_LISTEN")]
    pub ready_listen: Option<SocketAddr>,
    /// Where `GET /metrics` is answered over TCP.
    #[arg(long, env = "UNDERMESH_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// Image of the waypoints that are made for Gateways, on Kubernetes; without one none are made.
    #[arg(long, env = "UNDERMESH_WAYPOINT_IMAGE")]
    pub waypoint_image: Option<String>,
    /// When a node asks the registry for that image: IfNotPresent, Always or Never.
    #[arg(long, env = "UNDERMESH_WAYPOINT_PULL_POLICY", default_value = "IfNotPresent", value_parser = PULL_POLICIES)]
    pub waypoint_pull_policy: String,
    /// With what: Secrets of the waypoint's own namespace, as imagePullSecrets of a pod in JSON.
    #[arg(long, env = "UNDERMESH_WAYPOINT_PULL_SECRETS", default_value = "[]", value_parser = PullSecrets::parse)]
    pub waypoint_pull_secrets: PullSecrets,
    /// Unix socket of the local endpoint.
    #[arg(long, env = "UNDERMESH_ADMIN")]
    pub admin: PathBuf,
    /// Trust domain of every identity.
    #[arg(long, env = "UNDERMESH_TRUST_DOMAIN", default_value = "cluster.local", value_parser = trust_domain)]
    pub trust_domain: String,
    /// Namespace whose policies hold for the whole mesh; by default that of the installation, or undermesh-system.
    #[arg(long, env = "UNDERMESH_ROOT_NAMESPACE")]
    pub root_namespace: Option<String>,
    /// Name of the cluster.
    #[arg(long, env = "UNDERMESH_CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// More names or addresses for the server's own certificate; repeatable.
    #[arg(long = "serving-name", env = "UNDERMESH_SERVING_NAMES", value_delimiter = ',')]
    pub serving_names: Vec<String>,
    /// Longest lifetime of a workload certificate, such as 24h or 30s.
    #[arg(long, env = "UNDERMESH_MAX_CERTIFICATE_TTL", default_value = "24h", value_parser = certificate_ttl)]
    pub max_certificate_ttl: Duration,
    /// How log lines look.
    #[arg(long, env = "UNDERMESH_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged: a level, or a level per target.
    #[arg(long, env = "UNDERMESH_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

/// `mesh-control ask`: prints the answer of the local endpoint.
#[derive(Clone, Debug, Parser)]
#[command(name = "mesh-control ask")]
pub struct Ask {
    /// Path that is asked for, such as /status.
    pub path: String,
    /// Unix socket of the local endpoint.
    #[arg(long, env = "UNDERMESH_ADMIN")]
    pub admin: PathBuf,
}

/// Workloads must not live longer on one certificate than a day (`reliability.md` R9).
fn certificate_ttl(text: &str) -> Result<Duration, String> {
    let ttl = crate::translate::route::parse_duration(text).filter(|ttl| *ttl >= Duration::from_secs(1));
    ttl.filter(|ttl| *ttl <= CERTIFICATE_TTL)
        .ok_or_else(|| "must be a duration between 1s and 24h".to_owned())
}

const PULL_POLICIES: [&str; 3] = ["IfNotPresent", "Always", "Never"];

/// `imagePullSecrets` of a pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PullSecrets(pub Vec<LocalObjectReference>);

impl PullSecrets {
    fn parse(json: &str) -> Result<Self, String> {
        serde_json::from_str(json).map(Self).map_err(|error| format!("must be [{{\"name\": …}}, …]: {error}"))
    }
}

fn trust_domain(text: &str) -> Result<String, String> {
    let probe = format!("spiffe://{text}/ns/a/sa/b");
    match mesh_core::id::Identity::parse(&probe) {
        Ok(identity) if &*identity.trust_domain == text => Ok(text.to_owned()),
        _ => {
            Err("must be a SPIFFE trust domain: lower-case letters, digits, dots, dashes, underscores"
                .to_owned())
        }
    }
}

impl Settings {
    /// What is the same for all waypoints that are made for Gateways.
    pub fn provisioning(&self) -> Option<crate::provision::Settings> {
        let (image, namespace) = (self.waypoint_image.clone()?, self.pod_namespace.as_deref()?);
        let control_name = format!("undermesh-control.{namespace}.svc");
        Some(crate::provision::Settings {
            image,
            control: format!("{control_name}:{}", self.listen.port()),
            control_name,
            trust_domain: self.trust_domain.clone(),
            cluster: self.cluster_id.clone(),
            pull_policy: self.waypoint_pull_policy.clone(),
            pull_secrets: self.waypoint_pull_secrets.0.clone(),
            log_format: self.log_format,
            log_level: self.log_level.clone(),
        })
    }

    /// What is the same for the whole mesh.
    pub fn mesh(&self) -> Mesh {
        let fallback = Mesh::default();
        // A directory is no installation: nothing in it is ours.
        let install_namespace: Arc<str> = match &self.pod_namespace {
            Some(namespace) if self.source.is_some() => namespace.as_str().into(),
            _ => "".into(),
        };
        let root_namespace = match &self.root_namespace {
            Some(namespace) => namespace.as_str().into(),
            None if !install_namespace.is_empty() => install_namespace.clone(),
            None => fallback.root_namespace.clone(),
        };
        Mesh {
            trust_domain: self.trust_domain.as_str().into(),
            root_namespace,
            install_namespace,
            cluster: self.cluster_id.as_str().into(),
            needs_classes: self.source.is_some(),
            ..fallback
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(more: &[&str]) -> Result<Settings, String> {
        let base =
            ["mesh-control", "--source-dir", "s", "--ca-dir", "c", "--credentials", "k", "--admin", "a"];
        Settings::try_parse_from(base.iter().chain(more)).map_err(|error| error.to_string())
    }

    #[test]
    fn kubernetes_takes_the_place_of_the_directories() {
        let parse = |args: &[&str]| {
            let base = ["mesh-control", "--admin", "a", "--source", "kubernetes"];
            Settings::try_parse_from(base.iter().chain(args)).map(|settings| settings.mesh())
        };
        let pod = ["--pod-name", "p", "--pod-namespace", "mesh"];
        let mesh = parse(&pod).unwrap();
        assert_eq!((&*mesh.root_namespace, &*mesh.install_namespace), ("mesh", "mesh"));
        assert!(mesh.needs_classes);
        let mesh = parse(&[&pod[..], &["--root-namespace", "root"]].concat()).unwrap();
        assert_eq!((&*mesh.root_namespace, &*mesh.install_namespace), ("root", "mesh"));
        assert!(parse(&pod[..2]).is_err());
        assert!(parse(&[&pod[..], &["--source-dir", "d"]].concat()).is_err());
        assert!(Settings::try_parse_from(["mesh-control", "--admin", "a"]).is_err());
    }

    #[test]
    fn flags_are_checked_once() {
        let settings = parsed(&[]).unwrap();
        assert_eq!(settings.max_certificate_ttl, CERTIFICATE_TTL);
        assert_eq!(settings.mesh(), Mesh { install_namespace: "".into(), ..Mesh::default() });
        assert_eq!(parsed(&["--max-certificate-ttl", "30s"]).unwrap().max_certificate_ttl.as_secs(), 30);
        for bad in [
            ["--max-certificate-ttl", "25h"],
            ["--max-certificate-ttl", "0s"],
            ["--max-certificate-ttl", "10"],
            ["--trust-domain", "A b"],
            ["--trust-domain", "a/b"],
            ["--trust-domain", ""],
            ["--listen", "localhost"],
        ] {
            assert!(parsed(&bad).is_err(), "{bad:?}");
        }
    }
}
