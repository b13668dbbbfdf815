//! Which definitions of kinds are written: the Gateway API's as a set, each of Istio's by itself; never over newer ones,
//! another channel, or somebody else's.

use serde_json::Value;

use crate::chart;

/// Annotations of the Gateway API's definitions.
const BUNDLE: &str = "gateway.networking.k8s.io/bundle-version";
const CHANNEL: &str = "gateway.networking.k8s.io/channel";
const GATEWAY_API: &str = "gateway.networking.k8s.io";

/// Label of what is ours.
pub const PART_OF: (&str, &str) = ("app.kubernetes.io/part-of", "undermesh");

macro_rules! definitions {
    ($($name:literal)*) => {
        &[$(($name, include_str!(concat!("../../../deploy/helm/undermesh/crds/", $name, ".yaml")))),*]
    };
}

const DEFINITIONS: &[(&str, &str)] = definitions! {
    "gateway.networking.k8s.io_backendtlspolicies"
    "gateway.networking.k8s.io_gatewayclasses"
    "gateway.networking.k8s.io_gateways"
    "gateway.networking.k8s.io_grpcroutes"
    "gateway.networking.k8s.io_httproutes"
    "gateway.networking.k8s.io_listenersets"
    "gateway.networking.k8s.io_referencegrants"
    "gateway.networking.k8s.io_tcproutes"
    "gateway.networking.k8s.io_tlsroutes"
    "gateway.networking.k8s.io_udproutes"
    "security.istio.io_authorizationpolicies"
    "security.istio.io_peerauthentications"
};

/// What the mesh cannot do without.
const NEEDED: &[&str] = &[
    "gatewayclasses.gateway.networking.k8s.io",
    "gateways.gateway.networking.k8s.io",
    "httproutes.gateway.networking.k8s.io",
    "grpcroutes.gateway.networking.k8s.io",
    "referencegrants.gateway.networking.k8s.io",
];

/// The definitions of the chart.
///
/// # Errors
/// A fault of the chart.
pub fn bundled() -> anyhow::Result<Vec<Value>> {
    let mut all = Vec::new();
    for (_, yaml) in DEFINITIONS {
        all.extend(chart::documents(yaml)?);
    }
    Ok(all)
}

/// Definitions to write, and what is to be said about the others.
#[derive(Debug, Default, PartialEq)]
pub struct Decision {
    /// To be written.
    pub write: Vec<Value>,
    /// For people.
    pub notes: Vec<String>,
    /// Why the mesh cannot work with what is there.
    pub problems: Vec<String>,
}

/// (pure) Decides about the bundled definitions with what the cluster has.
pub fn decide(bundled: &[Value], present: &[Value]) -> Decision {
    let mut decision = Decision::default();
    let (gateway, others): (Vec<&Value>, Vec<&Value>) =
        bundled.iter().partition(|definition| definition["spec"]["group"] == GATEWAY_API);
    gateway_api(&gateway, present, &mut decision);
    for definition in others {
        match present.iter().find(|there| name(there) == name(definition)) {
            Some(there) if !ours(there) => {
                decision.notes.push(format!("{}: somebody else's, left as it is", name(definition)));
            }
            _ => decision.write.push(definition.clone()),
        }
    }
    decision
}

fn gateway_api(bundled: &[&Value], present: &[Value], decision: &mut Decision) {
    let there: Vec<&Value> = present.iter().filter(|there| there["spec"]["group"] == GATEWAY_API).collect();
    let bundle = |definition: &Value| annotation(definition, BUNDLE).unwrap_or_default().to_owned();
    let wanted = bundled.first().map(|definition| bundle(definition)).unwrap_or_default();
    let experimental = there.iter().find(|there| annotation(there, CHANNEL) == Some("experimental"));
    let newer = there.iter().find(|there| version(&bundle(there)) > version(&wanted));
    let unknown = there.iter().find(|there| annotation(there, BUNDLE).is_none());
    // The set is one: parts of several versions or channels do not fit together.
    let keep = match (experimental, newer, unknown) {
        (Some(there), _, _) => Some(format!("the experimental channel, {}", bundle(there))),
        (None, Some(there), _) => Some(format!("the newer {}", bundle(there))),
        (None, None, Some(there)) => Some(format!("{} without a version", name(there))),
        (None, None, None) => None,
    };
    let Some(keep) = keep else {
        decision.write.extend(bundled.iter().map(|definition| (*definition).clone()));
        return;
    };
    decision.notes.push(format!("Gateway API: {keep} is there, left as it is"));
    for needed in NEEDED.iter().filter(|needed| !there.iter().any(|there| name(there) == **needed)) {
        decision.problems.push(format!(
            "{needed} is missing beside {keep}: complete that set of the Gateway API's definitions"
        ));
    }
}

/// (pure) Whether a definition was written by an installation of ours.
pub fn ours(definition: &Value) -> bool {
    definition["metadata"]["labels"][PART_OF.0] == PART_OF.1
}

/// (pure) A definition as it is written: labelled as ours where it is to be known as ours again.
pub fn labelled(mut definition: Value) -> Value {
    if let Some(metadata) = definition["metadata"].as_object_mut() {
        let labels = metadata.entry("labels").or_insert_with(|| Value::Object(Default::default()));
        labels[PART_OF.0] = PART_OF.1.into();
    }
    definition
}

fn name(definition: &Value) -> &str {
    definition["metadata"]["name"].as_str().unwrap_or_default()
}

fn annotation<'d>(definition: &'d Value, key: &str) -> Option<&'d str> {
    definition["metadata"]["annotations"][key].as_str()
}

/// `v1.6.3` as numbers; what follows a dash counts as older than the same without.
fn version(text: &str) -> (u32, u32, u32, bool) {
    let text = text.trim_start_matches('v');
    let (numbers, released) = text.split_once('-').map_or((text, true), |(numbers, _)| (numbers, false));
    let mut parts = numbers.split('.').map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next(), released)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn there(name: &str, bundle: &str, channel: &str) -> Value {
        json!({
            "metadata": {"name": name, "annotations": {BUNDLE: bundle, CHANNEL: channel}},
            "spec": {"group": GATEWAY_API},
        })
    }

    fn check(present: &[Value], writes: bool, note: &str, problems: usize) {
        let bundled = bundled().unwrap();
        let decision = decide(&bundled, present);
        let wrote = decision.write.iter().any(|written| written["spec"]["group"] == GATEWAY_API);
        assert_eq!(wrote, writes, "{present:?}");
        assert_eq!(decision.notes.join("\n"), note);
        assert_eq!(decision.problems.len(), problems, "{:?}", decision.problems);
    }

    #[test]
    fn a_newer_set_and_another_channel_are_left_alone() {
        let set = |bundle: &str, channel: &str| -> Vec<Value> {
            NEEDED.iter().map(|name| there(name, bundle, channel)).collect()
        };
        check(&[], true, "", 0);
        check(&set("v1.5.9", "standard"), true, "", 0);
        check(&set("v1.6.3", "standard"), true, "", 0);
        check(&set("v1.6.3-rc.1", "standard"), true, "", 0);
        let newer = "Gateway API: the newer v1.10.0 is there, left as it is";
        check(&set("v1.10.0", "standard"), false, newer, 0);
        let experimental = "Gateway API: the experimental channel, v1.2.0 is there, left as it is";
        check(&set("v1.2.0", "experimental"), false, experimental, 0);
        check(&set("v1.2.0", "experimental")[..3], false, experimental, 2);
    }

    #[test]
    fn somebody_elses_definitions_stay() {
        let mut policy = json!({
            "metadata": {"name": "authorizationpolicies.security.istio.io"},
            "spec": {"group": "security.istio.io"},
        });
        let bundled = bundled().unwrap();
        let writes = |decision: &Decision| {
            decision.write.iter().any(|written| written["metadata"]["name"] == policy_name())
        };
        let decision = decide(&bundled, std::slice::from_ref(&policy));
        assert!(!writes(&decision));
        assert_eq!(decision.notes, [format!("{}: somebody else's, left as it is", policy_name())]);
        policy = labelled(policy);
        assert!(writes(&decide(&bundled, &[policy])));
    }

    fn policy_name() -> &'static str {
        "authorizationpolicies.security.istio.io"
    }
}
