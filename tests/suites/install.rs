//! Promise: the chart is one source: what Helm makes of it and what meshctl makes of it are the same objects.
//!
//! The real helm, which `cargo xtask test install` builds.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use mesh_tests::world::program;
use serde_json::Value;

const CHART: &str = "deploy/helm/undermesh";
/// A server that the chart takes.
const KUBERNETES: &str = "1.34.1";
/// Values that differ from every profile in shape and content: lists, maps, text that YAML could take for something else.
const OTHER: &str = r#"
image: {registry: "registry.example:5000/mesh", tag: "1e3", pullPolicy: Always, pullSecrets: [{name: one}, {name: two}]}
mesh: {trustDomain: example.org, clusterId: "007", rootNamespace: istio-system, encryptSameNode: always, requireAes256: true, outboundTrafficPolicy: REGISTRY_ONLY}
log: {format: json, level: "info,mesh_node=debug"}
gatewayClasses: {istio: false}
control:
  replicas: 3
  maxCertificateTtl: 90m
  disruptionBudget: true
  resources: {requests: {cpu: 1, memory: 1Gi}, limits: {memory: 2Gi}}
  nodeSelector: {kubernetes.io/arch: amd64, "on": "yes"}
  tolerations: [{key: dedicated, operator: Equal, value: "true", effect: NoSchedule, tolerationSeconds: 5}]
node:
  cniBinDir: "/var/lib/rancher/k3s/data/cni"
  cniConfDir: /var/lib/rancher/k3s/agent/etc/cni/net.d
  kubeletCgroup: "kube/$(UNDERMESH_NODE)/kubelet"
  maxUnavailable: 2
  nodeSelector: {}
"#;

type Objects = BTreeMap<String, Value>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What a command prints, as objects by kind, namespace and name.
fn printed(command: &mut Command) -> anyhow::Result<Objects> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    let mut objects = Objects::new();
    for document in serde_yaml_ng::Deserializer::from_slice(&output.stdout) {
        let object: Value = serde::Deserialize::deserialize(document)?;
        if !object.is_null() {
            let part = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default();
            let name =
                format!("{} {}/{}", part("/kind"), part("/metadata/namespace"), part("/metadata/name"));
            ensure!(objects.insert(name.clone(), object).is_none(), "{name} is printed twice");
        }
    }
    Ok(objects)
}

/// Where two values differ first; none when they are the same.
fn difference(path: &str, one: &Value, other: &Value) -> Option<String> {
    match (one, other) {
        (Value::Object(left), Value::Object(right)) => {
            let keys: std::collections::BTreeSet<_> = left.keys().chain(right.keys()).collect();
            keys.into_iter().find_map(|key| difference(&format!("{path}.{key}"), &one[key], &other[key]))
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            let mut pairs = left.iter().zip(right).enumerate();
            pairs.find_map(|(place, (left, right))| difference(&format!("{path}[{place}]"), left, right))
        }
        _ if one == other => None,
        _ => Some(format!("{path}: meshctl has {one}, helm {other}")),
    }
}

fn same(profile: &str, namespace: &str, values: Option<&str>) -> anyhow::Result<()> {
    let helm =
        std::env::var_os("UNDERMESH_TEST_HELM").context("this suite is run by `cargo xtask test install`")?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("values.yaml");
    let chart = root().join(CHART);
    let mut ours = Command::new(program("meshctl")?);
    ours.args(["install", "--dry-run", "--profile", profile, "--namespace", namespace]);
    let mut helms = Command::new(helm);
    // A configuration of whoever runs this does not count.
    helms.env("HELM_CONFIG_HOME", folder.path()).env("HELM_CACHE_HOME", folder.path());
    helms.args(["template", "undermesh", "--namespace", namespace, "--kube-version", KUBERNETES]);
    helms.arg("--values").arg(chart.join(format!("profiles/{profile}.yaml")));
    if let Some(values) = values {
        std::fs::write(&file, values)?;
        ours.arg("--values").arg(&file);
        helms.arg("--values").arg(&file);
    }
    // The one thing that meshctl decides by itself: the namespace is among its objects.
    helms.args(["--set", "namespace.create=true"]).arg(&chart);
    let (ours, helms) = (printed(&mut ours)?, printed(&mut helms)?);
    ensure!(ours.len() > 10, "meshctl prints only {:?}", ours.keys());
    let names = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
    ensure!(names(&ours) == names(&helms), "meshctl has {:?}, helm {:?}", names(&ours), names(&helms));
    let mut all = ours.iter().zip(helms.values());
    let found = all.find_map(|((name, ours), helms)| difference(name, ours, helms));
    ensure!(found.is_none(), "{}", found.unwrap_or_default());
    Ok(())
}

#[test]
fn helm_and_meshctl_make_the_same_objects_of_every_profile() {
    for profile in ["default", "minimal", "demo"] {
        same(profile, "undermesh-system", None).unwrap_or_else(|error| panic!("{profile}: {error:#}"));
    }
}

#[test]
fn and_of_values_that_are_in_no_profile() {
    for profile in ["default", "minimal", "demo"] {
        same(profile, "mesh", Some(OTHER)).unwrap_or_else(|error| panic!("{profile}: {error:#}"));
    }
}

#[test]
fn a_difference_is_named() {
    let value = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let found = difference("o", &value(r#"{"a": [1, {"b": "c"}]}"#), &value(r#"{"a": [1, {"b": 2}]}"#));
    assert_eq!(found.as_deref(), Some(r#"o.a[1].b: meshctl has "c", helm 2"#));
    assert_eq!(
        difference("o", &value("[1]"), &value("[1, 2]")).as_deref(),
        Some("o: meshctl has [1], helm [1,2]")
    );
}
