//! What every task of the agent sees, and bringing the kernel and live connections in line with the world.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use mesh_core::{id::Identity, snapshot::Snapshot};
use mesh_net::{
    clock::Chance,
    drain::Draining,
    identity::CertificateManager,
    listen::Reserve,
    task::TaskGroup,
    telemetry::Metrics,
    tunnel::{Handshakes, Pool},
};
use parking_lot::Mutex;
use socket2::Socket;
use tokio::{
    net::TcpStream,
    sync::{Semaphore, watch},
};

use crate::{
    affinity::Affinity,
    connections::{Connections, Owner},
    direct::Direct,
    earlier::{self, Earlier},
    kernel::{
        self, Kernel, KernelError, KernelState, PodSlot,
        lower::{LocalWorkload, Lowering},
    },
    kubelet::Found,
    pods::{Pod, Table, netns::Netns, record::Kept, route::MARKING},
    source::{self, AppError, Dialling},
    world::World,
};

/// When to try again what the kernel refused.
const AGAIN: Duration = Duration::from_secs(1);

/// The agent.
pub struct Agent {
    /// Name of its node.
    pub node: Arc<str>,
    /// The `proc` file system by which settings of pods are written.
    pub proc: PathBuf,
    /// What keeps it from being ready besides its pods.
    pub problems: Problems,
    /// Whether it is to let go of the node.
    pub dismissal: watch::Sender<Dismissal>,
    /// Trust domain of pods that the control plane has not described yet.
    pub trust_domain: Arc<str>,
    /// The kernel's side.
    pub kernel: Kernel,
    /// The newest picture of the mesh.
    pub world: World,
    /// Live connections.
    pub connections: Connections,
    /// Live connections that do not pass through here.
    pub direct: Direct,
    /// Certificates of local identities.
    pub certificates: CertificateManager,
    /// Everything that is exported.
    pub metrics: Arc<Metrics>,
    /// Bounds handshakes of peers.
    pub handshakes: Handshakes,
    /// A descriptor kept back.
    pub reserve: Option<Arc<Reserve>>,
    /// Chance.
    pub chance: Chance,
    /// Parent of tasks that belong to no pod.
    pub tasks: TaskGroup,
    /// The agent's own drain.
    pub draining: Draining,
    /// The pods.
    pub pods: watch::Receiver<Arc<Table>>,
    /// When to sweep again because something was undecided.
    pub again: watch::Sender<Option<Instant>>,
    /// What the last enforcement left for the next one; also keeps one at a time.
    pub enforcing: Mutex<Enforcing>,
    /// What is known of the kubelet.
    pub kubelet: Mutex<Found>,
    /// Why the kernel is not in line with the world; none when it is.
    pub out_of_line: Mutex<Option<String>>,
    /// Connections of one pod that pass through the agent at the same time.
    pub pod_connections: usize,
}

/// What one enforcement leaves for the next.
#[derive(Default)]
pub struct Enforcing {
    /// The identities whose certificates are wanted.
    wanted: BTreeSet<Identity>,
    lowering: Lowering,
}

/// Whether the agent is to let go of the node, before the mesh is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dismissal {
    /// No.
    No,
    /// It is: pods are released, none is enrolled, the CNI plugin is on its way out.
    Asked,
    /// The CNI plugin is gone.
    Done,
}

/// What keeps the agent from being ready, by what it concerns.
#[derive(Debug, Default)]
pub struct Problems(Mutex<BTreeMap<&'static str, String>>);

impl Problems {
    /// Notes what is wrong with `concern`, or that nothing is; a change is logged.
    pub fn set(&self, concern: &'static str, problem: Option<String>) {
        let mut all = self.0.lock();
        if all.get(concern) == problem.as_ref() {
            return;
        }
        match problem {
            Some(problem) => {
                tracing::warn!(concern, problem, "not ready");
                all.insert(concern, problem);
            }
            None => {
                tracing::info!(concern, "ready");
                all.remove(concern);
            }
        }
    }

    /// All of them, in words.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().iter().map(|(concern, problem)| format!("{concern}: {problem}")).collect()
    }
}

/// Where a connection is served: what its task sees.
#[derive(Clone)]
pub struct Site {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The pod.
    pub pod: Arc<Pod>,
}

impl Agent {
    /// Makes a pod of what enrolling produced.
    pub fn pod(&self, kept: Kept, netns: Netns, (slot, earlier): (PodSlot, Earlier)) -> Pod {
        let (drain, draining) = self.draining.child();
        let tasks = TaskGroup::new();
        let owner = Arc::new(Owner {
            uid: kept.pod.uid.as_str().into(),
            namespace: kept.pod.namespace.as_str().into(),
            name: kept.pod.name.as_str().into(),
            service_account: kept.pod.service_account.as_str().into(),
            node: self.node.clone(),
            left: false.into(),
        });
        // Tunnels are tasks of the agent: those of the pod are counted to see when its connections have ended, and an
        // idle tunnel would never let that happen.
        let pool = Pool::new(Arc::new(self.certificates.clone()), self.tasks.clone(), draining.clone());
        let places = Arc::new(Semaphore::new(self.pod_connections));
        Pod {
            kept: ArcSwap::from_pointee(kept),
            netns,
            slot,
            owner,
            drain,
            draining,
            tasks,
            pool,
            earlier,
            affinity: Affinity::default(),
            places,
        }
    }

    /// Takes a socket out of capture; before it connects.
    ///
    /// # Errors
    /// In words.
    pub fn exempt(&self, socket: &Socket) -> Result<(), String> {
        self.kernel.exempt(socket.as_fd()).map_err(|error| error.to_string())
    }

    /// Connects to the application of `pod` with the client's address.
    ///
    /// # Errors
    /// See [`AppError`].
    pub async fn dial_app(&self, pod: &Pod, client: IpAddr, to: SocketAddr) -> Result<TcpStream, AppError> {
        let dialling = Dialling {
            netns: &pod.netns,
            mark: MARKING.mark,
            exempt: &|socket| self.exempt(socket),
            taken: &|source| self.connections.taken(source, to),
            pick: self.chance.next(),
        };
        source::dial(&dialling, client, to).await
    }

    /// Whether the kernel captures a pod.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn captures(&self, uid: &str) -> Result<bool, KernelError> {
        Ok(self.kernel.pods()?.iter().any(|held| held.uid == uid))
    }

    /// Takes a pod that is not served out of the kernel, if it is in there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget(&self, uid: &str) -> Result<(), KernelError> {
        for held in self.kernel.pods()? {
            if held.uid == uid {
                self.kernel.release(held.slot, kernel::Release::Deleted)?;
            }
        }
        Ok(())
    }

    /// Brings kernel, live connections and wanted certificates in line with the world and the pods as they are now.
    /// Returns when all of it is in force. Done away from the runtime's workers: it asks policies about pairs of pods
    /// and makes a system call for each entry that changes, and connections must not wait for that.
    ///
    /// # Errors
    /// The kernel refused; what permits less has been written then.
    pub async fn enforce(self: &Arc<Self>) -> Result<(), KernelError> {
        let agent = self.clone();
        let enforced = tokio::task::spawn_blocking(move || agent.enforce_here()).await;
        enforced.unwrap_or_else(|_| {
            Err(KernelError::Program {
                what: "bring the kernel in line".to_owned(),
                why: "it panicked".to_owned(),
            })
        })
    }

    fn enforce_here(&self) -> Result<(), KernelError> {
        let mut enforcing = self.enforcing.lock();
        let (world, table) = (self.world.now(), self.pods.borrow().clone());
        self.want(&mut enforcing.wanted, world.as_deref(), &table);
        // Without a world the pinned maps stay as they are: what was permitted before a restart goes on.
        let Some(world) = world else { return Ok(()) };
        let report = self.kernel.sync(&self.lower(&mut enforcing.lowering, &world, &table));
        if let Ok(report) = &report {
            self.direct.were_cut(&report.cut);
        }
        let mut swept = self.connections.sweep(&world, Instant::now());
        // The kernel's side has ended what its verdicts no longer permit, twice after a change of generation. This
        // asks the policies themselves, and ends what is undecided for too long.
        let direct = self.direct.sweep(self, &world, &table, &mut swept);
        let earlier = earlier::sweep(self, &world, &table, &mut swept);
        let outcome = report.and_then(|report| direct.and(earlier).map(|()| report));
        *self.out_of_line.lock() = outcome.as_ref().err().map(ToString::to_string);
        if outcome.is_err() {
            // The next change may be hours away.
            swept.look_again(Instant::now() + AGAIN);
        }
        if swept.cut > 0 {
            tracing::info!(cut = swept.cut, "live connections were cut by a change");
        }
        self.again.send_replace(swept.again);
        let report = outcome?;
        tracing::debug!(?report, "the kernel is in line");
        Ok(())
    }

    /// What the kernel should hold.
    fn lower(&self, lowering: &mut Lowering, world: &Snapshot, table: &Table) -> KernelState {
        let described = |pod: &Arc<Pod>| {
            let workload = pod.owner.workload(world).ok()?;
            let probe_ports =
                world.pod(&pod.owner.uid).map(|pod| pod.probe_ports.clone()).unwrap_or_default();
            let addresses = pod.kept.load().pod.ips.clone();
            Some(LocalWorkload { id: pod.slot.id, workload, addresses, probe_ports })
        };
        let local: Vec<LocalWorkload> = table.serving.values().filter_map(described).collect();
        lowering.lower(world, &self.node, &local)
    }

    /// What a pod proves: as the world describes it, or as it will.
    pub fn identity(&self, world: Option<&Snapshot>, owner: &Owner) -> Identity {
        match world.and_then(|world| owner.workload(world).ok()) {
            Some(workload) => workload.identity(),
            None => Identity {
                trust_domain: self.trust_domain.clone(),
                namespace: owner.namespace.clone(),
                service_account: owner.service_account.clone(),
            },
        }
    }

    /// Asks for the certificates of the pods that are served, and lets go of others.
    fn want(&self, wanted: &mut BTreeSet<Identity>, world: Option<&Snapshot>, table: &Table) {
        let now: BTreeSet<Identity> =
            table.serving.values().map(|pod| self.identity(world, &pod.owner)).collect();
        now.difference(wanted).for_each(|identity| self.certificates.want(identity));
        wanted.difference(&now).for_each(|identity| self.certificates.forget(identity));
        *wanted = now;
    }
}

/// Sweeps again whatever could not be decided, when its time has come.
pub async fn sweep_again(agent: Arc<Agent>, draining: Draining) {
    let mut again = agent.again.subscribe();
    loop {
        let due = *again.borrow_and_update();
        let due = async {
            match due {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = draining.forced() => return,
            changed = again.changed() => if changed.is_err() { return },
            () = due => if let Err(error) = agent.enforce().await {
                tracing::error!(%error, "the kernel could not be brought in line");
            },
        }
    }
}
