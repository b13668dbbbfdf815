//! Bringing a cluster up, step by step, each with a deadline; and taking it down.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use super::{
    components, images,
    machine::{Lifeline, Machine},
    network,
    plan::{Place, Plan},
    programs,
    state::{self, Index, State},
    unit::{MachineSpec, Request},
};
use crate::shell;

/// Each step takes seconds; a machine that builds other things at the same time takes longer.
const STEP_DEADLINE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(200);
const DNS: &str = include_str!("dns.yaml");

/// Brings the cluster up, or leaves nothing.
///
/// # Errors
/// When a step fails; with the last lines of the program that is to blame.
pub fn up(name: &str, programs: &Path) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut rising = Rising::begin(name, programs)?;
    match rising.rise() {
        Ok(()) => {
            println!("cluster: {name} is up after {} s", began.elapsed().as_secs());
            Ok(())
        }
        Err(error) => {
            drop(rising);
            if let Err(second) = down(name) {
                eprintln!("cluster: {second:#}");
            }
            Err(error)
        }
    }
}

/// A cluster that comes up.
struct Rising {
    programs: PathBuf,
    folder: PathBuf,
    state: State,
    /// The machines end with this process, until they are told to stay.
    lifelines: Vec<Lifeline>,
}

impl Rising {
    fn begin(name: &str, programs: &Path) -> anyhow::Result<Self> {
        let folder = state::folder(name);
        fs::create_dir_all(folder.join("pki")).with_context(|| format!("make {}", folder.display()))?;
        let index = Index::take(&folder)?;
        let state =
            State { name: name.to_owned(), index: index.plan.index, machines: Vec::new(), complete: false };
        let mut rising = Self { programs: programs.to_owned(), folder, state, lifelines: Vec::new() };
        // While the index is held: the first machine takes it over.
        if let Err(error) = rising.build() {
            drop(rising);
            down(name)?;
            return Err(error);
        }
        Ok(rising)
    }

    /// Certificates, machines, network.
    fn build(&mut self) -> anyhow::Result<()> {
        self.state.save()?;
        let plan = self.plan();
        let pki = self.folder.join("pki");
        let order = serde_json::to_vec(&components::certificates(plan, &pki))?;
        fed(programs::command(&self.programs, "pki"), &order).context("make certificates")?;
        for place in plan.places() {
            let spec = self.spec(&place)?;
            let (machine, lifeline) = Machine::start(&spec)?;
            self.lifelines.push(lifeline);
            self.state.machines.push(machine);
            self.state.save()?;
        }
        network::connect(plan, &self.state.machines)
    }

    fn spec(&self, place: &Place) -> anyhow::Result<MachineSpec> {
        let plan = self.plan();
        let cgroup = format!("{}/{}", plan.cgroup(), place.name);
        let mut files = components::files(plan, place, &cgroup);
        for (file, inside) in components::credentials(place) {
            let file = self.folder.join("pki").join(file);
            let content = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            files.insert(inside, content);
        }
        Ok(MachineSpec {
            name: place.name.to_owned(),
            folder: self.folder.join(place.name),
            socket: state::socket(plan, place.name),
            index_file: state::index_file(plan),
            cgroup: cgroup.into(),
            programs: self.programs.clone(),
            links: components::NAMES.iter().map(|name| (*name).to_owned()).collect(),
            files,
            sysctls: components::sysctls(place),
            is_node: place.node.is_some(),
        })
    }

    fn plan(&self) -> Plan {
        self.state.plan()
    }

    /// Programs, images, DNS.
    fn rise(&mut self) -> anyhow::Result<()> {
        let plan = self.plan();
        let control = self.state.machines[0].clone();
        for node in self.state.nodes() {
            node.run(components::containerd())?;
        }
        control.run(components::etcd())?;
        control.run(components::api_server(plan))?;
        fs::copy(self.folder.join("pki/admin.kubeconfig"), state::kubeconfig(&self.state.name))?;
        self.load_images()?;
        self.wait("the API server", || self.kubectl(&["get", "--raw", "/readyz"]).map(drop))?;
        control.run(components::controller_manager())?;
        control.run(components::scheduler())?;
        for (place, node) in plan.places().iter().skip(1).zip(self.state.nodes()) {
            node.run(components::kubelet(place))?;
            node.run(components::proxy(plan, place))?;
        }
        let dns = DNS
            .replace("DNS_ADDRESS", &plan.dns().to_string())
            .replace("COREDNS_IMAGE", components::COREDNS_IMAGE);
        self.wait("cluster DNS to be written", || self.apply(&dns))?;
        self.wait("the nodes to be ready", || self.nodes_are_ready())?;
        self.wait("cluster DNS", || self.dns_is_ready())?;
        for machine in &self.state.machines {
            machine.ask(&Request::Adopt)?;
        }
        self.state.complete = true;
        self.state.save()
    }

    fn load_images(&self) -> anyhow::Result<()> {
        let archives = images::own(&self.programs, &self.folder)?;
        for node in self.state.nodes() {
            self.wait("containerd", || images::answers(node))?;
            for archive in &archives {
                images::load(node, archive)?;
            }
        }
        Ok(())
    }

    fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let kubeconfig = state::kubeconfig(&self.state.name);
        shell::output(programs::kubectl(&self.programs, &kubeconfig).args(arguments))
    }

    fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let mut kubectl = programs::kubectl(&self.programs, &state::kubeconfig(&self.state.name));
        kubectl.args(["apply", "-f", "-"]);
        fed(kubectl, yaml.as_bytes())
    }

    fn nodes_are_ready(&self) -> anyhow::Result<()> {
        let nodes: serde_json::Value = serde_json::from_str(&self.kubectl(&["get", "nodes", "-o", "json"])?)?;
        let waiting = unready(&nodes, self.state.nodes().len());
        ensure!(waiting.is_empty(), "{}", waiting.join(", "));
        Ok(())
    }

    fn dns_is_ready(&self) -> anyhow::Result<()> {
        let path = "jsonpath={.status.readyReplicas}";
        let ready = self.kubectl(&["-n", "kube-system", "get", "deployment", "coredns", "-o", path])?;
        ensure!(ready.trim() == "1", "CoreDNS is not ready");
        Ok(())
    }

    /// Looks until `look` succeeds. Ends at once when a program has ended by itself more than once.
    fn wait(&self, what: &str, look: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let Err(reason) = look() else {
                println!("cluster: {what}: {:.1} s", began.elapsed().as_secs_f32());
                return Ok(());
            };
            let failing = self.failing()?;
            if failing.iter().any(|program| program.hopeless) {
                bail!("{what} did not come: {reason:#}{}", told(&failing));
            }
            if began.elapsed() > STEP_DEADLINE {
                bail!("{what} did not come within {STEP_DEADLINE:?}: {reason:#}{}", told(&failing));
            }
            thread::sleep(PAUSE);
        }
    }

    fn failing(&self) -> anyhow::Result<Vec<Failing>> {
        let mut failing = Vec::new();
        for machine in &self.state.machines {
            for (name, health) in machine.ask(&Request::Status)? {
                let Some(how) = health.last_end else { continue };
                let log = machine.log(&name);
                let place = machine.name.clone();
                // Some end once because another is not there yet.
                failing.push(Failing { hopeless: health.ended >= TOO_OFTEN, place, name, how, log });
            }
        }
        Ok(failing)
    }
}

/// Ends by itself that are no start-up trouble any more.
const TOO_OFTEN: u32 = 5;

/// A program that ended by itself.
struct Failing {
    place: String,
    name: String,
    how: String,
    log: String,
    hopeless: bool,
}

fn told(failing: &[Failing]) -> String {
    let one = |Failing { place, name, how, log, .. }: &Failing| format!("\n{name} on {place}: {how}{log}");
    failing.iter().map(one).collect()
}

/// (pure) What is missing until `count` nodes are ready.
fn unready(nodes: &serde_json::Value, count: usize) -> Vec<String> {
    let items = nodes["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut waiting: Vec<String> = items
        .iter()
        .filter_map(|node| {
            let conditions = node["status"]["conditions"].as_array()?;
            let ready = conditions.iter().find(|condition| condition["type"] == "Ready")?;
            let name = node["metadata"]["name"].as_str().unwrap_or_default();
            (ready["status"] != "True").then(|| format!("{name}: {}", ready["message"]))
        })
        .collect();
    if items.len() < count {
        waiting.push(format!("{} of {count} nodes have registered", items.len()));
    }
    waiting
}

/// Runs a program that reads `input`.
///
/// # Errors
/// When it fails; with what it wrote to standard error.
pub fn fed(mut command: Command, input: &[u8]) -> anyhow::Result<()> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {}", shell::shown(&command)))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why.
        let _ = stdin.write_all(input);
    }
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Takes a cluster down; also one that did not come up, or of which parts are gone.
///
/// # Errors
/// When something of it stays.
pub fn down(name: &str) -> anyhow::Result<()> {
    let folder = state::folder(name);
    if let Some(state) = State::load(name)? {
        for machine in &state.machines {
            machine.end()?;
        }
        state::sweep(state.plan())?;
        state::release(state.plan())?;
    }
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Starts the program again that a machine of a running cluster was told to stop.
///
/// # Errors
/// When there is no such program, or it does not start.
pub fn start(state: &State, machine: &str, program: &str) -> anyhow::Result<()> {
    state.machine(machine)?.ask(&Request::Restart(program.to_owned())).map(drop)
}

/// Stops a program of a running cluster, with a signal.
///
/// # Errors
/// When there is no such program.
pub fn stop(state: &State, machine: &str, program: &str, signal: i32) -> anyhow::Result<()> {
    state.machine(machine)?.ask(&Request::Stop(program.to_owned(), signal)).map(drop)
}

/// How the programs of a cluster are: place and program to health.
///
/// # Errors
/// When a machine does not answer.
pub fn health(state: &State) -> anyhow::Result<BTreeMap<(String, String), super::unit::Health>> {
    let mut all = BTreeMap::new();
    for machine in &state.machines {
        let programs = machine.ask(&Request::Status)?;
        all.extend(programs.into_iter().map(|(name, health)| ((machine.name.clone(), name), health)));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nodes_are_ready_when_all_say_so() {
        let node = |name: &str, ready: &str| {
            let conditions = json!([{"type": "Ready", "status": ready, "message": "why"}]);
            json!({"metadata": {"name": name}, "status": {"conditions": conditions}})
        };
        let nodes = |items: &[serde_json::Value]| json!({"items": items});
        assert!(unready(&nodes(&[node("a", "True"), node("b", "True")]), 2).is_empty());
        assert_eq!(unready(&nodes(&[node("a", "True"), node("b", "False")]), 2), ["b: \"why\""]);
        assert_eq!(unready(&nodes(&[node("a", "True")]), 2), ["1 of 2 nodes have registered"]);
        assert_eq!(unready(&json!({}), 2).len(), 1);
    }
}
