//! What is known of a cluster between two commands: its folder, its index, its machines.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{
    cgroups,
    machine::Machine,
    plan::{MOST, Plan},
};
use crate::shell;

/// One file per cluster of this machine, locked while any machine of it lives, and the control sockets: a path of a
/// socket may not be long.
const REGISTRY: &str = "/run/undermesh-clusters";

/// A cluster, as it is written down.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct State {
    /// Its name.
    pub name: String,
    /// Which of this machine's clusters it is.
    pub index: u8,
    /// Its machines: the control machine first.
    pub machines: Vec<Machine>,
    /// Everything came up.
    pub complete: bool,
}

/// (pure) The folder of a cluster.
pub fn folder(name: &str) -> PathBuf {
    shell::target_dir().join("cluster").join(name)
}

/// (pure) Its credentials.
pub fn kubeconfig(name: &str) -> PathBuf {
    folder(name).join("kubeconfig")
}

/// (pure) Checks a name: it becomes a folder's.
///
/// # Errors
/// When it is not a plain word.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        !name.is_empty() && name.len() <= 40 && name.chars().all(plain),
        "a cluster's name is made of small letters, digits and dashes: {name:?}"
    );
    Ok(())
}

impl State {
    /// What is written down of a cluster.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn load(name: &str) -> anyhow::Result<Option<Self>> {
        let file = folder(name).join("state.json");
        match fs::read(&file) {
            Ok(bytes) => {
                Ok(Some(serde_json::from_slice(&bytes).with_context(|| file.display().to_string())?))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", file.display())),
        }
    }

    /// A cluster that is up.
    ///
    /// # Errors
    /// When there is none of that name, or a machine of it is gone.
    pub fn running(name: &str) -> anyhow::Result<Self> {
        let Some(state) = Self::load(name)? else {
            bail!("there is no cluster {name}: `cargo xtask cluster up --name {name}`");
        };
        match state.machines.iter().find(|machine| !machine.alive()) {
            Some(gone) => bail!("the machine {} of cluster {name} is gone: down, then up", gone.name),
            None if !state.complete => bail!("cluster {name} did not come up completely: down, then up"),
            None => Ok(state),
        }
    }

    /// Writes it down.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> anyhow::Result<()> {
        let file = folder(&self.name).join("state.json");
        let partial = file.with_extension("partial");
        fs::write(&partial, serde_json::to_vec_pretty(self)?)?;
        Ok(fs::rename(partial, file)?)
    }

    /// Its addresses.
    pub fn plan(&self) -> Plan {
        Plan { index: self.index }
    }

    /// One of its machines.
    ///
    /// # Errors
    /// When it has none of that name.
    pub fn machine(&self, name: &str) -> anyhow::Result<&Machine> {
        let names =
            || self.machines.iter().map(|machine| machine.name.as_str()).collect::<Vec<_>>().join(", ");
        self.machines
            .iter()
            .find(|machine| machine.name == name)
            .with_context(|| format!("no machine {name}: there are {}", names()))
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Machine] {
        self.machines.get(1..).unwrap_or_default()
    }
}

/// An index that no running cluster has, held until the first machine has it.
pub struct Index {
    /// The index.
    pub plan: Plan,
    _choosing: Flock<File>,
}

impl Index {
    /// Takes the first free one, and removes what a dead cluster left under it.
    ///
    /// # Errors
    /// When all are taken, or what was left cannot be removed.
    pub fn take(owner: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(REGISTRY).with_context(|| format!("make {REGISTRY}"))?;
        let lock = File::create(Path::new(REGISTRY).join("lock"))?;
        let choosing = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .context("lock the list of clusters")?;
        for index in 0..MOST {
            let plan = Plan { index };
            let file = fs::OpenOptions::new().create(true).append(true).open(index_file(plan))?;
            if let Ok(held) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                drop(held);
                sweep(plan)?;
                fs::write(index_file(plan), format!("{}\n", owner.display()))?;
                return Ok(Self { plan, _choosing: choosing });
            }
        }
        bail!("{MOST} clusters run on this machine already")
    }
}

/// (pure) The file that says that an index is taken.
pub fn index_file(plan: Plan) -> PathBuf {
    Path::new(REGISTRY).join(plan.index.to_string())
}

/// (pure) The control socket of a machine.
pub fn socket(plan: Plan, machine: &str) -> PathBuf {
    Path::new(REGISTRY).join(format!("{}-{machine}.sock", plan.index))
}

/// Removes what a cluster has outside its folder and its namespaces: cgroups, link, sockets.
///
/// # Errors
/// When something cannot be removed.
pub fn sweep(plan: Plan) -> anyhow::Result<()> {
    cgroups::remove(&cgroups::hierarchies()?, Path::new(&plan.cgroup()))?;
    // The link goes with the namespace of its other end, a moment after the last process.
    if Path::new("/sys/class/net").join(plan.link()).exists() {
        let deleted = shell::output(shell::command("ip").args(["link", "delete", &plan.link()]));
        if Path::new("/sys/class/net").join(plan.link()).exists() {
            deleted?;
        }
    }
    for place in plan.places() {
        match fs::remove_file(socket(plan, place.name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

/// Gives an index back.
///
/// # Errors
/// When its file cannot be removed.
pub fn release(plan: Plan) -> anyhow::Result<()> {
    match fs::remove_file(index_file(plan)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_words() {
        for (name, good) in [("dev", true), ("a-2", true), ("", false), ("../x", false), ("A", false)] {
            assert_eq!(check_name(name).is_ok(), good, "{name:?}");
        }
    }
}
