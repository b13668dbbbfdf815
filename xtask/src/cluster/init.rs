//! The first process of a machine of the cluster: builds its root, starts programs and starts them again when they end,
//! reaps, and takes all with it when it goes.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::AsFd as _,
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, UnlinkatFlags, sethostname, setsid, unlinkat},
};

use super::{
    cgroups, rootfs,
    unit::{Answer, Health, MachineSpec, Request, Unit},
};

/// How soon an ended program is noticed.
const TICK: u16 = 100;
/// A program that ends by itself is started again after this time.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// A program that was told to end and does not is killed after this time.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// A client says what it wants at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// One request, bytes.
const REQUEST_BYTES: u64 = 1 << 20;
/// Said to who started this when the machine is there.
pub const READY: &str = "ready";
const PATH: &str = "/opt/cluster/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs until it is killed, or until who started it ends before the cluster was complete.
///
/// # Errors
/// When the machine cannot be built.
pub fn run(spec: &Path) -> anyhow::Result<()> {
    let spec: MachineSpec =
        serde_json::from_slice(&fs::read(spec).context("read the machine's description")?)?;
    setsid().context("setsid")?;
    let index = File::open(&spec.index_file).context("open the cluster's index file")?;
    let _index = Flock::lock(index, FlockArg::LockSharedNonblock)
        .map_err(|(_, error)| error)
        .context("lock the cluster's index file")?;
    let listener =
        UnixListener::bind(&spec.socket).with_context(|| format!("listen at {}", spec.socket.display()))?;
    let traces = Traces::of(&spec)?;
    let mut machine = Machine::new(&spec, traces)?;
    if let Err(error) = settle(&spec) {
        machine.give_up();
        return Err(error);
    }
    // Who started this may be gone already; that shows at its lifeline.
    let _ = writeln!(std::io::stdout(), "{READY}");
    machine.serve(&listener)
}

/// Name, root and kernel parameters.
fn settle(spec: &MachineSpec) -> anyhow::Result<()> {
    sethostname(&spec.name).context("name the machine")?;
    rootfs::enter(spec)?;
    for (name, value) in &spec.sysctls {
        fs::write(Path::new("/proc/sys").join(name), value).with_context(|| format!("set {name}"))?;
    }
    Ok(())
}

/// Files of this cluster outside its folder, reachable after the root has changed.
struct Traces {
    folder: File,
    names: Vec<OsString>,
}

impl Traces {
    fn of(spec: &MachineSpec) -> anyhow::Result<Self> {
        let folder = spec.socket.parent().context("the control socket has no folder")?;
        let names = [&spec.socket, &spec.index_file].into_iter().filter_map(|path| path.file_name());
        Ok(Self { names: names.map(OsString::from).collect(), folder: File::open(folder)? })
    }

    fn remove(&self) {
        for name in &self.names {
            // Another machine of the cluster may have been faster.
            let _ = unlinkat(&self.folder, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

struct Machine {
    traces: Traces,
    hierarchies: Vec<PathBuf>,
    cgroup: PathBuf,
    programs: BTreeMap<String, Program>,
    adopted: bool,
}

struct Program {
    unit: Unit,
    health: Health,
    /// When to start it again.
    due: Option<Instant>,
}

impl Machine {
    fn new(spec: &MachineSpec, traces: Traces) -> anyhow::Result<Self> {
        let machine = Self {
            traces,
            hierarchies: cgroups::hierarchies()?,
            cgroup: spec.cgroup.clone(),
            programs: BTreeMap::new(),
            adopted: false,
        };
        cgroups::make(&machine.hierarchies, &machine.group("init"))?;
        machine.enter("init")?;
        // Only a group without processes may hand controllers down.
        cgroups::delegate(&machine.hierarchies, &machine.cgroup);
        Ok(machine)
    }

    fn group(&self, name: &str) -> PathBuf {
        self.cgroup.join(name)
    }

    fn enter(&self, name: &str) -> anyhow::Result<()> {
        cgroups::enter(&self.hierarchies, &self.group(name))
    }

    fn serve(&mut self, listener: &UnixListener) -> anyhow::Result<()> {
        let stdin = std::io::stdin();
        loop {
            let mut watched = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            if !self.adopted {
                watched.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut watched, PollTimeout::from(TICK)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            let ready = |at: usize| {
                watched.get(at).and_then(PollFd::revents).is_some_and(|events| !events.is_empty())
            };
            if ready(1) {
                // Nothing is ever written there: this is its end, and that of who started the cluster.
                self.give_up();
                bail!("whoever built this cluster ended before it was complete");
            }
            if ready(0)
                && let Ok((stream, _)) = listener.accept()
            {
                // A client that goes away half-way is its own business.
                let _ = self.client(&stream);
            }
            self.reap();
            self.start_due();
        }
    }

    fn client(&mut self, mut stream: &UnixStream) -> anyhow::Result<()> {
        stream.set_read_timeout(Some(REQUEST_DEADLINE))?;
        stream.set_write_timeout(Some(REQUEST_DEADLINE))?;
        let mut line = String::new();
        BufReader::new(stream.take(REQUEST_BYTES)).read_line(&mut line)?;
        let done =
            serde_json::from_str(&line).context("not a request").and_then(|request| self.obey(request));
        let answer = match done {
            Ok(()) => {
                let health = |(name, program): (&String, &Program)| (name.clone(), program.health.clone());
                Answer::Programs(self.programs.iter().map(health).collect())
            }
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        let mut bytes = serde_json::to_vec(&answer)?;
        bytes.push(b'\n');
        Ok(stream.write_all(&bytes)?)
    }

    fn obey(&mut self, request: Request) -> anyhow::Result<()> {
        match request {
            Request::Status => Ok(()),
            Request::Adopt => {
                self.adopted = true;
                Ok(())
            }
            Request::Start(unit) => {
                let name = unit.name.clone();
                self.programs.insert(name.clone(), Program { unit, health: Health::default(), due: None });
                self.start(&name)
            }
            Request::Restart(name) => self.start(&name),
            Request::Stop(name, signal) => self.stop(&name, Signal::try_from(signal).context("the signal")?),
        }
    }

    fn start(&mut self, name: &str) -> anyhow::Result<()> {
        let group = self.group(name);
        cgroups::make(&self.hierarchies, &group)?;
        let program = self.programs.get_mut(name).with_context(|| format!("no program {name}"))?;
        program.health.wanted = true;
        program.due = None;
        if program.health.pid.is_some() {
            return Ok(());
        }
        let mut command = command(&program.unit)?;
        // A child is born where its parent is: no moment in the wrong group.
        cgroups::enter(&self.hierarchies, &group)?;
        let spawned = command.spawn().with_context(|| format!("start {name}"));
        if let Ok(child) = &spawned {
            program.health.pid = i32::try_from(child.id()).ok();
        }
        self.enter("init")?;
        spawned.map(drop)
    }

    fn stop(&mut self, name: &str, signal: Signal) -> anyhow::Result<()> {
        let program = self.programs.get_mut(name).with_context(|| format!("no program {name}"))?;
        program.health.wanted = false;
        program.due = None;
        let Some(pid) = program.health.pid else { return Ok(()) };
        let _ = kill(Pid::from_raw(pid), signal);
        let end = Instant::now() + STOP_DEADLINE;
        while self.programs.get(name).is_some_and(|program| program.health.pid.is_some()) {
            if Instant::now() > end {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(20));
            self.reap();
        }
        Ok(())
    }

    /// Takes note of every process that ended; orphans of containers among them.
    fn reap(&mut self) {
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit status {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("killed by {signal}")),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            let ended = self.programs.values_mut().find(|program| program.health.pid == Some(pid.as_raw()));
            if let Some(program) = ended {
                program.health.pid = None;
                program.health.last_end = Some(how);
                if program.health.wanted {
                    program.health.ended += 1;
                    program.due = Some(Instant::now() + RESTART_DELAY);
                }
            }
        }
    }

    fn start_due(&mut self) {
        let is_due = |program: &Program| program.due.is_some_and(|due| due <= Instant::now());
        let due: Vec<_> = self
            .programs
            .iter()
            .filter(|(_, program)| is_due(program))
            .map(|(name, _)| name.clone())
            .collect();
        for name in due {
            if let Err(error) = self.start(&name) {
                eprintln!("machine: {error:#}");
            }
        }
    }

    /// Ends every process and takes cgroups and files away; mounts and links go with the namespaces. The folder stays,
    /// with the logs, until the next up or down.
    fn give_up(&mut self) {
        let end = Instant::now() + STOP_DEADLINE;
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        while waitpid(None, None).is_ok() && Instant::now() < end {}
        let _ = cgroups::enter(&self.hierarchies, Path::new(""));
        let _ = cgroups::remove(&self.hierarchies, &self.cgroup);
        if let Some(whole) = self.cgroup.parent() {
            // The last machine of the cluster succeeds.
            cgroups::remove_empty(&self.hierarchies, whole);
        }
        self.traces.remove();
    }
}

fn command(unit: &Unit) -> anyhow::Result<Command> {
    let (program, arguments) = unit.argv.split_first().context("a program without a name")?;
    let log = Path::new(rootfs::FOLDER).join("log").join(format!("{}.log", unit.name));
    let log = OpenOptions::new().create(true).append(true).open(&log).context("open its log")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").env_clear().env("PATH", PATH).env("HOME", "/root");
    command.envs(&unit.env).process_group(0);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(command)
}
