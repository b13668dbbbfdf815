//! `cargo xtask conformance`: the official Gateway API suite, from its Go module, on a cluster that has the mesh.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use crate::{
    cluster,
    go::{self, Module, Program},
    image,
    oci::{Content, Image},
    shell,
    test::Totals,
};

/// What to run, and where.
#[derive(Args, Debug)]
pub struct Options {
    /// Profiles: MESH-HTTP, MESH-GRPC. Default: both, in one report.
    #[arg(long)]
    profile: Vec<String>,
    /// Only this test, by its short name; writes no report.
    #[arg(long)]
    run_test: Option<String>,
    /// Run on a cluster without the mesh, to see that the suite itself runs.
    #[arg(long)]
    without_mesh: bool,
    /// Cluster to run on, started if need be; `KUBECONFIG` of another one is used instead where it is set.
    #[arg(long, default_value = cluster::DEFAULT_NAME)]
    name: String,
    /// Leave what the suite made, to look at.
    #[arg(long)]
    keep: bool,
}

/// The profiles of meshes.
const PROFILES: &[&str] = &["MESH-HTTP", "MESH-GRPC"];
/// What the suite asks of whom has no mesh: what it says of itself.
const WITHOUT_MESH: &str = "Mesh,HTTPRoute,GRPCRoute";
/// The control plane says what it claims soon after it began.
const CLAIM: Duration = Duration::from_secs(60);
const WAYPOINT_CLASS: &str = "undermesh-waypoint";
const PROJECT: &str = "undermesh";

const SUITE: Module = Module {
    folder: "conformance",
    programs: &[Program {
        name: "conformance.test",
        package: ".",
        linker_flags: "-s -w",
        is_test: true,
        seconds: 120,
    }],
};
const ECHO: Module = Module {
    folder: "echo",
    programs: &[
        Program {
            name: "server",
            package: "istio.io/istio/pkg/test/echo/cmd/server",
            linker_flags: "-s -w",
            is_test: false,
            seconds: 60,
        },
        Program {
            name: "client",
            package: "istio.io/istio/pkg/test/echo/cmd/client",
            linker_flags: "-s -w",
            is_test: false,
            seconds: 20,
        },
    ],
};

/// Runs both profiles on a cluster of that name, which is up.
///
/// # Errors
/// When the suite cannot run.
pub fn test(name: &str) -> anyhow::Result<Totals> {
    let options = Options {
        profile: Vec::new(),
        run_test: None,
        without_mesh: false,
        name: name.to_owned(),
        keep: false,
    };
    suite(&options)
}

/// Runs the suite and says where its report is.
///
/// # Errors
/// When a test fails, or the suite cannot run.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let Totals { passed, failed } = suite(options)?;
    ensure!(failed == 0 && passed > 0, "{passed} tests passed, {failed} failed");
    Ok(())
}

fn suite(options: &Options) -> anyhow::Result<Totals> {
    let profiles = profiles(&options.profile)?;
    let kubeconfig = cluster::ensure(&options.name)?;
    let suite = SUITE.built()?.join("conformance.test");
    if kubeconfig.is_own {
        cluster::load(&options.name, &[echo_image()?])?;
    }
    if options.without_mesh {
        apply_crds(&kubeconfig.file)?;
    } else if kubeconfig.is_own {
        install(options)?;
    }

    let features = if options.without_mesh { WITHOUT_MESH.to_owned() } else { claimed(&kubeconfig.file)? };
    let folder = shell::target_dir().join("conformance");
    fs::create_dir_all(&folder)?;
    let report = folder.join("report.yaml");
    let mut run = shell::command(suite);
    run.env("KUBECONFIG", &kubeconfig.file).args([
        "-test.v",
        "-test.timeout=30m",
        "-test.run=TestConformance",
    ]);
    run.arg(format!("-conformance-profiles={}", profiles.join(",")));
    run.arg(format!("-supported-features={}", features));
    if options.keep {
        run.args(["-cleanup-base-resources=false", "-cleanup-test-resources=false"]);
    }
    if !options.without_mesh {
        run.arg("-namespace-labels=istio.io/dataplane-mode=ambient");
        run.arg(format!("-waypoint-class={WAYPOINT_CLASS}"));
    }
    match &options.run_test {
        Some(test) => drop(run.arg(format!("-run-test={test}"))),
        None => {
            run.arg(format!("-report-output={}", report.display()));
            run.args(["-mode=default", "-contact=@undermesh", "-url=https://undermesh.io"]);
            run.arg(format!("-organization={PROJECT}")).arg(format!("-project={PROJECT}"));
            run.arg(format!("-version=v{}", env!("CARGO_PKG_VERSION")));
        }
    }
    let ran = told(&mut run, &folder.join("log.txt"));
    if options.run_test.is_none() && report.is_file() {
        println!("{}", fs::read_to_string(&report)?);
        println!("conformance: the report is {}", report.display());
    }
    ran.context("the suite")
}

/// What the mesh of a cluster claims, by the status of its class: each feature has a test in the suite, so that none is
/// claimed without one that passes.
fn claimed(kubeconfig: &Path) -> anyhow::Result<String> {
    let path = "jsonpath={.status.supportedFeatures[*].name}";
    let deadline = Instant::now() + CLAIM;
    loop {
        let mut kubectl = cluster::kubectl(kubeconfig)?;
        let said = shell::output(kubectl.args(["get", "gatewayclass", WAYPOINT_CLASS, "-o", path]))?;
        let features: Vec<_> = said.split_whitespace().collect();
        if !features.is_empty() {
            println!("conformance: claimed are {}", features.join(", "));
            return Ok(features.join(","));
        }
        ensure!(
            Instant::now() < deadline,
            "GatewayClass {WAYPOINT_CLASS}: status.supportedFeatures: still empty"
        );
        thread::sleep(Duration::from_millis(500));
    }
}

/// Installs the mesh of this checkout on a cluster of ours; on another one it is there.
fn install(options: &Options) -> anyhow::Result<()> {
    cluster::load(&options.name, &image::build(&[], "dev")?)?;
    let mut meshctl = shell::command(shell::target_dir().join("debug/meshctl"));
    meshctl.arg("install").env("KUBECONFIG", cluster::kubeconfig(&options.name));
    meshctl.arg("--set").arg(format!("node.kubeletCgroup={}", cluster::kubelet_cgroup(&options.name)?));
    shell::run(&mut meshctl)
}

/// Runs the suite: all that it says goes to a file, and how each test ended to the reader.
fn told(run: &mut Command, log: &Path) -> anyhow::Result<Totals> {
    println!("$ {}", shell::shown(run));
    println!("conformance: the log is {}", log.display());
    let mut file = BufWriter::new(fs::File::create(log)?);
    let mut child = run.stdout(Stdio::piped()).spawn().context("start the suite")?;
    let output = child.stdout.take().context("the suite's output")?;
    let mut totals = Totals::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        file.write_all(&line)?;
        file.write_all(b"\n")?;
        let line = String::from_utf8_lossy(&line);
        totals.passed += usize::from(line.starts_with("    --- PASS: "));
        totals.failed += usize::from(line.starts_with("    --- FAIL: "));
        if worth_telling(&line) {
            println!("{}", line.trim());
        }
    }
    file.flush()?;
    let status = child.wait()?;
    if !status.success() {
        eprintln!("conformance: {status}; see {}", log.display());
        totals.failed = totals.failed.max(1);
    }
    Ok(totals)
}

/// (pure) How a whole test began or ended, but for those of other features.
fn worth_telling(line: &str) -> bool {
    let ended = line.starts_with("    --- ") && !line.starts_with("    --- SKIP");
    let began = line.strip_prefix("=== RUN   TestConformance/").is_some_and(|name| !name.contains('/'));
    ended || began && line.contains("Mesh")
}

/// (pure) The profiles asked for, checked, or all.
fn profiles(wanted: &[String]) -> anyhow::Result<Vec<&str>> {
    let wanted: Vec<_> = wanted.iter().flat_map(|list| list.split(',')).collect();
    if let Some(unknown) = wanted.iter().find(|name| !PROFILES.contains(name)) {
        bail!("no profile {unknown}: {}", PROFILES.join(", "));
    }
    Ok(if wanted.is_empty() { PROFILES.to_vec() } else { wanted })
}

/// The suite's echo server and client as an archive.
fn echo_image() -> anyhow::Result<PathBuf> {
    let programs = ECHO.built()?;
    let folder = shell::target_dir().join("images");
    fs::create_dir_all(&folder)?;
    let (certificate, key) = cluster::certificate(&folder.join("echo-certificate"), "echo")?;
    let mut files: BTreeMap<String, Content> = ["server", "client"]
        .map(|name| (format!("/usr/local/bin/{name}"), Content::Program(programs.join(name))))
        .into();
    files.insert("/cert.crt".into(), Content::Data(certificate));
    files.insert("/cert.key".into(), Content::Data(key));
    let image = Image {
        name: echo_image_name()?,
        entrypoint: vec!["/usr/local/bin/server".into()],
        env: vec!["PATH=/usr/local/bin".into()],
        files,
        ..Image::default()
    };
    let archive = folder.join("echo-advanced.tar");
    image.write(&archive)?;
    Ok(archive)
}

/// The name that the suite's manifests have for its echo server.
fn echo_image_name() -> anyhow::Result<String> {
    let manifests = module_dir("sigs.k8s.io/gateway-api/conformance")?.join("mesh/manifests.yaml");
    let text = fs::read_to_string(&manifests).with_context(|| format!("read {}", manifests.display()))?;
    let image = text.lines().find_map(|line| line.trim().strip_prefix("image: "));
    image.map(|name| name.trim().to_owned()).with_context(|| format!("no image in {}", manifests.display()))
}

/// Writes the custom resources of the suite's own version to the cluster. With the mesh, its installation has.
fn apply_crds(kubeconfig: &Path) -> anyhow::Result<()> {
    let mut kubectl = cluster::kubectl(kubeconfig)?;
    kubectl.args(["apply", "--server-side", "--force-conflicts", "-f"]);
    shell::run(kubectl.arg(module_dir("sigs.k8s.io/gateway-api")?.join("config/crd/standard")))
}

/// Where Go keeps the source of a module that the suite is built from.
fn module_dir(module: &str) -> anyhow::Result<PathBuf> {
    let source = shell::root().join("xtask/go").join(SUITE.folder);
    let go = go::ensure_toolchain()?;
    shell::output(go::command(&go, &source).args(["mod", "download", module]))?;
    let folder = shell::output(go::command(&go, &source).args(["list", "-m", "-f", "{{.Dir}}", module]))?;
    let folder = PathBuf::from(folder.trim());
    ensure!(folder.is_dir(), "Go has no source of {module}");
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_checked() {
        let chosen = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            profiles(&names).map(|list| list.join(" "))
        };
        assert_eq!(chosen(&[]).expect("all"), "MESH-HTTP MESH-GRPC");
        assert_eq!(chosen(&["MESH-GRPC"]).expect("one"), "MESH-GRPC");
        assert_eq!(chosen(&["MESH-HTTP,MESH-GRPC"]).expect("a list"), "MESH-HTTP MESH-GRPC");
        assert!(chosen(&["GATEWAY-HTTP"]).is_err());
    }

    #[test]
    fn whole_tests_are_told_of() {
        for (line, told) in [
            ("=== RUN   TestConformance/MeshBasic", true),
            ("=== RUN   TestConformance/MeshBasic/one", false),
            ("=== RUN   TestConformance/GatewayClass", false),
            ("    --- PASS: TestConformance/MeshBasic (1.04s)", true),
            ("        --- PASS: TestConformance/MeshBasic/one (1.04s)", false),
            ("    --- SKIP: TestConformance/GatewayClass (0.00s)", false),
        ] {
            assert_eq!(worth_telling(line), told, "{line}");
        }
    }
}
