//! The decision about one `connect()`, as ordinary Rust: the kernel runs it over its maps, the tests over theirs.
//!
//! ```text
//!  the kubelet to a declared port ─► Probe     a pod with too many connections ─► Deny
//!  not enrolled, not TCP, agent's socket ─► Alone       destination of oneself ─► SelfCall (agent's ports: Deny)
//!  service ─► choose an endpoint by weight, over all of them
//!  local endpoint + Allow ─► Direct      + Deny ─► Deny      everything else ─► Agent
//! ```

use crate::{
    is_agent_port,
    map::{
        ANY_OTHER_PORT, CONFIG_NO_DIRECT, Endpoint, EndpointKey, LocalPod, ProbeKey, SERVICE_AGENT, Service,
        ServiceKey, VERDICT_ALLOW, VERDICT_DENY, VerdictEntry, VerdictKey,
    },
    reason::Reason,
    wire::{Ip, PortBe, Target},
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// The namespace is enrolled and captured; nothing else but `kubelet` counts otherwise.
    pub enrolled: bool,
    /// It is the kubelet: its cgroup, in the node's own namespace.
    pub kubelet: bool,
    /// The pod has as many live connections as one pod may have.
    pub exhausted: bool,
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
    /// `PROBES`.
    fn probed(&self, key: &ProbeKey) -> bool;
    /// A random number.
    fn chance(&self) -> u32;
}

/// What happens to the connection.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Left alone: the namespace is not enrolled, it is not TCP, or it is the agent's own socket; the reason tells.
    Alone,
    /// The kubelet's, straight to the application of a pod of this node.
    Probe,
    /// The pod calls itself, maybe through a service.
    SelfCall,
    /// Straight to a pod of this node.
    Direct,
    /// The agent carries it.
    Agent,
    /// Refused.
    Deny,
}

/// A decision. Flat instead of an enum with payloads: the payload of the cases that do not apply is undefined, the
/// compiler moves such values around, and the verifier refuses to see them moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What happens.
    pub way: Way,
    /// What is counted.
    pub reason: Reason,
    /// Where the connection goes: what was dialled, unless it is translated.
    pub to: Target,
    /// The endpoint that was chosen for a service; all zero when none was.
    pub choice: Target,
    /// The pod there, of direct calls and calls to oneself.
    pub local: LocalPod,
}

impl Verdict {
    #[inline(always)]
    fn new(way: Way, reason: Reason, to: Target, choice: Target) -> Self {
        Self { way, reason, to, choice, local: LocalPod { netns: 0, pod: 0, pad: 0 } }
    }

    /// The destination is not what was dialled.
    #[inline(always)]
    pub fn translated(&self) -> bool {
        matches!(self.way, Way::SelfCall | Way::Direct) && self.choice.port.host() != 0
    }
}

/// No endpoint was chosen. Port zero is no destination of TCP.
const NO_CHOICE: Target = Target::new(Ip::from_v6_be([0; 4]), PortBe::from_host(0));

/// Decides about one connection.
#[inline(always)]
pub fn decide<W: World>(call: &Call, caller: &Caller, world: &W) -> Verdict {
    let alone = |reason| Verdict::new(Way::Alone, reason, call.to, NO_CHOICE);
    if !caller.enrolled {
        return probe(call, caller, world);
    }
    match call.transport {
        Transport::Tcp => {}
        Transport::OtherStream => {
            return Verdict::new(Way::Deny, Reason::UnsupportedSocket, call.to, NO_CHOICE);
        }
        Transport::Other => return alone(Reason::Uncaptured),
    }
    if call.own {
        return alone(Reason::Own);
    }
    if caller.exhausted {
        return Verdict::new(Way::Deny, Reason::PodQuota, call.to, NO_CHOICE);
    }
    if call.to.ip.is_loopback() {
        return self_call(&call.to, &NO_CHOICE, caller);
    }
    let Some(service) = world.service(&ServiceKey(call.to)) else {
        return towards(&call.to, &call.to, &NO_CHOICE, caller, world);
    };
    if service.flags & SERVICE_AGENT != 0 {
        return Verdict::new(Way::Agent, Reason::ToAgent, call.to, NO_CHOICE);
    }
    let mut choice = NO_CHOICE;
    let chosen = choose(service, world, &mut choice);
    // A socket cannot be led to the other family.
    if !chosen || choice.ip.is_v4() != call.to.ip.is_v4() {
        return Verdict::new(Way::Agent, Reason::ToAgent, call.to, choice);
    }
    towards(&choice, &call.to, &choice, caller, world)
}

/// From a namespace that is not enrolled: left alone, unless it is a probe.
#[inline(always)]
fn probe<W: World>(call: &Call, caller: &Caller, world: &W) -> Verdict {
    let alone = Verdict::new(Way::Alone, Reason::NotOurs, call.to, NO_CHOICE);
    if !caller.kubelet || !matches!(call.transport, Transport::Tcp) || is_agent_port(call.to.port.host()) {
        return alone;
    }
    let Some(local) = world.local(&call.to.ip) else { return alone };
    let local = *local;
    if !world.probed(&ProbeKey { pod: local.pod, port: call.to.port, pad: 0 }) {
        return alone;
    }
    Verdict { local, ..Verdict::new(Way::Probe, Reason::Probe, call.to, NO_CHOICE) }
}

/// To an address that is one workload's.
#[inline(always)]
fn towards<W: World>(to: &Target, dialled: &Target, choice: &Target, caller: &Caller, world: &W) -> Verdict {
    let agent = Verdict::new(Way::Agent, Reason::ToAgent, *dialled, *choice);
    let Some(local) = world.local(&to.ip) else { return agent };
    let local = *local;
    if local.netns == caller.netns {
        return self_call(to, choice, caller);
    }
    match verdict(caller.pod, local.pod, to, world) {
        VERDICT_DENY => Verdict { local, ..Verdict::new(Way::Deny, Reason::PolicyDenied, *to, *choice) },
        VERDICT_ALLOW if caller.config & CONFIG_NO_DIRECT == 0 && !is_agent_port(to.port.host()) => {
            Verdict { local, ..Verdict::new(Way::Direct, Reason::Direct, *to, *choice) }
        }
        _ => agent,
    }
}

#[inline(always)]
fn self_call(to: &Target, choice: &Target, caller: &Caller) -> Verdict {
    let local = LocalPod { netns: caller.netns, pod: caller.pod, pad: 0 };
    if is_agent_port(to.port.host()) {
        return Verdict { local, ..Verdict::new(Way::Deny, Reason::IllegalPort, *to, *choice) };
    }
    Verdict { local, ..Verdict::new(Way::SelfCall, Reason::SelfCall, *to, *choice) }
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

/// An endpoint by weight; false when the list is empty or being replaced.
#[inline(always)]
fn choose<W: World>(service: &Service, world: &W, choice: &mut Target) -> bool {
    let (id, count, weight) = (service.id, service.count, service.weight);
    if count == 0 || weight == 0 {
        return false;
    }
    let ticket = world.chance() % weight;
    let (mut low, mut high) = (0, count - 1);
    for _ in 0..SEARCH_STEPS {
        if low >= high {
            break;
        }
        let middle = low + (high - low) / 2;
        match world.endpoint(&EndpointKey { service: id, index: middle }) {
            Some(endpoint) if endpoint.cumulative > ticket => high = middle,
            Some(_) => low = middle + 1,
            None => return false,
        }
    }
    match world.endpoint(&EndpointKey { service: id, index: low }) {
        Some(endpoint) => {
            *choice = endpoint.to;
            true
        }
        None => false,
    }
}

#[cfg(test)]
mod tests;
