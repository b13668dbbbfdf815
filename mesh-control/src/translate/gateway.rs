//! GatewayClasses, Gateways of the waypoint classes, and ReferenceGrants.

use std::sync::Arc;

use mesh_core::model::RouteKind;

use super::{Fragment, Labels, Report};
use crate::{
    source::{
        Object,
        kinds::{
            AllowedKind, AllowedRoutes, GatewayClassSpec, GatewayListener, GatewaySpec, GatewayStatus,
            Infrastructure, LabelExpression, LabelSelector, ReferenceGrantSpec,
        },
    },
    status::object::CONTROLLER,
};

/// Classes whose Gateways are waypoints.
pub const WAYPOINT_CLASSES: &[&str] = &["istio-waypoint", OWN_CLASS];
/// The class that is nobody else's.
pub const OWN_CLASS: &str = "undermesh-waypoint";
/// Port on which a waypoint takes tunnels unless its listener says otherwise.
pub const WAYPOINT_PORT: u16 = 15008;

/// What a GatewayClass says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassFacts {
    /// Its Gateways are ours.
    pub ours: bool,
    /// It names parameters.
    pub parameters: bool,
    /// Which traffic its waypoints take that do not say so themselves.
    pub takes: Option<Takes>,
}

/// Translates a GatewayClass.
pub fn class(object: &Object, spec: &GatewayClassSpec, report: &mut Report<'_>) -> ClassFacts {
    let GatewayClassSpec { controller_name, description: _, parameters_ref } = spec;
    let ours = controller_name == CONTROLLER;
    // Of the classes of others nothing is ours to judge.
    let takes = if ours { takes_of(object, report) } else { None };
    ClassFacts { ours, parameters: parameters_ref.is_some(), takes }
}

fn takes_of(object: &Object, report: &mut Report<'_>) -> Option<Takes> {
    Some(match object.label("istio.io/waypoint-for")? {
        "service" => Takes::Service,
        "workload" => Takes::Workload,
        "all" => Takes::All,
        "none" => Takes::Nothing,
        other => {
            let reason = format!("{other:.80?} is none of service, workload, all, none; taken as service");
            report.error("metadata.labels", reason);
            Takes::Service
        }
    })
}

/// What a waypoint Gateway says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaypointFacts {
    /// Its class.
    pub class: Arc<str>,
    /// Port of its HBONE listener.
    pub port: u16,
    /// Which traffic it takes, where it says so; else its class does.
    pub takes: Option<Takes>,
    /// Who may bind to it.
    pub allowed: Allowed,
    /// Whether its status has addresses.
    pub has_address: bool,
    /// `metadata.uid`; empty where the source has none.
    pub uid: Arc<str>,
    /// Its listeners, in order.
    pub listeners: Vec<ListenerFacts>,
    /// Labels of the objects that are made for it.
    pub labels: Labels,
    /// Annotations of the objects that are made for it.
    pub annotations: Labels,
    /// It asks for parameters, which are not read.
    pub parameters: bool,
}

/// One listener of a waypoint Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerFacts {
    /// Its name.
    pub name: Arc<str>,
    /// Its port.
    pub port: u16,
    /// It is the one that takes tunnels.
    pub serves: bool,
    /// Its protocol, when no waypoint has that.
    pub unsupported: Option<Arc<str>>,
    /// Kinds of routes that it takes.
    pub kinds: Vec<RouteKind>,
    /// `allowedRoutes.kinds` has kinds that are none of these.
    pub invalid_kinds: bool,
}

/// `istio.io/waypoint-for`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Traffic to services.
    Service,
    /// Traffic to workloads.
    Workload,
    /// Both.
    All,
    /// Neither.
    Nothing,
}

impl Takes {
    /// Traffic to services.
    pub fn services(self) -> bool {
        matches!(self, Self::Service | Self::All)
    }

    /// Traffic to workloads.
    pub fn workloads(self) -> bool {
        matches!(self, Self::Workload | Self::All)
    }
}

/// `allowedRoutes.namespaces` of the listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Only the Gateway's own namespace.
    Same,
    /// Every namespace.
    All,
    /// Namespaces with these labels.
    Selector(LabelSelectorFacts),
}

/// A label selector that was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelectorFacts {
    match_labels: Labels,
    expressions: Vec<(Arc<str>, Operator, Vec<String>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl LabelSelectorFacts {
    /// Whether labels are selected.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|(key, operator, values)| {
                let value = labels.get(&**key);
                match operator {
                    Operator::In => value.is_some_and(|value| values.contains(value)),
                    Operator::NotIn => value.is_none_or(|value| !values.contains(value)),
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

impl Allowed {
    /// Whether objects of a namespace with these labels may bind.
    pub fn admits(&self, own: bool, labels: &Labels) -> bool {
        match self {
            Self::Same => own,
            Self::All => true,
            Self::Selector(selector) => selector.matches(labels),
        }
    }
}

/// Translates a Gateway.
pub fn gateway(
    object: &Object,
    spec: &GatewaySpec,
    status: &GatewayStatus,
    report: &mut Report<'_>,
) -> Fragment {
    let GatewaySpec {
        gateway_class_name,
        listeners,
        addresses,
        infrastructure,
        allowed_listeners: _,
        tls: _,
        default_scope: _,
    } = spec;
    if !WAYPOINT_CLASSES.contains(&gateway_class_name.as_str()) {
        let reason =
            format!("class {gateway_class_name:.80?} is not a waypoint class: the Gateway has no effect");
        report.info("spec.gatewayClassName", reason);
        return Fragment::OtherGateway(gateway_class_name.as_str().into());
    }
    if addresses.is_some() {
        report.warn("spec.addresses", "waypoints get their address from their Service; ignored");
    }
    let takes = takes_of(object, report);
    let listener = listeners.iter().enumerate().find(|(_, listener)| listener.protocol == "HBONE");
    if listener.is_none() {
        report.error(
            "spec.listeners",
            "a waypoint needs a listener of protocol HBONE, port 15008; taken as given",
        );
    }
    let allowed = listener.map(|(index, listener)| {
        let field = format!("spec.listeners[{index}].allowedRoutes.namespaces");
        allowed_of(listener.allowed_routes.as_ref(), &field, report)
    });
    let port = match listener {
        Some((_, listener)) if listener.port != 0 => listener.port,
        _ => WAYPOINT_PORT,
    };
    let Infrastructure { labels, annotations, parameters_ref } = infrastructure.clone().unwrap_or_default();
    if parameters_ref.is_some() {
        report.warn("spec.infrastructure.parametersRef", "not supported yet: has no effect");
    }
    let serving = listener.map(|(index, _)| index);
    let listeners = listeners.iter().enumerate();
    Fragment::Waypoint(Box::new(WaypointFacts {
        class: gateway_class_name.as_str().into(),
        port,
        takes,
        allowed: allowed.unwrap_or(Allowed::Same),
        has_address: !status.addresses.is_empty(),
        uid: object.meta.uid.as_deref().unwrap_or_default().into(),
        listeners: listeners.map(|(i, given)| listener_of(i, given, serving == Some(i), report)).collect(),
        labels,
        annotations,
        parameters: parameters_ref.is_some(),
    }))
}

fn listener_of(
    index: usize,
    given: &GatewayListener,
    serves: bool,
    report: &mut Report<'_>,
) -> ListenerFacts {
    let GatewayListener { name, hostname: _, port, protocol, tls: _, allowed_routes } = given;
    if !serves {
        let reason = format!(
            "UnsupportedProtocol: {protocol:.80?}: a waypoint has one listener of protocol HBONE; this one is not served"
        );
        report.warn(format!("spec.listeners[{index}].protocol"), reason);
    }
    let given = allowed_routes.iter().flat_map(|routes| &routes.kinds);
    let known: Vec<_> = given.map(kind_of).collect();
    let invalid_kinds = known.iter().any(Option::is_none);
    if invalid_kinds {
        let reason = "InvalidRouteKinds: a waypoint takes HTTPRoute and GRPCRoute";
        report.warn(format!("spec.listeners[{index}].allowedRoutes.kinds"), reason);
    }
    let mut kinds: Vec<RouteKind> = known.iter().copied().flatten().collect();
    if known.is_empty() {
        kinds = vec![RouteKind::Http, RouteKind::Grpc];
    }
    kinds.sort_unstable();
    kinds.dedup();
    ListenerFacts {
        name: name.as_str().into(),
        port: *port,
        serves,
        unsupported: (protocol != "HBONE").then(|| protocol.as_str().into()),
        kinds,
        invalid_kinds,
    }
}

fn kind_of(AllowedKind { group, kind }: &AllowedKind) -> Option<RouteKind> {
    let ours = group.as_deref().is_none_or(|group| group == "gateway.networking.k8s.io");
    match kind.as_str() {
        "HTTPRoute" if ours => Some(RouteKind::Http),
        "GRPCRoute" if ours => Some(RouteKind::Grpc),
        _ => None,
    }
}

/// What cannot be understood admits nobody but the own namespace.
fn allowed_of(routes: Option<&AllowedRoutes>, field: &str, report: &mut Report<'_>) -> Allowed {
    let Some(namespaces) = routes.and_then(|routes| routes.namespaces.as_ref()) else { return Allowed::Same };
    match (namespaces.from.as_deref(), &namespaces.selector) {
        (None | Some("Same"), _) => Allowed::Same,
        (Some("All"), _) => Allowed::All,
        (Some("Selector"), Some(selector)) => match checked(selector) {
            Ok(selector) => Allowed::Selector(selector),
            Err(reason) => {
                report.error(format!("{field}.selector"), reason);
                Allowed::Same
            }
        },
        (Some(other), _) => {
            report
                .error(format!("{field}.from"), format!("{other:.80?} cannot be understood; taken as Same"));
            Allowed::Same
        }
    }
}

fn checked(selector: &LabelSelector) -> Result<LabelSelectorFacts, String> {
    let LabelSelector { match_labels, match_expressions } = selector;
    let expressions = match_expressions.iter().map(|LabelExpression { key, operator, values }| {
        let operator = match (operator.as_str(), values.is_empty()) {
            ("In", false) => Operator::In,
            ("NotIn", false) => Operator::NotIn,
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            _ => return Err(format!("operator {operator:.80?} with {} values", values.len())),
        };
        Ok((key.as_str().into(), operator, values.clone()))
    });
    Ok(LabelSelectorFacts {
        match_labels: match_labels.clone(),
        expressions: expressions.collect::<Result<_, String>>()?,
    })
}

/// What a ReferenceGrant says: who may refer to Services of its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantFacts {
    /// Kinds of routes and their namespaces that may refer.
    pub from: Vec<(RouteKind, Arc<str>)>,
    /// To which Services; `None` = all.
    pub to: Vec<Option<Arc<str>>>,
}

/// Translates a ReferenceGrant.
pub fn grant(spec: &ReferenceGrantSpec) -> GrantFacts {
    let from = spec.from.iter().filter_map(|from| {
        let kind = AllowedKind { group: Some(from.group.clone()), kind: from.kind.clone() };
        Some((kind_of(&kind)?, Arc::from(from.namespace.as_str())))
    });
    let to = spec.to.iter().filter(|to| (to.group.is_empty() || to.group == "core") && to.kind == "Service");
    GrantFacts {
        from: from.collect(),
        to: to.map(|to| to.name.as_deref().filter(|name| !name.is_empty()).map(Arc::from)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Fragment, tests::translated};
    use super::*;

    fn gateway(labels: &str, listener: &str) -> (Option<WaypointFacts>, usize) {
        let yaml = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w, labels: {{{labels}}}}}\nspec:\n  gatewayClassName: istio-waypoint\n  listeners: [{listener}]\n"
        );
        let got = translated(&yaml);
        let problems = got.problems.len();
        match got.fragment {
            Fragment::Waypoint(facts) => (Some(*facts), problems),
            _ => (None, problems),
        }
    }

    #[test]
    fn a_waypoint_takes_what_its_label_says() {
        let mesh = "{name: mesh, port: 15008, protocol: HBONE}";
        for (label, takes, problems) in [
            ("", None, 0),
            ("istio.io/waypoint-for: service", Some(Takes::Service), 0),
            ("istio.io/waypoint-for: all", Some(Takes::All), 0),
            ("istio.io/waypoint-for: workload", Some(Takes::Workload), 0),
            ("istio.io/waypoint-for: none", Some(Takes::Nothing), 0),
            ("istio.io/waypoint-for: x", Some(Takes::Service), 1),
        ] {
            let (facts, count) = gateway(label, mesh);
            assert_eq!((facts.unwrap().takes, count), (takes, problems), "{label}");
        }
        assert_eq!(gateway("", "").1, 1);
    }

    #[test]
    fn who_may_bind_is_the_listeners_business() {
        let labels = |text: &str| Labels::from([("team".to_owned(), text.to_owned())]);
        let with = |namespaces: &str| {
            let listener = format!(
                "{{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {{namespaces: {namespaces}}}}}"
            );
            gateway("", &listener).0.unwrap().allowed
        };
        for (namespaces, own, team, admitted) in [
            ("{}", false, "a", false),
            ("{}", true, "a", true),
            ("{from: All}", false, "a", true),
            ("{from: Selector, selector: {matchLabels: {team: a}}}", false, "a", true),
            ("{from: Selector, selector: {matchLabels: {team: a}}}", false, "b", false),
            (
                "{from: Selector, selector: {matchExpressions: [{key: team, operator: NotIn, values: [b]}]}}",
                false,
                "a",
                true,
            ),
            (
                "{from: Selector, selector: {matchExpressions: [{key: team, operator: Exists}]}}",
                false,
                "a",
                true,
            ),
            (
                "{from: Selector, selector: {matchExpressions: [{key: team, operator: Near}]}}",
                false,
                "a",
                false,
            ),
            ("{from: Anyone}", false, "a", false),
        ] {
            assert_eq!(with(namespaces).admits(own, &labels(team)), admitted, "{namespaces}");
        }
    }

    #[test]
    fn other_classes_are_not_ours() {
        let got = translated(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: g}\nspec: {gatewayClassName: nginx}\n",
        );
        assert_eq!(got.fragment, Fragment::OtherGateway("nginx".into()));
        assert_eq!(got.problems.len(), 1);
    }
}
