//! (pure) Services with their addresses and the endpoints behind each port.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::{
    api::core::v1::{PodSpec, ServicePort},
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde::{Deserialize, Serialize};

use super::{
    address::Addresses,
    document::Problem,
    expand::{WantedPod, WantedService},
};

/// A service with the addresses that it has now.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedService {
    /// As wanted.
    pub wanted: WantedService,
    /// Cluster addresses, IPv4 first unless written otherwise; none when headless or external.
    pub vips: Vec<IpAddr>,
}

impl PlacedService {
    /// Whether its name stands for its pods' addresses.
    pub fn headless(&self) -> bool {
        self.wanted.object.spec.as_ref().is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None"))
    }

    /// Whether this pod is behind it.
    pub fn selects(&self, pod: &WantedPod) -> bool {
        let selector = self.wanted.object.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        pod.key.namespace == self.wanted.key.namespace
            && selector.is_some_and(|selector| {
                !selector.is_empty() && selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
            })
    }

    fn ports(&self) -> impl Iterator<Item = &ServicePort> {
        let ports = self.wanted.object.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        ports.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"))
    }
}

/// Gives every service its addresses: those that are written, else one per family.
pub fn place(wanted: &[WantedService], addresses: &mut Addresses) -> (Vec<PlacedService>, Vec<Problem>) {
    let written: BTreeSet<IpAddr> = wanted.iter().flat_map(|service| written(service).0).collect();
    let (mut placed, mut problems) = (Vec::new(), Vec::new());
    for service in wanted {
        let mut vips = Vec::new();
        match addressing(service) {
            Addressing::None => {}
            Addressing::Written => {
                let (good, bad) = self::written(service);
                vips = good;
                problems.extend(bad.into_iter().map(|text| Problem {
                    file: service.source.file.clone(),
                    line: service.source.line,
                    object: format!("Service {}", service.key),
                    field: "spec.clusterIP".to_owned(),
                    reason: format!("`{text}` is no address"),
                    severity: "error".to_owned(),
                }));
            }
            Addressing::Families(families) => match addresses.service(&service.key, &written) {
                Ok((v4, v6)) => vips.extend(families.iter().map(|family| match family {
                    Family::V4 => IpAddr::V4(v4),
                    Family::V6 => IpAddr::V6(v6),
                })),
                Err(error) => problems.push(Problem {
                    file: service.source.file.clone(),
                    line: service.source.line,
                    object: format!("Service {}", service.key),
                    field: "spec.clusterIP".to_owned(),
                    reason: error.to_string(),
                    severity: "error".to_owned(),
                }),
            },
        }
        placed.push(PlacedService { wanted: service.clone(), vips });
    }
    (placed, problems)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Family {
    V4,
    V6,
}

#[derive(Debug, PartialEq)]
enum Addressing {
    None,
    Written,
    Families(Vec<Family>),
}

/// Both families unless the user asks for fewer: a local mesh is dual-stack, so that both are exercised.
fn addressing(service: &WantedService) -> Addressing {
    let Some(spec) = &service.object.spec else { return Addressing::None };
    if spec.type_.as_deref() == Some("ExternalName") || spec.cluster_ip.as_deref() == Some("None") {
        return Addressing::None;
    }
    if spec.cluster_ip.as_deref().is_some_and(|ip| !ip.is_empty()) || spec.cluster_ips.is_some() {
        return Addressing::Written;
    }
    let named: Vec<Family> = spec
        .ip_families
        .iter()
        .flatten()
        .filter_map(|family| match family.as_str() {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        })
        .collect();
    let first = named.first().copied().unwrap_or(Family::V4);
    let second = if first == Family::V4 { Family::V6 } else { Family::V4 };
    match spec.ip_family_policy.as_deref() {
        Some("SingleStack") => Addressing::Families(vec![first]),
        None if named.len() == 1 => Addressing::Families(named),
        _ => Addressing::Families(vec![first, second]),
    }
}

/// Written addresses, and written texts that are none.
fn written(service: &WantedService) -> (Vec<IpAddr>, Vec<String>) {
    let Some(spec) = &service.object.spec else { return Default::default() };
    let texts: Vec<&String> = match &spec.cluster_ips {
        Some(list) if !list.is_empty() => list.iter().collect(),
        _ => spec.cluster_ip.iter().collect(),
    };
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for text in texts.into_iter().filter(|text| !text.is_empty() && *text != "None") {
        match text.parse() {
            Ok(ip) => good.push(ip),
            Err(_) => bad.push(text.clone()),
        }
    }
    (good, bad)
}

/// A pod that can be an endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint<'a> {
    /// The pod.
    pub pod: &'a WantedPod,
    /// Its addresses.
    pub ips: &'a [IpAddr],
    /// Whether it serves now.
    pub ready: bool,
}

/// What a service proxy listens on, and where each listener forwards to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardTable(pub BTreeMap<SocketAddr, Vec<SocketAddr>>);

/// Every service address with its port, and the ready endpoints of the same family.
pub fn forward_table(services: &[PlacedService], endpoints: &[Endpoint<'_>]) -> ForwardTable {
    let mut table = BTreeMap::new();
    for service in services {
        for port in service.ports() {
            let Ok(number) = u16::try_from(port.port) else { continue };
            for vip in &service.vips {
                let behind = endpoints
                    .iter()
                    .filter(|endpoint| endpoint.ready && service.selects(endpoint.pod))
                    .filter_map(|endpoint| {
                        let target = target_port(port, &endpoint.pod.spec)?;
                        let ip = endpoint.ips.iter().find(|ip| ip.is_ipv4() == vip.is_ipv4())?;
                        Some(SocketAddr::new(*ip, target))
                    });
                table.insert(SocketAddr::new(*vip, number), behind.collect());
            }
        }
    }
    ForwardTable(table)
}

/// The pod's port behind a service port; a named one is looked up among the containers' ports.
fn target_port(port: &ServicePort, pod: &PodSpec) -> Option<u16> {
    let number = match &port.target_port {
        None => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => {
            let ports = pod.containers.iter().flat_map(|container| container.ports.iter().flatten());
            ports.into_iter().find(|port| port.name.as_ref() == Some(name))?.container_port
        }
    };
    u16::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::{document::parse, expand::expand};

    const POD: &str = "---\nkind: Pod\nmetadata: {name: p, labels: {app: s}}\nspec:\n  containers:\n  - {name: c, \
                       command: [a], ports: [{name: web, containerPort: 8080}]}\n";

    fn check(service: &str, vips: &[&str], table: &[(&str, &str)]) {
        let yaml =
            format!("kind: Service\nmetadata: {{name: s}}\nspec: {{selector: {{app: s}}, {service}}}\n{POD}");
        let wanted = expand(&parse("x.yaml", &yaml).unwrap(), &BTreeMap::new());
        let (placed, _) = place(&wanted.services, &mut Addresses::default());
        let seen: Vec<String> = placed[0].vips.iter().map(ToString::to_string).collect();
        assert_eq!(seen, vips, "{service}");
        let ips = ["10.244.1.2".parse().unwrap(), "fd00:244:1::2".parse().unwrap()];
        let endpoints = [Endpoint { pod: &wanted.pods[0], ips: &ips, ready: true }];
        let seen: Vec<(String, String)> = forward_table(&placed, &endpoints)
            .0
            .iter()
            .map(|(from, to)| (from.to_string(), to.iter().map(ToString::to_string).collect()))
            .collect();
        let table: Vec<_> = table.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        assert_eq!(seen, table, "{service}");
        let unready = [Endpoint { ready: false, ..endpoints[0].clone() }];
        assert!(forward_table(&placed, &unready).0.values().all(Vec::is_empty));
    }

    #[test]
    fn services_have_both_families_unless_written_otherwise() {
        check(
            "ports: [{port: 80, targetPort: web}]",
            &["10.96.0.1", "fd00:96::1"],
            &[("10.96.0.1:80", "10.244.1.2:8080"), ("[fd00:96::1]:80", "[fd00:244:1::2]:8080")],
        );
        check(
            "ipFamilyPolicy: SingleStack, ports: [{port: 80}]",
            &["10.96.0.1"],
            &[("10.96.0.1:80", "10.244.1.2:80")],
        );
        check(
            "ipFamilies: [IPv6], ports: [{port: 80, targetPort: 1}]",
            &["fd00:96::1"],
            &[("[fd00:96::1]:80", "[fd00:244:1::2]:1")],
        );
        check(
            "clusterIP: 10.96.7.7, ports: [{port: 80}]",
            &["10.96.7.7"],
            &[("10.96.7.7:80", "10.244.1.2:80")],
        );
        check("clusterIP: None, ports: [{port: 80}]", &[], &[]);
        check("ports: [{port: 53, protocol: UDP}]", &["10.96.0.1", "fd00:96::1"], &[]);
        check(
            "ports: [{port: 80, targetPort: nobody}]",
            &["10.96.0.1", "fd00:96::1"],
            &[("10.96.0.1:80", ""), ("[fd00:96::1]:80", "")],
        );
    }
}
