//! The kinds of objects that an installation is made of or looks at, and where the API server has them.

use kube::{api::ApiResource, core::GroupVersionKind};
use serde_json::Value;

/// One kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// Group, empty for the core.
    pub group: &'static str,
    /// Version.
    pub version: &'static str,
    /// Name.
    pub name: &'static str,
    /// Name in paths and roles.
    pub plural: &'static str,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
}

const fn kind(
    group: &'static str,
    version: &'static str,
    name: &'static str,
    plural: &'static str,
    namespaced: bool,
) -> Kind {
    Kind { group, version, name, plural, namespaced }
}

macro_rules! kinds {
    ($($(#[$meta:meta])* $constant:ident = $group:literal, $version:literal, $name:literal, $plural:literal, $namespaced:literal;)*) => {
        $($(#[$meta])* pub const $constant: Kind = kind($group, $version, $name, $plural, $namespaced);)*

        /// All of them.
        pub const ALL: &[Kind] = &[$($constant),*];
    };
}

kinds! {
    /// Namespaces.
    NAMESPACE = "", "v1", "Namespace", "namespaces", false;
    /// Nodes.
    NODE = "", "v1", "Node", "nodes", false;
    /// Pods.
    POD = "", "v1", "Pod", "pods", true;
    /// Services.
    SERVICE = "", "v1", "Service", "services", true;
    /// Service accounts.
    SERVICE_ACCOUNT = "", "v1", "ServiceAccount", "serviceaccounts", true;
    /// Configuration maps.
    CONFIG_MAP = "", "v1", "ConfigMap", "configmaps", true;
    /// Secrets.
    SECRET = "", "v1", "Secret", "secrets", true;
    /// Events.
    EVENT = "", "v1", "Event", "events", true;
    /// Deployments.
    DEPLOYMENT = "apps", "v1", "Deployment", "deployments", true;
    /// Daemon sets.
    DAEMON_SET = "apps", "v1", "DaemonSet", "daemonsets", true;
    /// Disruption budgets.
    DISRUPTION_BUDGET = "policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", true;
    /// Leases.
    LEASE = "coordination.k8s.io", "v1", "Lease", "leases", true;
    /// Roles.
    ROLE = "rbac.authorization.k8s.io", "v1", "Role", "roles", true;
    /// Bindings of roles.
    ROLE_BINDING = "rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", true;
    /// Roles of the cluster.
    CLUSTER_ROLE = "rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", false;
    /// Bindings of these.
    CLUSTER_ROLE_BINDING = "rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings", false;
    /// Definitions of kinds.
    CUSTOM_RESOURCE = "apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", false;
    /// Classes of Gateways.
    GATEWAY_CLASS = "gateway.networking.k8s.io", "v1", "GatewayClass", "gatewayclasses", false;
    /// Gateways.
    GATEWAY = "gateway.networking.k8s.io", "v1", "Gateway", "gateways", true;
    /// Questions what one may do.
    ACCESS_REVIEW = "authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", false;
}

impl Kind {
    /// (pure) The kind of an object; none when it is not one of these.
    pub fn of(object: &Value) -> Option<Self> {
        let (api_version, name) = (object["apiVersion"].as_str()?, object["kind"].as_str()?);
        ALL.iter().find(|kind| kind.name == name && kind.api_version() == api_version).copied()
    }

    /// (pure) `apiVersion` of its objects.
    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// (pure) Where the client finds it.
    pub fn resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(self.group, self.version, self.name);
        ApiResource::from_gvk_with_plural(&gvk, self.plural)
    }
}
