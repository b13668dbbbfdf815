//! Who calls, on Kubernetes: bound service-account tokens, reviewed by the API server.
//!
//! A token says for itself which pod it was made for; that pod must be known here, alive, and where the token says.
//! What it says is read before the API server is asked whether it is true: a token that could not let its bearer in
//! costs nobody but us. Callers wait in lines, each with one review at a time: those that say that they are one pod in that
//! pod's, and a token that was good before in its own, since who knows a pod's UID can say to be that pod.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::{Semaphore, watch};

use super::{Principal, Unauthenticated};
use crate::{
    compile::{PodFact, PodKey},
    publish::Published,
    source::kubernetes::reason,
    translate::workload::AGENT_ACCOUNT,
};

/// Audience of the tokens.
pub const AUDIENCE: &str = "istio-ca";
/// A good answer is believed this long: a withdrawn token is good no longer than that.
const GOOD: Duration = Duration::from_secs(30);
/// A token that was good has a line of its own for this long: agents and waypoints are not kept waiting by who names
/// them.
const FAMILIAR: Duration = Duration::from_secs(3600);
/// A refusal is remembered this long, so that repeating it costs the API server nothing.
const BAD: Duration = Duration::from_secs(5);
/// Answers of each kind that are remembered.
const MAX_REMEMBERED: usize = 10_000;
/// Reviews that are asked for at once, in all.
const AT_ONCE: usize = 16;
/// Callers that wait in one line.
const WAITING_IN_LINE: usize = 64;
/// Time for an answer, the wait for a turn included.
const ANSWER: Duration = Duration::from_secs(10);
/// A token that ended by our clock is asked about for this long: the API server's may be behind. Seconds.
const LEEWAY: u64 = 60;
/// Longest token, bytes.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// What a good token says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reviewed {
    /// Namespace and name of the service account.
    account: (String, String),
    /// Name and UID of the pod that it was made for.
    pod: (String, String),
    /// Node that it was made for; API servers before 1.30 do not say.
    node: Option<String>,
}

/// What was said of tokens, by their digest, and until when it is believed.
struct Remembered<T>(Mutex<HashMap<[u8; 32], (T, Instant)>>);

impl<T> Default for Remembered<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Remembered<T> {
    fn get(&self, key: &[u8; 32], now: Instant) -> Option<T> {
        self.0.lock().get(key).filter(|(_, until)| *until > now).map(|(said, _)| said.clone())
    }

    /// Not when it is full of what is still believed.
    fn put(&self, key: [u8; 32], said: T, until: Instant, now: Instant) {
        let mut all = self.0.lock();
        if all.len() >= MAX_REMEMBERED {
            all.retain(|_, (_, until)| *until > now);
        }
        if all.len() < MAX_REMEMBERED {
            all.insert(key, (said, until));
        }
    }
}

/// Asks the API server about tokens.
pub struct Reviews {
    client: Client,
    install_namespace: Arc<str>,
    published: watch::Receiver<Arc<Published>>,
    // Apart, so that no number of bad tokens makes a good one be asked about again.
    good: Remembered<Reviewed>,
    familiar: Remembered<()>,
    bad: Remembered<()>,
    asking: Semaphore,
    lines: Mutex<HashMap<Line, Length>>,
}

/// Where a caller waits.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Line {
    /// With all that say that they are this pod, by its UID.
    Pod(String),
    /// With all that have this token, which was good before.
    Token([u8; 32]),
}

/// A caller that is not answered yet.
struct Waiting<'a> {
    lines: &'a Mutex<HashMap<Line, Length>>,
    line: Line,
    turn: Arc<Semaphore>,
}

/// Those in one line.
struct Length {
    waiting: usize,
    turn: Arc<Semaphore>,
}

impl Default for Length {
    fn default() -> Self {
        Self { waiting: 0, turn: Arc::new(Semaphore::new(1)) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut lines = self.lines.lock();
        if let Some(line) = lines.get_mut(&self.line) {
            line.waiting -= 1;
            if line.waiting == 0 {
                lines.remove(&self.line);
            }
        }
    }
}

impl Reviews {
    /// Nothing is asked yet.
    pub fn new(
        client: Client,
        install_namespace: Arc<str>,
        published: watch::Receiver<Arc<Published>>,
    ) -> Self {
        Self {
            client,
            install_namespace,
            published,
            good: Remembered::default(),
            familiar: Remembered::default(),
            bad: Remembered::default(),
            asking: Semaphore::new(AT_ONCE),
            lines: Mutex::default(),
        }
    }

    /// Who has this token.
    ///
    /// # Errors
    /// Nobody that may call, or the API server does not say.
    pub async fn authenticate(&self, token: &str, now: Instant) -> Result<Principal, Unauthenticated> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Unauthenticated::Unknown);
        }
        let key = key_of(token);
        let reviewed = match self.known(&key, now) {
            Some(known) => known?,
            None => {
                let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let says = claimed(token, clock.as_secs()).ok_or(Unauthenticated::Unknown)?;
                self.principal(&says)?;
                let answer = self.in_turn(says.pod.1, (key, token), now);
                let answer = tokio::time::timeout(ANSWER, answer).await;
                answer.map_err(|_| Unauthenticated::Unavailable("no answer in time".to_owned()))??
            }
        };
        self.principal(&reviewed)
    }

    fn known(&self, key: &[u8; 32], now: Instant) -> Option<Result<Reviewed, Unauthenticated>> {
        let bad = || self.bad.get(key, now).map(|()| Err(Unauthenticated::Unknown));
        self.good.get(key, now).map(Ok).or_else(bad)
    }

    fn principal(&self, reviewed: &Reviewed) -> Result<Principal, Unauthenticated> {
        principal(reviewed, &self.install_namespace, &self.published.borrow().world.pods)
    }

    /// Asks when it is the caller's turn in its line, unless the answer is known by then.
    async fn in_turn(
        &self,
        uid: String,
        (key, token): ([u8; 32], &str),
        now: Instant,
    ) -> Result<Reviewed, Unauthenticated> {
        let unavailable = |reason: String| Unauthenticated::Unavailable(reason);
        let familiar = self.familiar.get(&key, now).is_some();
        let line = if familiar { Line::Token(key) } else { Line::Pod(uid) };
        let waiting = self.wait(line).ok_or_else(|| unavailable("too many callers of one pod".to_owned()))?;
        let _turn = waiting.turn.acquire().await.map_err(|error| unavailable(error.to_string()))?;
        if let Some(known) = self.known(&key, now) {
            return known;
        }
        let _slot = self.asking.acquire().await.map_err(|error| unavailable(error.to_string()))?;
        let reviewed = self.ask(token).await?;
        match &reviewed {
            Some(reviewed) => {
                self.good.put(key, reviewed.clone(), now + GOOD, now);
                self.familiar.put(key, (), now + FAMILIAR, now);
            }
            None => self.bad.put(key, (), now + BAD, now),
        }
        reviewed.ok_or(Unauthenticated::Unknown)
    }

    fn wait(&self, line: Line) -> Option<Waiting<'_>> {
        let mut lines = self.lines.lock();
        let length = lines.entry(line.clone()).or_default();
        if length.waiting >= WAITING_IN_LINE {
            return None;
        }
        length.waiting += 1;
        Some(Waiting { lines: &self.lines, turn: length.turn.clone(), line })
    }

    async fn ask(&self, token: &str) -> Result<Option<Reviewed>, Unauthenticated> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![AUDIENCE.to_owned()]),
                token: Some(token.to_owned()),
            },
            ..TokenReview::default()
        };
        let api = Api::<TokenReview>::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|error| Unauthenticated::Unavailable(reason(&error)))?;
        let Some(status) = answer.status else { return Ok(None) };
        let ours = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
        if status.authenticated != Some(true) || !ours {
            return Ok(None);
        }
        Ok(status.user.as_ref().and_then(reviewed))
    }
}

/// What a bound token carries (Kubernetes' private claims).
#[derive(Deserialize)]
struct Claims {
    aud: OneOrMany,
    exp: u64,
    #[serde(rename = "kubernetes.io")]
    bound: Bound,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Bound {
    namespace: String,
    serviceaccount: Named,
    pod: Named,
    node: Option<Node>,
}

/// Its UID, which a token may lack, says nothing here.
#[derive(Deserialize)]
struct Node {
    name: String,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    uid: String,
}

/// (pure) What a token is remembered by.
fn key_of(token: &str) -> [u8; 32] {
    let mut key = [0; 32];
    key.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
    key
}

/// (pure) What a token says of itself, which anybody can write; `None` when it could not let anybody in. `clock` is in
/// seconds since 1970.
fn claimed(token: &str, clock: u64) -> Option<Reviewed> {
    let mut parts = token.split('.');
    let (Some(_), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let Claims { aud, exp, bound } = serde_json::from_slice(&payload).ok()?;
    let for_us = match &aud {
        OneOrMany::One(one) => one == AUDIENCE,
        OneOrMany::Many(many) => many.iter().any(|one| one == AUDIENCE),
    };
    (for_us && exp.saturating_add(LEEWAY) > clock).then_some(Reviewed {
        account: (bound.namespace, bound.serviceaccount.name),
        pod: (bound.pod.name, bound.pod.uid),
        node: bound.node.map(|node| node.name),
    })
}

/// What a user of the API server is as a caller; `None` unless it is a pod with a bound token.
fn reviewed(user: &UserInfo) -> Option<Reviewed> {
    let account = user.username.as_deref()?.strip_prefix("system:serviceaccount:")?;
    let (namespace, name) = account.split_once(':')?;
    let extra = |key: &str| {
        let values = user.extra.as_ref()?.get(&format!("authentication.kubernetes.io/{key}"))?;
        values.first().filter(|value| !value.is_empty() && values.len() == 1).cloned()
    };
    Some(Reviewed {
        account: (namespace.to_owned(), name.to_owned()),
        pod: (extra("pod-name")?, extra("pod-uid")?),
        node: extra("node-name"),
    })
}

/// (pure) Whom a token stands for: the agent of the pod's node, or the pod.
fn principal(
    reviewed: &Reviewed,
    install_namespace: &str,
    pods: &BTreeMap<PodKey, PodFact>,
) -> Result<Principal, Unauthenticated> {
    let Reviewed { account: (namespace, account), pod: (name, uid), node } = reviewed;
    let key: PodKey = (namespace.as_str().into(), name.as_str().into());
    let pod = pods.get(&key).filter(|pod| *pod.uid == **uid).ok_or(Unauthenticated::NoPod)?;
    let placed = !pod.node.is_empty() && node.as_deref().is_none_or(|node| *node == *pod.node);
    if pod.finished || *pod.service_account != **account || !placed {
        return Err(Unauthenticated::NoPod);
    }
    if namespace == install_namespace && account == AGENT_ACCOUNT {
        return Ok(Principal::Node(pod.node.clone()));
    }
    Ok(Principal::Pod { namespace: key.0, name: key.1 })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::json;

    use super::*;

    fn user(name: &str, extras: &[(&str, &[&str])]) -> UserInfo {
        let extra = extras.iter().map(|(key, values)| {
            let values = values.iter().map(ToString::to_string).collect();
            (format!("authentication.kubernetes.io/{key}"), values)
        });
        UserInfo { username: Some(name.to_owned()), extra: Some(extra.collect()), ..UserInfo::default() }
    }

    #[test]
    fn only_bound_tokens_of_service_accounts_count() {
        let bound: &[(&str, &[&str])] =
            &[("pod-name", &["web-1"]), ("pod-uid", &["u1"]), ("node-name", &["n1"])];
        let account = "system:serviceaccount:shop:web";
        assert!(reviewed(&user(account, bound)).is_some());
        assert_eq!(reviewed(&user(account, &bound[..2])).unwrap().node, None);
        for (name, extras) in [
            ("system:admin", bound),
            ("system:serviceaccount:shop", bound),
            ("system:node:n1", bound),
            (account, &bound[..1]),
            (account, &bound[1..]),
            (account, &[("pod-name", &["a", "b"] as &[&str]), ("pod-uid", &["u1"])]),
            (account, &[("pod-name", &[] as &[&str]), ("pod-uid", &["u1"])]),
        ] {
            assert_eq!(reviewed(&user(name, extras)), None, "{name} {extras:?}");
        }
    }

    fn token(payload: &serde_json::Value) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload.to_string()))
    }

    fn claims(uid: &str) -> serde_json::Value {
        json!({"aud": ["istio-ca"], "exp": u64::from(u32::MAX), "kubernetes.io": {
            "namespace": "shop", "serviceaccount": {"name": "web", "uid": "s"},
            "pod": {"name": "web-1", "uid": uid}, "node": {"name": "n1"},
        }})
    }

    #[test]
    fn what_a_token_says_of_itself_is_read_before_anybody_is_asked() {
        let good = claims("u1");
        let read = claimed(&token(&good), 1_000).unwrap();
        assert_eq!((read.account.1.as_str(), read.pod.1.as_str()), ("web", "u1"));
        assert_eq!(read.node.as_deref(), Some("n1"));
        let changed = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut claims = good.clone();
            change(&mut claims);
            claimed(&token(&claims), 1_000)
        };
        assert!(changed(&|claims| claims["aud"] = json!("istio-ca")).is_some());
        assert!(changed(&|claims| claims["exp"] = json!(950)).is_some(), "clocks differ");
        assert_eq!(changed(&|claims| claims["exp"] = json!(940)), None);
        assert_eq!(changed(&|claims| claims["aud"] = json!(["api"])), None);
        assert_eq!(changed(&|claims| claims["kubernetes.io"]["pod"] = json!(null)), None);
        for odd in ["", "a.b", "a.b.c.d", "e30.!!.x", "e30.e30.x", "e30.e30=.x"] {
            assert_eq!(claimed(odd, 0), None, "{odd}");
        }
    }

    /// An API server that says no to every token and counts them, once it is let go.
    fn refusing(asked: &Arc<AtomicUsize>, go: &watch::Receiver<bool>) -> Client {
        let (asked, go) = (asked.clone(), go.clone());
        let service = tower::service_fn(move |_: http::Request<kube::client::Body>| {
            let (asked, mut go) = (asked.clone(), go.clone());
            async move {
                asked.fetch_add(1, Ordering::SeqCst);
                go.wait_for(|go| *go).await.unwrap();
                let answer = json!({"spec": {}, "status": {"authenticated": false}});
                let body = kube::client::Body::from(answer.to_string().into_bytes());
                Ok::<_, std::io::Error>(http::Response::new(body))
            }
        });
        Client::new(service, "mesh")
    }

    fn published(uid: &str) -> watch::Receiver<Arc<Published>> {
        let fact = PodFact {
            uid: uid.into(),
            node: "n1".into(),
            service_account: "web".into(),
            finished: false,
            deleting: false,
            meshed: true,
            waypoint: None,
        };
        let pods = BTreeMap::from([(("shop".into(), "web-1".into()), fact)]);
        let world = crate::compile::World { pods, ..Default::default() };
        watch::channel(Arc::new(Published::default().next(world))).1
    }

    /// `count` tokens, each another one, that say that they are the same pod's.
    fn tokens(count: u64) -> Vec<String> {
        let token = |n| {
            let mut claims = claims("u1");
            claims["exp"] = json!(u64::from(u32::MAX) + n);
            token(&claims)
        };
        (0..count).map(token).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_asked_about_pods_that_are_not_there() {
        let (asked, (_go, gone)) = (Arc::new(AtomicUsize::new(0)), watch::channel(true));
        let reviews = Reviews::new(refusing(&asked, &gone), "mesh".into(), published("u1"));
        let stranger = reviews.authenticate(&token(&claims("u2")), Instant::now()).await;
        assert!(matches!(stranger, Err(Unauthenticated::NoPod)), "{stranger:?}");
        assert_eq!(asked.load(Ordering::SeqCst), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_waits_for_itself_and_a_token_is_asked_about_once() {
        let (asked, (go, gone)) = (Arc::new(AtomicUsize::new(0)), watch::channel(false));
        let reviews = Reviews::new(refusing(&asked, &gone), "mesh".into(), published("u1"));
        let now = Instant::now();
        let same = vec![tokens(1).remove(0); 3];
        let other = tokens(2 + WAITING_IN_LINE as u64).split_off(1);
        let all = same.iter().chain(&other).map(|token| reviews.authenticate(token, now));
        let letting_go = async {
            // Long enough for whoever may ask.
            for _ in 0..1_000 {
                tokio::task::yield_now().await;
            }
            assert_eq!(asked.load(Ordering::SeqCst), 1, "one at a time");
            go.send_replace(true);
        };
        let (outcomes, ()) = tokio::join!(futures_util::future::join_all(all), letting_go);
        let refused = outcomes.iter().filter(|got| matches!(got, Err(Unauthenticated::Unknown))).count();
        assert_eq!((refused, outcomes.len()), (WAITING_IN_LINE, WAITING_IN_LINE + 4));
        let turned_away = |got: &&Result<_, _>| matches!(got, Err(Unauthenticated::Unavailable(_)));
        assert_eq!(outcomes.iter().filter(turned_away).count(), 4);
        assert_eq!(asked.load(Ordering::SeqCst), WAITING_IN_LINE - 2, "three had the same token");

        assert!(reviews.authenticate(&same[0], now).await.is_err());
        assert_eq!(asked.load(Ordering::SeqCst), WAITING_IN_LINE - 2, "what was refused is remembered");
        assert!(reviews.lines.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_let_in_before_does_not_wait_behind_those_that_name_it() {
        let (asked, (go, gone)) = (Arc::new(AtomicUsize::new(0)), watch::channel(false));
        let reviews = Reviews::new(refusing(&asked, &gone), "mesh".into(), published("u1"));
        let now = Instant::now();
        let mut all = tokens(1 + WAITING_IN_LINE as u64);
        let real = all.remove(0);
        reviews.familiar.put(key_of(&real), (), now + FAMILIAR, now);
        let crowd = futures_util::future::join_all(all.iter().map(|token| reviews.authenticate(token, now)));
        let real = async {
            for _ in 0..1_000 {
                tokio::task::yield_now().await;
            }
            let again = [&real; 3].map(|token| reviews.authenticate(token, now));
            let (got, ()) = tokio::join!(futures_util::future::join_all(again), async {
                for _ in 0..1_000 {
                    tokio::task::yield_now().await;
                }
                assert_eq!(asked.load(Ordering::SeqCst), 2, "one of the crowd, and the real one once");
                go.send_replace(true);
            });
            // This API server refuses everybody; it was asked, which is the point.
            assert!(got.iter().all(|got| matches!(got, Err(Unauthenticated::Unknown))), "{got:?}");
        };
        tokio::join!(crowd, real);
        assert!(reviews.lines.lock().is_empty());
    }

    #[test]
    fn no_number_of_bad_answers_displaces_a_good_one() {
        let (good, bad, now) = (Remembered::default(), Remembered::default(), Instant::now());
        good.put([0; 32], 7, now + GOOD, now);
        for n in 0..=MAX_REMEMBERED as u64 {
            let mut key = [1; 32];
            key[..8].copy_from_slice(&n.to_be_bytes());
            bad.put(key, (), now + BAD, now);
        }
        assert_eq!(bad.0.lock().len(), MAX_REMEMBERED);
        assert_eq!((good.get(&[0; 32], now), good.get(&[0; 32], now + GOOD)), (Some(7), None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_api_server_ends_the_wait_for_a_turn_too() {
        let (asked, (_go, gone)) = (Arc::new(AtomicUsize::new(0)), watch::channel(false));
        let reviews = Reviews::new(refusing(&asked, &gone), "mesh".into(), published("u1"));
        let _all = reviews.asking.acquire_many(AT_ONCE as u32).await.unwrap();
        let got = reviews.authenticate(&token(&claims("u1")), Instant::now()).await;
        assert!(matches!(got, Err(Unauthenticated::Unavailable(_))), "{got:?}");
        assert_eq!(asked.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_caller_is_the_pod_that_its_token_was_made_for() {
        let fact = |node: &str, account: &str, finished: bool| PodFact {
            uid: "u1".into(),
            node: node.into(),
            service_account: account.into(),
            finished,
            deleting: false,
            meshed: false,
            waypoint: None,
        };
        let pods = BTreeMap::from([
            (("mesh".into(), "agent".into()), fact("n1", AGENT_ACCOUNT, false)),
            (("shop".into(), "agent".into()), fact("n1", AGENT_ACCOUNT, false)),
            (("mesh".into(), "other".into()), fact("n1", "other", false)),
            (("mesh".into(), "ended".into()), fact("n1", AGENT_ACCOUNT, true)),
            (("mesh".into(), "unbound".into()), fact("", AGENT_ACCOUNT, false)),
        ]);
        for (namespace, account, pod, uid, node, expected) in [
            ("mesh", AGENT_ACCOUNT, "agent", "u1", Some("n1"), Some("node:n1")),
            ("mesh", AGENT_ACCOUNT, "agent", "u1", None, Some("node:n1")),
            // The account's name alone is nothing: anybody may have one of that name in his namespace.
            ("shop", AGENT_ACCOUNT, "agent", "u1", Some("n1"), Some("pod:shop/agent")),
            ("mesh", "other", "other", "u1", Some("n1"), Some("pod:mesh/other")),
            // Another node than the pod's; a pod of the same name that came later; another's pod; ended; nowhere.
            ("mesh", AGENT_ACCOUNT, "agent", "u1", Some("n2"), None),
            ("mesh", AGENT_ACCOUNT, "agent", "u2", Some("n1"), None),
            ("mesh", AGENT_ACCOUNT, "other", "u1", Some("n1"), None),
            ("mesh", AGENT_ACCOUNT, "ended", "u1", Some("n1"), None),
            ("mesh", AGENT_ACCOUNT, "unbound", "u1", None, None),
            ("mesh", AGENT_ACCOUNT, "gone", "u1", Some("n1"), None),
        ] {
            let said = Reviewed {
                account: (namespace.to_owned(), account.to_owned()),
                pod: (pod.to_owned(), uid.to_owned()),
                node: node.map(str::to_owned),
            };
            let got = principal(&said, "mesh", &pods).ok().map(|principal| principal.to_string());
            assert_eq!(got.as_deref(), expected, "{said:?}");
        }
    }
}
