//! A process that is kept running: started, waited for, started again after a pause that grows.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::namespace::SELF;
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};
use parking_lot::{Condvar, Mutex};

/// A process that ran this long starts again at once, as if it had never failed.
const STEADY: Duration = Duration::from_secs(10);

/// When a process that ended is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Whatever its end.
    Always,
    /// After a failure only.
    OnFailure,
    /// Not at all.
    Never,
}

/// What to run, where, and what becomes of it.
#[derive(Clone, Debug)]
pub struct Program {
    /// Name for logs.
    pub name: String,
    /// Arguments of `meshctl internal enter` in front of the program.
    pub place: Vec<String>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// File that its output is appended to.
    pub log: PathBuf,
    /// When it is started again.
    pub restart: Restart,
    /// First pause before it is; doubles up to `max_delay`.
    pub delay: Duration,
    /// Longest pause.
    pub max_delay: Duration,
}

/// What is known of the process.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Its number while it runs.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// How it last ended, or why it did not start.
    pub last_end: Option<String>,
    /// It ended for good; whether well.
    pub finished: Option<bool>,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Keeps one process. Dropping it ends the process.
#[derive(Debug)]
pub struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Sees a keeper's state without keeping the process.
#[derive(Clone, Debug)]
pub struct KeeperWatch(Arc<Shared>);

impl KeeperWatch {
    /// What is known now.
    pub fn state(&self) -> State {
        self.0.state.lock().clone()
    }
}

impl Keeper {
    /// Starts the program; `changed` is called when its state changes.
    pub fn start(program: Program, changed: impl Fn() + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let inside = Arc::clone(&shared);
        // The thread is the process's parent and lives as long as it: the kernel's parent-death signal comes when
        // the thread ends.
        let thread = thread::spawn(move || keep(&program, &inside, &changed));
        Self { shared, thread: Some(thread) }
    }

    /// What is known now.
    pub fn state(&self) -> State {
        self.shared.state.lock().clone()
    }

    /// A look at it for others.
    pub fn watch(&self) -> KeeperWatch {
        KeeperWatch(Arc::clone(&self.shared))
    }

    /// Asks the process to end, and ends it after `grace`.
    pub fn stop(&mut self, grace: Duration) {
        self.ask_to_stop();
        let deadline = Instant::now() + grace;
        let mut state = self.shared.state.lock();
        while state.pid.is_some() {
            if self.shared.changed.wait_until(&mut state, deadline).timed_out() {
                signal(&state, Signal::SIGKILL);
                break;
            }
        }
        drop(state);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Sends SIGTERM, without waiting; it is not started again.
    pub fn ask_to_stop(&self) {
        let mut state = self.shared.state.lock();
        state.stop = true;
        signal(&state, Signal::SIGTERM);
        self.shared.changed.notify_all();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop(Duration::ZERO);
        }
    }
}

/// The number is ours as long as the state holds it: the keeper clears it under the same lock before it is reaped.
fn signal(state: &State, signal: Signal) {
    if let Some(pid) = state.pid.and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn keep(program: &Program, shared: &Shared, changed: &impl Fn()) {
    let mut delay = program.delay;
    loop {
        let began = Instant::now();
        let end = run_once(program, shared, changed);
        let steady = began.elapsed() >= STEADY;
        let mut state = shared.state.lock();
        let good = matches!(&end, Ok(status) if status.success());
        let words = match &end {
            Ok(status) => status.to_string(),
            Err(error) => format!("could not be started: {error}"),
        };
        tracing::info!(program = program.name, end = words, "ended");
        state.last_end = Some(words);
        let again = match program.restart {
            Restart::Always => true,
            Restart::OnFailure => !good,
            Restart::Never => false,
        };
        if !again && !state.stop {
            state.finished = Some(good);
        }
        shared.changed.notify_all();
        drop(state);
        changed();
        delay = if steady { program.delay } else { delay };
        if !again || wait_to_stop(shared, delay) {
            return;
        }
        delay = (delay * 2).min(program.max_delay);
        shared.state.lock().restarts += 1;
    }
}

/// Waits; says whether to stop.
fn wait_to_stop(shared: &Shared, delay: Duration) -> bool {
    let deadline = Instant::now() + delay;
    let mut state = shared.state.lock();
    while !state.stop {
        if shared.changed.wait_until(&mut state, deadline).timed_out() {
            break;
        }
    }
    state.stop
}

fn run_once(program: &Program, shared: &Shared, changed: &impl Fn()) -> io::Result<ExitStatus> {
    let log = open_log(&program.log)?;
    let mut command = Command::new(SELF);
    command.arg0("meshctl");
    command.args(["internal", "enter"]).args(&program.place).arg("--").args(&program.command);
    command.env_clear().envs(&program.env);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = {
        let mut state = shared.state.lock();
        if state.stop {
            return Err(io::Error::other("stopped before it started"));
        }
        let child = command.spawn()?;
        state.pid = Some(child.id());
        child
    };
    changed();
    if let Ok(pid) = i32::try_from(child.id()) {
        // Waits without reaping, so that the number stays taken until the state forgets it.
        while waitid(Id::Pid(Pid::from_raw(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
            == Err(nix::errno::Errno::EINTR)
        {}
    }
    shared.state.lock().pid = None;
    child.wait()
}

fn open_log(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}
