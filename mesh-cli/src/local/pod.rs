//! One pod's life, on a thread of its own: namespace, network, enrolment, containers, end.
//!
//! ```text
//!   wanted ─► holder + network ─► [enrolled by the node's agent] ─► containers ─► … ─► stopped ─► gone
//! ```
//! Everything that can take long waits here, so that no pod waits for another and `status` waits for none.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mesh_net::admin::Method;
use parking_lot::{Condvar, Mutex};
use serde_json::json;

use super::{
    address::NodeNet,
    cgroup::Group,
    environment::Launch,
    expand::WantedPod,
    http,
    keeper::{Keeper, Program, Restart, State},
    layout::Layout,
    names,
    namespace::{Holder, Holding, netns},
    network,
    node::NodeLink,
};

/// A dead holder or a restarted agent is noticed after this long at the latest.
const LOOK: Duration = Duration::from_millis(250);
/// Between two tries of what failed.
const RETRY: Duration = Duration::from_secs(1);
/// Pauses between restarts of a container.
const CRASH_DELAY: Duration = Duration::from_secs(1);
const CRASH_DELAY_MAX: Duration = Duration::from_secs(30);
/// A pod that writes no `terminationGracePeriodSeconds` gets this; Kubernetes' 30 s would make edits feel stuck.
const GRACE: Duration = Duration::from_secs(5);

/// What a pod is given once and for all.
#[derive(Debug)]
pub struct PodBirth {
    /// Paths of the mesh.
    pub layout: Layout,
    /// The pod's processes.
    pub group: Group,
    /// Its UID.
    pub uid: String,
    /// Its number on its node.
    pub net: NodeNet,
    /// Its number among the node's pods.
    pub index: u8,
    /// Its node.
    pub node: NodeLink,
    /// Programs to run, by container name.
    pub programs: Vec<(String, Launch)>,
    /// Folder that programs run in unless the container says otherwise.
    pub folder: PathBuf,
    /// As wanted at its birth.
    pub wanted: WantedPod,
}

/// What may change while it lives.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// The mesh shall capture it.
    pub enrol: bool,
    /// Its hosts file.
    pub hosts: String,
    /// It shall end.
    pub remove: bool,
}

/// What is the case.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The holder of its namespaces.
    pub holder: Option<u32>,
    /// The first container's process.
    pub pid: Option<u32>,
    /// The agent captured it.
    pub enrolled: bool,
    /// Containers were started.
    pub started: bool,
    /// All containers run.
    pub ready: bool,
    /// All containers ended for good; whether well.
    pub finished: Option<bool>,
    /// It is on its way out.
    pub stopping: bool,
    /// It is gone.
    pub gone: bool,
    /// Restarts of all containers.
    pub restarts: u32,
    /// Every container was started at least once.
    pub tried: bool,
    /// What keeps it from being captured or released as wanted.
    pub pending: Option<String>,
    /// The same, or what is wrong with its containers.
    pub why: Option<String>,
}

#[derive(Debug)]
struct Shared {
    desired: Mutex<Desired>,
    observed: Mutex<Observed>,
    changed: Condvar,
}

/// A living pod, as the supervisor holds it.
#[derive(Debug)]
pub struct Pod {
    /// Its UID.
    pub uid: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its number on the network.
    pub net: NodeNet,
    /// Its number among the node's pods.
    pub index: u8,
    /// As wanted now: labels and annotations may be newer than at its birth.
    pub wanted: WantedPod,
    /// The environment of its first container.
    pub env: BTreeMap<String, String>,
    /// Since when nobody wants it any more.
    pub superseded: Option<Instant>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Pod {
    /// Starts its life. `changed` is called whenever something observed differs.
    pub fn start(birth: PodBirth, desired: Desired, changed: Arc<dyn Fn() + Send + Sync>) -> Self {
        let (v4, v6) = birth.net.pod(birth.index);
        let shared = Arc::new(Shared {
            desired: Mutex::new(desired),
            observed: Mutex::new(Observed { why: Some("starting".to_owned()), ..Observed::default() }),
            changed: Condvar::new(),
        });
        let (uid, net, index, wanted) = (birth.uid.clone(), birth.net, birth.index, birth.wanted.clone());
        let inside = Arc::clone(&shared);
        let env = birth.programs.first().map(|(_, launch)| launch.env.clone()).unwrap_or_default();
        let thread = thread::spawn(move || Life { birth, shared: inside, changed }.live());
        let ips = vec![v4.into(), v6.into()];
        Self { uid, ips, net, index, wanted, env, superseded: None, shared, thread: Some(thread) }
    }

    /// What is the case now.
    pub fn observed(&self) -> Observed {
        self.shared.observed.lock().clone()
    }

    /// What is wanted now.
    pub fn desired(&self) -> Desired {
        self.shared.desired.lock().clone()
    }

    /// Changes what is wanted.
    pub fn want(&self, change: impl FnOnce(&mut Desired)) {
        change(&mut self.shared.desired.lock());
        self.shared.changed.notify_all();
    }

    /// Whether nothing is left to do.
    pub fn settled(&self) -> bool {
        let (desired, observed) = (self.desired(), self.observed());
        !desired.remove && observed.tried && desired.enrol == observed.enrolled && observed.pending.is_none()
    }

    /// Waits for a pod that is gone.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's own view.
struct Life {
    birth: PodBirth,
    shared: Arc<Shared>,
    changed: Arc<dyn Fn() + Send + Sync>,
}

/// A pod with its namespace.
struct Body {
    holder: Holder,
    hosts: String,
    /// The agent process that captured it.
    enrolled_by: Option<u32>,
    containers: Vec<Keeper>,
    retry_at: Instant,
    why: Option<String>,
}

impl Life {
    fn live(self) {
        let mut body: Option<Body> = None;
        loop {
            let desired = self.shared.desired.lock().clone();
            if desired.remove {
                self.end(body);
                return;
            }
            let mut current = match body.take() {
                Some(body) => body,
                None => match self.embody(&desired) {
                    Ok(body) => body,
                    Err(error) => {
                        self.observe(|observed| {
                            let why = Some(format!("{error:#}"));
                            *observed = Observed { pending: why.clone(), why, ..Observed::default() };
                        });
                        self.wait(RETRY, &desired);
                        continue;
                    }
                },
            };
            if !current.holder.alive() {
                tracing::warn!(pod = %self.birth.wanted.key, "the holder of the namespace ended; starting over");
                self.disembody(current);
                continue;
            }
            self.step(&mut current, &desired);
            self.report(&current, &desired);
            body = Some(current);
            self.wait(LOOK, &desired);
        }
    }

    /// Waits for a change of what is wanted.
    fn wait(&self, at_most: Duration, seen: &Desired) {
        let mut desired = self.shared.desired.lock();
        if *desired == *seen {
            self.shared.changed.wait_for(&mut desired, at_most);
        }
    }

    fn observe(&self, change: impl FnOnce(&mut Observed)) {
        let mut observed = self.shared.observed.lock();
        let before = observed.clone();
        change(&mut observed);
        let differs = *observed != before;
        drop(observed);
        if differs {
            (self.changed)();
        }
    }

    /// Namespace, files and network.
    fn embody(&self, desired: &Desired) -> anyhow::Result<Body> {
        let PodBirth { layout, group, net, index, node, wanted, .. } = &self.birth;
        let dir = layout.pod(&wanted.key);
        // Not its parents: where they are gone, the mesh is ending.
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
        let (hosts, resolv) = (dir.join("hosts"), dir.join("resolv.conf"));
        fs::write(&hosts, &desired.hosts)?;
        fs::write(&resolv, names::resolv_conf(&wanted.key.namespace))?;
        let binds = vec![(hosts, "/etc/hosts"), (resolv, "/etc/resolv.conf")];
        let hostname = wanted.spec.hostname.as_deref().unwrap_or(&wanted.key.name);
        // The kernel's limit; Kubernetes cuts longer names as well.
        let hostname = hostname.get(..63).unwrap_or(hostname);
        let holder = Holder::start(&Holding { group, hostname: Some(hostname), binds, bpffs: false })?;
        network::batch(&netns(holder.pid()), network::QUIET, "")?;
        network::batch(&netns(node.holder), &[], &network::plug_pod(*index, holder.pid()))?;
        network::batch(&netns(holder.pid()), &[], &network::pod(*net, *index))?;
        Ok(Body {
            holder,
            hosts: desired.hosts.clone(),
            enrolled_by: None,
            containers: Vec::new(),
            retry_at: Instant::now(),
            why: None,
        })
    }

    /// One look: brings what is the case nearer to what is wanted.
    fn step(&self, body: &mut Body, desired: &Desired) {
        if body.hosts != desired.hosts {
            match rewrite(&self.birth.layout.pod(&self.birth.wanted.key).join("hosts"), &desired.hosts) {
                Ok(()) => body.hosts = desired.hosts.clone(),
                Err(error) => body.why = Some(format!("hosts file: {error}")),
            }
        }
        if Instant::now() >= body.retry_at {
            body.why = None;
            if let Err(why) = self.enrolment(body, desired) {
                body.why = Some(why);
                body.retry_at = Instant::now() + RETRY;
            }
        }
        // A pod that is to be captured does not run one instruction before it is.
        if body.containers.is_empty() && desired.enrol == body.enrolled_by.is_some() {
            body.containers = self.start_containers(body.holder.pid());
        }
    }

    /// Plays the CNI plugin's part towards the agent.
    fn enrolment(&self, body: &mut Body, desired: &Desired) -> Result<(), String> {
        let agent = self.birth.node.agent();
        match (desired.enrol, body.enrolled_by) {
            (true, by) if by.is_none() || by != agent => {
                let Some(agent) = agent else {
                    return Err(format!("the agent of {} is not running", self.birth.wanted.node));
                };
                self.call(Method::PUT, "", &self.enrol_request(body.holder.pid()))?;
                body.enrolled_by = Some(agent);
                Ok(())
            }
            (false, Some(_)) => {
                self.call(Method::DELETE, "?mode=leave", "")?;
                body.enrolled_by = None;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn enrol_request(&self, holder: u32) -> String {
        let PodBirth { wanted, net, index, .. } = &self.birth;
        let (v4, v6) = net.pod(*index);
        json!({
            "namespace": wanted.key.namespace,
            "name": wanted.key.name,
            "service_account": wanted.service_account(),
            "ips": [v4, v6],
            "netns": netns(holder),
        })
        .to_string()
    }

    fn call(&self, method: Method, query: &str, body: &str) -> Result<(), String> {
        let uri = format!("/pods/{}{query}", self.birth.uid);
        let socket = &self.birth.node.enrol_socket;
        let delete = method == Method::DELETE;
        match http::call(socket, method, &uri, body.as_bytes().to_vec()) {
            Ok((200..=299, _)) => Ok(()),
            // Gone already is what was asked for.
            Ok((404, _)) if delete => Ok(()),
            Ok((status, body)) => {
                Err(format!("the agent answered {status}: {}", String::from_utf8_lossy(&body).trim()))
            }
            Err(error) => Err(format!("the agent of {}: {error}", self.birth.wanted.node)),
        }
    }

    fn start_containers(&self, holder: u32) -> Vec<Keeper> {
        let PodBirth { layout, group, programs, folder, wanted, .. } = &self.birth;
        let restart = match wanted.spec.restart_policy.as_deref() {
            Some("Never") => Restart::Never,
            Some("OnFailure") => Restart::OnFailure,
            _ => Restart::Always,
        };
        let dir = layout.pod(&wanted.key);
        programs
            .iter()
            .map(|(name, launch)| {
                let container = wanted.spec.containers.iter().find(|container| container.name == *name);
                let security = container.and_then(|container| container.security_context.as_ref());
                let of_pod = wanted.spec.security_context.as_ref();
                let cwd = container.and_then(|container| container.working_dir.as_ref()).map(PathBuf::from);
                let user = security.and_then(|s| s.run_as_user).or(of_pod.and_then(|s| s.run_as_user));
                let user_group =
                    security.and_then(|s| s.run_as_group).or(of_pod.and_then(|s| s.run_as_group));
                let mut place = vec![
                    format!("--parent={}", std::process::id()),
                    format!("--cgroup={}", group.path().display()),
                    format!("--holder={holder}"),
                    format!("--cwd={}", cwd.as_ref().unwrap_or(folder).display()),
                ];
                place.extend(user.map(|uid| format!("--uid={uid}")));
                place.extend(user_group.map(|gid| format!("--gid={gid}")));
                let program = Program {
                    name: format!("{} {name}", wanted.key),
                    place,
                    command: launch.command.clone(),
                    env: launch.env.clone(),
                    log: dir.join(format!("{name}.log")),
                    restart,
                    delay: CRASH_DELAY,
                    max_delay: CRASH_DELAY_MAX,
                };
                let shared = Arc::clone(&self.shared);
                Keeper::start(program, move || {
                    shared.changed.notify_all();
                })
            })
            .collect()
    }

    fn report(&self, body: &Body, desired: &Desired) {
        let states: Vec<State> = body.containers.iter().map(Keeper::state).collect();
        let names: Vec<&str> = self.birth.programs.iter().map(|(name, _)| name.as_str()).collect();
        let pending = body.why.clone().or_else(|| {
            // Captured, but by an agent that is not there: the kernel refuses what it cannot decide alone.
            (desired.enrol && body.enrolled_by != self.birth.node.agent()).then(|| {
                format!("the agent of {} is not running or was just restarted", self.birth.wanted.node)
            })
        });
        let dir = self.birth.layout.pod(&self.birth.wanted.key);
        let said = |name: &str| last_line(&dir.join(format!("{name}.log")));
        let why = pending.clone().or_else(|| unwell(&names, &states, said));
        let tried = |state: &State| state.pid.is_some() || state.last_end.is_some();
        let ended: Option<Vec<bool>> = states.iter().map(|state| state.finished).collect();
        self.observe(|observed| {
            *observed = Observed {
                holder: Some(body.holder.pid()),
                pid: states.first().and_then(|state| state.pid),
                enrolled: body.enrolled_by.is_some(),
                started: !states.is_empty(),
                tried: !states.is_empty() && states.iter().all(tried),
                pending,
                ready: !states.is_empty() && states.iter().all(|state| state.pid.is_some()),
                finished: ended.filter(|ends| !ends.is_empty()).map(|ends| ends.into_iter().all(|good| good)),
                stopping: false,
                gone: false,
                restarts: states.iter().map(|state| state.restarts).sum(),
                why,
            };
        });
    }

    /// The holder died: what is left of the body goes too.
    fn disembody(&self, mut body: Body) {
        for container in &mut body.containers {
            container.stop(Duration::ZERO);
        }
        if body.enrolled_by.is_some() {
            let _ = self.call(Method::DELETE, "?mode=deleted", "");
        }
        let _ = self.birth.group.destroy();
    }

    fn end(&self, body: Option<Body>) {
        self.observe(|observed| {
            observed.stopping = true;
            observed.ready = false;
        });
        if let Some(mut body) = body {
            let seconds = self.birth.wanted.spec.termination_grace_period_seconds;
            let grace = seconds.and_then(|s| u64::try_from(s).ok()).map_or(GRACE, Duration::from_secs);
            let deadline = Instant::now() + grace;
            for container in &body.containers {
                container.ask_to_stop();
            }
            for container in &mut body.containers {
                container.stop(deadline.saturating_duration_since(Instant::now()));
            }
            if body.enrolled_by.is_some()
                && let Err(error) = self.call(Method::DELETE, "?mode=deleted", "")
            {
                tracing::warn!(pod = %self.birth.wanted.key, error, "the agent was not told that a pod is gone");
            }
        }
        if let Err(error) = self.birth.group.destroy() {
            tracing::warn!(pod = %self.birth.wanted.key, %error, "processes of a pod are left");
        }
        let _ = fs::remove_dir_all(self.birth.layout.pod(&self.birth.wanted.key));
        self.observe(|observed| observed.gone = true);
    }
}

/// Containers that are not running, in words; `said` is what one wrote last.
fn unwell(names: &[&str], states: &[State], said: impl Fn(&str) -> Option<String>) -> Option<String> {
    let mut words = Vec::new();
    for (name, state) in names.iter().zip(states) {
        if state.pid.is_none() && state.finished != Some(true) {
            let end = state.last_end.as_deref().unwrap_or("is starting");
            let said = said(name).map(|line| format!(", `{line}`")).unwrap_or_default();
            words.push(format!("container {name}: {end}{said}"));
        }
    }
    (!words.is_empty()).then(|| words.join("; "))
}

/// The last line of a log, as far as it fits on a screen.
fn last_line(path: &std::path::Path) -> Option<String> {
    const TAIL_BYTES: u64 = 300;
    let mut file = fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(io::SeekFrom::Start(length.saturating_sub(TAIL_BYTES))).ok()?;
    let mut tail = Vec::new();
    io::Read::take(file, TAIL_BYTES).read_to_end(&mut tail).ok()?;
    let text = String::from_utf8_lossy(&tail);
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    Some(line.trim().to_owned())
}

/// Writes in place: the file is mounted over `/etc/hosts`, so a new one under its name would not be seen.
fn rewrite(path: &std::path::Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(text.as_bytes())?;
    let end = file.stream_position()?;
    file.set_len(end)
}

/// Environment that every program of a pod has.
pub fn base_environment(path: &str, hostname: &str) -> BTreeMap<String, String> {
    [("PATH", path), ("HOME", "/root"), ("HOSTNAME", hostname)]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_crashed_says_how_it_ended() {
        let state = |pid, last: Option<&str>, finished| {
            let mut state = State::default();
            (state.pid, state.last_end, state.finished) = (pid, last.map(str::to_owned), finished);
            state
        };
        let told = |names: &[&str], states: &[State]| unwell(names, states, |_| Some("boom".to_owned()));
        assert_eq!(told(&["a"], &[state(Some(1), Some("exit status: 1"), None)]), None);
        assert_eq!(told(&["a"], &[state(None, Some("exit status: 0"), Some(true))]), None);
        assert_eq!(
            told(&["a", "b"], &[state(Some(1), None, None), state(None, Some("exit status: 1"), None)])
                .as_deref(),
            Some("container b: exit status: 1, `boom`")
        );
    }

    #[test]
    fn a_shorter_hosts_file_leaves_nothing_of_the_longer_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        fs::write(&path, "a longer text").unwrap();
        rewrite(&path, "short").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "short");
    }
}
