//! (pure) Addresses: of nodes on the wire, of pods per node, of services.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::expand::Key;

/// The most nodes that a local mesh can have.
pub const MAX_NODES: u8 = 200;
/// The control plane's address on the wire.
pub const CONTROL: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);
/// The control plane's IPv6 address on the wire.
pub const CONTROL_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 1);
/// Range of service addresses.
pub const SERVICES: &str = "10.96.0.0/16";
/// Range of IPv6 service addresses.
pub const SERVICES_V6: &str = "fd00:96::/112";

/// The addresses of one node; everything follows from its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeNet(pub u8);

impl NodeNet {
    /// On the wire between nodes, `/24` and `/64`.
    pub fn wire(self) -> (Ipv4Addr, Ipv6Addr) {
        let last = 10 + self.0;
        (Ipv4Addr::new(172, 30, 0, last), Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, u16::from(last)))
    }

    /// A pod of this node; 1 is the node itself, as its pods' gateway.
    pub fn pod(self, index: u8) -> (Ipv4Addr, Ipv6Addr) {
        let v6 = Ipv6Addr::new(0xfd00, 0x244, u16::from(self.0), 0, 0, 0, 0, u16::from(index));
        (Ipv4Addr::new(10, 244, self.0, index), v6)
    }

    /// The ranges of this node's pods.
    pub fn ranges(self) -> (String, String) {
        (format!("10.244.{}.0/24", self.0), format!("fd00:244:{:x}::/64", self.0))
    }
}

/// Why there is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    /// All numbers of nodes are taken.
    #[error("a local mesh has at most {MAX_NODES} nodes")]
    Nodes,
    /// All addresses of the node's pods are taken.
    #[error("node {0} has no pod address left")]
    Pods(String),
    /// All service addresses are taken.
    #[error("no service address left")]
    Services,
}

/// Who has which address. What exists keeps its own; a freed one is used again only when the rest was.
#[derive(Debug, Default)]
pub struct Addresses {
    nodes: BTreeMap<String, u8>,
    pods: BTreeMap<(u8, u8), Key>,
    next_pod: BTreeMap<u8, u8>,
    services: BTreeMap<Key, u16>,
    next_service: u16,
}

impl Addresses {
    /// The number of a node.
    ///
    /// # Errors
    /// When there are too many.
    pub fn node(&mut self, name: &str) -> Result<NodeNet, NoAddress> {
        if let Some(number) = self.nodes.get(name) {
            return Ok(NodeNet(*number));
        }
        let taken: BTreeSet<u8> = self.nodes.values().copied().collect();
        let number = (1..=MAX_NODES).find(|number| !taken.contains(number)).ok_or(NoAddress::Nodes)?;
        self.nodes.insert(name.to_owned(), number);
        Ok(NodeNet(number))
    }

    /// Gives a node's number back.
    pub fn forget_node(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// A fresh index for a pod on `node`.
    ///
    /// # Errors
    /// When the node is full.
    pub fn pod(&mut self, node: &str, pod: &Key) -> Result<(NodeNet, u8), NoAddress> {
        let net = self.node(node)?;
        let next = self.next_pod.entry(net.0).or_insert(2);
        for _ in 2..=254 {
            let index = *next;
            *next = if index == 254 { 2 } else { index + 1 };
            if let std::collections::btree_map::Entry::Vacant(free) = self.pods.entry((net.0, index)) {
                free.insert(pod.clone());
                return Ok((net, index));
            }
        }
        Err(NoAddress::Pods(node.to_owned()))
    }

    /// Gives a pod's address back.
    pub fn forget_pod(&mut self, net: NodeNet, index: u8) {
        self.pods.remove(&(net.0, index));
    }

    /// The addresses of a service that writes none; `written` are those that others wrote.
    ///
    /// # Errors
    /// When none is left.
    pub fn service(
        &mut self,
        key: &Key,
        written: &BTreeSet<IpAddr>,
    ) -> Result<(Ipv4Addr, Ipv6Addr), NoAddress> {
        let both = |number: u16| {
            let [high, low] = number.to_be_bytes();
            (Ipv4Addr::new(10, 96, high, low), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number))
        };
        let free = |number: u16| {
            let (v4, v6) = both(number);
            !written.contains(&IpAddr::V4(v4)) && !written.contains(&IpAddr::V6(v6))
        };
        if let Some(number) = self.services.get(key).copied().filter(|number| free(*number)) {
            return Ok(both(number));
        }
        let taken: BTreeSet<u16> = self.services.values().copied().collect();
        for _ in 0..u16::MAX {
            self.next_service = self.next_service.checked_add(1).filter(|n| *n < u16::MAX).unwrap_or(1);
            let number = self.next_service;
            if !taken.contains(&number) && free(number) {
                self.services.insert(key.clone(), number);
                return Ok(both(number));
            }
        }
        Err(NoAddress::Services)
    }

    /// Whether every node's route for services covers this address.
    pub fn routed(vip: &IpAddr) -> bool {
        match vip {
            IpAddr::V4(v4) => v4.octets()[..2] == [10, 96],
            IpAddr::V6(v6) => v6.segments()[..7] == [0xfd00, 0x96, 0, 0, 0, 0, 0],
        }
    }

    /// Gives back the addresses of services that are not in `present`.
    pub fn keep_services(&mut self, present: &BTreeSet<Key>) {
        self.services.retain(|key, _| present.contains(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_pod_address_comes_last() {
        let mut addresses = Addresses::default();
        let key = |n: u32| Key::new("d", &n.to_string());
        let (net, first) = addresses.pod("a", &key(1)).unwrap();
        assert_eq!((net, first), (NodeNet(1), 2));
        addresses.forget_pod(net, first);
        assert_eq!(addresses.pod("a", &key(2)).unwrap(), (NodeNet(1), 3));
        assert_eq!(addresses.pod("b", &key(3)).unwrap(), (NodeNet(2), 2));
        for n in 4..=254 {
            addresses.pod("a", &key(n)).unwrap();
        }
        assert_eq!(addresses.pod("a", &key(255)).unwrap().1, 2);
        assert_eq!(addresses.pod("a", &key(256)), Err(NoAddress::Pods("a".to_owned())));
    }

    #[test]
    fn services_keep_their_address_and_avoid_written_ones() {
        let mut addresses = Addresses::default();
        let written = BTreeSet::from(["10.96.0.1".parse().unwrap(), "fd00:96::2".parse().unwrap()]);
        let (v4, v6) = addresses.service(&Key::new("d", "s"), &written).unwrap();
        assert_eq!((v4.to_string(), v6.to_string()), ("10.96.0.3".to_owned(), "fd00:96::3".to_owned()));
        assert_eq!(addresses.service(&Key::new("d", "s"), &written).unwrap().0, v4);
        addresses.keep_services(&BTreeSet::new());
        assert_ne!(addresses.service(&Key::new("d", "t"), &written).unwrap().0, v4);
    }

    #[test]
    fn ranges_hold_their_pods() {
        let net = NodeNet(12);
        assert_eq!(net.ranges(), ("10.244.12.0/24".to_owned(), "fd00:244:c::/64".to_owned()));
        assert_eq!(net.pod(7).1.to_string(), "fd00:244:c::7");
        assert_eq!(net.wire().0.to_string(), "172.30.0.22");
    }
}
