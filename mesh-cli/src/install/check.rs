//! (pure) What stands in the way of an installation, decided from facts about the cluster.

use std::fmt;

use serde::Serialize;

use super::facts::{Facts, NodeFact, Other};

/// Nothing is used on purpose that this kernel lacks; older ones lack several things.
const OLDEST_KERNEL: (u32, u32) = (5, 15);
/// The suites run on this and newer ones.
const TESTED_KERNEL: (u32, u32) = (6, 1);
/// The oldest Kubernetes minor version whose API has all that is used.
const OLDEST_KUBERNETES: u32 = 29;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Fine,
    /// It goes on; somebody should know.
    Warning,
    /// It does not go on.
    Error,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What was looked at.
    pub subject: String,
    /// What was found.
    pub found: String,
    /// What to do.
    pub advice: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.severity {
            Severity::Fine => "ok     ",
            Severity::Warning => "warning",
            Severity::Error => "ERROR  ",
        };
        write!(f, "{mark}  {}: {}", self.subject, self.found)?;
        if !self.advice.is_empty() {
            write!(f, "\n         → {}", self.advice)?;
        }
        Ok(())
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'w> {
    /// Where the mesh is to be.
    pub namespace: &'w str,
    /// Its version.
    pub version: &'w str,
    /// Whether the GatewayClasses `istio` and `istio-waypoint` are wanted.
    pub istio_classes: bool,
    /// Controller of our classes.
    pub controller: &'w str,
}

/// (pure) Everything about the cluster that matters, good and bad.
pub fn findings(facts: &Facts, wish: Wish<'_>) -> Vec<Finding> {
    let mut findings = vec![kubernetes(&facts.kubernetes)];
    findings.push(rights(&facts.denied));
    findings.extend(nodes(&facts.nodes));
    findings.extend(facts.others.iter().map(|other| mesh(other, wish)));
    findings.extend(classes(facts, wish));
    findings.extend(definitions(facts));
    findings.extend(installed(facts, wish));
    findings
}

fn finding(
    severity: Severity,
    subject: &str,
    found: impl Into<String>,
    advice: impl Into<String>,
) -> Finding {
    Finding { severity, subject: subject.to_owned(), found: found.into(), advice: advice.into() }
}

fn kubernetes(version: &str) -> Finding {
    let minor = pair(version).filter(|(major, _)| *major == 1).map(|(_, minor)| minor);
    match minor {
        Some(minor) if minor >= OLDEST_KUBERNETES => finding(Severity::Fine, "Kubernetes", version, ""),
        Some(_) => {
            let advice = format!("1.{OLDEST_KUBERNETES} or newer is needed");
            finding(Severity::Error, "Kubernetes", version, advice)
        }
        None => finding(Severity::Warning, "Kubernetes", format!("{version:?}, which is no version"), ""),
    }
}

fn rights(denied: &[String]) -> Finding {
    if denied.is_empty() {
        return finding(Severity::Fine, "rights", "all that is needed", "");
    }
    let advice = "use an account that may do this, such as cluster-admin";
    finding(Severity::Error, "rights", format!("you may not {}", denied.join(", ")), advice)
}

fn nodes(nodes: &[NodeFact]) -> Vec<Finding> {
    let linux: Vec<&NodeFact> = nodes.iter().filter(|node| node.os == "linux").collect();
    let named = |picked: Vec<&&NodeFact>| {
        let all: Vec<String> = picked.iter().map(|node| format!("{} ({})", node.name, node.kernel)).collect();
        match all.len() {
            0..=5 => all.join(", "),
            more => format!("{} and {} more", all[..5].join(", "), more - 5),
        }
    };
    let below = |limit: (u32, u32)| {
        linux.iter().filter(move |node| pair(&node.kernel).is_some_and(|kernel| kernel < limit))
    };
    let mut findings = Vec::new();
    let (old, untested): (Vec<_>, Vec<_>) = below(TESTED_KERNEL)
        .partition(|node| pair(&node.kernel).is_some_and(|kernel| kernel < OLDEST_KERNEL));
    let words = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    if !old.is_empty() {
        let advice = format!("Linux {} or newer is needed", words(OLDEST_KERNEL));
        findings.push(finding(Severity::Error, "kernel", format!("too old on {}", named(old)), advice));
    }
    if !untested.is_empty() {
        let advice = format!(
            "the suites run on {} and newer; agents say at start what is missing",
            words(TESTED_KERNEL)
        );
        findings.push(finding(Severity::Warning, "kernel", named(untested), advice));
    }
    if findings.is_empty() {
        let found = format!("{} or newer on all {} nodes", words(TESTED_KERNEL), linux.len());
        findings.push(finding(Severity::Fine, "kernel", found, ""));
    }
    let unready: Vec<_> = linux.iter().filter(|node| !node.ready).collect();
    if !unready.is_empty() {
        let advice = "installation waits for the agents of all nodes";
        findings.push(finding(Severity::Warning, "nodes", format!("not ready: {}", named(unready)), advice));
    }
    let foreign: Vec<_> = linux.iter().filter(|node| !node.runtime.starts_with("containerd://")).collect();
    if !foreign.is_empty() {
        let found = format!("not containerd on {}", named(foreign));
        let advice =
            "running pods are found by containerd's records; others are captured when they start anew";
        findings.push(finding(Severity::Warning, "container runtime", found, advice));
    }
    if linux.is_empty() {
        findings.push(finding(Severity::Error, "nodes", "no Linux node", ""));
    }
    findings
}

fn mesh(other: &Other, wish: Wish<'_>) -> Finding {
    let subject = "another mesh";
    match other {
        Other::Istiod { namespace } if wish.istio_classes => finding(
            Severity::Error,
            subject,
            format!("istiod in {namespace}, whose GatewayClasses istio and istio-waypoint are its own"),
            "--set gatewayClasses.istio=false, or remove it first, or --force to claim them",
        ),
        Other::Istiod { namespace } => finding(
            Severity::Warning,
            subject,
            format!("istiod in {namespace}"),
            "do not enrol what has its sidecars",
        ),
        Other::Ztunnel { namespace } => finding(
            Severity::Error,
            subject,
            format!("ztunnel in {namespace}: the label istio.io/dataplane-mode would enrol pods in both"),
            "remove Istio's ambient mode first; --force when no pod carries the label",
        ),
        Other::Linkerd { namespace } => finding(
            Severity::Warning,
            subject,
            format!("Linkerd in {namespace}"),
            "do not enrol what has its sidecars: they would carry each other's connections",
        ),
        Other::Kmesh { namespace } => finding(
            Severity::Error,
            subject,
            format!("Kmesh in {namespace}: its programs decide about the same sockets"),
            "remove it first; --force to go on",
        ),
        Other::Cilium { socket_lb: true, .. } => finding(
            Severity::Error,
            "Cilium",
            "its socket load balancing hides the addresses of services from the mesh",
            "set socketLB.hostNamespaceOnly=true in Cilium's Helm values and restart its agents; --force to go on",
        ),
        Other::Cilium { exclusive: true, .. } => finding(
            Severity::Error,
            "Cilium",
            "it removes other configurations of the container network, ours among them",
            "set cni.exclusive=false in Cilium's Helm values and restart its agents; --force to go on",
        ),
        Other::Cilium { .. } => finding(Severity::Fine, "Cilium", "set as the mesh needs it", ""),
    }
}

fn classes(facts: &Facts, wish: Wish<'_>) -> Vec<Finding> {
    let ours = ["undermesh", "undermesh-waypoint"].into_iter();
    let istio = ["istio", "istio-waypoint"].into_iter().filter(|_| wish.istio_classes);
    let taken = ours.chain(istio).filter_map(|class| {
        let controller = facts.classes.get(class).filter(|controller| *controller != wish.controller)?;
        let advice = match class {
            "istio" | "istio-waypoint" => "--set gatewayClasses.istio=false, or delete that class first",
            _ => "delete that class first",
        };
        let found = format!("{class} belongs to {controller}, and a class cannot change its controller");
        Some(finding(Severity::Error, "GatewayClass", found, advice))
    });
    taken.collect()
}

fn definitions(facts: &Facts) -> Vec<Finding> {
    let notes = facts.definitions.notes.iter();
    let notes = notes.map(|note| finding(Severity::Warning, "definitions", note, ""));
    let problems = facts.definitions.problems.iter();
    notes.chain(problems.map(|problem| finding(Severity::Error, "definitions", problem, ""))).collect()
}

fn installed(facts: &Facts, wish: Wish<'_>) -> Vec<Finding> {
    let each = facts.installed.iter().map(|(namespace, version)| {
        if namespace != wish.namespace {
            let found = format!("{version} in namespace {namespace}");
            let advice =
                format!("--namespace {namespace}, or `meshctl uninstall --namespace {namespace}` first");
            return finding(Severity::Error, "Undermesh", found, advice);
        }
        skew(version, wish.version)
    });
    each.collect()
}

/// Versions may be one minor apart, since agents and control plane of both run side by side for a while.
fn skew(from: &str, to: &str) -> Finding {
    let found = match from == to {
        true => format!("{from} is installed"),
        false => format!("{from} is installed, {to} will be"),
    };
    let (Some(old), Some(new)) = (pair(from), pair(to)) else {
        return finding(Severity::Warning, "Undermesh", found, "a version that cannot be compared");
    };
    let close = old.0 == new.0 && old.1.abs_diff(new.1) <= 1;
    if close {
        return finding(Severity::Fine, "Undermesh", found, "");
    }
    let advice = "go by one minor version at a time; --force to go on";
    finding(Severity::Error, "Undermesh", found, advice)
}

/// The first two numbers of a version.
fn pair(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::install::crds::Decision;

    const WISH: Wish<'_> =
        Wish { namespace: "mesh", version: "0.3.0", istio_classes: true, controller: "undermesh.io/x" };

    fn node(name: &str, kernel: &str) -> NodeFact {
        NodeFact {
            name: name.to_owned(),
            kernel: kernel.to_owned(),
            os: "linux".to_owned(),
            runtime: "containerd://1.6.20".to_owned(),
            ready: true,
        }
    }

    fn healthy() -> Facts {
        Facts {
            kubernetes: "v1.34.1".to_owned(),
            nodes: vec![node("a", "6.18.3-cloud")],
            denied: Vec::new(),
            installed: Vec::new(),
            others: Vec::new(),
            classes: BTreeMap::new(),
            definitions: Decision::default(),
        }
    }

    /// What is not fine, in one line each.
    fn check(change: impl FnOnce(&mut Facts), wish: Wish<'_>, expected: &[&str]) {
        let mut facts = healthy();
        change(&mut facts);
        let bad = findings(&facts, wish).into_iter().filter(|finding| finding.severity != Severity::Fine);
        let bad: Vec<String> = bad
            .map(|finding| {
                let word = if finding.severity == Severity::Error { "E" } else { "W" };
                format!("{word} {}: {}", finding.subject, finding.found)
            })
            .collect();
        assert_eq!(bad, expected);
    }

    #[test]
    fn a_healthy_cluster_has_nothing_in_the_way() {
        check(|_| {}, WISH, &[]);
    }

    #[test]
    fn versions_of_kernel_and_kubernetes() {
        check(|facts| facts.kubernetes = "v1.28.9+k3s1".to_owned(), WISH, &["E Kubernetes: v1.28.9+k3s1"]);
        check(|facts| facts.kubernetes = "?".to_owned(), WISH, &["W Kubernetes: \"?\", which is no version"]);
        check(
            |facts| facts.nodes = vec![node("a", "5.10.0-28-amd64"), node("b", "5.15.0"), node("c", "6.1.0")],
            WISH,
            &["E kernel: too old on a (5.10.0-28-amd64)", "W kernel: b (5.15.0)"],
        );
        check(|facts| facts.nodes[0].ready = false, WISH, &["W nodes: not ready: a (6.18.3-cloud)"]);
        check(
            |facts| facts.nodes[0].runtime = "cri-o://1.34".to_owned(),
            WISH,
            &["W container runtime: not containerd on a (6.18.3-cloud)"],
        );
        check(|facts| facts.nodes[0].os = "windows".to_owned(), WISH, &["E nodes: no Linux node"]);
    }

    #[test]
    fn missing_rights_are_all_named() {
        check(
            |facts| facts.denied = vec!["patch clusterroles".to_owned(), "create secrets in mesh".to_owned()],
            WISH,
            &["E rights: you may not patch clusterroles, create secrets in mesh"],
        );
    }

    #[test]
    fn another_mesh_in_the_way() {
        let istiod = |facts: &mut Facts| {
            facts.others = vec![Other::Istiod { namespace: "istio-system".to_owned() }];
        };
        let without = Wish { istio_classes: false, ..WISH };
        check(
            istiod,
            WISH,
            &[
                "E another mesh: istiod in istio-system, whose GatewayClasses istio and istio-waypoint are its own",
            ],
        );
        check(istiod, without, &["W another mesh: istiod in istio-system"]);
        let cilium = |socket_lb, exclusive| {
            move |facts: &mut Facts| facts.others = vec![Other::Cilium { socket_lb, exclusive }]
        };
        let hides = "E Cilium: its socket load balancing hides the addresses of services from the mesh";
        check(cilium(true, true), WISH, &[hides]);
        let removes = "E Cilium: it removes other configurations of the container network, ours among them";
        check(cilium(false, true), WISH, &[removes]);
        check(cilium(false, false), WISH, &[]);
    }

    #[test]
    fn classes_of_somebody_else() {
        let taken = |facts: &mut Facts| {
            facts.classes = BTreeMap::from([
                ("istio".to_owned(), "istio.io/gateway-controller".to_owned()),
                ("undermesh".to_owned(), WISH.controller.to_owned()),
            ]);
        };
        let expected = "E GatewayClass: istio belongs to istio.io/gateway-controller, and a class cannot change its \
                        controller";
        check(taken, WISH, &[expected]);
        check(taken, Wish { istio_classes: false, ..WISH }, &[]);
    }

    #[test]
    fn what_is_installed_already() {
        let with = |namespace: &str, version: &str| {
            let pair = (namespace.to_owned(), version.to_owned());
            move |facts: &mut Facts| facts.installed = vec![pair]
        };
        check(with("mesh", "0.3.0"), WISH, &[]);
        check(with("mesh", "0.2.9"), WISH, &[]);
        check(with("mesh", "0.4.0"), WISH, &[]);
        check(with("mesh", "0.1.0"), WISH, &["E Undermesh: 0.1.0 is installed, 0.3.0 will be"]);
        check(with("mesh", "1.3.0"), WISH, &["E Undermesh: 1.3.0 is installed, 0.3.0 will be"]);
        check(with("other", "0.3.0"), WISH, &["E Undermesh: 0.3.0 in namespace other"]);
    }
}
