//! How the mesh of a cluster is: what the API server, every control plane and every agent say, put together.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use futures_util::stream::{self, StreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::wait::{self, Component};
use crate::{
    cluster::Cluster,
    output::columns,
    waypoint::{self, Waypoint},
};

/// So many processes are asked at once.
const AT_ONCE: usize = 16;

/// The mesh of a cluster as it is now.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    /// Where it is installed.
    pub namespace: String,
    /// Everything that is written holds everywhere.
    pub in_force: bool,
    /// What is not in force, and why.
    pub waiting: Vec<String>,
    /// What is wrong with objects, as the control plane sees it.
    pub problems: Vec<Problem>,
    /// Replicas of the control plane.
    pub control: Vec<Process>,
    /// Agents.
    pub nodes: Vec<Process>,
    /// Pods that the agents know.
    pub workloads: Vec<Workload>,
    /// Gateways of our classes.
    pub waypoints: Vec<Waypoint>,
}

/// A pod of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    /// The pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// The version that it runs.
    pub version: String,
    /// It is ready.
    pub ready: bool,
    /// Why not.
    pub why: String,
}

/// A pod of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Workload {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// What the agent makes of it.
    pub state: String,
    /// What it proves.
    pub identity: Option<String>,
    /// Why the state is not `serving`.
    pub why: Option<String>,
}

/// What is wrong with an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Problem {
    /// The object.
    pub object: String,
    /// Path of the field.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// How bad.
    pub severity: String,
}

/// What a control plane answers to `/status`, as far as it is of interest here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Answer {
    revision: u64,
    why: Vec<String>,
    problems: Vec<Problem>,
    proxies: Vec<Proxy>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Proxy {
    id: String,
    expected: bool,
    connected: bool,
    acked_revision: Option<u64>,
    nacks: Vec<Nack>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Nack {
    name: String,
    reason: String,
}

/// Asks everybody.
///
/// # Errors
/// When the API server does not answer.
pub async fn gather(cluster: &Cluster, namespace: &str) -> anyhow::Result<Status> {
    let mut status = Status { namespace: namespace.to_owned(), ..Status::default() };
    for component in [wait::CONTROL, wait::NODE] {
        let now = wait::look(cluster, namespace, component).await?;
        if now.wanted == 0 {
            status.waiting.push(format!("{}: not installed in {namespace}", component.title));
        } else if !now.done() {
            status.waiting.push(format!("{}: {} of {} ready", component.title, now.ready, now.wanted));
        }
        let pods = wait::pods(cluster, namespace, component).await?;
        let mut processes: Vec<Process> = pods.iter().map(process).collect();
        for trouble in now.troubles {
            if let Some(process) = processes.iter_mut().find(|process| process.pod == trouble.pod) {
                process.why = format!("{} {}", trouble.reason, trouble.message).trim().to_owned();
            }
        }
        let to = if component.name == wait::CONTROL.name { &mut status.control } else { &mut status.nodes };
        *to = processes;
    }
    let control = ask_all(cluster, namespace, wait::CONTROL, &status.control, "/status").await;
    let mut answers: Vec<Answer> = Vec::new();
    for (process, answer) in control {
        match answer.and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string())) {
            Ok(answer) => answers.push(answer),
            Err(why) => status.waiting.push(format!("control plane {}: {why}", process.pod)),
        }
    }
    let (waiting, problems) = merge(&answers);
    status.waiting.extend(waiting);
    status.problems = problems;
    for (process, answer) in ask_all(cluster, namespace, wait::NODE, &status.nodes, "/pods").await {
        match answer
            .and_then(|text| serde_json::from_str::<Vec<Workload>>(&text).map_err(|error| error.to_string()))
        {
            Ok(pods) => status
                .workloads
                .extend(pods.into_iter().map(|pod| Workload { node: process.node.clone(), ..pod })),
            Err(why) => status.waiting.push(format!("agent of {}: {why}", process.node)),
        }
    }
    status.workloads.sort();
    let pending = status.workloads.iter().filter(|pod| !matches!(pod.state.as_str(), "serving" | "leaving"));
    status.waiting.extend(pending.map(|pod| {
        let why = pod.why.as_deref().unwrap_or_default();
        format!("pod {}/{}: {}: {why}", pod.namespace, pod.name, pod.state)
    }));
    status.waypoints = waypoint::list(cluster, None).await?;
    let down = status.waypoints.iter().filter(|waypoint| !waypoint.is_programmed());
    status.waiting.extend(down.map(|one| format!("Gateway {}/{}: {}", one.namespace, one.name, one.why)));
    status.in_force = status.waiting.is_empty();
    Ok(status)
}

async fn ask_all(
    cluster: &Cluster,
    namespace: &str,
    component: Component,
    processes: &[Process],
    path: &str,
) -> Vec<(Process, Result<String, String>)> {
    let ask = |process: Process| async move {
        let command = [component.program, "ask", path];
        let answer = cluster.exec((namespace, &process.pod), component.container, &command).await;
        (process, answer.map_err(|error| error.to_string()))
    };
    stream::iter(processes.to_vec()).map(ask).buffer_unordered(AT_ONCE).collect().await
}

/// (pure) A pod of ours.
fn process(pod: &Value) -> Process {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let conditions = pod["status"]["conditions"].as_array();
    let ready = conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    Process {
        pod: text(&pod["metadata"]["name"]),
        node: text(&pod["spec"]["nodeName"]),
        version: text(&pod["metadata"]["labels"]["app.kubernetes.io/version"]),
        ready,
        why: String::new(),
    }
}

/// (pure) What several control planes say as one: each knows only the proxies that are connected to it.
fn merge(answers: &[Answer]) -> (Vec<String>, Vec<Problem>) {
    let mut proxies: BTreeMap<&str, (Option<&Proxy>, u64)> = BTreeMap::new();
    for answer in answers {
        for proxy in answer.proxies.iter().filter(|proxy| proxy.expected) {
            let known = proxies.entry(&proxy.id).or_insert((None, answer.revision));
            if proxy.connected {
                *known = (Some(proxy), answer.revision);
            }
        }
    }
    let mut waiting = Vec::new();
    for (id, (proxy, revision)) in &proxies {
        match proxy {
            None => waiting.push(format!("{id} is not connected")),
            Some(proxy) => {
                let nacks = proxy.nacks.iter();
                waiting.extend(nacks.map(|nack| format!("{id} rejected {}: {}", nack.name, nack.reason)));
                if proxy.acked_revision.is_none_or(|acked| acked < *revision) && proxy.nacks.is_empty() {
                    waiting.push(format!("{id} has not acknowledged revision {revision} yet"));
                }
            }
        }
    }
    // What is no proxy's business is the same for all of them.
    let others = answers.first().map(|answer| answer.why.as_slice()).unwrap_or_default();
    let others = others.iter().filter(|line| !proxies.keys().any(|id| line.starts_with(id)));
    waiting.extend(others.cloned());
    let problems: BTreeSet<Problem> =
        answers.iter().flat_map(|answer| answer.problems.iter().cloned()).collect();
    (waiting, problems.into_iter().collect())
}

impl Status {
    /// For people.
    pub fn table(&self) -> String {
        let word = if self.in_force { "in force" } else { "NOT in force" };
        let mut out = format!("mesh in {}: {word}\n", self.namespace);
        let rows = |processes: &[Process]| {
            let row = |one: &Process| {
                let state = if one.ready { "ready" } else { "not ready" };
                [one.pod.clone(), one.node.clone(), one.version.clone(), state.to_owned(), one.why.clone()]
            };
            processes.iter().map(row).collect::<Vec<_>>()
        };
        let head = |title| [title, "NODE", "VERSION", "STATE", "WHY"];
        out += &columns(head("CONTROL PLANE"), rows(&self.control).into_iter());
        out += &columns(head("AGENT"), rows(&self.nodes).into_iter());
        let gateways = self.waypoints.iter().map(|one| {
            let name = format!("{}/{}", one.namespace, one.name);
            [name, one.class.clone(), one.programmed.clone(), one.why.clone()]
        });
        out += &columns(["GATEWAY", "CLASS", "PROGRAMMED", "WHY"], gateways);
        let workloads = self.workloads.iter().map(|one| {
            let name = format!("{}/{}", one.namespace, one.name);
            let identity = one.identity.clone().unwrap_or_default();
            [name, one.node.clone(), one.state.clone(), identity, one.why.clone().unwrap_or_default()]
        });
        out += &columns(["POD", "NODE", "STATE", "IDENTITY", "WHY"], workloads);
        // Writing to a String cannot fail.
        for line in &self.waiting {
            let _ = writeln!(out, "waiting: {line}");
        }
        for problem in &self.problems {
            let Problem { object, field, reason, severity } = problem;
            let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
            let _ = writeln!(out, "problem: {severity}: {object}: {field}{reason}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(revision: u64, proxies: Value, why: &[&str]) -> Answer {
        serde_json::from_value(json!({"revision": revision, "proxies": proxies, "why": why})).unwrap()
    }

    fn check(answers: &[Answer], expected: &[&str]) {
        assert_eq!(merge(answers).0, expected);
    }

    #[test]
    fn a_proxy_is_connected_to_one_replica() {
        let here = json!({"id": "node:a", "expected": true, "connected": true, "acked_revision": 3});
        let there = json!({"id": "node:a", "expected": true, "connected": false});
        let without = answer(3, json!([there]), &["node:a is not connected"]);
        check(&[answer(3, json!([here]), &[]), without.clone()], &[]);
        check(&[without.clone(), answer(3, json!([here]), &[])], &[]);
        check(&[without.clone(), without.clone()], &["node:a is not connected"]);
        check(&[answer(4, json!([here]), &[]), without], &["node:a has not acknowledged revision 4 yet"]);
        check(&[], &[]);
    }

    #[test]
    fn rejections_and_what_concerns_no_proxy_are_told_once() {
        let nacks = json!([{"name": "p", "reason": "map full"}]);
        let here =
            json!({"id": "node:a", "expected": true, "connected": true, "acked_revision": 2, "nacks": nacks});
        let other = answer(3, json!([]), &["no waypoint shop/w"]);
        let one = answer(3, json!([here]), &["node:a rejected 1 resources", "no waypoint shop/w"]);
        check(&[one, other], &["node:a rejected p: map full", "no waypoint shop/w"]);
    }
}
