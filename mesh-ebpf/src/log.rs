//! Log lines of the programs, in objects that are built for them (`cargo xtask build-ebpf`, feature `log`). An ordinary
//! object has counters and events instead.

/// Tells of a refusal. The reason is told by its number; the agent puts its name beside it. No addresses: the stack of a
/// program is small, and the event of the same refusal has them.
#[cfg(feature = "log")]
macro_rules! refused {
    ($cx:expr, $reason:expr, $key:expr) => {{
        let (reason, netns, port) = ($reason as u32, $key.netns, $key.dport.host());
        aya_log_ebpf::debug!($cx, "reason={} netns={} port={}", reason, { netns }, { port });
    }};
}

#[cfg(not(feature = "log"))]
macro_rules! refused {
    ($cx:expr, $reason:expr, $key:expr) => {{}};
}
