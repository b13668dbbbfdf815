//! Objects: Kubernetes YAML read into typed values, each with the place it came from.
//!
//! This module is a library as well: local mode and `meshctl analyze` read the same files with the same code.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::Serialize;

pub mod cluster;
pub mod definitions;
pub mod document;
pub mod file;
pub mod kinds;
pub mod kubernetes;

pub use document::{Parsed, parse};

use kinds::{
    AuthorizationPolicySpec, GatewayClassSpec, GatewaySpec, GatewayStatus, GrpcRouteSpec, HttpRouteSpec,
    PeerAuthenticationSpec, ReferenceGrantSpec,
};

/// The kinds that the mesh reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1` Namespace.
    Namespace,
    /// `v1` Node.
    Node,
    /// `v1` Pod.
    Pod,
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` ServiceAccount.
    ServiceAccount,
    /// `v1` ConfigMap.
    ConfigMap,
    /// `gateway.networking.k8s.io` GatewayClass.
    GatewayClass,
    /// `gateway.networking.k8s.io` Gateway.
    Gateway,
    /// `gateway.networking.k8s.io` HTTPRoute.
    HttpRoute,
    /// `gateway.networking.k8s.io` GRPCRoute.
    GrpcRoute,
    /// `gateway.networking.k8s.io` ReferenceGrant.
    ReferenceGrant,
    /// `security.istio.io` AuthorizationPolicy.
    AuthorizationPolicy,
    /// `security.istio.io` PeerAuthentication.
    PeerAuthentication,
}

impl Kind {
    /// Every kind with its API group, the served versions and its name in YAML.
    const TABLE: &'static [(Self, &'static str, &'static [&'static str], &'static str)] = &[
        (Self::Namespace, "", &["v1"], "Namespace"),
        (Self::Node, "", &["v1"], "Node"),
        (Self::Pod, "", &["v1"], "Pod"),
        (Self::Service, "", &["v1"], "Service"),
        (Self::EndpointSlice, "discovery.k8s.io", &["v1"], "EndpointSlice"),
        (Self::ServiceAccount, "", &["v1"], "ServiceAccount"),
        (Self::ConfigMap, "", &["v1"], "ConfigMap"),
        (Self::GatewayClass, "gateway.networking.k8s.io", &["v1", "v1beta1"], "GatewayClass"),
        (Self::Gateway, "gateway.networking.k8s.io", &["v1", "v1beta1"], "Gateway"),
        (Self::HttpRoute, "gateway.networking.k8s.io", &["v1", "v1beta1"], "HTTPRoute"),
        (Self::GrpcRoute, "gateway.networking.k8s.io", &["v1"], "GRPCRoute"),
        (Self::ReferenceGrant, "gateway.networking.k8s.io", &["v1", "v1beta1"], "ReferenceGrant"),
        (Self::AuthorizationPolicy, "security.istio.io", &["v1", "v1beta1"], "AuthorizationPolicy"),
        (Self::PeerAuthentication, "security.istio.io", &["v1", "v1beta1"], "PeerAuthentication"),
    ];

    /// The kind of `apiVersion` and `kind`; `None` when the mesh does not read it.
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        Self::TABLE
            .iter()
            .find(|(_, g, versions, k)| *g == group && *k == kind && versions.contains(&version))
            .map(|(this, ..)| *this)
    }

    /// The policy that `apiVersion` and `kind` mean in a version that is not served: no API server would take it, and
    /// it must not be passed over in silence.
    pub fn misversioned_policy(api_version: &str, kind: &str) -> Option<Self> {
        let (group, _) = api_version.split_once('/')?;
        let of = Self::TABLE.iter().find(|(_, g, _, k)| *g == group && *k == kind).map(|(this, ..)| *this);
        of.filter(|this| this.secures() && Self::of(api_version, kind).is_none())
    }

    /// The API group; empty for core.
    pub fn group(self) -> &'static str {
        Self::TABLE.iter().find(|(this, ..)| *this == self).map_or("", |(_, group, ..)| group)
    }

    /// The versions that are read, the preferred one first.
    pub fn versions(self) -> &'static [&'static str] {
        Self::TABLE.iter().find(|(this, ..)| *this == self).map_or(&[], |(_, _, versions, _)| versions)
    }

    /// The name in the API's paths.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::Pod => "pods",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::ServiceAccount => "serviceaccounts",
            Self::ConfigMap => "configmaps",
            Self::GatewayClass => "gatewayclasses",
            Self::Gateway => "gateways",
            Self::HttpRoute => "httproutes",
            Self::GrpcRoute => "grpcroutes",
            Self::ReferenceGrant => "referencegrants",
            Self::AuthorizationPolicy => "authorizationpolicies",
            Self::PeerAuthentication => "peerauthentications",
        }
    }

    /// The name in YAML.
    pub fn name(self) -> &'static str {
        Self::TABLE.iter().find(|(this, ..)| *this == self).map_or("", |(.., name)| name)
    }

    /// Whether objects of this kind live in a namespace.
    pub fn namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node | Self::GatewayClass)
    }

    /// Whether the object restricts who may talk to whom: broken, it must deny rather than vanish.
    pub fn secures(self) -> bool {
        matches!(self, Self::AuthorizationPolicy | Self::PeerAuthentication)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which object: kind, namespace (empty for cluster-wide kinds) and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// The kind.
    pub kind: Kind,
    /// The namespace; empty for cluster-wide kinds.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// Builds a key.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        Self { kind, namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// Where an object was written.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// The file, relative to the source directory.
    pub file: Arc<str>,
    /// First line of the object, counted from 1.
    pub line: usize,
}

/// One object as the source holds it now.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Which object.
    pub key: ObjectKey,
    /// Where it was written.
    pub origin: Origin,
    /// Its metadata.
    pub meta: ObjectMeta,
    /// Its content.
    pub value: Value,
    /// Digest of the content, so that unchanged objects are not translated again.
    pub digest: u64,
}

/// The typed content of an object.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each variant is the kind of its name")]
pub enum Value {
    Namespace(Box<Namespace>),
    Node(Box<Node>),
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    ServiceAccount(Box<ServiceAccount>),
    ConfigMap(Box<ConfigMap>),
    GatewayClass(Box<GatewayClassSpec>),
    Gateway(Box<GatewaySpec>, Box<GatewayStatus>),
    HttpRoute(Box<HttpRouteSpec>),
    GrpcRoute(Box<GrpcRouteSpec>),
    ReferenceGrant(Box<ReferenceGrantSpec>),
    AuthorizationPolicy(Box<AuthorizationPolicySpec>),
    PeerAuthentication(Box<PeerAuthenticationSpec>),
    /// A policy that could not be read and was never good before: it denies what its selector covers.
    Unreadable {
        match_labels: BTreeMap<String, String>,
    },
}

impl Object {
    /// A label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.meta.labels.as_ref()?.get(key).map(String::as_str)
    }

    /// An annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.meta.annotations.as_ref()?.get(key).map(String::as_str)
    }

    /// Seconds since the epoch at which the object was created; objects without one are the youngest.
    pub fn created(&self) -> i64 {
        self.meta.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second())
    }

    /// `metadata.generation`; zero where the source has none.
    pub fn generation(&self) -> i64 {
        self.meta.generation.unwrap_or(0)
    }

    /// A problem of this object.
    pub fn problem(
        &self,
        severity: Severity,
        field: impl Into<String>,
        reason: impl Into<String>,
    ) -> Problem {
        Problem {
            file: self.origin.file.to_string(),
            line: self.origin.line,
            object: self.key.to_string(),
            field: field.into(),
            reason: reason.into(),
            severity,
        }
    }
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; everything written is in force.
    Info,
    /// Part of what was written has no effect.
    Warning,
    /// The object or file is not in force as written.
    Error,
}

/// Something wrong in the input, named so that it can be found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// The file, relative to the source directory.
    pub file: String,
    /// The line, counted from 1; the object's first line where nothing nearer is known.
    pub line: usize,
    /// `Kind namespace/name`; empty when the file could not be read that far.
    pub object: String,
    /// Path of the field, for example `spec.rules[0].backendRefs[1].name`; may be empty.
    pub field: String,
    /// What is wrong, for people.
    pub reason: String,
    /// How bad it is.
    pub severity: Severity,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        if !self.file.is_empty() {
            write!(f, "{}:{}: ", self.file, self.line)?;
        }
        write!(f, "{severity}: ")?;
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(&self.reason)
    }
}

/// The objects of the source, by key.
pub type Objects = BTreeMap<ObjectKey, Arc<Object>>;

/// Where objects come from.
pub trait Source: Send {
    /// Looks at what there is now; says whether anything changed since the last time. May block on files.
    fn refresh(&mut self) -> bool;

    /// The objects and the problems of reading them.
    fn objects(&self) -> (Objects, Vec<Problem>);

    /// The text of a file, where there are files.
    fn text(&self, file: &str) -> Option<&str>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_group_and_version() {
        assert_eq!(Kind::of("v1", "Pod"), Some(Kind::Pod));
        assert_eq!(Kind::of("gateway.networking.k8s.io/v1", "Gateway"), Some(Kind::Gateway));
        assert_eq!(Kind::of("networking.istio.io/v1", "Gateway"), None);
        assert_eq!(Kind::of("apps/v1", "Pod"), None);
        assert_eq!(Kind::of("v2", "Pod"), None);
        let policy = "AuthorizationPolicy";
        assert_eq!(
            Kind::misversioned_policy("security.istio.io/v2", policy),
            Some(Kind::AuthorizationPolicy)
        );
        assert_eq!(Kind::misversioned_policy("security.istio.io/v1", policy), None);
        assert_eq!(Kind::misversioned_policy("gateway.networking.k8s.io/v2", "HTTPRoute"), None);
    }
}
