//! `cargo xtask test [SUITE]…`: builds what the suites need, runs them, and ends with one line of numbers.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    ops::AddAssign,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::{cluster, conformance, ebpf, go, image, kernels, shell};

/// The package that holds the suites.
const SUITES: &str = "mesh-tests";
/// The suite that needs a real Kubernetes.
const CLUSTER: &str = "cluster";
/// The cluster that it starts.
const CLUSTER_NAME: &str = "test";
/// The suite that compares with a real Helm.
const INSTALL: &str = "install";
const HELM: go::Module = go::Module {
    folder: "helm",
    programs: &[go::Program {
        name: "helm",
        package: "helm.sh/helm/v3/cmd/helm",
        linker_flags: "-s -w",
        is_test: false,
        seconds: 80,
    }],
};
/// The programs that a local mesh runs.
const PROGRAMS: &[&str] = &["mesh-cli", "mesh-control", "mesh-node", "mesh-waypoint", "bookinfo"];
/// Tests of the unit run side by side; more threads than this would starve the timed ones on a small machine.
const UNIT_THREADS: usize = 4;

/// Which tests to run.
#[derive(Args, Debug)]
pub struct Options {
    /// `unit`; `net` (all suites in network namespaces); `cluster` (a real Kubernetes); `conformance` (the Gateway API's
    /// suite on one); `kernels` (other kernels in
    /// emulation); `fuzz` (a short run of each target); or one suite by its name. Default: all.
    suites: Vec<String>,
    /// Only tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
    /// Leave the cluster of the suite `cluster` up, for a look or for a faster next run.
    #[arg(long)]
    keep: bool,
}

/// What ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that did not.
    pub failed: usize,
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Suite {
    Unit,
    World(String),
    Fuzz,
    Kernels,
    Cluster,
    Conformance,
}

/// Runs the suites.
///
/// # Errors
/// When a test fails, or a suite cannot run.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let wanted = choose(&options.suites, &world_suites()?)?;
    if wanted.iter().any(|suite| !matches!(suite, Suite::Unit | Suite::Fuzz)) && !shell::is_root() {
        bail!(
            "these suites need root: they build namespaces and load programs into the kernel. `unit` does not"
        );
    }
    let started = Instant::now();
    ebpf::build(&ebpf::Options::default())?;
    if wanted.iter().any(|suite| matches!(suite, Suite::World(_) | Suite::Kernels | Suite::Cluster)) {
        raise_limits();
    }
    build()?;
    let mut totals = Totals::default();
    for suite in &wanted {
        totals += match suite {
            Suite::Unit => unit(options.filter.as_deref())?,
            Suite::World(name) => world(name, options.filter.as_deref())?,
            Suite::Fuzz => fuzz()?,
            Suite::Kernels => kernels::test()?,
            Suite::Cluster => cluster(options)?,
            Suite::Conformance => on_cluster(options.keep, |_, _| conformance::test(CLUSTER_NAME))?,
        };
    }
    println!("test: {} suites in {} s", wanted.len(), started.elapsed().as_secs());
    println!("{} passed, {} failed", totals.passed, totals.failed);
    match totals {
        Totals { failed: 0, passed } if passed > 0 => Ok(()),
        Totals { failed: 0, .. } => bail!("no test ran"),
        Totals { failed, .. } => bail!("{failed} tests failed"),
    }
}

/// (pure) Names to suites, in the order in which they run: cheapest first.
fn choose(names: &[String], worlds: &[String]) -> anyhow::Result<BTreeSet<Suite>> {
    let net = || worlds.iter().cloned().map(Suite::World);
    let mut chosen = BTreeSet::new();
    if names.is_empty() {
        chosen.extend([Suite::Unit, Suite::Fuzz, Suite::Kernels, Suite::Cluster, Suite::Conformance]);
        chosen.extend(net());
    }
    for name in names {
        match name.as_str() {
            "unit" => drop(chosen.insert(Suite::Unit)),
            "net" => chosen.extend(net()),
            "fuzz" => drop(chosen.insert(Suite::Fuzz)),
            "kernels" => drop(chosen.insert(Suite::Kernels)),
            CLUSTER => drop(chosen.insert(Suite::Cluster)),
            "conformance" => drop(chosen.insert(Suite::Conformance)),
            world if worlds.iter().any(|known| known == world) => {
                chosen.insert(Suite::World(world.to_owned()));
            }
            other => bail!(
                "no suite {other}: unit, net, cluster, conformance, fuzz, kernels, {}",
                worlds.join(", ")
            ),
        }
    }
    Ok(chosen)
}

/// The suites in network namespaces: test targets of the package.
fn world_suites() -> anyhow::Result<Vec<String>> {
    let mut suites = test_targets(|package| package == SUITES)?;
    suites.retain(|suite| suite != CLUSTER);
    Ok(suites)
}

/// Names of the test targets of the packages that are wanted.
fn test_targets(wanted: impl Fn(&str) -> bool) -> anyhow::Result<Vec<String>> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(shell::root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata")?;
    let packages = metadata.packages.iter().filter(|package| wanted(&package.name));
    let targets = packages.flat_map(|package| &package.targets).filter(|target| target.is_test());
    Ok(targets.map(|target| target.name.clone()).collect())
}

/// Every build of tests selects this, and so do all that run them: with another selection cargo unites the features of
/// other packages, and compiles most dependencies once more for it. Without this program, which would be replaced while
/// it runs and starts itself.
const SELECTION: &[&str] = &["--workspace", "--exclude", "mesh-ebpf", "--exclude", "xtask"];

/// Builds all tests, and the programs that they run.
fn build() -> anyhow::Result<()> {
    let mut build = shell::cargo(&["build", "--bins", "--tests"]);
    shell::run(build.args(SELECTION)).context("build the tests and the programs of the mesh")
}

/// `cargo test` of what [`build`] built.
pub fn cargo_test(arguments: &[&str]) -> Command {
    let mut cargo = shell::cargo(&["test"]);
    cargo.args(SELECTION).args(arguments);
    cargo
}

/// Builds the programs that the mesh consists of; for tests as tests have them, else nothing but them.
///
/// # Errors
/// When one does not build.
pub fn build_programs(profile: &[&str]) -> anyhow::Result<()> {
    if profile == ["--profile", "dev"] {
        return build();
    }
    let mut build = shell::cargo(&["build", "--bins"]);
    build.args(profile);
    for package in PROGRAMS {
        build.args(["--package", package]);
    }
    shell::run(&mut build).context("build the programs of the mesh")
}

/// Raises the number of descriptors: suites hold thousands of connections.
pub fn raise_limits() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    /// What one suite needs at most, with a margin.
    const DESCRIPTORS: u64 = 1 << 18;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let more = || setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS.max(soft), DESCRIPTORS.max(hard));
    // Not every root may exceed the hard limit; up to it everybody may.
    if more().is_err() && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        eprintln!("test: descriptors stay limited to {soft}");
    }
}

fn unit(filter: Option<&str>) -> anyhow::Result<Totals> {
    println!("test: unit");
    let mut cargo = cargo_test(&["--no-fail-fast", "--lib", "--bins"]);
    for target in test_targets(|package| package != SUITES)? {
        cargo.args(["--test", &target]);
    }
    with_arguments(&mut cargo, UNIT_THREADS, filter);
    let mut totals = counted(&mut cargo)?;
    let mut cargo = shell::cargo(&["test", "--package", "xtask"]);
    with_arguments(&mut cargo, UNIT_THREADS, filter);
    totals += counted(&mut cargo)?;
    Ok(totals)
}

fn world(name: &str, filter: Option<&str>) -> anyhow::Result<Totals> {
    println!("test: {name}");
    let mut cargo = cargo_test(&["--test", name]);
    with_arguments(&mut cargo, 1, filter);
    if name == INSTALL {
        cargo.env("UNDERMESH_TEST_HELM", HELM.built()?.join("helm"));
    }
    counted(&mut cargo)
}

/// The suite on a real Kubernetes.
fn cluster(options: &Options) -> anyhow::Result<Totals> {
    println!("test: {CLUSTER}");
    on_cluster(options.keep, |kubeconfig, began| prepared(kubeconfig, options, began))
}

/// Runs something on the cluster that `KUBECONFIG` names, which has our images then, or on one of our own, which is taken
/// down again if it was not there before.
fn on_cluster(
    keep: bool,
    run: impl FnOnce(&cluster::Kubeconfig, Instant) -> anyhow::Result<Totals>,
) -> anyhow::Result<Totals> {
    let began = Instant::now();
    let was_up = cluster::is_up(CLUSTER_NAME);
    let kubeconfig = cluster::ensure(CLUSTER_NAME)?;
    let ran = run(&kubeconfig, began);
    if kubeconfig.is_own && !was_up && !keep {
        cluster::down(CLUSTER_NAME)?;
    }
    ran
}

fn prepared(kubeconfig: &cluster::Kubeconfig, options: &Options, began: Instant) -> anyhow::Result<Totals> {
    let mut cargo = cargo_test(&["--test", CLUSTER]);
    with_arguments(&mut cargo, 1, options.filter.as_deref());
    cargo.env("KUBECONFIG", &kubeconfig.file);
    cargo.env("UNDERMESH_TEST_KUBECTL", cluster::kubernetes()?);
    if kubeconfig.is_own {
        cluster::load(CLUSTER_NAME, &image::build(&[], "dev")?)?;
        cargo.env("UNDERMESH_TEST_CLUSTER", CLUSTER_NAME);
        cargo.env("UNDERMESH_TEST_CLUSTER_STATE", cluster::state_file(CLUSTER_NAME));
        cargo.env("UNDERMESH_TEST_XTASK", std::env::current_exe().context("this program")?);
    }
    println!("test: the cluster is there and has its images after {} s", began.elapsed().as_secs());
    counted(&mut cargo)
}

fn with_arguments(cargo: &mut Command, threads: usize, filter: Option<&str>) {
    cargo.args(["--", "--test-threads", &threads.to_string()]);
    cargo.args(filter);
}

fn fuzz() -> anyhow::Result<Totals> {
    println!("test: fuzz");
    crate::fuzz::short()
}

/// Runs a program that prints results as libtest does, shows what it prints, and counts.
///
/// # Errors
/// When it cannot be started.
pub fn counted(command: &mut Command) -> anyhow::Result<Totals> {
    println!("$ {}", shell::shown(command));
    let mut child = command.stdout(Stdio::piped()).spawn().context("start the tests")?;
    let mut counter = Counter::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            counter.line(&line);
        }
    }
    Ok(counter.finish(child.wait()?.success()))
}

/// Counts results of libtest's format.
#[derive(Debug, Default)]
pub struct Counter(Totals);

impl Counter {
    /// Takes one line of output.
    pub fn line(&mut self, line: &str) {
        let Some(rest) = line.trim().strip_prefix("test result: ") else { return };
        let number = |word: &str| -> usize {
            let mut words = rest.split([' ', ';', '.']).filter(|word| !word.is_empty());
            let mut previous = "";
            words
                .find_map(|this| {
                    (this == word).then_some(previous).or_else(|| {
                        previous = this;
                        None
                    })
                })
                .and_then(|number| number.parse().ok())
                .unwrap_or_default()
        };
        self.0 += Totals { passed: number("passed"), failed: number("failed") };
    }

    /// The sum. A program that failed without a failed test, because it crashed or did not compile, counts as one.
    pub fn finish(self, succeeded: bool) -> Totals {
        let mut totals = self.0;
        if !succeeded && totals.failed == 0 {
            totals.failed = 1;
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let count = |lines: &[&str], succeeded| {
            let mut counter = Counter::default();
            lines.iter().for_each(|line| counter.line(line));
            let totals = counter.finish(succeeded);
            (totals.passed, totals.failed)
        };
        let good =
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        let bad = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(count(&[good, "test a ... ok"], true), (12, 0));
        assert_eq!(count(&[good, bad], false), (15, 2));
        assert_eq!(count(&["error: could not compile"], false), (0, 1));
        assert_eq!(count(&[good], false), (12, 1), "a crash after the last result");
    }

    #[test]
    fn suites_are_chosen() {
        let worlds = ["world".to_owned(), "faults".to_owned()];
        let chosen = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            choose(&names, &worlds).map(|suites| suites.into_iter().collect::<Vec<_>>())
        };
        let world = |name: &str| Suite::World(name.to_owned());
        assert_eq!(chosen(&["unit"]).expect("known"), [Suite::Unit]);
        assert_eq!(chosen(&["net"]).expect("known"), [world("faults"), world("world")]);
        assert_eq!(chosen(&["world", "unit"]).expect("known"), [Suite::Unit, world("world")]);
        assert_eq!(chosen(&["cluster"]).expect("known"), [Suite::Cluster]);
        assert_eq!(chosen(&[]).expect("all").len(), 7);
        assert!(chosen(&["wrld"]).is_err());
    }
}
