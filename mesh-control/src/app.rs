//! Wires everything in the order in which a change meets it: source, translate, compile, publish, serve, status.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_net::{
    admin::{self, AdminError},
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
    },
    config::Settings,
    credentials::Credentials,
    pipeline::Pipeline,
    serve::{Certificates, Discovery, Server, proxies::Proxies},
    source::file,
};

/// Name under which proxies know the control plane.
pub const SERVER_NAME: &str = "undermesh-control.undermesh-system.svc";
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
        for dir in [&settings.source_dir, &settings.ca_dir, &settings.credentials] {
            if !dir.is_dir() {
                return Err(AppError::NoDirectory(dir.clone()));
            }
        }
        let now = SystemTime::now();
        let authority =
            Arc::new(Authority::new(Root::open(&settings.ca_dir, now)?, settings.max_certificate_ttl));
        let credentials = Arc::new(Credentials::new(settings.credentials.clone()));
        let pipeline = Arc::new(Pipeline::new(settings.source_dir.clone(), settings.mesh()));

        // Watched before the first reading, so that no edit falls between them.
        let changed = Arc::new(Notify::new());
        let watcher = file::watch(&settings.source_dir, changed.clone())?;
        pipeline.rescan();
        tasks.spawn(follow(pipeline.clone(), changed, watcher, drain.watch()));

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

        let handler = Arc::new(Admin { pipeline: pipeline.clone(), credentials, proxies: proxies.clone() });
        let socket = admin::bind(&settings.admin)?;
        tasks.spawn(admin::serve(socket, drain.watch(), tasks.clone(), handler));
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
    let mut names =
        vec![SERVER_NAME.to_owned(), format!("{SERVER_NAME}.cluster.local"), "localhost".to_owned()];
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

/// Reads the directory again whenever it changed.
async fn follow<W>(pipeline: Arc<Pipeline>, changed: Arc<Notify>, watcher: W, draining: Draining) {
    loop {
        tokio::select! {
            () = draining.started() => break,
            () = changed.notified() => tokio::time::sleep(DEBOUNCE).await,
            () = tokio::time::sleep(RESCAN) => {}
        }
        let pipeline = pipeline.clone();
        if tokio::task::spawn_blocking(move || pipeline.rescan()).await.is_err() {
            tracing::error!("reading the source directory panicked; what is in force stays");
        }
    }
    drop(watcher);
}
