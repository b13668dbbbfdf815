//! `meshctl analyze`: what is wrong in a folder, by the very code that would put it in force.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use mesh_control::translate::Mesh;

use crate::local::{
    address::Addresses,
    document::Problem,
    expand::{self, WantedPod},
    folder::{self, Folder},
    objects::{PodFacts, render},
    services,
};

/// Arguments of `analyze`.
#[derive(Debug, clap::Args)]
pub struct AnalyzeArgs {
    /// The folder.
    dir: PathBuf,
}

/// Prints every problem; fails when one is an error.
///
/// # Errors
/// When the folder cannot be read.
pub fn run(args: &AnalyzeArgs) -> anyhow::Result<ExitCode> {
    let texts = folder::read(&args.dir).with_context(|| format!("read {}", args.dir.display()))?;
    let problems = problems(texts);
    for problem in &problems {
        println!("{problem}");
    }
    let failed = problems.iter().any(|problem| problem.severity == "error");
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// (pure) The problems of a folder, as a local mesh of it would report them.
fn problems(texts: BTreeMap<String, String>) -> Vec<Problem> {
    let mut folder = Folder::default();
    folder.take(texts);
    let mut wanted = expand::expand(folder.documents(), &BTreeMap::new());
    let mut addresses = Addresses::default();
    let (services, more) = services::place(&wanted.services, &mut addresses);
    let mut problems = std::mem::take(&mut wanted.problems);
    problems.extend(more);
    problems.extend(folder.problems().cloned());
    let pods: Vec<PodFacts> = wanted.pods.iter().filter_map(|pod| facts(pod, &mut addresses)).collect();
    let rendered = render(&folder, &wanted, &services, &pods);
    let mesh = Mesh::default();
    for problem in mesh_control::analyze(&rendered.files, &mesh) {
        let problem = rendered.origin(Problem {
            file: problem.file,
            line: problem.line,
            object: problem.object,
            field: problem.field,
            reason: problem.reason,
            severity: format!("{:?}", problem.severity).to_lowercase(),
        });
        // A file that does not parse is reported once.
        if !problems.iter().any(|other| (&other.file, other.line) == (&problem.file, problem.line)) {
            problems.push(problem);
        }
    }
    problems
}

/// A pod as it would be if it ran.
fn facts(pod: &WantedPod, addresses: &mut Addresses) -> Option<PodFacts> {
    let (net, index) = addresses.pod(&pod.node, &pod.key).ok()?;
    let (v4, v6) = net.pod(index);
    Some(PodFacts {
        wanted: pod.clone(),
        uid: pod.key.to_string(),
        ips: vec![v4.into(), v6.into()],
        host_ip: net.wire().0.into(),
        ready: true,
        finished: None,
        stopping: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str, expected: &[(usize, &str)]) {
        let found = problems(BTreeMap::from([("a.yaml".to_owned(), yaml.to_owned())]));
        let found: Vec<(usize, &str)> = found.iter().map(|p| (p.line, p.severity.as_str())).collect();
        assert_eq!(found, expected, "{yaml}");
    }

    #[test]
    fn a_folder_is_judged_as_a_mesh_of_it_would_be() {
        let waypoint = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: \
                        shop}\nspec:\n  gatewayClassName: istio-waypoint\n  listeners: [{name: mesh, port: 15008, \
                        protocol: HBONE}]\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: shop, \
                        labels: {istio.io/use-waypoint: w}}\nspec: {ports: [{port: 80}]}\n";
        check(waypoint, &[]);
        check("kind: [", &[(2, "error")]);
        check("\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c}]}\n", &[(1, "error")]);
    }
}
