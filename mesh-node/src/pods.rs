//! Which pods are ours: enrolled and released by request, adopted after a restart, released when their namespace
//! vanishes. One task owns them all, so that requests about a pod never overlap.

pub mod enrol;
pub mod follow;
pub mod lifecycle;
pub mod netns;
pub mod record;
pub mod route;
pub mod want;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use arc_swap::ArcSwap;
use mesh_core::{flag::Flag, limits};
use mesh_net::{
    access::Path,
    drain::{Drain, Draining},
    task::TaskGroup,
    tunnel::Pool,
};
use thiserror::Error;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::MissedTickBehavior,
};

use self::{
    lifecycle::{Held, Release, Step, on_put},
    netns::{Name, Netns, NetnsError, name_of},
    record::{BadRecord, Kept, PodRecord, Store, StoreError},
    route::RouteError,
};
use crate::{
    affinity::Affinity,
    agent::Agent,
    connections::Owner,
    earlier::Earlier,
    kernel::{self, HeldPod, KernelError, PodSlot},
    listeners,
    report::Failure,
};

/// How often the names of namespaces are looked at.
const WATCH: Duration = Duration::from_millis(500);
/// How often rule, route and setting of every pod are put in force again, in case their owner removed them.
const HEAL: Duration = Duration::from_secs(5);
/// Requests that may wait.
const QUEUE: usize = 64;
/// Connections that are cut get this long to say goodbye.
const FAREWELL: Duration = Duration::from_secs(1);

/// One enrolled pod.
pub struct Pod {
    /// What it is; its addresses may change while it is served.
    pub kept: ArcSwap<Kept>,
    /// Its open namespace.
    pub netns: Netns,
    /// Its place in the kernel.
    pub slot: PodSlot,
    /// Its name on its connections.
    pub owner: Arc<Owner>,
    /// Signals its connections.
    pub drain: Drain,
    /// What its connections watch.
    pub draining: Draining,
    /// Parent of its listeners and connections.
    pub tasks: TaskGroup,
    /// Its tunnels.
    pub pool: Pool,
    /// What it had open before it was captured.
    pub earlier: Earlier,
    /// Endpoints that it keeps.
    pub affinity: Affinity,
    /// What bounds its connections that pass through the agent: one pod must not use up the agent's descriptors.
    pub places: Arc<Semaphore>,
}

impl Pod {
    /// What it is now.
    pub fn record(&self) -> PodRecord {
        self.kept.load().pod.clone()
    }

    /// Room for one more connection, for as long as the result lives.
    ///
    /// # Errors
    /// `POD_QUOTA`.
    pub fn place(&self) -> Result<OwnedSemaphorePermit, Failure> {
        let full = |_| Failure::new(Flag::PodQuota, Flag::PodQuota.text());
        self.places.clone().try_acquire_owned().map_err(full)
    }

    /// Whether it was let go while the agent goes on.
    pub fn is_released(&self, agent: &Draining) -> bool {
        self.draining.is_started() && !agent.is_started()
    }
}

impl From<Release> for kernel::Release {
    fn from(how: Release) -> Self {
        match how {
            Release::Deleted => Self::Deleted,
            Release::Leave => Self::Leave,
        }
    }
}

/// Why a pod could not be enrolled or released.
#[derive(Debug, Error)]
pub enum EnrolError {
    /// The request is wrong.
    #[error(transparent)]
    Record(#[from] BadRecord),
    /// Another pod is in the way.
    #[error("{what} belongs to the enrolled pod {uid}")]
    Conflict {
        /// The other one.
        uid: String,
        /// What both claim.
        what: String,
    },
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Rule, route or setting.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// A listener.
    #[error("listen on port {port} inside the pod")]
    Listen {
        /// Which one.
        port: u16,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The file of enrolled pods.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The agent is shutting down.
    #[error("the agent is shutting down")]
    Draining,
    /// A thread was lost.
    #[error("the work of enrolling panicked")]
    Panicked,
}

impl EnrolError {
    /// The stable code.
    pub fn flag(&self) -> Flag {
        match self {
            Self::Record(_) | Self::Conflict { .. } => Flag::MalformedRequest,
            Self::Netns(error) if error.is_the_callers() => Flag::MalformedRequest,
            Self::Kernel(error) => error.flag(),
            Self::Draining => Flag::Drain,
            _ => Flag::Internal,
        }
    }

    /// The status of the answer.
    pub fn status(&self) -> u16 {
        match self {
            Self::Record(_) => 400,
            Self::Conflict { .. } => 409,
            Self::Netns(error) if error.is_the_callers() => 422,
            Self::Draining => 503,
            _ => 500,
        }
    }
}

/// The pods as everybody else sees them; replaced as a whole.
#[derive(Clone, Default)]
pub struct Table {
    /// Captured and served.
    pub serving: BTreeMap<String, Arc<Pod>>,
    /// Kept from before a restart, not served yet, with the reason.
    pub failed: BTreeMap<String, (Kept, String)>,
    /// Released, with connections left.
    pub leaving: Vec<Arc<Pod>>,
}

enum Command {
    Enrol(PodRecord, oneshot::Sender<Result<(), EnrolError>>),
    Release(String, Release, oneshot::Sender<Result<bool, EnrolError>>),
    ReleaseStrays(BTreeSet<String>, oneshot::Sender<Result<(), EnrolError>>),
}

/// What becomes of a pod that the kernel captures and that no record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strays {
    /// It is released at once: nobody else will ever tell of it.
    Release,
    /// It stays captured, and so without connections, until [`Pods::release_strays`] tells who is wanted.
    Keep,
}

/// The way to the task that owns the pods.
#[derive(Clone)]
pub struct Pods {
    commands: mpsc::Sender<Command>,
    table: watch::Receiver<Arc<Table>>,
}

impl Pods {
    /// Captures and serves a pod; returns when both are in force.
    ///
    /// # Errors
    /// Nothing of the pod is in force then.
    pub async fn enrol(&self, pod: PodRecord) -> Result<(), EnrolError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Enrol(pod, reply)).await.map_err(|_| EnrolError::Draining)?;
        answer.await.map_err(|_| EnrolError::Draining)?
    }

    /// Lets a pod go; false when it was not enrolled.
    ///
    /// # Errors
    /// The kernel or the state directory refused.
    pub async fn release(&self, uid: String, how: Release) -> Result<bool, EnrolError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Release(uid, how, reply)).await.map_err(|_| EnrolError::Draining)?;
        answer.await.map_err(|_| EnrolError::Draining)?
    }

    /// Releases what the kernel captures although it is neither enrolled nor `wanted`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn release_strays(&self, wanted: BTreeSet<String>) -> Result<(), EnrolError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::ReleaseStrays(wanted, reply)).await.map_err(|_| EnrolError::Draining)?;
        answer.await.map_err(|_| EnrolError::Draining)?
    }

    /// The pods now.
    pub fn table(&self) -> Arc<Table> {
        self.table.borrow().clone()
    }
}

/// The task that owns the pods.
pub struct Keeper {
    agent: Arc<Agent>,
    store: Store,
    table: watch::Sender<Arc<Table>>,
    commands: mpsc::Receiver<Command>,
}

enum Event {
    Forced,
    Asked(Option<Command>),
    Watch,
    Heal,
}

impl Keeper {
    /// The keeper, and the way to it. `table` is where everybody else sees the pods.
    pub fn new(agent: Arc<Agent>, store: Store, table: watch::Sender<Arc<Table>>) -> (Self, Pods) {
        let (sender, commands) = mpsc::channel(QUEUE);
        let pods = Pods { commands: sender, table: table.subscribe() };
        (Self { agent, store, table, commands }, pods)
    }

    /// Takes up what was enrolled before: pods that were kept are served again.
    ///
    /// # Errors
    /// The state directory cannot be read, or the kernel refuses.
    pub async fn adopt(&mut self, strays: Strays) -> Result<(), EnrolError> {
        let kept = self.store.load()?;
        let held = self.agent.kernel.pods()?;
        if strays == Strays::Release {
            self.release_strays(&kept.iter().map(|kept| kept.pod.uid.clone()).collect())?;
        }
        for kept in kept {
            let uid = kept.pod.uid.clone();
            if name_of(&kept.pod.netns, kept.netns) == Name::Gone || is_another(&held, &kept).await {
                tracing::info!(uid, "the pod ended while no agent was here");
                self.agent.forget(&uid)?;
                continue;
            }
            self.try_again(kept).await;
        }
        Ok(self.persist()?)
    }

    /// Serves requests until the drain is forced. While it runs nothing is enrolled any more, but pods still end, and
    /// their addresses go to others.
    pub async fn run(mut self, draining: Draining) {
        let mut watch = tokio::time::interval(WATCH);
        let mut heal = tokio::time::interval(HEAL);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut asked_for = true;
        loop {
            let event = tokio::select! {
                biased;
                () = draining.forced() => Event::Forced,
                asked = self.commands.recv(), if asked_for => Event::Asked(asked),
                _ = watch.tick() => Event::Watch,
                _ = heal.tick() => Event::Heal,
            };
            match event {
                Event::Forced => return,
                // Those who ask go when the drain starts.
                Event::Asked(None) => asked_for = false,
                Event::Asked(Some(Command::Enrol(pod, reply))) => {
                    let outcome = match draining.is_started() {
                        true => Err(EnrolError::Draining),
                        false => self.enrol(pod).await,
                    };
                    // Whoever asked may be gone; the next request finds the pod as it is.
                    let _ = reply.send(outcome);
                }
                Event::Asked(Some(Command::Release(uid, how, reply))) => {
                    let outcome = self.release(&uid, how).await;
                    let _ = reply.send(outcome);
                }
                Event::Asked(Some(Command::ReleaseStrays(wanted, reply))) => {
                    let _ = reply.send(self.release_strays(&wanted));
                }
                Event::Watch => {
                    self.bury().await;
                    if !draining.is_started() {
                        self.retry().await;
                    }
                }
                Event::Heal => self.heal().await,
            }
        }
    }

    fn release_strays(&self, wanted: &BTreeSet<String>) -> Result<(), EnrolError> {
        let table = self.table.borrow().clone();
        for held in self.agent.kernel.pods()? {
            let ours = table.serving.contains_key(&held.uid) || table.failed.contains_key(&held.uid);
            if !ours && !wanted.contains(&held.uid) {
                tracing::warn!(uid = held.uid, "the kernel captures a pod that nobody wants; released");
                self.agent.kernel.release(held.slot, Release::Deleted.into())?;
            }
        }
        Ok(())
    }

    async fn enrol(&mut self, pod: PodRecord) -> Result<(), EnrolError> {
        let pod = pod.checked()?;
        let path = pod.netns.clone();
        let netns = blocking(move || Ok(Netns::open(&path)?)).await?;
        // A pod that ended may hold the address that this one got; nobody waited for its end.
        self.bury().await;
        let table = self.table.borrow().clone();
        let serving: Vec<Arc<Kept>> = table.serving.values().map(|pod| pod.kept.load_full()).collect();
        let held = serving.iter().map(|kept| (&**kept, Held::Serving));
        let held = held.chain(table.failed.values().map(|(kept, _)| (kept, Held::Failed)));
        match on_put(held, &pod, netns.id()) {
            Step::Already => return Ok(()),
            Step::Readdress => return self.readdress(&table, pod).await,
            Step::Conflict { uid, what } => return Err(EnrolError::Conflict { uid, what }),
            Step::Replace => {
                self.release(&pod.uid, Release::Deleted).await?;
            }
            Step::Start => {}
        }
        let kept = Kept { netns: netns.id(), pod };
        // Kept first: a crash after the kernel captures and before this is written would leave a pod that no agent
        // ever serves again.
        self.save(&table, Some(&kept))?;
        // What was captured before stays so, whatever comes of this; else it would go on without the mesh.
        let captured = self.agent.captures(&kept.pod.uid)?;
        let outcome = self.start(kept.clone(), netns).await;
        if let Err(error) = &outcome {
            let served = self.table.borrow().serving.contains_key(&kept.pod.uid);
            match captured && !served {
                true => self.failed(kept, error),
                // Captured by then, maybe, and served by nobody.
                false if !served => self.agent.forget(&kept.pod.uid)?,
                false => {}
            }
            self.persist()?;
        }
        outcome
    }

    /// Gives a pod other addresses while it is served: it stays captured, and its listeners stay open.
    async fn readdress(&mut self, table: &Table, record: PodRecord) -> Result<(), EnrolError> {
        let Some(pod) = table.serving.get(&record.uid).cloned() else { return Ok(()) };
        let next = Kept { netns: pod.netns.id(), pod: record };
        self.save(table, Some(&next))?;
        let (agent, at, ips) = (self.agent.clone(), pod.clone(), next.pod.ips.clone());
        let outcome = blocking(move || {
            route::ensure(&at.netns, &ips, route::MARKING, &agent.proc)?;
            Ok(agent.kernel.readdress(at.slot, &ips)?)
        });
        if let Err(error) = outcome.await {
            self.persist()?;
            return Err(error);
        }
        tracing::info!(uid = next.pod.uid, ips = ?next.pod.ips, "pod has other addresses");
        pod.kept.store(Arc::new(next));
        Ok(self.agent.enforce().await?)
    }

    /// Puts one pod in force.
    async fn start(&mut self, kept: Kept, netns: Netns) -> Result<(), EnrolError> {
        let agent = self.agent.clone();
        let (pod, listeners) = {
            let (agent, kept) = (agent.clone(), kept.clone());
            blocking(move || prepare(&agent, kept, netns)).await?
        };
        let pod = Arc::new(pod);
        listeners::serve(&agent, &pod, listeners)?;
        self.table.send_modify(|table| {
            let table = Arc::make_mut(table);
            table.failed.remove(&kept.pod.uid);
            table.serving.insert(kept.pod.uid.clone(), pod);
        });
        agent.metrics.proxies_started.inc();
        agent.enforce().await?;
        tracing::info!(
            uid = kept.pod.uid,
            namespace = kept.pod.namespace,
            name = kept.pod.name,
            "pod enrolled"
        );
        Ok(())
    }

    async fn try_again(&mut self, kept: Kept) {
        let path = kept.pod.netns.clone();
        let outcome = match blocking(move || Ok(Netns::open(&path)?)).await {
            Ok(netns) if netns.id() == kept.netns => self.start(kept.clone(), netns).await,
            Ok(_) => return,
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            // Served, but the kernel could not be brought in line: that is tried again by itself.
            if !self.table.borrow().serving.contains_key(&kept.pod.uid) {
                self.failed(kept, &error);
            }
        }
    }

    /// Notes that a pod that is captured cannot be served yet.
    fn failed(&self, kept: Kept, error: &EnrolError) {
        let why = chain(error);
        let known = self.table.borrow().failed.get(&kept.pod.uid).is_some_and(|(_, known)| *known == why);
        if !known {
            tracing::warn!(uid = kept.pod.uid, why, "an enrolled pod cannot be served yet");
        }
        self.table.send_modify(|table| {
            Arc::make_mut(table).failed.insert(kept.pod.uid.clone(), (kept, why));
        });
    }

    async fn release(&mut self, uid: &str, how: Release) -> Result<bool, EnrolError> {
        let table = self.table.borrow().clone();
        if let Some((kept, _)) = table.failed.get(uid) {
            self.agent.forget(&kept.pod.uid)?;
            self.table.send_modify(|table| drop(Arc::make_mut(table).failed.remove(uid)));
            self.persist()?;
            return Ok(true);
        }
        let Some(pod) = table.serving.get(uid).cloned() else {
            // A pod that left and is deleted now: what it still has open ends.
            for pod in table.leaving.iter().filter(|pod| *pod.owner.uid == *uid && how == Release::Deleted) {
                pod.drain.force();
            }
            return Ok(false);
        };
        drop(table);
        // Out of the kernel first: while it were in there and in no table, a change of the world at that moment would
        // take back what it is permitted and cut the direct connections that it is to keep.
        // What the kernel does not let go stays in the table: it is captured, and somebody has to serve it and to try again.
        if how == Release::Leave {
            self.leave(pod.clone())?;
        }
        tracing::info!(uid, ?how, "pod released");
        self.table.send_modify(|table| drop(Arc::make_mut(table).serving.remove(uid)));
        // A full disk must not keep its connections alive: it is in no table any more, so nobody would end them.
        let written = self.persist();
        let released = match how {
            Release::Deleted => self.delete(&pod).await,
            Release::Leave => Ok(()),
        };
        self.agent.metrics.proxies_stopped.inc();
        self.agent.enforce().await?;
        released?;
        written?;
        Ok(true)
    }

    async fn delete(&mut self, pod: &Arc<Pod>) -> Result<(), EnrolError> {
        self.agent.connections.cut_pod(&pod.owner.uid, Flag::PodReleased, |_| true);
        pod.drain.force();
        let outcome = self.agent.kernel.release(pod.slot, Release::Deleted.into());
        let cut = self.agent.direct.cut_pod(&self.agent.kernel, pod.slot);
        pod.tasks.shutdown(FAREWELL).await;
        if pod.netns.name() == Name::Same {
            undo(&self.agent, pod).await;
        }
        outcome?;
        Ok(cut?)
    }

    fn leave(&mut self, pod: Arc<Pod>) -> Result<(), EnrolError> {
        pod.owner.left.store(true, Ordering::Relaxed);
        // New connections pass the agent by from here on; only then may its listeners close.
        if let Err(error) = self.agent.kernel.release(pod.slot, Release::Leave.into()) {
            pod.owner.left.store(false, Ordering::Relaxed);
            return Err(error.into());
        }
        pod.drain.start();
        self.table.send_modify(|table| Arc::make_mut(table).leaving.push(pod.clone()));
        let agent = self.agent.clone();
        self.agent.tasks.spawn(async move {
            if tokio::time::timeout(limits::DRAIN, pod.tasks.idle()).await.is_err() {
                let tunnelled = |path: Option<Path>| path == Some(Path::Tunnel) || path.is_none();
                agent.connections.cut_pod(&pod.owner.uid, Flag::PodReleased, tunnelled);
            }
        });
        Ok(())
    }

    /// Tries again what failed.
    async fn retry(&mut self) {
        let table = self.table.borrow().clone();
        for (kept, _) in table.failed.values() {
            self.try_again(kept.clone()).await;
        }
    }

    /// Looks at the names of all namespaces, and buries what has left.
    async fn bury(&mut self) {
        let table = self.table.borrow().clone();
        let gone = |kept: &Kept| name_of(&kept.pod.netns, kept.netns) == Name::Gone;
        let serving = table.serving.values().map(|pod| pod.kept.load_full());
        for uid in serving.filter(|kept| gone(kept)).map(|kept| kept.pod.uid.clone()) {
            tracing::info!(uid, "the pod's network namespace is gone");
            if let Err(error) = self.release(&uid, Release::Deleted).await {
                tracing::warn!(uid, error = chain(&error), "a vanished pod was not released cleanly");
            }
        }
        for (kept, _) in table.failed.values().filter(|(kept, _)| gone(kept)) {
            if let Err(error) = self.release(&kept.pod.uid, Release::Deleted).await {
                let uid = &kept.pod.uid;
                tracing::warn!(uid, error = chain(&error), "a vanished pod was not released");
            }
        }
        for pod in &table.leaving {
            if pod.netns.name() == Name::Gone {
                pod.drain.force();
            }
            if pod.tasks.active() == 0 {
                let back =
                    self.table.borrow().serving.values().any(|other| other.netns.id() == pod.netns.id());
                if !back && pod.netns.name() == Name::Same {
                    undo(&self.agent, pod).await;
                }
                self.table.send_modify(|table| {
                    Arc::make_mut(table).leaving.retain(|other| !Arc::ptr_eq(other, pod));
                });
            }
        }
    }

    async fn heal(&mut self) {
        let table = self.table.borrow().clone();
        for pod in table.serving.values().cloned() {
            let (record, agent) = (pod.record(), self.agent.clone());
            let uid = record.uid.clone();
            let healed =
                blocking(move || Ok(route::ensure(&pod.netns, &record.ips, route::MARKING, &agent.proc)?))
                    .await;
            if let Err(error) = healed {
                tracing::debug!(
                    uid,
                    error = chain(&error),
                    "rule and route of a pod were not put in force again"
                );
            }
        }
    }

    fn persist(&self) -> Result<(), StoreError> {
        self.save(&self.table.borrow().clone(), None)
    }

    /// Keeps what the table holds, and `instead` of what it holds of that pod.
    fn save(&self, table: &Table, instead: Option<&Kept>) -> Result<(), StoreError> {
        let serving: Vec<Arc<Kept>> = table.serving.values().map(|pod| pod.kept.load_full()).collect();
        let all = serving.iter().map(|kept| &**kept).chain(table.failed.values().map(|(kept, _)| kept));
        let others = all.filter(|kept| instead.is_none_or(|instead| instead.pod.uid != kept.pod.uid));
        self.store.save(others.chain(instead))
    }
}

/// Takes away what an agent that is gone left in pods and in its state directory; returns what was there.
///
/// # Errors
/// Something cannot be read or removed.
pub fn clean(directory: &std::path::Path, proc: &std::path::Path) -> Result<Vec<PathBuf>, EnrolError> {
    let store = Store::new(directory);
    for kept in store.load()? {
        let Ok(netns) = Netns::open(&kept.pod.netns) else { continue };
        if netns.id() == kept.netns {
            route::undo(&netns, &kept.pod.ips, route::MARKING, proc)?;
        }
    }
    Ok(record::clean(directory)?)
}

/// Everything of a pod that blocks: rule and route, listeners, kernel. Undone when a later step fails, unless the pod was
/// captured before: then what is marked must go on being delivered here and nowhere else.
fn prepare(agent: &Arc<Agent>, kept: Kept, netns: Netns) -> Result<(Pod, listeners::Listeners), EnrolError> {
    let ips = &kept.pod.ips;
    let before = agent.captures(&kept.pod.uid)?;
    route::ensure(&netns, ips, route::MARKING, &agent.proc)?;
    let captured = listeners::open(&netns).and_then(|listeners| {
        let slot = agent.kernel.enrol(&listeners::identity(&kept, &netns)?, &listeners.for_kernel())?;
        // What is not listed now could never be told from what is the mesh's, and would outlive STRICT.
        let earlier = Earlier::of(&agent.kernel, slot)?;
        Ok(((slot, earlier), listeners))
    });
    match captured {
        Ok((captured, listeners)) => Ok((agent.pod(kept, netns, captured), listeners)),
        Err(error) if before => Err(error),
        Err(error) => {
            agent.forget(&kept.pod.uid)?;
            if let Err(left) = route::undo(&netns, ips, route::MARKING, &agent.proc) {
                tracing::warn!(
                    uid = kept.pod.uid,
                    error = chain(&left),
                    "rule and route of a pod were left behind"
                );
            }
            Err(error)
        }
    }
}

/// Whether the pod's name leads to another namespace than the one that the kernel captures for it. The number of a file
/// is given again once nobody holds the namespace, and an agent that is dead holds none; a cookie never is.
async fn is_another(held: &[HeldPod], kept: &Kept) -> bool {
    let known: Vec<u64> =
        held.iter().filter(|held| held.uid == kept.pod.uid).map(|held| held.slot.netns).collect();
    let path = kept.pod.netns.clone();
    let now = blocking(move || Ok(Netns::open(&path)?)).await;
    !known.is_empty() && now.is_ok_and(|netns| !known.contains(&netns.cookie()))
}

async fn undo(agent: &Arc<Agent>, pod: &Arc<Pod>) {
    let (record, pod, agent) = (pod.record(), pod.clone(), agent.clone());
    let ips = record.ips;
    let undone = blocking(move || Ok(route::undo(&pod.netns, &ips, route::MARKING, &agent.proc)?)).await;
    if let Err(error) = undone {
        tracing::warn!(uid = record.uid, error = chain(&error), "rule and route of a pod were left behind");
    }
}

/// Runs work that blocks away from the connections.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EnrolError> + Send + 'static,
) -> Result<T, EnrolError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| EnrolError::Panicked)?
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
