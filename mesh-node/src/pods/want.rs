//! (pure) What is to be done about one pod of this node, given what the control plane says of it, where its sandbox is,
//! and whether it is enrolled.

use std::net::IpAddr;

use mesh_core::model::{Enrolment, LocalPod};

use super::record::{PodRecord, usable};
use crate::cni::results::Place;

/// What is to be done about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Enrol it as described; nothing happens if it is.
    Enrol(PodRecord),
    /// It is enrolled and should not be.
    Leave,
    /// It is as it should be: not enrolled, and the reason.
    Outside {
        /// For people.
        why: String,
    },
    /// It has no sandbox yet; the CNI plugin will ask before it has one.
    Unborn,
    /// It has addresses, and nobody can tell where.
    Nowhere,
    /// It has a sandbox without an address that can be used.
    NoAddress,
}

/// Decides about `pod`, whose sandbox is at `place`.
pub fn step(pod: &LocalPod, place: Option<&Place>, enrolled: bool) -> Step {
    if let Enrolment::Not { reason, text } = &pod.enrolment {
        return match enrolled {
            true => Step::Leave,
            false => Step::Outside { why: format!("{reason}: {text}") },
        };
    }
    let Some(place) = place else {
        // An address in its status means that its sandbox was made, unless it is enrolled already.
        return if pod.ips.is_empty() { Step::Unborn } else { Step::Nowhere };
    };
    // What the plugins made is what is there; the status repeats it later.
    let ips = [&place.ips, &pod.ips].into_iter().map(|ips| addresses(ips)).find(|ips| !ips.is_empty());
    let Some(ips) = ips else { return Step::NoAddress };
    Step::Enrol(PodRecord {
        uid: pod.uid.to_string(),
        namespace: pod.namespace.to_string(),
        name: pod.name.to_string(),
        service_account: pod.service_account.to_string(),
        ips,
        netns: place.netns.clone(),
    })
}

/// Each once, in the order in which they were told: the first of a family is the primary one. Link-local ones identify
/// nobody.
fn addresses(ips: &[IpAddr]) -> Vec<IpAddr> {
    let mut unique = Vec::new();
    for ip in ips.iter().map(IpAddr::to_canonical).filter(usable) {
        if !unique.contains(&ip) {
            unique.push(ip);
        }
    }
    unique
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn local(uid: &str, wanted: bool, ips: &[&str]) -> LocalPod {
        LocalPod {
            uid: uid.into(),
            namespace: "shop".into(),
            name: "web".into(),
            service_account: "web".into(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            enrolment: match wanted {
                true => Enrolment::Wanted,
                false => Enrolment::Not { reason: "NotSelected".into(), text: "no label".into() },
            },
            probe_ports: Default::default(),
            terminating: false,
            kubelet_uid: None,
        }
    }

    fn place(ips: &[&str]) -> Place {
        Place { netns: "/run/netns/x".into(), ips: ips.iter().map(|ip| ip.parse().unwrap()).collect() }
    }

    #[test]
    fn each_pod_gets_what_it_needs() {
        let check = |pod: LocalPod, place: Option<Place>, enrolled: bool, expected: &str| {
            let said = match step(&pod, place.as_ref(), enrolled) {
                Step::Enrol(record) => format!("enrol {:?} in {}", record.ips, record.netns.display()),
                other => format!("{other:?}"),
            };
            assert!(said.starts_with(expected), "{pod:?} {place:?} {enrolled}: {said}");
        };
        let here = || Some(place(&["fe80::1", "10.0.0.2", "fd00::2", "10.0.0.2"]));
        check(local("u", true, &[]), None, false, "Unborn");
        check(local("u", true, &["10.0.0.2"]), None, false, "Nowhere");
        check(local("u", true, &[]), here(), false, "enrol [10.0.0.2, fd00::2] in /run/netns/x");
        check(local("u", true, &["10.0.0.2"]), here(), true, "enrol [10.0.0.2, fd00::2]");
        check(local("u", true, &["10.0.0.9"]), Some(place(&[])), false, "enrol [10.0.0.9]");
        check(local("u", true, &[]), Some(place(&["fe80::1"])), false, "NoAddress");
        check(local("u", false, &["10.0.0.2"]), here(), true, "Leave");
        check(local("u", false, &["10.0.0.2"]), here(), false, "Outside { why: \"NotSelected: no label\" }");
        check(local("u", false, &[]), None, true, "Leave");
    }
}
