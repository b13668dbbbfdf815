//! A pod with CAP_NET_RAW and CAP_NET_ADMIN in its own namespace.

use std::net::{SocketAddr, TcpStream};

use mesh_ebpf_common::{CAPTURE_MARK, reason::Reason};
use mesh_node::kernel::PairVerdict;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    BOTH,
    bed::{Bed, DEADLINE, Door, Pod, dial_from, greeting, set_transparent, within},
};

fn socket(to: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).unwrap()
}

#[test]
fn a_forged_mark_gains_nothing() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let server = bed.serve(&b, 8080);
    for six in BOTH {
        let to = SocketAddr::new(b.ip(six), 8080);
        for mark in [CAPTURE_MARK, 0x539, 1337, 1] {
            within(&a.netns, || {
                let socket = socket(to);
                socket.set_mark(mark).unwrap();
                socket.connect_timeout(&to.into(), DEADLINE).unwrap();
            });
        }
        // Captured each time, as without a mark.
        let captured = || agent.seen(Door::Outbound).iter().filter(|seen| seen.to == to).count();
        crate::bed::until("all to be captured", || captured() == 4);
    }
    // A direct call with the mark is a direct call without it.
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let to = SocketAddr::new(b.v4, 8080);
    let stream = within(&a.netns, || {
        let socket = socket(to);
        socket.set_mark(CAPTURE_MARK).unwrap();
        socket.connect_timeout(&to.into(), DEADLINE).unwrap();
        assert_eq!(socket.mark().unwrap(), 0);
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        TcpStream::from(socket)
    });
    let local = stream.local_addr().unwrap();
    assert_eq!(greeting(stream).unwrap().1, local);
    assert!(!server.accepted().is_empty());
}

#[test]
fn a_forged_source_is_refused() {
    let bed = Bed::new();
    let (a, b, c) = (bed.pod("a"), bed.pod("b"), bed.pod("c"));
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    bed.enrol(&mut agent, &c);
    let (server, own) = (bed.serve(&b, 8080), bed.serve(&a, 8080));
    for verdicts in [&[][..], &[(sa, sb, PairVerdict::Allow)]] {
        agent.verdicts(verdicts);
        for six in BOTH {
            for to in [SocketAddr::new(b.ip(six), 8080), SocketAddr::new(a.ip(six), 8080)] {
                let result = within(&a.netns, || {
                    let socket = socket(to);
                    set_transparent(&socket);
                    socket.bind(&SocketAddr::new(c.ip(six), 0).into()).unwrap();
                    socket.connect_timeout(&to.into(), std::time::Duration::from_secs(1))
                });
                assert!(result.is_err(), "{to}");
            }
        }
    }
    assert_eq!(agent.count(Reason::IllegalSource), 8);
    assert!(server.accepted().is_empty() && own.accepted().is_empty());
    assert!(agent.seen(Door::Outbound).is_empty() && agent.seen(Door::Plaintext).is_empty());
}

#[test]
fn a_packet_that_is_looped_back_by_the_mark_reaches_nobody() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    bed.enrol(&mut agent, &b);
    // An application of `a` on the port that is dialled must not get `a`'s own packets for `b`.
    let (own, _server) = (bed.serve(&a, 8080), bed.serve(&b, 8080));
    within(&a.netns, || {
        // A raw socket runs no connect hook of TCP; the mark leads its SYN to the pod's own loopback.
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
        raw.set_mark(CAPTURE_MARK).unwrap();
        raw.send_to(&syn(&a.v4.to_string(), &b.v4.to_string(), 8080), &SocketAddr::new(b.v4, 0).into())
            .unwrap();
    });
    crate::bed::until("the packet to be dropped", || agent.count(Reason::LookupNoRecord) > 0);
    assert!(own.accepted().is_empty());
}

/// A TCP SYN with a right checksum.
fn syn(from: &str, to: &str, port: u16) -> Vec<u8> {
    let mut segment = vec![0_u8; 20];
    segment[0..2].copy_from_slice(&40001_u16.to_be_bytes());
    segment[2..4].copy_from_slice(&port.to_be_bytes());
    segment[12..16].copy_from_slice(&[0x50, 0x02, 0xff, 0xff]);
    let octets = |ip: &str| ip.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let pseudo = [&octets(from)[..], &octets(to), &[0, 6, 0, 20], &segment].concat();
    let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    segment[16..18].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    segment
}

/// Sends a SYN from `evil` with the address of `from`.
fn spoof(evil: &Pod, from: &Pod, to: &Pod) {
    within(&evil.netns, || {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
        raw.set_header_included_v4(true).unwrap();
        let segment = syn(&from.v4.to_string(), &to.v4.to_string(), 8080);
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
        for ip in [from.v4, to.v4] {
            let std::net::IpAddr::V4(ip) = ip else { unreachable!("IPv4") };
            packet.extend(ip.octets());
        }
        packet.extend(segment);
        raw.send_to(&packet, &SocketAddr::new(to.v4, 0).into()).unwrap();
    });
}

/// The client keeps its half of a connection whose server is gone: its record must not let anybody else in.
#[test]
fn a_record_authorises_one_handshake() {
    let bed = Bed::new();
    let (a, b, evil) = (bed.pod("a"), bed.pod("b"), bed.pod("e"));
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    bed.enrol(&mut agent, &evil);
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let to = SocketAddr::new(b.v4, 8080);
    let listener = within(&b.netns, || {
        // What is left of the server's half goes after a second.
        std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1").unwrap();
        std::net::TcpListener::bind(to).unwrap()
    });
    // The port of `syn`.
    let kept = within(&a.netns, || dial_from(SocketAddr::new(a.v4, 40001), to)).unwrap();
    drop(listener.accept().unwrap());
    let let_in = agent.count(Reason::LookupAuthorised);
    crate::bed::until("a second handshake to be refused", || {
        spoof(&evil, &a, &b);
        agent.count(Reason::LookupRefused) > 0
    });
    assert_eq!(agent.count(Reason::LookupAuthorised), let_in);
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    drop(kept);
}

#[test]
fn a_spoofed_syn_has_no_identity() {
    let bed = Bed::new();
    let (a, b, evil) = (bed.pod("a"), bed.pod("b"), bed.pod("e"));
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    bed.enrol(&mut agent, &evil);
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let server = bed.serve(&b, 8080);
    let plain = agent.count(Reason::LookupPlaintext);
    spoof(&evil, &a, &b);
    crate::bed::until("the SYN to meet the agent's plaintext listener", || {
        agent.count(Reason::LookupPlaintext) > plain
    });
    assert!(server.accepted().is_empty());
    // The pod itself still gets through.
    a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
}
