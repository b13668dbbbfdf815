//! (pure) How far a component is, and what keeps it: from its Deployment or DaemonSet, its pods and their events.

use serde::Serialize;
use serde_json::Value;

/// An image cannot be had.
pub const IMAGE_MISSING: &str = "image missing";
/// A container ends again and again.
pub const CRASHES: &str = "crashes";

/// How far a component is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Pods that are ready and of the newest kind.
    pub ready: u64,
    /// Pods that there should be.
    pub wanted: u64,
    /// The controller has seen the newest specification.
    pub observed: bool,
    /// What keeps pods from being ready.
    pub troubles: Vec<Trouble>,
}

/// What keeps one pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Trouble {
    /// Which pod, or the component when it has none.
    pub pod: String,
    /// Where it runs.
    pub node: String,
    /// Kubernetes' word for it.
    pub reason: String,
    /// What is known about it.
    pub message: String,
    /// What to do; may be empty.
    pub advice: String,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.pod)?;
        if !self.node.is_empty() {
            write!(f, " on {}", self.node)?;
        }
        write!(f, ": {}", self.reason)?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        if !self.advice.is_empty() {
            write!(f, "\n         → {}", self.advice)?;
        }
        Ok(())
    }
}

impl Progress {
    /// Everything is there.
    pub fn done(&self) -> bool {
        self.observed && self.ready >= self.wanted && self.wanted > 0
    }
}

/// (pure) Judges a Deployment or DaemonSet. `events` are warnings of the namespace.
pub fn progress(workload: &Value, pods: &[Value], events: &[Value]) -> Progress {
    let (metadata, status) = (&workload["metadata"], &workload["status"]);
    let number = |field: &str| status[field].as_u64().unwrap_or(0);
    let (wanted, updated, ready) = if workload["kind"] == "DaemonSet" {
        (number("desiredNumberScheduled"), number("updatedNumberScheduled"), number("numberReady"))
    } else {
        let wanted = workload["spec"]["replicas"].as_u64().unwrap_or(1);
        // Old replicas that still run would hide that no new one is ready.
        let surplus = number("replicas").saturating_sub(number("updatedReplicas"));
        (wanted, number("updatedReplicas"), number("readyReplicas").saturating_sub(surplus))
    };
    let generation = metadata["generation"].as_u64().unwrap_or(0);
    let mut troubles: Vec<Trouble> = pods.iter().filter_map(|pod| trouble(pod, events)).collect();
    if pods.is_empty() {
        troubles.extend(no_pods(workload, events));
    }
    troubles.sort();
    Progress {
        ready: ready.min(updated),
        wanted,
        observed: number("observedGeneration") >= generation,
        troubles,
    }
}

/// Why there is not one pod.
fn no_pods(workload: &Value, events: &[Value]) -> Option<Trouble> {
    let name = text(&workload["metadata"]["name"]);
    let conditions = workload["status"]["conditions"].as_array();
    let failure = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == "ReplicaFailure" && condition["status"] == "True");
    let (reason, message) = match failure {
        Some(condition) => (text(&condition["reason"]), text(&condition["message"])),
        None => {
            let event = events.iter().rfind(|event| event["involvedObject"]["name"] == name.as_str())?;
            (text(&event["reason"]), text(&event["message"]))
        }
    };
    let advice = match message.contains("PodSecurity") {
        true => "the namespace needs the label pod-security.kubernetes.io/enforce=privileged".to_owned(),
        false => String::new(),
    };
    Some(Trouble { pod: name, node: String::new(), reason, message, advice })
}

/// (pure) What keeps a pod; none when it is ready, or nothing is known yet.
pub fn trouble(pod: &Value, events: &[Value]) -> Option<Trouble> {
    let status = &pod["status"];
    let conditions = || status["conditions"].as_array().into_iter().flatten();
    let holds = |kind: &str, value: &str| {
        conditions().find(|condition| condition["type"] == kind && condition["status"] == value)
    };
    if holds("Ready", "True").is_some() || !pod["metadata"]["deletionTimestamp"].is_null() {
        return None;
    }
    let named = |reason: String, message: String, advice: &str| {
        Some(Trouble {
            pod: text(&pod["metadata"]["name"]),
            node: text(&pod["spec"]["nodeName"]),
            reason,
            message,
            advice: advice.to_owned(),
        })
    };
    if let Some(unscheduled) = holds("PodScheduled", "False") {
        return named("not scheduled".to_owned(), text(&unscheduled["message"]), "");
    }
    let containers = status["containerStatuses"].as_array().into_iter().flatten();
    for container in containers {
        let waiting = &container["state"]["waiting"];
        let (reason, message) = (text(&waiting["reason"]), text(&waiting["message"]));
        let image = text(&container["image"]);
        match reason.as_str() {
            // Kubernetes takes turns between these words while nothing changes.
            "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName" => {
                let advice = "it must be in a registry that the node reaches (image.registry, image.tag, image.pullSecrets), \
                     or loaded into the node's container runtime";
                let cause = message.rsplit(": ").next().unwrap_or_default().to_owned();
                return named(IMAGE_MISSING.to_owned(), format!("{image}: {cause}"), advice);
            }
            "CrashLoopBackOff" => return named(CRASHES.to_owned(), last_words(container), ""),
            "" | "ContainerCreating" | "PodInitializing" => {}
            _ => return named(reason, message, ""),
        }
        if !container["state"]["terminated"].is_null() {
            return named(CRASHES.to_owned(), last_words(container), "");
        }
    }
    let about = |event: &&Value| {
        // `Failed` says less than the container's state does.
        let telling = event["reason"] != "Unhealthy" && event["reason"] != "Failed";
        event["involvedObject"]["uid"] == pod["metadata"]["uid"] && telling
    };
    let first = &status["containerStatuses"][0];
    let started = first["started"] == true;
    if first["restartCount"].as_u64().is_some_and(|count| count > 0)
        && !first["lastState"]["terminated"].is_null()
    {
        return named(CRASHES.to_owned(), last_words(first), "");
    }
    match events.iter().rfind(about).filter(|_| !started) {
        Some(event) => named(text(&event["reason"]), text(&event["message"]), ""),
        None if status["phase"] == "Running" => named("not ready".to_owned(), String::new(), ""),
        None => None,
    }
}

/// What a container said last before it ended: ours end with the reason, after a wrong flag with a hint.
fn last_words(container: &Value) -> String {
    let ended = [&container["state"]["terminated"], &container["lastState"]["terminated"]];
    let ended = ended.into_iter().find(|ended| !ended.is_null());
    let Some(ended) = ended else { return String::new() };
    let message = text(&ended["message"]);
    let mut lines = message.lines().rev().filter(|line| !line.trim().is_empty());
    let line = lines.clone().find(|line| line.starts_with("error: ")).or_else(|| lines.next());
    match line {
        Some(line) => line.trim().to_owned(),
        None => format!("exit code {}", ended["exitCode"]),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(status: Value) -> Value {
        json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"nodeName": "n"}, "status": status})
    }

    fn check(status: Value, events: &[Value], expected: Option<&str>) {
        let found = trouble(&pod(status.clone()), events).map(|trouble| trouble.to_string());
        let first = found.as_deref().and_then(|text| text.lines().next());
        assert_eq!(first, expected, "{status}");
    }

    #[test]
    fn what_keeps_a_pod_is_named() {
        let ready = |value: &str| json!([{"type": "Ready", "status": value}]);
        check(json!({"conditions": ready("True")}), &[], None);
        check(json!({"phase": "Pending"}), &[], None);
        let waiting = |reason: &str, message: &str| json!({"containerStatuses": [{"image": "x/node:1", "state": {"waiting": {"reason": reason, "message": message}}}]});
        check(
            waiting("ErrImagePull", "failed to pull: not found"),
            &[],
            Some("p on n: image missing: x/node:1: not found"),
        );
        check(waiting("ContainerCreating", ""), &[], None);
        check(waiting("CreateContainerError", "no"), &[], Some("p on n: CreateContainerError: no"));
        let crashed = json!({"containerStatuses": [{
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "message": "a line\nmesh-node: no bpffs at /sys/fs/bpf\n"}},
        }]});
        check(crashed, &[], Some("p on n: crashes: mesh-node: no bpffs at /sys/fs/bpf"));
        let usage = json!({"containerStatuses": [{"restartCount": 1, "started": true, "state": {"running": {}},
            "lastState": {"terminated": {"message": "error: unexpected argument\n\nFor more information, try '--help'.\n"}},
        }]});
        check(usage, &[], Some("p on n: crashes: error: unexpected argument"));
        let silent = json!({"containerStatuses": [{"state": {"terminated": {"exitCode": 137}}}]});
        check(silent, &[], Some("p on n: crashes: exit code 137"));
        let unscheduled =
            json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes"}]});
        check(unscheduled, &[], Some("p on n: not scheduled: 0/2 nodes"));
        let running =
            json!({"phase": "Running", "containerStatuses": [{"started": true, "state": {"running": {}}}]});
        check(running, &[], Some("p on n: not ready"));
    }

    #[test]
    fn events_say_what_the_status_does_not() {
        let event = |reason: &str, uid: &str| json!({"involvedObject": {"uid": uid}, "reason": reason, "message": "m"});
        let creating =
            json!({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]});
        check(creating.clone(), &[event("FailedMount", "u")], Some("p on n: FailedMount: m"));
        check(creating, &[event("FailedMount", "other"), event("Unhealthy", "u")], None);
    }

    #[test]
    fn no_pod_at_all() {
        let set = json!({"kind": "DaemonSet", "metadata": {"name": "d", "generation": 1}, "status": {}});
        let event = json!({
            "involvedObject": {"name": "d"}, "reason": "FailedCreate",
            "message": "violates PodSecurity \"restricted:latest\"",
        });
        let found = progress(&set, &[], &[event]);
        assert!(!found.done());
        assert!(found.troubles[0].to_string().contains("pod-security.kubernetes.io/enforce=privileged"));
    }

    #[test]
    fn old_pods_do_not_count() {
        let deployment = |status: Value| {
            let object = json!({"kind": "Deployment", "metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": status});
            progress(&object, &[pod(json!({"phase": "Pending"}))], &[]).done()
        };
        let status = |observed: u64, replicas: u64, updated: u64, ready: u64| json!({"observedGeneration": observed, "replicas": replicas, "updatedReplicas": updated, "readyReplicas": ready});
        assert!(deployment(status(2, 2, 2, 2)));
        assert!(!deployment(status(1, 2, 2, 2)));
        assert!(!deployment(status(2, 3, 1, 3)));
        assert!(!deployment(status(2, 3, 2, 2)));
        assert!(!deployment(json!({})));
    }
}
