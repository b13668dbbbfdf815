//! The supervisor's parent: whatever ends the supervisor, nothing of the mesh is left.
//!
//! Namespaces, networks and pins live only as long as processes do, so there are three things to remove: processes,
//! cgroups and the state folder. The same removal serves `down` and whoever finds a mesh that crashed.

use std::{
    fs, io,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    cgroup::Group,
    layout::{Layout, ProcessId, replace_file},
    namespace::SELF,
};

/// A folder without an owner may be one that is being made this moment.
const BIRTH: Duration = Duration::from_secs(5);
/// A killed supervisor is gone within this.
const KILLED: Duration = Duration::from_secs(5);

/// Who runs a mesh.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Owner {
    /// The guardian, or `up` until there is one.
    pub guardian: ProcessId,
    /// The supervisor, once it was started.
    pub supervisor: Option<ProcessId>,
}

impl Owner {
    /// Reads the owner of a mesh; `None` when there is none written.
    pub fn read(layout: &Layout) -> Option<Self> {
        serde_json::from_slice(&fs::read(layout.owner()).ok()?).ok()
    }

    /// Writes it down.
    ///
    /// # Errors
    /// When the state folder is gone.
    pub fn write(self, layout: &Layout) -> anyhow::Result<()> {
        Ok(replace_file(&layout.owner(), &serde_json::to_string(&self)?)?)
    }

    fn alive(self) -> bool {
        self.guardian.alive() || self.supervisor.is_some_and(ProcessId::alive)
    }
}

/// Whether a mesh of this name runs.
pub fn running(layout: &Layout) -> bool {
    if let Some(owner) = Owner::read(layout) {
        return owner.alive();
    }
    let made = fs::metadata(layout.dir()).and_then(|meta| meta.modified()).ok();
    made.is_some_and(|made| made.elapsed().is_ok_and(|age| age < BIRTH))
}

/// Ends what is left of a mesh and removes its traces. Harmless when there are none, or when others do the same.
///
/// # Errors
/// When processes do not end or folders cannot be removed.
pub fn clean(layout: &Layout, group: &Group) -> io::Result<()> {
    if let Some(supervisor) = Owner::read(layout).and_then(|owner| owner.supervisor)
        && supervisor.pid != std::process::id()
    {
        end(supervisor);
    }
    group.destroy()?;
    layout.remove()
}

fn end(process: ProcessId) {
    let Ok(pid) = i32::try_from(process.pid) else { return };
    if process.alive() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let deadline = Instant::now() + KILLED;
    while process.alive() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
}

/// Body of the guardian: runs the supervisor, waits for its end, cleans.
///
/// # Errors
/// When the supervisor cannot be started; what was made is removed then too.
pub fn run(layout: &Layout, group: &Group, arguments: &[String]) -> anyhow::Result<()> {
    // No terminal, no signals from one: the mesh outlives the shell that started it.
    nix::unistd::setsid().context("start a session")?;
    let ended = supervise(layout, arguments);
    clean(layout, group).context("clean up")?;
    ended
}

fn supervise(layout: &Layout, arguments: &[String]) -> anyhow::Result<()> {
    let mut child = Command::new(SELF)
        .arg0("meshctl")
        .args(["internal", "supervise", "--parent", &std::process::id().to_string()])
        .args(arguments)
        .stdin(Stdio::null())
        .spawn()
        .context("start the supervisor")?;
    let guardian = ProcessId::of(std::process::id()).context("read /proc")?;
    let owner = Owner { guardian, supervisor: ProcessId::of(child.id()) };
    let written = owner.write(layout);
    if written.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().context("wait for the supervisor")?;
    tracing::info!(%status, "the supervisor ended");
    written
}
