//! The programs. One attribute function each, here; what they do is in the module of the same purpose.
//!
//! All are attached once per agent at the root of the cgroup hierarchy, except `inbound`, which is loaded once per pod
//! with the pod's constants. A namespace that the agent has not enrolled is left alone by every one of them.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(
        internal_features,
        reason = "BPF has an atomic addition, but the library offers it only with compare-and-swap"
    )
)]

#[cfg(target_arch = "bpf")]
#[macro_use]
mod log;

#[cfg(target_arch = "bpf")]
mod conclude;
#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod ctx;
#[cfg(target_arch = "bpf")]
mod established;
#[cfg(target_arch = "bpf")]
mod inbound;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod names;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        macros::{cgroup_sock_addr, sk_lookup, sock_ops},
        programs::{SkLookupContext, SockAddrContext, SockOpsContext},
    };

    use crate::{connect, ctx::Family, established, inbound, names};

    /// Linux 5.8+ (`bpf_setsockopt` here). Runs at connect(2), before the route is chosen.
    #[cgroup_sock_addr(connect4)]
    pub fn connect4(cx: SockAddrContext) -> i32 {
        connect::connect(&cx, Family::V4)
    }

    /// Linux 5.8+. The same for IPv6 sockets, v4-mapped destinations included.
    #[cgroup_sock_addr(connect6)]
    pub fn connect6(cx: SockAddrContext) -> i32 {
        connect::connect(&cx, Family::V6)
    }

    /// Linux 5.8+. Runs at getpeername(2).
    #[cgroup_sock_addr(getpeername4)]
    pub fn getpeername4(cx: SockAddrContext) -> i32 {
        names::peer(&cx, Family::V4)
    }

    /// Linux 5.8+. The same for IPv6 sockets.
    #[cgroup_sock_addr(getpeername6)]
    pub fn getpeername6(cx: SockAddrContext) -> i32 {
        names::peer(&cx, Family::V6)
    }

    /// Linux 5.15+ (`bpf_get_netns_cookie` here). Runs before the SYN, after the handshake and at close.
    #[sock_ops]
    pub fn established(cx: SockOpsContext) -> u32 {
        established::on(&cx);
        // Zero would suppress what other programs of this hook reply.
        1
    }

    /// Linux 5.9+. Runs for every SYN that arrives in the namespace of one pod.
    #[sk_lookup]
    pub fn inbound(cx: SkLookupContext) -> u32 {
        inbound::arrive(&cx)
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        // The verifier refuses a program from which this can be reached.
        loop {}
    }

    /// Some helpers are reserved to programs under a licence that is compatible with the GPL.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

/// On the host there is nothing to run: `cargo xtask build-ebpf` builds the object.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
