//! Wires everything in the order in which a change meets it: source, translate, compile, publish, serve, status.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_net::{
    admin::{self, AdminError, Public},
    drain::{Drain, Draining},
    grpc::{self, GrpcError, GrpcTls},
    task::TaskGroup,
};
use tokio::{net::TcpListener, sync::Notify};

use crate::{
    admin::Admin,
    ca::{
        Authority,
        root::{Root, RootError},
        secret::SecretError,
    },
    config::Settings,
    config::SourceKind,
    credentials::Callers,
    pipeline::Pipeline,
    serve::{Certificates, Discovery, Server, proxies::Proxies},
};

mod folder;
mod kubernetes;

/// Name of the Service under which proxies know the control plane.
const SERVICE: &str = "undermesh-control";
/// Namespace of that Service where nothing else is said.
const NAMESPACE: &str = "undermesh-system";
/// Editors and tools write a file in several steps; the last of a burst within this time is what is read.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// The directory is read again at least this often: kernel watches can overflow.
const RESCAN: Duration = Duration::from_secs(10);

/// Why the control plane cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A directory that was named is not there.
    #[error("{} is not a directory", .0.display())]
    NoDirectory(PathBuf),
    /// The root cannot be used.
    #[error("certificate authority")]
    Root(#[from] RootError),
    /// The address cannot be bound.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The server's own certificate cannot be used.
    #[error("serving certificate")]
    Tls(#[from] GrpcError),
    /// The local endpoint cannot be opened.
    #[error("local endpoint")]
    Admin(#[from] AdminError),
    /// The directory cannot be watched.
    #[error("cannot watch the source directory")]
    Watch(#[from] notify::Error),
    /// No way to the API server.
    #[error("cannot reach the API server: {0}")]
    Client(String),
    /// The root on Kubernetes cannot be used.
    #[error("certificate authority")]
    Secret(#[from] SecretError),
}

/// A control plane that listens.
pub struct App {
    /// Where discovery and certificates are served.
    pub addr: SocketAddr,
    /// Directory to published.
    pub pipeline: Arc<Pipeline>,
    /// What each proxy has.
    pub proxies: Arc<Proxies>,
}

impl App {
    /// Reads the directory, opens the listeners and starts serving; everything runs in `tasks` until the drain.
    ///
    /// # Errors
    /// Anything that makes serving impossible.
    pub async fn start(settings: &Settings, drain: &Drain, tasks: &TaskGroup) -> Result<Self, AppError> {
        let now = SystemTime::now();
        let parts = match settings.source {
            Some(SourceKind::Kubernetes) => kubernetes::open(settings, drain, tasks, now).await?,
            None => folder::open(settings, drain, tasks, now)?,
        };
        let Parts { pipeline, callers, root, cluster } = parts;
        let authority = Arc::new(Authority::new(root, settings.max_certificate_ttl));
        let credentials = Arc::new(callers);

        let proxies = Arc::new(Proxies::default());
        let listener = bind(settings.listen).await?;
        let addr =
            listener.local_addr().map_err(|source| AppError::Listen { addr: settings.listen, source })?;
        let server = Arc::new(Server {
            published: pipeline.subscribe(),
            credentials: credentials.clone(),
            authority: authority.clone(),
            trust_domain: pipeline.mesh().trust_domain.clone(),
            proxies: proxies.clone(),
            tasks: tasks.clone(),
        });
        let tls = serving_tls(settings, authority.root(), addr, now)?;
        let router = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .max_concurrent_streams(Some(64))
            .add_service(Discovery(server.clone()))
            .add_service(Certificates(server));
        let serving = grpc::serve(listener, tls, router, drain.watch(), tasks.clone());
        tasks.spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "discovery and certificates are no longer served");
            }
        });

        let others =
            cluster.map(|cluster| cluster.lead(&pipeline, &proxies, authority.root().pem(), drain, tasks));
        let handler =
            Arc::new(Admin { pipeline: pipeline.clone(), credentials, proxies: proxies.clone(), others });
        let socket = admin::bind(&settings.admin)?;
        tasks.spawn(admin::serve(socket, drain.watch(), tasks.clone(), handler.clone()));
        let public = [(settings.ready_listen, Public::Ready), (settings.metrics_listen, Public::Metrics)];
        for (at, what) in public {
            if let Some(at) = at {
                let listener = admin::bind_tcp(at)?;
                tasks.spawn(admin::serve_tcp(listener, what, drain.watch(), tasks.clone(), handler.clone()));
            }
        }
        Ok(Self { addr, pipeline, proxies })
    }
}

async fn bind(addr: SocketAddr) -> Result<TcpListener, AppError> {
    TcpListener::bind(addr).await.map_err(|source| AppError::Listen { addr, source })
}

fn serving_tls(
    settings: &Settings,
    root: &Root,
    addr: SocketAddr,
    now: SystemTime,
) -> Result<GrpcTls, AppError> {
    let namespace = settings.pod_namespace.as_deref().unwrap_or(NAMESPACE);
    let server = format!("{SERVICE}.{namespace}.svc");
    let mut names = vec![format!("{server}.cluster.local"), server, "localhost".to_owned()];
    let mut addresses = vec![addr.ip(), IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])];
    for name in &settings.serving_names {
        match name.parse() {
            Ok(ip) => addresses.push(ip),
            Err(_) => names.push(name.clone()),
        }
    }
    addresses.retain(|ip| !ip.is_unspecified());
    addresses.sort_unstable();
    addresses.dedup();
    let (chain, key) = root.serving(&names, &addresses, now)?;
    Ok(GrpcTls::new(chain, key)?)
}

/// What serving needs of the source.
struct Parts {
    pipeline: Arc<Pipeline>,
    callers: Callers,
    root: Root,
    cluster: Option<kubernetes::Leading>,
}

/// Looks at the source whenever it changed, and at least every `RESCAN`.
async fn follow<W>(pipeline: Arc<Pipeline>, changed: Arc<Notify>, watcher: W, draining: Draining) {
    loop {
        tokio::select! {
            () = draining.started() => break,
            () = changed.notified() => tokio::time::sleep(DEBOUNCE).await,
            () = tokio::time::sleep(RESCAN) => {}
        }
        let pipeline = pipeline.clone();
        if tokio::task::spawn_blocking(move || pipeline.rescan()).await.is_err() {
            tracing::error!("looking at the source panicked; what is in force stays");
        }
    }
    drop(watcher);
}
