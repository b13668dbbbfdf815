//! What an installation remembers about itself in the cluster: how it was asked for, and which objects it made, so that
//! an upgrade keeps settings and removes what is no longer wanted.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cluster::{
    Cluster,
    kinds::{self, Kind},
};

/// Name of the ConfigMap.
pub const NAME: &str = "undermesh-install";

/// An installation as remembered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its version.
    pub version: String,
    /// Its profile.
    pub profile: String,
    /// What was set above the profile.
    pub values: Value,
    /// What was applied.
    pub objects: BTreeSet<ObjectId>,
    /// The namespace was there before the first installation: it is not ours to delete.
    #[serde(default)]
    pub namespace_was_there: bool,
    /// What its labels were that the installation overwrote.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub namespace_labels: BTreeMap<String, String>,
}

/// (pure) What labels of a namespace have another value than `ours` gives them.
pub fn overwritten(found: &Value, ours: &Value) -> BTreeMap<String, String> {
    let labels = ours["metadata"]["labels"].as_object().into_iter().flatten();
    let former = labels.filter_map(|(key, ours)| {
        let former = found["metadata"]["labels"][key].as_str()?;
        (*ours != *former).then(|| (key.clone(), former.to_owned()))
    });
    former.collect()
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectId {
    /// Its `apiVersion`.
    pub api_version: String,
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

impl ObjectId {
    /// (pure) Of an object.
    pub fn of(object: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Self {
            api_version: text(&object["apiVersion"]),
            kind: text(&object["kind"]),
            namespace: object["metadata"]["namespace"].as_str().map(str::to_owned),
            name: text(&object["metadata"]["name"]),
        }
    }

    /// (pure) Its kind; none when this version does not know it.
    pub fn kind(&self) -> Option<Kind> {
        Kind::of(&json!({"apiVersion": self.api_version, "kind": self.kind}))
    }
}

impl std::fmt::Display for ObjectId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

impl Record {
    /// Reads it; none when there is none.
    ///
    /// # Errors
    /// What the server says, or a record that cannot be read.
    pub async fn read(cluster: &Cluster, namespace: &str) -> anyhow::Result<Option<Self>> {
        let Some(found) = cluster.get(kinds::CONFIG_MAP, Some(namespace), NAME).await? else {
            return Ok(None);
        };
        let text = found["data"]["record"].as_str().unwrap_or_default();
        serde_json::from_str(text).map(Some).with_context(|| format!("read ConfigMap {namespace}/{NAME}"))
    }

    /// (pure) As an object.
    ///
    /// # Errors
    /// None that is known of.
    pub fn object(&self, namespace: &str) -> anyhow::Result<Value> {
        Ok(json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": NAME,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/part-of": "undermesh"},
            },
            "data": {"record": serde_json::to_string(self)?},
        }))
    }

    /// (pure) What was made before and is no longer wanted, in the order in which it is removed. Never a namespace:
    /// everything else would go with it.
    pub fn obsolete(&self, wanted: &BTreeSet<ObjectId>) -> Vec<ObjectId> {
        let unwanted =
            self.objects.iter().rev().filter(|object| !wanted.contains(object) && object.kind != "Namespace");
        unwanted.cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_others_are_remembered() {
        let with = |labels: Value| json!({"metadata": {"labels": labels}});
        let found = with(json!({"a": "theirs", "b": "same", "c": "other"}));
        let ours = with(json!({"a": "ours", "b": "same", "d": "new"}));
        assert_eq!(overwritten(&found, &ours), BTreeMap::from([("a".to_owned(), "theirs".to_owned())]));
        assert!(overwritten(&json!({}), &ours).is_empty());
    }

    #[test]
    fn what_is_no_longer_wanted() {
        let id = |kind: &str, name: &str| {
            ObjectId::of(&json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}))
        };
        let objects = BTreeSet::from([id("A", "a"), id("B", "b"), id("Namespace", "ns")]);
        let record = Record { objects, ..Record::default() };
        assert_eq!(record.obsolete(&BTreeSet::from([id("A", "a"), id("C", "c")])), [id("B", "b")]);
        let object = record.object("ns").unwrap();
        let text = object["data"]["record"].as_str().unwrap();
        assert_eq!(serde_json::from_str::<Record>(text).unwrap(), record);
    }
}
