//! The real object in the real kernel: each rule of the capture has a test that fails without it. Needs root.

#[path = "kernel/bed.rs"]
mod bed;

use std::net::SocketAddr;

use bed::{Bed, Door, until};
use mesh_ebpf_common::reason::Reason;
use mesh_node::kernel::PairVerdict;

const BOTH: [bool; 2] = [false, true];

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
}

#[test]
fn a_permitted_pair_is_connected_directly() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    let _server = bed.serve(&b, 8080);
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    for six in BOTH {
        let (stream, seen) = a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        assert_eq!(seen, stream.local_addr().unwrap(), "the very socket of the client");
    }
    assert!(agent.seen(Door::Outbound).is_empty() && agent.seen(Door::Plaintext).is_empty());
    assert_eq!(agent.count(Reason::Direct), 2);
    until("the records to go", || agent.kernel.direct_flows().unwrap().is_empty());
}
