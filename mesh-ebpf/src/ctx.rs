//! The only raw reads and writes of contexts.
//!
//! Every field is read by `read_volatile` before anything is chosen: a choice between two fields before the load
//! becomes a computed context pointer, which the verifier refuses.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE_WAIT,
        BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK,
    },
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns,
        bpf_setsockopt,
    },
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};
use mesh_ebpf_common::{
    CAPTURE_MARK,
    verdict::Transport,
    wire::{Ip, PortBe, Target},
};

use crate::maps::{Figures, Sock};

/// Which of the two hooks of a pair runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

const AF_INET: u32 = 2;
const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const TCP_SYNCNT: i32 = 7;

macro_rules! read {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the kernel hands a valid context to the program; the verifier checks each offset.
        unsafe { (&raw const (*$context).$($field)+).read_volatile() }
    };
}

macro_rules! put {
    ($value:expr, $context:expr, $($field:tt)+) => {
        // SAFETY: as for reads; the verifier knows which fields may be written.
        unsafe { (&raw mut (*$context).$($field)+).write_volatile($value) }
    };
}

macro_rules! words {
    ($context:expr, $field:ident) => {
        Ip::from_v6_be([
            read!($context, $field[0]),
            read!($context, $field[1]),
            read!($context, $field[2]),
            read!($context, $field[3]),
        ])
    };
}

/// Cookie of the namespace of the socket that connects or is asked for its peer.
#[inline(always)]
pub fn netns_of_address(cx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the hook's own.
    unsafe { bpf_get_netns_cookie(cx.as_ptr()) }
}

/// The socket.
#[inline(always)]
pub fn socket_of_address(cx: &SockAddrContext) -> Sock {
    read!(cx.sock_addr, __bindgen_anon_1.sk)
}

/// Number of the cgroup of the process that runs.
#[inline(always)]
pub fn cgroup() -> u64 {
    // SAFETY: no preconditions.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// What kind of socket it is.
#[inline(always)]
pub fn transport(cx: &SockAddrContext) -> Transport {
    let (kind, protocol) = (read!(cx.sock_addr, type_), read!(cx.sock_addr, protocol));
    match kind {
        SOCK_STREAM if protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP => Transport::Tcp,
        SOCK_STREAM => Transport::OtherStream,
        _ => Transport::Other,
    }
}

/// The address in the context: a destination, or a peer.
#[inline(always)]
pub fn address(cx: &SockAddrContext, family: Family) -> Target {
    let port = PortBe::from_be(read!(cx.sock_addr, user_port) as u16);
    let ip = match family {
        Family::V4 => Ip::from_v4_be(read!(cx.sock_addr, user_ip4)),
        Family::V6 => words!(cx.sock_addr, user_ip6),
    };
    Target::new(ip, port)
}

/// Replaces the address in the context by one of the same family.
#[inline(always)]
pub fn set_address(cx: &SockAddrContext, family: Family, to: &Target) {
    let [a, b, c, d] = to.ip.words_be();
    match family {
        Family::V4 => put!(d, cx.sock_addr, user_ip4),
        Family::V6 => {
            put!(a, cx.sock_addr, user_ip6[0]);
            put!(b, cx.sock_addr, user_ip6[1]);
            put!(c, cx.sock_addr, user_ip6[2]);
            put!(d, cx.sock_addr, user_ip6[3]);
        }
    }
    put!(u32::from(to.port.be()), cx.sock_addr, user_port);
}

/// Sets the capture mark; false when the kernel refuses.
#[inline(always)]
pub fn capture(cx: &SockAddrContext) -> bool {
    let mut mark = CAPTURE_MARK;
    // SAFETY: the context is the hook's own, the value four bytes.
    unsafe { bpf_setsockopt(cx.as_ptr(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) == 0 }
}

/// Takes the capture mark off, whoever set it: a former connect of this socket or the application. False when the
/// kernel refuses.
#[inline(always)]
pub fn uncapture(cx: &SockAddrContext) -> bool {
    let socket = socket_of_address(cx);
    if read!(socket, mark) != CAPTURE_MARK {
        return true;
    }
    let mut mark = 0_u32;
    // SAFETY: as in `capture`.
    unsafe { bpf_setsockopt(cx.as_ptr(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) == 0 }
}

/// One end and the other, as a socket has them.
pub struct Ends {
    pub local: Target,
    pub remote: Target,
}

/// Cookie of the namespace of the socket of this operation.
#[inline(always)]
pub fn netns_of_ops(cx: &SockOpsContext) -> u64 {
    // SAFETY: the context is the hook's own.
    unsafe { bpf_get_netns_cookie(cx.as_ptr()) }
}

/// Cookie of the socket of this operation.
#[inline(always)]
pub fn cookie_of_ops(cx: &SockOpsContext) -> u64 {
    // SAFETY: the context is the hook's own.
    unsafe { bpf_get_socket_cookie(cx.as_ptr()) }
}

/// The socket of this operation; null when it is no full one.
#[inline(always)]
pub fn socket_of_ops(cx: &SockOpsContext) -> Sock {
    read!(cx.ops, __bindgen_anon_2.sk)
}

/// Both ends of the socket of this operation.
#[inline(always)]
pub fn ends(cx: &SockOpsContext) -> Ends {
    let (local4, remote4) = (read!(cx.ops, local_ip4), read!(cx.ops, remote_ip4));
    let (local6, remote6) = (words!(cx.ops, local_ip6), words!(cx.ops, remote_ip6));
    let (local_port, remote_port) = (read!(cx.ops, local_port), read!(cx.ops, remote_port));
    let v4 = read!(cx.ops, family) == AF_INET;
    let (local, remote) =
        if v4 { (Ip::from_v4_be(local4), Ip::from_v4_be(remote4)) } else { (local6, remote6) };
    Ends {
        local: Target::new(local, PortBe::from_host(local_port as u16)),
        // In network order in the upper half.
        remote: Target::new(remote, PortBe::from_host(u32::from_be(remote_port) as u16)),
    }
}

/// Sends what this socket sends from now on to the pod's own loopback, where it meets no connection. False when the
/// kernel refuses.
#[inline(always)]
pub fn divert(cx: &SockOpsContext) -> bool {
    let mut mark = CAPTURE_MARK;
    // SAFETY: the context is the hook's own, the value four bytes.
    unsafe { bpf_setsockopt(cx.as_ptr(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) == 0 }
}

/// Lets a connect that cannot succeed fail after two SYNs: over IPv4 the kernel answers nothing in the name of a
/// foreign address, so that there is no reset. The agent, when it lives, ends the socket at once.
#[inline(always)]
pub fn give_up_early(cx: &SockOpsContext) {
    let mut count = 1_u32;
    // SAFETY: as above.
    unsafe { bpf_setsockopt(cx.as_ptr(), IPPROTO_TCP as i32, TCP_SYNCNT, (&raw mut count).cast(), 4) };
}

/// Asks to be called at this socket's changes of state, besides what others asked.
#[inline(always)]
pub fn watch_state(cx: &SockOpsContext) -> bool {
    let flags = read!(cx.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    cx.set_cb_flags(flags as i32).is_ok()
}

/// The former state and the new one, at a change of state.
#[inline(always)]
pub fn states(cx: &SockOpsContext) -> (u32, u32) {
    (read!(cx.ops, __bindgen_anon_1.args[0]), read!(cx.ops, __bindgen_anon_1.args[1]))
}

/// Asks to be called at packets of this socket that are not on the fast path, besides what others asked.
#[inline(always)]
pub fn watch_packets(cx: &SockOpsContext) {
    let flags = read!(cx.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG;
    let _ = cx.set_cb_flags(flags as i32);
}

/// True when the packet of this operation carries a FIN.
#[inline(always)]
pub fn with_fin(cx: &SockOpsContext) -> bool {
    const FIN: u32 = 1;
    read!(cx.ops, skb_tcp_flags) & FIN != 0
}

/// True when the packet of this operation carries a SYN: TCP Fast Open.
#[inline(always)]
pub fn by_syn(cx: &SockOpsContext) -> bool {
    const SYN: u32 = 2;
    read!(cx.ops, skb_tcp_flags) & SYN != 0
}

/// What the socket of a client has carried when it closes in `state`. The kernel counts a SYN and a FIN as a byte each:
/// `peer_fin` tells that the peer's FIN came after our own.
#[inline(always)]
pub fn figures(cx: &SockOpsContext, state: u32, peer_fin: bool) -> Figures {
    let (acked, received) = (read!(cx.ops, bytes_acked), read!(cx.ops, bytes_received));
    let (unacked, next) = (read!(cx.ops, snd_una), read!(cx.ops, snd_nxt));
    let our_fin = match state {
        BPF_TCP_FIN_WAIT2 => true,
        BPF_TCP_CLOSING | BPF_TCP_LAST_ACK => unacked == next,
        _ => false,
    };
    let peer_fin = peer_fin || matches!(state, BPF_TCP_CLOSE_WAIT | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING);
    Figures {
        sent_bytes: acked.saturating_sub(1 + u64::from(our_fin)),
        received_bytes: received.saturating_sub(u64::from(peer_fin)),
        // The kernel keeps eight times the value.
        rtt_us: read!(cx.ops, srtt_us) >> 3,
        retransmits: read!(cx.ops, total_retrans),
    }
}

/// The ends of an arriving packet, and whether it is IPv6; `None` when it is not TCP.
#[inline(always)]
pub fn arrival(cx: &SkLookupContext) -> Option<(Ends, bool)> {
    let (local4, remote4) = (read!(cx.lookup, local_ip4), read!(cx.lookup, remote_ip4));
    let (local6, remote6) = (words!(cx.lookup, local_ip6), words!(cx.lookup, remote_ip6));
    let (local_port, remote_port) = (read!(cx.lookup, local_port), read!(cx.lookup, remote_port));
    if read!(cx.lookup, protocol) != IPPROTO_TCP {
        return None;
    }
    let v4 = read!(cx.lookup, family) == AF_INET;
    let (local, remote) =
        if v4 { (Ip::from_v4_be(local4), Ip::from_v4_be(remote4)) } else { (local6, remote6) };
    let ends = Ends {
        local: Target::new(local, PortBe::from_host(local_port as u16)),
        remote: Target::new(remote, PortBe::from_be(remote_port)),
    };
    Some((ends, !v4))
}
