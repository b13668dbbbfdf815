//! `meshctl check`: can this cluster take the mesh; or, once it has, is everything as the mesh needs it.

use std::process::ExitCode;

use serde_json::Value;

use super::{
    install::{Place, SettingArgs, plan},
    within_runtime,
};
use crate::{
    cluster::Cluster,
    install::{
        self,
        check::{Finding, Severity},
        record::Record,
        wait,
    },
    output::{Output, print},
};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    settings: SettingArgs,
    /// Before an installation: whether it could be.
    #[arg(long)]
    pre: bool,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Prints every finding; fails when one is an error.
///
/// # Errors
/// When the API server does not answer.
pub fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let findings = within_runtime(async {
        let cluster = Cluster::connect(&args.place.target).await?;
        let namespace = &args.place.namespace;
        let former = Record::read(&cluster, namespace).await?;
        let mut plan = plan(&args.settings, namespace, former.as_ref())?;
        let (_, mut findings) = install::examine(&cluster, &mut plan).await?;
        if !args.pre {
            for component in [wait::CONTROL, wait::NODE] {
                findings.push(running(component, &wait::look(&cluster, namespace, component).await?));
            }
            findings.extend(kernels(&cluster, namespace).await?);
        }
        Ok(findings)
    })?;
    print(&match args.output {
        Output::Table => findings.iter().map(|finding| format!("{finding}\n")).collect(),
        Output::Json => serde_json::to_string_pretty(&findings)? + "\n",
    })?;
    let failed = findings.iter().any(|finding| finding.severity == Severity::Error);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// (pure) Whether a component runs.
fn running(component: wait::Component, now: &install::progress::Progress) -> Finding {
    let (severity, advice) = match (now.done(), now.wanted) {
        (true, _) => (Severity::Fine, String::new()),
        (false, 0) => (Severity::Error, "`meshctl install`; before that, `meshctl check --pre`".to_owned()),
        (false, _) => {
            let troubles: Vec<String> = now.troubles.iter().map(ToString::to_string).collect();
            (Severity::Error, troubles.join("\n           "))
        }
    };
    let found = format!("{} of {} ready", now.ready, now.wanted);
    Finding { severity, subject: component.title.to_owned(), found, advice }
}

/// What the agents found missing in their kernels.
async fn kernels(cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for pod in wait::pods(cluster, namespace, wait::NODE).await? {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        let command = [wait::NODE.program, "ask", "/kernel"];
        let answer = cluster.exec((namespace, name), wait::NODE.container, &command).await;
        findings.push(match answer.map(|text| serde_json::from_str::<Value>(&text)) {
            Ok(Ok(answer)) => kernel(node, &answer["probe"]),
            Ok(Err(error)) => unknown(node, error.to_string()),
            Err(error) => unknown(node, error.to_string()),
        });
    }
    Ok(findings)
}

fn unknown(node: &str, why: String) -> Finding {
    let found = format!("{node}: the agent does not say: {why}");
    Finding { severity: Severity::Error, subject: "kernel".to_owned(), found, advice: String::new() }
}

/// (pure) What an agent's report on its kernel means.
fn kernel(node: &str, probe: &Value) -> Finding {
    let features = probe["features"].as_array().into_iter().flatten();
    let missing: Vec<String> = features
        .filter(|feature| feature["found"] == false)
        .map(|feature| {
            let text = |field: &str| feature[field].as_str().unwrap_or_default().to_owned();
            format!("{} ({})", text("name"), text("purpose"))
        })
        .collect();
    let kernel = probe["kernel"].as_str().unwrap_or("?");
    let (severity, found) = match missing.is_empty() {
        true => (Severity::Fine, format!("{node}: {kernel}, every feature found")),
        false => (Severity::Warning, format!("{node}: {kernel} lacks {}", missing.join(", "))),
    };
    Finding { severity, subject: "kernel".to_owned(), found, advice: String::new() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn missing_features_are_named() {
        let feature = |found: bool| json!({"kernel": "6.1", "features": [{"name": "x", "purpose": "do y", "found": found}]});
        assert_eq!(kernel("a", &feature(true)).severity, Severity::Fine);
        assert_eq!(kernel("a", &feature(false)).found, "a: 6.1 lacks x (do y)");
    }
}
