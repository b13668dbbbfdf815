//! Connections that the agent carries, calls to oneself, and everything that is left alone.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use mesh_ebpf_common::{CAPTURE_MARK, reason::Reason};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    BOTH,
    bed::{Bed, DEADLINE, Door, greeting, until, within},
};

#[test]
fn captured_connections_keep_both_true_addresses() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    bed.enrol(&mut agent, &b);
    let _server = bed.serve(&b, 8080);
    for six in BOTH {
        let to = SocketAddr::new(b.ip(six), 8080);
        let (stream, seen) = a.greeted(to).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), to);
        assert_eq!(stream.local_addr().unwrap().ip(), a.ip(six));
        assert_eq!(seen.ip(), a.ip(six), "the server sees the client");
        let outbound = agent.seen(Door::Outbound).pop().unwrap();
        assert_eq!(outbound.to, to);
        assert_eq!(outbound.peer, stream.local_addr().unwrap());
        assert_eq!(outbound.flow.unwrap().dialled, to);
        assert_eq!(agent.seen(Door::Plaintext).pop().unwrap().to, to);
    }
    until("the records to go", || {
        let fill = agent.kernel.counters().unwrap().maps;
        fill["FLOWS"].entries == 0 && fill["OWN_FLOWS"].entries == 0
    });
}

#[test]
fn a_v4_mapped_destination_is_captured_as_what_it_is() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    let _server = bed.serve(&b, 8080);
    let IpAddr::V4(v4) = b.v4 else { unreachable!("an IPv4 address") };
    let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), 8080);
    let (stream, seen) = a.greeted(mapped).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), mapped);
    assert_eq!(seen.ip(), a.v4);
    assert_eq!(agent.seen(Door::Outbound).pop().unwrap().to, SocketAddr::new(b.v4, 8080));
}

#[test]
fn mptcp_and_fast_open_are_captured() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    let _server = bed.serve(&b, 8080);
    let to = SocketAddr::new(b.v4, 8080);
    let mptcp = within(&a.netns, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP))?;
        socket.connect_timeout(&to.into(), DEADLINE)?;
        socket.set_read_timeout(Some(DEADLINE))?;
        std::io::Result::Ok(TcpStream::from(socket))
    });
    assert_eq!(greeting(mptcp.unwrap()).unwrap().1.ip(), a.v4);
    let fast = within(&a.netns, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        let sent = nix::sys::socket::sendto(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            b"hello",
            &nix::sys::socket::SockaddrStorage::from(to),
            nix::sys::socket::MsgFlags::from_bits_retain(0x2000_0000),
        );
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(sent, Ok(5));
        TcpStream::from(socket)
    });
    assert_eq!(greeting(fast).unwrap().1.ip(), a.v4);
    assert_eq!(agent.seen(Door::Outbound).len(), 2);
}

#[test]
fn a_pod_reaches_itself_and_never_the_agent() {
    let bed = Bed::new();
    let a = bed.pod("a");
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    let server = bed.serve(&a, 8080);
    let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped().into();
    let selves: [IpAddr; 7] = [
        Ipv4Addr::LOCALHOST.into(),
        Ipv6Addr::LOCALHOST.into(),
        Ipv4Addr::UNSPECIFIED.into(),
        Ipv6Addr::UNSPECIFIED.into(),
        mapped,
        a.v4,
        a.v6,
    ];
    for ip in selves {
        a.greeted(SocketAddr::new(ip, 8080)).unwrap_or_else(|error| panic!("{ip}: {error}"));
        for port in [15001, 15006, 15008] {
            let error = a.dial(SocketAddr::new(ip, port)).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{ip}:{port}");
        }
    }
    assert_eq!(server.accepted().len(), selves.len());
    assert!(agent.seen(Door::Outbound).is_empty() && agent.seen(Door::Plaintext).is_empty());
    assert_eq!(agent.count(Reason::IllegalPort), 3 * selves.len() as u64);
}

#[test]
fn arrivals_without_a_record_meet_the_agent() {
    let bed = Bed::new();
    let (a, out) = (bed.pod("a"), bed.outside());
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    let server = bed.serve(&a, 8080);
    for six in BOTH {
        let (_, seen) = out.greeted(SocketAddr::new(a.ip(six), 8080)).unwrap();
        assert_eq!(seen.ip(), out.ip(six), "the client's address is kept");
        assert_eq!(agent.seen(Door::Plaintext).pop().unwrap().to, SocketAddr::new(a.ip(six), 8080));
        // A port on which nobody listens meets the agent too: it tells nothing about the application.
        out.dial(SocketAddr::new(a.ip(six), 9)).unwrap();
        for port in [15001, 15006] {
            assert!(out.dial(SocketAddr::new(a.ip(six), port)).is_err(), "{port}");
        }
        out.dial(SocketAddr::new(a.ip(six), 15008)).unwrap();
        until("the tunnel", || {
            agent.seen(Door::Hbone).last().is_some_and(|seen| seen.peer.ip() == out.ip(six))
        });
    }
    assert_eq!(server.accepted().len(), 2);
    assert!(agent.seen(Door::Outbound).is_empty(), "no open relay");
    assert_eq!(agent.count(Reason::LookupIllegalPort), 4);
}

#[test]
fn many_connections_in_both_directions_of_one_pair_do_not_mix() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    bed.enrol(&mut agent, &b);
    let (_sa, _sb) = (bed.serve(&a, 8080), bed.serve(&b, 8080));
    let (count, flow) = (50, |from: &crate::bed::Pod, to: IpAddr| {
        let (mut stream, seen) = from.greeted(SocketAddr::new(to, 8080)).unwrap();
        assert_eq!(seen.ip(), from.v4);
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    });
    std::thread::scope(|scope| {
        scope.spawn(|| (0..count).for_each(|_| flow(&a, b.v4)));
        scope.spawn(|| (0..count).for_each(|_| flow(&b, a.v4)));
    });
    assert_eq!(agent.seen(Door::Outbound).len(), 2 * count);
    assert!(agent.seen(Door::Outbound).iter().all(|seen| seen.flow.is_some()));
}

#[test]
fn what_is_not_enrolled_or_not_tcp_is_left_alone() {
    let bed = Bed::new();
    let (a, b, out) = (bed.pod("a"), bed.pod("b"), bed.outside());
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    let _server = bed.serve(&b, 8080);
    let (stream, seen) = out.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    assert_eq!(seen, stream.local_addr().unwrap());
    let server = within(&b.netns, || UdpSocket::bind((b.v4, 5353)).unwrap());
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    within(&a.netns, || {
        let client = UdpSocket::bind((a.v4, 0)).unwrap();
        client.connect((b.v4, 5353)).unwrap();
        client.send(b"q").unwrap();
    });
    assert_eq!(server.recv_from(&mut [0; 9]).unwrap().1.ip(), a.v4);
    assert_eq!(agent.count(Reason::Uncaptured), 1);
    assert!(agent.seen(Door::Outbound).is_empty());
}

/// `connect(AF_UNSPEC)` runs no hook and keeps the socket: neither decision nor mark of the former destination stay.
#[test]
fn a_socket_that_is_used_again_is_decided_again() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    let (_own, _other) = (bed.serve(&a, 8080), bed.serve(&b, 8080));
    within(&a.netns, || {
        let stream = TcpStream::connect((b.v4, 8080)).unwrap();
        assert_eq!(SockRef::from(&stream).mark().unwrap(), CAPTURE_MARK);
        disconnect(&stream);
        SockRef::from(&stream).connect(&SocketAddr::new(a.v4, 8080).into()).unwrap();
        assert_eq!(SockRef::from(&stream).mark().unwrap(), 0, "the mark belongs to the call to the agent");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let (stream, _) = greeting(stream).unwrap();
        disconnect(&stream);
        assert!(SockRef::from(&stream).connect(&SocketAddr::new(a.v4, 15001).into()).is_err());
        SockRef::from(&stream).connect(&SocketAddr::new(b.v4, 8080).into()).unwrap();
        assert_eq!(greeting(stream).unwrap().1.ip(), a.v4);
    });
    assert_eq!(agent.seen(Door::Outbound).len(), 2);
}

fn disconnect(stream: &TcpStream) {
    use std::os::fd::AsRawFd as _;
    // No data may be unread, or the kernel resets; the fields besides the family do not count.
    let address = [0_u8; 16];
    // SAFETY: sixteen readable bytes, family AF_UNSPEC.
    let result = unsafe { nix::libc::connect(stream.as_raw_fd(), address.as_ptr().cast(), 16) };
    assert_eq!(result, 0, "connect(AF_UNSPEC)");
}

/// The second line: were a listener shared after all, the connection is still given to exactly the agent's.
#[test]
fn a_shared_listener_gives_no_share() {
    let bed = Bed::new();
    let (a, out) = (bed.pod("a"), bed.outside());
    let mut agent = bed.agent();
    bed.enrol_shared(&mut agent, &a);
    let _server = bed.serve(&a, 8080);
    let thieves: Vec<TcpListener> = within(&a.netns, || {
        let listen = |_| crate::bed::listener(15006, false, true);
        (0..7).map(listen).collect()
    });
    for thief in &thieves {
        thief.set_nonblocking(true).unwrap();
    }
    for _ in 0..40 {
        out.greeted(SocketAddr::new(a.v4, 8080)).unwrap();
    }
    assert_eq!(agent.seen(Door::Plaintext).len(), 40);
    assert!(thieves.iter().all(|thief| thief.accept().is_err()));
}

#[test]
fn no_pod_can_share_the_agent_s_listeners() {
    let bed = Bed::new();
    let a = bed.pod("a");
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    within(&a.netns, || {
        for port in [15001, 15006, 15008] {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
            socket.set_reuse_port(true).unwrap();
            socket.set_reuse_address(true).unwrap();
            assert!(socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into()).is_err(), "{port}");
        }
        // A listener of the pod on the loopback of that port is never given anything.
        assert!(TcpListener::bind("127.0.0.1:15006").is_err());
    });
}
