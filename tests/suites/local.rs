//! Promise: local mode runs what the folder says, keeps meshes apart, and leaves nothing behind however it ends.
//!
//! Pods here are not enrolled: these are promises of local mode itself, the mesh's own are in the other suites.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use mesh_tests::{wait, world::program};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

const SHOP: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: tcp, port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec:
  containers:
  # The inner one leaves its session and its parent: ending the pod has to find it all the same.
  - {name: main, command: [sh, -c, 'setsid sleep infinity & sleep infinity']}
";

/// A Deployment whose pods answer every connection with `word`, their name and their node.
fn web(word: &str, replicas: usize) -> String {
    let script = format!(
        "import os,socket\\ns=socket.create_server((\"::\",8080),family=socket.AF_INET6,dualstack_ipv6=True)\\n\
         while True:\\n c,_=s.accept()\\n c.sendall((\"{word} \"+os.environ[\"POD\"]+\" \"+os.environ[\"NODE\"]).encode())\\n \
         c.close()"
    );
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: shop}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      containers:
      - name: main
        command: [python3, -c, \"{}\"]
        ports: [{{name: web, containerPort: 8080}}]
        env:
        - {{name: POD, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}
        - {{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}
",
        script.replace('"', "\\\"")
    )
}

/// A local mesh without promises about agents.
struct Mesh {
    name: String,
    folder: TempDir,
    meshctl: PathBuf,
}

impl Mesh {
    fn up(word: &str) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = tempfile::Builder::new().prefix("undermesh-local-").tempdir()?;
        fs::write(folder.path().join("shop.yaml"), SHOP)?;
        fs::write(folder.path().join("web.yaml"), web(word, 2))?;
        let name = format!("local-{}-{number}", std::process::id());
        let mesh = Self { name, folder, meshctl: program("meshctl")? };
        let up = mesh.run(&["up", &mesh.folder.path().to_string_lossy(), "--wait", "0"])?;
        ensure!(up.status.success(), "up: {}", String::from_utf8_lossy(&up.stderr));
        mesh.ready(3)?;
        Ok(mesh)
    }

    /// `meshctl local VERB ARGUMENTS… --name …`.
    fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let (verb, rest) = arguments.split_first().context("a verb")?;
        let mut command = Command::new(&self.meshctl);
        command.args(["local", verb, "--name", &self.name]).args(rest);
        command.output().context("run meshctl")
    }

    fn status(&self) -> anyhow::Result<Value> {
        let output = self.run(&["status", "-o", "json"])?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Waits until exactly `count` pods run, and all of them serve.
    fn ready(&self, count: usize) -> anyhow::Result<Value> {
        wait::until("pods to be ready", || {
            let status = self.status().map_err(|error| format!("{error:#}"))?;
            let pods = status["pods"].as_array().cloned().unwrap_or_default();
            let ready = pods.iter().filter(|pod| pod["ready"] == true).count();
            if pods.len() == count && ready == count { Ok(status) } else { Err(status.to_string()) }
        })
    }

    /// Output of a program inside the client.
    fn exec(&self, command: &[&str]) -> anyhow::Result<Output> {
        self.run(&[&["exec", "-n", "shop", "client", "--"], command].concat())
    }

    /// What a server says to the client.
    fn ask(&self, host: &str, port: &str) -> String {
        let script = format!(
            "import socket;s=socket.create_connection(('{host}',{port}),5);print(s.makefile().read())"
        );
        match self.exec(&["python3", "-c", &script]) {
            Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            Err(error) => format!("{error:#}"),
        }
    }

    fn hears(&self, host: &str, port: &str, word: &str) -> anyhow::Result<String> {
        wait::until(&format!("{host}:{port} to say {word}"), || {
            let said = self.ask(host, port);
            if said.starts_with(word) { Ok(said) } else { Err(said) }
        })
    }

    /// Everything of this mesh that outlives no mesh.
    fn traces(&self) -> Traces {
        let status = self.status().unwrap_or_default();
        let list = |kind: &str| status[kind].as_array().cloned().unwrap_or_default();
        let mut namespaces: Vec<PathBuf> = list("pods")
            .iter()
            .chain(&list("nodes"))
            .filter_map(|one| fs::read_link(one["netns"].as_str()?).ok())
            .collect();
        namespaces.extend(status["control"]["netns"].as_str().and_then(|path| fs::read_link(path).ok()));
        Traces { name: self.name.clone(), namespaces }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let _ = self.run(&["down"]);
    }
}

struct Traces {
    name: String,
    namespaces: Vec<PathBuf>,
}

impl Traces {
    /// What is left, in words.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let dir = format!("/run/undermesh/local/{}", self.name);
        if Path::new(&dir).exists() {
            left.push(dir);
        }
        let own = format!("undermesh-local/{}", self.name);
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let path = entry.path();
            let read = |file: &str| fs::read(path.join(file)).unwrap_or_default();
            let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            let in_namespace = fs::read_link(path.join("ns/net"))
                .is_ok_and(|namespace| self.namespaces.contains(&namespace));
            let in_group = String::from_utf8_lossy(&read("cgroup")).contains(&own);
            if command.is_empty() {
                // Dead; its number is init's to reap.
                continue;
            }
            let internal = command.contains("internal") && command.contains(&self.name);
            if in_namespace || in_group || internal {
                left.push(format!("process {}: {command}", path.display()));
            }
        }
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let group = Path::new(root).join(&own);
            if group.exists() {
                left.push(group.display().to_string());
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        left.extend(mounts.lines().filter(|line| line.contains(&self.name)).map(str::to_owned));
        left
    }

    fn none_is_left(&self) -> anyhow::Result<()> {
        ensure!(self.namespaces.len() >= 6, "too few namespaces were seen: {:?}", self.namespaces);
        wait::until("nothing to be left", || {
            let left = self.left();
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        })
    }
}

fn kill_hard(pid: &Value) -> anyhow::Result<()> {
    let pid = pid.as_i64().context("no process number")?;
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?)
}

fn names_and_addresses_of_services_work() -> anyhow::Result<()> {
    let mesh = Mesh::up("one")?;
    let status = mesh.status()?;
    let vips: Vec<&str> =
        status["services"][0]["vips"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(vips.len() == 2, "a service has an address per family: {vips:?}");
    for host in ["web", "web.shop", "web.shop.svc.cluster.local", vips[0], vips[1]] {
        mesh.hears(host, "80", "one web-")?;
    }
    let said: Vec<String> = (0..4).map(|_| mesh.ask("web", "80")).collect();
    for node in ["node-1", "node-2"] {
        ensure!(said.iter().any(|said| said.ends_with(node)), "{node} was never chosen: {said:?}");
    }
    Ok(())
}

fn exec_is_inside_and_passes_the_exit_code() -> anyhow::Result<()> {
    let mesh = Mesh::up("one")?;
    ensure!(mesh.exec(&["sh", "-c", "exit 42"])?.status.code() == Some(42));
    ensure!(mesh.exec(&["no-such-program"])?.status.code() == Some(127));
    let hostname = mesh.exec(&["hostname"])?;
    ensure!(hostname.stdout == b"client\n", "{hostname:?}");
    let links = mesh.exec(&["ip", "-o", "link"])?;
    ensure!(String::from_utf8_lossy(&links.stdout).lines().count() == 2, "{links:?}");
    ensure!(!mesh.run(&["exec", "nobody", "--", "true"])?.status.success());
    Ok(())
}

fn edits_of_the_folder_change_the_mesh() -> anyhow::Result<()> {
    let mesh = Mesh::up("one")?;
    let file = mesh.folder.path().join("web.yaml");
    fs::write(&file, web("two", 3))?;
    mesh.ready(4)?;
    mesh.hears("web", "80", "two web-")?;
    fs::write(&file, "kind: [")?;
    let status = mesh.status()?;
    ensure!(status["problems"][0]["file"] == "web.yaml", "{}", status["problems"]);
    ensure!(mesh.ask("web", "80").starts_with("two"), "a broken file changed what runs");
    fs::remove_file(&file)?;
    mesh.ready(1)?;
    ensure!(mesh.ask("web", "80").is_empty(), "a service without pods answers");
    Ok(())
}

fn meshes_of_two_names_do_not_meet() -> anyhow::Result<()> {
    let (one, two) = (Mesh::up("one")?, Mesh::up("two")?);
    let address = |mesh: &Mesh| anyhow::Ok(mesh.status()?["services"][0]["vips"].clone());
    ensure!(address(&one)? == address(&two)?, "the addresses differ, so the case proves nothing");
    one.hears("web", "80", "one")?;
    two.hears("web", "80", "two")?;
    let traces = one.traces();
    drop(one);
    traces.none_is_left()?;
    two.hears("web", "80", "two")?;
    let folder = two.folder.path().to_string_lossy().into_owned();
    ensure!(!two.run(&["up", &folder])?.status.success(), "a second mesh of the same name came up");
    two.hears("web", "80", "two")?;
    Ok(())
}

fn down_leaves_nothing() -> anyhow::Result<()> {
    let mesh = Mesh::up("one")?;
    let traces = mesh.traces();
    ensure!(mesh.run(&["down"])?.status.success());
    // Not waited for: when `down` returns, it is so.
    let left = traces.left();
    ensure!(left.is_empty(), "{}", left.join("\n"));
    traces.none_is_left()
}

fn a_killed_supervisor_leaves_nothing() -> anyhow::Result<()> {
    let mesh = Mesh::up("one")?;
    let traces = mesh.traces();
    kill_hard(&mesh.status()?["supervisor"])?;
    traces.none_is_left()
}

fn a_killed_guardian_leaves_nothing() -> anyhow::Result<()> {
    let mesh = Mesh::up("one")?;
    let traces = mesh.traces();
    kill_hard(&mesh.status()?["guardian"])?;
    traces.none_is_left()
}

fn what_both_leave_the_next_command_removes() -> anyhow::Result<()> {
    let mesh = Mesh::up("one")?;
    let (traces, status) = (mesh.traces(), mesh.status()?);
    // Stopped, it cannot clean up after the other.
    let guardian = Pid::from_raw(i32::try_from(status["guardian"].as_i64().context("no guardian")?)?);
    kill(guardian, Signal::SIGSTOP)?;
    kill_hard(&status["supervisor"])?;
    kill(guardian, Signal::SIGKILL)?;
    ensure!(mesh.run(&["down"])?.status.success());
    traces.none_is_left()
}

fn main() -> ExitCode {
    let case = |name: &str, run: fn() -> anyhow::Result<()>| {
        Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
    };
    let cases = vec![
        case("names_and_addresses_of_services_work", names_and_addresses_of_services_work),
        case("exec_is_inside_and_passes_the_exit_code", exec_is_inside_and_passes_the_exit_code),
        case("edits_of_the_folder_change_the_mesh", edits_of_the_folder_change_the_mesh),
        case("meshes_of_two_names_do_not_meet", meshes_of_two_names_do_not_meet),
        case("down_leaves_nothing", down_leaves_nothing),
        case("a_killed_supervisor_leaves_nothing", a_killed_supervisor_leaves_nothing),
        case("a_killed_guardian_leaves_nothing", a_killed_guardian_leaves_nothing),
        case("what_both_leave_the_next_command_removes", what_both_leave_the_next_command_removes),
    ];
    libtest_mimic::run(&Arguments::from_args(), cases).exit_code()
}
