//! (pure) Definitions of Istio's kinds for an API server that has none, from the very types that read them.
//!
//! Unknown fields are kept by the server instead of being dropped: a policy whose restricting field is misspelt must
//! reach the translation, which refuses it, and must not silently become a wider one.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::kinds::{AuthorizationPolicySpec, PeerAuthenticationSpec};

/// The definitions, as objects.
pub fn definitions() -> Vec<Value> {
    let mut authorization = schema::<AuthorizationPolicySpec>();
    authorization["properties"]["action"]["enum"] = json!(["ALLOW", "DENY", "AUDIT", "CUSTOM"]);
    let mut authentication = schema::<PeerAuthenticationSpec>();
    let modes = json!(["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]);
    authentication["properties"]["mtls"]["properties"]["mode"]["enum"] = modes.clone();
    authentication["properties"]["portLevelMtls"]["additionalProperties"]["properties"]["mode"]["enum"] =
        modes;
    vec![
        definition(
            "AuthorizationPolicy",
            "authorizationpolicies",
            "ap",
            ("Action", ".spec.action"),
            &authorization,
        ),
        definition(
            "PeerAuthentication",
            "peerauthentications",
            "pa",
            ("Mode", ".spec.mtls.mode"),
            &authentication,
        ),
    ]
}

fn definition(kind: &str, plural: &str, short: &str, column: (&str, &str), spec: &Value) -> Value {
    let columns = json!([
        {"name": column.0, "type": "string", "jsonPath": column.1},
        {"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"ZtunnelAccepted\")].status"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]);
    let version = |name: &str, storage: bool| {
        json!({
            "name": name,
            "served": true,
            "storage": storage,
            "additionalPrinterColumns": columns,
            "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {
                "type": "object",
                "properties": {
                    "spec": spec,
                    "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                },
            }},
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.security.istio.io"),
            "labels": {"app.kubernetes.io/part-of": "undermesh"},
        },
        "spec": {
            "group": "security.istio.io",
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": plural,
                "singular": kind.to_lowercase(),
                "shortNames": [short],
                "categories": ["istio-io", "security-istio-io"],
            },
            // Both are in use; they differ in nothing but the name.
            "versions": [version("v1", true), version("v1beta1", false)],
        },
    })
}

fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    structural(settings.into_generator().into_root_schema_for::<T>().to_value())
}

/// Kubernetes' structural form of a schema.
fn structural(schema: Value) -> Value {
    // `true`: whatever it is.
    let Value::Object(mut fields) = schema else {
        return json!({"x-kubernetes-preserve-unknown-fields": true});
    };
    // Optional is everything anyhow; the null beside a type says no more.
    if let Some(Value::Array(choices)) = fields.remove("anyOf") {
        let some = choices.into_iter().find(|choice| choice["type"] != "null").unwrap_or(Value::Bool(true));
        return structural(some);
    }
    if let Some(Value::Array(types)) = fields.get("type") {
        let some = types.iter().find(|one| *one != "null").cloned().unwrap_or_default();
        fields.insert("type".to_owned(), some);
    }
    // A default would be written into users' objects; what our types say of themselves is not for users.
    for unwanted in ["$schema", "title", "description", "default", "required"] {
        fields.remove(unwanted);
    }
    if fields.get("additionalProperties") == Some(&Value::Bool(false)) {
        fields.remove("additionalProperties");
        fields.insert("x-kubernetes-preserve-unknown-fields".to_owned(), Value::Bool(true));
    }
    for inner in ["items", "additionalProperties"] {
        if let Some(schema) = fields.remove(inner) {
            fields.insert(inner.to_owned(), structural(schema));
        }
    }
    if let Some(Value::Object(properties)) = fields.remove("properties") {
        let properties: Map<String, Value> =
            properties.into_iter().map(|(name, schema)| (name, structural(schema))).collect();
        fields.insert("properties".to_owned(), Value::Object(properties));
    }
    let any = !fields.contains_key("type");
    if any {
        fields.insert("x-kubernetes-preserve-unknown-fields".to_owned(), Value::Bool(true));
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the API server insists on.
    fn check(path: &str, schema: &Value) {
        let fields = schema.as_object().unwrap_or_else(|| panic!("{path}: {schema}"));
        for key in fields.keys() {
            let known = ["type", "properties", "items", "additionalProperties", "enum"];
            assert!(
                known.contains(&key.as_str()) || key == "x-kubernetes-preserve-unknown-fields",
                "{path}: {key}"
            );
        }
        if fields.get("type") == Some(&"object".into()) {
            let open = fields.contains_key("x-kubernetes-preserve-unknown-fields");
            assert!(
                open || fields.contains_key("additionalProperties"),
                "{path}: unknown fields would be dropped"
            );
        }
        for (name, inner) in fields.get("properties").and_then(Value::as_object).into_iter().flatten() {
            check(&format!("{path}.{name}"), inner);
        }
        for inner in ["items", "additionalProperties"] {
            if let Some(schema) = fields.get(inner) {
                check(&format!("{path}.{inner}"), schema);
            }
        }
    }

    #[test]
    fn schemas_are_structural_and_drop_nothing() {
        for definition in definitions() {
            for version in definition["spec"]["versions"].as_array().unwrap() {
                let schema = &version["schema"]["openAPIV3Schema"]["properties"]["spec"];
                check("spec", schema);
            }
        }
    }

    #[test]
    fn fields_are_those_that_are_read() {
        let all = definitions();
        let spec =
            &all[0]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
        let source =
            &spec["rules"]["items"]["properties"]["from"]["items"]["properties"]["source"]["properties"];
        assert_eq!(source["notPrincipals"]["items"]["type"], "string");
        assert_eq!(spec["action"]["type"], "string");
        let spec =
            &all[1]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
        assert_eq!(spec["portLevelMtls"]["additionalProperties"]["properties"]["mode"]["type"], "string");
    }
}
