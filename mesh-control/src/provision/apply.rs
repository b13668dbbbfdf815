//! Puts what [`super::provision`] decides into the cluster; only the leader does.

use std::{collections::BTreeMap, fmt::Debug, sync::Arc, time::Duration};

use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
};
use mesh_net::drain::Draining;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::watch, time::Instant};

use super::{Provisioned, Settings, provision};
use crate::{leader::lost, publish::Published, source::ObjectKey};

/// Who applied a field, as the API server remembers it.
const FIELD_MANAGER: &str = "undermesh-control";
/// The API server answers one request within this.
const ANSWER: Duration = Duration::from_secs(10);
/// How often everything is applied again, whatever somebody did to it meanwhile.
const AGAIN: Duration = Duration::from_secs(60);
/// Wait after something that could not be applied.
const RETRY: Duration = Duration::from_secs(3);

/// Why an object cannot be made.
#[derive(Debug, thiserror::Error)]
enum ApplyError {
    /// It is there and belongs to somebody else.
    #[error("{kind} {namespace}/{name} is there already and does not belong to the Gateway: left alone")]
    Foreign { kind: String, namespace: String, name: String },
    /// The API server refuses it.
    #[error("{kind}")]
    Api {
        kind: String,
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server is silent.
    #[error("{kind}: the API server does not answer")]
    Silent { kind: String },
}

/// Gateways whose objects cannot be made, each with the reason.
pub type Refused = BTreeMap<ObjectKey, String>;

/// What was applied, and when.
type Done = BTreeMap<ObjectKey, (Provisioned, Instant)>;

/// Provisions waypoints for as long as this replica leads, until the drain starts; `refused` says what cannot be.
pub async fn run(
    client: Client,
    settings: Settings,
    mut published: watch::Receiver<Arc<Published>>,
    mut leading: watch::Receiver<bool>,
    refused: watch::Sender<Arc<Refused>>,
    draining: Draining,
) {
    let mut done = Done::new();
    loop {
        let world = published.borrow_and_update().clone();
        let leads = *leading.borrow_and_update();
        let wait = if leads {
            tokio::select! {
                biased;
                () = draining.started() => return,
                // Another may write by now.
                () = lost(&mut leading) => continue,
                (wait, failed) = round(&client, &settings, &world, &mut done) => {
                    refused.send_replace(Arc::new(failed));
                    wait
                }
            }
        } else {
            // Another one may change them: apply anew when it is our turn again.
            done.clear();
            AGAIN
        };
        tokio::select! {
            biased;
            () = draining.started() => return,
            changed = published.changed() => if changed.is_err() { return },
            changed = leading.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Applies what differs from what was applied, or was applied long ago; how long to wait for the next round, and what
/// could not be applied.
async fn round(
    client: &Client,
    settings: &Settings,
    world: &Published,
    done: &mut Done,
) -> (Duration, Refused) {
    let gateways = &world.world.outcomes.gateways;
    // Its objects go with the Gateway.
    done.retain(|key, _| gateways.contains_key(key));
    let (mut wait, mut refused) = (AGAIN, Refused::new());
    for (key, gateway) in gateways {
        let Some(facts) = &gateway.facts else { continue };
        let made = match provision(key, facts, settings) {
            Ok(made) => made,
            Err(unfit) => {
                tracing::debug!(%key, %unfit, "no waypoint is made");
                continue;
            }
        };
        if done.get(key).is_some_and(|(before, at)| *before == made && at.elapsed() < AGAIN) {
            continue;
        }
        match apply(client, &facts.uid, &made).await {
            Ok(()) => {
                if done.insert(key.clone(), (made, Instant::now())).is_none() {
                    tracing::info!(%key, "waypoint provisioned");
                }
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(%key, %error, cause, "cannot provision a waypoint");
                let why = if cause.is_empty() { error.to_string() } else { format!("{error}: {cause}") };
                refused.insert(key.clone(), why);
                wait = RETRY;
            }
        }
    }
    (wait, refused)
}

async fn apply(client: &Client, uid: &str, made: &Provisioned) -> Result<(), ApplyError> {
    let Provisioned { account, service, deployment, budget } = made;
    one(client, uid, account).await?;
    one(client, uid, service).await?;
    one(client, uid, deployment).await?;
    one(client, uid, budget).await
}

async fn one<K>(client: &Client, uid: &str, object: &K) -> Result<(), ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned,
{
    let kind = K::kind(&()).into_owned();
    let meta: &ObjectMeta = object.meta();
    let (namespace, name) =
        (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    let there = within(&kind, api.get_opt(&name)).await?;
    if let Some(there) = there {
        let owners = there.meta().owner_references.iter().flatten();
        if !owners.into_iter().any(|owner| owner.uid == uid) {
            return Err(ApplyError::Foreign { kind, namespace, name });
        }
    }
    // Our fields are ours, whoever wrote them by hand; others' stay theirs.
    let params = PatchParams::apply(FIELD_MANAGER).force();
    within(&kind, api.patch(&name, &params, &Patch::Apply(object))).await.map(drop)
}

async fn within<T>(kind: &str, work: impl Future<Output = kube::Result<T>>) -> Result<T, ApplyError> {
    match tokio::time::timeout(ANSWER, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(source)) => Err(ApplyError::Api { kind: kind.to_owned(), source: Box::new(source) }),
        Err(_late) => Err(ApplyError::Silent { kind: kind.to_owned() }),
    }
}
