//! connect4/6: not ours, direct, agent or deny.

use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_common::verdict::{Call, Caller, decide};

use crate::{
    conclude::{self, Asked},
    ctx::{self, Family},
    maps::{self, Maps},
};

/// Decides about one connection and returns what the hook returns.
#[inline(always)]
pub fn connect(cx: &SockAddrContext, family: Family) -> i32 {
    let netns = ctx::netns_of_address(cx);
    // The generation comes first: whatever is looked up below is at least as new, and a change in between is seen
    // before the SYN.
    let (generation, config) = maps::config();
    let caller = maps::capturing(netns).map(|pod| Caller { pod: pod.id, netns, config });
    let call = Call {
        to: ctx::address(cx, family),
        transport: ctx::transport(cx),
        own: caller.is_some() && maps::is_ours(ctx::socket_of_address(cx)),
    };
    let verdict = decide(&call, caller.as_ref(), &Maps);
    let pod = match &caller {
        Some(caller) => caller.pod,
        None => 0,
    };
    conclude::conclude(cx, family, &Asked { to: call.to, netns, pod, generation }, &verdict)
}
