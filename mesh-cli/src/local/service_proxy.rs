//! Service addresses for pods that are not in the mesh: local mode's stand-in for kube-proxy.
//!
//! One process per node, inside its network namespace, where a route makes every service address local. It accepts
//! on each service port and forwards to the ready endpoints in turn, from the node's own address.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use mesh_net::{
    drain::Draining,
    listen::{Accepting, Reserve, accept_loop},
    task::TaskGroup,
};
use nix::sched::{CloneFlags, setns};
use notify::{RecursiveMode, Watcher as _};
use parking_lot::RwLock;
use socket2::SockRef;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{sleep, timeout},
};

use super::services::ForwardTable;

/// TCP connect to an endpoint; as for the agents.
const CONNECT: Duration = mesh_core::limits::CONNECT;
/// Between two tries to bind.
const RETRY: Duration = Duration::from_millis(200);
/// A change that the watch missed is seen after this long.
const REREAD: Duration = Duration::from_secs(5);

/// Arguments of the process.
#[derive(Clone, Debug, clap::Args)]
pub struct ServiceProxyArgs {
    /// The node's network namespace.
    #[arg(long)]
    netns: PathBuf,
    /// The file that holds the table; read again whenever it changes.
    #[arg(long)]
    table: PathBuf,
}

/// Body of the process.
///
/// # Errors
/// When the namespace cannot be entered or the table's folder cannot be watched.
pub fn run(args: &ServiceProxyArgs) -> anyhow::Result<()> {
    let namespace = File::open(&args.netns).with_context(|| format!("open {}", args.netns.display()))?;
    // No other thread exists yet, so all of the runtime's will be inside.
    setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(&args.table))
}

/// The endpoints behind one listener.
type Behind = Arc<RwLock<Arc<[SocketAddr]>>>;

/// One service address and port.
struct Listening {
    behind: Behind,
    /// Accepting, and the connections that were accepted.
    tasks: [TaskGroup; 2],
}

async fn serve(table: &Path) -> anyhow::Result<()> {
    let (changed, mut changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event| {
        if super::folder::is_change(&event) {
            // A change that is already waiting covers this one.
            let _ = changed.try_send(());
        }
    })?;
    let folder = table.parent().context("the table is in no folder")?;
    watcher.watch(folder, RecursiveMode::NonRecursive).context("watch the table's folder")?;
    let mut listeners: HashMap<SocketAddr, Listening> = HashMap::new();
    loop {
        if let Some(wanted) = read(table) {
            apply(&mut listeners, wanted);
        }
        // Either way the table is read again.
        let _ = timeout(REREAD, changes.recv()).await;
    }
}

fn apply(listeners: &mut HashMap<SocketAddr, Listening>, wanted: ForwardTable) {
    listeners.retain(|address, listening| {
        let stays = wanted.0.contains_key(address);
        if !stays {
            listening.tasks.iter().for_each(TaskGroup::cancel);
        }
        stays
    });
    for (address, endpoints) in wanted.0 {
        let endpoints: Arc<[SocketAddr]> = endpoints.into();
        if let Some(listening) = listeners.get(&address) {
            *listening.behind.write() = endpoints;
            continue;
        }
        let listening = Listening {
            behind: Arc::new(RwLock::new(endpoints)),
            tasks: [TaskGroup::new(), TaskGroup::new()],
        };
        let connections = listening.tasks[1].clone();
        listening.tasks[0].spawn(listen(address, Arc::clone(&listening.behind), connections));
        listeners.insert(address, listening);
    }
}

/// The table, unless it is not there yet.
fn read(path: &Path) -> Option<ForwardTable> {
    let text = fs::read(path).ok()?;
    serde_json::from_slice::<Vec<(SocketAddr, Vec<SocketAddr>)>>(&text)
        .map(|rows| ForwardTable(rows.into_iter().collect()))
        .map_err(|error| tracing::error!(%error, "the table of services is unreadable"))
        .ok()
}

/// Accepts until it is cancelled.
async fn listen(address: SocketAddr, behind: Behind, tasks: TaskGroup) {
    let turn = AtomicUsize::new(0);
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                tracing::warn!(%address, %error, "cannot listen");
                sleep(RETRY).await;
            }
        }
    };
    let accepting =
        Accepting { name: "service", draining: Draining::never(), tasks, reserve: Reserve::new().ok() };
    accept_loop(listener, accepting, move |client, _| {
        let endpoints = Arc::clone(&behind.read());
        forward(client, endpoints, turn.fetch_add(1, Ordering::Relaxed))
    })
    .await;
}

/// One connection to its end. What cannot be forwarded is reset, as if nobody listened.
async fn forward(mut client: TcpStream, endpoints: Arc<[SocketAddr]>, turn: usize) {
    match dial(&endpoints, turn).await {
        Ok(mut server) => {
            let _ = client.set_nodelay(true);
            let _ = server.set_nodelay(true);
            if copy_bidirectional(&mut client, &mut server).await.is_err() {
                reset(&client);
                reset(&server);
            }
        }
        Err(error) => {
            tracing::debug!(%error, "no endpoint");
            reset(&client);
        }
    }
}

async fn dial(endpoints: &[SocketAddr], turn: usize) -> io::Result<TcpStream> {
    if endpoints.is_empty() {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    let endpoint = endpoints[turn % endpoints.len()];
    timeout(CONNECT, TcpStream::connect(endpoint))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

fn reset(socket: &TcpStream) {
    // A socket that cannot be told so is closed in the ordinary way.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}
