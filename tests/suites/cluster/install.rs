//! In with one command, out with one, and nothing stays.

use std::{collections::BTreeSet, fs, time::SystemTime};

use anyhow::{Context as _, ensure};
use mesh_control::ca::root::Root;
use mesh_tests::{
    cluster::{Cluster, MESH_NAMESPACE, meshctl},
    peer::ping,
    wait,
};

use crate::{paths::Trio, story};

/// Installs, with what a cluster of ours needs to be told.
fn installed(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<()> {
    let set = cluster.kubelet_cgroup().map(|cgroup| format!("node.kubeletCgroup={cgroup}"));
    let set: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
    meshctl(&[&["install"], arguments, &set].concat())?;
    for node in &cluster.nodes()? {
        let agent = cluster.agent(node)?;
        ensure!(agent.ready, "{} is not ready", agent.name);
    }
    Ok(())
}

fn own_pods(cluster: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    Ok(cluster.pods(MESH_NAMESPACE)?.into_iter().map(|pod| pod.uid).collect())
}

/// The mesh comes in, on every node; doing it again changes nothing.
pub fn install(cluster: &Cluster) -> anyhow::Result<()> {
    installed(cluster, &[])?;
    let before = own_pods(cluster)?;
    installed(cluster, &[])?;
    ensure!(before == own_pods(cluster)?, "installing again replaced pods");
    Ok(())
}

/// Every process is replaced, what was set stays set, and a connection of one node does not notice.
pub fn upgrade(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    let trio = Trio::up(cluster)?;
    let before = own_pods(cluster)?;
    let (_, mut held) = trio.reach(*trio.near.addresses.last().context("an address")?)?;
    meshctl(&["upgrade", "--set", "log.level=debug"])?;
    ensure!(before.is_disjoint(&own_pods(cluster)?), "a process of before still runs");
    ping(&mut held, b"as before").context("a connection on one node")?;
    for to in trio.near.addresses.iter().chain(&trio.far.addresses) {
        trio.reach(*to)?;
    }
    let agents = cluster.run(&["-n", MESH_NAMESPACE, "get", "daemonset", "undermesh-node", "-o", "yaml"])?;
    let kept = cluster.kubelet_cgroup().context("a cluster of ours")?;
    ensure!(agents.contains(&kept) && agents.contains("debug"), "settings are lost: {agents}");
    meshctl(&["upgrade", "--set", "log.level=info"])?;
    trio.down()
}

/// The other profiles; the first under a root of the operator's own.
pub fn profiles(cluster: &Cluster) -> anyhow::Result<()> {
    let root = Root::generate(SystemTime::now())?;
    cluster.run(&["create", "namespace", MESH_NAMESPACE])?;
    let label = "pod-security.kubernetes.io/enforce";
    cluster.run(&["label", "namespace", MESH_NAMESPACE, &format!("{label}=baseline"), "owner=them"])?;
    let files = [
        ("ca-cert", &root.certificate),
        ("ca-key", &root.key),
        ("cert-chain", &root.certificate),
        ("root-cert", &root.certificate),
    ];
    let literals: Vec<String> =
        files.iter().map(|(name, text)| format!("--from-literal={name}.pem={text}")).collect();
    let create = ["-n", MESH_NAMESPACE, "create", "secret", "generic", "cacerts"];
    cluster.run(&create.into_iter().chain(literals.iter().map(String::as_str)).collect::<Vec<_>>())?;
    installed(cluster, &["--profile", "minimal"])?;
    let trusted = cluster.json(&["-n", MESH_NAMESPACE, "get", "configmap", "undermesh-ca-root"])?;
    ensure!(trusted["data"]["root-cert.pem"] == *root.certificate, "not the operator's root: {trusted}");
    let made = cluster.run(&["-n", MESH_NAMESPACE, "get", "secret", "undermesh-ca", "--ignore-not-found"])?;
    ensure!(made.trim().is_empty(), "a root was made beside the operator's: {made}");
    let classes = cluster.run(&["get", "gatewayclass", "-o", "name"])?;
    ensure!(
        classes.contains("undermesh-waypoint") && !classes.contains("/istio"),
        "classes of minimal: {classes}"
    );
    if cluster.is_own() {
        let trio = Trio::up(cluster)?;
        for to in &trio.far.addresses {
            trio.reach(*to).context("across nodes, under the operator's root")?;
        }
        trio.down()?;
    }
    meshctl(&["uninstall"])?;
    cluster
        .run(&["-n", MESH_NAMESPACE, "get", "secret", "cacerts"])
        .context("uninstall took what is the operator's")?;
    let labels = &cluster.json(&["get", "namespace", MESH_NAMESPACE])?["metadata"]["labels"];
    ensure!(
        labels[label] == "baseline"
            && labels["owner"] == "them"
            && labels["istio.io/dataplane-mode"].is_null(),
        "the namespace's labels are not as they were: {labels}"
    );
    cluster.delete_namespaces(&[MESH_NAMESPACE])?;

    // As Helm puts it in: nothing in the cluster remembers how.
    let objects = meshctl(&["install", "--dry-run", "--profile", "demo"])?;
    cluster.apply(&objects)?;
    let rollout = ["-n", MESH_NAMESPACE, "rollout", "status", "--timeout=120s"];
    for set in ["deployment/undermesh-control", "daemonset/undermesh-node"] {
        cluster.run(&[&rollout[..], &[set]].concat())?;
    }
    let classes = cluster.run(&["get", "gatewayclass", "-o", "name"])?;
    ensure!(classes.contains("/istio-waypoint"), "classes of demo: {classes}");
    definitions(cluster)?;
    nothing_left(cluster)
}

/// With the definitions of kinds, but for what still has an object; and again, once it has none.
fn definitions(cluster: &Cluster) -> anyhow::Result<()> {
    let policy = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: theirs, namespace: default}
";
    cluster.apply(policy)?;
    let there = || cluster.run(&["get", "crd", "-l", "app.kubernetes.io/part-of=undermesh", "-o", "name"]);
    ensure!(there()?.lines().count() > 2, "definitions that are ours: {}", there()?);
    let said = meshctl(&["uninstall", "--crds"])?;
    ensure!(said.contains("peerauthentications.security.istio.io stays: 1 objects"), "{said}");
    let only = |names: &str| {
        wait::until(&format!("the definitions to be {names:?}"), || {
            let left = there().map_err(|error| format!("{error:#}"))?;
            if left.trim() == names { Ok(()) } else { Err(left) }
        })
    };
    only("customresourcedefinition.apiextensions.k8s.io/peerauthentications.security.istio.io")?;
    cluster
        .run(&["-n", "default", "get", "peerauthentication", "theirs"])
        .context("a user's object is gone")?;
    cluster.run(&["-n", "default", "delete", "peerauthentication", "theirs"])?;
    meshctl(&["uninstall", "--crds"])?;
    only("")
}

/// The mesh goes: the application does not notice, and no node keeps a trace.
pub fn uninstall(cluster: &Cluster) -> anyhow::Result<()> {
    let before = own_pods(cluster)?;
    let wrong = meshctl(&["uninstall", "--namespace", "nowhere"]).err().context("it is not there")?;
    let said = format!("{wrong:#}");
    ensure!(said.contains(MESH_NAMESPACE) && said.contains("nothing was changed"), "{said}");
    ensure!(before == own_pods(cluster)?, "the installation of another namespace was touched");
    meshctl(&["uninstall"])?;
    story::whole_page(cluster)?;
    nothing_left(cluster)?;
    cluster.delete_namespaces(&[story::BOOKINFO, story::OUTSIDE])
}

/// No namespace, no object at the API server, no trace on a node.
fn nothing_left(cluster: &Cluster) -> anyhow::Result<()> {
    let gone = cluster.run(&["get", "namespace", MESH_NAMESPACE, "--ignore-not-found"])?;
    ensure!(gone.trim().is_empty(), "the namespace stayed: {gone}");
    // Everything but definitions of kinds, in every namespace: of the waypoints, too.
    let kinds = "deployments,daemonsets,pods,services,serviceaccounts,configmaps,secrets,poddisruptionbudgets,leases,\
                 roles,rolebindings,clusterroles,clusterrolebindings";
    let class = "gatewayclasses.gateway.networking.k8s.io";
    let known = !cluster.run(&["get", "crd", class, "--ignore-not-found", "-o", "name"])?.trim().is_empty();
    let kinds = if known { format!("{kinds},gatewayclasses") } else { kinds.to_owned() };
    wait::until("nothing of ours to be at the API server", || {
        let query = ["get", &kinds, "-A", "-l", "app.kubernetes.io/part-of=undermesh", "-o", "name"];
        let left = cluster.run(&query).map_err(|error| format!("{error:#}"))?;
        if left.trim().is_empty() { Ok(()) } else { Err(left) }
    })?;
    if cluster.is_own() {
        for node in cluster.nodes()? {
            wait::until(&format!("no trace on {node}"), || {
                let traces = traces(cluster, &node).map_err(|error| format!("{error:#}"))?;
                if traces.is_empty() { Ok(()) } else { Err(traces.join(", ")) }
            })?;
        }
    }
    Ok(())
}

/// Files, pins, and rules in pods of one node.
fn traces(cluster: &Cluster, node: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for folder in ["/etc/cni/net.d", "/opt/cni/bin", "/run/undermesh", "/var/lib/undermesh", "/sys/fs/bpf"] {
        let Ok(entries) = fs::read_dir(cluster.path(node, folder)?) else { continue };
        // Every bpffs may have two views of the kernel's own.
        let ours = |name: &String| match folder {
            "/sys/fs/bpf" => !["maps.debug", "progs.debug"].contains(&name.as_str()),
            "/etc/cni/net.d" | "/opt/cni/bin" => name.contains("undermesh"),
            _ => true,
        };
        let names =
            entries.filter_map(Result::ok).map(|entry| entry.file_name().to_string_lossy().into_owned());
        found.extend(names.filter(ours).map(|name| format!("{folder}/{name}")));
    }
    for pod in cluster.pods(story::BOOKINFO)?.iter().filter(|pod| pod.node == node) {
        let netns = cluster.enterable(pod)?.netns;
        for family in ["-4", "-6"] {
            let mut command = std::process::Command::new("nsenter");
            command.arg(format!("--net={}", netns.display())).args(["ip", family, "rule"]);
            let rules = String::from_utf8_lossy(&command.output()?.stdout).into_owned();
            let marked = rules.lines().filter(|line| line.contains("fwmark"));
            found.extend(marked.map(|line| format!("a rule of {}: {line}", pod.name)));
        }
    }
    Ok(found)
}
