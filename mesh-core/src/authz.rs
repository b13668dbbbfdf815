//! Evaluation of authorization policies at L4 (`wire-protocol.md` 4.3). Pure.

use std::{net::IpAddr, sync::Arc};

use serde::Serialize;

use crate::{
    id::{Identity, PolicyKey},
    model::{Action, Clause, Match, Policy, Rule, StringMatch},
};

/// Who asks for what.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// Proven identities. None: plaintext. Two, when the bound waypoint states its client: a positive value matches
    /// if either fits, a negative one holds only if neither does (`config-istio.md` 15).
    pub identities: &'a [&'a Identity],
    /// The peer's address.
    pub source_ip: IpAddr,
    /// The workload's own address.
    pub destination_ip: IpAddr,
    /// The application's port.
    pub destination_port: u16,
}

/// The rule that decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decider {
    /// The policy.
    pub policy: PolicyKey,
    /// Index of its rule.
    pub rule: usize,
}

/// The outcome over all policies that apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No ALLOW policy applies, and no DENY matched.
    AllowedByDefault,
    /// An ALLOW rule matched.
    Allowed(Decider),
    /// A DENY rule matched.
    Denied(Decider),
    /// ALLOW policies apply and none matched; names one of them.
    NotAllowed(PolicyKey),
}

/// Evaluates the policies that apply to a workload. Dry-run policies do not count (I6).
pub fn evaluate<'a>(
    policies: impl Iterator<Item = &'a Arc<Policy>> + Clone,
    subject: &Subject<'_>,
) -> Verdict {
    let enforced = policies.filter(|policy| !policy.dry_run);
    let first = |action: Action| enforced.clone().filter(move |policy| policy.action == action);
    if let Some(decider) = first(Action::Deny).find_map(|policy| matching_rule(policy, subject)) {
        return Verdict::Denied(decider);
    }
    let Some(some_allow) = first(Action::Allow).next() else { return Verdict::AllowedByDefault };
    match first(Action::Allow).find_map(|policy| matching_rule(policy, subject)) {
        Some(decider) => Verdict::Allowed(decider),
        None => Verdict::NotAllowed(some_allow.key.clone()),
    }
}

/// Dry-run policies that match: for logs and counters.
pub fn dry_run<'a>(policies: impl Iterator<Item = &'a Arc<Policy>>, subject: &Subject<'_>) -> Vec<Decider> {
    policies.filter(|policy| policy.dry_run).filter_map(|policy| matching_rule(policy, subject)).collect()
}

/// The first rule of a policy that matches.
pub fn matching_rule(policy: &Policy, subject: &Subject<'_>) -> Option<Decider> {
    let rule = policy.rules.iter().position(|rule| rule_matches(rule, subject))?;
    Some(Decider { policy: policy.key.clone(), rule })
}

fn rule_matches(rule: &Rule, subject: &Subject<'_>) -> bool {
    rule.clauses.iter().all(|clause| clause_matches(clause, subject))
}

fn clause_matches(clause: &Clause, subject: &Subject<'_>) -> bool {
    clause.matches.is_empty()
        || clause.matches.iter().any(|item| *item != Match::default() && match_matches(item, subject))
}

fn match_matches(item: &Match, subject: &Subject<'_>) -> bool {
    // Destructured in full: a new criterion that is not evaluated must not compile.
    let Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        service_accounts,
        not_service_accounts,
        trust_domains,
        not_trust_domains,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
    } = item;
    let who = subject.identities;
    // A peer without identity has the namespace "" (I9).
    let namespace = |pattern: &StringMatch| match who {
        [] => matches(pattern, ""),
        _ => who.iter().any(|id| matches(pattern, &id.namespace)),
    };
    let principal = |pattern: &StringMatch| who.iter().any(|id| matches(pattern, &id.principal()));
    let trust_domain = |pattern: &StringMatch| who.iter().any(|id| matches(pattern, &id.trust_domain));
    let account = |(namespace, account): &(Arc<str>, Arc<str>)| {
        who.iter().any(|id| id.namespace == *namespace && id.service_account == *account)
    };
    holds(namespaces, not_namespaces, namespace)
        && holds(principals, not_principals, principal)
        && holds(service_accounts, not_service_accounts, account)
        && holds(trust_domains, not_trust_domains, trust_domain)
        && holds(source_ips, not_source_ips, |net| net.contains(&subject.source_ip))
        && holds(destination_ips, not_destination_ips, |net| net.contains(&subject.destination_ip))
        && holds(destination_ports, not_destination_ports, |port| *port == subject.destination_port)
}

/// A positive list is OR (empty: any); of a negative one no value may fit.
fn holds<T>(positive: &[T], negative: &[T], fits: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&fits)) && !negative.iter().any(fits)
}

fn matches(pattern: &StringMatch, text: &str) -> bool {
    match pattern {
        StringMatch::Exact(exact) => text == &**exact,
        StringMatch::Prefix(prefix) => text.starts_with(&**prefix),
        StringMatch::Suffix(suffix) => text.ends_with(&**suffix),
        StringMatch::Presence => !text.is_empty(),
    }
}
