//! Authorization policies as the data plane enforces them (WDS `istio.security.Authorization`).

use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use crate::id::PolicyKey;

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Scope {
    /// Every workload of the mesh.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// Workloads that name the policy.
    WorkloadSelector,
}

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Action {
    /// Permits; with any ALLOW policy present, what none permits is denied.
    Allow,
    /// Forbids; wins over ALLOW.
    Deny,
}

/// A policy: matches if any rule matches; without rules it never matches (`wire-protocol.md` I8).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// `namespace/name`.
    pub key: PolicyKey,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// OR.
    pub rules: Vec<Rule>,
    /// Evaluated for logs and counters only.
    pub dry_run: bool,
}

/// Matches if all clauses match; without clauses it matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// AND.
    pub clauses: Vec<Clause>,
}

/// Matches if any non-empty match does; without matches it matches; with only empty ones it does not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Clause {
    /// OR.
    pub matches: Vec<Match>,
}

/// Every criterion that is present must hold; a positive list is OR, of a negative one no value may match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Match {
    /// Namespace of the peer.
    pub namespaces: Vec<StringMatch>,
    /// Negative form.
    pub not_namespaces: Vec<StringMatch>,
    /// Peer's SPIFFE URI without its scheme.
    pub principals: Vec<StringMatch>,
    /// Negative form.
    pub not_principals: Vec<StringMatch>,
    /// `(namespace, service account)` of the peer.
    pub service_accounts: Vec<(Arc<str>, Arc<str>)>,
    /// Negative form.
    pub not_service_accounts: Vec<(Arc<str>, Arc<str>)>,
    /// Trust domain of the peer (ours, in the match's `extensions`).
    pub trust_domains: Vec<StringMatch>,
    /// Negative form.
    pub not_trust_domains: Vec<StringMatch>,
    /// Peer address.
    pub source_ips: Vec<IpNet>,
    /// Negative form.
    pub not_source_ips: Vec<IpNet>,
    /// Address of the workload itself.
    pub destination_ips: Vec<IpNet>,
    /// Negative form.
    pub not_destination_ips: Vec<IpNet>,
    /// Final port of the application.
    pub destination_ports: Vec<u16>,
    /// Negative form.
    pub not_destination_ports: Vec<u16>,
}

/// How a string is compared.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Starts with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Not empty.
    Presence,
}
