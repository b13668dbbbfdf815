//! Namespaces of pods and nodes: held by a small process each, entered by the programs that run in them.
//!
//! A namespace is `/proc/<pid of its holder>/ns/…`: no name is left behind when the processes are gone.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::{Gid, Uid, getppid, pause, setgid, setgroups, sethostname, setuid},
};

use super::cgroup::Group;

/// This very program, also after its file was replaced by a newer one.
pub const SELF: &str = "/proc/self/exe";

/// The path of a holder's network namespace.
pub fn netns(holder: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{holder}/ns/net"))
}

/// What a new namespace gets.
#[derive(Clone, Debug, clap::Args)]
pub struct PauseArgs {
    /// The process that must live for this one to live.
    #[arg(long)]
    parent: i32,
    /// The cgroup to join.
    #[arg(long)]
    cgroup: PathBuf,
    /// Host name; makes a UTS namespace.
    #[arg(long)]
    hostname: Option<String>,
    /// Files to put over others: `from:to`.
    #[arg(long)]
    bind: Vec<String>,
    /// Mount a BPF file system of its own, so that pins vanish with the namespace.
    #[arg(long)]
    bpffs: bool,
}

/// Where a program is to run.
#[derive(Clone, Debug, clap::Args)]
pub struct EnterArgs {
    /// The process that must live for this one to live; none: this one stands alone.
    #[arg(long)]
    pub parent: Option<i32>,
    /// The cgroup to join.
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// The holder of the namespaces.
    #[arg(long)]
    pub holder: Option<u32>,
    /// User to become.
    #[arg(long)]
    pub uid: Option<u32>,
    /// Group to become.
    #[arg(long)]
    pub gid: Option<u32>,
    /// Folder to run in.
    #[arg(long)]
    pub cwd: Option<PathBuf>,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// Body of the holder: makes the namespaces, says so on its output, and waits for its end.
///
/// # Errors
/// When a namespace or mount cannot be made.
pub fn hold(args: &PauseArgs) -> anyhow::Result<()> {
    join(&args.cgroup)?;
    let uts = if args.hostname.is_some() { CloneFlags::CLONE_NEWUTS } else { CloneFlags::empty() };
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | uts).context("make namespaces")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    for pair in &args.bind {
        let (from, to) = pair.split_once(':').context("--bind wants from:to")?;
        // A machine without this file has nothing that the pod would have to be kept from.
        if Path::new(to).exists() {
            mount(Some(from), to, none, MsFlags::MS_BIND, none).with_context(|| format!("bind {to}"))?;
        }
    }
    if args.bpffs {
        mount(Some("bpffs"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .context("mount a BPF file system on /sys/fs/bpf")?;
    }
    if let Some(hostname) = &args.hostname {
        sethostname(hostname).context("set the host name")?;
    }
    die_with(args.parent)?;
    println!("ready");
    io::stdout().flush().context("say ready")?;
    loop {
        pause();
    }
}

/// Body of the entering process: becomes the program, inside.
///
/// # Errors
/// Always, as success does not return.
pub fn enter(args: &EnterArgs, env: Option<&BTreeMap<String, String>>) -> anyhow::Result<()> {
    if let Some(cgroup) = &args.cgroup {
        join(cgroup)?;
    }
    if let Some(holder) = args.holder {
        enter_all(holder)?;
    }
    lift_descriptor_limit();
    if let Some(gid) = args.gid {
        setgroups(&[]).context("drop groups")?;
        setgid(Gid::from_raw(gid)).with_context(|| format!("become group {gid}"))?;
    }
    if let Some(uid) = args.uid {
        setuid(Uid::from_raw(uid)).with_context(|| format!("become user {uid}"))?;
    }
    if let Some(parent) = args.parent {
        // After the change of user, which resets it.
        die_with(parent)?;
    }
    let (program, rest) = args.command.split_first().context("no program")?;
    let mut command = Command::new(program);
    command.args(rest);
    if let Some(env) = env {
        command.envs(env);
    }
    if let Some(cwd) = &args.cwd {
        std::env::set_current_dir(cwd).with_context(|| format!("enter folder {}", cwd.display()))?;
    }
    Err(command.exec()).with_context(|| format!("run {program}"))
}

/// Enters the network, mount and host-name namespaces of `holder`.
fn enter_all(holder: u32) -> anyhow::Result<()> {
    let open = |kind: &str| {
        let path = format!("/proc/{holder}/ns/{kind}");
        File::open(&path).with_context(|| format!("open {path}"))
    };
    // All are opened before the first is entered: the mount namespace may show another /proc.
    let (net, uts, mnt) = (open("net")?, open("uts")?, open("mnt")?);
    setns(net, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
    setns(uts, CloneFlags::CLONE_NEWUTS).context("enter the host-name namespace")?;
    let cwd = std::env::current_dir();
    setns(mnt, CloneFlags::CLONE_NEWNS).context("enter the mount namespace")?;
    if let Ok(cwd) = cwd {
        // Entering moved us to the root; the same folder is there as well.
        let _ = std::env::set_current_dir(cwd);
    }
    Ok(())
}

fn join(cgroup: &Path) -> anyhow::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("join cgroup {}", cgroup.display()))
}

/// Has the kernel end this process when the thread that started it ends.
///
/// # Errors
/// When the parent is gone already.
pub fn die_with(parent: i32) -> anyhow::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("set the parent-death signal")?;
    if getppid().as_raw() != parent {
        bail!("the parent process is gone");
    }
    Ok(())
}

/// As many descriptors as may be: agents hold two per connection.
fn lift_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Fewer descriptors are no reason not to run.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What a holder shall be.
#[derive(Debug)]
pub struct Holding<'a> {
    /// The group of its processes.
    pub group: &'a Group,
    /// A pod's host name; none for a node.
    pub hostname: Option<&'a str>,
    /// Files over files.
    pub binds: Vec<(PathBuf, &'a str)>,
    /// Whether pins are kept inside.
    pub bpffs: bool,
}

/// A running holder. It ends with the thread that started it, and when this is dropped.
#[derive(Debug)]
pub struct Holder(Child);

impl Holder {
    /// Starts one and waits until its namespaces are there.
    ///
    /// # Errors
    /// When it cannot make them; with its own words.
    pub fn start(holding: &Holding<'_>) -> anyhow::Result<Self> {
        holding.group.create_inside().context("make a cgroup")?;
        let mut command = Command::new(SELF);
        command.arg0("meshctl");
        command.args(["internal", "pause", "--parent", &std::process::id().to_string(), "--cgroup"]);
        command.arg(holding.group.path());
        if let Some(hostname) = holding.hostname {
            command.args(["--hostname", hostname]);
        }
        for (from, to) in &holding.binds {
            command.arg("--bind").arg(format!("{}:{to}", from.display()));
        }
        if holding.bpffs {
            command.arg("--bpffs");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start the holder of a namespace")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).context("read from the holder")?;
        }
        if line.trim() != "ready" {
            let output = child.wait_with_output().context("wait for the holder")?;
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        child.stderr = None;
        Ok(Self(child))
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it still holds its namespaces.
    pub fn alive(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
