//! The status: what the supervisor knows, completed by what control plane and agents say.

use std::{collections::BTreeMap, path::PathBuf, thread};

use mesh_net::admin::Method;

use super::{
    document::Problem,
    expand::{Key, Wanted},
    http,
    keeper::Keeper,
    namespace::netns,
    node::{Ground, Node, control_address},
    objects::Rendered,
    pod::Pod,
    services::PlacedService,
    status::{ControlAnswer, ControlStatus, NodeStatus, PodStatus, ServiceStatus, Status, WaypointStatus},
};

/// Trust domain of a local mesh.
const TRUST_DOMAIN: &str = "cluster.local";

/// The supervisor's part of the status; asking the others takes time, which is not the supervisor's.
#[derive(Debug)]
pub struct Draft {
    status: Status,
    rendered: Rendered,
}

impl Draft {
    /// Takes stock.
    pub fn new(
        ground: &Ground,
        (control, fabric): (&Keeper, u32),
        nodes: &BTreeMap<String, Node>,
        pods: &BTreeMap<Key, Pod>,
        (wanted, services): (&Wanted, &[PlacedService]),
        (problems, rendered): (&[Problem], &Rendered),
    ) -> Self {
        let mut status = Status {
            name: ground.layout.dir().file_name().unwrap_or_default().to_string_lossy().into_owned(),
            folder: ground.folder.clone(),
            supervisor: std::process::id(),
            guardian: std::os::unix::process::parent_id(),
            problems: problems.to_vec(),
            control: control_status(ground, control, fabric),
            nodes: nodes.values().map(|node| node_status(ground, node)).collect(),
            pods: pods.values().map(|pod| pod_status(ground, pod)).collect(),
            services: services.iter().map(service_status).collect(),
            ..Status::default()
        };
        for waypoint in &wanted.waypoints {
            let own = |pod: &&Pod| {
                pod.wanted.waypoint.as_ref() == Some(&waypoint.key.name)
                    && pod.wanted.key.namespace == waypoint.key.namespace
            };
            let service = services.iter().find(|service| service.wanted.key == waypoint.key);
            status.waypoints.push(WaypointStatus {
                namespace: waypoint.key.namespace.clone(),
                name: waypoint.key.name.clone(),
                pod: pods.values().find(own).map(|pod| pod.wanted.key.name.clone()).unwrap_or_default(),
                address: service.and_then(|service| service.vips.first().copied()),
                admin_socket: ground.layout.waypoint(&waypoint.key).join("admin.sock"),
            });
        }
        for want in &wanted.pods {
            match pods.get(&want.key) {
                Some(pod) if pod.settled() => {}
                Some(pod) => {
                    let why = pod.observed().why.unwrap_or_else(|| "changing".to_owned());
                    status.waiting.push(format!("pod {}: {why}", want.key));
                }
                None => status.waiting.push(format!("pod {}: not started", want.key)),
            }
        }
        for (key, _) in pods.iter().filter(|(key, _)| !wanted.pods.iter().any(|want| want.key == **key)) {
            status.waiting.push(format!("pod {key}: stopping"));
        }
        Self { status, rendered: rendered.clone() }
    }

    /// Asks the control plane and the agents.
    pub fn complete(self) -> Status {
        let Self { mut status, rendered } = self;
        // What is written and cannot be read or run does not hold. What the control plane adds below holds as its text
        // says: a route to a backend that does not exist is in force, and answers 500.
        let broken = status.problems.iter().filter(|problem| problem.severity == "error");
        status
            .waiting
            .extend(broken.map(|problem| format!("{}:{}: {}", problem.file, problem.line, problem.reason)));
        let sockets: Vec<PathBuf> = status.nodes.iter().map(|node| node.admin_socket.clone()).collect();
        let control_socket = status.control.admin_socket.clone();
        // All at once: a hung process delays the answer by one deadline, not by one each.
        let (control, ready) = thread::scope(|scope| {
            let asked: Vec<_> = sockets
                .iter()
                .map(|socket| scope.spawn(|| http::call(socket, Method::GET, "/healthz/ready", Vec::new())))
                .collect();
            let control = http::call(&control_socket, Method::GET, "/status", Vec::new());
            let ready: Vec<_> = asked.into_iter().map(|one| one.join().ok()).collect();
            (control, ready)
        });
        for (node, answer) in status.nodes.iter_mut().zip(ready) {
            (node.ready, node.why) = match answer {
                Some(Ok((200, _))) => (true, None),
                Some(Ok((_, body))) => (false, Some(String::from_utf8_lossy(&body).trim().to_owned())),
                Some(Err(error)) => (false, Some(format!("agent: {error}"))),
                None => (false, Some("the question panicked".to_owned())),
            };
            let serves = status.pods.iter().any(|pod| pod.node == node.name && pod.enrolled);
            if serves && !node.ready {
                let why = node.why.clone().unwrap_or_default();
                status.waiting.push(format!("node {}: not ready: {why}", node.name));
            }
        }
        match control {
            Ok((200, body)) => match serde_json::from_slice::<ControlAnswer>(&body) {
                Ok(answer) => merge(&mut status, answer, &rendered),
                Err(error) => status.waiting.push(format!("control plane: unreadable status: {error}")),
            },
            Ok((code, body)) => {
                let body = String::from_utf8_lossy(&body);
                status.waiting.push(format!("control plane: {code} {}", body.trim()));
            }
            Err(error) => status.waiting.push(format!("control plane: {error}")),
        }
        status.in_force = status.waiting.is_empty();
        status
    }
}

/// Adds what the control plane knows.
fn merge(status: &mut Status, answer: ControlAnswer, rendered: &Rendered) {
    status.revision = answer.revision;
    for problem in answer.problems {
        let problem = rendered.origin(problem);
        let known = |other: &Problem| {
            (&other.file, other.line) == (&problem.file, problem.line) && other.field == problem.field
        };
        if !status.problems.iter().any(known) {
            status.problems.push(problem);
        }
    }
    if answer.in_force {
        return;
    }
    if answer.why.is_empty() {
        status.waiting.push("control plane: not in force everywhere yet".to_owned());
    }
    status.waiting.extend(answer.why.into_iter().map(|line| format!("control plane: {line}")));
}

fn control_status(ground: &Ground, control: &Keeper, fabric: u32) -> ControlStatus {
    let state = control.state();
    ControlStatus {
        address: control_address().to_string(),
        admin_socket: ground.layout.control().join("admin.sock"),
        netns: netns(fabric),
        pid: state.pid,
        restarts: state.restarts,
        log: ground.layout.log("control"),
    }
}

fn node_status(ground: &Ground, node: &Node) -> NodeStatus {
    let agent = node.agent();
    let (v4, v6) = node.net.wire();
    NodeStatus {
        name: node.name.clone(),
        netns: netns(node.holder()),
        ips: vec![v4.into(), v6.into()],
        admin_socket: node.admin_socket(),
        enrol_socket: node.enrol_socket(),
        ready: false,
        why: None,
        agent_pid: agent.pid,
        restarts: agent.restarts,
        log: ground.layout.log(&format!("agent-{}", node.name)),
    }
}

fn pod_status(ground: &Ground, pod: &Pod) -> PodStatus {
    let observed = pod.observed();
    let Key { namespace, name } = pod.wanted.key.clone();
    let account = pod.wanted.service_account();
    let has_identity = observed.enrolled || pod.wanted.waypoint.is_some();
    let container = pod.wanted.spec.containers.first().map_or("waypoint", |first| first.name.as_str());
    PodStatus {
        node: pod.wanted.node.clone(),
        netns: observed.holder.map(netns).unwrap_or_default(),
        ips: pod.ips.clone(),
        uid: pod.uid.clone(),
        enrolled: observed.enrolled,
        identity: has_identity.then(|| format!("spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{account}")),
        ready: observed.ready,
        why: if observed.stopping { Some("stopping".to_owned()) } else { observed.why },
        pid: observed.pid,
        holder: observed.holder,
        restarts: observed.restarts,
        log: ground.layout.pod(&pod.wanted.key).join(format!("{container}.log")),
        namespace,
        name,
    }
}

fn service_status(service: &PlacedService) -> ServiceStatus {
    let ports = service.wanted.object.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    ServiceStatus {
        namespace: service.wanted.key.namespace.clone(),
        name: service.wanted.key.name.clone(),
        vips: service.vips.clone(),
        ports: ports.filter_map(|port| u16::try_from(port.port).ok()).collect(),
    }
}
