//! (pure) What an API server said: the newest state of every object, kind by kind.
//!
//! A list replaces all of its kind, an event one object. An object that can no longer be read stays as it last was
//! good, and one that never was takes no other down.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value as Json;

use super::{Kind, Object, ObjectKey, Objects, Problem, document};

/// `(namespace, name)` as the API server has them.
type Name = (String, String);

/// The objects of a cluster.
#[derive(Debug, Default)]
pub struct Cluster {
    kinds: BTreeMap<Kind, BTreeMap<Name, Held>>,
    /// Kinds of which no complete list has come yet.
    missing: BTreeSet<Kind>,
    /// Something is new since it was last asked.
    changed: bool,
}

/// One object as it was last told.
#[derive(Debug, Default)]
struct Held {
    /// The last version that could be read.
    good: Option<Arc<Object>>,
    /// A policy that never could be read.
    unreadable: Option<Arc<Object>>,
    problems: Vec<Problem>,
    /// What was told, so that a repetition is none.
    told: Option<Json>,
}

impl Cluster {
    /// Waits for a list of each of `kinds`.
    pub fn expecting(kinds: impl IntoIterator<Item = Kind>) -> Self {
        Self { missing: kinds.into_iter().collect(), ..Self::default() }
    }

    /// Whether every kind was listed, or is known not to be served.
    pub fn complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// Whether something is new since the last call; never before everything was listed.
    pub fn take_changed(&mut self) -> bool {
        self.complete() && std::mem::take(&mut self.changed)
    }

    /// Kinds that were not listed yet.
    pub fn missing(&self) -> impl Iterator<Item = Kind> + '_ {
        self.missing.iter().copied()
    }

    /// A complete list: what is not in it is gone. Says whether anything changed.
    pub fn replace(&mut self, kind: Kind, values: Vec<Json>) -> bool {
        let listed = self.missing.remove(&kind);
        let names: BTreeSet<Name> = values.iter().map(name_of).collect();
        let of_kind = self.kinds.entry(kind).or_default();
        let before = of_kind.len();
        of_kind.retain(|name, _| names.contains(name));
        let mut changed = listed || of_kind.len() != before;
        for value in values {
            changed |= self.set(kind, value);
        }
        self.changed |= changed;
        changed
    }

    /// An object is now so.
    pub fn set(&mut self, kind: Kind, mut value: Json) -> bool {
        slim(kind, &mut value);
        let held = self.kinds.entry(kind).or_default().entry(name_of(&value)).or_default();
        if held.told.as_ref() == Some(&value) {
            return false;
        }
        let parsed = document::read(&value);
        if let Some(object) = parsed.objects.into_iter().next() {
            *held = Held { good: Some(Arc::new(object)), ..Held::default() };
        } else if held.good.is_none() {
            held.unreadable = parsed.unreadable.into_iter().next().map(Arc::new);
        }
        held.problems = parsed.problems;
        held.told = Some(value);
        self.changed = true;
        true
    }

    /// An object is gone.
    pub fn remove(&mut self, kind: Kind, value: &Json) -> bool {
        let gone = self.kinds.get_mut(&kind).is_some_and(|of_kind| of_kind.remove(&name_of(value)).is_some());
        self.changed |= gone;
        gone
    }

    /// The objects and the problems of reading them.
    pub fn objects(&self) -> (Objects, Vec<Problem>) {
        let held = || self.kinds.values().flat_map(BTreeMap::values);
        let objects = held().filter_map(|held| held.good.as_ref().or(held.unreadable.as_ref()));
        let objects: BTreeMap<ObjectKey, Arc<Object>> =
            objects.map(|object| (object.key.clone(), object.clone())).collect();
        (objects, held().flat_map(|held| held.problems.iter().cloned()).collect())
    }
}

fn name_of(value: &Json) -> Name {
    let text = |pointer: &str| value.pointer(pointer).and_then(Json::as_str).unwrap_or_default().to_owned();
    (text("/metadata/namespace"), text("/metadata/name"))
}

/// Takes away what the mesh does not act on and what changes for others' reasons, our own status writing above all.
fn slim(kind: Kind, value: &mut Json) {
    if let Some(meta) = value.get_mut("metadata").and_then(Json::as_object_mut) {
        meta.remove("managedFields");
        meta.remove("resourceVersion");
        if let Some(annotations) = meta.get_mut("annotations").and_then(Json::as_object_mut) {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    // Of a Gateway the addresses count: those of a Gateway of ours are its Service's, which the leader copies there.
    let keeps_status = matches!(kind, Kind::Pod | Kind::Gateway | Kind::Service);
    let Some(object) = value.as_object_mut() else { return };
    if !keeps_status {
        object.remove("status");
    } else if kind == Kind::Gateway
        && let Some(status) = object.get_mut("status").and_then(Json::as_object_mut)
    {
        status.retain(|field, _| field == "addresses");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::source::Value;

    fn account(name: &str) -> Json {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": name}})
    }

    fn policy(name: &str, mode: &str) -> Json {
        json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"namespace": "shop", "name": name}, "spec": {"mtls": {mode: "STRICT"}}})
    }

    fn names(cluster: &Cluster) -> Vec<String> {
        cluster.objects().0.keys().map(|key| key.name.to_string()).collect()
    }

    #[test]
    fn a_list_replaces_its_kind_and_nothing_else() {
        let mut cluster = Cluster::expecting([Kind::Service, Kind::PeerAuthentication]);
        assert!(cluster.replace(Kind::Service, vec![account("a"), account("b")]));
        assert!(!cluster.complete() && !cluster.take_changed());
        assert!(cluster.replace(Kind::PeerAuthentication, vec![policy("p", "mode")]));
        assert!(cluster.complete() && cluster.take_changed() && !cluster.take_changed());
        assert!(!cluster.replace(Kind::Service, vec![account("a"), account("b")]));
        assert!(cluster.replace(Kind::Service, vec![account("b"), account("c")]));
        assert_eq!(names(&cluster), ["b", "c", "p"]);
        assert!(cluster.replace(Kind::Service, vec![]));
        assert_eq!(names(&cluster), ["p"]);
    }

    #[test]
    fn an_empty_list_completes() {
        let mut cluster = Cluster::expecting([Kind::Service]);
        assert!(cluster.replace(Kind::Service, vec![]) && cluster.complete());
    }

    #[test]
    fn events_change_one_object() {
        let mut cluster = Cluster::default();
        assert!(cluster.set(Kind::Service, account("a")));
        let mut again = account("a");
        again["metadata"]["resourceVersion"] = json!("77");
        again["metadata"]["managedFields"] = json!([{"manager": "x"}]);
        assert!(!cluster.set(Kind::Service, again));
        assert!(!cluster.remove(Kind::Service, &account("b")));
        assert!(cluster.remove(Kind::Service, &account("a")));
        assert!(names(&cluster).is_empty());
    }

    #[test]
    fn what_cannot_be_read_stays_as_it_was_good_and_denies_if_it_never_was() {
        let mut cluster = Cluster::default();
        cluster.set(Kind::PeerAuthentication, policy("good", "mode"));
        cluster.set(Kind::PeerAuthentication, policy("good", "mod"));
        cluster.set(Kind::PeerAuthentication, policy("bad", "mod"));
        cluster.set(Kind::Service, account("a"));
        let (objects, problems) = cluster.objects();
        let is = |name: &str| {
            let key = ObjectKey::new(Kind::PeerAuthentication, "shop", name);
            matches!(objects[&key].value, Value::Unreadable { .. })
        };
        assert_eq!((objects.len(), is("good"), is("bad")), (3, false, true));
        assert_eq!(problems.len(), 2);
        assert_eq!(
            (problems[0].object.as_str(), problems[0].field.as_str()),
            ("PeerAuthentication shop/bad", "spec.mtls.mod")
        );
        cluster.set(Kind::PeerAuthentication, policy("bad", "mode"));
        cluster.set(Kind::PeerAuthentication, policy("good", "mode"));
        assert!(cluster.objects().1.is_empty());
    }

    #[test]
    fn status_that_we_write_ourselves_is_no_change() {
        let mut cluster = Cluster::default();
        cluster.set(Kind::PeerAuthentication, policy("p", "mode"));
        let mut written = policy("p", "mode");
        written["status"] = json!({"conditions": []});
        assert!(!cluster.set(Kind::PeerAuthentication, written));
    }
}
