//! What the `status` of an object is to say, as types; serialised, they are what the API server takes.
//!
//! Made by pure functions, written by the leader. `lastTransitionTime` is the writer's: it keeps the old time of a
//! condition whose status is the same.

use std::sync::Arc;

use serde::Serialize;

/// `controllerName` of our GatewayClasses, and of every entry of ours in the status of a route.
pub const CONTROLLER: &str = "undermesh.io/gateway-controller";

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[expect(missing_docs, reason = "the values of the API")]
pub enum Truth {
    True,
    False,
    Unknown,
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// One condition, without the time of its last transition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Whether it holds.
    pub status: Truth,
    /// One word.
    pub reason: String,
    /// For people.
    pub message: String,
    /// `metadata.generation` of the object that it was judged by.
    pub observed_generation: i64,
}

/// The status of one object, as far as it is ours to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum ObjectStatus {
    /// A GatewayClass of our controller.
    Class(ClassStatus),
    /// A Gateway of our classes.
    Gateway(GatewayStatus),
    /// An HTTPRoute or GRPCRoute: the writer leaves the parents of other controllers alone, and removes its own entry
    /// where `parents` is empty.
    Route(RouteStatus),
    /// A policy or Service: the writer merges by type, and leaves the conditions of others alone.
    Conditions(Conditions),
}

/// Only conditions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Conditions {
    /// By type.
    pub conditions: Vec<Condition>,
}

/// Status of a GatewayClass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClassStatus {
    /// By type.
    pub conditions: Vec<Condition>,
    /// In alphabetical order.
    pub supported_features: Vec<Feature>,
}

/// A feature of the Gateway API by its official name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// The name.
    pub name: &'static str,
}

/// Status of a Gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// Where it can be reached.
    pub addresses: Vec<GatewayAddress>,
    /// By type.
    pub conditions: Vec<Condition>,
    /// One per listener of the spec.
    pub listeners: Vec<ListenerStatus>,
}

/// An address of a Gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GatewayAddress {
    /// `IPAddress` or `Hostname`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The address.
    pub value: String,
}

/// Status of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerStatus {
    /// Name of the listener.
    pub name: Arc<str>,
    /// Kinds of routes that it takes.
    pub supported_kinds: Vec<RouteKind>,
    /// How many routes are attached.
    pub attached_routes: usize,
    /// By type.
    pub conditions: Vec<Condition>,
}

/// A kind of route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RouteKind {
    /// API group.
    pub group: &'static str,
    /// Kind.
    pub kind: &'static str,
}

/// Status of a route: our entries of `status.parents`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RouteStatus {
    /// In the order of `spec.parentRefs`.
    pub parents: Vec<ParentStatus>,
}

/// What one parent makes of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentStatus {
    /// Which parent.
    pub parent_ref: ParentRef,
    /// [`CONTROLLER`].
    pub controller_name: &'static str,
    /// By type.
    pub conditions: Vec<Condition>,
}

/// A reference to a parent, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentRef {
    /// API group; empty for core.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Only this section of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<Arc<str>>,
    /// Only this port of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}
