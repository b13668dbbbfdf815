//! Namespaces joined to a network: the wire between nodes, a bridge per node, a veth per pod.
//!
//! ```text
//!   fabric   wire0 (bridge) 172.30.0.1      mesh-control
//!              │n1        │n2
//!   node-1   eth0       eth0  node-2        172.30.0.11, .12
//!            pods0      pods0               10.244.1.1, 10.244.2.1 (bridge, gateway of the pods)
//!            │p2 │p3    │p2
//!   pods    eth0 eth0  eth0                 10.244.1.2, 10.244.1.3, 10.244.2.2
//! ```
//! Nothing of it is in the machine's own namespace. The scripts are pure; [`batch`] hands them to `ip`.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Write as _},
    net::IpAddr,
    path::Path,
    process::{Command, Stdio},
};

use nix::sched::{CloneFlags, setns};

use super::address::{CONTROL, CONTROL_V6, NodeNet, SERVICES, SERVICES_V6};

/// Bytes of a frame's payload; what most networks have.
const MTU: u32 = 1500;
/// The bridge of the pods of a node.
pub const POD_BRIDGE: &str = "pods0";

/// Why a namespace could not be joined to the network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace could not be entered.
    #[error("enter {path}")]
    Enter {
        /// The namespace.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `ip` could not be started.
    #[error("run `ip` (package iproute2; `cargo xtask setup` installs it)")]
    Missing(#[source] io::Error),
    /// `ip` refused.
    #[error("ip -batch: {0}")]
    Refused(String),
    /// A kernel setting could not be written.
    #[error("write {path}")]
    Sysctl {
        /// The setting.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Runs `work` on a short-lived thread inside the network namespace at `path`, so that the caller never moves.
///
/// # Errors
/// When the namespace cannot be entered, or what `work` fails with.
pub fn within<T: Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let enter = |source: io::Error| NetworkError::Enter { path: path.display().to_string(), source };
    let namespace = File::open(path).map_err(enter)?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| enter(errno.into()))?;
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Writes settings, then runs `script` through `ip -batch`. Settings that new devices inherit have to be there before
/// the devices are: a device that waits for duplicate addresses is deaf to IPv6 for its first second.
///
/// # Errors
/// When the namespace cannot be entered, or `ip` refuses a line.
pub fn batch(netns: &Path, sysctls: &[(&'static str, &str)], script: &str) -> Result<(), NetworkError> {
    within(netns, || {
        for (path, value) in sysctls {
            fs::write(path, value).map_err(|source| NetworkError::Sysctl { path, source })?;
        }
        if script.is_empty() {
            return Ok(());
        }
        let mut child = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(NetworkError::Missing)?;
        // A script is far smaller than a pipe, so this cannot block; it is closed when `stdin` is dropped.
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(script.as_bytes());
        }
        let output = child.wait_with_output().map_err(NetworkError::Missing)?;
        if output.status.success() {
            return Ok(());
        }
        Err(NetworkError::Refused(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")))
    })
}

/// Settings of every namespace: nobody answers router advertisements or waits for duplicate addresses.
pub const QUIET: &[(&str, &str)] = &[
    ("/proc/sys/net/ipv6/conf/all/accept_dad", "0"),
    ("/proc/sys/net/ipv6/conf/default/accept_dad", "0"),
    ("/proc/sys/net/ipv6/conf/default/accept_ra", "0"),
    ("/proc/sys/net/ipv6/conf/default/router_solicitations", "0"),
    ("/proc/sys/net/ipv4/conf/all/rp_filter", "0"),
    ("/proc/sys/net/ipv4/conf/default/rp_filter", "0"),
];

/// Settings of a node besides [`QUIET`]: it forwards, and its service proxy may bind service addresses.
pub const FORWARD: &[(&str, &str)] = &[
    ("/proc/sys/net/ipv4/ip_forward", "1"),
    ("/proc/sys/net/ipv6/conf/all/forwarding", "1"),
    ("/proc/sys/net/ipv6/ip_nonlocal_bind", "1"),
    // A gateway that tells its pods of shorter ways would make them cache routes.
    ("/proc/sys/net/ipv4/conf/all/send_redirects", "0"),
    ("/proc/sys/net/ipv4/conf/default/send_redirects", "0"),
];

/// The wire: a bridge that carries the control plane's address.
pub fn fabric() -> String {
    format!(
        "link set lo up\nlink add wire0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set wire0 mtu \
         {MTU} up\naddr add {CONTROL}/24 dev wire0\naddr add {CONTROL_V6}/64 dev wire0 nodad\n"
    )
}

/// In the fabric: a port for a node, and the routes to its pods. `pid` is a process of the node's namespace.
pub fn plug_node(net: NodeNet, pid: u32) -> String {
    let (v4, v6) = net.wire();
    let (pods4, pods6) = net.ranges();
    let port = format!("n{}", net.0);
    format!(
        "link add {port} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {pid}\nlink set {port} master wire0 \
         up\nroute replace {pods4} via {v4}\nroute replace {pods6} via {v6}\n"
    )
}

/// In the fabric: the node is gone. Its port vanished with its namespace.
pub fn unplug_node(net: NodeNet) -> String {
    let (pods4, pods6) = net.ranges();
    format!("route flush {pods4}\nroute flush {pods6}\n")
}

/// In the node, after [`plug_node`].
pub fn node(net: NodeNet) -> String {
    let (wire4, wire6) = net.wire();
    let (gateway4, gateway6) = net.pod(1);
    format!(
        "link set lo up\naddr add {wire4}/24 dev eth0\naddr add {wire6}/64 dev eth0 nodad\nlink set eth0 up\nlink add \
         {POD_BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set {POD_BRIDGE} mtu {MTU} \
         up\naddr add {gateway4}/24 dev {POD_BRIDGE}\naddr add {gateway6}/64 dev {POD_BRIDGE} nodad\nroute add local \
         {SERVICES} dev lo\nroute add local {SERVICES_V6} dev lo\n"
    )
}

/// In a node: the way to another node's pods.
pub fn way(to: NodeNet) -> String {
    let (v4, v6) = to.wire();
    let (pods4, pods6) = to.ranges();
    format!("route replace {pods4} via {v4}\nroute replace {pods6} via {v6}\n")
}

/// In a node: service addresses that lie outside of the mesh's own range.
pub fn own_addresses(vips: &[IpAddr]) -> String {
    vips.iter().fold(String::new(), |mut script, vip| {
        // Writing to a String cannot fail.
        let _ = writeln!(script, "route replace local {vip} dev lo");
        script
    })
}

/// In a node: a port of its bridge for a pod, whose namespace `pid` is in.
pub fn plug_pod(index: u8, pid: u32) -> String {
    let port = format!("p{index}");
    format!(
        "link add {port} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {pid}\nlink set {port} master {POD_BRIDGE} \
         up\n"
    )
}

/// In the pod, after [`plug_pod`].
pub fn pod(net: NodeNet, index: u8) -> String {
    let (v4, v6) = net.pod(index);
    let (gateway4, gateway6) = net.pod(1);
    format!(
        "link set lo up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\nroute add \
         0.0.0.0/0 via {gateway4}\nroute add ::/0 via {gateway6}\n"
    )
}
