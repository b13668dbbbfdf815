//! Settings of enrolment: who says which pods are in the mesh, and how the CNI plugin comes to its place.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::{ConfigError, invalid};
use crate::cni::{conflist::Plugin, install, results};

/// Who says which pods are in the mesh. One of them: two would undo each other's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EnrolFrom {
    /// Requests on the enrolment socket: a local mesh.
    #[default]
    Socket,
    /// The control plane, and for new pods the CNI plugin: Kubernetes.
    Feed,
}

/// What starts while the agent does not answer, besides exempt namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum WhenDown {
    /// Nothing.
    #[default]
    Refuse,
    /// Pods of namespaces that had none in the mesh when it was last told.
    RefuseKnown,
}

/// Settings of enrolment as written.
#[derive(Clone, Debug, Args)]
pub struct EnrolSettings {
    /// Who says which pods are in the mesh.
    #[arg(long, env = "UNDERMESH_ENROL_FROM", value_enum, default_value = "socket")]
    pub enrol_from: EnrolFrom,
    /// Unix socket on which pods are enrolled and released; root only. Needed when that is where pods come from.
    #[arg(long, env = "UNDERMESH_ENROL_SOCKET", value_name = "SOCKET")]
    pub enrol_socket: Option<PathBuf>,
    /// Unix socket on which the CNI plugin asks; root only. The path is the same on the host.
    #[arg(
        long,
        env = "UNDERMESH_CNI_SOCKET",
        default_value = "/run/undermesh/cni.sock",
        value_name = "SOCKET"
    )]
    pub cni_socket: PathBuf,
    #[command(flatten)]
    /// Where the plugin goes.
    pub dirs: CniDirs,
    /// The plugin's binary, to be installed; without it none is.
    #[arg(long, env = "UNDERMESH_CNI_PLUGIN", requires_all = ["cni_bin_dir", "cni_conf_dir"], value_name = "FILE")]
    pub cni_plugin: Option<PathBuf>,
    /// Namespaces whose pods start also while this agent does not answer.
    #[arg(
        long,
        env = "UNDERMESH_CNI_EXEMPT",
        value_delimiter = ',',
        default_value = "kube-system,undermesh-system",
        value_name = "NAMESPACE,…"
    )]
    pub cni_exempt: Vec<String>,
    /// What else starts while this agent does not answer: `refuse` (nothing) or `refuse-known` (pods of namespaces that
    /// had none in the mesh when it was last told).
    #[arg(long, env = "UNDERMESH_CNI_WHEN_DOWN", value_enum, default_value = "refuse")]
    pub cni_when_down: WhenDown,
    /// Where the container runtime keeps what its CNI plugins made: the namespaces of pods that ran before this agent.
    #[arg(long, env = "UNDERMESH_CNI_RESULTS", default_value = results::DIRECTORY, value_name = "DIR")]
    pub cni_results: PathBuf,
    /// A `proc` file system in which settings of pods can be written; in a container its own is read-only.
    #[arg(long, env = "UNDERMESH_HOST_PROC", default_value = "/proc", value_name = "DIR")]
    pub host_proc: PathBuf,
}

/// Where the CNI plugin goes.
#[derive(Clone, Debug, Default, Args)]
pub struct CniDirs {
    /// Directory in which the container runtime looks for CNI plugins.
    #[arg(long, env = "UNDERMESH_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Directory in which it looks for their configuration.
    #[arg(long, env = "UNDERMESH_CNI_CONF_DIR", value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
}

impl CniDirs {
    /// Both, if both are given.
    pub fn place(&self) -> Option<install::Place> {
        let (bin_dir, conf_dir) = (self.cni_bin_dir.clone()?, self.cni_conf_dir.clone()?);
        Some(install::Place { bin_dir, conf_dir })
    }
}

/// Who says which pods are in the mesh, complete and checked.
#[derive(Clone, Debug)]
pub enum Enrol {
    /// Requests on this socket.
    Socket(PathBuf),
    /// The control plane.
    Feed(FromFeed),
}

/// Enrolment by the feed.
#[derive(Clone, Debug)]
pub struct FromFeed {
    /// Where the plugin asks.
    pub cni_socket: PathBuf,
    /// What is installed.
    pub install: Option<install::Install>,
    /// The container runtime's records.
    pub results: PathBuf,
    /// File for the namespaces that are in the mesh, if the plugin reads it.
    pub known: Option<PathBuf>,
}

impl Enrol {
    /// Checks the settings.
    ///
    /// # Errors
    /// The first that cannot be used.
    pub(super) fn new(settings: &EnrolSettings, state_dir: &Path) -> Result<Self, ConfigError> {
        if settings.enrol_from == EnrolFrom::Socket {
            let socket = settings.enrol_socket.clone();
            let missing = || invalid("--enrol-socket", "needed with --enrol-from=socket".to_owned());
            return socket.map(Self::Socket).ok_or_else(missing);
        }
        // The plugin, which stands in other namespaces, is told these.
        for (flag, path) in [("--cni-socket", &settings.cni_socket), ("--state-dir", &state_dir.to_owned())] {
            if !path.is_absolute() {
                return Err(invalid(flag, format!("{} is not an absolute path", path.display())));
            }
        }
        let known = match settings.cni_when_down {
            WhenDown::Refuse => None,
            WhenDown::RefuseKnown => Some(state_dir.join("namespaces.json")),
        };
        let exempt = settings.cni_exempt.iter().map(|name| name.trim().to_owned());
        let plugin = Plugin {
            socket: settings.cni_socket.display().to_string(),
            exempt: exempt.filter(|name| !name.is_empty()).collect(),
            known: known.as_ref().map(|path| path.display().to_string()),
        };
        let install = settings.cni_plugin.clone().zip(settings.dirs.place());
        Ok(Self::Feed(FromFeed {
            cni_socket: settings.cni_socket.clone(),
            install: install.map(|(source, place)| install::Install { place, source, plugin }),
            results: settings.cni_results.clone(),
            known,
        }))
    }

    /// The socket that pods come in by.
    pub fn socket(&self) -> &Path {
        match self {
            Self::Socket(socket) => socket,
            Self::Feed(feed) => &feed.cni_socket,
        }
    }
}
