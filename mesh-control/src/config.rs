//! Flags of `mesh-control`, each also by environment.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Parser;
use mesh_core::limits::CERTIFICATE_TTL;
use mesh_net::telemetry::LogFormat;

use crate::translate::Mesh;

/// The control plane of Undermesh: configuration, certificates and status from a directory of Kubernetes YAML.
#[derive(Clone, Debug, Parser)]
#[command(name = "mesh-control", version)]
pub struct Settings {
    /// Directory of YAML (or JSON) that says what the mesh is; watched.
    #[arg(long, env = "UNDERMESH_SOURCE_DIR")]
    pub source_dir: PathBuf,
    /// Where discovery and certificates are served.
    #[arg(long, env = "UNDERMESH_LISTEN", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Directory of the root key and certificate; made when neither is there.
    #[arg(long, env = "UNDERMESH_CA_DIR")]
    pub ca_dir: PathBuf,
    /// Directory of the callers' tokens: one file of mode 0600 per caller, `node-<node>` or `pod-<namespace>.<pod>`.
    #[arg(long, env = "UNDERMESH_CREDENTIALS")]
    pub credentials: PathBuf,
    /// Unix socket of the local endpoint.
    #[arg(long, env = "UNDERMESH_ADMIN")]
    pub admin: PathBuf,
    /// Trust domain of every identity.
    #[arg(long, env = "UNDERMESH_TRUST_DOMAIN", default_value = "cluster.local", value_parser = trust_domain)]
    pub trust_domain: String,
    /// Namespace whose policies hold for the whole mesh.
    #[arg(long, env = "UNDERMESH_ROOT_NAMESPACE", default_value = "undermesh-system")]
    pub root_namespace: String,
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

/// Workloads must not live longer on one certificate than a day (`reliability.md` R9).
fn certificate_ttl(text: &str) -> Result<Duration, String> {
    let ttl = crate::translate::route::parse_duration(text).filter(|ttl| *ttl >= Duration::from_secs(1));
    ttl.filter(|ttl| *ttl <= CERTIFICATE_TTL)
        .ok_or_else(|| "must be a duration between 1s and 24h".to_owned())
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
    /// What is the same for the whole mesh.
    pub fn mesh(&self) -> Mesh {
        Mesh {
            trust_domain: self.trust_domain.as_str().into(),
            root_namespace: self.root_namespace.as_str().into(),
            cluster: self.cluster_id.as_str().into(),
            ..Mesh::default()
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
    fn flags_are_checked_once() {
        let settings = parsed(&[]).unwrap();
        assert_eq!(settings.max_certificate_ttl, CERTIFICATE_TTL);
        assert_eq!(settings.mesh(), Mesh::default());
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
