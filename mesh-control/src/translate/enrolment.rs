//! (pure) Whether a pod is to be in the mesh. One answer for everybody: its agent captures by it, its peers send it
//! HBONE by it, and status and Events tell its reason.

use super::{
    Labels,
    workload::{DATAPLANE_MODE, PodFacts},
};

/// Its own label enrols a pod here, its namespace's does not: what a cluster needs to start must not depend on us by
/// accident.
const SYSTEM_NAMESPACE: &str = "kube-system";

/// Why a pod is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NotEnrolled {
    /// It has ended.
    Finished,
    /// It terminates tunnels by itself: a waypoint or a gateway.
    Waypoint,
    /// Neither it nor its namespace asks for it.
    NotLabelled,
    /// It says `none`.
    OptedOut,
    /// It has no network of its own.
    HostNetwork,
    /// A sidecar carries its traffic.
    Sidecar,
    /// It is of the mesh itself.
    InstallNamespace,
    /// `kube-system`, and its own label does not ask.
    SystemNamespace,
}

impl NotEnrolled {
    /// Stable word, also the reason of Events.
    pub fn word(self) -> &'static str {
        match self {
            Self::Finished => "Finished",
            Self::Waypoint => "Waypoint",
            Self::NotLabelled => "NotLabelled",
            Self::OptedOut => "OptedOut",
            Self::HostNetwork => "HostNetwork",
            Self::Sidecar => "Sidecar",
            Self::InstallNamespace => "InstallNamespace",
            Self::SystemNamespace => "SystemNamespace",
        }
    }

    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Finished => "the pod has ended",
            Self::Waypoint => "the pod terminates tunnels by itself",
            Self::NotLabelled => {
                "neither the pod nor its namespace has the label istio.io/dataplane-mode=ambient"
            }
            Self::OptedOut => "the pod's label istio.io/dataplane-mode=none leaves it out",
            Self::HostNetwork => "a pod with hostNetwork has no network of its own that could be captured",
            Self::Sidecar => "the pod's traffic is carried by a sidecar",
            Self::InstallNamespace => "pods of the mesh itself are not enrolled",
            Self::SystemNamespace => {
                "pods of kube-system are enrolled only by the label istio.io/dataplane-mode=ambient of their own"
            }
        }
    }

    /// Whether the reason of this word is one that [`refuses`](Self::refuses).
    pub fn is_refusal(word: &str) -> bool {
        let all = [Self::HostNetwork, Self::Sidecar, Self::InstallNamespace, Self::SystemNamespace];
        all.iter().any(|reason| reason.refuses() && reason.word() == word)
    }

    /// Whether somebody asked for what cannot be: worth an Event.
    pub fn refuses(self) -> bool {
        match self {
            Self::HostNetwork | Self::Sidecar | Self::InstallNamespace | Self::SystemNamespace => true,
            Self::Finished | Self::Waypoint | Self::NotLabelled | Self::OptedOut => false,
        }
    }
}

/// Where a pod stands.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Labels of its namespace.
    pub labels: &'a Labels,
    /// Where the mesh itself is installed; empty where it is not installed in any.
    pub install_namespace: &'a str,
    /// It terminates tunnels by itself.
    pub native: bool,
}

/// Decides whether `pod` is to be enrolled (`config-istio.md` 13).
///
/// # Errors
/// [`NotEnrolled`] says why not; reasons of others than the labels' only where the labels ask for it.
pub fn enrolment(pod: &PodFacts, place: &Place<'_>) -> Result<(), NotEnrolled> {
    if pod.finished {
        return Err(NotEnrolled::Finished);
    }
    if place.native {
        return Err(NotEnrolled::Waypoint);
    }
    let own = pod.label(DATAPLANE_MODE);
    let inherited = place.labels.get(DATAPLANE_MODE).map(String::as_str);
    match (own, inherited) {
        (Some("ambient"), _) => {}
        (Some("none"), _) => return Err(NotEnrolled::OptedOut),
        (_, Some("ambient")) => {}
        _ => return Err(NotEnrolled::NotLabelled),
    }
    if pod.host_network {
        return Err(NotEnrolled::HostNetwork);
    }
    if pod.sidecar {
        return Err(NotEnrolled::Sidecar);
    }
    if !place.install_namespace.is_empty() && place.namespace == place.install_namespace {
        return Err(NotEnrolled::InstallNamespace);
    }
    if place.namespace == SYSTEM_NAMESPACE && own != Some("ambient") {
        return Err(NotEnrolled::SystemNamespace);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Fragment, tests::translated},
        *,
    };

    fn decide(namespace: &str, mode: &str, meta: &str, spec: &str, status: &str) -> &'static str {
        let yaml = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-1, {meta}}}\nspec: {{containers: [], {spec}}}\nstatus: {{{status}}}\n"
        );
        let Fragment::Pod(pod) = translated(&yaml).fragment else { panic!("{yaml}") };
        let labels = Labels::from([(DATAPLANE_MODE.to_owned(), mode.to_owned())]);
        let place = Place {
            namespace,
            labels: &labels,
            install_namespace: "undermesh-system",
            native: pod.native_tunnel(),
        };
        enrolment(&pod, &place).map_or_else(NotEnrolled::word, |()| "")
    }

    #[test]
    fn a_pod_is_enrolled_where_it_is_asked_for_and_possible() {
        let own = |mode: &str| format!("labels: {{istio.io/dataplane-mode: {mode}}}");
        for (namespace, mode, meta, spec, status, reason) in [
            ("shop", "ambient", "", "", "", ""),
            ("shop", "ambient", "", "", "phase: Running", ""),
            ("shop", "ambient", &*own("none"), "", "", "OptedOut"),
            ("shop", "none", &*own("ambient"), "", "", ""),
            ("shop", "", &*own("ambient"), "", "", ""),
            ("shop", "", "", "", "", "NotLabelled"),
            ("shop", "none", "", "", "", "NotLabelled"),
            ("shop", "ambient", &*own("something"), "", "", ""),
            ("shop", "", &*own("something"), "", "", "NotLabelled"),
            ("shop", "Ambient", "", "", "", "NotLabelled"),
            ("shop", "ambient", "", "", "phase: Succeeded", "Finished"),
            ("shop", "ambient", "", "", "phase: Failed", "Finished"),
            ("shop", "", "", "", "phase: Failed", "Finished"),
            ("shop", "ambient", "", "hostNetwork: true", "", "HostNetwork"),
            // Nobody asked, so its network is not the reason.
            ("shop", "", "", "hostNetwork: true", "", "NotLabelled"),
            ("shop", "ambient", &*own("none"), "hostNetwork: true", "", "OptedOut"),
            ("shop", "ambient", "annotations: {sidecar.istio.io/status: x}", "", "", "Sidecar"),
            ("shop", "ambient", "labels: {networking.istio.io/tunnel: http}", "", "", "Waypoint"),
            ("kube-system", "ambient", "", "", "", "SystemNamespace"),
            ("kube-system", "ambient", &*own("ambient"), "", "", ""),
            ("kube-system", "", &*own("ambient"), "", "", ""),
            ("kube-system", "", "", "", "", "NotLabelled"),
            ("undermesh-system", "ambient", "", "", "", "InstallNamespace"),
            ("undermesh-system", "", &*own("ambient"), "", "", "InstallNamespace"),
            ("undermesh-system", "", "", "", "", "NotLabelled"),
        ] {
            let got = decide(namespace, mode, meta, spec, status);
            assert_eq!(got, reason, "{namespace} ({mode}) {meta} {spec} {status}");
        }
    }

    #[test]
    fn only_what_was_asked_for_and_refused_is_told() {
        let told = |reason: NotEnrolled| reason.refuses();
        assert!(told(NotEnrolled::HostNetwork) && told(NotEnrolled::SystemNamespace));
        assert!(
            !told(NotEnrolled::NotLabelled) && !told(NotEnrolled::OptedOut) && !told(NotEnrolled::Waypoint)
        );
    }
}
