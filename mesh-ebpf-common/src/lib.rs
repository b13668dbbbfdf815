//! What the programs in the kernel and the agent agree on: byte layouts of every map, the record of a flow, and the
//! decision about a connection. Needs Linux 5.15 or later.
//!
//! Nothing here allocates or knows what a policy text says: the agent lowers policy to numbers, the kernel looks the
//! numbers up, and [`verdict::decide`] turns what was found into what happens.
#![cfg_attr(not(test), no_std)]

pub mod event;
pub mod map;
pub mod reason;
pub mod verdict;
pub mod wire;

/// Version of the layout of all maps together; a directory of that name holds the pins, so that two layouts never
/// share a map.
pub const LAYOUT: &str = "v2";

/// The one firewall mark of the mesh: on a pod's socket it means "deliver locally, to the agent". Nothing is ever
/// permitted because of it: a pod may set it itself and only reaches its own loopback.
pub const CAPTURE_MARK: u32 = 0x554d_0539;

/// The routing table that marked packets of a pod's namespace use.
pub const CAPTURE_TABLE: u32 = 0x554d;

/// Where the agent accepts what pods send.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where the agent accepts what arrives without a tunnel.
pub const INBOUND_PORT: u16 = 15006;
/// Where the agent accepts tunnels.
pub const HBONE_PORT: u16 = 15008;

/// True for the ports on which only the agent may be reached.
#[inline(always)]
pub const fn is_agent_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | INBOUND_PORT | HBONE_PORT)
}
