//! (pure) What is worth an Event: problems of objects, pods that cannot be enrolled though somebody asked for it, and
//! pods that their agent could not capture.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::{model::Enrolment, proto::TYPE_LOCAL_POD};

use crate::{
    credentials::Principal,
    publish::Published,
    serve::proxies::Proxy,
    source::{Kind, ObjectKey, Severity},
    translate::enrolment::NotEnrolled,
};

/// Longest note of an Event, bytes (the API takes 1024).
const MAX_NOTE_BYTES: usize = 1000;

/// One Event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Told {
    /// Of which object.
    pub object: ObjectKey,
    /// Stable word.
    pub reason: String,
    /// For people.
    pub text: String,
}

/// Everything that should have been told by now.
pub fn wanted(published: &Published, all: &BTreeMap<Principal, Proxy>) -> BTreeSet<Told> {
    let mut told = problems(published);
    for (node, pods) in &published.world.local {
        let agent = all.get(&Principal::Node(node.clone())).filter(|agent| agent.connected);
        for (uid, pod) in pods {
            let object = ObjectKey::new(Kind::Pod, &pod.namespace, &pod.name);
            if let Enrolment::Not { reason, text } = &pod.enrolment
                && NotEnrolled::is_refusal(reason)
            {
                told.insert(Told { object: object.clone(), reason: reason.to_string(), text: bounded(text) });
            }
            let rejected = agent.and_then(|agent| agent.nacks.get(&(TYPE_LOCAL_POD, uid.clone())));
            let current = published.set(TYPE_LOCAL_POD).get(uid).map(|resource| &resource.version);
            if let Some((version, why)) = rejected
                && Some(version) == current
            {
                let reason = word(why).unwrap_or("NotCaptured");
                told.insert(Told { object, reason: reason.to_owned(), text: bounded(why) });
            }
        }
    }
    told
}

fn problems(published: &Published) -> BTreeSet<Told> {
    let named: BTreeMap<String, &ObjectKey> =
        published.world.carried.keys().map(|key| (key.to_string(), key)).collect();
    let worth = published.world.problems.iter().filter(|problem| problem.severity >= Severity::Warning);
    worth
        .filter_map(|problem| {
            let object = (*named.get(&problem.object)?).clone();
            let place = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
            let fallback = if problem.severity == Severity::Error { "Invalid" } else { "PartlyInvalid" };
            let reason = word(&problem.reason).unwrap_or(fallback).to_owned();
            Some(Told { object, reason, text: bounded(&format!("{place}{}", problem.reason)) })
        })
        .collect()
}

/// The stable word that a reason starts with: `NoMatchingParent: …`, `MAP_FULL: …`.
fn word(reason: &str) -> Option<&str> {
    let (word, _) = reason.split_once(':')?;
    let fits = word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    fits.then_some(word)
}

fn bounded(text: &str) -> String {
    let end = (0..=MAX_NOTE_BYTES.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_core::model::LocalPod;

    use super::*;
    use crate::{compile::World, source::Problem};

    fn pod(uid: &str, enrolment: Enrolment) -> Arc<LocalPod> {
        Arc::new(LocalPod {
            uid: uid.into(),
            namespace: "shop".into(),
            name: format!("pod-{uid}").into(),
            service_account: "default".into(),
            ips: Vec::new(),
            enrolment,
            probe_ports: BTreeSet::new(),
            terminating: false,
            kubelet_uid: None,
        })
    }

    #[test]
    fn problems_refusals_and_pods_that_were_not_captured_are_told() {
        let not = |reason: &str| Enrolment::Not { reason: reason.into(), text: "because".into() };
        let mut world = World::default();
        let pods = [
            pod("1", Enrolment::Wanted),
            pod("2", not("HostNetwork")),
            pod("3", not("NotLabelled")),
            pod("4", Enrolment::Wanted),
        ];
        world.local.insert("n1".into(), pods.into_iter().map(|pod| (pod.uid.clone(), pod)).collect());
        let route = ObjectKey::new(Kind::HttpRoute, "shop", "r");
        world.carried.insert(route.clone(), Default::default());
        for (severity, reason) in
            [(Severity::Error, "NoMatchingParent: none"), (Severity::Warning, "half"), (Severity::Info, "x")]
        {
            world.problems.push(Problem {
                file: String::new(),
                line: 0,
                object: route.to_string(),
                field: "spec".to_owned(),
                reason: reason.to_owned(),
                severity,
            });
        }
        let published = Published::default().next(world);
        let version = |uid: &str| published.set(TYPE_LOCAL_POD)[uid].version.clone();
        let mut agent = Proxy { connected: true, ..Proxy::default() };
        agent
            .nacks
            .insert((TYPE_LOCAL_POD, "1".into()), (version("1"), "NETNS_GONE: no namespace".to_owned()));
        agent.nacks.insert((TYPE_LOCAL_POD, "4".into()), ("older".into(), "x".to_owned()));
        let all = BTreeMap::from([(Principal::Node("n1".into()), agent)]);
        let told: Vec<String> = wanted(&published, &all)
            .into_iter()
            .map(|told| format!("{} {}: {}", told.object, told.reason, told.text))
            .collect();
        let expected = [
            "Pod shop/pod-1 NETNS_GONE: NETNS_GONE: no namespace",
            "Pod shop/pod-2 HostNetwork: because",
            "HTTPRoute shop/r NoMatchingParent: spec: NoMatchingParent: none",
            "HTTPRoute shop/r PartlyInvalid: spec: half",
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn notes_are_no_longer_than_the_api_takes() {
        assert_eq!(bounded(&"ä".repeat(2000)).len(), 1000);
        assert_eq!(bounded("short"), "short");
    }
}
