//! What is made for a Gateway, as the API server gets it.

use serde_json::{Value as Json, json};

use super::*;
use crate::{
    source::parse,
    translate::{Fragment, Mesh, translate},
};

fn made(metadata: &str, infrastructure: &str) -> Result<Provisioned, Unfit> {
    let yaml = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{namespace: shop, {metadata}}}\nspec: {{gatewayClassName: undermesh-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]{infrastructure}}}\n"
    );
    let parsed = parse("t.yaml", &yaml);
    let translated = translate(&parsed.objects[0], &Mesh::default());
    let Fragment::Waypoint(facts) = &translated.fragment else { panic!("{translated:?}") };
    let settings = Settings {
        image: "docker.io/undermesh/waypoint:1".to_owned(),
        control: "undermesh-control.undermesh-system.svc:15012".to_owned(),
        control_name: "undermesh-control.undermesh-system.svc".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        cluster: "Kubernetes".to_owned(),
        pull_policy: "Always".to_owned(),
        pull_secrets: vec![LocalObjectReference { name: "registry".to_owned() }],
        log_format: LogFormat::Json,
        log_level: "debug".to_owned(),
    };
    provision(&translated.key, facts, &settings)
}

fn json(value: &impl serde::Serialize) -> Json {
    serde_json::to_value(value).unwrap()
}

#[test]
fn every_object_belongs_to_its_gateway_and_is_labelled() {
    let made = made(
        "name: gw, uid: u-1",
        ", infrastructure: {labels: {team: a, gateway.networking.k8s.io/gateway-name: forged}, annotations: {note: b}}",
    )
    .unwrap();
    let all = [json(&made.account), json(&made.service), json(&made.deployment), json(&made.budget)];
    for object in &all {
        let meta = &object["metadata"];
        assert_eq!((&meta["name"], &meta["namespace"]), (&json!("gw"), &json!("shop")));
        let owner = &meta["ownerReferences"][0];
        assert_eq!((&owner["kind"], &owner["uid"]), (&json!("Gateway"), &json!("u-1")));
        assert_eq!(meta["labels"]["gateway.networking.k8s.io/gateway-name"], "gw");
        assert_eq!((&meta["labels"]["team"], &meta["annotations"]["note"]), (&json!("a"), &json!("b")));
    }
    let kinds: Vec<_> = all.iter().map(|object| object["kind"].as_str().unwrap_or_default()).collect();
    assert_eq!(kinds, ["ServiceAccount", "Service", "Deployment", "PodDisruptionBudget"]);
    let template = &all[2]["spec"]["template"]["metadata"]["labels"];
    assert_eq!((&template["istio.io/dataplane-mode"], &template["team"]), (&json!("none"), &json!("a")));
    // Nobody's scaling is undone.
    assert_eq!(all[2]["spec"].get("replicas"), None);
}

/// What was said for every component of the installation.
#[test]
fn its_pod_is_pulled_and_logs_like_the_others() {
    let made = made("name: gw, uid: u-1", "").unwrap();
    let pod = json(&made.deployment)["spec"]["template"]["spec"].clone();
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "registry"}]));
    assert_eq!(pod["containers"][0]["imagePullPolicy"], "Always");
    let args = pod["containers"][0]["args"].as_array().unwrap();
    assert!(args.contains(&json!("--log=debug")) && args.contains(&json!("--log-format=json")), "{args:?}");
}

/// The `restricted` pod security standard, field by field.
#[test]
fn the_pod_is_restricted() {
    let made = made("name: gw, uid: u-1", "").unwrap();
    let pod = json(&made.deployment)["spec"]["template"]["spec"].clone();
    for forbidden in ["hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"] {
        assert_eq!(pod.get(forbidden), None, "{forbidden}");
    }
    let of_pod = &pod["securityContext"];
    assert_eq!(
        (&of_pod["runAsNonRoot"], &of_pod["seccompProfile"]["type"]),
        (&json!(true), &json!("RuntimeDefault"))
    );
    assert_ne!(of_pod["runAsUser"], 0);
    let container = &pod["containers"][0];
    assert_eq!(
        container["securityContext"],
        json!({
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "seccompProfile": {"type": "RuntimeDefault"},
        })
    );
    assert!(container["ports"].as_array().unwrap().iter().all(|port| port.get("hostPort").is_none()));
    let allowed =
        ["configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"];
    for volume in pod["volumes"].as_array().unwrap() {
        let kinds: Vec<_> = volume.as_object().unwrap().keys().filter(|key| *key != "name").collect();
        assert!(kinds.len() == 1 && allowed.contains(&kinds[0].as_str()), "{volume}");
    }
    let token = &pod["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"];
    assert_eq!((&token["audience"], &token["path"]), (&json!("istio-ca"), &json!("istio-token")));
    assert_eq!(
        (&pod["automountServiceAccountToken"], &pod["serviceAccountName"]),
        (&json!(false), &json!("gw"))
    );
    assert!(pod["terminationGracePeriodSeconds"].as_i64().unwrap() > 25);
    let arguments = container["args"].to_string();
    assert!(arguments.contains("--control=undermesh-control.undermesh-system.svc:15012"), "{arguments}");
}

#[test]
fn the_service_has_the_port_of_the_listener_and_selects_the_pods() {
    let made = made("name: gw, uid: u-1", "").unwrap();
    let service = json(&made.service)["spec"].clone();
    let ports: Vec<_> =
        service["ports"].as_array().unwrap().iter().map(|port| port["port"].clone()).collect();
    assert_eq!(ports, [json!(15021), json!(15008)]);
    assert_eq!(service["selector"], json!({"gateway.networking.k8s.io/gateway-name": "gw"}));
    assert_eq!(json(&made.budget)["spec"]["maxUnavailable"], 1);
}

#[test]
fn what_cannot_be_named_or_owned_is_not_made() {
    let long = "a".repeat(64);
    for (metadata, want) in [
        ("name: gw".to_owned(), Unfit::Uid),
        (format!("name: {long}, uid: u"), Unfit::Name),
        ("name: a.b, uid: u".to_owned(), Unfit::Name),
        ("name: 1a, uid: u".to_owned(), Unfit::Name),
    ] {
        assert_eq!(made(&metadata, "").unwrap_err(), want, "{metadata}");
    }
}
