//! Who calls, on Kubernetes: bound service-account tokens, reviewed by the API server.
//!
//! A token says for itself which pod it was made for; that pod must be known here, alive, and where the token says.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use aws_lc_rs::digest;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
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
/// A refusal is remembered this long, so that repeating it costs the API server nothing.
const BAD: Duration = Duration::from_secs(5);
/// Answers that are remembered.
const MAX_REMEMBERED: usize = 10_000;
/// Reviews that are asked for at once.
const AT_ONCE: usize = 16;
/// The API server's time for an answer.
const ANSWER: Duration = Duration::from_secs(10);
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

/// What was said of a token, and until when it is believed.
type Answer = (Option<Reviewed>, Instant);

/// Asks the API server about tokens.
pub struct Reviews {
    client: Client,
    install_namespace: Arc<str>,
    published: watch::Receiver<Arc<Published>>,
    known: Mutex<HashMap<[u8; 32], Answer>>,
    asking: Semaphore,
}

impl Reviews {
    /// Nothing is asked yet.
    pub fn new(
        client: Client,
        install_namespace: Arc<str>,
        published: watch::Receiver<Arc<Published>>,
    ) -> Self {
        let known = Mutex::new(HashMap::new());
        Self { client, install_namespace, published, known, asking: Semaphore::new(AT_ONCE) }
    }

    /// Who has this token.
    ///
    /// # Errors
    /// Nobody that may call, or the API server does not say.
    pub async fn authenticate(&self, token: &str, now: Instant) -> Result<Principal, Unauthenticated> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Unauthenticated::Unknown);
        }
        let mut key = [0; 32];
        key.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
        let known = self.known.lock().get(&key).filter(|(_, until)| *until > now).cloned();
        let reviewed = match known {
            Some((reviewed, _)) => reviewed,
            None => {
                let reviewed = self.ask(token).await?;
                let until = now + if reviewed.is_some() { GOOD } else { BAD };
                let mut known = self.known.lock();
                if known.len() >= MAX_REMEMBERED {
                    known.retain(|_, (_, until)| *until > now);
                }
                if known.len() < MAX_REMEMBERED {
                    known.insert(key, (reviewed.clone(), until));
                }
                reviewed
            }
        };
        let reviewed = reviewed.ok_or(Unauthenticated::Unknown)?;
        let published = self.published.borrow().clone();
        principal(&reviewed, &self.install_namespace, &published.world.pods)
    }

    async fn ask(&self, token: &str) -> Result<Option<Reviewed>, Unauthenticated> {
        let unavailable = |reason: String| Unauthenticated::Unavailable(reason);
        let _slot = self.asking.acquire().await.map_err(|error| unavailable(error.to_string()))?;
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![AUDIENCE.to_owned()]),
                token: Some(token.to_owned()),
            },
            ..TokenReview::default()
        };
        let api = Api::<TokenReview>::all(self.client.clone());
        let params = PostParams::default();
        let asked = tokio::time::timeout(ANSWER, api.create(&params, &review)).await;
        let answer = asked
            .map_err(|_| unavailable("no answer in time".to_owned()))?
            .map_err(|error| unavailable(reason(&error)))?;
        let Some(status) = answer.status else { return Ok(None) };
        let ours = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
        if status.authenticated != Some(true) || !ours {
            return Ok(None);
        }
        Ok(status.user.as_ref().and_then(reviewed))
    }
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
