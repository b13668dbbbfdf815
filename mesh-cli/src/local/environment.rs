//! (pure) A container's command line and environment.

use std::{collections::BTreeMap, net::IpAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::{Container, EnvVar, EnvVarSource};
use serde_json::Value;

use super::{
    document::Document,
    expand::{Key, WantedPod, program},
};

/// What a pod can refer to.
pub struct Facts<'a> {
    /// The pod.
    pub pod: &'a WantedPod,
    /// Its UID.
    pub uid: &'a str,
    /// Its addresses.
    pub ips: &'a [IpAddr],
    /// Its node's address.
    pub host_ip: IpAddr,
    /// ConfigMaps and Secrets by kind and key.
    pub data: &'a BTreeMap<(String, Key), BTreeMap<String, String>>,
}

/// Why an environment cannot be made: the field and the reason.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct BadEnvironment {
    /// Path below the container, for example `env[2].valueFrom`.
    pub field: String,
    /// What is wrong.
    pub reason: String,
}

/// What to run: the program with its arguments, and its environment without the inherited part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Program, then arguments.
    pub command: Vec<String>,
    /// Variables by name.
    pub env: BTreeMap<String, String>,
}

/// Resolves a container's `command`, `args`, `env` and `envFrom`.
///
/// # Errors
/// The first reference that leads nowhere.
pub fn launch(container: &Container, facts: &Facts<'_>) -> Result<Launch, BadEnvironment> {
    let mut env = BTreeMap::new();
    for (index, from) in container.env_from.iter().flatten().enumerate() {
        let (kind, name, optional) = match (&from.config_map_ref, &from.secret_ref) {
            (Some(map), _) => ("ConfigMap", &map.name, map.optional),
            (None, Some(secret)) => ("Secret", &secret.name, secret.optional),
            (None, None) => continue,
        };
        let key = (kind.to_owned(), Key::new(&facts.pod.key.namespace, name));
        let Some(data) = facts.data.get(&key) else {
            if optional == Some(true) {
                continue;
            }
            let reason = format!("there is no {kind} {}", key.1);
            return Err(BadEnvironment { field: format!("envFrom[{index}]"), reason });
        };
        let prefix = from.prefix.as_deref().unwrap_or_default();
        env.extend(data.iter().map(|(name, value)| (format!("{prefix}{name}"), value.clone())));
    }
    for (index, variable) in container.env.iter().flatten().enumerate() {
        let value = value(variable, facts, &env)
            .map_err(|reason| BadEnvironment { field: format!("env[{index}].valueFrom"), reason })?;
        if let Some(value) = value {
            env.insert(variable.name.clone(), value);
        }
    }
    let command = program(container).map(|word| expand(word, &env)).collect();
    Ok(Launch { command, env })
}

fn value(
    variable: &EnvVar,
    facts: &Facts<'_>,
    env: &BTreeMap<String, String>,
) -> Result<Option<String>, String> {
    match &variable.value_from {
        None => Ok(Some(expand(variable.value.as_deref().unwrap_or_default(), env))),
        Some(source) => referred(source, facts),
    }
}

fn referred(source: &EnvVarSource, facts: &Facts<'_>) -> Result<Option<String>, String> {
    if let Some(field) = &source.field_ref {
        return pod_field(&field.field_path, facts).map(Some);
    }
    let (kind, name, key, optional) = match (&source.config_map_key_ref, &source.secret_key_ref) {
        (Some(map), _) => ("ConfigMap", &map.name, &map.key, map.optional),
        (None, Some(secret)) => ("Secret", &secret.name, &secret.key, secret.optional),
        (None, None) => return Err("this kind of source is not supported in local mode".to_owned()),
    };
    let object = Key::new(&facts.pod.key.namespace, name);
    match facts.data.get(&(kind.to_owned(), object.clone())).and_then(|data| data.get(key)) {
        Some(value) => Ok(Some(value.clone())),
        None if optional == Some(true) => Ok(None),
        None => Err(format!("there is no key `{key}` in {kind} {object}")),
    }
}

fn pod_field(path: &str, facts: &Facts<'_>) -> Result<String, String> {
    let Facts { pod, uid, ips, host_ip, .. } = facts;
    let subscript = |map: &BTreeMap<String, String>, prefix: &str| {
        let key = path.strip_prefix(prefix)?.strip_prefix("['")?.strip_suffix("']")?;
        Some(map.get(key).cloned().unwrap_or_default())
    };
    let join = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    Ok(match path {
        "metadata.name" => pod.key.name.clone(),
        "metadata.namespace" => pod.key.namespace.clone(),
        "metadata.uid" => (*uid).to_owned(),
        "spec.nodeName" => pod.node.clone(),
        "spec.serviceAccountName" => pod.service_account().to_owned(),
        "status.podIP" => join(&ips[..ips.len().min(1)]),
        "status.podIPs" => join(ips),
        "status.hostIP" | "status.hostIPs" => host_ip.to_string(),
        _ => subscript(&pod.labels, "metadata.labels")
            .or_else(|| subscript(&pod.annotations, "metadata.annotations"))
            .ok_or_else(|| format!("`{path}` is not a field that a pod can refer to"))?,
    })
}

/// Replaces `$(NAME)` of known variables; `$$` is one dollar sign, anything else stays.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|open| open.split_once(')'))
            && let Some(value) = env.get(name)
        {
            out.push_str(value);
            rest = after;
        } else {
            out.push('$');
        }
    }
    out + rest
}

/// The data of a ConfigMap or Secret; `None` for other objects.
pub fn data(document: &Document) -> Option<((String, Key), BTreeMap<String, String>)> {
    if document.kind != "ConfigMap" && document.kind != "Secret" {
        return None;
    }
    let texts = |field: &str| {
        let map = document.value.get(field).and_then(Value::as_object).cloned().unwrap_or_default();
        map.into_iter().filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())))
    };
    let mut data: BTreeMap<String, String> = texts("data").collect();
    if document.kind == "Secret" {
        data = data
            .into_iter()
            .filter_map(|(key, value)| {
                Some((key, String::from_utf8(STANDARD.decode(value.trim()).ok()?).ok()?))
            })
            .chain(texts("stringData"))
            .collect();
    }
    Some(((document.kind.clone(), Key::new(&document.namespace, &document.name)), data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::{document::parse, expand::expand as expand_folder};

    /// `NAME=value` of every variable, then the command; or the error.
    fn check(container: &str, expected: &str) {
        let yaml = format!(
            "kind: Pod\nmetadata: {{name: p, namespace: shop, labels: {{app: web}}}}\nspec:\n  containers:\n  - \
             {{name: c, {container}}}\n---\nkind: ConfigMap\nmetadata: {{name: m, namespace: shop}}\ndata: {{k: v}}\n---\n\
             kind: Secret\nmetadata: {{name: s, namespace: shop}}\ndata: {{k: c2VjcmV0}}\n"
        );
        let documents = parse("x.yaml", &yaml).unwrap();
        let wanted = expand_folder(&documents, &BTreeMap::new());
        let facts = Facts {
            pod: &wanted.pods[0],
            uid: "u-1",
            ips: &["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            host_ip: "172.30.0.11".parse().unwrap(),
            data: &documents.iter().filter_map(data).collect(),
        };
        let text = match launch(&wanted.pods[0].spec.containers[0], &facts) {
            Ok(Launch { command, env }) => {
                let env: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
                format!("{} {}", env.join(" "), command.join(" "))
            }
            Err(error) => error.to_string(),
        };
        assert_eq!(text.trim(), expected, "{container}");
    }

    #[test]
    fn variables_come_from_where_kubernetes_takes_them() {
        let field = |path: &str| {
            format!("command: [a], env: [{{name: X, valueFrom: {{fieldRef: {{fieldPath: \"{path}\"}}}}}}]")
        };
        check(&field("metadata.name"), "X=p a");
        check(&field("metadata.labels['app']"), "X=web a");
        check(&field("status.podIP"), "X=10.0.0.1 a");
        check(&field("status.podIPs"), "X=10.0.0.1,fd00::1 a");
        check(&field("spec.nodeName"), "X=node-1 a");
        check(&field("spec.serviceAccountName"), "X=default a");
        check(&field("spec.color"), "env[0].valueFrom: `spec.color` is not a field that a pod can refer to");
        check("command: [a], envFrom: [{prefix: P_, configMapRef: {name: m}}]", "P_k=v a");
        check("command: [a], env: [{name: X, valueFrom: {secretKeyRef: {name: s, key: k}}}]", "X=secret a");
        check(
            "command: [a], env: [{name: X, valueFrom: {configMapKeyRef: {name: m, key: z}}}]",
            "env[0].valueFrom: there is no key `z` in ConfigMap shop/m",
        );
    }

    #[test]
    fn references_to_variables_are_expanded() {
        check(
            "command: [run, $(A), $$(A), $(B), $x], args: ['$(C)'], env: [{name: A, value: '1'}, {name: C, value: $(A)2}]",
            "A=1 C=12 run 1 $(A) $(B) $x 12",
        );
    }
}
