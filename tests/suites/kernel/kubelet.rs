//! Probes of the kubelet: told by its cgroup and the node's namespace, and only to declared ports.

use std::{
    fs, io,
    net::SocketAddr,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use mesh_ebpf_common::reason::Reason;
use mesh_node::kernel::{KernelState, Kubelet, PodSlot};

use crate::{
    BOTH,
    bed::{Agent, Bed, Door, Pod, within},
};

/// A cgroup v2 of this test.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bed: &Bed, name: &str) -> Self {
        let root = mesh_node::kernel::probe(&bed.config()).unwrap().cgroup;
        let path = root.join(format!("{}-{name}", bed.node));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn number(&self) -> u64 {
        fs::metadata(&self.0).unwrap().ino()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its last process may only just have ended.
        crate::bed::until("the cgroup to be empty", || fs::remove_dir(&self.0).is_ok());
    }
}

/// Connects in a process of that name in a cgroup and a namespace; what the server greets with.
fn greeted(name: &str, cgroup: &Path, netns: &Path, to: SocketAddr) -> io::Result<SocketAddr> {
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec nsenter --net={} bash -c 'exec -a {name} bash -c \"exec 3<>/dev/tcp/{}/{} && \
         read -t 5 line <&3 && echo \\$line\"'",
        cgroup.display(),
        netns.display(),
        to.ip(),
        to.port()
    );
    let output = Command::new("bash").args(["-c", &script]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim()
        .parse()
        .map_err(|_| io::Error::other(format!("{text:?} {}", String::from_utf8_lossy(&output.stderr))))
}

fn cookie(netns: &Path) -> u64 {
    const SO_NETNS_COOKIE: i32 = 71;
    within(netns, || {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (mut value, mut length) = (0_u64, 8);
        // SAFETY: the kernel writes at most eight bytes into `value`.
        let result = unsafe {
            nix::libc::getsockopt(
                socket.as_raw_fd(),
                nix::libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        value
    })
}

fn declare(agent: &Agent, pod: PodSlot, port: u16) {
    let probes = [(pod.id, port)].into();
    agent.kernel.sync(&KernelState { probes, ..KernelState::default() }).unwrap();
}

#[test]
fn probes_reach_declared_ports_and_nobody_else_s_connection_does() {
    let bed = Bed::new();
    let (a, b, other, host) = (bed.pod("a"), bed.pod("b"), bed.pod("c"), bed.outside());
    let (kubelet, stranger) = (Cgroup::new(&bed, "kubelet"), Cgroup::new(&bed, "stranger"));
    let mut agent = bed.agent();
    let (sa, _sb) = (bed.enrol(&mut agent, &a), bed.enrol(&mut agent, &b));
    let (declared, undeclared, of_b) = (bed.serve(&a, 8080), bed.serve(&a, 9090), bed.serve(&b, 8080));
    declare(&agent, sa, 8080);
    let known = Kubelet { node_netns: cookie(&host.netns), cgroup: kubelet.number() };
    agent.kernel.set_kubelet(Some(known)).unwrap();
    let plaintext = || agent.seen(Door::Plaintext).len();
    let probed = |six: bool| {
        let (before, let_in) = (plaintext(), agent.count(Reason::LookupProbe));
        let seen = greeted("probe", &kubelet.0, &host.netns, SocketAddr::new(a.ip(six), 8080)).unwrap();
        assert_eq!(seen.ip(), host.ip(six));
        (plaintext() - before, agent.count(Reason::LookupProbe) - let_in)
    };
    for six in BOTH {
        assert_eq!(probed(six), (0, 1), "straight to the application");
        let meets_the_agent = |what: &str, name: &str, cgroup: &Cgroup, from: &Pod, to: SocketAddr| {
            let (before, let_in) = (plaintext(), agent.count(Reason::LookupProbe));
            greeted(name, &cgroup.0, &from.netns, to).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!((plaintext() - before, agent.count(Reason::LookupProbe) - let_in), (1, 0), "{what}");
        };
        let to = SocketAddr::new(a.ip(six), 8080);
        meets_the_agent("another process of the host", "sh", &stranger, &host, to);
        meets_the_agent("one that is called so", "kubelet", &stranger, &host, to);
        meets_the_agent("the cgroup in another namespace", "kubelet", &kubelet, &other, to);
        meets_the_agent("another port", "kubelet", &kubelet, &host, SocketAddr::new(a.ip(six), 9090));
        meets_the_agent("another pod", "kubelet", &kubelet, &host, SocketAddr::new(b.ip(six), 8080));
    }
    assert!(
        !declared.accepted().is_empty() && !undeclared.accepted().is_empty() && !of_b.accepted().is_empty()
    );
    // The declaration goes, comes back, and goes with the pod.
    agent.kernel.sync(&KernelState::default()).unwrap();
    assert_eq!(probed(false), (1, 0));
    declare(&agent, sa, 8080);
    assert_eq!(probed(false), (0, 1));
    agent.kernel.set_kubelet(None).unwrap();
    assert_eq!(probed(false), (1, 0));
    crate::bed::until("the records to go", || agent.kernel.counters().unwrap().maps["FLOWS"].entries == 0);
    agent.kernel.release(sa, mesh_node::kernel::Release::Deleted).unwrap();
    assert_eq!(agent.kernel.counters().unwrap().maps["PROBES"].entries, 0);
}
