//! An API server in memory, as far as a client of ours uses one: lists, watches with history, writes that name the
//! version they are based on, token reviews; and its ways to fail.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use mesh_net::task::TaskGroup;
use parking_lot::Mutex;
use serde_json::{Value as Json, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;

type Body = BoxBody<Bytes, Infallible>;

/// One change of a collection.
#[derive(Clone)]
struct Change {
    version: u64,
    kind: &'static str,
    object: Json,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By plural name, then by `namespace/name`.
    objects: BTreeMap<String, BTreeMap<String, Json>>,
    history: BTreeMap<String, Vec<Change>>,
    /// Collections that are not served, as `plural` or `version/plural`.
    absent: BTreeSet<String>,
    /// Collections for which something in between answers 404.
    hidden: BTreeSet<String>,
    /// Nothing is made in it.
    terminating: Option<String>,
    /// Everything is refused.
    down: bool,
    /// Watches that begin before this version are told to list anew.
    compacted: u64,
    tokens: BTreeMap<String, Json>,
    reviews: usize,
    lists: usize,
    refusals: usize,
}

/// Groups, their versions, and what is in them.
const GROUPS: [(&str, &[&str], &[&str]); 3] = [
    ("discovery.k8s.io", &["v1"], &["endpointslices"]),
    (
        "gateway.networking.k8s.io",
        &["v1", "v1beta1"],
        &["gatewayclasses", "gateways", "httproutes", "grpcroutes", "referencegrants"],
    ),
    ("security.istio.io", &["v1", "v1beta1"], &["authorizationpolicies", "peerauthentications"]),
];

/// The server.
#[derive(Clone)]
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
    tasks: TaskGroup,
    /// Where it listens.
    pub url: String,
}

impl ApiServer {
    /// Listens on loopback until the tasks end.
    pub async fn start(tasks: &TaskGroup) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { state: Arc::default(), changed: watch::channel(0).0, tasks: tasks.clone(), url };
        let (serving, connections) = (server.clone(), tasks.clone());
        tasks.spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let server = serving.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        let server = server.clone();
                        async move { Ok::<_, Infallible>(server.answer(request).await) }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(tcp), service)
                        .await;
                });
            }
        });
        server
    }

    /// A real client of it.
    pub fn client(&self) -> kube::Client {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        kube::Client::try_from(kube::Config::new(self.url.parse().unwrap())).unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let result = change(&mut state);
        drop(state);
        self.changed.send_modify(|seen| *seen += 1);
        result
    }

    /// An object is now so.
    pub fn put(&self, plural: &str, object: Json) {
        self.change(|state| state.put(plural, object));
    }

    /// An object is gone.
    pub fn delete(&self, plural: &str, key: &str) {
        self.change(|state| state.delete(plural, key));
    }

    /// Namespaces and names of all objects of a collection.
    pub fn names(&self, plural: &str) -> Vec<String> {
        self.state.lock().objects.get(plural).into_iter().flat_map(|all| all.keys().cloned()).collect()
    }

    /// Nothing can be made in a namespace any more, as in one that is being deleted.
    pub fn terminate(&self, namespace: &str) {
        self.state.lock().terminating = Some(namespace.to_owned());
    }

    /// An object as it is.
    pub fn get(&self, plural: &str, key: &str) -> Option<Json> {
        self.state.lock().objects.get(plural)?.get(key).cloned()
    }

    /// Whether a collection is served.
    pub fn serve(&self, plural: &str, served: bool) {
        self.change(|state| {
            if served {
                state.absent.remove(plural);
            } else {
                state.absent.insert(plural.to_owned());
            }
        });
    }

    /// Whether something in between answers 404 for a collection that is served.
    pub fn hide(&self, plural: &str, hidden: bool) {
        self.change(|state| {
            if hidden {
                state.hidden.insert(plural.to_owned());
            } else {
                state.hidden.remove(plural);
            }
        });
    }

    /// Refuses everything and ends the watches, or serves again.
    pub fn down(&self, down: bool) {
        self.change(|state| state.down = down);
    }

    /// Forgets its history: whoever watches must list anew.
    pub fn compact(&self) {
        self.change(|state| {
            state.version += 1;
            state.compacted = state.version;
            state.history.clear();
        });
    }

    /// What a review of `token` says.
    pub fn token(&self, token: &str, status: Json) {
        self.change(|state| state.tokens.insert(token.to_owned(), status));
    }

    /// How many reviews were asked for.
    pub fn reviews(&self) -> usize {
        self.state.lock().reviews
    }

    /// How many lists were asked for.
    pub fn lists(&self) -> usize {
        self.state.lock().lists
    }

    /// How often a collection was asked for that it does not give.
    pub fn refusals(&self) -> usize {
        self.state.lock().refusals
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let body: Json = serde_json::from_slice(&body).unwrap_or_default();
        let query = head.uri.query().unwrap_or_default().to_owned();
        let value = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        if self.state.lock().down {
            return failure(503, "ServiceUnavailable");
        }
        let place = Place::of(head.uri.path());
        if place.plural == "tokenreviews" {
            return self.review(&body);
        }
        if let Some(known) = self.discovery(head.uri.path()) {
            return reply(200, &known);
        }
        if self.state.lock().refuses(&place) {
            return failure(404, "NotFound");
        }
        match (&head.method, place.name.is_empty()) {
            (&Method::GET, true) if matches!(value("watch"), Some("true" | "1")) => {
                self.watch(place.plural, value("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0))
            }
            (&Method::GET, true) => self.list(&place),
            (&Method::GET, false) => self
                .get(&place.plural, &place.key())
                .map_or_else(|| failure(404, "NotFound"), |o| reply(200, &o)),
            (&Method::POST, true) => self.create(&place, body),
            (&Method::PATCH, false) => self.patch(&place, &body),
            _ => failure(405, "MethodNotAllowed"),
        }
    }

    /// What it serves, where that is asked for.
    fn discovery(&self, path: &str) -> Option<Json> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let state = self.state.lock();
        match parts[..] {
            ["apis"] => {
                let group = |name: &str, versions: &[&str]| {
                    let served = |version: &&str| json!({"groupVersion": format!("{name}/{version}"), "version": version});
                    json!({"name": name, "versions": versions.iter().map(served).collect::<Vec<_>>()})
                };
                let groups = GROUPS.map(|(name, versions, _)| group(name, versions));
                Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
            }
            ["apis", group, version] => {
                let (.., plurals) = GROUPS.iter().find(|(name, ..)| *name == group)?;
                let served = |plural: &&&str| {
                    let by_version = format!("{version}/{plural}");
                    !state.absent.contains(**plural) && !state.absent.contains(&by_version)
                };
                let resource = |plural: &&str| json!({"name": plural, "singularName": "", "namespaced": true, "kind": "X", "verbs": ["list"]});
                let resources: Vec<_> = plurals.iter().filter(served).map(resource).collect();
                Some(
                    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": format!("{group}/{version}"), "resources": resources}),
                )
            }
            _ => None,
        }
    }

    fn review(&self, body: &Json) -> Response<Body> {
        let mut state = self.state.lock();
        state.reviews += 1;
        let token = body.pointer("/spec/token").and_then(Json::as_str).unwrap_or_default();
        assert_eq!(body.pointer("/spec/audiences"), Some(&json!(["istio-ca"])));
        let status = state.tokens.get(token).cloned().unwrap_or(json!({"error": "unknown"}));
        reply(
            201,
            &json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {},
            "spec": {}, "status": status}),
        )
    }

    fn list(&self, place: &Place) -> Response<Body> {
        let mut state = self.state.lock();
        state.lists += 1;
        let items: Vec<Json> =
            state.objects.get(&place.plural).into_iter().flat_map(BTreeMap::values).cloned().collect();
        let version = state.version.to_string();
        reply(
            200,
            &json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": version}, "items": items}),
        )
    }

    fn create(&self, place: &Place, mut object: Json) -> Response<Body> {
        self.change(|state| {
            if state.terminating.as_ref() == Some(&place.namespace) {
                return failure(403, "Forbidden");
            }
            let name = object.pointer("/metadata/name").and_then(Json::as_str).unwrap_or_default().to_owned();
            let key = Place { name, ..place.clone() }.key();
            if state.objects.get(&place.plural).is_some_and(|all| all.contains_key(&key)) {
                return failure(409, "AlreadyExists");
            }
            object["metadata"]["namespace"] = place.namespace.clone().into();
            state.put(&place.plural, object);
            reply(201, &state.objects[&place.plural][&key])
        })
    }

    fn patch(&self, place: &Place, patch: &Json) -> Response<Body> {
        self.change(|state| {
            let Some(old) = state.objects.get(&place.plural).and_then(|all| all.get(&place.key())).cloned()
            else {
                return failure(404, "NotFound");
            };
            let based_on = patch.pointer("/metadata/resourceVersion").and_then(Json::as_str);
            if based_on.is_some_and(|version| {
                Some(version) != old.pointer("/metadata/resourceVersion").and_then(Json::as_str)
            }) {
                return failure(409, "Conflict");
            }
            let mut new = old;
            merge(&mut new, patch);
            state.put(&place.plural, new);
            reply(200, &state.objects[&place.plural][&place.key()])
        })
    }

    fn watch(&self, plural: String, from: u64) -> Response<Body> {
        let (sender, receiver) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(16);
        let server = self.clone();
        self.tasks.spawn(async move {
            let (mut seen, mut changed) = (from, server.changed.subscribe());
            loop {
                changed.mark_unchanged();
                let (lines, end) = server.events(&plural, &mut seen);
                for line in lines {
                    if sender.send(Ok(Frame::data(format!("{line}\n").into()))).await.is_err() {
                        return;
                    }
                }
                if end {
                    return;
                }
                tokio::select! {
                    () = sender.closed() => return,
                    changed = changed.changed() => if changed.is_err() { return },
                }
            }
        });
        Response::new(StreamBody::new(ReceiverStream::new(receiver)).boxed())
    }

    /// What is new since `seen`, and whether the watch ends.
    fn events(&self, plural: &str, seen: &mut u64) -> (Vec<Json>, bool) {
        let state = self.state.lock();
        let gone = |name: &String| name.rsplit('/').next() == Some(plural);
        if state.down || state.absent.iter().any(gone) || state.hidden.contains(plural) {
            return (Vec::new(), true);
        }
        if *seen < state.compacted {
            let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "metadata": {}, "code": 410, "reason": "Expired", "message": "too old resource version"}});
            return (vec![gone], true);
        }
        let new = state.history.get(plural).into_iter().flatten().filter(|change| change.version > *seen);
        let lines = new.map(|change| json!({"type": change.kind, "object": change.object})).collect();
        *seen = state.version;
        (lines, false)
    }
}

impl State {
    fn refuses(&mut self, place: &Place) -> bool {
        let by_version = format!("{}/{}", place.version, place.plural);
        let refuses = self.hidden.contains(&place.plural)
            || self.absent.contains(&place.plural)
            || self.absent.contains(&by_version);
        self.refusals += usize::from(refuses);
        refuses
    }

    fn put(&mut self, plural: &str, mut object: Json) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let all = self.objects.entry(plural.to_owned()).or_default();
        let old = all.insert(key_of(&object), object.clone());
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        let change = Change { version: self.version, kind, object };
        self.history.entry(plural.to_owned()).or_default().push(change);
    }

    fn delete(&mut self, plural: &str, key: &str) {
        self.version += 1;
        let gone = self.objects.get_mut(plural).and_then(|all| all.remove(key)).expect("it was there");
        let change = Change { version: self.version, kind: "DELETED", object: gone };
        self.history.entry(plural.to_owned()).or_default().push(change);
    }
}

#[derive(Clone, Default)]
struct Place {
    version: String,
    namespace: String,
    plural: String,
    name: String,
}

impl Place {
    fn of(path: &str) -> Self {
        let mut parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let version = if parts[0] == "api" { 1 } else { 2 };
        let mut place =
            Self { version: parts.get(version).copied().unwrap_or_default().to_owned(), ..Self::default() };
        parts.drain(..parts.len().min(version + 1));
        if parts.first() == Some(&"namespaces") && parts.len() > 2 {
            place.namespace = parts[1].to_owned();
            parts.drain(..2);
        }
        place.plural = parts.first().copied().unwrap_or_default().to_owned();
        place.name = parts.get(1).copied().unwrap_or_default().to_owned();
        place
    }

    fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

fn key_of(object: &Json) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Json::as_str).unwrap_or_default();
    format!("{}/{}", text("/metadata/namespace"), text("/metadata/name"))
}

/// RFC 7386.
fn merge(into: &mut Json, patch: &Json) {
    let Some(fields) = patch.as_object() else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            into.as_object_mut().unwrap().remove(name);
        } else {
            merge(&mut into[name], value);
        }
    }
}

fn reply(status: u16, body: &Json) -> Response<Body> {
    let body = Full::new(Bytes::from(body.to_string())).boxed();
    Response::builder().status(status).header("content-type", "application/json").body(body).unwrap()
}

fn failure(code: u16, reason: &str) -> Response<Body> {
    reply(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code, "reason": reason, "message": reason}),
    )
}
