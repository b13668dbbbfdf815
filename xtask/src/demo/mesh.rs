//! The demo's mesh: `meshctl local`, as anybody would use it.

use std::{
    ffi::OsString,
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::Pid,
};
use serde::Deserialize;
use serde_json::Value;

use super::teller::until;
use crate::shell;

/// An edit comes into force within this, or something is wrong.
const IN_FORCE: Duration = Duration::from_secs(60);
/// An admin socket answers within this.
const ADMIN: Duration = Duration::from_secs(5);
/// An agent that was killed stays away this long, so that there is an outage to look at.
const RESTART_DELAY_S: &str = "3";
/// Lines of each log that a failure shows.
const LOG_LINES: usize = 15;

/// A node in `status -o json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    pub name: String,
    pub netns: PathBuf,
    pub admin_socket: PathBuf,
}

/// A pod in `status -o json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub netns: PathBuf,
    pub ips: Vec<std::net::IpAddr>,
    pub enrolled: bool,
    pub identity: Option<String>,
    pub pid: Option<u32>,
}

/// `status -o json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    pub in_force: bool,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
    #[serde(default)]
    pub waypoints: Vec<Value>,
    #[serde(default)]
    pub problems: Vec<Value>,
    #[serde(default)]
    pub waiting: Vec<String>,
}

impl Status {
    /// The pod whose name is or begins with this.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> anyhow::Result<&Pod> {
        let start = format!("{name}-");
        let found = self.pods.iter().find(|pod| pod.name == name || pod.name.starts_with(&start));
        found.with_context(|| format!("no pod {name} in the status"))
    }

    /// The node of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> anyhow::Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("no node {name} in the status"))
    }
}

/// What a client in a pod got.
#[derive(Debug)]
pub struct Fetched {
    pub ok: bool,
    pub body: String,
    pub error: String,
}

impl Fetched {
    /// One line for the reader.
    pub fn brief(&self) -> String {
        let text = if self.ok { &self.body } else { &self.error };
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        match line.char_indices().nth(150) {
            Some((end, _)) => format!("{}…", &line[..end]),
            None => line,
        }
    }
}

/// The mesh; taken down when dropped, unless it is kept.
pub struct Mesh {
    name: &'static str,
    folder: PathBuf,
    programs: PathBuf,
    up: bool,
}

impl Mesh {
    /// A mesh of this name over a folder; not started yet.
    ///
    /// # Errors
    /// When `meshctl` is not built.
    pub fn new(name: &'static str, folder: &Path) -> anyhow::Result<Self> {
        let programs = shell::target_dir().join("debug");
        anyhow::ensure!(programs.join("meshctl").is_file(), "no meshctl in {}", programs.display());
        Ok(Self { name, folder: folder.to_owned(), programs, up: false })
    }

    /// The folder of YAML.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// `meshctl local VERB --name NAME …`
    pub fn meshctl(&self, verb: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("meshctl"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(self.programs.clone()).chain(std::env::split_paths(&path));
        // Containers run programs of this machine; ours are among them.
        command.env("PATH", std::env::join_paths(path).unwrap_or_else(|_| OsString::from("/usr/bin:/bin")));
        command.args(["local", verb, "--name", self.name]).args(arguments);
        command
    }

    /// Starts it and waits until all of the folder is in force.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&mut self) -> anyhow::Result<Status> {
        let folder = self.folder.to_string_lossy().into_owned();
        let mut up = self.meshctl("up", &[&folder]);
        up.env("UNDERMESH_LOCAL_RESTART_DELAY", RESTART_DELAY_S);
        shell::output(&mut up).context("`meshctl local down --name demo` ends an earlier one")?;
        self.up = true;
        self.in_force()
    }

    /// The status now.
    ///
    /// # Errors
    /// When `meshctl` fails.
    pub fn status(&self) -> anyhow::Result<Status> {
        let text = shell::output(&mut self.meshctl("status", &["-o", "json"]))?;
        serde_json::from_str(&text).with_context(|| format!("status: {text}"))
    }

    /// Waits until every edit so far is in force everywhere.
    ///
    /// # Errors
    /// When it is not in time; with what is pending.
    pub fn in_force(&self) -> anyhow::Result<Status> {
        until("the mesh to be in force", IN_FORCE, || {
            let status = self.status()?;
            let pending = || format!("waiting for {:?}; problems: {:?}", status.waiting, status.problems);
            Ok(if status.in_force { Ok(status) } else { Err(pending()) })
        })
    }

    /// Copies a step's file over or into the folder, and waits until it is in force.
    ///
    /// # Errors
    /// When it does not come into force.
    pub fn apply(&self, step: &str, to: &str) -> anyhow::Result<(Status, Duration)> {
        let from = shell::root().join("examples/bookinfo/steps").join(step);
        println!("   $ cp examples/bookinfo/steps/{step} {}/{to}", self.folder.display());
        // Renamed into place, so that nobody reads half of it.
        let hidden = self.folder.join(format!(".{to}.tmp"));
        fs::copy(&from, &hidden).with_context(|| format!("copy {}", from.display()))?;
        let edited = Instant::now();
        fs::rename(hidden, self.folder.join(to))?;
        Ok((self.in_force()?, edited.elapsed()))
    }

    /// Runs `bookinfo get` in a pod.
    ///
    /// # Errors
    /// When `meshctl` cannot be started.
    pub fn get(&self, namespace: &str, pod: &str, arguments: &[&str]) -> anyhow::Result<Fetched> {
        let mut command = self.exec(namespace, pod, &["bookinfo", "get"]);
        let output = shell::quiet(command.args(arguments))?;
        Ok(Fetched {
            ok: output.status.success(),
            body: String::from_utf8_lossy(&output.stdout).into_owned(),
            error: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// `meshctl local exec`, not started.
    pub fn exec(&self, namespace: &str, pod: &str, program: &[&str]) -> Command {
        let mut command = self.meshctl("exec", &["-n", namespace, pod, "--"]);
        command.args(program);
        command
    }

    /// Holds a TCP connection from a pod until the guard is dropped.
    ///
    /// # Errors
    /// When `meshctl` cannot be started.
    pub fn hold(&self, namespace: &str, pod: &str, to: &str) -> anyhow::Result<Held> {
        // Ends by itself: whoever kills the client of `exec` may leave what it started.
        let script = format!("exec 3<>/dev/tcp/{to} && read -r -t 20 -u 3");
        let mut command = self.exec(namespace, pod, &["bash", "-c", &script]);
        Ok(Held(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
    }

    /// GET of an agent's admin socket.
    ///
    /// # Errors
    /// When it does not answer with JSON.
    pub fn admin(&self, node: &Node, uri: &str) -> anyhow::Result<Value> {
        let mut socket = connect(&node.admin_socket)?;
        // HTTP/1.0: the answer ends with the connection.
        write!(socket, "GET {uri} HTTP/1.0\r\nHost: agent\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an HTTP answer")?;
        serde_json::from_str(body).with_context(|| format!("{uri}: {head}: {body}"))
    }

    /// The process behind a node's admin socket; none while it is down.
    pub fn agent_pid(&self, node: &Node) -> Option<Pid> {
        let socket = connect(&node.admin_socket).ok()?;
        getsockopt(&socket, PeerCredentials).ok().map(|peer| Pid::from_raw(peer.pid()))
    }

    /// Lines of the mesh's logs that hold all of these.
    pub fn log_lines(&self, words: &[&str]) -> Vec<String> {
        let texts = self.logs().into_iter().filter_map(|log| fs::read_to_string(log).ok());
        let holds = |line: &&str| words.iter().all(|word| line.contains(word));
        texts.flat_map(|text| text.lines().filter(holds).map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    fn logs(&self) -> Vec<PathBuf> {
        let folder = Path::new("/run/undermesh/local").join(self.name).join("logs");
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    /// The last lines of every log.
    pub fn print_logs(&self) {
        for log in self.logs() {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            println!("-- {}", log.display());
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                println!("   {line}");
            }
        }
    }

    /// What to type while the mesh is kept.
    pub fn print_how_to_reach(&mut self, folder: &Path) {
        self.up = false;
        let name = self.name;
        let meshctl = self.programs.join("meshctl");
        let meshctl = meshctl.display();
        let programs = self.programs.display();
        println!("\nThe mesh `{name}` runs on. It watches {}: edit the YAML there.", folder.display());
        println!("  the page:  {meshctl} local exec --name {name} -n bookinfo client -- \\");
        println!("               {programs}/bookinfo get http://productpage:9080/productpage");
        let page = self.status().ok().and_then(|status| {
            let client = status.pod("client").ok()?.netns.clone();
            let page = *status.pod("productpage-v1").ok()?.ips.first()?;
            Some((client, std::net::SocketAddr::new(page, 9080)))
        });
        if let Some((netns, page)) = page {
            println!("             nsenter --net={} curl -s http://{page}/productpage", netns.display());
        }
        println!("  its state: {meshctl} local status --name {name}");
        println!("  the end:   {meshctl} local down --name {name} && rm -r {}", folder.display());
    }

    /// Takes it down and checks that its folder of state is gone.
    ///
    /// # Errors
    /// When something is left.
    pub fn down(&mut self) -> anyhow::Result<()> {
        if !std::mem::take(&mut self.up) {
            return Ok(());
        }
        shell::output(&mut self.meshctl("down", &[]))?;
        let left = Path::new("/run/undermesh/local").join(self.name);
        if left.exists() {
            bail!("`meshctl local down` left {}", left.display());
        }
        Ok(())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Err(error) = self.down() {
            eprintln!("demo: {error:#}");
        }
    }
}

/// A connection that is held open.
pub struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(ADMIN))?;
    stream.set_write_timeout(Some(ADMIN))?;
    Ok(stream)
}
