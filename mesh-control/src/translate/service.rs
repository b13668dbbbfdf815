//! Services and EndpointSlices.

use std::{net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        core::v1::{Service, ServicePort as KubernetesPort, ServiceSpec},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{Labels, Report, workload::GATEWAY_NAME};
use crate::source::Object;

/// How long a client keeps its endpoint where the Service does not say (Kubernetes' default).
const STICKY: Duration = Duration::from_secs(10_800);

/// What a Service says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceFacts {
    /// Its labels.
    pub labels: Labels,
    /// Its virtual addresses; none when it is headless, or has not been given any yet.
    pub vips: Vec<IpAddr>,
    /// Load balancers' addresses that are handled on the node, and external IPs.
    pub externals: Vec<IpAddr>,
    /// It has no virtual address on purpose.
    pub headless: bool,
    /// Its TCP ports.
    pub ports: Vec<PortFacts>,
    /// Which pods are behind it; `None` = EndpointSlices written by somebody else.
    pub selector: Option<Labels>,
    /// Pods that are not ready take connections too.
    pub publish_not_ready: bool,
    /// Only endpoints of the client's own node.
    pub node_local: bool,
    /// A client keeps its endpoint.
    pub sticky: Option<Duration>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortFacts {
    /// Name; empty for a single unnamed port.
    pub name: Arc<str>,
    /// Port that clients dial.
    pub port: u16,
    /// Port of the pods.
    pub target: Target,
    /// Port at which every node takes it.
    pub node_port: Option<u16>,
    /// What it speaks, as far as it is declared.
    pub protocol: Protocol,
    /// It is declared to speak HTTP/2 with prior knowledge.
    pub http2: bool,
}

/// Port of the pods behind a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The same everywhere.
    Number(u16),
    /// The container port of this name, per pod.
    Name(Arc<str>),
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1, HTTP/2 or gRPC.
    Http,
    /// Declared as something else.
    Tcp,
    /// Not declared: HTTP as soon as an HTTPRoute attaches.
    Undeclared,
}

/// What an EndpointSlice says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceFacts {
    /// Name of its Service.
    pub service: Arc<str>,
    /// Its TCP ports by name.
    pub ports: Vec<(Arc<str>, u16)>,
    /// Its endpoints.
    pub endpoints: Vec<EndpointFacts>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointFacts {
    /// The pod behind it.
    pub pod: Option<Arc<str>>,
    /// Its address.
    pub address: IpAddr,
    /// It takes connections.
    pub ready: bool,
    /// It is being deleted and still serves.
    pub leaving: bool,
    /// Its node.
    pub node: Arc<str>,
}

/// Translates a Service; `None` for what has no addresses of its own (ExternalName).
pub fn service(object: &Object, service: &Service, report: &mut Report<'_>) -> Option<ServiceFacts> {
    let Some(spec) = &service.spec else {
        report.error("spec", "a Service needs a spec");
        return None;
    };
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let listed = spec.cluster_ips.iter().flatten().map(String::as_str);
    let vips = addresses("spec.clusterIPs", spec.cluster_ip.as_deref().into_iter().chain(listed), report);
    let ingress = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = ingress.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    // Mode Proxy: the load balancer wants to see the connection itself.
    // Whom it lets in is the node's own proxy's to decide.
    let open = spec.load_balancer_source_ranges.as_ref().is_none_or(Vec::is_empty);
    let on_node = ingress.filter(|ingress| open && ingress.ip_mode.as_deref() != Some("Proxy"));
    let balanced = on_node.filter_map(|ingress| ingress.ip.as_deref());
    let mut externals = addresses("status.loadBalancer.ingress", balanced, report);
    let listed = spec.external_ips.iter().flatten().map(String::as_str);
    for ip in addresses("spec.externalIPs", listed, report) {
        if !externals.contains(&ip) {
            externals.push(ip);
        }
    }
    let ports = spec.ports.iter().flatten().enumerate();
    Some(ServiceFacts {
        labels: object.meta.labels.clone().unwrap_or_default(),
        vips,
        externals,
        headless: spec.cluster_ip.as_deref() == Some("None"),
        ports: ports.filter_map(|(index, port)| port_of(index, port, report)).collect(),
        selector: spec.selector.clone().filter(|selector| !selector.is_empty()),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        sticky: (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| sticky(spec)),
    })
}

fn sticky(spec: &ServiceSpec) -> Duration {
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|client_ip| client_ip.timeout_seconds);
    seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(STICKY, Duration::from_secs)
}

/// The usable ones, each once.
fn addresses<'a>(field: &str, texts: impl Iterator<Item = &'a str>, report: &mut Report<'_>) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    for text in texts {
        match text.parse::<IpAddr>() {
            _ if text.is_empty() || text == "None" => {}
            Ok(ip) if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() => {
                report.error(field, format!("{text} cannot be the address of a Service"));
            }
            Ok(ip) if found.contains(&ip.to_canonical()) => {}
            Ok(ip) => found.push(ip.to_canonical()),
            Err(_) => report.error(field, format!("{text:.64?} is not an IP address")),
        }
    }
    found
}

fn port_of(index: usize, port: &KubernetesPort, report: &mut Report<'_>) -> Option<PortFacts> {
    let KubernetesPort { app_protocol, name, node_port, port: number, protocol, target_port } = port;
    if protocol.as_deref().unwrap_or("TCP") != "TCP" {
        return None;
    }
    let valid = |number: i32| u16::try_from(number).ok().filter(|number| *number != 0);
    let field = |field: &str| format!("spec.ports[{index}].{field}");
    let Some(number) = valid(*number) else {
        report.error(field("port"), format!("{number} is not a port"));
        return None;
    };
    let target = match target_port {
        None => Target::Number(number),
        Some(IntOrString::String(name)) => Target::Name(name.as_str().into()),
        // Zero is what an omitted field looks like in objects that were read back from an API server.
        Some(IntOrString::Int(0)) => Target::Number(number),
        Some(IntOrString::Int(target)) => match valid(*target) {
            Some(target) => Target::Number(target),
            None => {
                report.error(field("targetPort"), format!("{target} is not a port"));
                return None;
            }
        },
    };
    let name = name.as_deref().unwrap_or_default();
    Some(PortFacts {
        name: name.into(),
        port: number,
        target,
        node_port: node_port.and_then(valid),
        protocol: declared(app_protocol.as_deref(), name),
        http2: matches!(declared_text(app_protocol.as_deref(), name).as_str(), "http2" | "grpc" | "h2c"),
    })
}

/// `appProtocol` wins over the prefix of the port's name, as in Istio.
fn declared_text(app_protocol: Option<&str>, name: &str) -> String {
    let text = app_protocol.unwrap_or_else(|| name.split('-').next().unwrap_or_default());
    let text = text.to_ascii_lowercase();
    text.strip_prefix("kubernetes.io/").map(str::to_owned).unwrap_or(text)
}

fn declared(app_protocol: Option<&str>, name: &str) -> Protocol {
    match declared_text(app_protocol, name).as_str() {
        "http" | "http2" | "grpc" | "h2c" | "ws" => Protocol::Http,
        "tcp" | "tls" | "https" | "wss" | "mongo" | "mysql" | "redis" | "postgres" => Protocol::Tcp,
        _ if name.starts_with("grpc-web") => Protocol::Http,
        _ => Protocol::Undeclared,
    }
}

/// Translates an EndpointSlice; `None` when it belongs to no Service.
pub fn slice(object: &Object, slice: &EndpointSlice, report: &mut Report<'_>) -> Option<SliceFacts> {
    let EndpointSlice { address_type, endpoints, metadata: _, ports } = slice;
    let Some(service) = object.label("kubernetes.io/service-name") else {
        report.warn(
            "metadata.labels",
            "without the label kubernetes.io/service-name the slice belongs to no Service",
        );
        return None;
    };
    if address_type == "FQDN" {
        report.warn("addressType", "FQDN endpoints are not supported: the slice has no effect");
        return None;
    }
    let tcp = ports.iter().flatten().filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP");
    let ports = tcp
        .filter_map(|port| {
            let number = u16::try_from(port.port?).ok().filter(|number| *number != 0)?;
            Some((port.name.as_deref().unwrap_or_default().into(), number))
        })
        .collect();
    let mut facts = SliceFacts { service: service.into(), ports, endpoints: Vec::new() };
    for (index, endpoint) in endpoints.iter().enumerate() {
        // Kubernetes: all addresses of one endpoint are interchangeable and consumers take the first.
        let Some(Ok(address)) = endpoint.addresses.first().map(|text| text.parse::<IpAddr>()) else {
            report.error(format!("endpoints[{index}].addresses[0]"), "not an IP address");
            continue;
        };
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
        let conditions = endpoint.conditions.as_ref();
        facts.endpoints.push(EndpointFacts {
            pod: pod.and_then(|target| target.name.as_deref()).map(Arc::from),
            address: address.to_canonical(),
            ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
            leaving: conditions.is_some_and(|conditions| {
                conditions.terminating == Some(true) && conditions.serving == Some(true)
            }),
            node: endpoint.node_name.as_deref().unwrap_or_default().into(),
        });
    }
    Some(facts)
}

impl ServiceFacts {
    /// Whether it was made for a gateway or waypoint, and so is never bound to one itself.
    pub fn of_gateway(&self) -> bool {
        self.labels.contains_key(GATEWAY_NAME)
            || self.selector.as_ref().is_some_and(|selector| selector.contains_key(GATEWAY_NAME))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Fragment, tests::translated};
    use super::*;

    fn service_of(spec: &str) -> ServiceFacts {
        let yaml = format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {spec}\n");
        match translated(&yaml).fragment {
            Fragment::Service(facts) => *facts,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_service_is_read_in_full() {
        let got = service_of(
            "{clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00:96::1'], selector: {app: a}, publishNotReadyAddresses: true, internalTrafficPolicy: Local, ports: [{name: http, port: 80, targetPort: web}, {name: db, port: 3306, protocol: TCP, nodePort: 30306}, {name: dns, port: 53, protocol: UDP}]}",
        );
        assert_eq!(got.vips.len(), 2);
        assert!(got.publish_not_ready && got.node_local && got.sticky.is_none());
        assert_eq!(
            got.ports,
            [
                PortFacts {
                    name: "http".into(),
                    port: 80,
                    target: Target::Name("web".into()),
                    node_port: None,
                    protocol: Protocol::Http,
                    http2: false
                },
                PortFacts {
                    name: "db".into(),
                    port: 3306,
                    target: Target::Number(3306),
                    node_port: Some(30306),
                    protocol: Protocol::Undeclared,
                    http2: false
                },
            ]
        );
        let outside = service_of(
            "{externalIPs: [192.0.2.7, 192.0.2.8], sessionAffinity: ClientIP, ports: []}\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.9}, {ip: 192.0.2.8, ipMode: VIP}, {ip: 192.0.2.10, ipMode: Proxy}, {hostname: x.example}]}}",
        );
        let kept = service_of(
            "{sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}, loadBalancerSourceRanges: [10.0.0.0/8], externalIPs: [192.0.2.7], ports: []}\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.9}]}}",
        );
        assert_eq!(kept.sticky, Some(Duration::from_secs(60)));
        assert_eq!(
            kept.externals,
            ["192.0.2.7".parse::<IpAddr>().unwrap()],
            "whom it lets in is not ours to say"
        );
        let externals: Vec<_> = outside.externals.iter().map(ToString::to_string).collect();
        assert_eq!(externals, ["192.0.2.9", "192.0.2.8", "192.0.2.7"]);
        assert!(outside.sticky == Some(STICKY) && outside.vips.is_empty());
        assert!(service_of("{clusterIP: None, ports: []}").headless);
        assert!(!service_of("{ports: []}").headless);
    }

    #[test]
    fn the_protocol_is_declared_by_app_protocol_then_by_name() {
        for (app_protocol, name, want) in [
            (None, "http", Protocol::Http),
            (None, "http-admin", Protocol::Http),
            (None, "grpc-web-x", Protocol::Http),
            (None, "tcp-http", Protocol::Tcp),
            (None, "", Protocol::Undeclared),
            (None, "https", Protocol::Tcp),
            (Some("tcp"), "http", Protocol::Tcp),
            (Some("kubernetes.io/h2c"), "x", Protocol::Http),
            (Some("HTTP2"), "tcp", Protocol::Http),
            (Some("example.com/own"), "http", Protocol::Undeclared),
        ] {
            assert_eq!(declared(app_protocol, name), want, "{app_protocol:?} {name}");
        }
    }

    #[test]
    fn a_slice_names_service_ports_and_pods() {
        let yaml = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s-1, labels: {kubernetes.io/service-name: s}}\naddressType: IPv4\nports: [{name: http, port: 8080}, {name: dns, port: 53, protocol: UDP}]\nendpoints: [{addresses: [10.0.0.1], conditions: {ready: false, serving: true, terminating: true}, targetRef: {kind: Pod, name: a}, nodeName: n}, {addresses: [10.0.0.2]}]\n";
        let Fragment::Slice(got) = translated(yaml).fragment else { panic!() };
        assert_eq!(got.ports, [("http".into(), 8080)]);
        assert_eq!(
            (got.endpoints[0].pod.as_deref(), got.endpoints[0].ready, got.endpoints[0].leaving),
            (Some("a"), false, true)
        );
        assert_eq!((got.endpoints[1].pod.as_deref(), got.endpoints[1].ready), (None, true));
    }
}
