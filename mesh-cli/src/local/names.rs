//! (pure) What a pod's resolver reads: its hosts file and resolv.conf.

use std::{fmt::Write as _, net::IpAddr};

use super::{
    expand::{Key, WantedPod},
    services::{Endpoint, PlacedService},
};

/// Suffix of every name of the mesh.
const DOMAIN: &str = "cluster.local";

/// The hosts file of `pod`: itself, then every service under all names that Kubernetes' DNS would answer to.
pub fn hosts(
    pod: &WantedPod,
    ips: &[IpAddr],
    services: &[PlacedService],
    endpoints: &[Endpoint<'_>],
) -> String {
    let mut text = String::from(
        "# Written by meshctl local; changes are lost.\n127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    );
    for ip in ips {
        line(&mut text, ip, std::slice::from_ref(&pod.key.name));
    }
    for service in services {
        let names = names(&service.wanted.key, &pod.key.namespace);
        for vip in &service.vips {
            line(&mut text, vip, &names);
        }
        if !service.headless() {
            continue;
        }
        for endpoint in endpoints.iter().filter(|endpoint| endpoint.ready && service.selects(endpoint.pod)) {
            for ip in endpoint.ips {
                line(&mut text, ip, &names);
                let spec = &endpoint.pod.spec;
                if let (Some(hostname), Some(subdomain)) = (&spec.hostname, &spec.subdomain)
                    && *subdomain == service.wanted.key.name
                {
                    let own: Vec<String> = names.iter().map(|name| format!("{hostname}.{name}")).collect();
                    line(&mut text, ip, &own);
                }
            }
        }
    }
    text
}

/// The pod's resolv.conf. There is no name server: what the hosts file does not know is refused at once, not after
/// a resolver's time-out.
pub fn resolv_conf(namespace: &str) -> String {
    format!(
        "# Written by meshctl local: names are in /etc/hosts, nothing else resolves.\nnameserver 127.0.0.1\nsearch \
         {namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}\noptions timeout:1 attempts:1\n"
    )
}

/// The names of a service, longest first; the bare one only inside its namespace.
fn names(service: &Key, from_namespace: &str) -> Vec<String> {
    let Key { namespace, name } = service;
    let mut names = vec![
        format!("{name}.{namespace}.svc.{DOMAIN}"),
        format!("{name}.{namespace}.svc"),
        format!("{name}.{namespace}"),
    ];
    if namespace == from_namespace {
        names.push(name.clone());
    }
    names
}

fn line(text: &mut String, ip: &IpAddr, names: &[String]) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{ip} {}", names.join(" "));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::local::{address::Addresses, document::parse, expand::expand, services::place};

    #[test]
    fn services_resolve_by_every_name_that_kubernetes_gives_them() {
        let yaml = "kind: Service\nmetadata: {name: s, namespace: shop}\nspec: {ports: [{port: 80}]}\n---\n\
                    kind: Service\nmetadata: {name: h}\nspec: {clusterIP: None, selector: {app: p}}\n---\n\
                    kind: StatefulSet\nmetadata: {name: p}\nspec:\n  serviceName: h\n  template:\n    metadata: \
                    {labels: {app: p}}\n    spec: {containers: [{name: c, command: [a]}]}\n";
        let wanted = expand(&parse("x.yaml", yaml).unwrap(), &BTreeMap::new());
        let (services, _) = place(&wanted.services, &mut Addresses::default());
        let ips = ["10.244.1.2".parse().unwrap()];
        let endpoints = [Endpoint { pod: &wanted.pods[0], ips: &ips, ready: true }];
        let text = hosts(&wanted.pods[0], &ips, &services, &endpoints);
        let rest: Vec<&str> = text.lines().skip(3).collect();
        assert_eq!(
            rest,
            [
                "10.244.1.2 p-0",
                "10.96.0.1 s.shop.svc.cluster.local s.shop.svc s.shop",
                "fd00:96::1 s.shop.svc.cluster.local s.shop.svc s.shop",
                "10.244.1.2 h.default.svc.cluster.local h.default.svc h.default h",
                "10.244.1.2 p-0.h.default.svc.cluster.local p-0.h.default.svc p-0.h.default p-0.h",
            ]
        );
    }
}
