//! One replica leads and writes; the Lease says which. All others serve just the same.
//!
//! The Lease also carries what each replica knows of its proxies, as an annotation per replica: a proxy is connected to
//! one of them, and the leader has to say on how many of all an object is in force.

use std::{collections::BTreeMap, pin::pin, time::Duration};

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
use tokio::{sync::watch, time::Instant};

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
            // Others count from when they see the renewal, which is later than this.
            let asked = Instant::now();
            let turn = tokio::time::timeout(ANSWER, self.turn(&mut heard, &say));
            match self.in_time(&mut renewed, turn).await {
                Ok(Ok(leads)) => {
                    renewed = leads.then_some(asked);
                    self.set(leads);
                }
                // Another replica wrote in between; in step with it, the same one would lose for ever.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => wait = CONFLICT,
                Ok(Err(error)) => tracing::warn!(error = reason(&error), "the Lease cannot be held"),
                Err(_) => tracing::warn!("the Lease cannot be held: no answer in time"),
            }
            tokio::select! {
                () = draining.started() => break,
                () = self.in_time(&mut renewed, tokio::time::sleep(chance.jitter(wait, JITTER))) => {}
            }
        }
        if *self.leads.borrow() {
            self.set(false);
            match tokio::time::timeout(ANSWER, self.hand_over()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(error = reason(&error), "the Lease is not given back"),
                Err(_) => tracing::warn!("the Lease is not given back: no answer in time"),
            }
        }
    }

    /// Waits for `work`; a leader whose last renewal becomes too old meanwhile steps down at that moment.
    async fn in_time<T>(&self, renewed: &mut Option<Instant>, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        if let Some(at) = *renewed {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = tokio::time::sleep_until(at + STEP_DOWN) => {
                    *renewed = None;
                    self.set(false);
                }
            }
        }
        work.await
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

    /// Gives back what is still ours: another may have taken it since our last look.
    async fn hand_over(&self) -> Result<(), kube::Error> {
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        loop {
            let Some(lease) = self.api.get_opt(LEASE).await? else { return Ok(()) };
            let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
            let mut patch = json!({
                "metadata": {
                    "resourceVersion": lease.metadata.resource_version,
                    "annotations": {format!("{REPLICA}{}", self.me): null},
                },
            });
            if holder == Some(self.me.as_str()) {
                patch["spec"] = json!({"holderIdentity": ""});
            }
            match self.api.patch(LEASE, &params, &Patch::Merge(&patch)).await {
                // Another replica wrote in between.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                outcome => return outcome.map(drop),
            }
        }
    }
}

/// Waits until this replica leads no longer.
pub async fn lost(leads: &mut watch::Receiver<bool>) {
    // Without an election nobody leads.
    let _ = leads.wait_for(|leads| !leads).await;
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
    use std::sync::Arc;

    use kube::client::Body;
    use parking_lot::Mutex;

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

    /// An API server that holds one Lease, counts who wrote it, and can fall silent.
    struct Server {
        lease: Lease,
        silent: bool,
    }

    fn client(server: &Arc<Mutex<Server>>) -> Client {
        let server = server.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let server = server.clone();
            async move {
                if server.lock().silent {
                    std::future::pending::<()>().await;
                }
                let (head, body) = request.into_parts();
                let sent = body.collect_bytes().await.unwrap();
                let mut server = server.lock();
                let mut status = 200;
                if head.method == http::Method::PATCH {
                    let patch: Json = serde_json::from_slice(&sent).unwrap();
                    let named = patch["metadata"]["resourceVersion"].as_str();
                    if named
                        .is_some_and(|named| Some(named) != server.lease.metadata.resource_version.as_deref())
                    {
                        status = 409;
                    } else {
                        write(&mut server.lease, &patch);
                    }
                }
                let body = match status {
                    200 => serde_json::to_vec(&server.lease).unwrap(),
                    code => serde_json::to_vec(&json!({"kind": "Status", "status": "Failure", "code": code}))
                        .unwrap(),
                };
                Ok::<_, std::io::Error>(
                    http::Response::builder().status(status).body(Body::from(body)).unwrap(),
                )
            }
        });
        Client::new(service, "mesh")
    }

    fn write(lease: &mut Lease, patch: &Json) {
        let version = lease.metadata.resource_version.as_deref().and_then(|text| text.parse::<u64>().ok());
        lease.metadata.resource_version = Some((version.unwrap_or(0) + 1).to_string());
        if let Some(holder) = patch["spec"]["holderIdentity"].as_str() {
            lease.spec.get_or_insert_default().holder_identity = Some(holder.to_owned());
        }
    }

    fn holder(server: &Arc<Mutex<Server>>) -> String {
        server.lock().lease.spec.as_ref().and_then(|spec| spec.holder_identity.clone()).unwrap_or_default()
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_hears_nothing_steps_down_before_another_may_follow() {
        let server = Arc::new(Mutex::new(Server { lease: lease("", 1), silent: false }));
        let election = Election::new(&client(&server), "mesh", "me".to_owned());
        let mut leads = election.leads();
        let (_drain, draining) = mesh_net::drain::channel();
        let tasks = mesh_net::task::TaskGroup::new();
        tasks.spawn(election.run(|_| Say::default(), draining));
        leads.wait_for(|leads| *leads).await.unwrap();
        let renewed = Instant::now();
        server.lock().silent = true;
        lost(&mut leads).await;
        // The last renewal may be as old as a turn; the step must not wait for an answer that does not come.
        assert!(renewed.elapsed() <= STEP_DOWN, "{:?}", renewed.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_is_ours_is_given_back() {
        for (holds, expected) in [("me", ""), ("other", "other")] {
            let server = Arc::new(Mutex::new(Server { lease: lease(holds, 1), silent: false }));
            let election = Election::new(&client(&server), "mesh", "me".to_owned());
            election.hand_over().await.unwrap();
            assert_eq!(holder(&server), expected);
        }
    }
}
