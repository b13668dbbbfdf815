//! Objects of users: what is wrong with them is said where kubectl shows it, and harms nobody else.

use anyhow::{Context as _, ensure};
use mesh_tests::{
    cluster::{Cluster, meshctl},
    wait,
};
use serde_json::Value;

use crate::story::{self, BOOKINFO};

/// A field that does not exist, in a policy of nobody.
const MISSPELT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: misspelt, namespace: bookinfo}
spec:
  selector: {matchLabels: {app: nobody}}
  action: ALLOW
  rules:
  - from: [{source: {principal: [cluster.local/ns/bookinfo/sa/client]}}]
";

/// In the host's network, where nothing can be captured, in a namespace of the mesh.
const HOST: &str = "
apiVersion: v1
kind: Pod
metadata: {name: hostly, namespace: bookinfo, labels: {app: hostly}}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers:
  - {name: idle, image: 'docker.io/undermesh/bookinfo:0.1.0', args: [wait]}
";

/// Condition and Event of a policy, Event of a pod; the application goes on.
pub fn told(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(MISSPELT)?;
    cluster.apply(HOST)?;
    wait::until("the policy's condition", || {
        let get = ["-n", BOOKINFO, "get", "authorizationpolicies.security.istio.io", "misspelt"];
        let policy = cluster.json(&get).map_err(|error| format!("{error:#}"))?;
        let mut conditions = policy["status"]["conditions"].as_array().into_iter().flatten();
        let refused = |condition: &&Value| {
            let message = condition["message"].as_str().unwrap_or_default();
            condition["status"] == "False" && message.contains("principal")
        };
        conditions.find(refused).map(drop).ok_or_else(|| policy["status"].to_string())
    })?;
    event(cluster, "misspelt", "principal")?;
    event(cluster, "hostly", "host")?;
    story::whole_page(cluster)?;
    let status = meshctl(&["status", "-o", "json"]);
    let said = status.unwrap_or_else(|error| format!("{error:#}"));
    ensure!(said.contains("misspelt") && said.contains("principal"), "status does not name it: {said}");
    for (kind, name) in [("authorizationpolicies.security.istio.io", "misspelt"), ("pod", "hostly")] {
        cluster.run(&["-n", BOOKINFO, "delete", kind, name])?;
    }
    Ok(())
}

/// Waits for an Event of ours on an object that says a word.
fn event(cluster: &Cluster, name: &str, word: &str) -> anyhow::Result<()> {
    wait::until(&format!("an Event on {name}"), || {
        let selector = format!("--field-selector=involvedObject.name={name}");
        let events = cluster.json(&["-n", BOOKINFO, "get", "events", &selector]);
        let events = events.map_err(|error| format!("{error:#}"))?;
        let ours = |event: &&Value| {
            let by = [&event["reportingComponent"], &event["source"]["component"]];
            let message = event["message"].as_str().unwrap_or_default().to_lowercase();
            by.iter().any(|by| by.as_str().is_some_and(|by| by.contains("undermesh")))
                && message.contains(word)
        };
        let mut all = events["items"].as_array().into_iter().flatten();
        all.find(ours).map(drop).ok_or_else(|| events["items"].to_string())
    })
}

const DETAILS: &str = "http://details.bookinfo:9080/details/0";
const PRODUCTPAGE: &str = "deploy/productpage-v1";

/// Asked for, bound, passed; deleted, and what it binds is refused until the label goes.
pub fn waypoint(cluster: &Cluster) -> anyhow::Result<()> {
    let own = ["-n", BOOKINFO];
    let call = |arguments: &[&str]| meshctl(&[&["waypoint"], arguments, &own].concat());
    let reaches =
        |what: &str, allowed| story::answers(cluster, BOOKINFO, PRODUCTPAGE, DETAILS, what, allowed);
    let refused = call(&["delete", "front"]);
    ensure!(
        refused.is_err_and(|error| format!("{error:#}").contains("Gateway bookinfo/front")),
        "what is not there was deleted"
    );
    // A Service of that name which is somebody else's is left alone, and the Gateway says so.
    cluster.run(&["-n", BOOKINFO, "create", "service", "clusterip", "taken", "--tcp=80"])?;
    let taken = call(&["apply", "taken", "--timeout", "10s"]);
    ensure!(
        taken.is_err_and(|error| format!("{error:#}").contains("does not belong to the Gateway")),
        "no word of it"
    );
    call(&["delete", "taken"])?;
    cluster.run(&["-n", BOOKINFO, "delete", "service", "taken"])?;
    call(&["apply", "front"])?;
    let listed = call(&["list"])?;
    ensure!(listed.lines().any(|line| line.contains(" front ") && line.contains("True")), "{listed}");
    call(&["status", "front"])?;
    // Under the strictest standard that Kubernetes has.
    let pod = cluster.json(&[
        "-n",
        BOOKINFO,
        "get",
        "pods",
        "-l",
        "gateway.networking.k8s.io/gateway-name=front",
    ])?;
    let security = &pod["items"][0]["spec"]["containers"][0]["securityContext"];
    ensure!(
        security["allowPrivilegeEscalation"] == false && security["capabilities"]["drop"][0] == "ALL",
        "{security}"
    );
    cluster.run(&["-n", BOOKINFO, "get", "poddisruptionbudget", "front"])?;

    cluster.run(&[
        "-n",
        BOOKINFO,
        "label",
        "service",
        "details",
        "istio.io/use-waypoint=front",
        "--overwrite",
    ])?;
    wait::until("a request in the waypoint's log", || {
        let got =
            cluster.get(BOOKINFO, PRODUCTPAGE, &["-m", "3", DETAILS]).map_err(|error| error.to_string())?;
        let log =
            cluster.run(&["-n", BOOKINFO, "logs", "deploy/front"]).map_err(|error| format!("{error:#}"))?;
        if got.ok && log.contains("/details/0") { Ok(()) } else { Err(format!("{got:?} {log}")) }
    })?;
    let said = call(&["delete", "front"])?;
    ensure!(said.contains("Service bookinfo/details is still bound"), "{said}");
    reaches("a service whose waypoint is gone is refused", false)?;
    cluster.run(&["-n", BOOKINFO, "label", "service", "details", "istio.io/use-waypoint-"])?;
    reaches("and reached again without the label", true).context("the waypoint's label is gone")
}
