//! Names and addresses of a cluster, all derived from its index: the clusters of one machine never share one.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Clusters that fit side by side on one machine.
pub const MOST: u8 = 64;
/// The machine of etcd, API server, controller manager and scheduler.
pub const CONTROL: &str = "control";
/// The nodes.
pub const NODES: [&str; 2] = ["node-a", "node-b"];

/// The addresses of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Which of the clusters of this machine it is.
    pub index: u8,
}

/// One machine of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub name: &'static str,
    /// Address on the network between the machines.
    pub v4: Ipv4Addr,
    /// The same, IPv6.
    pub v6: Ipv6Addr,
    /// For nodes, their number, from 1.
    pub node: Option<u8>,
}

impl Plan {
    /// (pure) The control machine, then the nodes.
    pub fn places(self) -> Vec<Place> {
        let place = |name, host: u8, node| Place {
            name,
            v4: self.host_v4(host),
            v6: Ipv6Addr::new(0xfd53, self.index.into(), 0, 0, 0, 0, 0, host.into()),
            node,
        };
        let control = place(CONTROL, 10, None);
        let nodes = (1_u8..).zip(NODES).map(|(number, name)| place(name, 10 + number, Some(number)));
        std::iter::once(control).chain(nodes).collect()
    }

    /// (pure) The control machine.
    pub fn control(self) -> Place {
        self.places()[0]
    }

    fn host_v4(self, host: u8) -> Ipv4Addr {
        // The range for benchmarks: no network that this machine talks to has it.
        Ipv4Addr::new(198, 19, self.index, host)
    }

    /// (pure) Where the machine itself is on the network between the machines.
    pub fn root_v4(self) -> Ipv4Addr {
        self.host_v4(1)
    }

    /// (pure) The API server, reached from everywhere.
    pub fn server(self) -> String {
        format!("https://{}:6443", self.control().v4)
    }

    /// (pure) Pod addresses of a node.
    pub fn pods(self, node: u8) -> [String; 2] {
        [format!("10.{}.{node}.0/24", 100 + self.index), format!("fd44:{:x}:{node}::/64", self.index)]
    }

    /// (pure) Pod addresses of all nodes.
    pub fn all_pods(self) -> String {
        format!("10.{}.0.0/16,fd44:{:x}::/32", 100 + self.index, self.index)
    }

    /// (pure) Addresses of services.
    pub fn services(self) -> String {
        format!("10.{}.0.0/16,fd96:{:x}::/112", 180 + self.index, self.index)
    }

    /// (pure) The first service: the API server's.
    pub fn first_service(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 180 + self.index, 0, 1)
    }

    /// (pure) Cluster DNS.
    pub fn dns(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 180 + self.index, 0, 10)
    }

    /// (pure) The link from this machine to the cluster's network.
    pub fn link(self) -> String {
        format!("um-cluster{}", self.index)
    }

    /// (pure) The cgroup that holds all of the cluster.
    pub fn cgroup(self) -> String {
        format!("undermesh-cluster{}", self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_share_no_address() {
        let seen: Vec<_> = (0..MOST)
            .map(|index| Plan { index })
            .flat_map(|plan| {
                let own = [plan.server(), plan.all_pods(), plan.services(), plan.link(), plan.cgroup()];
                own.into_iter().chain(plan.places().into_iter().map(|place| place.v6.to_string()))
            })
            .collect();
        let mut unique = seen.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(seen.len(), unique.len());
    }

    #[test]
    fn the_last_cluster_has_valid_addresses() {
        let plan = Plan { index: MOST - 1 };
        assert_eq!(plan.pods(2), ["10.163.2.0/24", "fd44:3f:2::/64"]);
        assert_eq!(plan.services(), "10.243.0.0/16,fd96:3f::/112");
        assert!(plan.link().len() < 16, "a link's name has at most 15 characters");
    }
}
