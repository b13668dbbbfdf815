//! The World as resources: encoded once, versioned by content, and who may see which.

use std::{collections::BTreeMap, sync::Arc};

use aws_lc_rs::digest;
use mesh_core::proto::{
    TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_LOCAL_POD, TYPE_MESH_OPTIONS, TYPE_WAYPOINT, TYPES, mesh, node,
    security, waypoint, workload,
};
use prost::Message;
use serde::Serialize;

use crate::{compile::World, credentials::Principal};

/// One resource, ready to be sent.
#[derive(Debug, PartialEq)]
pub struct Resource {
    /// Resource name.
    pub name: Arc<str>,
    /// Digest of the content.
    pub version: Arc<str>,
    /// Type.
    pub type_url: &'static str,
    /// The encoded message.
    pub body: Vec<u8>,
}

/// All resources of one type by name.
pub type ResourceSet = BTreeMap<Arc<str>, Arc<Resource>>;

/// What is published now.
#[derive(Debug)]
pub struct Published {
    /// Grows by one with every change of a resource.
    pub revision: u64,
    /// Digest of everything that is published: the same in replicas that publish the same.
    pub digest: Arc<str>,
    /// What it was made of.
    pub world: Arc<World>,
    sets: BTreeMap<&'static str, ResourceSet>,
}

impl Published {
    /// The next state: resources whose content is the same are the same.
    pub fn next(&self, world: World) -> Self {
        let mut sets: BTreeMap<&'static str, ResourceSet> = BTreeMap::new();
        let mut put = |type_url: &'static str,
                       name: String,
                       version: Arc<str>,
                       encode: &dyn Fn() -> Vec<u8>| {
            let name: Arc<str> = name.into();
            let old =
                self.sets.get(type_url).and_then(|set| set.get(&name)).filter(|old| old.version == version);
            let resource = old.cloned().unwrap_or_else(|| {
                Arc::new(Resource { name: name.clone(), version, type_url, body: encode() })
            });
            sets.entry(type_url).or_default().insert(name, resource);
        };
        for item in world.workloads.values() {
            let address =
                || workload::Address { r#type: Some(workload::address::Type::Workload((&**item).into())) };
            put(TYPE_ADDRESS, item.uid.to_string(), version(&**item), &|| address().encode_to_vec());
        }
        for item in world.services.values() {
            let address =
                || workload::Address { r#type: Some(workload::address::Type::Service((&**item).into())) };
            put(TYPE_ADDRESS, item.key.to_string(), version(&**item), &|| address().encode_to_vec());
        }
        for item in world.policies.values() {
            let encode = || security::Authorization::from(&**item).encode_to_vec();
            put(TYPE_AUTHORIZATION, item.key.to_string(), version(&**item), &encode);
        }
        for (name, item) in &world.waypoints {
            let encode = || waypoint::WaypointConfig::from(&**item).encode_to_vec();
            put(TYPE_WAYPOINT, name.to_string(), version(&**item), &encode);
        }
        for item in world.local.values().flat_map(BTreeMap::values) {
            let encode = || node::LocalPod::from(&**item).encode_to_vec();
            put(TYPE_LOCAL_POD, item.uid.to_string(), version(&**item), &encode);
        }
        let options = || mesh::MeshOptions::from(&world.options).encode_to_vec();
        put(TYPE_MESH_OPTIONS, mesh::NAME.to_owned(), version(&world.options), &options);
        let same = sets == self.sets;
        let revision = if same { self.revision } else { self.revision + 1 };
        let digest = if same { self.digest.clone() } else { digest_of(&sets) };
        Self { revision, digest, world: Arc::new(world), sets }
    }

    /// All resources of one type.
    pub fn set(&self, type_url: &str) -> &ResourceSet {
        static NONE: ResourceSet = ResourceSet::new();
        self.sets.get(type_url).unwrap_or(&NONE)
    }

    /// The resources of one type that a caller sees: everything, but L7 configuration only by its own waypoint, and
    /// what concerns the pods of a node only by the node's agent.
    pub fn visible<'a>(
        &'a self,
        caller: &Principal,
        type_url: &str,
    ) -> Box<dyn Iterator<Item = &'a Arc<Resource>> + Send + 'a> {
        let set = self.set(type_url);
        match (type_url, caller) {
            (TYPE_LOCAL_POD, Principal::Node(node)) => {
                let own = self.world.local.get(node).into_iter().flat_map(BTreeMap::keys);
                Box::new(own.filter_map(|uid| set.get(uid)))
            }
            (TYPE_WAYPOINT, Principal::Pod { namespace, name }) => {
                let pod = self.world.pods.get(&(namespace.clone(), name.clone()));
                let own = pod.and_then(|pod| pod.waypoint.as_ref()).and_then(|gateway| set.get(gateway));
                Box::new(own.into_iter())
            }
            (TYPE_LOCAL_POD | TYPE_WAYPOINT, _) => Box::new(std::iter::empty()),
            _ => Box::new(set.values()),
        }
    }

    /// The known type of that name; static, so that it can be kept.
    pub fn type_of(type_url: &str) -> Option<&'static str> {
        TYPES.into_iter().find(|known| *known == type_url)
    }
}

impl Default for Published {
    fn default() -> Self {
        Self { revision: 0, digest: "".into(), world: Arc::default(), sets: BTreeMap::new() }
    }
}

fn digest_of(sets: &BTreeMap<&'static str, ResourceSet>) -> Arc<str> {
    let resources = sets.iter().flat_map(|(type_url, set)| set.values().map(move |one| (type_url, one)));
    let names: Vec<_> = resources.map(|(type_url, one)| (type_url, &one.name, &one.version)).collect();
    version(&names)
}

/// Digest of the model, whose order is fixed, not of the encoding, whose maps have none.
fn version(content: &impl Serialize) -> Arc<str> {
    let json = serde_json::to_vec(content).unwrap_or_default();
    let digest = digest::digest(&digest::SHA256, &json);
    digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>().into()
}
