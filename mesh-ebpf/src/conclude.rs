//! The only place that turns a verdict into a return code; it counts every one and remembers what the later hooks
//! need on the socket itself.

use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_common::{
    event::EVENT_REFUSED,
    map::{FLOW_DIRECT, FLOW_OTHER, FLOW_SELF, FLOW_TO_AGENT, FlowKey, FlowRecord},
    reason::Reason,
    verdict::Verdict,
    wire::Target,
};

use crate::{
    ctx::{self, Family},
    maps::{self, Figures},
};

/// One connect, as it was asked for.
pub struct Asked {
    pub to: Target,
    pub netns: u64,
    pub pod: u32,
    pub generation: u64,
}

const PROCEED: i32 = 1;
/// connect(2) fails with EPERM.
const REFUSE: i32 = 0;

/// A decision that goes on.
struct Onward {
    kind: u32,
    reason: Reason,
    /// Where the SYN will go.
    to: Target,
    /// See `FlowRecord::other`.
    other: Option<Target>,
    /// Namespace in which the SYN arrives.
    arrives_in: u64,
    dst_pod: u32,
}

/// Does what the verdict says.
#[inline(always)]
pub fn conclude(cx: &SockAddrContext, family: Family, asked: &Asked, verdict: &Verdict) -> i32 {
    let onward = match *verdict {
        Verdict::NotOurs => return pass(Reason::NotOurs),
        Verdict::Uncaptured => return pass(Reason::Uncaptured),
        Verdict::Own => {
            maps::forget(ctx::socket_of_address(cx));
            return pass(Reason::Own);
        }
        Verdict::Deny(reason) => return refuse(cx, asked, reason),
        Verdict::SelfCall { translated } => Onward {
            kind: FLOW_SELF,
            reason: Reason::SelfCall,
            to: translated.unwrap_or(asked.to),
            other: translated.map(|_| asked.to),
            arrives_in: asked.netns,
            dst_pod: asked.pod,
        },
        Verdict::Direct { to, local } => Onward {
            kind: FLOW_DIRECT,
            reason: Reason::Direct,
            to,
            other: if to == asked.to { None } else { Some(asked.to) },
            arrives_in: local.netns,
            dst_pod: local.pod,
        },
        Verdict::Agent { choice } => Onward {
            kind: FLOW_TO_AGENT,
            reason: Reason::ToAgent,
            to: asked.to,
            other: choice,
            arrives_in: asked.netns,
            dst_pod: 0,
        },
    };
    proceed(cx, family, asked, &onward)
}

#[inline(always)]
fn pass(reason: Reason) -> i32 {
    maps::count(reason);
    PROCEED
}

#[inline(always)]
fn proceed(cx: &SockAddrContext, family: Family, asked: &Asked, onward: &Onward) -> i32 {
    let marked = if onward.kind == FLOW_TO_AGENT { ctx::capture(cx) } else { ctx::uncapture(cx) };
    let state = maps::state_or_new(ctx::socket_of_address(cx));
    let (true, Some(state)) = (marked, state) else {
        return refuse(cx, asked, Reason::KernelFault);
    };
    state.recorded = 0;
    fill(&mut state.record, asked, onward);
    if onward.to != asked.to {
        ctx::set_address(cx, family, &onward.to);
    }
    maps::count(onward.reason);
    PROCEED
}

#[inline(always)]
fn fill(record: &mut FlowRecord, asked: &Asked, onward: &Onward) {
    record.key = FlowKey {
        netns: onward.arrives_in,
        dst: onward.to.ip,
        dport: onward.to.port,
        ..FlowKey::default()
    };
    record.generation = asked.generation;
    record.socket = 0;
    record.server_socket = 0;
    record.client_netns = asked.netns;
    record.kind = onward.kind;
    record.src_pod = asked.pod;
    record.dst_pod = onward.dst_pod;
    record.flags = if onward.other.is_some() { FLOW_OTHER } else { 0 };
    record.other = onward.other.unwrap_or_default();
}

/// Leaves nothing of a former decision on the socket and tells the agent.
#[inline(always)]
fn refuse(cx: &SockAddrContext, asked: &Asked, reason: Reason) -> i32 {
    maps::forget(ctx::socket_of_address(cx));
    // A mark that stays leads a later connection to oneself only.
    let _ = ctx::uncapture(cx);
    let mut record = FlowRecord { client_netns: asked.netns, src_pod: asked.pod, ..FlowRecord::default() };
    record.key.netns = asked.netns;
    record.key.dst = asked.to.ip;
    record.key.dport = asked.to.port;
    maps::count(reason);
    maps::emit(EVENT_REFUSED, reason, &record, Figures::default());
    REFUSE
}
