//! `meshctl local`: a mesh on this machine, from a folder of Kubernetes YAML.

use std::{
    fs::File,
    io::ErrorKind,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use super::duration;
use crate::local::{
    cgroup::Group,
    expand::Key,
    guardian::{self, Owner},
    layout::{Layout, ProcessId},
    namespace::{EnterArgs, SELF, enter},
    rpc,
    status::Status,
};
use crate::output::{Output, print};

/// Between two looks at a mesh that is waited for.
const LOOK: Duration = Duration::from_millis(150);
/// The supervisor answers within this after its start, or it failed.
const BIRTH: Duration = Duration::from_secs(20);
/// A mesh that was told to end is gone within this.
const END: Duration = Duration::from_secs(20);

/// What can be done with a local mesh.
#[derive(Debug, clap::Subcommand)]
pub enum LocalCommand {
    /// Run a mesh from a folder of Kubernetes YAML, which stays watched.
    Up(UpArgs),
    /// Say how the mesh is, and whether what is written now is in force.
    Status(StatusArgs),
    /// Run a program of this machine inside a pod.
    Exec(ExecArgs),
    /// End the mesh and remove everything of it.
    Down(Name),
}

/// Which mesh.
#[derive(Clone, Debug, clap::Args)]
pub struct Name {
    /// Name of the mesh; meshes of different names do not know of each other.
    #[arg(long, default_value = "default", env = "UNDERMESH_LOCAL_NAME")]
    pub name: String,
}

/// Arguments of `up`.
#[derive(Debug, clap::Args)]
pub struct UpArgs {
    /// The folder.
    dir: PathBuf,
    #[command(flatten)]
    name: Name,
    /// Stay, show what happens, and take the mesh down at Ctrl-C.
    #[arg(long)]
    foreground: bool,
    /// How long to wait for everything to be in force before giving back the shell.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    wait: Duration,
}

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    name: Name,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// How long to wait for everything to be in force; fails when it is not by then.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    wait: Option<Duration>,
}

/// Arguments of `exec`.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    #[command(flatten)]
    name: Name,
    /// Namespace of the pod.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// The pod, or the workload that it belongs to.
    pod: String,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Runs one of them.
///
/// # Errors
/// What went wrong, for the user.
pub fn run(command: LocalCommand) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("`meshctl local` makes network namespaces, so it has to run as root");
    }
    match command {
        LocalCommand::Up(args) => up(&args),
        LocalCommand::Status(args) => status(&args),
        LocalCommand::Exec(args) => exec(&args),
        LocalCommand::Down(name) => down(&name.name),
    }
}

fn up(args: &UpArgs) -> anyhow::Result<ExitCode> {
    let name = &args.name.name;
    let (layout, group) = places(name)?;
    let folder = args.dir.canonicalize().with_context(|| format!("open {}", args.dir.display()))?;
    if !folder.is_dir() {
        bail!("{} is not a folder", folder.display());
    }
    if guardian::running(&layout) {
        bail!("a local mesh `{name}` is running already: end it with `meshctl local down --name {name}`");
    }
    // What a crash left behind is in nobody's way.
    guardian::clean(&layout, &group).context("remove what a former mesh of this name left")?;
    layout.create().with_context(|| format!("make {}", layout.dir().display()))?;
    let own = ProcessId::of(std::process::id()).context("read /proc")?;
    Owner { guardian: own, supervisor: None }.write(&layout)?;
    let log = File::create(layout.log("supervisor"))?;
    let guardian = Command::new(SELF)
        .arg0("meshctl")
        .args(["internal", "guardian", "--name", name, "--folder"])
        .arg(&folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("start the guardian")?;
    // It is to outlive us; nobody waits for it.
    drop(guardian);
    let status = born(&layout, args.wait)?;
    print!("{}", status.table());
    if !args.foreground {
        return Ok(ExitCode::SUCCESS);
    }
    foreground(&layout)?;
    down(name)
}

/// Waits until the mesh answers, then up to `wait` until it is in force, telling what it waits for.
fn born(layout: &Layout, wait: Duration) -> anyhow::Result<Status> {
    let birth = Instant::now() + BIRTH;
    let deadline = Instant::now() + wait;
    let mut told = String::new();
    loop {
        match rpc::status(&layout.socket()) {
            Ok(status) if status.in_force || Instant::now() >= deadline => return Ok(status),
            Ok(status) => {
                let now = status.waiting.first().cloned().unwrap_or_default();
                if now != told {
                    eprintln!("waiting: {now}");
                    told = now;
                }
            }
            Err(error) if Instant::now() >= birth => {
                let log = std::fs::read_to_string(layout.log("supervisor")).unwrap_or_default();
                bail!("the mesh did not start: {error}\n{log}");
            }
            Err(_) if !layout.dir().exists() => {
                bail!("the mesh ended while it started; `meshctl local up --foreground` shows more")
            }
            Err(_) => {}
        }
        thread::sleep(LOOK);
    }
}

/// Shows the supervisor's log until Ctrl-C, or until the mesh ends by itself.
fn foreground(layout: &Layout) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        while layout.dir().exists() {
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
        anyhow::Ok(())
    })
}

fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let (layout, group) = places(&args.name.name)?;
    let deadline = Instant::now() + args.wait.unwrap_or_default();
    let status = loop {
        let status = live(&layout, &group, &args.name.name)?;
        if status.in_force || args.wait.is_none() || Instant::now() >= deadline {
            break status;
        }
        thread::sleep(LOOK);
    };
    let text = match args.output {
        Output::Table => status.table(),
        Output::Json => serde_json::to_string_pretty(&status)? + "\n",
    };
    print(&text)?;
    let failed = args.wait.is_some() && !status.in_force;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The status of a mesh that runs.
fn live(layout: &Layout, group: &Group, name: &str) -> anyhow::Result<Status> {
    alive(layout, group, name, || rpc::status(&layout.socket()))
}

/// Asks a mesh that runs; one that crashed is cleaned up, and is an error.
fn alive<T>(
    layout: &Layout,
    group: &Group,
    name: &str,
    ask: impl FnOnce() -> std::io::Result<T>,
) -> anyhow::Result<T> {
    if guardian::running(layout) {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if guardian::running(layout) => {
                let log = layout.log("supervisor");
                return Err(error).with_context(|| {
                    format!("the supervisor of `{name}` does not answer; its log is {}", log.display())
                });
            }
            // It ended while it was asked.
            Err(_) => {}
        }
    }
    if layout.dir().exists() {
        guardian::clean(layout, group)?;
        bail!("the local mesh `{name}` had crashed; what it left was removed");
    }
    bail!("there is no local mesh `{name}`: start one with `meshctl local up DIR --name {name}`")
}

fn exec(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let (layout, group) = places(&args.name.name)?;
    let place = alive(&layout, &group, &args.name.name, || {
        rpc::place(&layout.socket(), Key::new(&args.namespace, &args.pod))
    })?;
    let place = place.map_err(|reason| anyhow::anyhow!(reason))?;
    let enter_args = EnterArgs {
        parent: None,
        cgroup: Some(place.cgroup),
        holder: Some(place.holder),
        uid: None,
        gid: None,
        cwd: None,
        command: args.command.clone(),
    };
    match enter(&enter_args, Some(&place.env)) {
        Ok(()) => bail!("a program that was started cannot end here"),
        // The codes that shells use for it.
        Err(error) => {
            eprintln!("meshctl: {error:#}");
            let missing = error.chain().any(|cause| {
                cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == ErrorKind::NotFound)
            });
            Ok(ExitCode::from(if missing { 127 } else { 126 }))
        }
    }
}

fn down(name: &str) -> anyhow::Result<ExitCode> {
    let (layout, group) = places(name)?;
    let owner = Owner::read(&layout);
    if guardian::running(&layout) && rpc::down(&layout.socket()).is_ok() {
        let deadline = Instant::now() + END;
        let gone = || !layout.dir().exists() && owner.is_none_or(|owner| !owner.guardian.alive());
        while !gone() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
    guardian::clean(&layout, &group).context("remove what is left of the mesh")?;
    Ok(ExitCode::SUCCESS)
}

fn places(name: &str) -> anyhow::Result<(Layout, Group)> {
    Ok((Layout::new(name)?, Group::of_mesh(name)?))
}

/// `PATH` for programs of a mesh: where this program is, so that they are of one build, then the user's own.
pub fn program_path() -> anyhow::Result<String> {
    let own = std::env::current_exe().context("find this program")?;
    let beside = own.parent().map(Path::to_path_buf).unwrap_or_default();
    let users = std::env::var("PATH")
        .unwrap_or_else(|_| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    Ok(format!("{}:{users}", beside.display()))
}
