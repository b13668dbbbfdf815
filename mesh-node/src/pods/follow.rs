//! Enrolment as the control plane wants it: one task brings the pods of the node to what the feed says of them, and
//! answers the CNI plugin. It goes by levels, not by edges: whatever came first, label, sandbox or agent, each pass
//! looks at all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    delta::Rejected,
    flag::Flag,
    model::{LocalPod, TunnelProtocol},
    proto::TYPE_LOCAL_POD,
    snapshot::Snapshot,
};
use mesh_net::drain::Draining;
use serde::Serialize;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};

use super::{
    Pods, chain,
    lifecycle::Release,
    record::{PodRecord, StoreError},
    want::{Step, step},
};
use crate::{
    agent::{Agent, Dismissal},
    cni::{
        on_node,
        results::{Place, Results},
        sandboxes::{Sandboxes, replace},
        wire::{Refused, Sandbox, Started},
    },
};

/// How often what could not be done is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long a pod that cannot be enrolled is tried before the control plane is told; it becomes an event of the pod.
const BEFORE_COMPLAINT: Duration = Duration::from_millis(1500);
/// How long the plugin waits for the control plane to tell of its pod; less than the plugin waits for us.
const UNKNOWN: Duration = Duration::from_secs(25);
/// The same in a namespace that must start without the mesh.
const UNKNOWN_EXEMPT: Duration = Duration::from_secs(2);
/// Requests that may wait: more sandboxes than a kubelet starts at a time.
const QUEUE: usize = 256;

/// Why nothing is enrolled after a dismissal.
const DISMISSED: &str = "the mesh is being removed from this node";

/// What the plugin is answered.
pub type Answer = Result<Started, Denied>;

/// A sandbox must not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The HTTP status.
    pub status: u16,
    /// The rest.
    pub refused: Refused,
}

/// One pod of the feed, as operators see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Followed {
    /// UID.
    pub uid: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// `enrolled`, `outside`, `unborn` (no sandbox yet) or `failed`.
    pub state: &'static str,
    /// Why, if not enrolled.
    pub why: Option<String>,
}

enum Command {
    World(Arc<Snapshot>, Vec<Arc<str>>, oneshot::Sender<Vec<Rejected>>),
    Others(Arc<Snapshot>),
    Add(Adding),
    Check(Sandbox, oneshot::Sender<Answer>),
    Del(String, oneshot::Sender<()>),
    Keep(Vec<String>, oneshot::Sender<()>),
    Dismiss(oneshot::Sender<()>),
}

/// The way to the task.
#[derive(Clone)]
pub struct Following {
    commands: mpsc::Sender<Command>,
    shown: watch::Receiver<Arc<Vec<Followed>>>,
}

impl Following {
    /// Brings the pods in line with `world`; returns when those named are, or the reason has been told for those that
    /// cannot be.
    pub async fn world(&self, world: Arc<Snapshot>, changed: Vec<Arc<str>>) -> Vec<Rejected> {
        let (reply, answer) = oneshot::channel();
        let told = self.ask(Command::World(world, changed.clone(), reply), answer).await;
        // Nobody enrols any more: nothing of it is in force.
        told.unwrap_or_else(|| {
            let reason = coded("the agent is shutting down", Flag::Drain);
            changed.iter().map(|uid| Rejected { name: uid.to_string(), reason: reason.clone() }).collect()
        })
    }

    /// Other things than this node's pods have changed: nothing is to be done for them, and they are remembered as far
    /// as the plugin has to know of them.
    pub async fn others(&self, world: Arc<Snapshot>) {
        // While the agent shuts down nobody listens; the next one hears of everything.
        let _ = self.commands.send(Command::Others(world)).await;
    }

    /// A sandbox was made: may it start?
    ///
    /// # Errors
    /// It must not.
    pub async fn add(&self, container: String, sandbox: Sandbox) -> Answer {
        let (reply, answer) = oneshot::channel();
        let since = Instant::now();
        let adding = Adding { container, sandbox, since, reply };
        self.ask(Command::Add(adding), answer).await.unwrap_or_else(|| Err(draining()))
    }

    /// Is a sandbox captured, if it should be? It need not have been told of before: one may start without an agent.
    ///
    /// # Errors
    /// It is not.
    pub async fn check(&self, sandbox: Sandbox) -> Answer {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Check(sandbox, reply), answer).await.unwrap_or_else(|| Err(draining()))
    }

    /// A sandbox is being removed.
    pub async fn del(&self, container: String) {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Del(container, reply), answer).await.unwrap_or_default();
    }

    /// Only these sandboxes still exist.
    pub async fn keep(&self, containers: Vec<String>) {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Keep(containers, reply), answer).await.unwrap_or_default();
    }

    /// The mesh is being removed: every pod leaves it and none enters it any more.
    pub async fn dismiss(&self) {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Dismiss(reply), answer).await.unwrap_or_default();
    }

    /// All pods of the feed.
    pub fn shown(&self) -> Arc<Vec<Followed>> {
        self.shown.borrow().clone()
    }

    async fn ask<T>(&self, command: Command, answer: oneshot::Receiver<T>) -> Option<T> {
        self.commands.send(command).await.ok()?;
        answer.await.ok()
    }
}

/// What the task is told at its start.
pub struct FollowConfig {
    /// Directory for what must survive a restart.
    pub state_dir: PathBuf,
    /// The container runtime's records.
    pub results: PathBuf,
    /// File for the namespaces that are in the mesh, if the plugin reads it.
    pub known: Option<PathBuf>,
    /// Where to ask for a resource of the feed once more.
    pub again: mpsc::Sender<(&'static str, Arc<str>)>,
}

/// The task that follows the feed.
pub struct Follower {
    agent: Arc<Agent>,
    pods: Pods,
    config: FollowConfig,
    sandboxes: Sandboxes,
    commands: mpsc::Receiver<Command>,
    shown: watch::Sender<Arc<Vec<Followed>>>,
    world: Option<Arc<Snapshot>>,
    /// Pods that could not be brought to what they should be, and why.
    failed: BTreeMap<Arc<str>, String>,
    /// Those of which the control plane was told so.
    complained: BTreeSet<Arc<str>>,
    adding: Vec<Adding>,
    answering: Vec<Answering>,
    known: BTreeSet<Arc<str>>,
}

/// A sandbox of a pod that the control plane has not told of.
struct Adding {
    container: String,
    sandbox: Sandbox,
    since: Instant,
    reply: oneshot::Sender<Answer>,
}

/// A change of the feed that is not in force for all that it names.
struct Answering {
    uids: Vec<Arc<str>>,
    until: Instant,
    reply: oneshot::Sender<Vec<Rejected>>,
}

/// What a pod is brought to.
enum Settled {
    Enrolled,
    Outside(String),
    Unborn,
}

enum Event {
    Drain,
    Told(Option<Command>),
    Again,
}

impl Follower {
    /// The task, and the way to it.
    ///
    /// # Errors
    /// The records of sandboxes cannot be read.
    pub fn new(agent: Arc<Agent>, pods: Pods, config: FollowConfig) -> Result<(Self, Following), StoreError> {
        let (sender, commands) = mpsc::channel(QUEUE);
        let (shown, shown_rx) = watch::channel(Arc::default());
        let follower = Self {
            sandboxes: Sandboxes::load(&config.state_dir)?,
            agent,
            pods,
            config,
            commands,
            shown,
            world: None,
            failed: BTreeMap::new(),
            complained: BTreeSet::new(),
            adding: Vec::new(),
            answering: Vec::new(),
            known: BTreeSet::new(),
        };
        Ok((follower, Following { commands: sender, shown: shown_rx }))
    }

    /// Follows until the drain.
    pub async fn run(mut self, draining: Draining) {
        let mut again = tokio::time::interval(AGAIN);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                biased;
                () = draining.started() => Event::Drain,
                told = self.commands.recv() => Event::Told(told),
                _ = again.tick() => Event::Again,
            };
            match event {
                Event::Drain | Event::Told(None) => return,
                Event::Told(Some(command)) => self.told(command).await,
                Event::Again => self.again().await,
            }
            self.resolve();
        }
    }

    async fn told(&mut self, command: Command) {
        match command {
            Command::World(world, uids, reply) => {
                let first = self.world.replace(world.clone()).is_none();
                self.answering.push(Answering { uids, until: Instant::now() + BEFORE_COMPLAINT, reply });
                self.pass(|_| true).await;
                if first {
                    self.release_strays().await;
                }
                self.note_namespaces(&world);
            }
            Command::Others(world) => self.note_namespaces(&world),
            Command::Add(adding) => self.add(adding).await,
            Command::Check(sandbox, reply) => {
                // Whoever asked may be gone, here and below.
                let _ = reply.send(self.check(&sandbox));
            }
            Command::Del(container, reply) => {
                self.del(&container).await;
                let _ = reply.send(());
            }
            Command::Keep(containers, reply) => {
                if let Err(error) = self.sandboxes.keep(&containers) {
                    tracing::warn!(error = chain(&error), "sandboxes are not kept");
                }
                let _ = reply.send(());
            }
            Command::Dismiss(reply) => {
                self.agent.dismissal.send_if_modified(|dismissal| {
                    let first = *dismissal == Dismissal::No;
                    if first {
                        *dismissal = Dismissal::Asked;
                    }
                    first
                });
                self.leave_all().await;
                let _ = reply.send(());
            }
        }
    }

    fn is_dismissed(&self) -> bool {
        *self.agent.dismissal.borrow() != Dismissal::No
    }

    async fn leave_all(&mut self) {
        let table = self.pods.table();
        for uid in table.serving.keys().chain(table.failed.keys()) {
            if let Err(error) = self.pods.release(uid.clone(), Release::Leave).await {
                tracing::warn!(uid, error = chain(&error), "a pod was not released");
            }
        }
        // Whoever waits to start need not wait for the mesh.
        for adding in std::mem::take(&mut self.adding) {
            let _ = adding.reply.send(Ok(Started { enrolled: false, why: Some(DISMISSED.to_owned()) }));
        }
        self.pass(|_| true).await;
    }

    async fn again(&mut self) {
        if !self.failed.is_empty() {
            let failed = self.failed.clone();
            self.pass(|pod| failed.contains_key(&pod.uid)).await;
        }
    }

    /// Brings the pods that are `due` to what they should be, and sandboxes that waited for one of them.
    async fn pass(&mut self, due: impl Fn(&LocalPod) -> bool) {
        let Some(world) = self.world.clone() else { return };
        self.failed.retain(|uid, _| world.pod(uid).is_some());
        self.complained.retain(|uid| world.pod(uid).is_some());
        let mut results = None;
        let mut shown = BTreeMap::new();
        for pod in world.pods().filter(|pod| due(pod)) {
            let settled = self.settle(pod, &mut results).await;
            shown.insert(pod.uid.clone(), followed(pod, &settled));
            self.note(pod, settled.err());
        }
        self.shown.send_modify(|old| {
            let kept =
                old.iter().filter(|pod| !shown.contains_key(&pod.uid) && world.pod(&pod.uid).is_some());
            let all = kept.cloned().chain(shown.values().cloned()).collect();
            *old = Arc::new(all);
        });
        for adding in std::mem::take(&mut self.adding) {
            self.resume(adding).await;
        }
    }

    fn note(&mut self, pod: &LocalPod, failure: Option<String>) {
        match failure {
            None => {
                self.failed.remove(&pod.uid);
                // It was told that this pod is not in force; a full queue is tried again with the next pass.
                if self.complained.contains(&pod.uid)
                    && self.config.again.try_send((TYPE_LOCAL_POD, pod.uid.clone())).is_ok()
                {
                    self.complained.remove(&pod.uid);
                }
            }
            Some(why) => {
                if self.failed.get(&pod.uid) != Some(&why) {
                    tracing::warn!(
                        uid = &*pod.uid,
                        namespace = &*pod.namespace,
                        name = &*pod.name,
                        why,
                        "not enrolled"
                    );
                }
                self.failed.insert(pod.uid.clone(), why);
            }
        }
    }

    /// Brings one pod to what it should be.
    async fn settle(&mut self, pod: &LocalPod, results: &mut Option<Results>) -> Result<Settled, String> {
        if self.is_dismissed() {
            return self.leave(&pod.uid, DISMISSED).await;
        }
        let table = self.pods.table();
        let held = table.serving.get(&*pod.uid).map(|pod| pod.record());
        let held = held.or_else(|| table.failed.get(&*pod.uid).map(|(kept, _)| kept.pod.clone()));
        let place = self.place(pod, held.as_ref(), results).await?;
        match step(pod, place.as_ref(), held.is_some()) {
            Step::Enrol(record) => {
                if table.serving.get(&*pod.uid).is_none_or(|serving| serving.record() != record) {
                    self.pods.enrol(record).await.map_err(|error| coded(&chain(&error), error.flag()))?;
                }
                Ok(Settled::Enrolled)
            }
            Step::Leave => self.leave(&pod.uid, "released").await,
            Step::Outside { why } => Ok(Settled::Outside(why)),
            Step::Unborn => Ok(Settled::Unborn),
            Step::Nowhere => {
                let text = format!(
                    "no record tells its network namespace: neither of our plugin nor in {} (restarting the pod helps)",
                    self.config.results.display()
                );
                Err(coded(&text, Flag::NetnsUnknown))
            }
            Step::NoAddress => Err(coded("its sandbox has no usable address", Flag::NetnsUnknown)),
        }
    }

    /// Lets a pod go, if it is held.
    async fn leave(&self, uid: &str, why: &str) -> Result<Settled, String> {
        let left = self.pods.release(uid.to_owned(), Release::Leave).await;
        left.map_err(|error| coded(&chain(&error), error.flag()))?;
        Ok(Settled::Outside(why.to_owned()))
    }

    /// Where the sandbox of a pod is: as our plugin told, as it was enrolled before, or as the runtime has it.
    async fn place(
        &self,
        pod: &LocalPod,
        held: Option<&PodRecord>,
        results: &mut Option<Results>,
    ) -> Result<Option<Place>, String> {
        if let Some(sandbox) = self.sandboxes.of(pod.runtime_uid(), &pod.namespace, &pod.name) {
            return Ok(Some(Place { netns: on_node(&sandbox.netns), ips: sandbox.ips.clone() }));
        }
        if let Some(held) = held {
            return Ok(Some(Place { netns: held.netns.clone(), ips: held.ips.clone() }));
        }
        if !pod.wanted() || pod.ips.is_empty() {
            return Ok(None);
        }
        let read = match results.take() {
            Some(read) => read,
            None => {
                let directory = self.config.results.clone();
                let read = tokio::task::spawn_blocking(move || Results::read(&directory)).await;
                let failed = |why: String| format!("{}: {why}", self.config.results.display());
                let read = read.map_err(|error| failed(error.to_string()))?;
                read.map_err(|error| failed(error.to_string()))?
            }
        };
        let place = read.of(pod.runtime_uid(), &pod.namespace, &pod.name);
        *results = Some(read);
        Ok(place)
    }

    async fn add(&mut self, adding: Adding) {
        let Adding { container, sandbox, .. } = &adding;
        // Noted before anything is decided: a label that comes right now finds it, whichever way this goes.
        if let Err(error) = self.sandboxes.insert(container.clone(), sandbox.clone()) {
            tracing::warn!(container, error = chain(&error), "a sandbox is not kept across a restart");
        }
        if self.is_dismissed() {
            let _ = adding.reply.send(Ok(Started { enrolled: false, why: Some(DISMISSED.to_owned()) }));
            return;
        }
        self.resume(adding).await;
    }

    /// Starts the sandbox if its pod is known, else keeps it waiting.
    async fn resume(&mut self, adding: Adding) {
        let Some(pod) = self.named(&adding.sandbox) else {
            self.adding.push(adding);
            return;
        };
        let Adding { sandbox, since, reply, .. } = adding;
        let waited_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(
            namespace = sandbox.namespace,
            name = sandbox.name,
            waited_ms,
            "the pod of a sandbox is known"
        );
        let answer = self.start(&pod).await;
        let _ = reply.send(answer);
    }

    /// How long a sandbox may wait for its pod to be told of.
    fn patience(&self, sandbox: &Sandbox) -> Duration {
        match (sandbox.exempt, self.world.is_some()) {
            (true, false) => Duration::ZERO,
            (true, true) => UNKNOWN_EXEMPT,
            (false, _) => UNKNOWN,
        }
    }

    /// The pod of a sandbox, if the control plane has told of it.
    fn named(&self, sandbox: &Sandbox) -> Option<Arc<LocalPod>> {
        let world = self.world.as_ref()?;
        let mut named =
            world.pods().filter(|pod| *pod.namespace == *sandbox.namespace && *pod.name == *sandbox.name);
        match &sandbox.uid {
            // A static pod by its name, too: anybody can write the annotation that says what the kubelet calls it.
            Some(uid) => match world.pod(uid) {
                Some(pod) => Some(pod.clone()),
                None => named.find(|pod| pod.kubelet_uid.as_deref() == Some(uid.as_str())).cloned(),
            },
            // Of two pods of one name the one that is not going.
            None => named.find(|pod| !pod.terminating).cloned(),
        }
    }

    /// The answer for the sandbox of a known pod.
    async fn start(&mut self, pod: &LocalPod) -> Answer {
        let settled = self.settle(pod, &mut None).await;
        let failure = settled.as_ref().err().cloned();
        self.note(pod, failure);
        let entry = followed(pod, &settled);
        self.shown.send_modify(|old| {
            let others = old.iter().filter(|other| other.uid != entry.uid);
            *old = Arc::new(others.cloned().chain([entry.clone()]).collect());
        });
        match settled {
            Ok(Settled::Enrolled) => Ok(Started { enrolled: true, why: None }),
            Ok(Settled::Outside(why)) => Ok(Started { enrolled: false, why: Some(why) }),
            Ok(Settled::Unborn) => Err(denied(500, "its sandbox is not known", Flag::Internal)),
            Err(why) => Err(denied(500, &why, Flag::Internal)),
        }
    }

    fn check(&self, sandbox: &Sandbox) -> Answer {
        let outside = |why: &str| Ok(Started { enrolled: false, why: Some(why.to_owned()) });
        if self.is_dismissed() {
            return outside(DISMISSED);
        }
        let Some(pod) = self.named(sandbox) else { return outside("the pod is not known here") };
        if !pod.wanted() {
            return outside("the pod is not to be captured");
        }
        let served = self.pods.table().serving.get(&*pod.uid).map(|pod| pod.record().netns);
        match served {
            Some(netns) if netns == on_node(&sandbox.netns) => Ok(Started { enrolled: true, why: None }),
            Some(_) => Err(denied(500, "another sandbox of the pod is captured", Flag::Internal)),
            None => Err(denied(500, "the pod should be captured and is not", Flag::Internal)),
        }
    }

    async fn del(&mut self, container: &str) {
        self.adding.retain(|adding| adding.container != container);
        let sandbox = match self.sandboxes.remove(container) {
            Ok(Some(sandbox)) => sandbox,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(container, error = chain(&error), "a sandbox was not forgotten on disk");
                return;
            }
        };
        // A pod may have another sandbox by now.
        let netns = on_node(&sandbox.netns);
        let table = self.pods.table();
        let kept = table.serving.values().map(|pod| pod.record());
        let kept = kept.chain(table.failed.values().map(|(kept, _)| kept.pod.clone()));
        let uids: Vec<String> =
            kept.filter(|record| record.netns == netns).map(|record| record.uid).collect();
        for uid in uids {
            if let Err(error) = self.pods.release(uid.clone(), Release::Deleted).await {
                tracing::warn!(uid, error = chain(&error), "a pod that ends was not released cleanly");
            }
        }
    }

    /// What the kernel captures, nobody serves and nobody wants; only now is it known who is wanted.
    async fn release_strays(&mut self) {
        let Some(world) = &self.world else { return };
        let wanted = world.pods().filter(|pod| pod.wanted()).map(|pod| pod.uid.to_string()).collect();
        if let Err(error) = self.pods.release_strays(wanted).await {
            tracing::warn!(error = chain(&error), "what a former agent left in the kernel was not released");
        }
    }

    /// Answers whoever has waited long enough, or need not wait any more.
    fn resolve(&mut self) {
        let now = Instant::now();
        for answering in std::mem::take(&mut self.answering) {
            let open: Vec<_> =
                answering.uids.iter().filter_map(|uid| Some((uid, self.failed.get(uid)?))).collect();
            if !open.is_empty() && now < answering.until {
                self.answering.push(answering);
                continue;
            }
            let rejected: Vec<Rejected> = open
                .iter()
                .map(|(uid, why)| Rejected { name: uid.to_string(), reason: (*why).clone() })
                .collect();
            self.complained.extend(open.iter().map(|(uid, _)| Arc::clone(uid)));
            let _ = answering.reply.send(rejected);
        }
        for adding in std::mem::take(&mut self.adding) {
            if now < adding.since + self.patience(&adding.sandbox) {
                self.adding.push(adding);
                continue;
            }
            let answer = match (adding.sandbox.exempt, &self.world) {
                (true, _) => {
                    Ok(Started { enrolled: false, why: Some("the pod is not known yet".to_owned()) })
                }
                (false, None) => {
                    let text = "the control plane has not told it anything since it started";
                    Err(denied(503, text, Flag::PodUnknown))
                }
                (false, Some(_)) => {
                    let text =
                        format!("the control plane has not told of this pod within {} s", UNKNOWN.as_secs());
                    Err(denied(503, &text, Flag::PodUnknown))
                }
            };
            let _ = adding.reply.send(answer);
        }
    }

    /// Keeps the namespaces that are in the mesh for the plugin, when it starts others without us.
    fn note_namespaces(&mut self, world: &Snapshot) {
        let Some(path) = &self.config.known else { return };
        let known = in_the_mesh(world);
        if known == self.known && path.exists() {
            return;
        }
        let written = serde_json::to_vec(&known).map_err(std::io::Error::other);
        match written.and_then(|text| replace(path, &text)) {
            Ok(()) => self.known = known,
            Err(error) => tracing::warn!(path = %path.display(), %error, "namespaces are not kept"),
        }
    }
}

/// (pure) The namespaces in which there are pods of the mesh, wherever they run.
fn in_the_mesh(world: &Snapshot) -> BTreeSet<Arc<str>> {
    let local = world.pods().filter(|pod| pod.wanted()).map(|pod| pod.namespace.clone());
    let elsewhere = world.workloads().filter(|workload| workload.tunnel == TunnelProtocol::Hbone);
    local.chain(elsewhere.map(|workload| workload.namespace.clone())).collect()
}

fn followed(pod: &LocalPod, settled: &Result<Settled, String>) -> Followed {
    let (state, why) = match settled {
        Ok(Settled::Enrolled) => ("enrolled", None),
        Ok(Settled::Outside(why)) => ("outside", Some(why.clone())),
        Ok(Settled::Unborn) => ("unborn", None),
        Err(why) => ("failed", Some(why.clone())),
    };
    Followed { uid: pod.uid.clone(), namespace: pod.namespace.clone(), name: pod.name.clone(), state, why }
}

fn coded(why: &str, flag: Flag) -> String {
    format!("{}: {why}", flag.code())
}

fn denied(status: u16, why: &str, flag: Flag) -> Denied {
    Denied { status, refused: Refused { error: why.to_owned(), reason: flag.code().to_owned() } }
}

fn draining() -> Denied {
    denied(503, "the agent is shutting down", Flag::Drain)
}
