//! One replica leads and writes; the Lease says which. All others serve just the same.
//!
//! The Lease also carries what each replica knows of its proxies, as an annotation per replica: a proxy is connected to
//! one of them, and the leader has to say on how many of all an object is in force.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use mesh_net::{clock::Chance, drain::Draining};
use serde_json::{Value as Json, json};
use tokio::sync::watch;

use crate::{
    ca::secret::{MANAGER, labels},
    source::kubernetes::reason,
};

/// Name of the Lease.
pub const LEASE: &str = "undermesh-control";
/// A leader that is not heard of for this long is none.
const LIFETIME: Duration = Duration::from_secs(15);
/// How often the Lease is looked at, and renewed by the leader.
const RENEW: Duration = Duration::from_secs(2);
/// After a conflict it is tried again sooner.
const CONFLICT: Duration = Duration::from_millis(300);
/// Waits are spread by this share.
const JITTER: f64 = 0.3;
/// A leader that cannot renew steps down after this time, before another can follow it.
const STEP_DOWN: Duration = Duration::from_secs(10);
/// The API server's time for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Prefix of the annotations that carry what replicas tell each other.
const REPLICA: &str = "replica.undermesh.io/";

/// What a replica does about the Lease.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It is ours, or nobody's.
    Hold,
    /// Somebody else leads.
    Follow,
}

/// When the current holder was last heard of, by our own clock: clocks of others are not compared.
#[derive(Debug, Default)]
struct Heard {
    renewal: Option<(String, Option<MicroTime>)>,
    at: Option<Instant>,
}

impl Heard {
    /// (pure) Decides by what the Lease says now.
    fn step(&mut self, spec: Option<&LeaseSpec>, me: &str, now: Instant) -> Step {
        let holder = spec.and_then(|spec| spec.holder_identity.clone()).unwrap_or_default();
        if holder.is_empty() || holder == me {
            return Step::Hold;
        }
        let renewal = Some((holder, spec.and_then(|spec| spec.renew_time.clone())));
        if self.renewal != renewal {
            self.renewal = renewal;
            self.at = Some(now);
        }
        let silent = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        if silent > LIFETIME { Step::Hold } else { Step::Follow }
    }
}

/// What replicas tell each other, by replica.
pub type Told = BTreeMap<String, String>;

/// What this replica writes into the Lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Say {
    /// For the others.
    pub text: String,
    /// Replicas that are no more: the leader takes out what they told.
    pub gone: Vec<String>,
}

/// Takes part in the election.
pub struct Election {
    api: Api<Lease>,
    me: String,
    leads: watch::Sender<bool>,
    told: watch::Sender<Told>,
}

impl Election {
    /// Takes part as `me`, in `namespace`.
    pub fn new(client: &Client, namespace: &str, me: String) -> Self {
        let api = Api::namespaced(client.clone(), namespace);
        Self { api, me, leads: watch::channel(false).0, told: watch::channel(Told::new()).0 }
    }

    /// Whether this replica leads, now and from now on.
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// What the others tell.
    pub fn told(&self) -> watch::Receiver<Told> {
        self.told.subscribe()
    }

    /// Runs until the drain; then gives the Lease back, so that the next need not wait. `say` is what this replica
    /// tells the others.
    pub async fn run(self, say: impl Fn(&Told) -> Say, draining: Draining) {
        let mut heard = Heard::default();
        let mut renewed = None;
        let chance = Chance::random();
        loop {
            let mut wait = RENEW;
            match tokio::time::timeout(ANSWER, self.turn(&mut heard, &say)).await {
                Ok(Ok(leads)) => {
                    renewed = leads.then(Instant::now);
                    self.set(leads);
                }
                // Another replica wrote in between; in step with it, the same one would lose for ever.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => wait = CONFLICT,
                Ok(Err(error)) => tracing::warn!(error = reason(&error), "the Lease cannot be held"),
                Err(_) => tracing::warn!("the Lease cannot be held: no answer in time"),
            }
            if renewed.is_some_and(|at: Instant| at.elapsed() > STEP_DOWN) {
                renewed = None;
                self.set(false);
            }
            tokio::select! {
                () = draining.started() => break,
                () = tokio::time::sleep(chance.jitter(wait, JITTER)) => {}
            }
        }
        if *self.leads.borrow() {
            self.set(false);
            let _ = tokio::time::timeout(ANSWER, self.hand_over()).await;
        }
    }

    fn set(&self, leads: bool) {
        if self.leads.send_replace(leads) != leads {
            tracing::info!(replica = self.me, leads, "leadership changed");
        }
    }

    async fn turn(&self, heard: &mut Heard, say: &impl Fn(&Told) -> Say) -> Result<bool, kube::Error> {
        let Some(lease) = self.api.get_opt(LEASE).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(LEASE.to_owned()),
                    labels: Some(labels()),
                    ..ObjectMeta::default()
                },
                spec: Some(LeaseSpec::default()),
            };
            self.api.create(&PostParams::default(), &lease).await?;
            return Ok(false);
        };
        let told = told(&lease, &self.me);
        self.told.send_if_modified(|old| {
            let new = *old != told;
            if new {
                old.clone_from(&told);
            }
            new
        });
        let step = heard.step(lease.spec.as_ref(), &self.me, Instant::now());
        let say = say(&told);
        let patch = patch(&lease, &self.me, &step, &say, Timestamp::now());
        let Some(patch) = patch else { return Ok(false) };
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        self.api.patch(LEASE, &params, &Patch::Merge(&patch)).await?;
        Ok(step == Step::Hold)
    }

    async fn hand_over(&self) -> Result<(), kube::Error> {
        let patch = json!({"spec": {"holderIdentity": ""}, "metadata": {"annotations": {format!("{REPLICA}{}", self.me): null}}});
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        self.api.patch(LEASE, &params, &Patch::Merge(&patch)).await.map(drop)
    }
}

/// (pure) What the other replicas tell.
fn told(lease: &Lease, me: &str) -> Told {
    let annotations = lease.metadata.annotations.iter().flatten();
    let replicas = annotations.filter_map(|(key, text)| Some((key.strip_prefix(REPLICA)?, text)));
    replicas.filter(|(name, _)| *name != me).map(|(name, text)| (name.to_owned(), text.clone())).collect()
}

/// (pure) What this replica writes; `None` when there is nothing new to say. Whoever takes or renews names the version
/// that it read: of two replicas that do so at once one is refused. A follower writes only what is its own.
fn patch(lease: &Lease, me: &str, step: &Step, say: &Say, now: Timestamp) -> Option<Json> {
    let key = format!("{REPLICA}{me}");
    let said = lease.metadata.annotations.as_ref().and_then(|all| all.get(&key)).map(String::as_str);
    let mut patch = json!({"metadata": {"annotations": {key: say.text}}});
    if *step == Step::Follow {
        return (said != Some(say.text.as_str())).then_some(patch);
    }
    patch["metadata"]["resourceVersion"] = json!(lease.metadata.resource_version);
    for gone in &say.gone {
        patch["metadata"]["annotations"][format!("{REPLICA}{gone}")] = Json::Null;
    }
    let spec = lease.spec.clone().unwrap_or_default();
    let ours = spec.holder_identity.as_deref() == Some(me);
    let acquired = if ours { spec.acquire_time.clone() } else { None }.unwrap_or(MicroTime(now));
    let transitions = spec.lease_transitions.unwrap_or(0) + i32::from(!ours);
    patch["spec"] = json!({
        "holderIdentity": me,
        "leaseDurationSeconds": LIFETIME.as_secs(),
        "acquireTime": acquired,
        "renewTime": MicroTime(now),
        "leaseTransitions": transitions,
    });
    Some(patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, renewed: i64) -> Lease {
        let renewed = Timestamp::from_second(renewed).unwrap();
        let spec = LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            renew_time: Some(MicroTime(renewed)),
            ..LeaseSpec::default()
        };
        Lease {
            spec: Some(spec),
            metadata: ObjectMeta { resource_version: Some("7".to_owned()), ..ObjectMeta::default() },
        }
    }

    #[test]
    fn another_leader_is_followed_until_it_falls_silent() {
        let mut heard = Heard::default();
        let start = Instant::now();
        let mut step = |holder: &str, renewed, after: u64| {
            let lease = lease(holder, renewed);
            heard.step(lease.spec.as_ref(), "me", start + Duration::from_secs(after))
        };
        assert_eq!(step("", 1, 0), Step::Hold);
        assert_eq!(step("me", 1, 0), Step::Hold);
        // Its clock may be years behind: what counts is that it moves.
        assert_eq!(step("other", 1, 1), Step::Follow);
        assert_eq!(step("other", 1, 16), Step::Follow);
        assert_eq!(step("other", 1, 17), Step::Hold);
        assert_eq!(step("other", 2, 18), Step::Follow);
        assert_eq!(step("third", 2, 40), Step::Follow);
        assert_eq!(step("third", 2, 56), Step::Hold);
    }

    #[test]
    fn a_follower_only_tells_and_a_leader_renews() {
        let now = Timestamp::from_second(100).unwrap();
        let of = lease("other", 1);
        let x = Say { text: "x".to_owned(), gone: vec!["dead".to_owned()] };
        let follow = patch(&of, "me", &Step::Follow, &x, now).unwrap();
        assert_eq!(follow.get("spec"), None);
        assert_eq!(follow["metadata"], json!({"annotations": {"replica.undermesh.io/me": "x"}}));
        let lead = patch(&of, "me", &Step::Hold, &x, now).unwrap();
        assert_eq!(
            (&lead["spec"]["holderIdentity"], &lead["spec"]["leaseTransitions"]),
            (&json!("me"), &json!(1))
        );
        assert_eq!(lead["metadata"]["annotations"]["replica.undermesh.io/dead"], Json::Null);
        let mut said = of.clone();
        said.metadata.annotations = Some(BTreeMap::from([
            ("replica.undermesh.io/me".to_owned(), "x".to_owned()),
            ("replica.undermesh.io/other".to_owned(), "y".to_owned()),
            ("else".to_owned(), "z".to_owned()),
        ]));
        assert_eq!(patch(&said, "me", &Step::Follow, &x, now), None);
        assert_eq!(told(&said, "me"), Told::from([("other".to_owned(), "y".to_owned())]));
    }
}
