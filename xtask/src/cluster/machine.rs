//! A machine of the cluster as seen from outside: its first process, and what is asked of it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::sync_channel,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    init,
    unit::{self, Health, MachineSpec, Request, Unit},
};

/// Mounting takes milliseconds.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// The kernel ends all processes of a namespace whose first one was killed.
const END_DEADLINE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(20);
/// So much of a log is shown when something failed.
const LAST_LINES: usize = 15;

/// A running machine, as it is written down.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its first process.
    pub pid: i32,
    /// When that process started, in ticks: tells it from a later one with its number.
    pub started: u64,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its folder on this machine.
    pub folder: PathBuf,
    /// Its control socket.
    pub socket: PathBuf,
    /// Its cgroup, below the root of every hierarchy.
    pub cgroup: PathBuf,
}

/// Ends the machine unless it was adopted: its first process watches this.
pub struct Lifeline(#[expect(dead_code, reason = "held, never written")] ChildStdin);

impl Machine {
    /// Starts a machine with namespaces of its own.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(spec: &MachineSpec) -> anyhow::Result<(Self, Lifeline)> {
        fs::create_dir_all(spec.folder.join("log"))?;
        let file = spec.folder.join("machine.json");
        // It holds keys.
        let written =
            fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&file)?;
        serde_json::to_writer(written, spec)?;
        let log = spec.folder.join("log/machine.log");
        let mut child = spawn(&file, &log)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (stdin, stdout) = (stdin.context("its lifeline")?, stdout.context("its output")?);
        let (sender, answer) = sync_channel(1);
        thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = sender.send(line);
        });
        let line = answer.recv_timeout(START_DEADLINE).unwrap_or_default();
        if line.trim() != init::READY {
            child.kill()?;
            child.wait()?;
            bail!("the machine {} did not come up: {}", spec.name, last_lines(&log));
        }
        let pid = i32::try_from(child.id())?;
        let machine = Self {
            name: spec.name.clone(),
            pid,
            started: start_time(pid).context("the machine ended at once")?,
            netns: PathBuf::from(format!("/proc/{pid}/ns/net")),
            folder: spec.folder.clone(),
            socket: spec.socket.clone(),
            cgroup: spec.cgroup.clone(),
        };
        Ok((machine, Lifeline(stdin)))
    }

    /// Whether its first process runs.
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Asks one thing of it.
    ///
    /// # Errors
    /// When it cannot be reached or says no.
    pub fn ask(&self, request: &Request) -> anyhow::Result<BTreeMap<String, Health>> {
        unit::ask(&self.socket, request).with_context(|| format!("on {}", self.name))
    }

    /// Starts a program.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, unit: Unit) -> anyhow::Result<()> {
        self.ask(&Request::Start(unit)).map(drop)
    }

    /// The last lines of a program's log.
    pub fn log(&self, program: &str) -> String {
        last_lines(&self.folder.join("log").join(format!("{program}.log")))
    }

    /// A path inside, as this machine reaches it.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.pid))
    }

    /// A program of this machine that runs inside, in all namespaces.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--all", "--", program]);
        command
    }

    /// Ends it with everything that runs in it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(&self) -> anyhow::Result<()> {
        let end = Instant::now() + END_DEADLINE;
        while self.alive() {
            kill(Pid::from_raw(self.pid), Signal::SIGKILL)
                .or_else(|error| if self.alive() { Err(error) } else { Ok(()) })
                .with_context(|| format!("end {}", self.name))?;
            if Instant::now() > end {
                bail!("the machine {} (process {}) does not end", self.name, self.pid);
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }
}

/// The first process of new namespaces, from a thread that moves there so that this process does not.
fn spawn(spec: &Path, log: &Path) -> anyhow::Result<Child> {
    let log = File::create(log)?;
    let program = std::env::current_exe().context("this program")?;
    let spawned = thread::scope(|scope| {
        let moved = scope.spawn(|| -> anyhow::Result<Child> {
            let namespaces = CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWUTS
                | CloneFlags::CLONE_NEWIPC;
            unshare(namespaces).context("make namespaces")?;
            let mut command = Command::new(program);
            command.arg("machine").arg(spec);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
            command.spawn().context("start the first process of a machine")
        });
        moved.join()
    });
    match spawned {
        Ok(child) => child,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// When a process started, in clock ticks; none when it does not run, or has ended and waits to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    started_at(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// (pure) The fields after the name, which may hold anything.
fn started_at(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<_> = fields.split(' ').collect();
    match *fields.first()? {
        "Z" | "X" => None,
        _ => fields.get(19)?.parse().ok(),
    }
}

/// The end of a log, each line on one of its own.
fn last_lines(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    match last.is_empty() {
        true => format!("({} is empty)", log.display()),
        false => format!("\n  {}\n  ({})", last.join("\n  "), log.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_read_past_any_name() {
        let fields: Vec<_> = (3..53).map(|number| number.to_string()).collect();
        let rest = fields.join(" ").replacen('3', "S", 1);
        assert_eq!(started_at(&format!("12 (a) b) {rest}")), Some(22));
        assert_eq!(started_at(&format!("12 (a) {}", rest.replacen('S', "Z", 1))), None);
        assert_eq!(started_at("12 (a"), None);
    }

    #[test]
    fn this_process_has_a_start_time() {
        let own = i32::try_from(std::process::id()).expect("a process id");
        assert!(start_time(own).is_some());
    }
}
