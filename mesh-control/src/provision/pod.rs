//! The pod of a waypoint, under the `restricted` pod security standard.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
        EnvVarSource, HTTPGetAction, ObjectFieldSelector, PodSecurityContext, PodSpec, Probe,
        ProjectedVolumeSource, ResourceRequirements, SeccompProfile, SecurityContext,
        ServiceAccountTokenProjection, TopologySpreadConstraint, Volume, VolumeMount, VolumeProjection,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use super::{METRICS_PORT, READY_PORT, ROOTS, Settings};
use crate::{source::ObjectKey, translate::gateway::WaypointFacts};

/// Not root, and no user of the host.
const USER: i64 = 65532;
/// Audience of the token that the certificate authority asks for.
const AUDIENCE: &str = "istio-ca";
/// Lifetime of the token, seconds; the kubelet renews it at 80 %.
const TOKEN_SECONDS: i64 = 43_200;
/// Longer than the drain of a waypoint (25 s).
const GRACE_SECONDS: i64 = 35;

const TOKENS: &str = "/var/run/secrets/tokens";
const ROOTS_DIR: &str = "/var/run/secrets/istio";
const RUN: &str = "/run/undermesh";

/// The pod.
pub fn spec(key: &ObjectKey, facts: &WaypointFacts, settings: &Settings, selected: LabelSelector) -> PodSpec {
    PodSpec {
        service_account_name: Some(key.name.to_string()),
        // It never talks to the API server.
        automount_service_account_token: Some(false),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            seccomp_profile: Some(seccomp()),
            ..PodSecurityContext::default()
        }),
        topology_spread_constraints: Some(vec![TopologySpreadConstraint {
            label_selector: Some(selected),
            max_skew: 1,
            topology_key: "kubernetes.io/hostname".to_owned(),
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            ..TopologySpreadConstraint::default()
        }]),
        containers: vec![container(key, facts, settings)],
        image_pull_secrets: Some(settings.pull_secrets.clone()).filter(|secrets| !secrets.is_empty()),
        volumes: Some(volumes()),
        ..PodSpec::default()
    }
}

fn seccomp() -> SeccompProfile {
    SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }
}

fn container(key: &ObjectKey, facts: &WaypointFacts, settings: &Settings) -> Container {
    let Settings {
        image,
        control,
        control_name,
        trust_domain,
        cluster,
        pull_policy,
        pull_secrets: _,
        log_format,
        log_level,
    } = settings;
    let port = |name: &str, number: i32| ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    Container {
        name: "waypoint".to_owned(),
        image: Some(image.clone()),
        image_pull_policy: Some(pull_policy.clone()),
        command: Some(vec!["/usr/local/bin/mesh-waypoint".to_owned()]),
        args: Some(vec![
            format!("--namespace={}", key.namespace),
            format!("--gateway={}", key.name),
            format!("--service-account={}", key.name),
            format!("--trust-domain={trust_domain}"),
            format!("--cluster={cluster}"),
            format!("--control={control}"),
            format!("--control-name={control_name}"),
            format!("--control-roots={ROOTS_DIR}/root-cert.pem"),
            format!("--credential={TOKENS}/istio-token"),
            format!("--admin-socket={RUN}/admin.sock"),
            format!("--listen=[::]:{}", facts.port),
            format!("--ready-listen=[::]:{READY_PORT}"),
            format!("--metrics-listen=[::]:{METRICS_PORT}"),
            format!("--log={log_level}"),
            format!("--log-format={log_format}"),
        ]),
        env: Some(vec![field("UNDERMESH_POD", "metadata.name"), field("UNDERMESH_NODE", "spec.nodeName")]),
        ports: Some(vec![
            port("mesh", i32::from(facts.port)),
            port("metrics", METRICS_PORT),
            port("ready", READY_PORT),
        ]),
        readiness_probe: Some(Probe {
            http_get: Some(HTTPGetAction {
                path: Some("/healthz/ready".to_owned()),
                port: IntOrString::Int(READY_PORT),
                scheme: Some("HTTP".to_owned()),
                ..HTTPGetAction::default()
            }),
            period_seconds: Some(2),
            failure_threshold: Some(2),
            ..Probe::default()
        }),
        resources: Some(resources()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            seccomp_profile: Some(seccomp()),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(vec![
            mount("token", TOKENS, true),
            mount("roots", ROOTS_DIR, true),
            mount("run", RUN, false),
        ]),
        ..Container::default()
    }
}

fn field(name: &str, path: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            // Defaulted by the API server; written so that nothing differs.
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".to_owned()),
                field_path: path.to_owned(),
            }),
            ..EnvVarSource::default()
        }),
    }
}

fn resources() -> ResourceRequirements {
    let amounts = |cpu: &str, memory: &str| {
        BTreeMap::from([
            ("cpu".to_owned(), Quantity(cpu.to_owned())),
            ("memory".to_owned(), Quantity(memory.to_owned())),
        ])
    };
    ResourceRequirements {
        requests: Some(amounts("50m", "64Mi")),
        limits: Some(amounts("2", "1Gi")),
        ..ResourceRequirements::default()
    }
}

fn volumes() -> Vec<Volume> {
    let named = |name: &str| Volume { name: name.to_owned(), ..Volume::default() };
    vec![
        Volume {
            projected: Some(ProjectedVolumeSource {
                sources: Some(vec![VolumeProjection {
                    service_account_token: Some(ServiceAccountTokenProjection {
                        audience: Some(AUDIENCE.to_owned()),
                        expiration_seconds: Some(TOKEN_SECONDS),
                        path: "istio-token".to_owned(),
                    }),
                    ..VolumeProjection::default()
                }]),
                ..ProjectedVolumeSource::default()
            }),
            ..named("token")
        },
        // Not optional: without roots a waypoint could trust nobody, and waits for them.
        Volume {
            config_map: Some(ConfigMapVolumeSource {
                name: ROOTS.to_owned(),
                ..ConfigMapVolumeSource::default()
            }),
            ..named("roots")
        },
        Volume {
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some("Memory".to_owned()),
                ..EmptyDirVolumeSource::default()
            }),
            ..named("run")
        },
    ]
}
