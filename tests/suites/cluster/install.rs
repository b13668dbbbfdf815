//! In with one command, out with one, and nothing stays.

use std::fs;

use anyhow::ensure;
use mesh_tests::{
    cluster::{Cluster, MESH_NAMESPACE, meshctl},
    wait,
};

use crate::story;

/// The mesh comes in, on every node; doing it again changes nothing.
pub fn install(cluster: &Cluster) -> anyhow::Result<()> {
    let cgroup = cluster.kubelet_cgroup();
    let set = cgroup.map(|cgroup| format!("node.kubeletCgroup={cgroup}"));
    let arguments: Vec<&str> = match &set {
        Some(set) => vec!["install", "--set", set],
        None => vec!["install"],
    };
    meshctl(&arguments)?;
    let nodes = cluster.nodes()?;
    for node in &nodes {
        let agent = cluster.agent(node)?;
        ensure!(agent.ready, "{} is not ready", agent.name);
    }
    let before: Vec<_> = cluster.pods(MESH_NAMESPACE)?.into_iter().map(|pod| pod.uid).collect();
    meshctl(&arguments)?;
    let after: Vec<_> = cluster.pods(MESH_NAMESPACE)?.into_iter().map(|pod| pod.uid).collect();
    ensure!(before == after, "installing again replaced pods");
    Ok(())
}

/// The mesh goes: the application does not notice, and no node keeps a trace.
pub fn uninstall(cluster: &Cluster) -> anyhow::Result<()> {
    meshctl(&["uninstall"])?;
    let gone = cluster.run(&["get", "namespace", MESH_NAMESPACE, "--ignore-not-found"])?;
    ensure!(gone.trim().is_empty(), "the namespace stayed: {gone}");
    story::whole_page(cluster)?;
    if cluster.is_own() {
        for node in cluster.nodes()? {
            wait::until(&format!("no trace on {node}"), || {
                let traces = traces(cluster, &node).map_err(|error| format!("{error:#}"))?;
                if traces.is_empty() { Ok(()) } else { Err(traces.join(", ")) }
            })?;
        }
    }
    cluster.delete_namespaces(&[story::BOOKINFO, story::OUTSIDE])
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
