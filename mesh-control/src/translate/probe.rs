//! (pure) The ports of a pod that the kubelet calls.

use std::collections::BTreeSet;

use k8s_openapi::{
    api::core::v1::{Container, LifecycleHandler, PodSpec, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};

/// Ports of HTTP, TCP and gRPC probes and of HTTP and TCP lifecycle hooks. Calls to another host than the pod are not
/// the pod's.
pub fn ports(spec: &PodSpec) -> BTreeSet<u16> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    containers.flat_map(of_container).collect()
}

fn of_container(container: &Container) -> Vec<u16> {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let lifecycle = container.lifecycle.as_ref();
    let hooks = [
        lifecycle.and_then(|lifecycle| lifecycle.post_start.as_ref()),
        lifecycle.and_then(|lifecycle| lifecycle.pre_stop.as_ref()),
    ];
    let mut found: Vec<u16> = Vec::new();
    found.extend(probes.into_iter().flatten().filter_map(|probe| of_probe(container, probe)));
    found.extend(hooks.into_iter().flatten().filter_map(|hook| of_hook(container, hook)));
    found
}

fn of_probe(container: &Container, probe: &Probe) -> Option<u16> {
    if let Some(http) = probe.http_get.as_ref().filter(|http| own(http.host.as_deref())) {
        return number(container, &http.port);
    }
    if let Some(tcp) = probe.tcp_socket.as_ref().filter(|tcp| own(tcp.host.as_deref())) {
        return number(container, &tcp.port);
    }
    u16::try_from(probe.grpc.as_ref()?.port).ok().filter(|port| *port != 0)
}

fn of_hook(container: &Container, hook: &LifecycleHandler) -> Option<u16> {
    if let Some(http) = hook.http_get.as_ref().filter(|http| own(http.host.as_deref())) {
        return number(container, &http.port);
    }
    hook.tcp_socket
        .as_ref()
        .filter(|tcp| own(tcp.host.as_deref()))
        .and_then(|tcp| number(container, &tcp.port))
}

fn own(host: Option<&str>) -> bool {
    host.is_none_or(str::is_empty)
}

/// A name is one of the container's own ports; the kubelet reads a name of digits as their number.
fn number(container: &Container, port: &IntOrString) -> Option<u16> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name));
            named.map(|port| port.container_port).or_else(|| name.parse().ok())?
        }
    };
    u16::try_from(number).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::super::{Fragment, tests::translated};

    #[test]
    fn every_port_that_the_kubelet_calls_and_no_other() {
        for (container, expected) in [
            ("readinessProbe: {httpGet: {port: 8080}}", vec![8080]),
            ("readinessProbe: {httpGet: {port: web}}, ports: [{name: web, containerPort: 81}]", vec![81]),
            ("livenessProbe: {tcpSocket: {port: '82'}}", vec![82]),
            ("startupProbe: {grpc: {port: 83}}", vec![83]),
            ("livenessProbe: {exec: {command: [x]}}, ports: [{containerPort: 80}]", vec![]),
            ("livenessProbe: {httpGet: {port: nowhere}}", vec![]),
            ("livenessProbe: {httpGet: {port: 0}}", vec![]),
            ("livenessProbe: {httpGet: {port: 70000}}", vec![]),
            ("livenessProbe: {httpGet: {port: 80, host: 10.1.1.1}}", vec![]),
            ("livenessProbe: {tcpSocket: {port: 80, host: other}}", vec![]),
            ("lifecycle: {postStart: {httpGet: {port: 84}}, preStop: {tcpSocket: {port: 85}}}", vec![84, 85]),
            ("lifecycle: {preStop: {sleep: {seconds: 1}}}", vec![]),
            ("livenessProbe: {httpGet: {port: 80}}, readinessProbe: {httpGet: {port: 80}}", vec![80]),
        ] {
            for place in [
                "containers: [{name: c, CONTAINER}]",
                "containers: [], initContainers: [{name: c, CONTAINER}]",
            ] {
                let spec = place.replace("CONTAINER", container);
                let yaml = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {{{spec}}}\n");
                let Fragment::Pod(pod) = translated(&yaml).fragment else { panic!("{yaml}") };
                assert_eq!(pod.probe_ports.into_iter().collect::<Vec<_>>(), expected, "{spec}");
            }
        }
    }
}
