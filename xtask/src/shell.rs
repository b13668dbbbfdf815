//! Programs that tasks run.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, bail};

/// The root of the workspace.
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// The directory that cargo builds into.
pub fn target_dir() -> PathBuf {
    // Relative paths of the variable count from the workspace, where every cargo of ours runs.
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// A program that runs in the root of the workspace.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// The cargo that started this task.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments);
    cargo
}

/// A command line as one would type it.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{word}'"),
    }
}

/// Runs a program whose output is the reader's.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    println!("$ {}", shown(command));
    let status = command.status().with_context(|| format!("start {}", shown(command)))?;
    match status.success() {
        true => Ok(()),
        false => bail!("`{}`: {status}", shown(command)),
    }
}

/// Runs a program and gives its standard output.
///
/// # Errors
/// When it cannot be started or fails; with what it wrote to standard error.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = quiet(command)?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("`{}`: {}: {}", shown(command), output.status, error.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{}` printed no UTF-8", shown(command)))
}

/// Runs a program that must not fail to start, whatever its end.
///
/// # Errors
/// When it cannot be started.
pub fn quiet(command: &mut Command) -> anyhow::Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("start {}", shown(command)))
}

/// Where a program is found.
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Absolute paths of the shared libraries, and of the loader, that a program needs.
///
/// # Errors
/// When ldd cannot tell.
pub fn libraries_of(program: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let listed = output(command("ldd").arg(program))?;
    let words = listed.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(|word| PathBuf::from(word.trim_end_matches(':'))).filter(|file| file != program).collect())
}

/// Whether this process may enter namespaces and load programs.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_can_be_pasted() {
        let mut command = Command::new("/usr/bin/meshctl");
        command.args(["local", "exec", "client", "--", "sh", "-c", "exit 1", ""]);
        assert_eq!(shown(&command), "meshctl local exec client -- sh -c 'exit 1' ''");
    }
}
