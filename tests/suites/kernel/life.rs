//! Agents and pods that come, go, die and come again.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::Path,
};

use mesh_ebpf_common::reason::Reason;
use mesh_node::kernel::{CleanWhat, Kernel, KernelError, PairVerdict, Release, SOCK_DESTROY, clean};

use crate::{
    BOTH,
    bed::{Bed, Door, until},
};

#[test]
fn a_start_reports_what_it_found_and_a_second_agent_of_the_node_is_refused() {
    let bed = Bed::new();
    let (_kernel, report) = Kernel::open(&bed.config()).unwrap();
    assert!(report.features.iter().all(|feature| feature.found), "{report:?}");
    assert!(report.has(SOCK_DESTROY) && !report.reused && report.cgroup.is_dir());
    assert!(matches!(Kernel::open(&bed.config()), Err(KernelError::Busy { .. })));
    assert!(matches!(
        clean(Path::new("/sys/fs/bpf"), CleanWhat::Node(&bed.node)),
        Err(KernelError::Busy { .. })
    ));
}

#[test]
fn two_agents_on_one_kernel_know_only_their_own_pods() {
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let (mut one, mut two) = (bed.agent(), bed.other_agent());
    let (sa, sb) = (bed.enrol(&mut one, &a), bed.enrol(&mut two, &b));
    // A verdict about a pod of the other node does not make it local.
    one.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let _server = bed.serve(&b, 8080);
    for six in BOTH {
        let (_, seen) = a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        assert_eq!(seen.ip(), a.ip(six));
    }
    assert_eq!((one.seen(Door::Outbound).len(), one.seen(Door::Plaintext).len()), (2, 0));
    assert_eq!((two.seen(Door::Outbound).len(), two.seen(Door::Plaintext).len()), (0, 2));
}

#[test]
fn a_dead_agent_leaves_direct_flows_alone_and_refuses_the_rest() {
    let bed = Bed::new();
    let (a, b, out) = (bed.pod("a"), bed.pod("b"), bed.outside());
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    let _server = bed.serve(&b, 8080);
    let outside = bed.serve(&out, 8081);
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let (mut live, _) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    agent.die();
    for six in BOTH {
        // A live flow, new ones, and calls to oneself go on.
        live.write_all(b"x").unwrap();
        live.read_exact(&mut [0]).unwrap();
        a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        b.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        // To the agent, and arrivals: refused, and at once.
        let refused = |result: std::io::Result<_>| result.map(drop).unwrap_err().kind();
        assert_eq!(refused(a.dial(SocketAddr::new(out.ip(six), 8081))), std::io::ErrorKind::PermissionDenied);
        assert_eq!(
            refused(out.dial(SocketAddr::new(b.ip(six), 8080))),
            std::io::ErrorKind::ConnectionRefused
        );
    }
    assert!(outside.accepted().is_empty());

    // The next process takes over: same programs, pods known, counters go on, direct flows live.
    let (kernel, report) = bed.reopen();
    assert!(report.reused);
    let held = kernel.pods().unwrap();
    assert!(
        held.iter().any(|pod| pod.uid == a.uid && pod.slot == sa && pod.ips.contains(&a.v6) && !pod.served)
    );
    assert_eq!(kernel.direct_flows().unwrap().len(), 1);
    assert!(kernel.counters().unwrap().get(Reason::Direct) >= 3);
    let mut agent = bed.agent_of(kernel);
    assert_eq!((bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b)), (sa, sb));
    assert_eq!(a.greeted(SocketAddr::new(out.v4, 8081)).unwrap().1.ip(), a.v4);
    live.write_all(b"x").unwrap();
    live.read_exact(&mut [0]).unwrap();
    // And can cut what it has taken over.
    agent.verdicts(&[]);
    assert!(live.read(&mut [0]).is_err());
}

#[test]
fn another_object_replaces_the_programs_in_place() {
    let bed = Bed::new();
    let (a, b, out) = (bed.pod("a"), bed.pod("b"), bed.outside());
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    let _server = bed.serve(&b, 8080);
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let (mut live, _) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    let programs = bed.linked_programs();
    agent.die();
    bed.forget_object();
    let (kernel, report) = bed.reopen();
    assert!(!report.reused);
    let replaced = bed.linked_programs();
    assert_eq!(replaced.keys().collect::<Vec<_>>(), programs.keys().collect::<Vec<_>>(), "the same links");
    assert!(replaced.iter().all(|(link, program)| programs[link] != *program), "with other programs");
    live.write_all(b"x").unwrap();
    live.read_exact(&mut [0]).unwrap();
    for six in BOTH {
        a.greeted(SocketAddr::new(b.ip(six), 8080)).unwrap();
        assert!(out.dial(SocketAddr::new(b.ip(six), 8080)).is_err(), "still enforced");
    }
    let mut agent = bed.agent_of(kernel);
    bed.enrol(&mut agent, &b);
    out.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    assert_eq!(agent.seen(Door::Plaintext).len(), 1, "once, not by two programs");
}

#[test]
fn a_deleted_pod_leaves_nothing_and_its_connections_end() {
    let bed = Bed::new();
    let (a, b, mut agent, (sa, sb)) = bed.pair();
    let _server = bed.serve(&b, 8080);
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let (mut stream, _) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    agent.kernel.release(sb, Release::Deleted).unwrap();
    assert!(stream.read(&mut [0]).is_err(), "cut");
    agent.kernel.release(sa, Release::Deleted).unwrap();
    let counters = agent.kernel.counters().unwrap();
    for map in ["PODS", "LOCAL", "VERDICTS", "FLOWS", "OWN_FLOWS"] {
        assert_eq!(counters.maps[map].entries, 0, "{map}");
    }
    assert!(agent.kernel.pods().unwrap().is_empty());
    // Not captured any more.
    let (stream, seen) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    assert_eq!(stream.local_addr().unwrap(), seen);
    agent.kernel.release(sb, Release::Deleted).unwrap();
    // A new pod never gets an old number.
    assert!(bed.enrol(&mut agent, &bed.pod("c")).id > sb.id);
}

#[test]
fn a_pod_that_leaves_keeps_its_direct_connections() {
    let bed = Bed::new();
    let (a, b, agent, (sa, sb)) = bed.pair();
    let _server = bed.serve(&b, 8080);
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    let (mut stream, _) = a.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    agent.kernel.release(sb, Release::Leave).unwrap();
    // Reached as before, at once.
    let out = bed.outside();
    let (again, seen) = out.greeted(SocketAddr::new(b.v4, 8080)).unwrap();
    assert_eq!(again.local_addr().unwrap(), seen);
    agent.verdicts(&[]);
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    drop(stream);
    until("the record to go", || agent.kernel.direct_flows().unwrap().is_empty());
}

/// An address that goes to another pod takes nothing of the former one with it (IP reuse).
#[test]
fn a_reused_address_carries_no_old_permission() {
    let bed = Bed::new();
    let (a, b, c) = (bed.pod("a"), bed.pod("b"), bed.pod("c"));
    let mut agent = bed.agent();
    let (sa, sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    agent.verdicts(&[(sa, sb, PairVerdict::Allow)]);
    // `b` is gone without a release; `c` has its addresses now.
    bed.take_addresses(&b, &c);
    let c = crate::bed::Pod { v4: b.v4, v6: b.v6, ..c };
    let generation = agent.kernel.generation().unwrap();
    bed.enrol(&mut agent, &c);
    assert!(agent.kernel.generation().unwrap() > generation);
    let server = bed.serve(&c, 8080);
    for six in BOTH {
        a.greeted(SocketAddr::new(c.ip(six), 8080)).unwrap();
    }
    // Through the agent, which asks the policies for the new pod.
    assert_eq!(
        (agent.count(Reason::Direct), agent.seen(Door::Outbound).len(), server.accepted().len()),
        (0, 2, 2)
    );
}

#[test]
fn clean_removes_every_pin() {
    let bed = Bed::new();
    let a = bed.pod("a");
    let mut agent = bed.agent();
    bed.enrol(&mut agent, &a);
    let pins = Path::new("/sys/fs/bpf/undermesh").join(mesh_ebpf_common::LAYOUT).join(&bed.node);
    assert!(pins.join("links/connect4").exists() && pins.join("maps/FLOWS").exists());
    agent.die();
    let mut removed = Vec::new();
    until("the agent to be gone", || {
        removed = clean(Path::new("/sys/fs/bpf"), CleanWhat::Node(&bed.node)).unwrap_or_default();
        !removed.is_empty()
    });
    assert_eq!(removed, std::slice::from_ref(&pins));
    assert!(!pins.exists());
    // Nothing captures the pod any more.
    let out = bed.outside();
    let served = bed.serve(&out, 8080);
    let (stream, seen) = a.greeted(SocketAddr::new(out.v4, 8080)).unwrap();
    assert_eq!((seen, served.accepted().len()), (stream.local_addr().unwrap(), 1));
}
