//! sock_ops: the record before the SYN, its check after the handshake, its removal at close.
//!
//! ```text
//!  connect ──► CONNECT_CB ──────────────► ACTIVE_ESTABLISHED ──► close
//!  (state on    checks, then record       marks the record       removes the record
//!   the socket)      │                          │
//!                    ▼                          ▼
//!               SYN ─► inbound (sk_lookup) ─► ACK ─► PASSIVE_ESTABLISHED on the other socket: met by the right one?
//! ```

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PARSE_HDR_OPT_CB,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE, BPF_TCP_FIN_WAIT1,
    },
    programs::SockOpsContext,
};
use mesh_ebpf_common::{
    event::{EVENT_CLOSED, EVENT_CUT, EVENT_OPENED, EVENT_REFUSED},
    map::{
        FLOW_COUNTED, FLOW_DIRECT, FLOW_ESTABLISHED, FLOW_OWN, FLOW_PEER_FIN, FLOW_PROBE, FLOW_REFUSED,
        FLOW_SELF, FLOW_TO_AGENT, FlowKey, FlowRecord, PodEntry, SocketState,
    },
    reason::Reason,
};

use crate::{
    ctx::{self, Ends},
    maps::{self, FLOWS, Figures, OWN_FLOWS},
};

/// One operation of any socket of the host.
#[inline(always)]
pub fn on(cx: &SockOpsContext) {
    match cx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(cx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => active(cx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => passive(cx),
        // The hook is called for other programs' sockets too; without a state of ours nothing happens.
        BPF_SOCK_OPS_STATE_CB => changed(cx),
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB if ctx::with_fin(cx) => peer_fin(cx),
        _ => {}
    }
}

/// The source port is known, the SYN not yet sent.
#[inline(always)]
fn connecting(cx: &SockOpsContext) {
    let netns = ctx::netns_of_ops(cx);
    let Some(pod) = maps::capturing(netns) else { return probing(cx, netns) };
    let ends = ctx::ends(cx);
    let socket = ctx::socket_of_ops(cx);
    if socket.is_null() {
        return maps::count(Reason::KernelFault);
    }
    if maps::is_ours(socket) {
        // Only what arrives in this namespace is looked up here.
        if maps::is_self(&ends.remote.ip, netns) {
            if let Some(state) = maps::state_or_new(socket) {
                state.record.kind = FLOW_OWN;
                state.record.key.netns = netns;
                record(cx, netns, &ends, state);
            }
        }
        return;
    }
    let Some(state) = maps::state_or_new(socket) else {
        maps::count(Reason::KernelFault);
        return lead_astray(cx);
    };
    match check(&state.record, netns, &ends) {
        // Asked at connect too; with Fast Open many sockets may have been decided about meanwhile.
        Ok(()) if maps::exhausted(pod.id) => block(cx, netns, pod, &ends, state, Reason::PodQuota),
        Ok(()) => record(cx, netns, &ends, state),
        Err(reason) => block(cx, netns, pod, &ends, state, reason),
    }
}

/// A probe of the kubelet that connect has let through: it needs a record of its own, or it arrives as plaintext.
#[inline(always)]
fn probing(cx: &SockOpsContext, netns: u64) {
    if netns != maps::kubelet().0 {
        return;
    }
    let socket = ctx::socket_of_ops(cx);
    if socket.is_null() {
        return;
    }
    let Some(state) = maps::state(socket) else { return };
    let ends = ctx::ends(cx);
    let as_decided = state.record.key.dst == ends.remote.ip && state.record.key.dport == ends.remote.port;
    if state.record.kind != FLOW_PROBE || !as_decided {
        return;
    }
    complete(cx, netns, &ends, &mut state.record);
    if !ctx::watch_state(cx) || FLOWS.insert(&state.record.key, &state.record, 0).is_err() {
        return maps::count(Reason::MapFull);
    }
    state.recorded = 1;
    maps::count(Reason::Recorded);
}

/// Is the decision about this very connection, and still good?
#[inline(always)]
fn check(decided: &FlowRecord, netns: u64, ends: &Ends) -> Result<(), Reason> {
    let source_is_self = maps::is_self(&ends.local.ip, netns);
    let as_decided = decided.key.dst == ends.remote.ip && decided.key.dport == ends.remote.port;
    match decided.kind {
        // The unspecified address becomes a loopback one on the way.
        FLOW_SELF if decided.key.dport != ends.remote.port || !maps::is_self(&ends.remote.ip, netns) => {
            Err(Reason::DestinationChanged)
        }
        FLOW_SELF if !source_is_self => Err(Reason::IllegalSource),
        FLOW_SELF => Ok(()),
        FLOW_TO_AGENT | FLOW_DIRECT if !as_decided => Err(Reason::DestinationChanged),
        FLOW_TO_AGENT | FLOW_DIRECT if !maps::is_own_address(&ends.local.ip, netns) => {
            Err(Reason::IllegalSource)
        }
        FLOW_DIRECT if decided.generation != maps::config().0 => Err(Reason::StaleGeneration),
        FLOW_TO_AGENT | FLOW_DIRECT => Ok(()),
        _ => Err(Reason::Undecided),
    }
}

/// Writes the record.
#[inline(always)]
fn record(cx: &SockOpsContext, netns: u64, ends: &Ends, state: &mut SocketState) {
    complete(cx, netns, ends, &mut state.record);
    let map = if state.record.kind == FLOW_OWN { &OWN_FLOWS } else { &FLOWS };
    if !ctx::watch_state(cx) || map.insert(&state.record.key, &state.record, 0).is_err() {
        // Without a record a SYN to another address is dropped where it arrives, but a direct one would arrive as
        // anonymous plaintext: it must not leave.
        lead_astray(cx);
        maps::count(Reason::MapFull);
        refused!(cx, Reason::MapFull, &state.record.key);
        return maps::emit(EVENT_REFUSED, Reason::MapFull, &state.record, Figures::default());
    }
    state.recorded = 1;
    if state.record.kind != FLOW_OWN && maps::use_up(state.record.src_pod, 1) {
        state.record.flags |= FLOW_COUNTED;
    }
    maps::count(Reason::Recorded);
}

#[inline(always)]
fn complete(cx: &SockOpsContext, netns: u64, ends: &Ends, record: &mut FlowRecord) {
    record.key.src = ends.local.ip;
    record.key.sport = ends.local.port;
    record.key.dst = ends.remote.ip;
    record.key.dport = ends.remote.port;
    record.client_netns = netns;
    record.opened_ns = ctx::now_ns();
    record.socket = ctx::cookie_of_ops(cx);
}

/// The SYN must not leave the pod.
#[inline(always)]
fn lead_astray(cx: &SockOpsContext) {
    ctx::divert(cx);
    ctx::give_up_early(cx);
}

/// A connect cannot be refused any more: its SYN goes to the pod's own loopback and finds a record that refuses it.
#[inline(always)]
fn block(
    cx: &SockOpsContext,
    netns: u64,
    pod: &PodEntry,
    ends: &Ends,
    state: &mut SocketState,
    reason: Reason,
) {
    lead_astray(cx);
    state.record.kind = FLOW_REFUSED;
    state.record.flags = 0;
    state.record.src_pod = pod.id;
    state.record.key.netns = netns;
    complete(cx, netns, ends, &mut state.record);
    // Where there is no room, there is no record either, and that refuses as well. A pod without room of its own gets
    // none.
    if !matches!(reason, Reason::PodQuota)
        && ctx::watch_state(cx)
        && FLOWS.insert(&state.record.key, &state.record, 0).is_ok()
    {
        state.recorded = 1;
        if maps::use_up(pod.id, 1) {
            state.record.flags |= FLOW_COUNTED;
        }
    }
    maps::count(reason);
    refused!(cx, reason, &state.record.key);
    maps::emit(EVENT_REFUSED, reason, &state.record, Figures::default());
}

/// The client has the SYN-ACK: from now on the server's side may be believed.
#[inline(always)]
fn active(cx: &SockOpsContext) {
    let socket = ctx::socket_of_ops(cx);
    if socket.is_null() {
        return;
    }
    let Some(state) = maps::state(socket) else { return };
    if state.recorded == 0 || !matches!(state.record.kind, FLOW_DIRECT | FLOW_PROBE) {
        return;
    }
    state.record.flags |= FLOW_ESTABLISHED;
    if let Some(record) = FLOWS.get_ptr_mut(&state.record.key) {
        // SAFETY: this socket's own record, which only its own close removes.
        unsafe {
            if (*record).socket == state.record.socket {
                (*record).flags |= FLOW_ESTABLISHED;
            }
        }
    }
}

/// An accepted connection: the last look before the application gets it.
#[inline(always)]
fn passive(cx: &SockOpsContext) {
    let netns = ctx::netns_of_ops(cx);
    if maps::capturing(netns).is_none() {
        return;
    }
    let socket = ctx::socket_of_ops(cx);
    if !socket.is_null() && maps::is_ours(socket) {
        return maps::count(Reason::OpenedAgent);
    }
    let ends = ctx::ends(cx);
    let key = FlowKey {
        netns,
        src: ends.remote.ip,
        dst: ends.local.ip,
        sport: ends.remote.port,
        dport: ends.local.port,
        pad: 0,
    };
    if let Some(record) = OWN_FLOWS.get_ptr_mut(&key) {
        // SAFETY: one field of an element that lives as long as the agent's socket; nobody else writes it.
        let taken = unsafe { core::ptr::replace(&raw mut (*record).server_socket, ctx::cookie_of_ops(cx)) };
        // One connection, one handshake: a second with the same addresses is not the agent's.
        if taken == 0 {
            return maps::count(Reason::Opened);
        }
        return cut(cx, &key, netns, Reason::OpenedForged);
    }
    // SAFETY: the record repeats its key, which is compared below; the agent only reads.
    let reason = match FLOWS.get_ptr_mut(&key).map(|record| unsafe { &mut *record }) {
        Some(record) if record.key != key => Reason::OpenedUnrecorded,
        Some(record) if record.kind == FLOW_SELF => return maps::count(Reason::Opened),
        Some(record) if !matches!(record.kind, FLOW_DIRECT | FLOW_PROBE) => Reason::OpenedUnrecorded,
        Some(record) if record.kind == FLOW_DIRECT && record.generation != maps::config().0 => {
            Reason::OpenedStale
        }
        // One connection, one handshake: the client may hold its half long after the server has closed.
        Some(record) if record.server_socket != 0 => Reason::OpenedForged,
        // Whoever completes the handshake before the recorded socket has the SYN-ACK is somebody else. With TCP Fast
        // Open the accepted socket comes first; there the client's address is proven by its cookie.
        Some(record) if record.flags & FLOW_ESTABLISHED == 0 && !ctx::by_syn(cx) => Reason::OpenedForged,
        Some(record) => {
            record.server_socket = ctx::cookie_of_ops(cx);
            maps::count(Reason::Opened);
            if record.kind == FLOW_PROBE {
                return;
            }
            return maps::emit(EVENT_OPENED, Reason::Opened, record, Figures::default());
        }
        None => Reason::OpenedUnrecorded,
    };
    cut(cx, &key, netns, reason);
}

/// Ends an accepted connection that must not be: what it sends does not leave the pod any more, even without the agent;
/// the agent ends it at once.
#[inline(always)]
fn cut(cx: &SockOpsContext, key: &FlowKey, netns: u64, reason: Reason) {
    ctx::divert(cx);
    maps::count(reason);
    refused!(cx, reason, key);
    let record = FlowRecord {
        key: *key,
        socket: ctx::cookie_of_ops(cx),
        client_netns: netns,
        ..FlowRecord::default()
    };
    maps::emit(EVENT_CUT, reason, &record, Figures::default());
}

/// A socket of ours, or of another program, is in another state now.
#[inline(always)]
fn changed(cx: &SockOpsContext) {
    match ctx::states(cx) {
        (former, BPF_TCP_CLOSE) => closed(cx, former),
        // The peer's FIN counts as a byte, and from here on no state tells whether it came.
        (_, BPF_TCP_FIN_WAIT1) => {
            let socket = ctx::socket_of_ops(cx);
            if socket.is_null() {
                return;
            }
            if maps::state(socket).is_some_and(|state| state.record.kind == FLOW_DIRECT) {
                ctx::watch_packets(cx);
            }
        }
        _ => {}
    }
}

/// The peer's FIN came after our own.
#[inline(always)]
fn peer_fin(cx: &SockOpsContext) {
    let socket = ctx::socket_of_ops(cx);
    if socket.is_null() {
        return;
    }
    if let Some(state) = maps::state(socket) {
        state.record.flags |= FLOW_PEER_FIN;
    }
}

/// The record ends with its socket. No look at `PODS`: the pod may have left meanwhile.
#[inline(always)]
fn closed(cx: &SockOpsContext, former: u32) {
    let socket = ctx::socket_of_ops(cx);
    if socket.is_null() {
        return;
    }
    let Some(state) = maps::state(socket) else { return };
    if state.recorded == 0 {
        return;
    }
    state.recorded = 0;
    let kind = state.record.kind;
    let map = if kind == FLOW_OWN { &OWN_FLOWS } else { &FLOWS };
    // SAFETY: only its socket is compared, and a cookie is never given twice.
    if unsafe { map.get(&state.record.key) }.is_some_and(|record| record.socket == state.record.socket) {
        let _ = map.remove(&state.record.key);
    }
    maps::count(Reason::Closed);
    if state.record.flags & FLOW_COUNTED != 0 {
        maps::use_up(state.record.src_pod, -1);
    }
    if kind == FLOW_DIRECT {
        let figures = ctx::figures(cx, former, state.record.flags & FLOW_PEER_FIN != 0);
        maps::emit(EVENT_CLOSED, Reason::Closed, &state.record, figures);
    }
    state.record.kind = 0;
}
