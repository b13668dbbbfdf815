//! The six steps.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::{
    mesh::{Fetched, Mesh, Node, Pod, Status},
    teller::{Teller, until},
    wire::Capture,
};

const NAMESPACE: &str = "bookinfo";
const PAGE: &str = "http://productpage:9080/productpage";
const REVIEWS_API: &str = "http://productpage:9080/api/v1/products/0/reviews";
/// Productpage's session of the user jason: his name in hex.
const JASON: &str = "cookie: session=6a61736f6e";
/// Words of the application that must not be readable on the wire.
const MARKERS: [&str; 4] = ["Shakespeare", "GET /details/", "GET /reviews/", "PublisherA"];
/// Ports of the mesh's own that may carry payload between nodes: the tunnel, and the agents' calls to the control plane.
const MESH_PORTS: [u16; 2] = [15008, 15012];
const TUNNEL_PORT: u16 = 15008;
const TITLE: &str = "<title>Simple Bookstore App</title>";
const NO_DETAILS: &str = "Error fetching product details";
/// Requests of the split, and what ten in a hundred of them may be: 3.3 standard deviations, one run in a thousand.
const SPLIT: (u32, std::ops::RangeInclusive<usize>) = (200, 6..=34);
/// Something that the mesh does by itself is done within this.
const PATIENCE: Duration = Duration::from_secs(30);

/// Tells the story.
///
/// # Errors
/// When an assertion does not hold.
pub fn tell(mesh: &mut Mesh, teller: &mut Teller) -> anyhow::Result<()> {
    let before = running_without_the_mesh(mesh, teller)?;
    let capture = enrol(mesh, teller, &before)?;
    encrypted(mesh, teller, capture)?;
    identity(mesh, teller)?;
    policy(mesh, teller)?;
    canary(mesh, teller)?;
    agent_dies(mesh, teller)
}

fn running_without_the_mesh(mesh: &mut Mesh, teller: &mut Teller) -> anyhow::Result<Status> {
    teller.step(
        "Bookinfo on two nodes",
        "Six workloads from a folder of Kubernetes YAML; nothing is in the mesh yet.",
    );
    teller.command(format!("meshctl local up {} --name demo", mesh.folder().display()));
    let status = mesh.start()?;
    let places = status.pods.iter().map(|pod| format!("{} on {}", pod.name, pod.node));
    let places = places.collect::<Vec<_>>().join(", ");
    let none = status.pods.iter().all(|pod| !pod.enrolled);
    teller.holds("pods run and none is enrolled", status.pods.len() >= 7 && none, places)?;
    let capture = Capture::start(status.node("node-a")?, status.pod("details-v1")?)?;
    let page = page(mesh, teller)?;
    teller.holds("the page is whole", page.ok && page.body.contains("PublisherA"), first_line(&page))?;
    let wire = capture.finish()?;
    let readable = wire.holding("Shakespeare");
    teller.holds("the wire is readable", readable > 0, format!("{readable} packets hold \"Shakespeare\""))?;
    Ok(status)
}

/// Fetches the page as the pod `client`; until it is whole, because the programs may still be starting.
fn page(mesh: &Mesh, teller: &Teller) -> anyhow::Result<Fetched> {
    teller.command(format!("meshctl local exec --name demo -n bookinfo client -- bookinfo get {PAGE}"));
    until("the page", PATIENCE, || {
        let page = mesh.get(NAMESPACE, "client", &[PAGE])?;
        let whole = page.ok && page.body.contains(TITLE) && !page.body.contains("Error fetching");
        Ok(if whole { Ok(page) } else { Err(page.brief()) })
    })
}

fn first_line(page: &Fetched) -> String {
    let reviews = page.body.split("Reviews served by: ").nth(1).and_then(|rest| rest.split('<').next());
    format!("title, details, and reviews served by {}", reviews.unwrap_or("nobody").trim())
}

fn enrol(mesh: &Mesh, teller: &mut Teller, before: &Status) -> anyhow::Result<Capture> {
    teller.step(
        "1/6 Enrol",
        "One label on the namespace takes over the sockets of its running pods; none restarts.",
    );
    // From before the first tunnel, so that its handshake is in the capture.
    let capture = Capture::start(before.node("node-a")?, before.pod("details-v1")?)?;
    let (status, took) = mesh.apply("1-enrol.yaml", "namespace.yaml")?;
    teller.command("meshctl local status --name demo -o json");
    let ours = || status.pods.iter().filter(|pod| pod.namespace == NAMESPACE);
    let enrolled = ours().filter(|pod| pod.enrolled).count();
    let evidence = format!("{enrolled} of {} pods, {} ms after the edit", ours().count(), took.as_millis());
    teller.holds("every pod of the namespace is enrolled", enrolled == ours().count(), evidence)?;
    let outsider = status.pod("outsider")?;
    teller.holds("its neighbour is not", !outsider.enrolled, format!("{}/outsider", outsider.namespace))?;
    let same = ours().filter(|pod| pod.pid.is_some() && pid_of(before, pod) == pod.pid).count();
    teller.holds("none restarted", same == ours().count(), format!("{same} process ids are as before"))?;
    for pod in ours().take(3) {
        println!("     {} is {}", pod.name, pod.identity.as_deref().unwrap_or("nobody"));
    }
    Ok(capture)
}

fn pid_of(status: &Status, pod: &Pod) -> Option<u32> {
    status.pods.iter().find(|other| (&other.namespace, &other.name) == (&pod.namespace, &pod.name))?.pid
}

fn encrypted(mesh: &Mesh, teller: &mut Teller, capture: Capture) -> anyhow::Result<()> {
    teller.step(
        "2/6 The wire",
        "What crosses between the nodes is TLS 1.3 on port 15008, and nothing can be read.",
    );
    teller.command(&capture.shown);
    let page = page(mesh, teller)?;
    teller.holds("the page is as before", page.ok, first_line(&page))?;
    let wire = capture.finish()?;
    let hellos = wire.hellos(TUNNEL_PORT);
    let evidence = format!(
        "{} client hellos offer 1.3 alone, {} server hellos choose it, {} streams begin otherwise",
        hellos.clients, hellos.servers, hellos.others
    );
    let good = hellos.clients > 0 && hellos.servers > 0 && hellos.others == 0;
    teller.holds("connections to 15008 begin with TLS 1.3", good, evidence)?;
    let foreign: BTreeMap<_, _> =
        wire.by_port.iter().filter(|(port, _)| !MESH_PORTS.contains(port)).collect();
    let evidence = format!("segments with payload by port: {:?}", wire.by_port);
    teller.holds("no other port carries anything", foreign.is_empty(), evidence)?;
    let readable: usize = MARKERS.iter().map(|marker| wire.holding(marker)).sum();
    let evidence = format!("{readable} of {} packets hold one of {MARKERS:?}", wire.packets);
    teller.holds("no plaintext", readable == 0, evidence)
}

fn identity(mesh: &Mesh, teller: &mut Teller) -> anyhow::Result<()> {
    teller
        .step("3/6 Identity", "The server's agent knows who calls, from a certificate, not from an address.");
    let status = mesh.status()?;
    let client = status.pod("client")?.identity.clone().context("the client has no identity")?;
    let held = mesh.hold(NAMESPACE, "client", "details/9080")?;
    teller.command(
        "meshctl local exec --name demo -n bookinfo client -- bash -c 'exec 3<>/dev/tcp/details/9080 …'",
    );
    let far = connection(mesh, status.node("node-b")?, &client, status.pod("details-v1")?)?;
    let evidence = format!("{} at {} by path {}", far.peer, far.to, far.path);
    teller.holds("across nodes", far.path == "tunnel", evidence)?;
    drop(held);
    let held = mesh.hold(NAMESPACE, "client", "productpage/9080")?;
    teller.command(
        "meshctl local exec --name demo -n bookinfo client -- bash -c 'exec 3<>/dev/tcp/productpage/9080 …'",
    );
    let near = connection(mesh, status.node("node-a")?, &client, status.pod("productpage-v1")?)?;
    let evidence = format!("{} at {} by path {}: decided by the kernel", near.peer, near.to, near.path);
    teller.holds("on one node", near.path == "direct", evidence)?;
    drop(held);
    Ok(())
}

struct Seen {
    peer: String,
    to: String,
    path: String,
}

/// The live connection of a client to a server as an agent lists it.
fn connection(mesh: &Mesh, node: &Node, client: &str, server: &Pod) -> anyhow::Result<Seen> {
    let ours: Vec<String> = server.ips.iter().map(|ip| SocketAddr::new(*ip, 9080).to_string()).collect();
    until("the connection to be listed", Duration::from_secs(8), || {
        let all = mesh.admin(node, "/connections")?;
        let is_ours = |connection: &&Value| {
            let to = connection["dst"]["addr"].as_str().unwrap_or_default();
            connection["src"]["identity"] == *client && ours.iter().any(|address| address == to)
        };
        let Some(found) = all.as_array().into_iter().flatten().find(is_ours) else {
            return Ok(Err(format!("{} lists {all}", node.name)));
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(Ok(Seen {
            peer: text(&found["src"]["identity"]),
            to: text(&found["dst"]["addr"]),
            path: text(&found["path"]),
        }))
    })
}

fn policy(mesh: &Mesh, teller: &mut Teller) -> anyhow::Result<()> {
    teller.step(
        "4/6 Policy",
        "Who has no identity is refused, then who has the wrong one; each refusal has a reason.",
    );
    let foreign = "http://details.bookinfo:9080/details/0";
    let got = mesh.get("outside", "outsider", &["-m", "3", foreign])?;
    teller.holds("PERMISSIVE, the default, lets a neighbour in", got.ok, got.brief())?;
    mesh.apply("4-strict.yaml", "strict.yaml")?;
    let got = mesh.get("outside", "outsider", &["-m", "3", foreign])?;
    teller.holds("STRICT refuses it", !got.ok, got.brief())?;
    let line = logged(mesh, &["MTLS_REQUIRED"])?;
    teller.holds("with the reason in the access record", true, line)?;

    let (_, took) = mesh.apply("4-details-nobody.yaml", "details-policy.yaml")?;
    let got = mesh.get(NAMESPACE, "client", &[PAGE])?;
    let evidence = format!("\"{NO_DETAILS}\" on the page, {} ms after the edit", took.as_millis());
    teller.holds("a policy that allows nobody", got.body.contains(NO_DETAILS), evidence)?;
    let line =
        logged(mesh, &["POLICY_DENIED", "bookinfo-productpage", "policy=\"bookinfo/details-viewer\""])?;
    teller.holds("with the reason in the access record", true, line)?;

    mesh.apply("4-details-productpage.yaml", "details-policy.yaml")?;
    let got = mesh.get(NAMESPACE, "client", &[PAGE])?;
    let whole = got.ok && got.body.contains("PublisherA");
    teller.holds("the same policy, now naming productpage's identity", whole, first_line(&got))?;
    let got = mesh.get(NAMESPACE, "client", &["-m", "3", "http://details:9080/details/0"])?;
    teller.holds("and nobody else's", !got.ok, format!("the pod client: {}", got.brief()))
}

/// The access record that holds all of these words.
fn logged(mesh: &Mesh, words: &[&str]) -> anyhow::Result<String> {
    until("the access record", Duration::from_secs(5), || {
        let line = mesh.log_lines(words).pop().ok_or_else(|| format!("no line with {words:?}"));
        Ok(line.map(|line| essence(&line)))
    })
}

/// Who, where to, and why, out of an access record.
fn essence(line: &str) -> String {
    let fields = ["src.addr=", "src.identity=", "dst.addr=", "policy=", "flag="];
    let field = |name: &&str| line.split_whitespace().find(|word| word.starts_with(*name));
    let found: Vec<&str> = fields.iter().filter_map(field).collect();
    found.join(" ")
}

fn canary(mesh: &Mesh, teller: &mut Teller) -> anyhow::Result<()> {
    teller
        .step("5/6 Canary", "A waypoint splits the requests of one service, then routes one user by header.");
    let (status, _) = mesh.apply("5-waypoint.yaml", "waypoint.yaml")?;
    teller.holds("a waypoint runs", !status.waypoints.is_empty(), brief_waypoint(&status))?;
    mesh.apply("5-reviews-service.yaml", "reviews-service.yaml")?;
    mesh.apply("5-route-90-10.yaml", "reviews-route.yaml")?;

    let (requests, expected) = SPLIT;
    let versions = versions(mesh, teller, requests, &[])?;
    let canary = versions.get("v3").copied().unwrap_or_default();
    let stable = versions.get("v1").copied().unwrap_or_default();
    let good = expected.contains(&canary) && stable + canary == usize::try_from(requests)?;
    teller.holds("90 to 10", good, format!("{versions:?} of {requests}; v3 within {expected:?}"))?;

    mesh.apply("5-route-jason.yaml", "reviews-route.yaml")?;
    let jason = self::versions(mesh, teller, 20, &["-H", JASON])?;
    teller.holds(
        "jason gets version 2",
        jason == BTreeMap::from([("v2".into(), 20)]),
        format!("{jason:?}"),
    )?;
    let others = self::versions(mesh, teller, 20, &[])?;
    teller.holds("the others version 1", others == BTreeMap::from([("v1".into(), 20)]), format!("{others:?}"))
}

fn brief_waypoint(status: &Status) -> String {
    let one = |waypoint: &Value| {
        let text = |key: &str| waypoint[key].as_str().unwrap_or_default().to_owned();
        format!("{}/{} at {}", text("namespace"), text("name"), text("address"))
    };
    status.waypoints.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Which versions answered, how often; `none` stands for a failure.
fn versions(
    mesh: &Mesh,
    teller: &Teller,
    requests: u32,
    more: &[&str],
) -> anyhow::Result<BTreeMap<String, usize>> {
    let count = requests.to_string();
    let arguments = [&["-n", &count, REVIEWS_API], more].concat();
    let typed = crate::shell::shown(&mesh.exec(
        NAMESPACE,
        "client",
        &[&["bookinfo", "get"], &arguments[..]].concat(),
    ));
    teller.command(typed);
    let got = mesh.get(NAMESPACE, "client", &arguments)?;
    let mut versions = BTreeMap::new();
    for line in got.body.lines().filter(|line| !line.trim().is_empty()) {
        let json = line.strip_prefix("200 ").unwrap_or_default();
        let answer: Value = serde_json::from_str(json).unwrap_or_default();
        let pod = answer["podname"].as_str().and_then(|pod| pod.strip_prefix("reviews-"));
        let version = pod.and_then(|pod| pod.split('-').next()).unwrap_or("none");
        *versions.entry(version.to_owned()).or_default() += 1;
    }
    Ok(versions)
}

/// What happened while an agent was down.
struct Outage {
    near: Fetched,
    far: Fetched,
}

fn agent_dies(mesh: &Mesh, teller: &mut Teller) -> anyhow::Result<()> {
    teller
        .step("6/6 kill -9", "Without its agent a node keeps what the kernel decides, and refuses the rest.");
    let began = Instant::now();
    let outage = until("an outage that lasts as long as two calls", PATIENCE, || outage(mesh, teller))?;
    teller.holds("same-node calls go on", outage.near.ok, outage.near.brief())?;
    teller.holds("cross-node calls fail closed", !outage.far.ok, outage.far.brief())?;
    let status = mesh.in_force()?;
    let page = page(mesh, teller)?;
    let evidence = format!("{}; {} s after the first kill", first_line(&page), began.elapsed().as_secs());
    teller.holds("the agent is restarted and all is well", status.in_force, evidence)
}

/// Kills node-a's agent and calls from its pods. The agent is started again by itself: calls during which that
/// happened say nothing, and the outage is repeated.
fn outage(mesh: &Mesh, teller: &Teller) -> anyhow::Result<Result<Outage, String>> {
    let status = mesh.status()?;
    let node = status.node("node-a")?;
    let productpage = status.pod("productpage-v1")?.name.clone();
    let Some(pid) = mesh.agent_pid(node) else { return Ok(Err("the agent is not back yet".into())) };
    teller.command(format!("kill -9 {pid}  # the agent of node-a"));
    kill(pid, Signal::SIGKILL).context("kill the agent")?;
    let near = mesh.get(NAMESPACE, "client", &["-m", "1", "http://productpage:9080/health"])?;
    let near_was_alone = mesh.agent_pid(node).is_none();
    let far = mesh.get(NAMESPACE, &productpage, &["-m", "0.3", "http://details:9080/details/0"])?;
    let far_was_alone = mesh.agent_pid(node).is_none();
    if !near_was_alone {
        return Ok(Err("the agent was back before the call on one node ended".into()));
    }
    // A refusal while the agent was coming back is one by the rules as well; an answer would prove nothing.
    if far.ok && !far_was_alone {
        return Ok(Err("the agent was back before the call across nodes ended".into()));
    }
    if far.ok {
        bail!("a call across nodes was answered without an agent: {}", far.brief());
    }
    Ok(Ok(Outage { near, far }))
}
