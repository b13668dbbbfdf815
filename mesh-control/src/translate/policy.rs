//! AuthorizationPolicy and PeerAuthentication.
//!
//! Whatever cannot be enforced at L4 as it is written turns to the strict side (`config-istio.md` 15): an ALLOW rule
//! with such a part grants nothing; a DENY rule keeps the rest, and denies its whole scope when nothing is left.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{
    id::PolicyKey,
    model::policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch},
};

use super::{Fragment, Labels, Mesh, Report};
use crate::source::{
    Kind, Object, Severity,
    kinds::{AuthorizationPolicySpec, MutualTls, PeerAuthenticationSpec, PolicyTarget, WorkloadSelector},
};

mod rule;

/// Most rules of one policy.
const MAX_RULES: usize = 512;

/// What an AuthorizationPolicy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationFacts {
    /// Where it holds.
    pub target: Target,
    /// The policy; `None` when it never changes a verdict (AUDIT).
    pub policy: Option<Policy>,
}

/// Where a policy holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By scope alone: mesh or namespace.
    Scope,
    /// Workloads with these labels, of every namespace if the policy stands in the root namespace.
    Selector {
        /// The labels.
        labels: Labels,
        /// Every namespace.
        everywhere: bool,
    },
    /// At waypoints: `(kind, name)` of Services, Gateways and GatewayClasses.
    Waypoint(Vec<WaypointTarget>),
}

/// One `targetRef`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaypointTarget {
    /// A Service of the policy's namespace.
    Service(Arc<str>),
    /// A Gateway of the policy's namespace.
    Gateway(Arc<str>),
    /// A GatewayClass; policy in the root namespace.
    Class(Arc<str>),
}

/// What a PeerAuthentication says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthenticationFacts {
    /// Workloads with these labels; `None` = namespace or, in the root namespace, mesh.
    pub selector: Option<Labels>,
    /// Its own mode; `None` = the parent's.
    pub mode: Option<Mode>,
    /// Modes by port of the workload.
    pub ports: BTreeMap<u16, Option<Mode>>,
}

/// A mode of mutual TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Plaintext is refused.
    Strict,
    /// Plaintext is taken too.
    Permissive,
    /// Acts as PERMISSIVE in an ambient mesh, except as a lone port under an UNSET object.
    Disable,
}

/// Translates an AuthorizationPolicy.
pub fn authorization(
    object: &Object,
    spec: &AuthorizationPolicySpec,
    mesh: &Mesh,
    report: &mut Report<'_>,
) -> AuthorizationFacts {
    let AuthorizationPolicySpec { selector, target_ref, target_refs, action, provider: _, rules } = spec;
    let root = object.key.namespace == mesh.root_namespace;
    let targets: Vec<&PolicyTarget> = target_ref.iter().chain(target_refs).collect();
    let target = target_of(object, selector.as_ref(), &targets, root, report);
    let scope = match &target {
        Target::Selector { .. } | Target::Waypoint(_) => Scope::WorkloadSelector,
        Target::Scope if root => Scope::Global,
        Target::Scope => Scope::Namespace,
    };
    let everything = Rule::default();
    let given = rules.as_deref().unwrap_or_default();
    let too_many = given.len() > MAX_RULES;
    if too_many {
        report.error("spec.rules", format!("more than {MAX_RULES} rules; taken on the strict side"));
    }
    let (action, rules) = match action.as_deref() {
        None | Some("ALLOW") if too_many => (Action::Allow, Vec::new()),
        None | Some("ALLOW") => (Action::Allow, rule::allow(object, given, report)),
        Some("DENY") if too_many => (Action::Deny, vec![everything]),
        Some("DENY") => {
            if given.is_empty() {
                report.warn("spec.rules", "a DENY policy without rules never matches");
            }
            (Action::Deny, rule::deny(object, given, report))
        }
        Some("AUDIT") => {
            report.warn("spec.action", "AUDIT never changes a verdict: the policy has no effect");
            return AuthorizationFacts { target, policy: None };
        }
        Some("CUSTOM") => {
            let reason = "NeedsWaypoint: CUSTOM cannot be enforced at L4; its scope is denied";
            report.error("spec.action", reason);
            (Action::Deny, vec![everything])
        }
        Some(other) => {
            let reason = format!("{other:.40?} is none of ALLOW, DENY, AUDIT, CUSTOM; its scope is denied");
            report.error("spec.action", reason);
            (Action::Deny, vec![everything])
        }
    };
    let key = PolicyKey { namespace: object.key.namespace.clone(), name: object.key.name.clone() };
    let dry_run = match object.annotation("istio.io/dry-run") {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => {
            report.error(
                "metadata.annotations",
                "istio.io/dry-run must be true or false; the policy is enforced",
            );
            false
        }
    };
    AuthorizationFacts { target, policy: Some(Policy { key, scope, action, rules, dry_run }) }
}

fn target_of(
    object: &Object,
    selector: Option<&WorkloadSelector>,
    targets: &[&PolicyTarget],
    root: bool,
    report: &mut Report<'_>,
) -> Target {
    if !targets.is_empty() {
        if selector.is_some() {
            report.error("spec.selector", "selector and targetRefs exclude each other; targetRefs counts");
        }
        return Target::Waypoint(
            targets.iter().enumerate().filter_map(|(i, t)| target_ref(object, i, t, report)).collect(),
        );
    }
    match selector {
        Some(WorkloadSelector { match_labels }) if !match_labels.is_empty() => {
            Target::Selector { labels: match_labels.clone(), everywhere: root }
        }
        Some(_) | None => Target::Scope,
    }
}

fn target_ref(
    object: &Object,
    index: usize,
    target: &PolicyTarget,
    report: &mut Report<'_>,
) -> Option<WaypointTarget> {
    let PolicyTarget { group, kind, name, namespace, section_name } = target;
    let field = format!("spec.targetRefs[{index}]");
    if namespace.as_deref().is_some_and(|namespace| namespace != &*object.key.namespace) {
        report.error(format!("{field}.namespace"), "a policy targets only objects of its own namespace");
        return None;
    }
    if section_name.is_some() {
        report.warn(format!("{field}.sectionName"), "not supported: the whole object is meant");
    }
    match (group.as_deref().unwrap_or_default(), kind.as_str()) {
        ("" | "core", "Service") => Some(WaypointTarget::Service(name.as_str().into())),
        ("gateway.networking.k8s.io", "Gateway") => Some(WaypointTarget::Gateway(name.as_str().into())),
        ("gateway.networking.k8s.io", "GatewayClass") => Some(WaypointTarget::Class(name.as_str().into())),
        (group, kind) => {
            report.error(field, format!("cannot target {kind:.80?} of group {group:.80?}"));
            None
        }
    }
}

/// Translates a PeerAuthentication; `None` when it has no effect.
pub fn peer_authentication(
    object: &Object,
    spec: &PeerAuthenticationSpec,
    mesh: &Mesh,
    report: &mut Report<'_>,
) -> Option<PeerAuthenticationFacts> {
    let PeerAuthenticationSpec { selector, mtls, port_level_mtls } = spec;
    let selector =
        selector.as_ref().map(|selector| &selector.match_labels).filter(|labels| !labels.is_empty());
    if selector.is_some() && object.key.namespace == mesh.root_namespace {
        report.error(
            "spec.selector",
            "a selector in the root namespace is not supported: the object has no effect",
        );
        return None;
    }
    let mut ports = BTreeMap::new();
    if selector.is_none() && !port_level_mtls.is_empty() {
        report.error("spec.portLevelMtls", "needs a selector with labels: the ports have no effect");
    } else {
        for (text, mtls) in port_level_mtls {
            let field = format!("spec.portLevelMtls.{text:.20}");
            match text.parse::<u16>().ok().filter(|port| *port != 0) {
                Some(port) => {
                    ports.insert(port, mode_of(mtls, &field, report));
                }
                None => report.error(field, "not a port"),
            }
        }
    }
    let mode = mtls.as_ref().and_then(|mtls| mode_of(mtls, "spec.mtls", report));
    Some(PeerAuthenticationFacts { selector: selector.cloned(), mode, ports })
}

/// What cannot be understood is STRICT.
fn mode_of(mtls: &MutualTls, field: &str, report: &mut Report<'_>) -> Option<Mode> {
    let MutualTls { mode } = mtls;
    match mode.as_deref() {
        None | Some("UNSET") => None,
        Some("STRICT") => Some(Mode::Strict),
        Some("PERMISSIVE") => Some(Mode::Permissive),
        Some("DISABLE") => {
            report.warn(format!("{field}.mode"), "DISABLE acts as PERMISSIVE");
            Some(Mode::Disable)
        }
        Some(other) => {
            let reason =
                format!("{other:.40?} is none of UNSET, DISABLE, PERMISSIVE, STRICT; taken as STRICT");
            report.error(format!("{field}.mode"), reason);
            Some(Mode::Strict)
        }
    }
}

/// A policy that could not be read denies what it would have covered.
pub fn unreadable(object: &Object, match_labels: &Labels, mesh: &Mesh) -> Fragment {
    let root = object.key.namespace == mesh.root_namespace;
    let selector = Some(match_labels.clone()).filter(|labels| !labels.is_empty());
    if object.key.kind == Kind::PeerAuthentication {
        let selector = if root { None } else { selector };
        let strict = PeerAuthenticationFacts { selector, mode: Some(Mode::Strict), ports: BTreeMap::new() };
        return Fragment::PeerAuthentication(strict);
    }
    let (target, scope) = match selector {
        Some(labels) => (Target::Selector { labels, everywhere: root }, Scope::WorkloadSelector),
        None if root => (Target::Scope, Scope::Global),
        None => (Target::Scope, Scope::Namespace),
    };
    let key = PolicyKey { namespace: object.key.namespace.clone(), name: object.key.name.clone() };
    let policy = Policy { key, scope, action: Action::Deny, rules: vec![Rule::default()], dry_run: false };
    Fragment::Authorization(AuthorizationFacts { target, policy: Some(policy) })
}

/// The DENY policy that refuses peers without an identity, on `ports` or on all but `except`.
pub fn plaintext_denied(key: PolicyKey, ports: &[u16], except: &[u16]) -> Policy {
    let clause = |criterion: Match| Clause { matches: vec![criterion] };
    let mut clauses = Vec::new();
    if !ports.is_empty() {
        clauses.push(clause(Match { destination_ports: ports.to_vec(), ..Match::default() }));
    }
    if !except.is_empty() {
        clauses.push(clause(Match { not_destination_ports: except.to_vec(), ..Match::default() }));
    }
    clauses.push(clause(Match { not_principals: vec![StringMatch::Presence], ..Match::default() }));
    let rules = vec![Rule { clauses }];
    Policy { key, scope: Scope::WorkloadSelector, action: Action::Deny, rules, dry_run: false }
}

/// The DENY policy that refuses everybody on `ports`.
pub fn ports_denied(key: PolicyKey, ports: &[u16]) -> Policy {
    let on = Match { destination_ports: ports.to_vec(), ..Match::default() };
    denied(key, Rule { clauses: vec![Clause { matches: vec![on] }] })
}

/// The DENY policy that refuses everybody on every port.
pub fn all_denied(key: PolicyKey) -> Policy {
    denied(key, Rule { clauses: Vec::new() })
}

fn denied(key: PolicyKey, rule: Rule) -> Policy {
    Policy { key, scope: Scope::WorkloadSelector, action: Action::Deny, rules: vec![rule], dry_run: false }
}

/// How bad a part that L4 cannot evaluate is: the rest is enforced, so the object is not as written.
pub(crate) const UNSUPPORTED: Severity = Severity::Error;

#[cfg(test)]
mod tests {
    use super::super::tests::{complaints, translated};
    use super::*;

    fn policy_of(namespace: &str, spec: &str) -> (AuthorizationFacts, Vec<String>) {
        let yaml = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n"
        );
        let got = translated(&yaml);
        match &got.fragment {
            Fragment::Authorization(facts) => (facts.clone(), complaints(&got)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn scope_and_action_are_read() {
        for (namespace, spec, scope, action, rules) in [
            ("shop", "{}", Scope::Namespace, Action::Allow, 0),
            ("undermesh-system", "{}", Scope::Global, Action::Allow, 0),
            (
                "shop",
                "{selector: {matchLabels: {app: a}}, rules: [{}]}",
                Scope::WorkloadSelector,
                Action::Allow,
                1,
            ),
            ("shop", "{selector: {}, action: DENY, rules: [{}]}", Scope::Namespace, Action::Deny, 1),
            ("shop", "{action: CUSTOM, provider: {name: x}, rules: [{}]}", Scope::Namespace, Action::Deny, 1),
            ("shop", "{action: PERHAPS}", Scope::Namespace, Action::Deny, 1),
            ("shop", "{action: DENY}", Scope::Namespace, Action::Deny, 0),
        ] {
            let policy = policy_of(namespace, spec).0.policy.unwrap();
            assert_eq!((policy.scope, policy.action, policy.rules.len()), (scope, action, rules), "{spec}");
        }
        assert_eq!(policy_of("shop", "{action: AUDIT, rules: [{}]}").0.policy, None);
    }

    #[test]
    fn targets_are_for_waypoints() {
        let (facts, _) = policy_of(
            "shop",
            "{targetRefs: [{kind: Service, group: '', name: cart}, {kind: Gateway, group: gateway.networking.k8s.io, name: w}]}",
        );
        let Target::Waypoint(targets) = facts.target else { panic!() };
        assert_eq!(targets, [WaypointTarget::Service("cart".into()), WaypointTarget::Gateway("w".into())]);
        let (facts, problems) =
            policy_of("shop", "{targetRef: {kind: Service, group: '', name: cart, namespace: bank}}");
        assert_eq!((facts.target, problems.len()), (Target::Waypoint(vec![]), 1));
    }

    #[test]
    fn dry_run_is_read_and_a_typo_enforces() {
        for (value, dry_run) in [("'true'", true), ("'false'", false), ("'yes'", false)] {
            let yaml = format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, annotations: {{istio.io/dry-run: {value}}}}}\n"
            );
            let Fragment::Authorization(facts) = translated(&yaml).fragment else { panic!() };
            assert_eq!(facts.policy.unwrap().dry_run, dry_run, "{value}");
        }
    }

    fn peer_of(namespace: &str, spec: &str) -> (Option<PeerAuthenticationFacts>, usize) {
        let yaml = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n"
        );
        let got = translated(&yaml);
        let facts = match got.fragment {
            Fragment::PeerAuthentication(facts) => Some(facts),
            _ => None,
        };
        (facts, got.problems.len())
    }

    #[test]
    fn modes_are_read_and_nonsense_is_strict() {
        for (spec, mode, problems) in [
            ("{}", None, 0),
            ("{mtls: {mode: UNSET}}", None, 0),
            ("{mtls: {mode: STRICT}}", Some(Mode::Strict), 0),
            ("{mtls: {mode: PERMISSIVE}}", Some(Mode::Permissive), 0),
            ("{mtls: {mode: DISABLE}}", Some(Mode::Disable), 1),
            ("{mtls: {mode: strict}}", Some(Mode::Strict), 1),
            ("{mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}", Some(Mode::Strict), 1),
        ] {
            let (facts, count) = peer_of("shop", spec);
            let facts = facts.unwrap();
            assert_eq!((facts.mode, count, facts.ports.len()), (mode, problems, 0), "{spec}");
        }
        let (facts, _) = peer_of(
            "shop",
            "{selector: {matchLabels: {a: b}}, portLevelMtls: {8080: {mode: STRICT}, 0: {mode: STRICT}, 9: {}}}",
        );
        assert_eq!(facts.unwrap().ports, BTreeMap::from([(8080, Some(Mode::Strict)), (9, None)]));
        assert_eq!(
            peer_of("undermesh-system", "{selector: {matchLabels: {a: b}}, mtls: {mode: STRICT}}"),
            (None, 1)
        );
    }
}
