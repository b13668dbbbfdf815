//! Every denial and fault that is seen from outside: one stable code each, with whose fault it is.
//! `docs/flags.md` is generated from this table.

use std::fmt;

use serde::{Serialize, Serializer};

/// Who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Works as configured: a policy or rule refused.
    Policy,
    /// The peer did something that is not allowed or is broken.
    Peer,
    /// The mesh itself: configuration not there yet, certificate missing, resources exhausted.
    Mesh,
    /// The application or its endpoints.
    Application,
}

macro_rules! flags {
    ($($variant:ident $code:literal $istio:literal $fault:ident $text:literal;)*) => {
        /// Why a connection was refused or failed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Flag { $(#[doc = $text] $variant,)* }

        impl Flag {
            /// Every flag, in the order of the table.
            pub const ALL: &[Flag] = &[$(Flag::$variant,)*];

            /// The stable code: log field, status, row of `docs/flags.md`.
            pub const fn code(self) -> &'static str { match self { $(Flag::$variant => $code,)* } }

            /// Value of the metric label `response_flags` (`wire-protocol.md` T2).
            pub const fn response_flag(self) -> &'static str { match self { $(Flag::$variant => $istio,)* } }

            /// Who has to act.
            pub const fn fault(self) -> Fault { match self { $(Flag::$variant => Fault::$fault,)* } }

            /// One sentence for people.
            pub const fn text(self) -> &'static str { match self { $(Flag::$variant => $text,)* } }
        }
    };
}

flags! {
    PolicyDenied "POLICY_DENIED" "DENY" Policy "An AuthorizationPolicy denies this connection.";
    MtlsRequired "MTLS_REQUIRED" "DENY" Policy "PeerAuthentication STRICT refuses plaintext.";
    PolicyPending "POLICY_PENDING" "DENY" Mesh "A policy that applies here has not been received yet.";
    PolicyInvalid "POLICY_INVALID" "DENY" Policy "A policy that applies here cannot be evaluated.";
    PolicyChanged "POLICY_CHANGED" "DENY" Policy "The connection was cut because a change of policy denies it now.";
    WaypointRequired "WAYPOINT_REQUIRED" "DENY" Policy "This port is reached only through its waypoint.";
    WaypointUnavailable "WAYPOINT_UNAVAILABLE" "CONNECT" Mesh "The waypoint that this traffic must pass has no usable endpoint.";
    UnknownWorkload "UNKNOWN_WORKLOAD" "CONNECT" Mesh "The control plane has not described this pod yet.";
    NoFlowRecord "NO_FLOW_RECORD" "DENY" Peer "A connection reached the outbound port without a record of the kernel.";
    IllegalPort "ILLEGAL_PORT" "DENY" Peer "The destination is one of the mesh's own ports.";
    IllegalSource "ILLEGAL_SOURCE" "DENY" Peer "The source address is not one of the pod's.";
    IllegalAuthority "ILLEGAL_AUTHORITY" "DENY" Peer "The tunnel asks for a destination that this pod does not serve.";
    MalformedRequest "MALFORMED_REQUEST" "DENY" Peer "The peer's request is malformed.";
    UnknownDestination "UNKNOWN_DESTINATION" "DENY" Policy "The destination is not known to the mesh, and only known ones are allowed.";
    NoHealthyUpstream "NO_HEALTHY_UPSTREAM" "CONNECT" Application "The service has no endpoint that can take the connection.";
    UpstreamRefused "UPSTREAM_REFUSED" "CONNECT" Application "The destination refused the connection.";
    UpstreamTimeout "UPSTREAM_TIMEOUT" "CONNECT" Application "The destination did not answer in time; maybe a NetworkPolicy blocks port 15008.";
    UpstreamIo "UPSTREAM_IO" "CONNECT" Application "The connection to the destination failed.";
    UpstreamStatus "UPSTREAM_STATUS" "CONNECT" Peer "The peer's proxy refused the tunnel.";
    TlsFailure "TLS_FAILURE" "TLS_FAILURE" Peer "The TLS handshake failed.";
    PeerIdentity "PEER_IDENTITY" "IDENTITY_ERROR" Peer "The peer proved another identity than the expected one.";
    H2Handshake "H2_HANDSHAKE" "H2_HANDSHAKE_FAILURE" Peer "The HTTP/2 handshake in the tunnel failed.";
    HandshakeTimeout "HANDSHAKE_TIMEOUT" "TLS_FAILURE" Peer "The peer did not finish its handshake in time.";
    CertificateMissing "CERTIFICATE_MISSING" "IDENTITY_ERROR" Mesh "There is no certificate for this identity yet.";
    IdentityExpired "IDENTITY_EXPIRED" "IDENTITY_ERROR" Mesh "The certificate of this identity has expired.";
    SourceBind "SOURCE_BIND" "CONNECT" Mesh "The client's address could not be used towards the application.";
    Overload "OVERLOAD" "CONNECT" Mesh "A limit of the agent is reached.";
    StaleGeneration "STALE_GENERATION" "DENY" Mesh "Policy changed between connect and the first packet.";
    PodQuota "POD_QUOTA" "CONNECT" Application "The pod has as many connections as one pod may have.";
    MapFull "MAP_FULL" "DENY" Mesh "A kernel map is full.";
    KernelFault "KERNEL_FAULT" "DENY" Mesh "A kernel helper failed.";
    UnsupportedSocket "UNSUPPORTED_SOCKET" "DENY" Peer "The socket's protocol or address cannot be captured.";
    PodReleased "POD_RELEASED" "-" Mesh "The pod was released from the mesh.";
    Drain "DRAIN" "-" Mesh "The agent is shutting down.";
    AgentUnavailable "AGENT_UNAVAILABLE" "-" Mesh "A pod was not started because the agent of its node does not answer.";
    PodUnknown "POD_UNKNOWN" "-" Mesh "A pod was not started because the control plane has not told its node's agent of it.";
    NetnsUnknown "NETNS_UNKNOWN" "-" Mesh "The network namespace or the address of a pod cannot be found, so it cannot be captured.";
    Aborted "ABORTED" "-" Mesh "The connection's task ended without a result.";
    Internal "INTERNAL" "CONNECT" Mesh "A fault inside the mesh.";
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

impl Serialize for Flag {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}
