//! `inbound` by itself: the kernel runs the very program of a pod (`BPF_PROG_TEST_RUN`) over arrivals of every kind.

use std::{
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::programs::{
    links::{FdLink, PinnedLink},
    loaded_programs,
};
use mesh_ebpf_common::{
    LAYOUT,
    map::{FLOW_DIRECT, FLOW_PROBE, FLOW_REFUSED, FLOW_SELF, FLOW_TO_AGENT, FlowRecord},
};
use nix::libc;

use crate::{
    BOTH,
    bed::{Agent, Bed, Door},
};

const TCP: u32 = 6;

/// `struct bpf_sk_lookup`.
#[repr(C)]
#[derive(Default)]
struct Context {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    remote_port: u16,
    pad: u16,
    local_ip4: u32,
    local_ip6: [u32; 4],
    local_port: u32,
    ingress: u32,
    tail: u32,
}

/// The part of `union bpf_attr` for `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: i32,
    result: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    tail: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Application,
    Agent(Door),
    Dropped,
}

/// Runs `inbound` of the pod over one packet.
fn arrive(bed: &Bed, agent: &Agent, netns: u64, from: SocketAddr, to: SocketAddr, protocol: u32) -> Outcome {
    let path = format!("/sys/fs/bpf/undermesh/{LAYOUT}/{}/links/inbound-{netns}", bed.node);
    let link = FdLink::from(PinnedLink::from_pin(path).unwrap()).info().unwrap();
    let program =
        loaded_programs().flatten().find(|program| program.id() == link.program_id()).unwrap().fd().unwrap();
    let words = |ip: std::net::IpAddr| mesh_ebpf_common::wire::Ip::from(ip).words_be();
    let mut context = Context {
        family: if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u32,
        protocol,
        remote_port: from.port().to_be(),
        local_port: u32::from(to.port()),
        ..Context::default()
    };
    if to.is_ipv4() {
        (context.remote_ip4, context.local_ip4) = (words(from.ip())[3], words(to.ip())[3]);
    } else {
        (context.remote_ip6, context.local_ip6) = (words(from.ip()), words(to.ip()));
    }
    let mut out = Context::default();
    let size = size_of::<Context>() as u32;
    let mut run = TestRun {
        program: program.as_fd().as_raw_fd(),
        repeat: 1,
        context_size_in: size,
        context_size_out: size,
        context_in: (&raw const context) as u64,
        context_out: (&raw mut out) as u64,
        ..TestRun::default()
    };
    // SAFETY: both contexts live until the call returns and are as long as told.
    let result = unsafe { libc::syscall(libc::SYS_bpf, 10, &raw mut run, size_of::<TestRun>()) };
    assert_eq!(result, 0, "BPF_PROG_TEST_RUN: {}", std::io::Error::last_os_error());
    match (run.result, out.cookie) {
        (0, _) => Outcome::Dropped,
        (_, 0) => Outcome::Application,
        (_, cookie) => Outcome::Agent(agent.door_of(netns, cookie).expect("a listener of this pod's")),
    }
}

#[test]
fn every_kind_of_arrival_goes_where_it_belongs() {
    let bed = Bed::new();
    let (a, b, out) = (bed.pod("a"), bed.pod("b"), bed.outside());
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    let generation = agent.kernel.generation().unwrap();
    for six in BOTH {
        let from = SocketAddr::new(out.ip(six), 40000);
        let own = |port| SocketAddr::new(a.ip(six), port);
        let foreign = SocketAddr::new(b.ip(six), 80);
        let loopback = SocketAddr::new(if six { "::1" } else { "127.0.0.1" }.parse().unwrap(), 80);
        let check = |from, to, expected| {
            assert_eq!(arrive(&bed, &agent, sa.netns, from, to, TCP), expected, "{from} -> {to}");
        };
        // Without a record.
        check(from, own(80), Outcome::Agent(Door::Plaintext));
        check(from, own(15008), Outcome::Agent(Door::Hbone));
        check(from, own(15001), Outcome::Dropped);
        check(from, own(15006), Outcome::Dropped);
        check(from, foreign, Outcome::Dropped);
        check(from, loopback, Outcome::Dropped);
        check(own(40000), own(80), Outcome::Dropped);
        check(own(40000), own(15008), Outcome::Dropped);
        check(own(40000), foreign, Outcome::Dropped);
        assert_eq!(arrive(&bed, &agent, sa.netns, from, own(80), 17), Outcome::Application, "UDP");
        // With one.
        let with = |record: FlowRecord, netns, to, expected| {
            let key = bed.plant(&agent, netns, from, to, record);
            // Looked up twice: a SYN may be repeated.
            check(from, to, expected);
            assert!(agent.kernel.counters().unwrap().maps["FLOWS"].entries > 0);
            bed.unplant(&agent, &key);
        };
        let record = |kind| FlowRecord { kind, generation, ..FlowRecord::default() };
        with(record(FLOW_TO_AGENT), sa.netns, foreign, Outcome::Agent(Door::Outbound));
        with(record(FLOW_SELF), sa.netns, own(80), Outcome::Application);
        with(record(FLOW_DIRECT), sa.netns, own(80), Outcome::Application);
        with(record(FLOW_PROBE), sa.netns, own(80), Outcome::Application);
        let met = FlowRecord { server_socket: 1, ..record(FLOW_PROBE) };
        with(met, sa.netns, own(80), Outcome::Dropped);
        with(record(FLOW_REFUSED), sa.netns, own(80), Outcome::Dropped);
        with(
            FlowRecord { generation: generation + 1, ..record(FLOW_DIRECT) },
            sa.netns,
            own(80),
            Outcome::Dropped,
        );
        // In another namespace it is no record.
        with(record(FLOW_DIRECT), sb.netns, own(80), Outcome::Agent(Door::Plaintext));
        with(record(FLOW_TO_AGENT), sb.netns, foreign, Outcome::Dropped);
    }
}
