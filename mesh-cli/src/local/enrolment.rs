//! (pure) Which pods the mesh captures (`config-istio.md` 13).

use super::expand::WantedPod;

/// The label that says so, on pods and namespaces.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// The pod's label wins over its namespace's; pods with a sidecar are never captured.
pub fn wanted<'a>(pod: &WantedPod, namespace_label: impl Fn(&str) -> Option<&'a str>) -> bool {
    if pod.waypoint.is_some() || pod.annotations.contains_key("sidecar.istio.io/status") {
        return false;
    }
    match pod.labels.get(DATAPLANE_MODE).map(String::as_str) {
        Some("ambient") => true,
        Some("none") => false,
        _ => namespace_label(DATAPLANE_MODE) == Some("ambient"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::expand::{Key, Source};

    #[test]
    fn the_pods_label_wins_over_its_namespaces() {
        let check = |pod: Option<&str>, namespace: Option<&'static str>, expected: bool| {
            let pod = WantedPod {
                key: Key::new("a", "b"),
                labels: pod.map(|mode| (DATAPLANE_MODE.to_owned(), mode.to_owned())).into_iter().collect(),
                annotations: Default::default(),
                spec: Default::default(),
                workload: (String::new(), Key::new("", "")),
                owner: None,
                node: String::new(),
                waypoint: None,
                enrol: false,
                source: Source::default(),
                revision: 0,
            };
            assert_eq!(wanted(&pod, |_| namespace), expected, "{:?} {namespace:?}", pod.labels);
            let sidecar = WantedPod {
                annotations: [("sidecar.istio.io/status".to_owned(), String::new())].into(),
                ..pod
            };
            assert!(!wanted(&sidecar, |_| namespace));
        };
        check(None, None, false);
        check(None, Some("ambient"), true);
        check(None, Some("none"), false);
        check(Some("none"), Some("ambient"), false);
        check(Some("ambient"), None, true);
        check(Some("ambient"), Some("none"), true);
        check(Some("other"), Some("ambient"), true);
    }
}
