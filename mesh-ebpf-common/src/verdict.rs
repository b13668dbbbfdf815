//! The decision about one `connect()`, as ordinary Rust: the kernel runs it over its maps, the tests over theirs.
//!
//! ```text
//!  not enrolled ─► NotOurs          destination of oneself ─► SelfCall   (the agent's own ports: Deny)
//!  not TCP ──────► Uncaptured       service ─► choose an endpoint by weight, over all of them
//!  agent's socket ► Own             local endpoint + Allow ─► Direct     + Deny ─► Deny     everything else ─► Agent
//! ```

use crate::{
    is_agent_port,
    map::{
        ANY_OTHER_PORT, CONFIG_NO_DIRECT, Endpoint, EndpointKey, LocalPod, SERVICE_AGENT, Service, ServiceKey,
        VERDICT_ALLOW, VERDICT_DENY, VerdictEntry, VerdictKey,
    },
    reason::Reason,
    wire::{Ip, Target},
};

/// What one `connect()` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The destination as the application gave it.
    pub to: Target,
    /// What kind of socket.
    pub transport: Transport,
    /// The agent itself has made this socket.
    pub own: bool,
}

/// Kind of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP, MPTCP included.
    Tcp,
    /// Another protocol with a byte stream.
    OtherStream,
    /// Datagrams and the rest.
    Other,
}

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Number of the pod.
    pub pod: u32,
    /// Cookie of its namespace.
    pub netns: u64,
    /// Flags of [`crate::map::Config`].
    pub config: u32,
}

/// The maps, and chance.
pub trait World {
    /// `SERVICES`.
    fn service(&self, key: &ServiceKey) -> Option<&Service>;
    /// `ENDPOINTS`.
    fn endpoint(&self, key: &EndpointKey) -> Option<&Endpoint>;
    /// `LOCAL`.
    fn local(&self, ip: &Ip) -> Option<&LocalPod>;
    /// `VERDICTS`.
    fn verdict(&self, key: &VerdictKey) -> Option<&VerdictEntry>;
    /// A random number.
    fn chance(&self) -> u32;
}

/// What happens to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Left alone: the namespace is not enrolled.
    NotOurs,
    /// Left alone: not TCP.
    Uncaptured,
    /// A socket of the agent goes where it wants.
    Own,
    /// The pod calls itself, maybe through a service.
    SelfCall {
        /// Where to, when that is not what was dialled.
        translated: Option<Target>,
    },
    /// Straight to a pod of this node.
    Direct {
        /// Where to.
        to: Target,
        /// The pod there.
        local: LocalPod,
    },
    /// The agent carries it.
    Agent {
        /// The endpoint that the kernel chose for a service.
        choice: Option<Target>,
    },
    /// Refused.
    Deny(Reason),
}

/// Decides about one connection.
#[inline(always)]
pub fn decide<W: World>(call: &Call, caller: Option<&Caller>, world: &W) -> Verdict {
    let Some(caller) = caller else { return Verdict::NotOurs };
    match call.transport {
        Transport::Tcp => {}
        Transport::OtherStream => return Verdict::Deny(Reason::UnsupportedSocket),
        Transport::Other => return Verdict::Uncaptured,
    }
    if call.own {
        return Verdict::Own;
    }
    if call.to.ip.is_loopback() {
        return self_call(&call.to, None);
    }
    let Some(service) = world.service(&ServiceKey(call.to)) else {
        return towards(&call.to, None, caller, world);
    };
    if service.flags & SERVICE_AGENT != 0 {
        return Verdict::Agent { choice: None };
    }
    match choose(service, world) {
        // A socket cannot be led to the other family.
        Some(choice) if choice.ip.is_v4() == call.to.ip.is_v4() => towards(&choice, Some(choice), caller, world),
        choice => Verdict::Agent { choice },
    }
}

/// To an address that is one workload's.
#[inline(always)]
fn towards<W: World>(to: &Target, choice: Option<Target>, caller: &Caller, world: &W) -> Verdict {
    let Some(local) = world.local(&to.ip) else { return Verdict::Agent { choice } };
    let local = *local;
    if local.netns == caller.netns {
        return self_call(to, choice);
    }
    match verdict(caller.pod, local.pod, to, world) {
        VERDICT_DENY => Verdict::Deny(Reason::PolicyDenied),
        VERDICT_ALLOW if caller.config & CONFIG_NO_DIRECT == 0 && !is_agent_port(to.port.host()) => {
            Verdict::Direct { to: *to, local }
        }
        _ => Verdict::Agent { choice },
    }
}

#[inline(always)]
fn self_call(to: &Target, translated: Option<Target>) -> Verdict {
    if is_agent_port(to.port.host()) {
        return Verdict::Deny(Reason::IllegalPort);
    }
    Verdict::SelfCall { translated }
}

/// The verdict of exactly this port, else that of any other port, else none (zero).
#[inline(always)]
fn verdict<W: World>(src: u32, dst: u32, to: &Target, world: &W) -> u32 {
    if to.port == ANY_OTHER_PORT {
        return 0;
    }
    let mut key = VerdictKey::new(src, dst, to.port);
    if let Some(entry) = world.verdict(&key) {
        let entry = *entry;
        // Another key: the element was given away while it was read. The agent asks the policies itself.
        return if entry.key == key { entry.verdict } else { 0 };
    }
    key.port = ANY_OTHER_PORT;
    match world.verdict(&key) {
        Some(entry) if entry.key == key => entry.verdict,
        _ => 0,
    }
}

/// Halvings that find any of [`crate::map::MAX_ENDPOINTS_OF_ONE`] endpoints.
const SEARCH_STEPS: u32 = 17;

/// An endpoint by weight; `None` when the list is empty or being replaced.
#[inline(always)]
fn choose<W: World>(service: &Service, world: &W) -> Option<Target> {
    let (id, count, weight) = (service.id, service.count, service.weight);
    if count == 0 || weight == 0 {
        return None;
    }
    let ticket = world.chance() % weight;
    let (mut low, mut high) = (0, count - 1);
    for _ in 0..SEARCH_STEPS {
        if low >= high {
            break;
        }
        let middle = low + (high - low) / 2;
        if world.endpoint(&EndpointKey { service: id, index: middle })?.cumulative > ticket {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Some(world.endpoint(&EndpointKey { service: id, index: low })?.to)
}

#[cfg(test)]
mod tests;
