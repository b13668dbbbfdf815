//! getpeername4/6: a translated socket still sees the address that it dialled.

use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_common::map::{FLOW_DIRECT, FLOW_OTHER, FLOW_SELF};

use crate::{
    ctx::{self, Family},
    maps,
};

/// Puts the dialled address in place of the translated one. Always 1: the hook cannot refuse.
#[inline(always)]
pub fn peer(cx: &SockAddrContext, family: Family) -> i32 {
    let now = ctx::address(cx, family);
    if let Some(state) = maps::state(ctx::socket_of_address(cx)) {
        let record = &state.record;
        let translated =
            record.flags & FLOW_OTHER != 0 && (record.kind == FLOW_DIRECT || record.kind == FLOW_SELF);
        // Only for exactly the peer that the decision was about.
        if translated && record.key.dst == now.ip && record.key.dport == now.port {
            ctx::set_address(cx, family, &record.other);
        }
    }
    1
}
