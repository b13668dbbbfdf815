//! The programs of Kubernetes, from our Go module.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::go::{Module, Program};

/// The version of Kubernetes that the module's go.mod names: it is told to the linker.
const VERSION_FLAGS: &str = "-s -w -X k8s.io/component-base/version.gitVersion=v1.34.1 \
                             -X k8s.io/component-base/version.gitMajor=1 \
                             -X k8s.io/component-base/version.gitMinor=34";

const fn program(name: &'static str, package: &'static str, seconds: u32) -> Program {
    Program { name, package, linker_flags: VERSION_FLAGS, is_test: false, seconds }
}

const MODULE: Module = Module {
    folder: "kubernetes",
    programs: &[
        program("pause", "./pause", 10),
        program("kubernetes", "./kubernetes", 300),
        program("coredns", "./coredns", 60),
    ],
};

/// The folder with the programs, built if need be.
///
/// # Errors
/// When they do not build.
pub fn built() -> anyhow::Result<PathBuf> {
    MODULE.built()
}

/// One of the programs of Kubernetes, on this machine.
pub fn command(programs: &Path, name: &str) -> Command {
    let mut command = Command::new(programs.join("kubernetes"));
    command.arg(name);
    command
}

/// kubectl with the credentials of a file.
pub fn kubectl(programs: &Path, kubeconfig: &Path) -> Command {
    let mut kubectl = command(programs, "kubectl");
    kubectl.env("KUBECONFIG", kubeconfig);
    kubectl
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shell;

    #[test]
    fn the_version_is_that_of_go_mod() {
        let file = shell::root().join("xtask/go/kubernetes/go.mod");
        let text = std::fs::read_to_string(file).expect("go.mod");
        let line = text.lines().find(|line| line.contains("k8s.io/kubernetes v")).expect("its version");
        let version = line.split_whitespace().nth(1).expect("a version");
        assert!(VERSION_FLAGS.contains(&format!("gitVersion={version} ")), "{version}");
    }
}
