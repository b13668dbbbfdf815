//! Waits until components are ready, and tells meanwhile what they wait for.

use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::Value;

use super::progress::{CRASHES, IMAGE_MISSING, Progress, Trouble, progress};
use crate::cluster::{
    Cluster,
    kinds::{self, Kind},
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// What stays broken in the same way this long is not going to mend itself.
const HOPELESS: Duration = Duration::from_secs(60);
/// Reasons that waiting rarely mends.
const LASTING: &[&str] = &[IMAGE_MISSING, CRASHES, "CreateContainerConfigError", "FailedCreate"];

/// A component of the installation.
#[derive(Clone, Copy, Debug)]
pub struct Component {
    /// For people.
    pub title: &'static str,
    /// Deployment or DaemonSet.
    pub kind: Kind,
    /// Its name, that of its pods' label, too.
    pub name: &'static str,
    /// The container that can be asked why it is not ready.
    pub container: &'static str,
    /// The program in it.
    pub program: &'static str,
}

/// The control plane.
pub const CONTROL: Component = Component {
    title: "control plane",
    kind: kinds::DEPLOYMENT,
    name: "undermesh-control",
    container: "control",
    program: "/usr/local/bin/mesh-control",
};

/// The agents.
pub const NODE: Component = Component {
    title: "agents",
    kind: kinds::DAEMON_SET,
    name: "undermesh-node",
    container: "node",
    program: "/usr/local/bin/mesh-node",
};

/// Looks at a component.
///
/// # Errors
/// What the server says.
pub async fn look(cluster: &Cluster, namespace: &str, component: Component) -> anyhow::Result<Progress> {
    let Some(workload) = cluster.get(component.kind, Some(namespace), component.name).await? else {
        return Ok(Progress::default());
    };
    let pods = pods(cluster, namespace, component).await?;
    let events = cluster.list(kinds::EVENT, Some(namespace), "").await?;
    let mut events: Vec<Value> = events.into_iter().filter(|event| event["type"] == "Warning").collect();
    events.sort_by_key(|event| event["lastTimestamp"].as_str().unwrap_or_default().to_owned());
    Ok(progress(&workload, &pods, &events))
}

/// The component's pods.
///
/// # Errors
/// What the server says.
pub async fn pods(cluster: &Cluster, namespace: &str, component: Component) -> anyhow::Result<Vec<Value>> {
    let label = format!("app.kubernetes.io/name={}", component.name);
    Ok(cluster.list(kinds::POD, Some(namespace), &label).await?)
}

/// Waits until it is ready.
///
/// # Errors
/// When it is not by the deadline, or is not going to be; with what keeps it.
pub async fn ready(
    cluster: &Cluster,
    namespace: &str,
    component: Component,
    deadline: Instant,
) -> anyhow::Result<()> {
    let mut told = String::new();
    let mut lasting: Option<(Vec<Trouble>, Instant)> = None;
    loop {
        let mut now = look(cluster, namespace, component).await?;
        if now.done() {
            println!("{}: {} of {} ready", component.title, now.ready, now.wanted);
            return Ok(());
        }
        let text = describe(component, &now);
        if text != told {
            println!("{text}");
            told = text;
        }
        lasting = stuck(lasting, &now.troubles, Instant::now());
        let hopeless = lasting.as_ref().is_some_and(|(_, since)| since.elapsed() >= HOPELESS);
        if hopeless || Instant::now() >= deadline {
            ask(cluster, namespace, component, &mut now.troubles).await;
            let advice = format!(
                "mended? the same command goes on from here; logs: kubectl -n {namespace} logs -l \
                 app.kubernetes.io/name={} --prefix",
                component.name
            );
            bail!("{}\n{advice}", describe(component, &now));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// (pure) For people.
fn describe(component: Component, now: &Progress) -> String {
    let mut text = format!("{}: {} of {} ready", component.title, now.ready, now.wanted);
    for trouble in &now.troubles {
        text += &format!("\n  {trouble}");
    }
    text
}

/// (pure) Since when the same pods have been broken in a way that lasts.
fn stuck(
    before: Option<(Vec<Trouble>, Instant)>,
    troubles: &[Trouble],
    now: Instant,
) -> Option<(Vec<Trouble>, Instant)> {
    let lasting = troubles.iter().filter(|trouble| LASTING.contains(&trouble.reason.as_str()));
    // Messages vary while nothing changes: only who is concerned counts.
    let lasting: Vec<Trouble> =
        lasting.map(|trouble| Trouble { message: String::new(), ..trouble.clone() }).collect();
    match before {
        _ if lasting.is_empty() => None,
        Some((then, since)) if then == lasting => Some((then, since)),
        _ => Some((lasting, now)),
    }
}

/// Asks those that run why they are not ready.
async fn ask(cluster: &Cluster, namespace: &str, component: Component, troubles: &mut [Trouble]) {
    for trouble in troubles.iter_mut().filter(|trouble| trouble.reason == "not ready") {
        let command = [component.program, "ask", "/healthz/ready"];
        let asked = cluster.exec((namespace, &trouble.pod), component.container, &command).await;
        trouble.message = match asked {
            Ok(said) => said.trim().to_owned(),
            Err(error) => error.to_string(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lasts_unchanged_is_hopeless() {
        let trouble = |pod: &str, reason: &str| Trouble {
            pod: pod.to_owned(),
            node: String::new(),
            reason: reason.to_owned(),
            message: "m".to_owned(),
            advice: String::new(),
        };
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        assert!(stuck(None, &[trouble("a", "not ready")], start).is_none());
        let first = stuck(None, &[trouble("a", IMAGE_MISSING)], start);
        let same = stuck(first.clone(), &[trouble("a", IMAGE_MISSING)], later).unwrap();
        assert_eq!(same.1, start);
        let other = stuck(first.clone(), &[trouble("b", IMAGE_MISSING)], later).unwrap();
        assert_eq!(other.1, later);
        assert!(stuck(first, &[], later).is_none());
    }
}
