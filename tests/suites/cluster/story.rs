//! The demo's story on a cluster.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use mesh_tests::{
    cluster::{Cluster, Pod},
    wait,
    wire::Frames,
};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Namespace of the application.
pub const BOOKINFO: &str = "bookinfo";
/// Namespace that is never enrolled.
pub const OUTSIDE: &str = "outside";
const CLIENT: &str = "deploy/client";
const PAGE: &str = "http://productpage:9080/productpage";
const REVIEWS_API: &str = "http://productpage:9080/api/v1/products/0/reviews";
/// Productpage's session of the user jason: his name in hex.
const JASON: &str = "cookie: session=6a61736f6e";
/// Words of the application that must not be readable on the wire.
const MARKERS: [&str; 4] = ["Shakespeare", "GET /details/", "GET /reviews/", "PublisherA"];
const TUNNEL_PORT: u16 = 15008;
const APPLICATION_PORT: u16 = 9080;
/// Requests of the split, and what ten in a hundred of them may be: 3.3 standard deviations, one run in a thousand.
const SPLIT: (u32, std::ops::RangeInclusive<usize>) = (200, 6..=34);

const NEIGHBOUR: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: outsider, namespace: outside, labels: {app: outsider}}
spec:
  replicas: 1
  selector: {matchLabels: {app: outsider}}
  template:
    metadata: {labels: {app: outsider}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - {name: outsider, image: 'docker.io/undermesh/bookinfo:0.1.0', args: [wait]}
";

/// The application as it is, before any mesh.
pub fn without_the_mesh(cluster: &Cluster) -> anyhow::Result<()> {
    // What an earlier run left, when the cluster was kept.
    cluster.delete_namespaces(&[BOOKINFO, OUTSIDE])?;
    cluster.apply_file("examples/bookinfo/kubernetes.yaml")?;
    cluster.apply(NEIGHBOUR)?;
    cluster.settled(BOOKINFO)?;
    cluster.settled(OUTSIDE)?;
    // Details on another node than its caller: the wire is what this is about.
    let productpage = cluster.pod(BOOKINFO, "productpage")?;
    let nodes = cluster.nodes()?;
    let far = mesh_tests::cluster::other(&nodes, &productpage.node)?;
    cluster.place(BOOKINFO, "details-v1", &far)?;
    cluster.place(BOOKINFO, "productpage-v1", &productpage.node)?;
    cluster.place(BOOKINFO, "client", &productpage.node)?;
    cluster.settled(BOOKINFO)?;
    whole_page(cluster)?;
    every_address(cluster)?;
    if cluster.is_own() {
        let frames = captured(cluster, || whole_page(cluster))?;
        ensure!(frames.holding(b"Shakespeare") > 0, "the capture does not see what is in clear");
    }
    Ok(())
}

/// The page comes and has all its parts.
pub fn whole_page(cluster: &Cluster) -> anyhow::Result<()> {
    wait::until("the whole page", || {
        let page = cluster.get(BOOKINFO, CLIENT, &["-m", "5", PAGE]).map_err(|error| error.to_string())?;
        let whole = page.ok
            && page.body.contains("<title>Simple Bookstore App</title>")
            && !page.body.contains("Error fetching");
        if whole { Ok(()) } else { Err(format!("{} {}", page.error, page.body)) }
    })
}

/// Services answer on their address of each family.
fn every_address(cluster: &Cluster) -> anyhow::Result<()> {
    let ips = cluster.service_ips(BOOKINFO, "details")?;
    ensure!(ips.len() == 2, "details has not both families: {ips:?}");
    for ip in ips {
        let url = format!("http://{}/details/0", std::net::SocketAddr::new(ip, APPLICATION_PORT));
        let got = cluster.get(BOOKINFO, CLIENT, &["-m", "5", &url])?;
        ensure!(got.ok && got.body.contains("PublisherA"), "{url}: {got:?}");
    }
    Ok(())
}

/// What goes between the machines while something happens: they are connected in `control`.
fn captured(cluster: &Cluster, happens: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Frames> {
    let tap = cluster.tap("control")?;
    happens()?;
    Ok(tap.finish())
}

/// The label takes over the sockets of running pods.
pub fn enrol(cluster: &Cluster) -> anyhow::Result<()> {
    let before = identities(&cluster.pods(BOOKINFO)?);
    let asked = OffsetDateTime::now_utc();
    cluster.run(&["label", "namespace", BOOKINFO, "istio.io/dataplane-mode=ambient", "--overwrite"])?;
    enrolled(cluster, BOOKINFO)?;
    if cluster.is_own() {
        let took = last_enrolled(cluster, BOOKINFO)? - asked;
        println!(
            "report: the last pod was enrolled {} ms after kubectl was started",
            took.whole_milliseconds()
        );
    }
    whole_page(cluster)?;
    every_address(cluster)?;
    let after = identities(&cluster.pods(BOOKINFO)?);
    ensure!(before == after, "pods were replaced or restarted: {before:?}, then {after:?}");
    Ok(())
}

/// When the agents say that they enrolled the last pod of a namespace. Nodes of ours have one clock.
fn last_enrolled(cluster: &Cluster, namespace: &str) -> anyhow::Result<OffsetDateTime> {
    let mut times = Vec::new();
    for line in cluster.agents_say("pod enrolled", namespace)? {
        let time = line.split('\t').next().unwrap_or_default();
        times.push(OffsetDateTime::parse(time, &Rfc3339).with_context(|| line.clone())?);
    }
    times.into_iter().max().context("no agent enrolled a pod")
}

/// UID and restarts by name.
fn identities(pods: &[Pod]) -> BTreeMap<String, (String, u64)> {
    pods.iter().map(|pod| (pod.name.clone(), (pod.uid.clone(), pod.restarts))).collect()
}

/// Waits until the agents serve every pod of a namespace.
pub fn enrolled(cluster: &Cluster, namespace: &str) -> anyhow::Result<()> {
    wait::until(&format!("every pod of {namespace} to be enrolled"), || {
        let pods = cluster.pods(namespace).map_err(|error| format!("{error:#}"))?;
        for pod in pods.iter().filter(|pod| pod.ready) {
            let served = cluster.ask(&pod.node, "/pods").map_err(|error| format!("{error:#}"))?;
            let is_it = |shown: &&Value| shown["uid"] == *pod.uid;
            match served.as_array().into_iter().flatten().find(is_it) {
                Some(shown) if shown["state"] == "serving" => {}
                Some(shown) => return Err(format!("{}: {shown}", pod.name)),
                None => return Err(format!("{} does not know {}", pod.node, pod.name)),
            }
        }
        Ok(())
    })
}

/// Nothing of the application can be read between the nodes.
pub fn encrypted(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    let frames = captured(cluster, || whole_page(cluster))?;
    for marker in MARKERS {
        ensure!(frames.holding(marker.as_bytes()) == 0, "{marker:?} can be read");
    }
    let tunnels = |segment: &mesh_tests::wire::Segment<'_>| {
        segment.destination_port == TUNNEL_PORT || segment.source_port == TUNNEL_PORT
    };
    ensure!(frames.segments().any(|segment| tunnels(&segment)), "nothing went to port {TUNNEL_PORT}");
    let ports: Vec<_> = frames
        .segments()
        .filter(|segment| [segment.source_port, segment.destination_port].contains(&APPLICATION_PORT))
        .map(|segment| (segment.source_port, segment.destination_port))
        .collect();
    ensure!(ports.is_empty(), "payload of the application's own port: {ports:?}");
    Ok(())
}

/// STRICT, and a policy that names who may.
pub fn policy(cluster: &Cluster) -> anyhow::Result<()> {
    let details = "http://details.bookinfo:9080/details/0";
    let outsider =
        |what: &str, allowed: bool| answers(cluster, OUTSIDE, "deploy/outsider", details, what, allowed);
    let client = |what: &str, allowed: bool| answers(cluster, BOOKINFO, CLIENT, details, what, allowed);
    outsider("PERMISSIVE, the default, lets a neighbour in", true)?;
    cluster.apply_file("examples/bookinfo/steps/4-strict.yaml")?;
    outsider("STRICT refuses it", false)?;
    client("and not who has an identity", true)?;
    cluster.apply_file("examples/bookinfo/steps/4-details-nobody.yaml")?;
    client("a policy that allows nobody", false)?;
    cluster.apply_file("examples/bookinfo/steps/4-details-productpage.yaml")?;
    whole_page(cluster).context("the policy names productpage")?;
    client("and nobody else", false)
}

/// Waits until calls from a pod go as they should.
pub fn answers(
    cluster: &Cluster,
    namespace: &str,
    from: &str,
    url: &str,
    what: &str,
    allowed: bool,
) -> anyhow::Result<()> {
    wait::until(what, || {
        let got = cluster.get(namespace, from, &["-m", "3", url]).map_err(|error| error.to_string())?;
        if got.ok == allowed { Ok(()) } else { Err(format!("{got:?}")) }
    })
}

/// A Gateway and two HTTPRoutes.
pub fn canary(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply_file("examples/bookinfo/steps/5-waypoint.yaml")?;
    let fixed = ["-n", BOOKINFO, "wait", "gateway/waypoint", "--for=condition=Programmed", "--timeout=120s"];
    cluster.run(&fixed)?;
    cluster.apply_file("examples/bookinfo/steps/5-reviews-service.yaml")?;
    cluster.apply_file("examples/bookinfo/steps/5-route-90-10.yaml")?;
    let (requests, expected) = SPLIT;
    wait::until("90 to 10", || {
        let versions = versions(cluster, requests, &[])?;
        let count = |version: &str| versions.get(version).copied().unwrap_or_default();
        let all = count("v1") + count("v3") == usize::try_from(requests).unwrap_or_default();
        if all && expected.contains(&count("v3")) { Ok(()) } else { Err(format!("{versions:?}")) }
    })?;
    cluster.apply_file("examples/bookinfo/steps/5-route-jason.yaml")?;
    wait::until("jason to get version 2 and others version 1", || {
        let jason = versions(cluster, 20, &["-H", JASON])?;
        let others = versions(cluster, 20, &[])?;
        let good =
            jason == BTreeMap::from([("v2".into(), 20)]) && others == BTreeMap::from([("v1".into(), 20)]);
        if good { Ok(()) } else { Err(format!("jason {jason:?}, others {others:?}")) }
    })
}

/// Which versions answered, how often; `none` stands for a failure.
fn versions(cluster: &Cluster, requests: u32, more: &[&str]) -> Result<BTreeMap<String, usize>, String> {
    let count = requests.to_string();
    let arguments = [&["-n", &count, REVIEWS_API], more].concat();
    let got = cluster.get(BOOKINFO, CLIENT, &arguments).map_err(|error| error.to_string())?;
    let mut versions = BTreeMap::new();
    for line in got.body.lines().filter(|line| !line.trim().is_empty()) {
        let answer: Value =
            serde_json::from_str(line.strip_prefix("200 ").unwrap_or_default()).unwrap_or_default();
        let pod = answer["podname"].as_str().and_then(|pod| pod.strip_prefix("reviews-"));
        let version = pod.and_then(|pod| pod.split('-').next()).unwrap_or("none");
        *versions.entry(version.to_owned()).or_default() += 1;
    }
    Ok(versions)
}
