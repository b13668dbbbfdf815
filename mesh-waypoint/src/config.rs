//! Settings as written → [`Config`] as checked once.

use std::{net::SocketAddr, path::PathBuf};

use clap::Parser;
use mesh_core::id::Identity;
use mesh_net::{grpc::Endpoint, telemetry::LogFormat};

/// Where the admin endpoint is unless said otherwise.
const DEFAULT_SOCKET: &str = "/run/undermesh/admin.sock";

/// `mesh-waypoint ask PATH`: what the running waypoint's admin endpoint answers.
#[derive(Clone, Debug, Parser)]
#[command(name = "mesh-waypoint ask", about)]
pub struct Ask {
    /// Path, for example `/config_dump`.
    pub path: String,
    /// Unix socket of the admin endpoint.
    #[arg(long, env = "UNDERMESH_ADMIN_SOCKET", default_value = DEFAULT_SOCKET)]
    pub admin_socket: PathBuf,
}

/// The L7 proxy of one Gateway object: HBONE in, HTTP routed, HBONE out.
#[derive(Clone, Debug, Parser)]
#[command(name = "mesh-waypoint", version, about)]
pub struct Settings {
    /// Namespace of the Gateway object and of this pod.
    #[arg(long, env = "UNDERMESH_NAMESPACE")]
    pub namespace: String,
    /// Name of the Gateway object.
    #[arg(long, env = "UNDERMESH_GATEWAY")]
    pub gateway: String,
    /// Name of this pod.
    #[arg(long, env = "UNDERMESH_POD")]
    pub pod: String,
    /// Service account whose identity this waypoint proves.
    #[arg(long, env = "UNDERMESH_SERVICE_ACCOUNT")]
    pub service_account: String,
    /// Trust domain of the mesh.
    #[arg(long, env = "UNDERMESH_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Cluster that this pod is in.
    #[arg(long, env = "UNDERMESH_CLUSTER", default_value = "Kubernetes")]
    pub cluster: String,
    /// Node that this pod is on, for telemetry.
    #[arg(long, env = "UNDERMESH_NODE", default_value = "")]
    pub node: String,
    /// Discovery and certificates: where the control plane is; a name is resolved for each connection.
    #[arg(long, env = "UNDERMESH_CONTROL", value_name = "HOST:PORT")]
    pub control: Endpoint,
    /// Name in the control plane's certificate.
    #[arg(long, env = "UNDERMESH_CONTROL_NAME", default_value = "undermesh-control.undermesh-system.svc")]
    pub control_name: String,
    /// PEM file with the roots that the control plane's certificate chains to.
    #[arg(long, env = "UNDERMESH_CONTROL_ROOTS")]
    pub control_roots: PathBuf,
    /// File with the credential of this pod, mode 0600.
    #[arg(long, env = "UNDERMESH_CREDENTIAL")]
    pub credential: PathBuf,
    /// Unix socket of the admin endpoint.
    #[arg(long, env = "UNDERMESH_ADMIN_SOCKET", default_value = DEFAULT_SOCKET)]
    pub admin_socket: PathBuf,
    /// Where HBONE is served.
    #[arg(long, env = "UNDERMESH_LISTEN", default_value = "[::]:15008")]
    pub listen: SocketAddr,
    /// TCP port of readiness, for the kubelet; none when it is not given.
    #[arg(long, env = "UNDERMESH_READY_LISTEN")]
    pub ready_listen: Option<SocketAddr>,
    /// TCP port of metrics, for Prometheus; none when it is not given.
    #[arg(long, env = "UNDERMESH_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// What is logged: `info`, or per target such as `info,access=off`.
    #[arg(long, env = "UNDERMESH_LOG", default_value = "info")]
    pub log: String,
    /// `text` or `json`.
    #[arg(long, env = "UNDERMESH_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A name that cannot be one.
    #[error("--{flag}: {value:?} is not a valid Kubernetes name")]
    Name {
        /// The flag.
        flag: &'static str,
        /// What it was given.
        value: String,
    },
    /// A file that is needed at start.
    #[error("--{flag}: cannot read {path}")]
    File {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Settings {
    /// The identity that this waypoint proves.
    pub fn identity(&self) -> Identity {
        Identity::new(&self.trust_domain, &self.namespace, &self.service_account)
    }

    /// Checks what can be checked without talking to anyone.
    ///
    /// # Errors
    /// [`ConfigError`] names the flag.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (flag, value) in [
            ("namespace", &self.namespace),
            ("gateway", &self.gateway),
            ("pod", &self.pod),
            ("service-account", &self.service_account),
            ("trust-domain", &self.trust_domain),
        ] {
            let sound = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
            if value.is_empty() || value.len() > 253 || !value.bytes().all(sound) {
                return Err(ConfigError::Name { flag, value: value.clone() });
            }
        }
        for (flag, path) in [("control-roots", &self.control_roots), ("credential", &self.credential)] {
            std::fs::metadata(path).map_err(|source| ConfigError::File {
                flag,
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(extra: &[&str]) -> Settings {
        let mut args = vec![
            "mesh-waypoint",
            "--namespace=shop",
            "--gateway=gw",
            "--pod=gw-1",
            "--service-account=gw",
            "--control=127.0.0.1:15012",
            "--control-roots=/dev/null",
            "--credential=/dev/null",
            "--admin-socket=/tmp/none",
        ];
        args.extend(extra);
        Settings::try_parse_from(args).unwrap()
    }

    #[test]
    fn sound_settings_pass() {
        assert!(settings(&[]).check().is_ok());
        assert_eq!(settings(&[]).listen.port(), 15008);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut bad = settings(&[]);
        bad.gateway = "a/b".into();
        assert!(bad.check().unwrap_err().to_string().contains("--gateway"));
        let mut bad = settings(&[]);
        bad.credential = "/nonexistent".into();
        assert!(bad.check().unwrap_err().to_string().contains("--credential"));
    }
}
