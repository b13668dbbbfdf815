//! The process that runs a local mesh: it makes what the folder asks for, and keeps it so.
//!
//! One thread owns everything and reconciles; pods and processes live on threads of their own and only report.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use notify::{RecursiveMode, Watcher as _};
use rand::Rng as _;

use super::{
    address::{Addresses, NodeNet},
    cgroup::Group,
    document::{Document, Problem},
    environment::{self, Facts, Launch},
    expand::{self, Key, Wanted, WantedPod},
    folder::{self, Folder},
    keeper::Keeper,
    layout::{private_dir, private_file, replace_file},
    names,
    namespace::{Holder, Holding, netns},
    network,
    node::{Ground, Node, control_address},
    objects::{self, PodFacts, Rendered},
    pod::{Desired, Pod, PodBirth, base_environment},
    report::Draft,
    rpc::{self, Place},
    services::{self, Endpoint, PlacedService},
};

/// The folder is read again this often even when no watch told of a change.
const RESCAN: Duration = Duration::from_secs(2);

/// Pods that are replaced wait this long for their successors.
const REPLACE: Duration = Duration::from_secs(30);

/// The control plane has made its root certificate within this.
const ROOTS: Duration = Duration::from_secs(3);

/// What wakes the supervisor.
#[derive(Debug)]
pub enum Event {
    /// Something in the folder may differ.
    Folder,
    /// A pod or process reports.
    Changed,
    /// Someone asks for the status, after a rescan.
    Status(SyncSender<Draft>),
    /// Someone wants to run a program in a pod.
    Place(Key, SyncSender<Result<Place, String>>),
    /// The mesh shall end.
    Down,
}

/// Everything that a local mesh is.
pub struct Supervisor {
    ground: Ground,
    events: SyncSender<Event>,
    fabric: Holder,
    control: Keeper,
    nodes: BTreeMap<String, Node>,
    pods: BTreeMap<Key, Pod>,
    addresses: Addresses,
    folder: Folder,
    last_good: BTreeMap<(String, Key), Document>,
    wanted: Wanted,
    services: Vec<PlacedService>,
    rendered: Rendered,
    problems: Vec<Problem>,
}

/// Runs the mesh until it is asked to end.
///
/// # Errors
/// When its foundations cannot be laid.
pub fn run(ground: Ground) -> anyhow::Result<()> {
    let (events, inbox) = sync_channel(256);
    let mut supervisor = Supervisor::start(ground, events.clone())?;
    let watched = events.clone();
    let mut watcher = notify::recommended_watcher(move |event| {
        if super::folder::is_change(&event) {
            // When the queue is full, what is in it will look at the folder too.
            let _ = watched.try_send(Event::Folder);
        }
    })?;
    watcher.watch(&supervisor.ground.folder, RecursiveMode::Recursive).context("watch the folder")?;
    supervisor.reconcile();
    rpc::listen(&supervisor.ground.layout, events)?;
    supervisor.serve(&inbox);
    Ok(())
}

impl Supervisor {
    fn start(ground: Ground, events: SyncSender<Event>) -> anyhow::Result<Self> {
        let group = ground.group.child("mesh");
        let hostname = Some("fabric");
        let fabric = Holder::start(&Holding { group: &group, hostname, binds: Vec::new(), bpffs: false })?;
        let settings = [network::QUIET, network::FORWARD].concat();
        network::batch(&netns(fabric.pid()), &settings, &network::fabric())?;
        let changed = notifier(&events);
        let command = control_command(&ground);
        let control = Keeper::start(ground.daemon("control", fabric.pid(), command), move || changed());
        await_roots(&ground.layout.roots());
        Ok(Self {
            ground,
            events,
            fabric,
            control,
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            addresses: Addresses::default(),
            folder: Folder::default(),
            last_good: BTreeMap::new(),
            wanted: Wanted::default(),
            services: Vec::new(),
            rendered: Rendered::default(),
            problems: Vec::new(),
        })
    }

    fn serve(&mut self, inbox: &Receiver<Event>) {
        let mut next_scan = Instant::now() + RESCAN;
        loop {
            match inbox.recv_timeout(next_scan.saturating_duration_since(Instant::now())) {
                Ok(Event::Changed) => self.settle(),
                Ok(Event::Folder) | Err(RecvTimeoutError::Timeout) => {
                    self.reconcile();
                    next_scan = Instant::now() + RESCAN;
                }
                Ok(Event::Status(reply)) => {
                    self.reconcile();
                    // Whoever asked may have gone.
                    let _ = reply.try_send(self.draft());
                }
                Ok(Event::Place(pod, reply)) => {
                    let _ = reply.try_send(self.place(&pod));
                }
                Ok(Event::Down) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Reads the folder and makes it so.
    fn reconcile(&mut self) {
        match folder::read_settled(&self.ground.folder, &self.folder) {
            Ok(texts) => {
                self.folder.take(texts);
            }
            Err(error) => {
                tracing::warn!(%error, "the folder cannot be read");
                self.settle();
                let reason = format!("the folder cannot be read: {error}");
                return self.problems.push(trouble(reason));
            }
        }
        self.settle();
    }

    /// Makes what the last reading of the folder asks for, as far as it does not exist.
    fn settle(&mut self) {
        self.bury();
        let (documents, mut problems) = self.accepted();
        let placed = self.pods.iter().map(|(key, pod)| (key.clone(), pod.wanted.node.clone())).collect();
        self.wanted = expand::expand(&documents, &placed);
        problems.append(&mut self.wanted.problems);
        problems.extend(self.folder.problems().cloned());
        self.start_nodes(&mut problems);
        let present: BTreeSet<Key> = self.wanted.services.iter().map(|service| service.key.clone()).collect();
        self.addresses.keep_services(&present);
        let (services, more) = services::place(&self.wanted.services, &mut self.addresses);
        self.services = services;
        problems.extend(more);
        let data = documents.iter().filter_map(environment::data).collect();
        self.change_pods(&data, &mut problems);
        self.stop_nodes();
        self.problems = problems;
        if let Err(error) = self.publish() {
            tracing::error!(error = format!("{error:#}"), "the mesh could not be told of a change");
            self.problems.push(trouble(format!("the mesh could not be told of a change: {error:#}")));
        }
    }

    /// The documents in force: an object that became invalid stays as it last was good.
    fn accepted(&mut self) -> (Vec<Document>, Vec<Problem>) {
        let mut problems = Vec::new();
        let mut last_good = BTreeMap::new();
        let mut documents = Vec::new();
        for document in self.folder.documents() {
            let id = (document.kind.clone(), Key::new(&document.namespace, &document.name));
            let good = match expand::check(document) {
                Ok(()) => Some(document.clone()),
                Err(problem) => {
                    problems.push(*problem);
                    // A second object of a name that is good elsewhere is no reason to read that one twice.
                    self.last_good.get(&id).filter(|_| !last_good.contains_key(&id)).cloned()
                }
            };
            if let Some(good) = good {
                last_good.insert(id, good.clone());
                documents.push(good);
            }
        }
        self.last_good = last_good;
        (documents, problems)
    }

    /// Forgets pods that are gone.
    fn bury(&mut self) {
        let gone: Vec<Key> =
            self.pods.iter().filter(|(_, pod)| pod.observed().gone).map(|(key, _)| key.clone()).collect();
        for key in gone {
            if let Some(pod) = self.pods.remove(&key) {
                self.addresses.forget_pod(pod.net, pod.index);
                let _ = fs::remove_file(self.credential_of(&key));
                pod.join();
            }
        }
    }

    fn start_nodes(&mut self, problems: &mut Vec<Problem>) {
        let names: Vec<String> = self.wanted.nodes.iter().map(|node| node.name.clone()).collect();
        for name in names.into_iter().filter(|name| !self.nodes.contains_key(name)).collect::<Vec<_>>() {
            if let Err(error) = self.start_node(&name) {
                problems.push(Problem {
                    file: String::new(),
                    line: 0,
                    object: format!("Node {name}"),
                    field: String::new(),
                    reason: format!("{error:#}"),
                    severity: "error".to_owned(),
                });
                return;
            }
        }
    }

    fn start_node(&mut self, name: &str) -> anyhow::Result<()> {
        let net = self.addresses.node(name)?;
        let credentials = self.ground.layout.credentials();
        mint(&credentials.join(format!("node-{name}")))?;
        let node = Node::start(&self.ground, self.fabric.pid(), name, net, notifier(&self.events))?;
        for other in self.nodes.values() {
            network::batch(&netns(other.holder()), &[], &network::way(net))?;
            network::batch(&netns(node.holder()), &[], &network::way(other.net))?;
        }
        self.nodes.insert(name.to_owned(), node);
        Ok(())
    }

    /// Nodes that nobody wants end when their last pod has.
    fn stop_nodes(&mut self) {
        let needed = |name: &String| {
            self.wanted.nodes.iter().any(|node| node.name == *name)
                || self.pods.values().any(|pod| pod.wanted.node == *name)
        };
        let unneeded: Vec<String> = self.nodes.keys().filter(|name| !needed(name)).cloned().collect();
        for name in unneeded {
            if let Some(node) = self.nodes.remove(&name) {
                let net = node.net;
                node.stop();
                let _ = fs::remove_file(self.ground.layout.credentials().join(format!("node-{name}")));
                let _ = network::batch(&netns(self.fabric.pid()), &[], &network::unplug_node(net));
                self.addresses.forget_node(&name);
            }
        }
    }

    fn change_pods(
        &mut self,
        data: &BTreeMap<(String, Key), BTreeMap<String, String>>,
        problems: &mut Vec<Problem>,
    ) {
        let replaced_later = self.replaced_later();
        let wanted: BTreeMap<&Key, &WantedPod> = self.wanted.pods.iter().map(|pod| (&pod.key, pod)).collect();
        for (key, pod) in &mut self.pods {
            match wanted.get(key) {
                Some(want) if want.revision == pod.wanted.revision && want.node == pod.wanted.node => {
                    pod.wanted = (*want).clone();
                    let enrol = want.enrol;
                    if pod.desired().enrol != enrol {
                        pod.want(|desired| desired.enrol = enrol);
                    }
                }
                _ if !pod.desired().remove && !replaced_later.contains(key) => {
                    pod.want(|desired| desired.remove = true);
                }
                _ => {}
            }
        }
        let new: Vec<WantedPod> = wanted
            .values()
            .filter(|want| !self.pods.contains_key(&want.key))
            .map(|want| (*want).clone())
            .collect();
        for want in new {
            if let Err(problem) = self.start_pod(want, data) {
                problems.push(*problem);
            }
        }
    }

    /// Pods of a changed workload that go on until those that replace them serve, but not for ever.
    fn replaced_later(&mut self) -> BTreeSet<Key> {
        let late: BTreeSet<&(String, Key)> = self
            .wanted
            .pods
            .iter()
            .filter(|want| !self.pods.get(&want.key).is_some_and(|pod| pod.observed().ready))
            .map(|want| &want.workload)
            .collect();
        let wanted: BTreeSet<&Key> = self.wanted.pods.iter().map(|pod| &pod.key).collect();
        let mut stay = BTreeSet::new();
        for (key, pod) in self.pods.iter_mut().filter(|(key, _)| !wanted.contains(key)) {
            let since = *pod.superseded.get_or_insert_with(Instant::now);
            if late.contains(&pod.wanted.workload) && since.elapsed() < REPLACE {
                stay.insert(key.clone());
            }
        }
        stay
    }

    fn start_pod(
        &mut self,
        wanted: WantedPod,
        data: &BTreeMap<(String, Key), BTreeMap<String, String>>,
    ) -> Result<(), Box<Problem>> {
        let problem = |field: String, reason: String| {
            Box::new(Problem {
                file: wanted.source.file.clone(),
                line: wanted.source.line,
                object: format!("Pod {}", wanted.key),
                field,
                reason,
                severity: "error".to_owned(),
            })
        };
        let Some(node) = self.nodes.get(&wanted.node) else { return Ok(()) };
        let link = node.link();
        let (net, index) = self
            .addresses
            .pod(&wanted.node, &wanted.key)
            .map_err(|error| problem(String::new(), error.to_string()))?;
        let uid = uid();
        let programs = self.programs(&wanted, &uid, net, index, data).map_err(|(field, reason)| {
            self.addresses.forget_pod(net, index);
            problem(field, reason)
        })?;
        let birth = PodBirth {
            layout: self.ground.layout.clone(),
            group: self.group_of(&wanted.key),
            uid,
            net,
            index,
            node: link,
            programs,
            folder: self.ground.folder.clone(),
            wanted: wanted.clone(),
        };
        let (v4, v6) = net.pod(index);
        let hosts = names::hosts(&wanted, &[v4.into(), v6.into()], &self.services, &[]);
        let desired = Desired { enrol: wanted.enrol, hosts, remove: false };
        let key = wanted.key.clone();
        self.pods.insert(key, Pod::start(birth, desired, notifier(&self.events)));
        Ok(())
    }

    /// What a pod runs; for a waypoint it is our own proxy.
    fn programs(
        &self,
        wanted: &WantedPod,
        uid: &str,
        net: NodeNet,
        index: u8,
        data: &BTreeMap<(String, Key), BTreeMap<String, String>>,
    ) -> Result<Vec<(String, Launch)>, (String, String)> {
        let base = base_environment(&self.ground.path, &wanted.key.name);
        if let Some(gateway) = &wanted.waypoint {
            let command = self
                .waypoint_command(wanted, gateway)
                .map_err(|error| (String::new(), format!("{error:#}")))?;
            return Ok(vec![("waypoint".to_owned(), Launch { command, env: base })]);
        }
        let (v4, v6) = net.pod(index);
        let ips = [IpAddr::V4(v4), IpAddr::V6(v6)];
        let facts = Facts { pod: wanted, uid, ips: &ips, host_ip: net.wire().0.into(), data };
        let launch = |(number, container)| {
            let container: &k8s_openapi::api::core::v1::Container = container;
            let Launch { command, env } = environment::launch(container, &facts)
                .map_err(|bad| (format!("containers[{number}].{}", bad.field), bad.reason))?;
            let env = base.clone().into_iter().chain(env).collect();
            Ok((container.name.clone(), Launch { command, env }))
        };
        wanted.spec.containers.iter().enumerate().map(launch).collect()
    }

    fn waypoint_command(&self, wanted: &WantedPod, gateway: &str) -> anyhow::Result<Vec<String>> {
        let layout = &self.ground.layout;
        let credential = self.credential_of(&wanted.key);
        mint(&credential)?;
        let dir = layout.waypoint(&Key::new(&wanted.key.namespace, gateway));
        if !dir.exists() {
            private_dir(&dir)?;
        }
        Ok(vec![
            "mesh-waypoint".to_owned(),
            format!("--namespace={}", wanted.key.namespace),
            format!("--gateway={gateway}"),
            format!("--pod={}", wanted.key.name),
            format!("--service-account={}", wanted.service_account()),
            format!("--control={}", control_address()),
            format!("--control-roots={}", layout.roots().display()),
            format!("--credential={}", credential.display()),
            format!("--admin-socket={}", dir.join("admin.sock").display()),
            format!("--listen=[::]:{}", expand::HBONE_PORT),
        ])
    }

    fn credential_of(&self, pod: &Key) -> std::path::PathBuf {
        self.ground.layout.credentials().join(format!("pod-{}.{}", pod.namespace, pod.name))
    }

    /// Tells everyone who needs to know: hosts files, service proxies, the control plane's folder.
    fn publish(&mut self) -> anyhow::Result<()> {
        let facts: Vec<PodFacts> = self.pods.values().map(facts_of).collect();
        let endpoints: Vec<Endpoint<'_>> = facts
            .iter()
            .map(|pod| Endpoint { pod: &pod.wanted, ips: &pod.ips, ready: pod.ready && !pod.stopping })
            .collect();
        for pod in self.pods.values() {
            let hosts = names::hosts(&pod.wanted, &pod.ips, &self.services, &endpoints);
            if pod.desired().hosts != hosts {
                pod.want(|desired| desired.hosts = hosts);
            }
        }
        let table = services::forward_table(&self.services, &endpoints);
        let outside: Vec<IpAddr> = self
            .services
            .iter()
            .flat_map(|s| &s.vips)
            .filter(|vip| !Addresses::routed(vip))
            .copied()
            .collect();
        for node in self.nodes.values_mut() {
            node.serve(&table, &outside)?;
        }
        let rendered = objects::render(&self.folder, &self.wanted, &self.services, &facts);
        write_objects(&self.ground.layout.objects(), &self.rendered, &rendered)?;
        self.rendered = rendered;
        Ok(())
    }

    /// Where a pod's programs run; a workload's name stands for its first pod.
    fn place(&self, wanted: &Key) -> Result<Place, String> {
        let name = wanted.name.rsplit_once('/').map_or(wanted.name.as_str(), |(_, name)| name);
        let key = Key::new(&wanted.namespace, name);
        let of_workload =
            || self.pods.values().find(|pod| pod.wanted.workload.1 == key && !pod.desired().remove);
        let Some(pod) = self.pods.get(&key).or_else(of_workload) else {
            let names: Vec<String> = self.pods.keys().map(ToString::to_string).collect();
            return Err(format!("there is no pod {key}; there are: {}", names.join(" ")));
        };
        let observed = pod.observed();
        let holder = observed.holder.ok_or_else(|| format!("pod {key} has no namespace yet"))?;
        // A program that starts before the pod is captured would speak in the clear.
        if pod.desired().enrol && !observed.enrolled {
            return Err(format!("pod {key} is not enrolled yet"));
        }
        Ok(Place { holder, cgroup: self.group_of(&pod.wanted.key).path().to_owned(), env: pod.env.clone() })
    }

    fn group_of(&self, pod: &Key) -> Group {
        self.ground.group.child(&format!("{}.{}", pod.namespace, pod.name))
    }

    fn draft(&self) -> Draft {
        Draft::new(
            &self.ground,
            (&self.control, self.fabric.pid()),
            &self.nodes,
            &self.pods,
            (&self.wanted, &self.services),
            (&self.problems, &self.rendered),
        )
    }
}

/// A problem of the whole folder.
fn trouble(reason: String) -> Problem {
    Problem {
        file: ".".to_owned(),
        line: 0,
        object: String::new(),
        field: String::new(),
        reason,
        severity: "error".to_owned(),
    }
}

fn facts_of(pod: &Pod) -> PodFacts {
    let observed = pod.observed();
    PodFacts {
        wanted: pod.wanted.clone(),
        uid: pod.uid.clone(),
        ips: pod.ips.clone(),
        host_ip: pod.net.wire().0.into(),
        ready: observed.ready,
        finished: observed.finished,
        stopping: observed.stopping || pod.desired().remove,
    }
}

/// A callback that wakes the supervisor; a full queue will wake it anyway.
fn notifier(events: &SyncSender<Event>) -> Arc<dyn Fn() + Send + Sync> {
    let events = events.clone();
    Arc::new(move || {
        let _ = events.try_send(Event::Changed);
    })
}

/// Brings the control plane's folder from one content to another; each file is replaced as a whole.
fn write_objects(dir: &Path, before: &Rendered, after: &Rendered) -> anyhow::Result<()> {
    for (path, text) in &after.files {
        if before.files.get(path) == Some(text) {
            continue;
        }
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        replace_file(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    for path in before.files.keys().filter(|path| !after.files.contains_key(*path)) {
        // A file that is gone already is what is wanted.
        let _ = fs::remove_file(dir.join(path));
    }
    Ok(())
}

/// Agents refuse to start without the root certificates, which the control plane makes when it first starts. One
/// that does not is told by the status.
fn await_roots(path: &Path) {
    let deadline = Instant::now() + ROOTS;
    while !path.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A bearer token of 32 random bytes.
fn mint(path: &Path) -> anyhow::Result<()> {
    let bytes: [u8; 32] = rand::rng().random();
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    private_file(path, &token).with_context(|| format!("write {}", path.display()))
}

/// A random UUID.
fn uid() -> String {
    let number: u128 = rand::rng().random();
    let hex = format!("{number:032x}");
    format!("{}-{}-4{}-a{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..])
}

fn control_command(ground: &Ground) -> Vec<String> {
    let layout = &ground.layout;
    vec![
        "mesh-control".to_owned(),
        format!("--source-dir={}", layout.objects().display()),
        format!("--listen={}", control_address()),
        format!("--ca-dir={}", layout.ca().display()),
        format!("--credentials={}", layout.credentials().display()),
        format!("--admin={}", layout.control().join("admin.sock").display()),
    ]
}
