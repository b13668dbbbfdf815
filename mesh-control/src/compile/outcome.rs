//! What became of the objects that a user watches: the facts that their status is made of.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use crate::{
    source::ObjectKey,
    status::object::ParentRef,
    translate::{gateway::WaypointFacts, route::BackendFault},
};

/// By object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// HTTPRoutes and GRPCRoutes.
    pub routes: BTreeMap<ObjectKey, RouteOutcome>,
    /// Gateways of our classes.
    pub gateways: BTreeMap<ObjectKey, GatewayOutcome>,
    /// GatewayClasses of our controller.
    pub classes: BTreeMap<ObjectKey, ClassOutcome>,
    /// Services that ask for a waypoint.
    pub bindings: BTreeMap<ObjectKey, BindingOutcome>,
    /// `metadata.generation` of whatever is carried to the proxies.
    pub generations: BTreeMap<ObjectKey, i64>,
}

/// A route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteOutcome {
    /// `metadata.generation`.
    pub generation: i64,
    /// Its parents that are ours.
    pub parents: Vec<ParentOutcome>,
    /// The first backend that cannot be served.
    pub unresolved: Option<(BackendFault, String)>,
    /// Rules that answer with an error because of what is written in them, and whether all do.
    pub invalid_rules: Option<(String, bool)>,
}

/// A route at one parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentOutcome {
    /// Which parent.
    pub parent: ParentRef,
    /// Why it does not attach.
    pub refused: Option<(ParentRefusal, String)>,
    /// The waypoint configurations that carry it.
    pub waypoints: BTreeSet<Arc<str>>,
}

/// Why a route does not attach to a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParentRefusal {
    /// There is no such parent, section or port.
    NoMatchingParent,
    /// The Gateway does not take routes of that namespace or kind.
    NotAllowedByListeners,
    /// A value cannot be understood or honoured.
    UnsupportedValue,
    /// An older route of the other kind has the hostname.
    Conflicted,
    /// The Service has no waypoint: nobody could honour the route.
    AncestorNotBound,
    /// The Service's waypoint is missing or does not admit it.
    WaypointUnavailable,
}

impl ParentRefusal {
    /// The reason of the condition.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoMatchingParent => "NoMatchingParent",
            Self::NotAllowedByListeners => "NotAllowedByListeners",
            Self::UnsupportedValue => "UnsupportedValue",
            Self::Conflicted => "Conflicted",
            Self::AncestorNotBound => "AncestorNotBound",
            Self::WaypointUnavailable => "WaypointUnavailable",
        }
    }
}

/// A Gateway of our classes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayOutcome {
    /// `metadata.generation`.
    pub generation: i64,
    /// What it says; `None` for a class that we own and do not serve.
    pub facts: Option<Box<WaypointFacts>>,
    /// Addresses of its Service.
    pub addresses: Vec<IpAddr>,
    /// How many routes are attached to it by name.
    pub attached: usize,
    /// Its pods that take connections.
    pub pods: usize,
}

/// A GatewayClass of our controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassOutcome {
    /// `metadata.generation`.
    pub generation: i64,
    /// Whether Gateways of it are served.
    pub served: bool,
    /// It names parameters, which are not read.
    pub parameters: bool,
}

/// A Service that asks for a waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BindingOutcome {
    /// `metadata.generation`.
    pub generation: i64,
    /// `namespace/gateway`.
    pub gateway: Arc<str>,
    /// Why it is not bound, or its waypoint does not take traffic yet: reason and text.
    pub refused: Option<(&'static str, String)>,
}
