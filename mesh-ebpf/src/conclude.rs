//! The only place that turns a verdict into a return code; it counts every one and remembers what the later hooks
//! need on the socket itself.

use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_common::{
    event::EVENT_REFUSED,
    map::{FLOW_DIRECT, FLOW_OTHER, FLOW_PROBE, FLOW_SELF, FLOW_TO_AGENT, FlowRecord, SLOT_OUTBOUND},
    reason::Reason,
    verdict::{Verdict, Way},
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
    /// First slot of its listeners.
    pub slot: u32,
    pub generation: u64,
}

const PROCEED: i32 = 1;
/// connect(2) fails with EPERM.
const REFUSE: i32 = 0;

/// Does what the verdict says.
#[inline(always)]
pub fn conclude(cx: &SockAddrContext, family: Family, asked: &Asked, verdict: &Verdict) -> i32 {
    match verdict.way {
        Way::Alone => {
            if matches!(verdict.reason, Reason::Own) {
                maps::forget(ctx::socket_of_address(cx));
            }
            maps::count(verdict.reason);
            PROCEED
        }
        Way::Probe => probe(cx, asked, verdict),
        Way::Deny => refuse(cx, asked, verdict, verdict.reason),
        Way::SelfCall => proceed(cx, family, asked, verdict, FLOW_SELF),
        Way::Direct => proceed(cx, family, asked, verdict, FLOW_DIRECT),
        Way::Agent => proceed(cx, family, asked, verdict, FLOW_TO_AGENT),
    }
}

/// Without room for it, a probe is plaintext like anything else from the host.
#[inline(always)]
fn probe(cx: &SockAddrContext, asked: &Asked, verdict: &Verdict) -> i32 {
    if let Some(state) = maps::state_or_new(ctx::socket_of_address(cx)) {
        state.recorded = 0;
        fill(&mut state.record, asked, verdict, FLOW_PROBE);
        maps::count(verdict.reason);
    }
    PROCEED
}

#[inline(always)]
fn proceed(cx: &SockAddrContext, family: Family, asked: &Asked, verdict: &Verdict, kind: u32) -> i32 {
    let listener = asked.slot + SLOT_OUTBOUND + u32::from(!asked.to.ip.is_v4());
    if kind == FLOW_TO_AGENT && !maps::listening(listener) {
        // Its SYN would be dropped without an answer, which takes an application two minutes to see.
        return refuse(cx, asked, verdict, Reason::AgentAbsent);
    }
    let marked = if kind == FLOW_TO_AGENT { ctx::capture(cx) } else { ctx::uncapture(cx) };
    if !marked {
        return refuse(cx, asked, verdict, Reason::KernelFault);
    }
    let Some(state) = maps::state_or_new(ctx::socket_of_address(cx)) else {
        return refuse(cx, asked, verdict, Reason::KernelFault);
    };
    state.recorded = 0;
    fill(&mut state.record, asked, verdict, kind);
    if verdict.translated() {
        ctx::set_address(cx, family, &verdict.to);
    }
    maps::count(verdict.reason);
    PROCEED
}

#[inline(always)]
fn fill(record: &mut FlowRecord, asked: &Asked, verdict: &Verdict, kind: u32) {
    let other = if verdict.translated() { asked.to } else { verdict.choice };
    record.key.netns = if kind == FLOW_TO_AGENT { asked.netns } else { verdict.local.netns };
    record.key.dst = verdict.to.ip;
    record.key.dport = verdict.to.port;
    record.generation = asked.generation;
    record.socket = 0;
    record.server_socket = 0;
    record.client_netns = asked.netns;
    record.kind = kind;
    record.src_pod = asked.pod;
    record.dst_pod = verdict.local.pod;
    record.flags = if other.port.host() != 0 { FLOW_OTHER } else { 0 };
    record.other = other;
}

/// Leaves nothing of a former decision on the socket and tells the agent.
#[inline(always)]
fn refuse(cx: &SockAddrContext, asked: &Asked, verdict: &Verdict, reason: Reason) -> i32 {
    maps::forget(ctx::socket_of_address(cx));
    // A mark that stays leads a later connection to oneself only.
    let _ = ctx::uncapture(cx);
    let mut record = FlowRecord { client_netns: asked.netns, src_pod: asked.pod, ..FlowRecord::default() };
    record.dst_pod = verdict.local.pod;
    record.key.netns = asked.netns;
    record.key.dst = verdict.to.ip;
    record.key.dport = verdict.to.port;
    if verdict.choice.port.host() != 0 {
        record.flags = FLOW_OTHER;
        record.other = asked.to;
    }
    maps::count(reason);
    refused!(cx, reason, &record.key);
    maps::emit(EVENT_REFUSED, reason, &record, Figures::default());
    REFUSE
}
