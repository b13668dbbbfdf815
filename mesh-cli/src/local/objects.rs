//! (pure) The folder that the control plane reads: the user's objects, and those that local mode completes.
//!
//! User files keep their name and line numbers below `user/`; only the documents that are completed here are blanked
//! in them. Those, and what is generated, are one file each below `generated/`, and [`Rendered::origin`] leads from
//! such a file back to the user's line.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Value, json};

use super::{
    document::{Document, Problem, without},
    expand::{self, Key, Source, Wanted, WantedPod, is_waypoint, is_workload},
    folder::Folder,
    services::PlacedService,
};

/// Subfolder of the user's files.
pub const USER: &str = "user";
/// Subfolder of completed and generated objects.
const GENERATED: &str = "generated";

/// What is known of a pod that exists.
#[derive(Clone, Debug)]
pub struct PodFacts {
    /// As wanted.
    pub wanted: WantedPod,
    /// Its UID.
    pub uid: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its node's address.
    pub host_ip: IpAddr,
    /// All its containers run.
    pub ready: bool,
    /// All its containers ended for good; whether well.
    pub finished: Option<bool>,
    /// It is being stopped.
    pub stopping: bool,
}

/// Files by path, and where their content came from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rendered {
    /// Path below the objects folder → text.
    pub files: BTreeMap<String, String>,
    origins: BTreeMap<String, Source>,
}

impl Rendered {
    /// Turns a problem of a rendered file into one of the user's file.
    pub fn origin(&self, mut problem: Problem) -> Problem {
        let relative = problem.file.clone();
        if let Some(source) = self.origins.get(&relative) {
            (problem.file, problem.line) = (source.file.clone(), source.line);
        } else if let Some(rest) = relative.strip_prefix(USER).and_then(|rest| rest.strip_prefix('/')) {
            problem.file = rest.to_owned();
        }
        problem
    }

    fn add(&mut self, kind: &str, key: &Key, object: &Value, source: Source) {
        let path = format!("{GENERATED}/{kind}-{}.{}.yaml", key.namespace, key.name);
        // JSON is YAML; a Value always serialises.
        self.files.insert(path.clone(), serde_yaml_ng::to_string(object).unwrap_or_default());
        self.origins.insert(path, source);
    }
}

/// Renders the whole folder.
pub fn render(folder: &Folder, wanted: &Wanted, services: &[PlacedService], pods: &[PodFacts]) -> Rendered {
    let mut out = Rendered::default();
    for (path, file) in &folder.files {
        // What no longer parses stays as it last did, also for a control plane that is started anew meanwhile; what is
        // wrong with it is told here. What never parsed is given as it is: there is nothing better.
        let text = match &file.good {
            Some(good) => {
                let gone: Vec<&Document> =
                    file.documents.iter().filter(|document| completed(document)).collect();
                without(good, &gone)
            }
            None => file.text.clone(),
        };
        out.files.insert(format!("{USER}/{path}"), text);
    }
    for node in wanted.nodes.iter().filter(|node| !node.written) {
        let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name } });
        out.add("node", &Key::new("", &node.name), &object, Source::default());
    }
    for service in services {
        out.add("service", &service.wanted.key, &service_object(service), service.wanted.source.clone());
    }
    for waypoint in &wanted.waypoints {
        let vips = services.iter().find(|service| service.wanted.key == waypoint.key);
        let vips = vips.map(|service| service.vips.as_slice()).unwrap_or_default();
        let source = Source { file: waypoint.document.file.clone(), line: waypoint.document.line };
        let (gateway, account) = waypoint_objects(waypoint, vips);
        out.add("gateway", &waypoint.key, &gateway, source.clone());
        out.add("serviceaccount", &waypoint.key, &account, source);
    }
    for pod in pods {
        out.add("pod", &pod.wanted.key, &pod_object(pod), pod.wanted.source.clone());
    }
    out
}

/// Whether local mode gives the control plane its own version of this object.
fn completed(document: &Document) -> bool {
    is_workload(&document.kind)
        || is_waypoint(document)
        || (document.kind == "Service"
            && expand::typed::<k8s_openapi::api::core::v1::Service>(document).is_ok())
}

fn service_object(service: &PlacedService) -> Value {
    let key = &service.wanted.key;
    let mut object = serde_json::to_value(&service.wanted.object).unwrap_or_default();
    object["metadata"]["namespace"] = json!(key.namespace);
    if let Some(first) = service.vips.first() {
        object["spec"]["clusterIP"] = json!(first);
        object["spec"]["clusterIPs"] = json!(service.vips);
        let families = service.vips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" });
        object["spec"]["ipFamilies"] = json!(families.collect::<Vec<_>>());
    }
    object
}

/// The Gateway with its addresses, and its service account.
fn waypoint_objects(waypoint: &expand::WantedWaypoint, vips: &[IpAddr]) -> (Value, Value) {
    let Key { namespace, name } = &waypoint.key;
    let mut gateway = waypoint.document.value.clone();
    gateway["metadata"]["namespace"] = json!(namespace);
    let addresses: Vec<Value> =
        vips.iter().map(|ip| json!({ "type": "IPAddress", "value": ip.to_string() })).collect();
    gateway["status"] = json!({ "addresses": addresses });
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": namespace },
    });
    (gateway, account)
}

fn pod_object(pod: &PodFacts) -> Value {
    let wanted = &pod.wanted;
    let mut metadata = json!({
        "name": wanted.key.name,
        "namespace": wanted.key.namespace,
        "uid": pod.uid,
        "labels": wanted.labels,
        "annotations": wanted.annotations,
    });
    if let Some(owner) = &wanted.owner {
        metadata["ownerReferences"] = json!([{
            "apiVersion": if owner.kind == "Job" { "batch/v1" } else { "apps/v1" }, "kind": owner.kind, "name": owner.name, "uid": owner.name, "controller": true,
        }]);
    }
    if pod.stopping {
        // When it began is nobody's concern; that it did is.
        metadata["deletionTimestamp"] = json!("1970-01-01T00:00:00Z");
    }
    let mut spec = serde_json::to_value(&wanted.spec).unwrap_or_default();
    spec["nodeName"] = json!(wanted.node);
    spec["serviceAccountName"] = json!(wanted.service_account());
    let phase = match pod.finished {
        Some(true) => "Succeeded",
        Some(false) => "Failed",
        None if pod.ready => "Running",
        None => "Pending",
    };
    let ready = if pod.ready && pod.finished.is_none() { "True" } else { "False" };
    let ips: Vec<Value> = pod.ips.iter().map(|ip| json!({ "ip": ip.to_string() })).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": spec,
        "status": {
            "phase": phase,
            "hostIP": pod.host_ip.to_string(),
            "podIP": pod.ips.first().map(ToString::to_string),
            "podIPs": ips,
            "conditions": [{ "type": "Ready", "status": ready }],
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::local::{address::Addresses, document::parse, expand::expand, services::place};

    const FOLDER: &str = "kind: Namespace\nmetadata: {name: shop}\n---\nkind: Deployment\nmetadata: {name: web, \
                          namespace: shop}\nspec:\n  template:\n    metadata: {labels: {app: web}}\n    spec: \
                          {containers: [{name: c, command: [a]}]}\n---\nkind: Service\nmetadata: {name: s, namespace: \
                          shop}\nspec: {selector: {app: web}, ports: [{port: 80}]}\n---\nkind: \
                          AuthorizationPolicy\nmetadata: {name: p}\n---\nkind: Gateway\nmetadata: {name: w, \
                          namespace: shop}\nspec: {gatewayClassName: istio-waypoint}\n";

    fn rendered() -> Rendered {
        let mut folder = Folder::default();
        folder.take(BTreeMap::from([("dir/a.yaml".to_owned(), FOLDER.to_owned())]));
        let wanted = expand(folder.documents(), &BTreeMap::new());
        let (services, _) = place(&wanted.services, &mut Addresses::default());
        let pods = [PodFacts {
            wanted: wanted.pods[0].clone(),
            uid: "u".to_owned(),
            ips: vec!["10.244.1.2".parse().unwrap(), "fd00:244:1::2".parse().unwrap()],
            host_ip: "172.30.0.11".parse().unwrap(),
            ready: true,
            finished: None,
            stopping: false,
        }];
        render(&folder, &wanted, &services, &pods)
    }

    #[test]
    fn what_is_completed_is_generated_and_the_rest_keeps_its_lines() {
        let out = rendered();
        let kinds = |path: &str| -> Vec<(String, usize)> {
            parse(path, &out.files[path]).unwrap().into_iter().map(|d| (d.kind, d.line)).collect()
        };
        assert_eq!(
            kinds("user/dir/a.yaml"),
            [("Namespace".to_owned(), 1), ("AuthorizationPolicy".to_owned(), 15)]
        );
        let generated: Vec<&String> =
            out.files.keys().filter(|path| path.starts_with("generated/")).collect();
        assert_eq!(generated.len(), 7, "{generated:?}");
        let gateway = &parse("g", &out.files["generated/gateway-shop.w.yaml"]).unwrap()[0].value;
        assert_eq!(gateway["status"]["addresses"][0]["value"], "10.96.0.2");
        let pod = out.files.iter().find(|(path, _)| path.contains("/pod-")).unwrap().1;
        let pod = &parse("p", pod).unwrap()[0].value;
        assert_eq!(pod["status"]["podIPs"][1]["ip"], "fd00:244:1::2");
        assert_eq!(pod["metadata"]["ownerReferences"][0]["kind"], "ReplicaSet");
    }

    #[test]
    fn problems_lead_back_to_the_users_line() {
        let out = rendered();
        let problem = |file: &str, line: usize| {
            let problem = Problem {
                file: file.to_owned(),
                line,
                object: String::new(),
                field: String::new(),
                reason: String::new(),
                severity: String::new(),
            };
            let problem = out.origin(problem);
            (problem.file, problem.line)
        };
        assert_eq!(problem("user/dir/a.yaml", 15), ("dir/a.yaml".to_owned(), 15));
        assert_eq!(problem("generated/service-shop.s.yaml", 3), ("dir/a.yaml".to_owned(), 11));
    }
}
