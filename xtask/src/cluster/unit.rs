//! What is said to a machine of the cluster over its control socket: start and stop programs, tell how they are.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

/// Starting and stopping programs takes a moment; longer means that the machine is gone.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// A program that a machine keeps running.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Unit {
    /// Its name: of its log and its cgroup as well.
    pub name: String,
    /// Program and arguments, as paths inside the machine.
    pub argv: Vec<String>,
    /// Variables besides PATH.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// What is asked of a machine.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Start a program, or start again one that was stopped.
    Start(Unit),
    /// Start again a program that was stopped, as it was.
    Restart(String),
    /// End a program and leave it ended. The number is the signal.
    Stop(String, i32),
    /// Tell how all programs are.
    Status,
    /// The cluster is complete: outlive who started it.
    Adopt,
}

/// How a program is.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Health {
    /// It should run.
    pub wanted: bool,
    /// Its process inside the machine, while it runs.
    pub pid: Option<i32>,
    /// How often it ended by itself.
    pub ended: u32,
    /// How it ended last.
    pub last_end: Option<String>,
}

/// A machine's answer.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done; how the programs are.
    Programs(BTreeMap<String, Health>),
    /// Not done.
    Failed(String),
}

/// Asks one thing of the machine behind `socket`.
///
/// # Errors
/// When it cannot be reached or says no.
pub fn ask(socket: &Path, request: &Request) -> anyhow::Result<BTreeMap<String, Health>> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("reach the machine at {}", socket.display()))?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
    stream.set_write_timeout(Some(ANSWER_DEADLINE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("the machine's answer")?;
    match serde_json::from_str(&answer).with_context(|| format!("the machine answered {answer:?}"))? {
        Answer::Programs(programs) => Ok(programs),
        Answer::Failed(why) => bail!("{why}"),
    }
}

/// What a machine is to be, handed to its first process.
#[derive(Debug, Deserialize, Serialize)]
pub struct MachineSpec {
    /// Its host name.
    pub name: String,
    /// Its folder on this machine: logs and what must lie on a disk.
    pub folder: PathBuf,
    /// Its control socket, on this machine.
    pub socket: PathBuf,
    /// File that is locked while any machine of the cluster lives.
    pub index_file: PathBuf,
    /// Its cgroup, below the root of every hierarchy.
    pub cgroup: PathBuf,
    /// Folder with the programs of Kubernetes.
    pub programs: PathBuf,
    /// Names under which the programs are called.
    pub links: Vec<String>,
    /// Text files to write inside: path to content.
    pub files: BTreeMap<PathBuf, String>,
    /// Kernel parameters of the machine's network: name with slashes, value.
    pub sysctls: BTreeMap<String, String>,
    /// It runs pods.
    pub is_node: bool,
}
