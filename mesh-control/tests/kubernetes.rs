//! The control plane against an API server in memory, by the real client.
#![expect(clippy::unwrap_used, reason = "a test panics freely")]

mod apiserver;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use apiserver::ApiServer;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_control::{
    ca::secret,
    compile::World,
    credentials::review::Reviews,
    leader::{Election, LEASE, Say},
    pipeline::Pipeline,
    publish::Published,
    source::kubernetes::Kubernetes,
    translate::Mesh,
    write::{self, Writer},
};
use mesh_net::{
    drain::{self, Drain},
    task::TaskGroup,
};
use serde_json::{Value as Json, json};
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(60);

struct Cluster {
    api: ApiServer,
    drain: Drain,
    tasks: TaskGroup,
}

impl Cluster {
    async fn new() -> Self {
        let tasks = TaskGroup::new();
        Self { api: ApiServer::start(&tasks).await, drain: drain::channel().0, tasks }
    }

    /// A pipeline that follows the API server.
    fn follow(&self) -> Arc<Pipeline> {
        let source = Kubernetes::start(&self.api.client(), "mesh", &self.drain.watch(), &self.tasks);
        let changed = source.changed();
        let pipeline = Arc::new(Pipeline::new(Box::new(source), Mesh::default()));
        let following = pipeline.clone();
        self.tasks.spawn(async move {
            loop {
                changed.notified().await;
                following.rescan();
            }
        });
        pipeline
    }

    /// Writes status and Events as long as what it returns lives.
    fn write(&self, pipeline: &Pipeline) -> watch::Sender<bool> {
        let writer = Writer {
            client: self.api.client(),
            me: "a".to_owned(),
            namespace: "mesh".to_owned(),
            roots: String::new(),
            published: pipeline.subscribe(),
            proxies: Arc::default(),
            told: watch::channel(Default::default()).1,
            refused: watch::channel(Default::default()).1,
        };
        let (leads, leading) = watch::channel(true);
        self.tasks.spawn(write::run(writer, leading, self.drain.watch()));
        leads
    }
}

fn pod(name: &str, ip: &str) -> Json {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "shop", "name": name, "uid": format!("u-{name}")},
        "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running", "podIP": ip}})
}

fn policy(name: &str, field: &str) -> Json {
    json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"namespace": "shop", "name": name}, "spec": {"mtls": {field: "STRICT"}}})
}

/// Waits until the world is so.
async fn until(pipeline: &Pipeline, what: &str, holds: impl Fn(&World) -> bool) -> Arc<Published> {
    let mut published = pipeline.subscribe();
    let waiting = async {
        loop {
            let now = published.borrow_and_update().clone();
            if now.revision > 0 && holds(&now.world) {
                return now;
            }
            published.changed().await.unwrap();
        }
    };
    tokio::time::timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("never: {what}"))
}

fn pods(world: &World) -> Vec<&str> {
    world.pods.keys().map(|(_, name)| &**name).collect()
}

#[tokio::test]
async fn what_the_api_server_has_is_published_and_followed() {
    let cluster = Cluster::new().await;
    cluster.api.put("pods", pod("a", "10.0.0.1"));
    let pipeline = cluster.follow();
    until(&pipeline, "the first list", |world| pods(world) == ["a"]).await;
    cluster.api.put("pods", pod("b", "10.0.0.2"));
    until(&pipeline, "a new pod", |world| pods(world) == ["a", "b"]).await;
    cluster.api.delete("pods", "shop/a");
    until(&pipeline, "a pod less", |world| pods(world) == ["b"]).await;
    // A bad object is told and takes no good one down.
    cluster.api.put("peerauthentications", policy("bad", "mod"));
    cluster.api.put("peerauthentications", policy("good", "mode"));
    let now =
        until(&pipeline, "both policies", |world| world.problems.len() == 1 && world.carried.len() == 2)
            .await;
    assert_eq!(now.world.problems[0].object, "PeerAuthentication shop/bad");
    assert_eq!(now.world.problems[0].field, "spec.mtls.mod");
    assert_eq!(pods(&now.world), ["b"]);
}

#[tokio::test]
async fn nothing_is_published_before_everything_was_listed_and_what_was_stays() {
    let cluster = Cluster::new().await;
    cluster.api.put("pods", pod("a", "10.0.0.1"));
    cluster.api.down(true);
    let pipeline = cluster.follow();
    cluster.api.serve("httproutes", false);
    cluster.api.down(false);
    until(&pipeline, "the first list", |world| pods(world) == ["a"]).await;
    // Away, and changed meanwhile, with its history forgotten: a list says what is there.
    cluster.api.down(true);
    cluster.api.put("pods", pod("b", "10.0.0.2"));
    cluster.api.delete("pods", "shop/a");
    assert_eq!(pods(&pipeline.subscribe().borrow().world), ["a"]);
    cluster.api.compact();
    cluster.api.down(false);
    until(&pipeline, "the other pod", |world| pods(world) == ["b"]).await;
    // Told that it is too late, it lists anew.
    let lists = cluster.api.lists();
    cluster.api.compact();
    cluster.api.put("pods", pod("c", "10.0.0.3"));
    until(&pipeline, "the third pod", |world| pods(world) == ["b", "c"]).await;
    assert!(cluster.api.lists() > lists);
}

#[tokio::test]
async fn kinds_that_are_not_served_are_none_and_are_found_when_they_come() {
    let cluster = Cluster::new().await;
    for plural in ["gateways", "httproutes", "peerauthentications", "authorizationpolicies"] {
        cluster.api.serve(plural, false);
    }
    cluster.api.put("pods", pod("a", "10.0.0.1"));
    let pipeline = cluster.follow();
    until(&pipeline, "the first list", |world| pods(world) == ["a"]).await;
    cluster.api.put("peerauthentications", policy("p", "mode"));
    cluster.api.serve("peerauthentications", true);
    until(&pipeline, "the policy", |world| world.carried.len() == 1).await;
    cluster.api.serve("peerauthentications", false);
    until(&pipeline, "the kind gone", |world| world.carried.is_empty()).await;
}

/// The world while `change` comes about: it always has the policies.
async fn never_without_policies(pipeline: &Pipeline, what: &str, change: impl Fn(&World) -> bool) {
    until(pipeline, what, |world| {
        assert!(!world.carried.is_empty(), "before {what}: a policy was lost");
        change(world)
    })
    .await;
}

#[tokio::test]
async fn a_404_of_something_in_between_takes_nothing_away() {
    let cluster = Cluster::new().await;
    cluster.api.put("pods", pod("a", "10.0.0.1"));
    cluster.api.put("peerauthentications", policy("p", "mode"));
    let pipeline = cluster.follow();
    until(&pipeline, "the policy", |world| world.carried.len() == 1).await;
    for plural in ["peerauthentications", "pods"] {
        cluster.api.hide(plural, true);
    }
    let before = cluster.api.refusals();
    let refused = async {
        while cluster.api.refusals() < before + 4 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, refused).await.unwrap();
    let now = pipeline.subscribe().borrow().clone();
    assert_eq!((pods(&now.world), now.world.carried.len()), (vec!["a"], 1));
    for plural in ["peerauthentications", "pods"] {
        cluster.api.hide(plural, false);
    }
    cluster.api.put("peerauthentications", policy("q", "mode"));
    never_without_policies(&pipeline, "the other policy", |world| world.carried.len() == 2).await;
}

#[tokio::test]
async fn a_kind_that_changes_its_version_is_never_missed() {
    let cluster = Cluster::new().await;
    cluster.api.put("peerauthentications", policy("p", "mode"));
    cluster.api.serve("v1/peerauthentications", false);
    let pipeline = cluster.follow();
    until(&pipeline, "the policy of the older version", |world| world.carried.len() == 1).await;
    cluster.api.serve("v1beta1/peerauthentications", false);
    cluster.api.serve("v1/peerauthentications", true);
    cluster.api.down(true);
    cluster.api.down(false);
    cluster.api.put("peerauthentications", policy("q", "mode"));
    never_without_policies(&pipeline, "the other policy", |world| world.carried.len() == 2).await;
}

/// An older API server: what is read of a kind's older version is answered there as well.
#[tokio::test]
async fn status_is_written_where_only_an_older_version_is_served() {
    let cluster = Cluster::new().await;
    cluster.api.put("peerauthentications", policy("p", "mode"));
    cluster.api.serve("v1/peerauthentications", false);
    let pipeline = cluster.follow();
    until(&pipeline, "the policy of the older version", |world| world.carried.len() == 1).await;
    let _leads = cluster.write(&pipeline);
    let written = async {
        loop {
            let policy = cluster.api.get("peerauthentications", "shop/p").unwrap();
            if policy["status"]["conditions"][0]["type"].is_string() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, written).await.unwrap();
}

/// More Events than one look writes cannot be written, and come first in order.
#[tokio::test]
async fn events_that_fail_do_not_keep_others_waiting() {
    let cluster = Cluster::new().await;
    let misspelt = |namespace: &str, name: &str| {
        let mut policy = policy(name, "mdoe");
        policy["metadata"]["namespace"] = namespace.into();
        policy
    };
    for n in 0..120 {
        cluster.api.put("peerauthentications", misspelt("a-going", &format!("p{n}")));
    }
    cluster.api.put("peerauthentications", misspelt("shop", "p"));
    cluster.api.terminate("a-going");
    let pipeline = cluster.follow();
    until(&pipeline, "all policies", |world| world.carried.len() == 121).await;
    let _leads = cluster.write(&pipeline);
    let told = async {
        loop {
            let events = cluster.api.names("events");
            assert!(events.iter().all(|event| event.starts_with("shop/")), "{events:?}");
            if !events.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, told).await.expect("the other Event is written");
}

#[tokio::test]
async fn replicas_that_start_together_share_one_root() {
    let cluster = Cluster::new().await;
    let client = cluster.api.client();
    let now = std::time::SystemTime::now();
    let open = || secret::open(&client, "mesh", now);
    let (a, b, c) = tokio::join!(open(), open(), open());
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert_eq!((a.pem(), a.pem()), (b.pem(), c.pem()));
    // The user's own counts, and half of one is an error, not a reason to make another.
    let given = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": "mesh", "name": "cacerts"},
        "data": {"ca-cert.pem": ""}});
    cluster.api.put("secrets", given);
    assert!(matches!(open().await, Err(secret::SecretError::Unusable { .. })));
    for _ in 0..2 {
        secret::publish_roots(&client, "mesh", a.pem()).await.unwrap();
    }
    let map = cluster.api.get("configmaps", "mesh/undermesh-ca-root").unwrap();
    assert_eq!(map["data"]["root-cert.pem"], a.pem());
    assert!(!secret::publish_roots(&client, "mesh", a.pem()).await.unwrap());
    assert!(secret::publish_roots(&client, "mesh", "other").await.unwrap());
}

#[tokio::test]
async fn one_replica_leads_hands_over_and_hears_what_the_others_tell() {
    let cluster = Cluster::new().await;
    let mut replicas = Vec::new();
    for name in ["a", "b"] {
        let election = Election::new(&cluster.api.client(), "mesh", name.to_owned());
        let (leads, told, drain) = (election.leads(), election.told(), drain::channel().0);
        let say = move |_: &_| Say { text: format!("of {name}"), gone: Vec::new() };
        cluster.tasks.spawn(election.run(say, drain.watch()));
        replicas.push((leads, told, drain));
    }
    let led = async {
        loop {
            match replicas.iter().position(|(leads, ..)| *leads.borrow()) {
                Some(leader) => return leader,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let leader = tokio::time::timeout(SOON, led).await.unwrap();
    let (first, other) = (&replicas[leader], &replicas[1 - leader]);
    let name = ["a", "b"][1 - leader];
    let mut told = first.1.clone();
    tokio::time::timeout(SOON, told.wait_for(|told| told.get(name) == Some(&format!("of {name}"))))
        .await
        .unwrap()
        .unwrap();
    assert!(!*other.0.borrow());
    first.2.start();
    let mut leads = other.0.clone();
    tokio::time::timeout(SOON, leads.wait_for(|leads| *leads)).await.unwrap().unwrap();
    assert!(!*first.0.borrow());
    let lease = cluster.api.get("leases", &format!("mesh/{LEASE}")).unwrap();
    assert_eq!(lease["spec"]["holderIdentity"], name);
}

/// A token that says that it is the agent's, as Kubernetes writes them; each `id` is another one.
fn token(id: &str) -> String {
    let claims = json!({"aud": ["istio-ca"], "exp": u32::MAX, "jti": id, "kubernetes.io": {
        "namespace": "mesh", "serviceaccount": {"name": "undermesh-node", "uid": "s"},
        "pod": {"name": "agent", "uid": "u1"}, "node": {"name": "n1", "uid": "n"},
    }});
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
}

#[tokio::test]
async fn tokens_are_reviewed_once_and_a_pod_that_is_gone_is_nobody() {
    let cluster = Cluster::new().await;
    let agent = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "mesh", "name": "agent", "uid": "u1"},
        "spec": {"nodeName": "n1", "serviceAccountName": "undermesh-node", "containers": []}, "status": {"phase": "Running"}});
    cluster.api.put("pods", agent);
    let pipeline = cluster.follow();
    until(&pipeline, "the agent's pod", |world| pods(world) == ["agent"]).await;
    let good = |audience: &str| {
        json!({"authenticated": true, "audiences": [audience], "user": {
        "username": "system:serviceaccount:mesh:undermesh-node",
        "extra": {"authentication.kubernetes.io/pod-name": ["agent"], "authentication.kubernetes.io/pod-uid": ["u1"],
            "authentication.kubernetes.io/node-name": ["n1"]}}})
    };
    let [first, elsewhere, unknown] = ["first", "elsewhere", "unknown"].map(token);
    cluster.api.token(&first, good("istio-ca"));
    cluster.api.token(&elsewhere, good("https://kubernetes.default.svc"));
    let reviews = Reviews::new(cluster.api.client(), "mesh".into(), pipeline.subscribe());
    let now = Instant::now();
    let who = |token: &str, now| {
        let (reviews, token) = (&reviews, token.to_owned());
        async move {
            reviews
                .authenticate(&token, now)
                .await
                .map(|principal| principal.to_string())
                .map_err(|error| error.to_string())
        }
    };
    assert_eq!(who(&first, now).await.as_deref(), Ok("node:n1"));
    assert_eq!(who(&first, now).await.as_deref(), Ok("node:n1"));
    assert_eq!(cluster.api.reviews(), 1);
    assert!(who(&elsewhere, now).await.is_err());
    assert!(who(&unknown, now).await.is_err());
    assert!(who(&unknown, now).await.is_err());
    assert_eq!(cluster.api.reviews(), 3);
    // Withdrawn: known for a moment, then asked about again.
    cluster.api.token(&first, json!({"authenticated": false}));
    assert!(who(&first, now).await.is_ok());
    assert!(who(&first, now + Duration::from_secs(60)).await.is_err());
    // The API server away: not known, which is not the same as refused.
    cluster.api.token(&first, good("istio-ca"));
    cluster.api.down(true);
    let away = reviews.authenticate(&first, now + Duration::from_secs(120)).await;
    assert!(matches!(away, Err(mesh_control::credentials::Unauthenticated::Unavailable(_))), "{away:?}");
    cluster.api.down(false);
    assert!(who(&first, now + Duration::from_secs(120)).await.is_ok());
    // Its pod is gone: the token's good review does not help.
    cluster.api.delete("pods", "mesh/agent");
    until(&pipeline, "no pod", |world| world.pods.is_empty()).await;
    assert!(who(&first, now + Duration::from_secs(120)).await.is_err());
}
