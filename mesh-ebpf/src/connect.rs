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
    let mut slot = 0;
    let mut caller = Caller { enrolled: false, kubelet: false, exhausted: false, pod: 0, netns, config };
    match maps::capturing(netns) {
        Some(pod) => {
            caller.enrolled = true;
            caller.pod = pod.id;
            caller.exhausted = maps::exhausted(pod.id);
            slot = pod.slot;
        }
        None => {
            let (node, kubelet) = maps::kubelet();
            caller.kubelet = kubelet != 0 && netns == node && ctx::cgroup() == kubelet;
        }
    }
    let call = Call {
        to: ctx::address(cx, family),
        transport: ctx::transport(cx),
        own: caller.enrolled && maps::is_ours(ctx::socket_of_address(cx)),
    };
    let verdict = decide(&call, &caller, &Maps);
    conclude::conclude(cx, family, &Asked { to: call.to, netns, pod: caller.pod, slot, generation }, &verdict)
}
