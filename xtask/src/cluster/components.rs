//! (pure) The programs of Kubernetes: their arguments, and the files that they read.

use std::{collections::BTreeMap, path::PathBuf};

use serde_json::json;

use super::{
    plan::{Place, Plan},
    rootfs::BIN,
    unit::Unit,
};

/// The image of pods' first process. Its name is complete, or a pull is tried.
pub const PAUSE_IMAGE: &str = "docker.io/undermesh-test/pause:1";
/// The image of cluster DNS.
pub const COREDNS_IMAGE: &str = "docker.io/undermesh-test/coredns:1";
/// The programs, and the names under which they are called.
pub const NAMES: &[&str] = &[
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];
/// Where a machine has its certificates and configuration.
const CONFIG: &str = "/etc/kubernetes";
const ETCD: &str = "http://127.0.0.1:2379";
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";

/// Certificates of one cluster, as our program `pki` takes the order.
pub fn certificates(plan: Plan, folder: &std::path::Path) -> serde_json::Value {
    let control = plan.control();
    let certificate = |name: &str, common_name: &str, organizations: &[&str], hosts: &[String]| json!({"name": name, "common_name": common_name, "organizations": organizations, "hosts": hosts});
    let mut hosts: Vec<String> =
        ["kubernetes.default.svc", "kubernetes.default", "kubernetes", "localhost", "127.0.0.1"]
            .map(str::to_owned)
            .into();
    hosts.extend([control.v4.to_string(), control.v6.to_string(), plan.first_service().to_string()]);
    let mut all = vec![
        certificate("apiserver", "kube-apiserver", &[], &hosts),
        certificate("admin", "admin", &["system:masters"], &[]),
        certificate("controllers", "system:kube-controller-manager", &[], &[]),
        certificate("scheduler", "system:kube-scheduler", &[], &[]),
        certificate("proxy", "system:kube-proxy", &[], &[]),
    ];
    for node in plan.places().into_iter().filter(|place| place.node.is_some()) {
        let hosts = [node.name.to_owned(), node.v4.to_string(), node.v6.to_string()];
        let common_name = format!("system:node:{}", node.name);
        all.push(certificate(node.name, &common_name, &["system:nodes"], &hosts));
    }
    json!({"folder": folder, "server": plan.server(), "certificates": all})
}

/// The order of one certificate, of no cluster.
pub fn server_certificate(folder: &std::path::Path, host: &str) -> serde_json::Value {
    json!({
        "folder": folder,
        "certificates": [{"name": "server", "common_name": host, "hosts": [host]}],
    })
}

/// Which of the order's files a machine gets, and under which name.
pub fn credentials(place: &Place) -> Vec<(String, PathBuf)> {
    let named = |file: &str, inside: &str| (file.to_owned(), PathBuf::from(format!("{CONFIG}/{inside}")));
    if place.node.is_none() {
        let files = [
            "ca.crt",
            "ca.key",
            "sa.key",
            "sa.pub",
            "apiserver.crt",
            "apiserver.key",
            "admin.crt",
            "admin.key",
        ];
        let configs = ["controllers.kubeconfig", "scheduler.kubeconfig"];
        return files.iter().chain(&configs).map(|file| named(file, file)).collect();
    }
    vec![
        named("ca.crt", "ca.crt"),
        named(&format!("{}.crt", place.name), "kubelet.crt"),
        named(&format!("{}.key", place.name), "kubelet.key"),
        named(&format!("{}.kubeconfig", place.name), "kubelet.kubeconfig"),
        named("proxy.kubeconfig", "proxy.kubeconfig"),
    ]
}

/// The control machine's programs, in the order in which they start.
pub fn etcd() -> Unit {
    unit(
        "etcd",
        &[
            ("data-dir", "/var/lib/etcd"),
            ("listen-client-urls", ETCD),
            ("advertise-client-urls", ETCD),
            ("listen-peer-urls", "http://127.0.0.1:2380"),
            ("log-level", "warn"),
        ],
    )
}

/// The API server.
pub fn api_server(plan: Plan) -> Unit {
    let file = |name: &str| format!("{CONFIG}/{name}");
    unit(
        "kube-apiserver",
        &[
            ("etcd-servers", ETCD),
            ("advertise-address", &plan.control().v4.to_string()),
            ("secure-port", "6443"),
            ("service-cluster-ip-range", &plan.services()),
            ("service-account-issuer", "https://kubernetes.default.svc"),
            ("service-account-key-file", &file("sa.pub")),
            ("service-account-signing-key-file", &file("sa.key")),
            ("client-ca-file", &file("ca.crt")),
            ("tls-cert-file", &file("apiserver.crt")),
            ("tls-private-key-file", &file("apiserver.key")),
            ("kubelet-client-certificate", &file("admin.crt")),
            ("kubelet-client-key", &file("admin.key")),
            ("kubelet-certificate-authority", &file("ca.crt")),
            ("kubelet-preferred-address-types", "InternalIP"),
            ("authorization-mode", "Node,RBAC"),
            ("enable-admission-plugins", "NodeRestriction"),
            ("allow-privileged", "true"),
            // Webhooks are reached at their pods: there is no kube-proxy beside the API server.
            ("enable-aggregator-routing", "true"),
        ],
    )
}

/// The controllers.
pub fn controller_manager() -> Unit {
    let file = |name: &str| format!("{CONFIG}/{name}");
    unit(
        "kube-controller-manager",
        &[
            ("kubeconfig", &file("controllers.kubeconfig")),
            ("service-account-private-key-file", &file("sa.key")),
            ("root-ca-file", &file("ca.crt")),
            ("cluster-signing-cert-file", &file("ca.crt")),
            ("cluster-signing-key-file", &file("ca.key")),
            ("use-service-account-credentials", "true"),
            ("leader-elect", "false"),
        ],
    )
}

/// The scheduler.
pub fn scheduler() -> Unit {
    let config = format!("{CONFIG}/scheduler.kubeconfig");
    unit("kube-scheduler", &[("kubeconfig", &config), ("leader-elect", "false")])
}

/// The container runtime, from Debian.
pub fn containerd() -> Unit {
    let argv = ["/usr/bin/containerd", "--config", CONTAINERD_CONFIG].map(str::to_owned).into();
    Unit { name: "containerd".into(), argv, env: BTreeMap::new() }
}

/// The kubelet of a node.
pub fn kubelet(place: &Place) -> Unit {
    unit(
        "kubelet",
        &[
            ("config", &format!("{CONFIG}/kubelet.json")),
            ("kubeconfig", &format!("{CONFIG}/kubelet.kubeconfig")),
            ("root-dir", "/var/lib/kubelet"),
            ("hostname-override", place.name),
            ("node-ip", &format!("{},{}", place.v4, place.v6)),
        ],
    )
}

/// The proxy of a node.
pub fn proxy(plan: Plan, place: &Place) -> Unit {
    unit(
        "kube-proxy",
        &[
            ("kubeconfig", &format!("{CONFIG}/proxy.kubeconfig")),
            ("hostname-override", place.name),
            ("proxy-mode", "nftables"),
            ("cluster-cidr", &plan.all_pods()),
            // The kernel's limits of connection tracking stay as they are.
            ("conntrack-max-per-core", "0"),
            ("conntrack-tcp-timeout-established", "0"),
            ("conntrack-tcp-timeout-close-wait", "0"),
        ],
    )
}

fn unit(name: &str, flags: &[(&str, &str)]) -> Unit {
    let flags = flags.iter().map(|(flag, value)| format!("--{flag}={value}"));
    let argv = std::iter::once(format!("{BIN}/{name}")).chain(flags).collect();
    Unit { name: name.to_owned(), argv, env: BTreeMap::new() }
}

/// Files that a machine's programs read, besides its credentials.
pub fn files(plan: Plan, place: &Place, cgroup: &str) -> BTreeMap<PathBuf, String> {
    let mut files = BTreeMap::from([
        (PathBuf::from("/etc/hosts"), hosts(plan)),
        (PathBuf::from("/etc/resolv.conf"), String::new()),
        (PathBuf::from("/etc/hostname"), format!("{}\n", place.name)),
        (PathBuf::from("/etc/machine-id"), format!("{:030x}{:02x}\n", plan.index, place.v4.octets()[3])),
    ]);
    if let Some(node) = place.node {
        files.insert("/etc/containerd/config.toml".into(), containerd_config());
        files.insert(format!("{CONFIG}/kubelet.json").into(), kubelet_config(plan, place, cgroup));
        files.insert("/etc/cni/net.d/10-cluster.conflist".into(), network_config(plan, node));
    }
    files
}

fn hosts(plan: Plan) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    for place in plan.places() {
        text += &format!("{} {}\n", place.v4, place.name);
    }
    text
}

fn containerd_config() -> String {
    // Without CAP_SYS_RESOURCE, which containers lack, scores of pods cannot be lowered: runc would fail.
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{PAUSE_IMAGE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"#
    )
}

fn kubelet_config(plan: Plan, place: &Place, cgroup: &str) -> String {
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{CONFIG}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{CONFIG}/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{CONFIG}/kubelet.key"),
        "address": place.v4,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{cgroup}"),
        "clusterDomain": "cluster.local",
        "clusterDNS": [plan.dns()],
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "failCgroupV1": false,
        "failSwapOn": false,
        // Images that were loaded cannot be pulled again.
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": false,
        "oomScoreAdj": 0,
        "resolvConf": "/etc/resolv.conf",
        "volumePluginDir": "/var/lib/kubelet/plugins",
    });
    config.to_string()
}

fn network_config(plan: Plan, node: u8) -> String {
    let ranges: Vec<_> = plan.pods(node).iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    let config = json!({
        "cniVersion": "0.4.0",
        "name": "cluster",
        "plugins": [{
            "type": "ptp",
            "mtu": 1500,
            "ipam": {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]},
        }],
    });
    config.to_string()
}

/// Kernel parameters of a machine's network.
pub fn sysctls(place: &Place) -> BTreeMap<String, String> {
    let forward = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];
    let forward = forward.iter().filter(|_| place.node.is_some());
    forward.map(|name| ((*name).to_owned(), "1".to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_gets_no_credentials_but_its_own() {
        let plan = Plan { index: 0 };
        let places = plan.places();
        let files: Vec<_> = credentials(&places[1]).into_iter().map(|(file, _)| file).collect();
        assert_eq!(files, ["ca.crt", "node-a.crt", "node-a.key", "node-a.kubeconfig", "proxy.kubeconfig"]);
    }

    #[test]
    fn the_pods_of_a_node_have_both_families() {
        let config: serde_json::Value =
            serde_json::from_str(&network_config(Plan { index: 2 }, 1)).expect("JSON");
        let subnet = |at: usize| config["plugins"][0]["ipam"]["ranges"][at][0]["subnet"].clone();
        assert_eq!((subnet(0), subnet(1)), (json!("10.102.1.0/24"), json!("fd44:2:1::/64")));
    }
}
