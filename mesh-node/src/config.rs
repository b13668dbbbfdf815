//! What the agent was told: flags and environment, checked once.

pub mod enrolment;

use std::{fs, io, net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use mesh_net::{grpc::Endpoint, telemetry::LogFormat, tls::Ciphers};
use thiserror::Error;

use self::enrolment::{CniDirs, Enrol, EnrolSettings};

/// The node agent of Undermesh: captures the pods of one node and carries their connections.
#[derive(Debug, Parser)]
#[command(name = "mesh-node", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs of the agent.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serves the pods of one node until SIGTERM.
    Run(Box<Settings>),
    /// Removes what agents left in the kernel: programs, links and maps. Pods are no longer captured afterwards.
    Clean(CleanSettings),
    /// Reports what this kernel offers and what is missing.
    Probe(ProbeSettings),
    /// Asks the running agent and prints its answer.
    Ask(AskSettings),
    /// Has the running agent release every pod of the node and take the CNI plugin away; ends when that is done.
    Release(ReleaseSettings),
}

/// Where the agent of a node is asked.
const ADMIN_SOCKET: &str = "/run/undermesh/admin.sock";

/// Settings of `run` as written.
#[derive(Clone, Debug, Args)]
pub struct Settings {
    /// Name of the Kubernetes node that this agent serves.
    #[arg(long, env = "UNDERMESH_NODE")]
    pub node: String,
    /// Where the control plane is, discovery and CA; a name is resolved for each connection.
    #[arg(long, env = "UNDERMESH_CONTROL", value_name = "HOST:PORT")]
    pub control: Endpoint,
    /// PEM file with the roots that the control plane's certificate must chain to.
    #[arg(long, env = "UNDERMESH_CONTROL_ROOTS", value_name = "FILE")]
    pub control_roots: PathBuf,
    /// DNS name in the control plane's certificate.
    #[arg(
        long,
        env = "UNDERMESH_CONTROL_NAME",
        default_value = "undermesh-control.undermesh-system.svc",
        value_name = "NAME"
    )]
    pub control_name: String,
    /// File with this node's bearer token; read again for every request.
    #[arg(long, env = "UNDERMESH_CREDENTIAL", value_name = "FILE")]
    pub credential: PathBuf,
    /// Directory for what must survive a restart; created if absent.
    #[arg(long, env = "UNDERMESH_STATE_DIR", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Enrolment.
    #[command(flatten)]
    pub enrol: EnrolSettings,
    /// Unix socket of the admin endpoint; root only.
    #[arg(long, env = "UNDERMESH_ADMIN_SOCKET", default_value = ADMIN_SOCKET, value_name = "SOCKET")]
    pub admin_socket: PathBuf,
    /// TCP port of readiness, for the kubelet; none when it is not given.
    #[arg(long, env = "UNDERMESH_READY_LISTEN", value_name = "IP:PORT")]
    pub ready_listen: Option<SocketAddr>,
    /// TCP port of metrics, for Prometheus; none when it is not given.
    #[arg(long, env = "UNDERMESH_METRICS_LISTEN", value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// Where the BPF file system is mounted.
    #[arg(long, env = "UNDERMESH_BPFFS", default_value = "/sys/fs/bpf", value_name = "DIR")]
    pub bpffs: PathBuf,
    /// Where the root of the cgroup v2 hierarchy is, or the directory of a hybrid one; found in /proc/self/mountinfo if
    /// absent.
    #[arg(long, env = "UNDERMESH_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Connections that one pod may have at the same time: in the kernel's records, and through the agent. The latter are
    /// at most a quarter of what the agent's descriptors can hold, whatever is said here.
    #[arg(long, env = "UNDERMESH_POD_CONNECTIONS", default_value_t = 32768, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub pod_connections: u32,
    /// cgroup v2 directory of the kubelet's unit, absolute or below the root of cgroup v2: its probes reach the ports that pods declare for them, also where
    /// mTLS is required. Looked for among the usual units of systemd if absent.
    #[arg(long, env = "UNDERMESH_KUBELET_CGROUP", value_name = "DIR")]
    pub kubelet_cgroup: Option<PathBuf>,
    /// Take and offer AES-256 alone for tunnels: an end of one that has it not is refused.
    #[arg(long, env = "UNDERMESH_REQUIRE_AES256")]
    pub require_aes256: bool,
    /// Trust domain until the control plane names another one.
    #[arg(long, env = "UNDERMESH_TRUST_DOMAIN", default_value = "cluster.local", value_name = "DOMAIN")]
    pub trust_domain: String,
    /// Form of log lines.
    #[arg(long, env = "UNDERMESH_LOG_FORMAT", default_value = "text", value_name = "text|json")]
    pub log_format: LogFormat,
}

/// Settings of `clean` as written.
#[derive(Clone, Debug, Args)]
pub struct CleanSettings {
    /// The node whose agent is cleaned up after.
    #[arg(long, env = "UNDERMESH_NODE", required_unless_present = "all", conflicts_with = "all")]
    pub node: Option<String>,
    /// Every node's.
    #[arg(long)]
    pub all: bool,
    /// Where the CNI plugin was put; it is removed first.
    #[command(flatten)]
    pub dirs: CniDirs,
    /// Directory of what survived a restart; what is ours in it is removed, and what it tells of in pods.
    #[arg(long, env = "UNDERMESH_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// A `proc` file system in which settings of pods can be written.
    #[arg(long, env = "UNDERMESH_HOST_PROC", default_value = "/proc", value_name = "DIR")]
    pub host_proc: PathBuf,
    /// Where the BPF file system is mounted.
    #[arg(long, env = "UNDERMESH_BPFFS", default_value = "/sys/fs/bpf", value_name = "DIR")]
    pub bpffs: PathBuf,
}

/// Settings of `probe` as written.
#[derive(Clone, Debug, Args)]
pub struct ProbeSettings {
    /// Where the BPF file system is mounted.
    #[arg(long, env = "UNDERMESH_BPFFS", default_value = "/sys/fs/bpf", value_name = "DIR")]
    pub bpffs: PathBuf,
    /// cgroup v2 directory to attach to; found in /proc/self/mountinfo if absent.
    #[arg(long, env = "UNDERMESH_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
}

/// Settings of `ask` as written.
#[derive(Clone, Debug, Args)]
pub struct AskSettings {
    /// What to ask for, such as `/pods`, `/enrolment`, `/connections`, `/config_dump`, `/kernel` or `/healthz/ready`.
    pub path: String,
    /// The agent's admin socket.
    #[arg(long, env = "UNDERMESH_ADMIN_SOCKET", default_value = ADMIN_SOCKET, value_name = "SOCKET")]
    pub admin_socket: PathBuf,
}

/// Settings of `release` as written.
#[derive(Clone, Debug, Args)]
pub struct ReleaseSettings {
    /// The agent's admin socket.
    #[arg(long, env = "UNDERMESH_ADMIN_SOCKET", default_value = ADMIN_SOCKET, value_name = "SOCKET")]
    pub admin_socket: PathBuf,
}

/// Why settings are unusable.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A value breaks its rule.
    #[error("{setting}: {reason}")]
    Invalid {
        /// The flag.
        setting: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A file cannot be read or a directory cannot be made.
    #[error("{setting}: {}", path.display())]
    File {
        /// The flag.
        setting: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Settings of `run`, complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the node.
    pub node: String,
    /// The control plane.
    pub control: Control,
    /// Directory for what must survive a restart; exists.
    pub state_dir: PathBuf,
    /// Who says which pods are in the mesh.
    pub enrol: Enrol,
    /// The `proc` file system by which settings of pods are written.
    pub proc: PathBuf,
    /// Where operators ask.
    pub admin_socket: PathBuf,
    /// Where the kubelet asks.
    pub ready_listen: Option<SocketAddr>,
    /// Where Prometheus asks.
    pub metrics_listen: Option<SocketAddr>,
    /// The BPF file system.
    pub bpffs: PathBuf,
    /// Given cgroup directory.
    pub cgroup: Option<PathBuf>,
    /// Connections of one pod at the same time.
    pub pod_connections: u32,
    /// What tunnels may use.
    pub ciphers: Ciphers,
    /// Given cgroup directory of the kubelet.
    pub kubelet_cgroup: Option<PathBuf>,
    /// Trust domain to start with.
    pub trust_domain: String,
}

/// How the control plane is reached.
#[derive(Clone, Debug)]
pub struct Control {
    /// Where it is.
    pub address: Endpoint,
    /// File with the PEM roots of its certificate; read again when they change.
    pub roots: PathBuf,
    /// DNS name in its certificate.
    pub name: String,
    /// File with the bearer token.
    pub credential: PathBuf,
}

impl Config {
    /// Checks the settings and prepares the directories that they name.
    ///
    /// # Errors
    /// The first setting that cannot be used.
    pub fn new(settings: &Settings) -> Result<Self, ConfigError> {
        check_node(&settings.node)?;
        // Both are read again whenever they are used. Pods that were enrolled before have to be captured and refused
        // properly even while the control plane has not written its part yet.
        if let Some(roots) = read("--control-roots", &settings.control_roots)?
            && !roots.windows(PEM.len()).any(|window| window == PEM)
        {
            let reason = format!("{} holds no PEM block", settings.control_roots.display());
            return Err(invalid("--control-roots", reason));
        }
        read("--credential", &settings.credential)?;
        create(&settings.state_dir, "--state-dir")?;
        let enrol = Enrol::new(&settings.enrol, &settings.state_dir)?;
        let (at, setting) = match &enrol {
            Enrol::Socket(socket) => (socket, "--enrol-socket"),
            Enrol::Feed(feed) => (&feed.cni_socket, "--cni-socket"),
        };
        for (socket, setting) in [(at, setting), (&settings.admin_socket, "--admin-socket")] {
            if let Some(parent) = socket.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                create(parent, setting)?;
            }
        }
        Ok(Self {
            node: settings.node.clone(),
            control: Control {
                address: settings.control.clone(),
                roots: settings.control_roots.clone(),
                name: settings.control_name.clone(),
                credential: settings.credential.clone(),
            },
            state_dir: settings.state_dir.clone(),
            enrol,
            proc: settings.enrol.host_proc.clone(),
            admin_socket: settings.admin_socket.clone(),
            ready_listen: settings.ready_listen,
            metrics_listen: settings.metrics_listen,
            bpffs: settings.bpffs.clone(),
            cgroup: settings.cgroup.clone(),
            pod_connections: settings.pod_connections,
            ciphers: if settings.require_aes256 { Ciphers::Aes256 } else { Ciphers::Aes },
            kubelet_cgroup: settings.kubelet_cgroup.clone(),
            trust_domain: settings.trust_domain.clone(),
        })
    }
}

/// A node's name becomes a directory of bpffs, which has no dots in names of ours, and no path may hide in it.
fn check_node(name: &str) -> Result<(), ConfigError> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    if name.is_empty() || name.len() > 253 {
        return Err(invalid("--node", "must have 1 to 253 characters".to_owned()));
    }
    if !name.bytes().all(legal) || name.starts_with(['.', '-']) || name.contains("..") {
        return Err(invalid("--node", format!("{name:?} is not a Kubernetes node name")));
    }
    Ok(())
}

fn invalid(setting: &'static str, reason: String) -> ConfigError {
    ConfigError::Invalid { setting, reason }
}

/// What a PEM file has in it.
const PEM: &[u8] = b"-----BEGIN ";

/// The file; none when it is not there yet.
fn read(setting: &'static str, path: &PathBuf) -> Result<Option<Vec<u8>>, ConfigError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tracing::warn!(setting, path = %path.display(), "the file is not there yet");
            Ok(None)
        }
        Err(source) => Err(ConfigError::File { setting, path: path.clone(), source }),
    }
}

fn create(path: &std::path::Path, setting: &'static str) -> Result<(), ConfigError> {
    fs::create_dir_all(path).map_err(|source| ConfigError::File { setting, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::{
        enrolment::{EnrolFrom, WhenDown},
        *,
    };

    fn settings(directory: &std::path::Path, node: &str) -> Settings {
        let at = |name: &str| directory.join(name);
        Settings {
            node: node.to_owned(),
            control: "192.0.2.1:15012".parse().unwrap(),
            control_roots: at("roots.pem"),
            control_name: "control".to_owned(),
            credential: at("token"),
            state_dir: at("state/deep"),
            enrol: EnrolSettings {
                enrol_from: EnrolFrom::Socket,
                enrol_socket: Some(at("run/enrol.sock")),
                cni_socket: at("run/cni.sock"),
                dirs: CniDirs::default(),
                cni_plugin: None,
                cni_exempt: Vec::new(),
                cni_when_down: WhenDown::Refuse,
                cni_results: at("results"),
                host_proc: "/proc".into(),
            },
            admin_socket: at("run/admin.sock"),
            ready_listen: None,
            metrics_listen: None,
            bpffs: at("bpf"),
            cgroup: None,
            pod_connections: 1000,
            require_aes256: false,
            kubelet_cgroup: None,
            trust_domain: "cluster.local".to_owned(),
            log_format: LogFormat::Text,
        }
    }

    #[test]
    fn the_first_unusable_setting_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let check = |node: &str, expected: &str| {
            let outcome = Config::new(&settings(directory.path(), node)).map(|_| ());
            let said = outcome.map_or_else(|error| error.to_string(), |()| "fine".to_owned());
            assert!(said.starts_with(expected), "{node:?}: {said}");
        };
        check("", "--node: must have");
        check("../x", "--node: \"../x\" is not");
        check("n/1", "--node: \"n/1\" is not");
        check("N1", "--node: \"N1\" is not");
        check("n1.example", "fine");
        for (require_aes256, ciphers) in [(false, Ciphers::Aes), (true, Ciphers::Aes256)] {
            let settings = Settings { require_aes256, ..settings(directory.path(), "n1") };
            assert_eq!(Config::new(&settings).unwrap().ciphers, ciphers);
        }
        fs::write(directory.path().join("roots.pem"), "nothing").unwrap();
        check("n1", "--control-roots: ");
        fs::write(directory.path().join("roots.pem"), "-----BEGIN CERTIFICATE-----").unwrap();
        fs::create_dir(directory.path().join("token")).unwrap();
        check("n1", "--credential: ");
        assert!(directory.path().join("state/deep").is_dir() && directory.path().join("run").is_dir());
    }

    #[test]
    fn flags_are_those_of_the_contract() {
        let line = "mesh-node run --node n1 --control 10.0.0.1:15012 --control-roots r --credential c --state-dir s \
                    --enrol-socket e --admin-socket a --bpffs /b --log-format json";
        let Command::Run(settings) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("not run");
        };
        assert_eq!((settings.node.as_str(), settings.log_format), ("n1", LogFormat::Json));
        assert!(!settings.require_aes256);
        let on_a_cluster = "mesh-node run --node n1 --control undermesh-control.undermesh-system.svc:15012 \
                            --control-roots r --credential c --state-dir /var/lib/undermesh --enrol-from=feed \
                            --cni-bin-dir b --cni-conf-dir c --cni-plugin p --cni-exempt=kube-system,x";
        let Command::Run(settings) = Cli::try_parse_from(on_a_cluster.split_whitespace()).unwrap().command
        else {
            panic!("not run");
        };
        let Ok(Enrol::Feed(feed)) = Enrol::new(&settings.enrol, &settings.state_dir) else {
            panic!("no feed")
        };
        assert_eq!(feed.install.unwrap().plugin.exempt, ["kube-system", "x"]);
        assert!(Cli::try_parse_from(["mesh-node", "clean"]).is_err());
        assert!(Cli::try_parse_from(["mesh-node", "clean", "--all", "--node", "x"]).is_err());
        assert!(Cli::try_parse_from(["mesh-node", "clean", "--all"]).is_ok());
        assert!(Cli::try_parse_from(["mesh-node", "probe"]).is_ok());
    }
}
