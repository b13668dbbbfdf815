//! One delta stream: what the proxy has, what it should have, and the difference.
//!
//! The difference is always taken against the newest published state, so changes that a slow proxy has not seen yet
//! are folded into one. A proxy that does not read at all is disconnected.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_core::proto::{
    TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_WAYPOINT, TYPES,
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Status, Streaming};

use super::{
    Server,
    proxies::{CUT, Nack, Proxies, ProxyUpdate},
};
use crate::{credentials::Principal, publish::Published};

/// A proxy that takes nothing for this long is disconnected (`reliability.md` F-34).
const SLOW: Duration = Duration::from_secs(30);
/// Responses of one type that may wait for their answer: more changes are folded together until one comes.
const UNANSWERED: usize = 16;
/// A token that was withdrawn, or whose pod is gone, ends its feed within this time.
const RECHECK: Duration = Duration::from_secs(30);
/// A stream must ask for something within this time.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// Proxies ask for workloads before policies; the answer waits this long for the question after the policies, which
/// must be there first.
const POLICIES_FIRST: Duration = Duration::from_millis(200);
/// Most names that a proxy may claim to hold: beyond, they are forgotten and sent again.
const MAX_CLAIMED: usize = 500_000;
/// Longest reason of a NACK that is kept, bytes.
const MAX_REASON_BYTES: usize = 4096;
type Answer = Result<DeltaDiscoveryResponse, Status>;

/// Starts the task of one stream.
pub(super) fn open(
    server: &Arc<Server>,
    caller: Principal,
    token: String,
    requests: Streaming<DeltaDiscoveryRequest>,
) -> ReceiverStream<Answer> {
    // One response waits here, the rest in the difference.
    let (sender, receiver) = mpsc::channel(1);
    let stream = Stream {
        id: server.proxies.connected(&caller),
        caller,
        token,
        server: server.clone(),
        checked: Instant::now(),
        published: server.published.clone(),
        proxies: server.proxies.clone(),
        types: BTreeMap::new(),
        sender,
        responses: 0,
        opened: Instant::now(),
    };
    server.tasks.spawn(stream.run(requests));
    ReceiverStream::new(receiver)
}

struct Stream {
    id: u64,
    caller: Principal,
    token: String,
    server: Arc<Server>,
    /// When the token was last looked at.
    checked: Instant,
    published: watch::Receiver<Arc<Published>>,
    proxies: Arc<Proxies>,
    types: BTreeMap<&'static str, Subscription>,
    sender: mpsc::Sender<Answer>,
    responses: u64,
    opened: Instant,
}

/// What is known of one type on one stream.
#[derive(Default)]
struct Subscription {
    /// Name → version, as the proxy will have it when it has answered everything.
    sent: BTreeMap<Arc<str>, Arc<str>>,
    /// Names that the proxy claims or asks for, which must be answered even if there is nothing.
    asked: Vec<Arc<str>>,
    /// Responses without answer, oldest first.
    unanswered: Vec<InFlight>,
    /// The first response was sent.
    answered: bool,
}

struct InFlight {
    nonce: String,
    names: Vec<(Arc<str>, Arc<str>)>,
}

enum Event {
    Request(Box<DeltaDiscoveryRequest>),
    Changed,
    Waited,
    Ended,
}

impl Stream {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let ending = self.serve(&mut requests).await;
        if let Err(status) = ending {
            tracing::info!(proxy = %self.caller, reason = status.message(), "feed ended by us");
            // Does not fit when the proxy does not read; then the end of the stream says it all.
            let _ = self.sender.try_send(Err(status));
        }
        self.proxies.disconnected(&self.caller, self.id);
    }

    async fn serve(&mut self, requests: &mut Streaming<DeltaDiscoveryRequest>) -> Result<(), Status> {
        loop {
            if self.checked.elapsed() >= RECHECK {
                if !self.server.still(&self.token, &self.caller).await {
                    return Err(Status::unauthenticated("the token is good no longer"));
                }
                self.checked = Instant::now();
            }
            let pushed = self.push().await?;
            self.report(&pushed);
            let wake = self.wake_at();
            let event = tokio::select! {
                biased;
                () = self.sender.closed() => Event::Ended,
                request = requests.next() => match request {
                    Some(Ok(request)) => Event::Request(Box::new(request)),
                    Some(Err(_)) | None => Event::Ended,
                },
                changed = self.published.changed() => if changed.is_ok() { Event::Changed } else { Event::Ended },
                () = sleep_until(wake) => Event::Waited,
            };
            match event {
                Event::Request(request) => self.take(*request)?,
                Event::Changed => {}
                Event::Waited if self.types.is_empty() => {
                    return Err(Status::deadline_exceeded("nothing was asked for"));
                }
                Event::Waited => {}
                Event::Ended => return Ok(()),
            }
        }
    }

    fn wake_at(&self) -> Instant {
        if self.types.is_empty() {
            self.opened + FIRST_REQUEST
        } else if self.holds_back() {
            self.opened + POLICIES_FIRST
        } else {
            self.checked + RECHECK
        }
    }

    /// Whether workloads wait for the policies to be asked for.
    fn holds_back(&self) -> bool {
        !self.types.contains_key(TYPE_AUTHORIZATION) && self.opened.elapsed() < POLICIES_FIRST
    }

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let DeltaDiscoveryRequest {
            node,
            type_url,
            resource_names_subscribe,
            resource_names_unsubscribe: _,
            initial_resource_versions,
            response_nonce,
            error_detail,
        } = request;
        if self.types.is_empty() && node.is_none_or(|node| node.id.is_empty()) {
            return Err(Status::invalid_argument("the first request must name the node"));
        }
        // Types that we do not have are answered by silence, as the newest proxies of others ask for more than ours.
        let Some(type_url) = Published::type_of(&type_url) else { return Ok(()) };
        let fresh = !self.types.contains_key(type_url);
        let subscription = self.types.entry(type_url).or_default();
        if fresh && initial_resource_versions.len() <= MAX_CLAIMED {
            let claimed =
                initial_resource_versions.into_iter().map(|(name, version)| (name.into(), version.into()));
            subscription.sent = claimed.collect();
            self.proxies.claimed(&self.caller, self.id, type_url, &subscription.sent);
        }
        if !response_nonce.is_empty() && !fresh {
            let reason = error_detail.map(|detail| bounded(detail.message));
            if let Some(place) = subscription.unanswered.iter().position(|sent| sent.nonce == response_nonce)
            {
                let answered = subscription.unanswered.remove(place);
                self.proxies.answered(&self.caller, self.id, type_url, &answered.names, reason.as_deref());
            }
        }
        // A name asked for explicitly must come back, as what it is or as removed, or its asker waits for ever.
        let named = resource_names_subscribe.into_iter().filter(|name| name != "*").take(MAX_CLAIMED);
        let mut named: Vec<Arc<str>> = named.map(Arc::from).collect();
        for name in &named {
            subscription.sent.remove(name);
        }
        if subscription.asked.len() + named.len() > MAX_CLAIMED {
            return Err(Status::resource_exhausted("too many names are waiting for their answer"));
        }
        subscription.asked.append(&mut named);
        Ok(())
    }

    /// Sends every difference between what the proxy has and what is published.
    async fn push(&mut self) -> Result<Arc<Published>, Status> {
        let published = self.published.borrow_and_update().clone();
        // Additions in order; policies that are gone leave only after the workloads that named them.
        for type_url in TYPES {
            let removals = type_url != TYPE_AUTHORIZATION;
            self.push_type(&published, type_url, removals).await?;
        }
        self.push_type(&published, TYPE_AUTHORIZATION, true).await?;
        Ok(published)
    }

    async fn push_type(
        &mut self,
        published: &Arc<Published>,
        type_url: &'static str,
        removals: bool,
    ) -> Result<(), Status> {
        if type_url == TYPE_ADDRESS && self.holds_back() {
            return Ok(());
        }
        let Some(subscription) = self.types.get_mut(type_url) else { return Ok(()) };
        if subscription.unanswered.len() >= UNANSWERED {
            return Ok(());
        }
        let visible: BTreeMap<&Arc<str>, _> =
            published.visible(&self.caller, type_url).map(|resource| (&resource.name, resource)).collect();
        let mut names = Vec::new();
        let mut resources = Vec::new();
        for (name, resource) in &visible {
            if subscription.sent.get(*name) != Some(&resource.version) {
                names.push(((*name).clone(), resource.version.clone()));
                resources.push(WireResource {
                    version: resource.version.to_string(),
                    resource: Some(prost_types::Any {
                        type_url: type_url.to_owned(),
                        value: resource.body.clone(),
                    }),
                    name: name.to_string(),
                    aliases: Vec::new(),
                });
            }
        }
        // The first response is sent even if it is empty: readiness waits for it.
        let removals = removals || !subscription.answered;
        let mut removed: Vec<Arc<str>> = Vec::new();
        if removals {
            removed.extend(subscription.sent.keys().filter(|name| !visible.contains_key(name)).cloned());
            removed.extend(subscription.asked.drain(..).filter(|name| !visible.contains_key(name)));
        }
        if subscription.answered && resources.is_empty() && removed.is_empty() {
            return Ok(());
        }
        self.responses += 1;
        let nonce = format!("{}-{}", self.id, self.responses);
        subscription.answered = true;
        for name in &removed {
            subscription.sent.remove(name);
            names.push((name.clone(), "".into()));
        }
        for (name, version) in names.iter().filter(|(_, version)| !version.is_empty()) {
            subscription.sent.insert(name.clone(), version.clone());
        }
        subscription.unanswered.push(InFlight { nonce: nonce.clone(), names });
        let response = DeltaDiscoveryResponse {
            system_version_info: published.revision.to_string(),
            resources,
            type_url: type_url.to_owned(),
            nonce,
            removed_resources: removed.iter().map(ToString::to_string).collect(),
        };
        match timeout(SLOW, self.sender.send(Ok(response))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the proxy went away")),
            Err(_) => Err(Status::deadline_exceeded("the proxy does not take what it is sent")),
        }
    }

    /// Tells the status how far this proxy is with what was `published` when it was last pushed: of anything newer
    /// the removals would not be missed.
    fn report(&self, published: &Published) {
        // A waypoint asks for its own configuration, not for what agents enforce.
        let other = match self.caller {
            Principal::Node(_) => TYPE_AUTHORIZATION,
            Principal::Pod { .. } => TYPE_WAYPOINT,
        };
        let complete = self.types.contains_key(TYPE_ADDRESS)
            && self.types.contains_key(other)
            && self.types.iter().all(|(type_url, subscription)| {
                subscription.answered
                    && subscription.unanswered.is_empty()
                    && published
                        .visible(&self.caller, type_url)
                        .all(|resource| subscription.sent.get(&resource.name) == Some(&resource.version))
            });
        let pending = self.types.values().flat_map(|subscription| &subscription.unanswered);
        let pending = pending.flat_map(|sent| sent.names.iter().map(|(name, _)| name.clone())).collect();
        let update = ProxyUpdate { revision: complete.then_some(published.revision), pending };
        self.proxies.reported(&self.caller, self.id, update);
    }
}

fn bounded(mut text: String) -> Nack {
    if text.len() > MAX_REASON_BYTES {
        let end = (0..=MAX_REASON_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push_str(CUT);
    }
    text
}
