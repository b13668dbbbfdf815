//! (pure) One object → what it says about the mesh, and the problems of the object itself. References to other
//! objects are kept as names; [`crate::compile`] resolves them.

use std::{collections::BTreeMap, sync::Arc};

use crate::source::{Object, ObjectKey, Origin, Problem, Severity, Value};

pub mod enrolment;
pub mod gateway;
pub mod policy;
pub mod probe;
pub mod route;
pub mod service;
pub mod workload;

use gateway::{ClassFacts, GrantFacts, WaypointFacts};
use policy::{AuthorizationFacts, PeerAuthenticationFacts};
use route::RouteFacts;
use service::{ServiceFacts, SliceFacts};
use workload::{NamespaceFacts, NodeFacts, PodFacts};

/// What is the same for the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Trust domain of every identity.
    pub trust_domain: Arc<str>,
    /// Namespace whose policies hold for the whole mesh.
    pub root_namespace: Arc<str>,
    /// Namespace of the mesh's own pods; empty where it is not installed in one.
    pub install_namespace: Arc<str>,
    /// Name of the cluster, first part of every workload's key.
    pub cluster: Arc<str>,
    /// Suffix of service host names.
    pub service_domain: Arc<str>,
    /// Whether a GatewayClass must be there for its Gateways to be ours: in a cluster others have classes, too.
    pub needs_classes: bool,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            root_namespace: "undermesh-system".into(),
            install_namespace: "undermesh-system".into(),
            cluster: "Kubernetes".into(),
            service_domain: "svc.cluster.local".into(),
            needs_classes: false,
        }
    }
}

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// What one object says.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each variant is the kind of its name")]
pub enum Fragment {
    Namespace(NamespaceFacts),
    Node(NodeFacts),
    Pod(Box<PodFacts>),
    Service(Box<ServiceFacts>),
    Slice(SliceFacts),
    Options(OptionFacts),
    Class(ClassFacts),
    Waypoint(Box<WaypointFacts>),
    /// A Gateway of a class that is none of the waypoint classes.
    OtherGateway(Arc<str>),
    Route(RouteFacts),
    Grant(GrantFacts),
    Authorization(AuthorizationFacts),
    PeerAuthentication(PeerAuthenticationFacts),
    /// Nothing that the mesh acts on.
    Nothing,
}

/// The ConfigMap `undermesh` of the root namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionFacts {
    /// `encryptSameNode: always`.
    pub encrypt_same_node: bool,
    /// `outboundTrafficPolicy: REGISTRY_ONLY`.
    pub registry_only: bool,
}

/// One object, translated.
#[derive(Clone, Debug, PartialEq)]
pub struct Translated {
    /// The object.
    pub key: ObjectKey,
    /// Where it stands.
    pub origin: Origin,
    /// Seconds since the epoch; objects without a time are the youngest.
    pub created: i64,
    /// `metadata.generation`, for what is told about it.
    pub generation: i64,
    /// What it says.
    pub fragment: Fragment,
    /// What is wrong with it by itself.
    pub problems: Vec<Problem>,
}

/// Collects the problems of one object.
pub struct Report<'a> {
    object: &'a Object,
    problems: Vec<Problem>,
}

impl<'a> Report<'a> {
    /// Nothing wrong so far.
    pub fn new(object: &'a Object) -> Self {
        Self { object, problems: Vec::new() }
    }

    /// Not in force as written.
    pub fn error(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.problems.push(self.object.problem(Severity::Error, field, reason));
    }

    /// In force, but not all of it.
    pub fn warn(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.problems.push(self.object.problem(Severity::Warning, field, reason));
    }

    /// Worth knowing.
    pub fn info(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.problems.push(self.object.problem(Severity::Info, field, reason));
    }

    /// The first error that was reported, with its field.
    pub fn first_error(&self) -> Option<String> {
        let error = self.problems.iter().find(|problem| problem.severity == Severity::Error)?;
        Some(format!("{}: {}", error.field, error.reason))
    }
}

/// Translates one object.
pub fn translate(object: &Object, mesh: &Mesh) -> Translated {
    let mut report = Report::new(object);
    let fragment = match &object.value {
        Value::Namespace(_) => Fragment::Namespace(workload::namespace(object)),
        Value::Node(node) => Fragment::Node(workload::node(object, node)),
        Value::Pod(pod) => Fragment::Pod(Box::new(workload::pod(object, pod, &mut report))),
        Value::Service(service) => match service::service(object, service, &mut report) {
            Some(facts) => Fragment::Service(Box::new(facts)),
            None => Fragment::Nothing,
        },
        Value::EndpointSlice(slice) => match service::slice(object, slice, &mut report) {
            Some(facts) => Fragment::Slice(facts),
            None => Fragment::Nothing,
        },
        Value::ServiceAccount(_) => Fragment::Nothing,
        Value::ConfigMap(map)
            if object.key.namespace == mesh.root_namespace && &*object.key.name == "undermesh" =>
        {
            Fragment::Options(options(map.data.as_ref(), mesh, &mut report))
        }
        Value::ConfigMap(_) => Fragment::Nothing,
        Value::Gateway(spec, status) => gateway::gateway(object, spec, status, &mut report),
        Value::HttpRoute(spec) => Fragment::Route(route::route(object, spec, &mut report)),
        Value::GrpcRoute(spec) => Fragment::Route(route::grpc::route(object, spec, &mut report)),
        Value::GatewayClass(spec) => Fragment::Class(gateway::class(object, spec, &mut report)),
        Value::ReferenceGrant(spec) => Fragment::Grant(gateway::grant(spec)),
        Value::AuthorizationPolicy(spec) => {
            Fragment::Authorization(policy::authorization(object, spec, mesh, &mut report))
        }
        Value::PeerAuthentication(spec) => match policy::peer_authentication(object, spec, mesh, &mut report)
        {
            Some(facts) => Fragment::PeerAuthentication(facts),
            None => Fragment::Nothing,
        },
        Value::Unreadable { match_labels } => policy::unreadable(object, match_labels, mesh),
    };
    Translated {
        key: object.key.clone(),
        origin: object.origin.clone(),
        created: object.created(),
        generation: object.generation(),
        fragment,
        problems: report.problems,
    }
}

/// An option with a value that is not known takes its stricter meaning.
fn options(data: Option<&Labels>, mesh: &Mesh, report: &mut Report<'_>) -> OptionFacts {
    let mut facts = OptionFacts::default();
    for (name, value) in data.into_iter().flatten() {
        let field = format!("data.{name}");
        match (name.as_str(), value.as_str()) {
            ("encryptSameNode", "never") | ("outboundTrafficPolicy", "ALLOW_ANY") => {}
            ("encryptSameNode", "always") => facts.encrypt_same_node = true,
            ("outboundTrafficPolicy", "REGISTRY_ONLY") => facts.registry_only = true,
            ("encryptSameNode", _) => {
                facts.encrypt_same_node = true;
                report.error(field, "must be always or never; taken as always");
            }
            ("outboundTrafficPolicy", _) => {
                facts.registry_only = true;
                report.error(field, "must be ALLOW_ANY or REGISTRY_ONLY; taken as REGISTRY_ONLY");
            }
            ("trustDomain", domain) if domain == &*mesh.trust_domain => {}
            ("trustDomain", _) => {
                let reason =
                    format!("the control plane runs with trust domain {}, which stays", mesh.trust_domain);
                report.error(field, reason);
            }
            _ => report.warn(field, "unknown option"),
        }
    }
    facts
}

#[cfg(test)]
#[expect(missing_docs, reason = "test code")]
pub mod tests {
    use super::*;
    use crate::source::parse;

    /// Translates the first object of `yaml`.
    pub fn translated(yaml: &str) -> Translated {
        let parsed = parse("t.yaml", yaml);
        assert!(!parsed.broken(), "{:?}", parsed.problems);
        translate(&parsed.objects[0], &Mesh::default())
    }

    /// The problems as `field: reason`.
    pub fn complaints(translated: &Translated) -> Vec<String> {
        translated.problems.iter().map(|p| format!("{:?} {}: {}", p.severity, p.field, p.reason)).collect()
    }

    #[test]
    fn options_that_are_not_understood_are_taken_strictly() {
        for (data, encrypt_same_node, registry_only, problems) in [
            ("{}", false, false, 0),
            (
                "{encryptSameNode: always, outboundTrafficPolicy: REGISTRY_ONLY, trustDomain: cluster.local}",
                true,
                true,
                0,
            ),
            ("{encryptSameNode: never, outboundTrafficPolicy: ALLOW_ANY}", false, false, 0),
            ("{encryptSameNode: yes, outboundTrafficPolicy: DENY}", true, true, 2),
            ("{trustDomain: other, colour: red}", false, false, 2),
        ] {
            let yaml = format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: undermesh, namespace: undermesh-system}}\ndata: {data}\n"
            );
            let got = translated(&yaml);
            assert_eq!(
                got.fragment,
                Fragment::Options(OptionFacts { encrypt_same_node, registry_only }),
                "{data}"
            );
            assert_eq!(got.problems.len(), problems, "{data}");
        }
    }
}
