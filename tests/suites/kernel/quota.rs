//! No pod takes what all share.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use mesh_core::flag::Flag;
use mesh_ebpf_common::reason::Reason;
use mesh_node::kernel::{KernelEvent, PairVerdict};

use crate::{
    BOTH,
    bed::{Bed, DEADLINE, until, within},
    direct::{cookieless_fast_open, deferred},
};

const MOST: u32 = 4;

#[test]
fn a_pod_with_too_many_connections_is_refused_while_others_go_on() {
    let bed = Bed::new();
    let (a, b, c) = (bed.pod("a"), bed.pod("b"), bed.pod("c"));
    let mut agent = bed.agent_with_quota(MOST);
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    bed.enrol(&mut agent, &c);
    let (server, _own) = (bed.serve(&b, 8080), bed.serve(&a, 8080));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for six in BOTH {
        let to = SocketAddr::new(b.ip(six), 8080);
        // Through the agent, directly and to itself: all are records of the pod.
        let mut held: Vec<TcpStream> = vec![a.greeted(to).unwrap().0];
        agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
        held.push(a.greeted(to).unwrap().0);
        held.push(a.greeted(SocketAddr::new(a.ip(six), 8080)).unwrap().0);
        held.push(a.greeted("127.0.0.1:8080".parse().unwrap()).unwrap().0);
        let mut events = runtime.block_on(async { agent.kernel.events().unwrap() });
        let before = (agent.count(Reason::PodQuota), server.accepted().len());
        for to in [to, SocketAddr::new(a.ip(six), 8080)] {
            assert_eq!(a.dial(to).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        }
        assert_eq!((agent.count(Reason::PodQuota), server.accepted().len()), (before.0 + 2, before.1));
        let refused = loop {
            let event = runtime.block_on(async { tokio::time::timeout(DEADLINE, events.next()).await });
            if let KernelEvent::Refused { reason, flag, src_pod, .. } = event.unwrap().unwrap() {
                break (reason, flag, src_pod);
            }
        };
        assert_eq!(refused, (Reason::PodQuota, Flag::PodQuota, sa));
        // Another pod of the node goes on, also towards the one that has too many.
        c.greeted(to).unwrap();
        c.greeted(SocketAddr::new(a.ip(six), 8080)).unwrap();
        // As soon as one has ended there is room again.
        held.pop();
        until("room for one more", || a.greeted(to).is_ok());
        agent.verdicts(&[]);
        drop(held);
        until("all to be given back", || agent.kernel.counters().unwrap().maps["FLOWS"].entries == 0);
    }
}

/// Connects that were let through while there was room, and send their SYN when there is none.
#[test]
fn deferred_connects_do_not_get_round_the_bound() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let mut agent = bed.agent_with_quota(1);
    bed.enrol(&mut agent, &a);
    let server = bed.serve(&b, 8080);
    within(&a.netns, cookieless_fast_open);
    let to = SocketAddr::new(b.v4, 8080);
    let sockets: Vec<TcpStream> = within(&a.netns, || (0..3).map(|_| deferred(to)).collect());
    let mut reached = 0;
    for mut socket in &sockets {
        reached += usize::from(socket.write_all(b"x").is_ok() && socket.read(&mut [0]).is_ok_and(|n| n == 1));
    }
    assert_eq!((reached, agent.count(Reason::PodQuota)), (1, 2));
    assert_eq!(server.accepted().len(), 1);
}
