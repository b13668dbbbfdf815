//! What can be set about an installation: defaults, then the profile, then files, then `--set`; checked once, all of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// Why values cannot be used.
#[derive(Debug, Error, PartialEq)]
pub enum ValuesError {
    /// A text that is no YAML, or no mapping.
    #[error("{origin}: {reason}")]
    Unreadable {
        /// File or flag.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// A key that does not exist, or a value that it cannot have.
    #[error("{path}: {reason}")]
    Invalid {
        /// Path of the key.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

macro_rules! values {
    ($($(#[$meta:meta])* pub struct $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
            #[serde(deny_unknown_fields, rename_all = "camelCase")]
            pub struct $name { $(pub $field: $type,)* }
        )*
    };
}

values! {
    /// Everything that `values.yaml` has.
    pub struct Values {
        namespace: Namespace,
        image: Image,
        mesh: Mesh,
        log: Log,
        gateway_classes: GatewayClasses,
        control: Control,
        node: Node,
    }

    /// `namespace`.
    pub struct Namespace {
        create: bool,
    }

    /// `image`.
    pub struct Image {
        registry: String,
        tag: String,
        pull_policy: PullPolicy,
        pull_secrets: Vec<PullSecret>,
    }

    /// One of `image.pullSecrets`.
    pub struct PullSecret {
        name: String,
    }

    /// `mesh`.
    pub struct Mesh {
        trust_domain: String,
        cluster_id: String,
        root_namespace: String,
        encrypt_same_node: EncryptSameNode,
        require_aes256: bool,
        outbound_traffic_policy: OutboundTrafficPolicy,
    }

    /// `log`.
    pub struct Log {
        format: LogFormat,
        level: String,
    }

    /// `gatewayClasses`.
    pub struct GatewayClasses {
        istio: bool,
    }

    /// `control`.
    pub struct Control {
        replicas: u16,
        max_certificate_ttl: String,
        disruption_budget: bool,
        resources: Resources,
        node_selector: BTreeMap<String, String>,
        tolerations: Vec<BTreeMap<String, Value>>,
    }

    /// `node`.
    pub struct Node {
        cni_bin_dir: String,
        cni_conf_dir: String,
        cni_records_dir: String,
        kubelet_cgroup: String,
        max_unavailable: Value,
        resources: Resources,
        node_selector: BTreeMap<String, String>,
    }
}

/// `resources` of a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// What is reserved.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, Value>,
    /// What is allowed.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Value>,
}

/// `image.pullPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// `mesh.encryptSameNode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncryptSameNode {
    Never,
    Always,
}

/// `mesh.outboundTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundTrafficPolicy {
    AllowAny,
    RegistryOnly,
}

/// `log.format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

impl Values {
    /// (pure) Decodes layers that were laid over each other.
    ///
    /// # Errors
    /// The first key that is unknown, missing or wrong.
    pub fn decode(merged: &Value) -> Result<Self, ValuesError> {
        serde_path_to_error::deserialize(merged).map_err(|error| ValuesError::Invalid {
            path: error.path().to_string(),
            reason: error.into_inner().to_string(),
        })
    }
}

/// (pure) A layer from YAML.
///
/// # Errors
/// When it is no YAML, or neither a mapping nor empty.
pub fn layer(origin: &str, yaml: &str) -> Result<Value, ValuesError> {
    let unreadable = |reason: String| ValuesError::Unreadable { origin: origin.to_owned(), reason };
    match serde_yaml_ng::from_str(yaml) {
        Ok(Value::Null) => Ok(Value::Object(serde_json::Map::new())),
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(unreadable("must be a mapping".to_owned())),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

/// (pure) A layer from one `--set` argument: `key.key=value`, several with commas; a comma in a value is written `\,`.
///
/// # Errors
/// When there is no `=`, or an index of a list, which needs a file.
pub fn set(argument: &str) -> Result<Value, ValuesError> {
    let unreadable = |reason: &str| ValuesError::Unreadable {
        origin: format!("--set {argument}"),
        reason: reason.to_owned(),
    };
    let mut whole = Value::Object(serde_json::Map::new());
    for one in split(argument) {
        let (path, text) = one.split_once('=').ok_or_else(|| unreadable("must be key=value"))?;
        if path.contains('[') {
            return Err(unreadable("lists are set by a file: -f values.yaml"));
        }
        if path.split('.').any(str::is_empty) {
            return Err(unreadable("a key is empty"));
        }
        let value = path.rsplit('.').fold(scalar(text), |value, key| serde_json::json!({ key: value }));
        overlay(&mut whole, value);
    }
    Ok(whole)
}

/// Splits at commas that no backslash precedes.
fn split(argument: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in argument.chars() {
        match (escaped, c) {
            (false, '\\') => escaped = true,
            (false, ',') => parts.push(String::new()),
            _ => {
                escaped = false;
                if let Some(last) = parts.last_mut() {
                    last.push(c);
                }
            }
        }
    }
    parts
}

fn scalar(text: &str) -> Value {
    match text {
        "true" => true.into(),
        "false" => false.into(),
        "null" => Value::Null,
        // An octal-looking number stays what was written.
        _ if text.starts_with('0') && text.len() > 1 => text.into(),
        _ => text.parse::<i64>().map_or_else(|_| text.into(), Value::from),
    }
}

/// (pure) Lays one layer over another: mappings are merged, everything else is replaced; null removes, as in Helm.
pub fn overlay(below: &mut Value, above: Value) {
    match (below, above) {
        (Value::Object(below), Value::Object(above)) => {
            for (key, value) in above {
                if value.is_null() {
                    below.remove(&key);
                } else {
                    overlay(below.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (below, above) => *below = above,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arguments_are_split_and_typed() {
        let check = |argument: &str, expected: Result<Value, &str>| {
            assert_eq!(set(argument).map_err(|error| error.to_string()), expected.map_err(str::to_owned));
        };
        check("a.b=1,a.c=x y", Ok(json!({"a": {"b": 1, "c": "x y"}})));
        check("a=true,b=false,c=007", Ok(json!({"a": true, "b": false, "c": "007"})));
        check(r"a=b\,c=d", Ok(json!({"a": "b,c=d"})));
        check("a", Err("--set a: must be key=value"));
        check("a[0]=1", Err("--set a[0]=1: lists are set by a file: -f values.yaml"));
        check("a..b=1", Err("--set a..b=1: a key is empty"));
    }

    #[test]
    fn layers_are_laid_over_each_other() {
        let mut below = json!({"a": {"b": 1, "c": 2}, "l": [1, 2]});
        overlay(&mut below, json!({"a": {"c": 3, "d": 4, "b": null}, "l": [3]}));
        assert_eq!(below, json!({"a": {"c": 3, "d": 4}, "l": [3]}));
        assert!(layer("x.yaml", "[1]").is_err());
        assert_eq!(layer("x.yaml", "# nothing\n"), Ok(json!({})));
        assert!(layer("x.yaml", "a: [").unwrap_err().to_string().starts_with("x.yaml: "));
    }
}
