//! The direct path: who gets it, what it looks like, what takes it away.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use mesh_ebpf_common::{
    map::{FLOW_DIRECT, FlowRecord},
    reason::Reason,
};
use mesh_node::kernel::{KernelEvent, KernelState, PairVerdict, PodSlot, ServiceState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    BOTH,
    bed::{Agent, Bed, DEADLINE, Door, greeting, until, within},
};

const ALLOW: PairVerdict = PairVerdict::Allow;
const DENY: PairVerdict = PairVerdict::Deny;

#[test]
fn a_permitted_pair_is_connected_directly() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let _server = bed.serve(&b, 8080);
    agent.verdicts(&[(sa, sb, ALLOW)]);
    for six in BOTH {
        let (stream, seen) = a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        assert_eq!(seen, stream.local_addr().unwrap(), "the very socket of the client");
        let flow = agent.kernel.direct_flows().unwrap().pop().unwrap();
        assert_eq!((flow.src, flow.dst), (seen, SocketAddr::new(b.ip(six), 8080)));
        assert!(flow.established && flow.server_socket.is_some() && flow.src_pod == sa && flow.dst_pod == sb);
        drop(stream);
        until("the record to go", || agent.kernel.direct_flows().unwrap().is_empty());
    }
    assert!(agent.seen(Door::Outbound).is_empty() && agent.seen(Door::Plaintext).is_empty());
    assert_eq!(agent.count(Reason::Direct), 2);
    // The other way round nothing was permitted.
    let _back = bed.serve(&a, 8080);
    b.greeted(SocketAddr::new(a.v4, 8080)).unwrap();
    assert_eq!(agent.seen(Door::Outbound).len(), 1);
}

#[test]
fn a_forbidden_pair_fails_at_connect_and_is_told() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let server = bed.serve(&b, 8080);
    agent.verdicts(&[(sa, sb, DENY)]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut events = runtime.block_on(async { agent.kernel.events().unwrap() });
    for six in BOTH {
        let to = SocketAddr::new(b.ip(six), 8080);
        assert_eq!(a.dial(to).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        let event = runtime.block_on(async { tokio::time::timeout(DEADLINE, events.next()).await });
        let KernelEvent::Refused { reason, src_pod, dst_pod, dst, .. } = event.unwrap().unwrap() else {
            panic!("a refusal")
        };
        assert_eq!((reason, src_pod, dst_pod, dst), (Reason::PolicyDenied, sa, sb.id, to));
    }
    assert!(server.accepted().is_empty());
}

fn service(
    agent: &Agent,
    vip: &str,
    endpoints: &[(SocketAddr, u32)],
    verdicts: &[(PodSlot, PodSlot, PairVerdict)],
) {
    let verdicts = verdicts.iter().map(|(src, dst, verdict)| ((src.id, dst.id, 0), *verdict)).collect();
    let services = BTreeMap::from([(vip.parse().unwrap(), ServiceState::Endpoints(endpoints.into()))]);
    agent.kernel.sync(&KernelState { services, verdicts, ..KernelState::default() }).unwrap();
}

#[test]
fn a_service_is_translated_and_the_application_sees_what_it_dialled() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let (server, own) = (bed.serve(&b, 8080), bed.serve(&a, 8080));
    for (six, vip) in [(false, "10.96.0.1:80"), (true, "[fd96::1]:80")] {
        service(&agent, vip, &[(SocketAddr::new(b.ip(six), 8080), 1)], &[(sa, sb, ALLOW)]);
        let (stream, seen) = a.greeted(vip.parse().unwrap()).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), vip.parse().unwrap(), "getpeername");
        assert_eq!(seen, stream.local_addr().unwrap());
        assert_eq!(agent.kernel.direct_flows().unwrap()[0].dialled, Some(vip.parse().unwrap()));
        drop(stream);
        // Through the service to oneself.
        service(&agent, vip, &[(SocketAddr::new(a.ip(six), 8080), 1)], &[(sa, sb, ALLOW)]);
        let (stream, seen) = a.greeted(vip.parse().unwrap()).unwrap();
        assert_eq!((seen, stream.peer_addr().unwrap()), (stream.local_addr().unwrap(), vip.parse().unwrap()));
        // Not direct: as dialled, and the agent is told the kernel's choice.
        let choice = SocketAddr::new(b.ip(six), 8080);
        service(&agent, vip, &[(choice, 1)], &[]);
        let (stream, _) = a.greeted(vip.parse().unwrap()).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), vip.parse().unwrap());
        let seen = agent.seen(Door::Outbound).pop().unwrap();
        assert_eq!(seen.flow.unwrap().dialled, vip.parse().unwrap());
        assert_eq!(seen.flow.unwrap().chosen, Some(choice));
    }
    assert_eq!((server.accepted().len(), own.accepted().len()), (4, 2));
    // v4-mapped.
    service(&agent, "10.96.0.1:80", &[(SocketAddr::new(b.v4, 8080), 1)], &[(sa, sb, ALLOW)]);
    let mapped: SocketAddr = "[::ffff:10.96.0.1]:80".parse().unwrap();
    let (stream, seen) = a.greeted(mapped).unwrap();
    assert_eq!((stream.peer_addr().unwrap(), seen.ip()), (mapped, a.v4));
}

#[test]
fn endpoints_are_chosen_by_weight_over_local_and_remote_alike() {
    let bed = Bed::new();
    let (a, b, c) = (bed.pod("a"), bed.pod("b"), bed.pod("c"));
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    // `c` is not enrolled: it stands for a pod of another node.
    let (local, remote) = (bed.serve(&b, 8080), bed.serve(&c, 8080));
    let endpoints = [(SocketAddr::new(b.v4, 8080), 1), (SocketAddr::new(c.v4, 8080), 3)];
    service(&agent, "10.96.0.1:80", &endpoints, &[(sa, sb, ALLOW)]);
    let total = 800;
    within(&a.netns, || {
        for _ in 0..total {
            let stream = TcpStream::connect("10.96.0.1:80").unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            greeting(stream).unwrap();
        }
    });
    let (near, far) = (local.accepted().len(), remote.accepted().len());
    assert_eq!(near + far, total);
    // Five standard deviations of a binomial distribution with p = 1/4.
    assert!(near.abs_diff(total / 4) < 62, "{near} of {total}");
    assert_eq!(agent.count(Reason::Direct), near as u64);
}

#[test]
fn a_taken_permission_cuts_live_flows_and_refuses_what_was_under_way() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let _server = bed.serve(&b, 8080);
    for six in BOTH {
        agent.verdicts(&[(sa, sb, ALLOW)]);
        let before = agent.kernel.generation().unwrap();
        let (mut stream, _) = a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        let verdicts = [((sa.id, sb.id, 0), DENY)].into();
        let report = agent.kernel.sync(&KernelState { verdicts, ..KernelState::default() }).unwrap();
        assert_eq!(report.cut.len(), 1);
        assert!(report.generation > before);
        let error = stream.read(&mut [0]).unwrap_err();
        assert!(matches!(
            error.kind(),
            std::io::ErrorKind::ConnectionAborted | std::io::ErrorKind::ConnectionReset
        ));
        until("the record to go", || agent.kernel.direct_flows().unwrap().is_empty());
        assert!(a.dial(SocketAddr::new(b.ip(six), 8080)).is_err());
    }
    // A flow that stays permitted is left alone, and so is everything when permissions only grow.
    agent.verdicts(&[(sa, sb, ALLOW)]);
    let (mut stream, _) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    let generation = agent.kernel.generation().unwrap();
    agent.verdicts(&[(sa, sb, ALLOW), (sb, sa, ALLOW)]);
    assert_eq!(agent.kernel.generation().unwrap(), generation);
    agent.verdicts(&[(sa, sb, ALLOW), (sb, sa, DENY)]);
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    // No direct path any more.
    let verdicts = [((sa.id, sb.id, 0), ALLOW)].into();
    let report =
        agent.kernel.sync(&KernelState { verdicts, no_direct: true, ..KernelState::default() }).unwrap();
    assert_eq!(report.cut.len(), 1);
    let (stream, _) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    assert_eq!(agent.seen(Door::Outbound).pop().unwrap().peer, stream.local_addr().unwrap());
}

/// Without the right to end sockets: what is forbidden lives on, which must not pass for done.
#[test]
fn a_flow_that_cannot_be_ended_is_an_error() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let _server = bed.serve(&b, 8080);
    agent.verdicts(&[(sa, sb, ALLOW)]);
    let (mut stream, _) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    let verdicts: BTreeMap<_, _> = [((sa.id, sb.id, 0), DENY)].into();
    let deny = KernelState { verdicts, ..KernelState::default() };
    let outcome = std::thread::scope(|scope| {
        let without = scope.spawn(|| {
            without_net_admin();
            agent.kernel.sync(&deny).map(|report| report.cut)
        });
        without.join().unwrap()
    });
    let said = outcome.unwrap_err().to_string();
    assert!(said.starts_with("end "), "{said}");
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    // No new one, though; and the one that lives is found by whoever sweeps.
    assert!(a.dial(SocketAddr::new(b.v4, 8080)).is_err());
    let flow = agent.kernel.direct_flows().unwrap().pop().unwrap();
    assert!(agent.kernel.destroy(&flow).unwrap());
    assert!(stream.read(&mut [0]).is_err());
}

/// Drops CAP_NET_ADMIN of this thread.
fn without_net_admin() {
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_NET_ADMIN: u32 = 12;
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable; then the upper halves.
    let mut sets = [0_u32; 6];
    // SAFETY: both are as long as this version says; the kernel writes the second.
    let got = unsafe { nix::libc::syscall(nix::libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    assert_eq!(got, 0, "{}", std::io::Error::last_os_error());
    sets[0] &= !(1 << CAP_NET_ADMIN);
    // SAFETY: as above; the kernel reads both.
    let set = unsafe { nix::libc::syscall(nix::libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// TCP_FASTOPEN_CONNECT defers the SYN to the first write: the time in which policy may change, stretched.
#[test]
fn a_decision_of_an_older_policy_is_not_carried_out() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let server = bed.serve(&b, 8080);
    for six in BOTH {
        agent.verdicts(&[(sa, sb, ALLOW)]);
        let to = SocketAddr::new(b.ip(six), 8080);
        within(&a.netns, cookieless_fast_open);
        let accepted = server.accepted().len();
        let socket = within(&a.netns, || deferred(to));
        agent.verdicts(&[]);
        let sent = (&socket).write_all(b"late").and_then(|()| (&socket).read(&mut [0]));
        assert!(sent.is_err(), "{sent:?}");
        assert_eq!(server.accepted().len(), accepted);
    }
    assert_eq!(agent.count(Reason::StaleGeneration), 2);
    assert!(agent.seen(Door::Plaintext).is_empty(), "the SYN never left the pod");
}

/// Clients of this namespace use Fast Open without having asked the server for a cookie.
pub fn cookieless_fast_open() {
    std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "5").unwrap();
}

pub fn deferred(to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).unwrap();
    let one = 1_i32;
    // SAFETY: four readable bytes.
    let set = unsafe {
        nix::libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            nix::libc::IPPROTO_TCP,
            nix::libc::TCP_FASTOPEN_CONNECT,
            (&raw const one).cast(),
            4,
        )
    };
    assert_eq!(set, 0);
    socket.connect(&to.into()).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.into()
}

/// Data in the SYN: the server's side is complete before the client's.
#[test]
fn fast_open_goes_directly_with_its_data() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    // Every listener of this namespace takes data of SYNs, without cookie.
    within(&b.netns, || std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1538").unwrap());
    let server = bed.serve(&b, 8080);
    within(&a.netns, cookieless_fast_open);
    agent.verdicts(&[(sa, sb, ALLOW)]);
    for six in BOTH {
        let to = SocketAddr::new(b.ip(six), 8080);
        let mut stream = within(&a.netns, || deferred(to));
        stream.write_all(b"early").unwrap();
        let (mut stream, seen) = greeting(stream).unwrap();
        assert_eq!(seen, stream.local_addr().unwrap(), "the very socket of the client");
        let mut echo = [0; 5];
        stream.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"early");
        assert!(took_data_of_syn(&stream), "the SYN carried it");
        let flow = agent.kernel.direct_flows().unwrap().pop().unwrap();
        assert!(flow.src == seen && flow.established && flow.server_socket.is_some());
        drop(stream);
        until("the record to go", || agent.kernel.direct_flows().unwrap().is_empty());
    }
    assert_eq!((server.accepted().len(), agent.count(Reason::Direct)), (2, 2));
    agent.verdicts(&[(sa, sb, DENY)]);
    let sent = within(&a.netns, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        let flags = nix::sys::socket::MsgFlags::from_bits_retain(nix::libc::MSG_FASTOPEN);
        let to = nix::sys::socket::SockaddrStorage::from(SocketAddr::new(b.v4, 8080));
        nix::sys::socket::sendto(std::os::fd::AsRawFd::as_raw_fd(&socket), b"x", &to, flags)
    });
    assert_eq!(sent, Err(nix::errno::Errno::EPERM));
    assert_eq!(server.accepted().len(), 2);
}

/// `TCPI_OPT_SYN_DATA` of `TCP_INFO`.
fn took_data_of_syn(stream: &TcpStream) -> bool {
    let (mut info, mut length) = ([0_u8; 8], 8);
    // SAFETY: the kernel writes at most eight bytes.
    let result = unsafe {
        nix::libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(stream),
            nix::libc::IPPROTO_TCP,
            nix::libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    info[5] & 32 != 0
}

/// The kernel counts SYN and FIN as bytes; the application did not send them. Whoever closes first.
#[test]
fn byte_counts_are_the_application_s_whatever_the_end() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    agent.verdicts(&[(sa, sb, ALLOW)]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut events = runtime.block_on(async { agent.kernel.events().unwrap() });
    let mut port = 8080;
    let mut check = |what: &str, expected: (u64, u64), end: &dyn Fn(TcpStream, TcpStream)| {
        for six in BOTH {
            let to = SocketAddr::new(b.ip(six), port);
            port += 1;
            let listener = within(&b.netns, || std::net::TcpListener::bind(to).unwrap());
            let mut client = a.dial(to).unwrap();
            let mut server = listener.accept().unwrap().0;
            client.write_all(b"hello").unwrap();
            server.read_exact(&mut [0; 5]).unwrap();
            server.write_all(b"hi there").unwrap();
            client.read_exact(&mut [0; 8]).unwrap();
            end(client, server);
            let counted = loop {
                let event = runtime.block_on(async { tokio::time::timeout(DEADLINE, events.next()).await });
                if let KernelEvent::DirectClosed { sent_bytes, received_bytes, .. } = event.unwrap().unwrap()
                {
                    break (sent_bytes, received_bytes);
                }
            };
            assert_eq!(counted, expected, "{what}, {to}");
        }
    };
    let ended = |stream: &mut TcpStream| assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    check("the client closes and the server follows", (5, 8), &|client, mut server| {
        drop(client);
        ended(&mut server);
    });
    check("the server closes and the client follows", (5, 8), &|mut client, server| {
        drop(server);
        ended(&mut client);
    });
    check("the client is done sending first", (5, 12), &|mut client, mut server| {
        client.shutdown(std::net::Shutdown::Write).unwrap();
        ended(&mut server);
        server.write_all(b"more").unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
        drop(server);
        ended(&mut client);
    });
    check("the server is done sending first", (9, 8), &|mut client, mut server| {
        server.shutdown(std::net::Shutdown::Write).unwrap();
        ended(&mut client);
        client.write_all(b"more").unwrap();
        server.read_exact(&mut [0; 4]).unwrap();
        drop(client);
        ended(&mut server);
    });
    check("the client resets", (5, 8), &|client, _server| {
        socket2::SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    });
    check("the server resets", (5, 8), &|mut client, server| {
        socket2::SockRef::from(&server).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(server);
        assert!(client.read(&mut [0]).is_err());
    });
}

#[test]
fn a_full_map_refuses_and_never_lets_through() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let (server, own) = (bed.serve(&b, 8080), bed.serve(&a, 8080));
    bed.fill_flows(&agent);
    for six in BOTH {
        // To the agent, to oneself, directly.
        agent.verdicts(&[]);
        assert!(a.dial(SocketAddr::new(b.ip(six), 8080)).is_err());
        assert!(a.dial(SocketAddr::new(a.ip(six), 8080)).is_err());
        agent.verdicts(&[(sa, sb, ALLOW)]);
        assert!(a.dial(SocketAddr::new(b.ip(six), 8080)).is_err());
    }
    assert!(a.dial("127.0.0.1:8080".parse().unwrap()).is_err());
    assert_eq!(agent.count(Reason::MapFull), 7);
    assert!(server.accepted().is_empty() && own.accepted().is_empty());
    assert!(agent.seen(Door::Plaintext).is_empty() && agent.seen(Door::Outbound).is_empty());
    // The agent's own sockets have room of their own.
    let out = bed.outside();
    out.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    assert_eq!(server.accepted().len(), 1);
}

/// The SYN is let in, the SYN-ACK gets lost, policy changes, and only then the handshake is completed.
#[test]
fn a_policy_that_changes_during_the_handshake_is_seen_at_its_end() {
    let bed = Bed::new();
    let (b, out) = (bed.pod("b"), bed.outside());
    let mut agent = bed.agent();
    let sb = bed.enrol(&mut agent, &b);
    let _server = bed.serve(&b, 8080);
    let (from, to) = (SocketAddr::new(out.v4, 40000), SocketAddr::new(b.v4, 8080));
    let generation = agent.kernel.generation().unwrap();
    let record = FlowRecord { kind: FLOW_DIRECT, generation, flags: 2, ..FlowRecord::default() };
    bed.plant(&agent, sb.netns, from, to, record);
    bed.lose(&b, &out, true);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| within(&out.netns, || crate::bed::dial_from(from, to)));
        until("the SYN to be let in", || agent.count(Reason::LookupAuthorised) == 1);
        agent.verdicts(&[(PodSlot { netns: 0, id: 900 }, sb, DENY)]);
        bed.lose(&b, &out, false);
        assert!(client.join().unwrap().and_then(greeting).is_err());
    });
    assert_eq!(agent.count(Reason::OpenedStale), 1);
}

/// A record of the wrong place, generation or kind permits nothing, whatever the address says.
#[test]
fn only_a_record_of_this_place_and_policy_lets_in() {
    let bed = Bed::new();
    let (b, out) = (bed.pod("b"), bed.outside());
    let mut agent = bed.agent();
    let sb = bed.enrol(&mut agent, &b);
    let server = bed.serve(&b, 8080);
    let generation = agent.kernel.generation().unwrap();
    let from = SocketAddr::new(out.v4, 40000);
    let to = SocketAddr::new(b.v4, 8080);
    let good = FlowRecord { kind: FLOW_DIRECT, generation, flags: 2, ..FlowRecord::default() };
    let attempt = |record: FlowRecord, netns: u64| {
        let before = server.accepted().len();
        let key = bed.plant(&agent, netns, from, to, record);
        let result = within(&out.netns, || crate::bed::dial_from(from, to));
        let reached = result.is_ok_and(|stream| {
            let _ = stream.set_nonblocking(false);
            greeting(stream).is_ok_and(|(_, seen)| seen == from)
        });
        bed.unplant(&agent, &key);
        (reached, server.accepted().len() - before)
    };
    assert_eq!(attempt(good, sb.netns), (true, 1));
    // Another namespace's: as if there were none, through the agent (which cannot keep the port).
    assert!(!attempt(good, sb.netns + 1).0);
    assert_eq!(attempt(FlowRecord { generation: generation + 1, ..good }, sb.netns), (false, 0));
    assert_eq!(attempt(FlowRecord { generation: generation - 1, ..good }, sb.netns), (false, 0));
    assert_eq!(attempt(FlowRecord { kind: 4, ..good }, sb.netns), (false, 0));
    // Its socket has not seen the SYN-ACK: somebody else completed the handshake, and is cut.
    let opened = agent.count(Reason::OpenedForged);
    assert!(!attempt(FlowRecord { flags: 0, ..good }, sb.netns).0);
    assert_eq!(agent.count(Reason::OpenedForged), opened + 1);
}
