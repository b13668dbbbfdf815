//! Connections that were open before their pod was captured.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::SocketAddr,
};

use mesh_ebpf_common::reason::Reason;
use mesh_node::kernel::PairVerdict;

use crate::{BOTH, bed::Bed};

#[test]
fn what_was_open_before_goes_on_is_told_and_can_be_ended() {
    let bed = Bed::new();
    let (a, b, c, out) = (bed.pod("a"), bed.pod("b"), bed.pod("c"), bed.outside());
    let (_of_a, _of_b) = (bed.serve(&a, 8080), bed.serve(&b, 8080));
    let (mut before, mut wanted) = (Vec::new(), BTreeSet::new());
    for six in BOTH {
        let (stream, seen) = out.greeted(SocketAddr::new(a.ip(six), 8080)).unwrap();
        wanted.insert((SocketAddr::new(a.ip(six), 8080), seen, true));
        before.push(stream);
        let (stream, seen) = a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        wanted.insert((seen, SocketAddr::new(b.ip(six), 8080), false));
        before.push(stream);
        // A call to oneself is nobody's business.
        before.push(a.greeted(SocketAddr::new(a.ip(six), 8080)).unwrap().0);
    }
    before.push(a.greeted("127.0.0.1:8080".parse().unwrap()).unwrap().0);
    let mut agent = bed.agent();
    let sa = bed.enrol(&mut agent, &a);
    let told = |agent: &crate::bed::Agent| -> BTreeSet<_> {
        let unseen = agent.kernel.unseen(sa).unwrap();
        unseen.iter().map(|one| (one.local, one.remote, one.accepted)).collect()
    };
    assert_eq!(told(&agent), wanted);
    for stream in &mut before {
        stream.write_all(b"on").unwrap();
        stream.read_exact(&mut [0; 2]).unwrap();
    }
    // Later ones are the mesh's, by whatever way.
    let sc = bed.enrol(&mut agent, &c);
    agent.verdicts(&[(sa, sc, PairVerdict::Allow), (sc, sa, PairVerdict::Allow)]);
    let _of_c = bed.serve(&c, 8080);
    let mut later = Vec::new();
    for six in BOTH {
        for (from, to) in [(&a, &b), (&a, &c), (&c, &a), (&out, &a)] {
            later.push(from.greeted(SocketAddr::new(to.ip(six), 8080)).unwrap().0);
        }
    }
    assert_eq!(agent.count(Reason::Direct), 4);
    let all = told(&agent);
    assert!(all.is_superset(&wanted));
    for flow in agent.kernel.direct_flows().unwrap() {
        assert!(!all.iter().any(|(local, remote, _)| {
            [(flow.src, flow.dst), (flow.dst, flow.src)].contains(&(*local, *remote))
        }));
    }
    for unseen in agent.kernel.unseen(sa).unwrap().iter().filter(|unseen| unseen.accepted) {
        if wanted.contains(&(unseen.local, unseen.remote, true)) {
            assert!(agent.kernel.end_unseen(sa, unseen).unwrap());
            assert!(!agent.kernel.end_unseen(sa, unseen).unwrap());
        }
    }
    for (index, stream) in before.iter_mut().enumerate() {
        let alive = stream.write_all(b"x").is_ok() && stream.read_exact(&mut [0]).is_ok();
        assert_eq!(alive, !matches!(index, 0 | 3), "{index}");
    }
}

#[test]
fn what_a_listener_accepted_before_it_closed_counts_as_accepted() {
    let bed = Bed::new();
    let (a, b, out) = (bed.pod("a"), bed.pod("b"), bed.outside());
    // The second port is one of those that clients get.
    let (of_a, also_of_a, _of_b) = (bed.serve(&a, 8080), bed.serve(&a, 50051), bed.serve(&b, 8080));
    let (mut open, mut wanted) = (Vec::new(), BTreeSet::new());
    for six in BOTH {
        for port in [8080, 50051] {
            let (stream, seen) = out.greeted(SocketAddr::new(a.ip(six), port)).unwrap();
            wanted.insert((SocketAddr::new(a.ip(six), port), seen, true));
            open.push(stream);
        }
        let (stream, seen) = a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        wanted.insert((seen, SocketAddr::new(b.ip(six), 8080), false));
        open.push(stream);
    }
    drop((of_a, also_of_a));
    let mut agent = bed.agent();
    let slot = bed.enrol(&mut agent, &a);
    let unseen = agent.kernel.unseen(slot).unwrap();
    let told: BTreeSet<_> = unseen.iter().map(|one| (one.local, one.remote, one.accepted)).collect();
    assert_eq!(told, wanted);
}
