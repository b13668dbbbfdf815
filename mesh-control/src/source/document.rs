//! (pure) The text of one file → objects, or problems with line and field.

use std::{collections::BTreeMap, sync::Arc};

use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::{
    Kind, Object, ObjectKey, Origin, Problem, Severity, Value, document::locate::line_of,
    kinds::GatewayStatus,
};

mod locate;

/// Largest file that is read, bytes: a directory is written by people and by local mode, not by machines at length.
pub const MAX_FILE_BYTES: usize = 8 << 20;
/// Most objects that one file may hold.
pub const MAX_FILE_OBJECTS: usize = 20_000;
/// The longest name or namespace (RFC 1123 subdomain), bytes.
const MAX_NAME_BYTES: usize = 253;
/// The longest namespace (RFC 1123 label), bytes.
const MAX_LABEL_BYTES: usize = 63;

/// Groups whose kinds a user expects the mesh to know: one that it does not read is worth a word.
const OWN_GROUPS: &[&str] = &[
    "gateway.networking.k8s.io",
    "security.istio.io",
    "networking.istio.io",
    "telemetry.istio.io",
    "extensions.istio.io",
];

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    /// The objects, in the order of the file. When the file is [`broken`](Self::broken), only those that could be
    /// read; a caller that has an older good version of the file keeps that instead.
    pub objects: Vec<Object>,
    /// Policies that could not be read: with no older good version they deny ([`Value::Unreadable`]).
    pub unreadable: Vec<Object>,
    /// What is wrong, and what is not read.
    pub problems: Vec<Problem>,
}

impl Parsed {
    /// Whether something in the file could not be read: the file as a whole then does not count.
    pub fn broken(&self) -> bool {
        self.problems.iter().any(|problem| problem.severity == Severity::Error)
    }
}

/// Reads the text of one file: YAML with any number of documents, or JSON; `List` objects are opened.
pub fn parse(path: &str, text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    let file: Arc<str> = path.into();
    let problem = |line: usize, reason: String| Problem {
        file: path.to_owned(),
        line,
        object: String::new(),
        field: String::new(),
        reason,
        severity: Severity::Error,
    };
    if text.len() > MAX_FILE_BYTES {
        parsed.problems.push(problem(1, format!("the file is larger than {MAX_FILE_BYTES} bytes")));
        return parsed;
    }
    for (first_line, part) in split(text) {
        match read_document(&part) {
            Ok(Json::Null) => {}
            Ok(value) => {
                let document = Document { file: &file, first_line, text: &part };
                document.open(&value, "", &mut parsed);
            }
            Err((line, reason)) => parsed.problems.push(problem(first_line + line.saturating_sub(1), reason)),
        }
        if parsed.objects.len() > MAX_FILE_OBJECTS {
            parsed
                .problems
                .push(problem(first_line, format!("the file holds more than {MAX_FILE_OBJECTS} objects")));
            break;
        }
    }
    parsed
}

/// Reads one object that comes from no file.
pub fn read(value: &Json) -> Parsed {
    let mut parsed = Parsed::default();
    let document = Document { file: &Arc::from(""), first_line: 0, text: "" };
    document.open(value, "", &mut parsed);
    parsed
}

/// The line of `field` of the object that begins on `object_line` of `text`; that line itself when it is not found.
pub fn line_in(text: &str, object_line: usize, field: &str) -> usize {
    let document = split(text).into_iter().take_while(|(first, _)| *first <= object_line).last();
    match document {
        // In a list the path of the object is not known here, and its own line is near enough.
        Some((first, part)) if !part.lines().any(|line| line.starts_with("items:")) => {
            (first + line_of(&part, field).saturating_sub(1)).max(object_line)
        }
        Some(_) | None => object_line,
    }
}

/// YAML to a tree; the error's line counts from 1 inside the document.
fn read_document(text: &str) -> Result<Json, (usize, String)> {
    let fault = |error: serde_yaml_ng::Error| (error.location().map_or(1, |at| at.line()), error.to_string());
    // Once for keys that occur twice, which the second tree would silently fold; once with every key as text.
    serde_yaml_ng::from_str::<serde_yaml_ng::Value>(text).map_err(fault)?;
    serde_yaml_ng::from_str::<Json>(text).map_err(fault)
}

/// The documents of a file, each with its first line. Of a `---` line only what follows the dashes belongs to one.
fn split(text: &str) -> Vec<(usize, String)> {
    let mut parts = Vec::new();
    let (mut first, mut part, mut last) = (1, String::new(), 0);
    for (index, line) in text.lines().enumerate() {
        last = index + 1;
        let marker = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        if let Some(rest) = marker.map(str::trim) {
            parts.push((first, std::mem::take(&mut part)));
            first = last + 1;
            if !rest.is_empty() && !rest.starts_with('#') {
                first = last;
                part = format!("{rest}\n");
            }
        } else {
            part.push_str(line);
            part.push('\n');
        }
    }
    parts.push((first.min(last.max(1)), part));
    parts.retain(|(_, part)| {
        part.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
    });
    parts
}

/// One document of a file.
struct Document<'a> {
    file: &'a Arc<str>,
    first_line: usize,
    text: &'a str,
}

/// Why an object could not be read: path from the object's root, and reason.
struct Unread {
    field: String,
    reason: String,
}

impl Document<'_> {
    /// Takes the object at `at` (empty, or `items[n]` of a list) into `parsed`.
    fn open(&self, value: &Json, at: &str, parsed: &mut Parsed) {
        let text_at = |pointer: &str| value.pointer(pointer).and_then(Json::as_str).unwrap_or_default();
        let (api_version, kind) = (text_at("/apiVersion"), text_at("/kind"));
        if api_version == "v1" && kind == "List" && at.is_empty() {
            for (index, item) in
                value.pointer("/items").and_then(Json::as_array).into_iter().flatten().enumerate()
            {
                self.open(item, &format!("items[{index}]"), parsed);
            }
            return;
        }
        let name = text_at("/metadata/name");
        if api_version.is_empty() || kind.is_empty() {
            let reason = "not a Kubernetes object: apiVersion and kind are required".to_owned();
            parsed.problems.push(self.problem(at, "", Unread { field: String::new(), reason }));
            return;
        }
        let misversioned = Kind::misversioned_policy(api_version, kind);
        let Some(known) = Kind::of(api_version, kind).or(misversioned) else {
            let group = api_version.split_once('/').map_or("", |(group, _)| group);
            if OWN_GROUPS.contains(&group) {
                let reason = format!("{kind} of {api_version} is not read by this mesh: it has no effect");
                let object = format!("{kind} {name}");
                let mut problem = self.problem(at, &object, Unread { field: String::new(), reason });
                problem.severity = Severity::Info;
                parsed.problems.push(problem);
            }
            return;
        };
        let namespace = if known.namespaced() {
            Some(text_at("/metadata/namespace")).filter(|ns| !ns.is_empty()).unwrap_or("default")
        } else {
            ""
        };
        let key = ObjectKey::new(known, namespace, name);
        let origin = Origin { file: self.file.clone(), line: self.line(at, "") };
        let served = match misversioned {
            Some(_) => {
                let reason = format!("{kind} is not served in {api_version:.80?}");
                Err(Unread { field: "apiVersion".to_owned(), reason })
            }
            None => Ok(()),
        };
        match check_names(&key).and(served).and_then(|()| read_object(known, value)) {
            Ok((meta, content)) => {
                let digest = digest(value, &origin);
                parsed.objects.push(Object { key, origin, meta, value: content, digest });
            }
            Err(unread) => {
                if known.secures() && check_names(&key).is_ok() {
                    parsed.unreadable.push(unreadable(&key, &origin, value));
                }
                parsed.problems.push(self.problem(at, &key.to_string(), unread));
            }
        }
    }

    fn problem(&self, at: &str, object: &str, unread: Unread) -> Problem {
        Problem {
            file: self.file.to_string(),
            line: self.line(at, &unread.field),
            object: object.to_owned(),
            field: unread.field,
            reason: unread.reason,
            severity: Severity::Error,
        }
    }

    /// The line of `field` of the object at `at`, or the nearest that is known above it.
    fn line(&self, at: &str, field: &str) -> usize {
        let separator = if at.is_empty() || field.is_empty() { "" } else { "." };
        let inside = line_of(self.text, &format!("{at}{separator}{field}"));
        self.first_line + inside.saturating_sub(1)
    }
}

/// A policy in place of one that cannot be read, with as much of its selector as is readable: an unreadable selector
/// covers the whole namespace.
fn unreadable(key: &ObjectKey, origin: &Origin, value: &Json) -> Object {
    let labels = value.pointer("/spec/selector/matchLabels").and_then(Json::as_object);
    let match_labels: Option<BTreeMap<String, String>> = labels
        .and_then(|labels| labels.iter().map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect());
    Object {
        key: key.clone(),
        origin: origin.clone(),
        meta: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta::default(),
        value: Value::Unreadable { match_labels: match_labels.unwrap_or_default() },
        digest: digest(value, origin),
    }
}

fn digest(value: &Json, origin: &Origin) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (value.to_string(), origin).hash(&mut hasher);
    hasher.finish()
}

/// Names become parts of identities and resource names, so nothing but what Kubernetes allows may pass.
fn check_names(key: &ObjectKey) -> Result<(), Unread> {
    let dns = |text: &str, max: usize, dots: bool| {
        !text.is_empty()
            && text.len() <= max
            && text.split('.').all(|label| {
                !label.is_empty()
                    && !label.starts_with('-')
                    && !label.ends_with('-')
                    && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            })
            && (dots || !text.contains('.'))
    };
    let bad = |field: &str, what: &str| {
        Err(Unread { field: field.to_owned(), reason: format!("{what:.80?} is not a valid name (RFC 1123)") })
    };
    if key.name.is_empty() {
        let reason = "metadata.name is required".to_owned();
        return Err(Unread { field: "metadata.name".to_owned(), reason });
    }
    if !dns(&key.name, MAX_NAME_BYTES, key.kind != Kind::Namespace) {
        return bad("metadata.name", &key.name);
    }
    if key.kind.namespaced() && !dns(&key.namespace, MAX_LABEL_BYTES, false) {
        return bad("metadata.namespace", &key.namespace);
    }
    Ok(())
}

/// The typed content of one object.
fn read_object(
    kind: Kind,
    value: &Json,
) -> Result<(k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta, Value), Unread> {
    let mut value = value.clone();
    normalise(&mut value);
    let meta = typed("metadata", value.get("metadata").cloned().unwrap_or(Json::Null))?;
    let spec = || value.get("spec").cloned().unwrap_or_else(|| Json::Object(serde_json::Map::new()));
    let content = match kind {
        Kind::Namespace => Value::Namespace(typed("", value)?),
        Kind::Node => Value::Node(typed("", value)?),
        Kind::Pod => Value::Pod(typed("", value)?),
        Kind::Service => Value::Service(typed("", value)?),
        Kind::EndpointSlice => Value::EndpointSlice(typed("", value)?),
        Kind::ServiceAccount => Value::ServiceAccount(typed("", value)?),
        Kind::ConfigMap => Value::ConfigMap(typed("", value)?),
        Kind::GatewayClass => Value::GatewayClass(typed("spec", spec())?),
        Kind::Gateway => {
            let status = value.get("status").cloned().unwrap_or_else(|| Json::Object(serde_json::Map::new()));
            Value::Gateway(typed("spec", spec())?, Box::new(typed::<GatewayStatus>("status", status)?))
        }
        Kind::HttpRoute => {
            only(&value, &["apiVersion", "kind", "metadata", "spec", "status"])?;
            Value::HttpRoute(typed("spec", spec())?)
        }
        Kind::GrpcRoute => {
            only(&value, &["apiVersion", "kind", "metadata", "spec", "status"])?;
            Value::GrpcRoute(typed("spec", spec())?)
        }
        Kind::ReferenceGrant => Value::ReferenceGrant(typed("spec", spec())?),
        Kind::AuthorizationPolicy => {
            only(&value, &["apiVersion", "kind", "metadata", "spec", "status"])?;
            Value::AuthorizationPolicy(typed("spec", spec())?)
        }
        Kind::PeerAuthentication => {
            only(&value, &["apiVersion", "kind", "metadata", "spec", "status"])?;
            Value::PeerAuthentication(typed("spec", spec())?)
        }
    };
    Ok((meta, content))
}

/// A policy whose `spec` is misspelt or whose rules stand one level too high would otherwise be the empty policy.
fn only(value: &Json, fields: &[&str]) -> Result<(), Unread> {
    match value.as_object().and_then(|object| object.keys().find(|key| !fields.contains(&key.as_str()))) {
        Some(key) => Err(Unread { field: key.clone(), reason: format!("unknown field `{key}`") }),
        None => Ok(()),
    }
}

/// Reads `value`, which stands at `prefix` of its object.
fn typed<T: DeserializeOwned>(prefix: &str, value: Json) -> Result<T, Unread> {
    serde_path_to_error::deserialize::<_, T>(value).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { "" } else { path.as_str() };
        let dot = if prefix.is_empty() || path.is_empty() { "" } else { "." };
        Unread { field: format!("{prefix}{dot}{path}"), reason: error.into_inner().to_string() }
    })
}

/// Makes the tree what the API server would store: no null fields, quantities as text.
fn normalise(value: &mut Json) {
    match value {
        Json::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            for (name, field) in fields.iter_mut() {
                if matches!(name.as_str(), "limits" | "requests" | "capacity" | "allocatable" | "overhead") {
                    quantities(field);
                }
                normalise(field);
            }
        }
        Json::Array(items) => items.iter_mut().for_each(normalise),
        Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => {}
    }
}

/// `cpu: 1` is a number in YAML and a Quantity, thus text, in the API.
fn quantities(value: &mut Json) {
    for quantity in value.as_object_mut().into_iter().flat_map(|fields| fields.values_mut()) {
        if let Json::Number(number) = quantity {
            *quantity = Json::String(number.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        parse("a.yaml", text).problems.iter().map(Problem::to_string).collect()
    }

    #[test]
    fn documents_and_lists_become_objects_with_their_lines() {
        let text = "# c\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\napiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: ServiceAccount\n  metadata:\n    name: a\n    namespace: shop\n- apiVersion: v1\n  kind: Node\n  metadata: {name: n1}\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n";
        let parsed = parse("a.yaml", text);
        let seen: Vec<_> = parsed.objects.iter().map(|o| (o.key.to_string(), o.origin.line)).collect();
        assert_eq!(
            seen,
            [
                ("Namespace shop".to_owned(), 3),
                ("ServiceAccount shop/a".to_owned(), 10),
                ("Node n1".to_owned(), 15)
            ]
        );
        assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
    }

    #[test]
    fn what_cannot_be_read_is_named_by_line_and_field() {
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: shop\nspec:\n  rules:\n  - to:\n    - operation:\n        ports: [80]\n";
        assert_eq!(
            problems(policy),
            [
                "a.yaml:10: error: AuthorizationPolicy shop/p: spec.rules[0].to[0].operation.ports[0]: invalid type: integer `80`, expected a string"
            ]
        );
        let unknown = policy.replace("ports: [80]", "port: ['80']");
        let got = problems(&unknown);
        assert!(got[0].starts_with("a.yaml:10: error: AuthorizationPolicy shop/p: spec.rules[0].to[0].operation.port: unknown field `port`"), "{got:?}");
        let syntax =
            problems("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: v1\nkind: [\n");
        assert!(syntax[0].starts_with("a.yaml:"), "{syntax:?}");
        assert!(parse("a.yaml", "kind: [").problems[0].line >= 1);
        let twice = problems("apiVersion: v1\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\n");
        assert!(twice[0].contains("duplicate"), "{twice:?}");
    }

    #[test]
    fn names_that_kubernetes_refuses_are_refused() {
        for bad in ["A", "a/b", "a..b", "-a", "a_b", "'a b'"] {
            let text = format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {bad}}}\n");
            assert_eq!(parse("a.yaml", &text).objects, [], "{bad}");
        }
        assert!(
            problems("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: ../x}\n")[0]
                .contains("metadata.namespace")
        );
    }

    #[test]
    fn an_unreadable_policy_keeps_its_selector_for_the_denial() {
        let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n  selector: {matchLabels: {app: a}}\n  action: 7\n";
        let parsed = parse("a.yaml", text);
        assert_eq!(parsed.objects, []);
        let Value::Unreadable { match_labels } = &parsed.unreadable[0].value else { panic!() };
        assert_eq!(match_labels["app"], "a");
        assert!(parsed.broken());
    }

    #[test]
    fn kinds_of_our_groups_that_are_not_read_are_told_and_do_not_break_the_file() {
        let parsed = parse(
            "a.yaml",
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v}\n",
        );
        assert_eq!(parsed.problems[0].severity, Severity::Info);
        assert!(!parsed.broken());
    }

    #[test]
    fn a_policy_of_a_version_that_is_not_served_denies() {
        let text =
            "apiVersion: security.istio.io/v2\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {}\n";
        let parsed = parse("a.yaml", text);
        assert_eq!((parsed.objects.len(), parsed.unreadable.len()), (0, 1));
        assert_eq!((parsed.broken(), parsed.problems[0].field.as_str()), (true, "apiVersion"));
    }

    #[test]
    fn a_document_may_begin_on_the_line_of_its_marker() {
        let text = "--- # one\n{apiVersion: v1, kind: ServiceAccount, metadata: {name: a}}\n--- {apiVersion: v1, kind: ServiceAccount, metadata: {name: b}}\n";
        let seen: Vec<_> =
            parse("a.yaml", text).objects.iter().map(|o| (o.key.name.to_string(), o.origin.line)).collect();
        assert_eq!(seen, [("a".to_owned(), 2), ("b".to_owned(), 3)]);
    }

    #[test]
    fn numbers_as_quantities_and_null_fields_are_as_the_api_server_takes_them() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: }\nspec:\n  containers:\n  - name: c\n    resources: {limits: {cpu: 1}}\n    env:\n";
        assert_eq!(problems(text), Vec::<String>::new());
    }
}
