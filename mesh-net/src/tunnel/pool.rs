//! Connections that are shared between streams (`wire-protocol.md` 2.7).
//!
//! ```text
//! absent ──first open──► connecting ──ok──► live ──100th stream, GOAWAY, loss──► retired ──last stream──► closed
//!    ▲                       │ failed: all who wait get the error    └──idle 5 min──► closed
//!    └───────────────────────┘
//! ```
//! One attempt per key at a time; whoever comes meanwhile waits for its outcome and no lock is held over an await.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::StatusCode;
use mesh_core::{
    flag::Flag,
    id::Identity,
    limits::{CONNECT, HOLD, TUNNEL_IDLE, TUNNEL_STREAMS},
};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::{sync::watch, time::Instant};

use super::{
    Dial, DialError, Phase, TunnelStream,
    dial::{baggage, establish, keepalive, mux_failure, request, told_flag, within},
};
use crate::{
    BoxFuture,
    drain::Draining,
    identity::{CertificateManager, WorkloadCertificate},
    mux::{self, Event, Failure as Broken, Handle, Reason},
    task::TaskGroup,
    tls::TlsError,
};

/// The peer's answer to a CONNECT: its own deadline towards the application, and time to tell us.
const ANSWER: Duration = CONNECT.saturating_add(HOLD);
/// Connections on which one stream is tried when the peer turns out to be closing them.
const TRIES: usize = 3;
/// After an attempt that ran into its deadline, others fail at once for this long instead of waiting too (F-19).
const OPEN_CIRCUIT: Duration = Duration::from_secs(1);

/// Where the pool gets its certificates.
pub trait Certificates: Send + Sync + 'static {
    /// The valid certificate of `identity`.
    fn get<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Arc<WorkloadCertificate>, Flag>>;
}

impl Certificates for CertificateManager {
    fn get<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Arc<WorkloadCertificate>, Flag>> {
        Box::pin(CertificateManager::get(self, identity))
    }
}

/// Tunnels to peers. Clones are the same pool.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    certificates: Arc<dyn Certificates>,
    tasks: TaskGroup,
    draining: Draining,
    slots: Mutex<HashMap<Key, Slot>>,
}

/// Streams share a connection only if all of this is equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    identity: Identity,
    expect: Vec<Identity>,
    dial: SocketAddr,
    source: IpAddr,
    generation: u64,
}

type Outcome = Option<Result<(), DialError>>;

#[derive(Default)]
struct Slot {
    links: Vec<Arc<Link>>,
    connecting: Option<watch::Receiver<Outcome>>,
    failed: Option<(Instant, DialError)>,
}

impl Slot {
    fn is_empty(&self) -> bool {
        self.links.is_empty() && self.connecting.is_none() && self.failed.is_none()
    }
}

/// One connection.
struct Link {
    handle: Handle,
    peer: Identity,
    /// The peer has answered a CONNECT.
    answered: AtomicBool,
    state: Mutex<LinkState>,
}

struct LinkState {
    open: usize,
    retired: bool,
    idle_since: Instant,
}

impl Link {
    /// Counts one stream more if there is room. The connection that gives its last place is retired.
    fn reserve(self: &Arc<Self>) -> Option<Reservation> {
        // A peer that permits none gets the first stream to wait for its leave, within its deadline: taking the
        // connection for full would dial another one at once, and so on for ever.
        let limit = TUNNEL_STREAMS.min(self.handle.permitted()).max(1);
        let mut state = self.state.lock();
        if state.retired || state.open >= limit {
            state.retired = true;
            return None;
        }
        state.open += 1;
        state.retired = state.open >= limit;
        Some(Reservation { link: self.clone() })
    }

    fn is_retired(&self) -> bool {
        self.state.lock().retired
    }

    fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.open == 0 && state.idle_since.elapsed() >= TUNNEL_IDLE
    }
}

/// One stream of a [`Link`], counted while it lives.
pub(super) struct Reservation {
    link: Arc<Link>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.link.state.lock();
        state.open -= 1;
        if state.open == 0 {
            state.idle_since = Instant::now();
        }
    }
}

/// One connection as status shows it.
#[derive(Clone, Debug, Serialize)]
pub struct PoolStatus {
    /// Whom we prove to be.
    pub identity: Identity,
    /// Whom the peer proved to be.
    pub peer: Identity,
    /// Where it leads.
    pub dial: SocketAddr,
    /// From where.
    pub source: IpAddr,
    /// Streams that are open.
    pub streams: usize,
    /// Generation of our certificate.
    pub generation: u64,
}

enum Next {
    Use(Reservation),
    Wait(watch::Receiver<Outcome>),
}

/// How opening a stream on one connection ended, if not well.
enum Failure {
    /// This connection takes no more streams, and the peer has not acted on ours: try another.
    Unusable(DialError),
    Final(DialError),
}

impl Pool {
    /// A pool whose connections are tasks of `tasks` and end when `draining` is forced.
    pub fn new(certificates: Arc<dyn Certificates>, tasks: TaskGroup, draining: Draining) -> Self {
        Self { inner: Arc::new(Inner { certificates, tasks, draining, slots: Mutex::default() }) }
    }

    /// Opens a stream: over a live connection if there is one with room, else over a new one.
    ///
    /// # Errors
    /// See [`DialError`]; never falls back to anything.
    pub async fn open(&self, dial: Dial) -> Result<TunnelStream, DialError> {
        let certificate =
            self.inner.certificates.get(&dial.identity).await.map_err(DialError::Certificate)?;
        let key = Key {
            identity: dial.identity.clone(),
            expect: dial.hop.expect.clone(),
            dial: dial.hop.dial,
            source: dial.source,
            generation: certificate.generation,
        };
        let mut last = DialError::Abandoned;
        for _ in 0..TRIES {
            let reservation = self.reserve(&key, &dial, &certificate).await?;
            let link = reservation.link.clone();
            match open_on(reservation, &dial).await.map_err(|failure| refused_in_tls(&link, failure)) {
                Ok(stream) => return Ok(stream),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Unusable(error)) => {
                    self.inner.retire(&key, &link);
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn reserve(
        &self,
        key: &Key,
        dial: &Dial,
        certificate: &Arc<WorkloadCertificate>,
    ) -> Result<Reservation, DialError> {
        loop {
            let mut outcome = match self.next(key, dial, certificate)? {
                Next::Use(reservation) => return Ok(reservation),
                Next::Wait(outcome) => outcome,
            };
            let done = outcome.wait_for(Option::is_some).await.map_err(|_| DialError::Abandoned)?;
            if let Some(Err(error)) = &*done {
                return Err(error.clone());
            }
        }
    }

    /// A place on a live connection, or the attempt to wait for, started if there is none.
    fn next(
        &self,
        key: &Key,
        dial: &Dial,
        certificate: &Arc<WorkloadCertificate>,
    ) -> Result<Next, DialError> {
        if self.inner.draining.is_forced() {
            return Err(DialError::Drain);
        }
        let mut slots = self.inner.slots.lock();
        let slot = slots.entry(key.clone()).or_default();
        let mut found = None;
        slot.links.retain(|link| {
            if found.is_none() {
                found = link.reserve();
            }
            !link.is_retired()
        });
        if let Some(reservation) = found {
            return Ok(Next::Use(reservation));
        }
        match &slot.connecting {
            // Closed without an outcome: its task was cancelled or panicked.
            Some(outcome) if outcome.has_changed().is_ok() => return Ok(Next::Wait(outcome.clone())),
            _ => {}
        }
        match &slot.failed {
            Some((at, error)) if at.elapsed() < OPEN_CIRCUIT => return Err(error.clone()),
            _ => slot.failed = None,
        }
        let (sender, outcome) = watch::channel(None);
        slot.connecting = Some(outcome.clone());
        let attempt = attempt(self.inner.clone(), key.clone(), dial.clone(), certificate.clone(), sender);
        self.inner.tasks.spawn(attempt);
        Ok(Next::Wait(outcome))
    }

    /// All connections that take streams.
    pub fn status(&self) -> Vec<PoolStatus> {
        let slots = self.inner.slots.lock();
        let links = slots.iter().flat_map(|(key, slot)| slot.links.iter().map(move |link| (key, link)));
        links
            .map(|(key, link)| PoolStatus {
                identity: key.identity.clone(),
                peer: link.peer.clone(),
                dial: key.dial,
                source: key.source,
                streams: link.state.lock().open,
                generation: key.generation,
            })
            .collect()
    }
}

/// Connects, tells the outcome, then drives the connection to its end. A task of its own, so that a waiter that gives
/// up takes nothing from the others.
async fn attempt(
    inner: Arc<Inner>,
    key: Key,
    dial: Dial,
    certificate: Arc<WorkloadCertificate>,
    outcome: watch::Sender<Outcome>,
) {
    let (handle, mut connection, peer) = match establish(&dial, &certificate).await {
        Ok(made) => made,
        Err(error) => {
            inner.failed(&key, &error);
            outcome.send_replace(Some(Err(error)));
            return;
        }
    };
    drop((dial, certificate));
    let state = LinkState { open: 0, retired: false, idle_since: Instant::now() };
    let link = Arc::new(Link { handle, peer, answered: AtomicBool::new(false), state: Mutex::new(state) });
    let weak = Arc::downgrade(&link);
    let pings = connection.pings();
    inner.connected(&key, link);
    outcome.send_replace(Some(Ok(())));
    let draining = inner.draining.clone();
    let alive = keepalive(pings, || inner.close_if_idle(&key, &weak));
    tokio::select! {
        biased;
        ended = connection.next() => {
            if let Event::End(cause) = ended {
                tracing::debug!(peer = %key.dial, %cause, "tunnel ended");
            }
        }
        () = alive => tracing::debug!(peer = %key.dial, "tunnel ended: no answer to PING"),
        () = draining.forced() => {}
    }
    if let Some(link) = weak.upgrade() {
        inner.retire(&key, &link);
    }
}

/// In TLS 1.3 the server judges our certificate after our own handshake is done. A connection that breaks before it
/// answered anything was refused, whether or not the alert survived the reset that follows it.
fn refused_in_tls(link: &Link, failure: Failure) -> Failure {
    match failure {
        Failure::Final(DialError::Io { source, .. }) | Failure::Unusable(DialError::Io { source, .. })
            if !link.answered.load(Ordering::Relaxed) =>
        {
            Failure::Final(DialError::Tls(TlsError::Io(source)))
        }
        other => other,
    }
}

async fn open_on(reservation: Reservation, dial: &Dial) -> Result<TunnelStream, Failure> {
    let request = request(&dial.authority, &dial.headers).map_err(Failure::Final)?;
    let block = mux::connect(&request);
    let opening = within(Phase::Answer, ANSWER, reservation.link.handle.open(&block));
    let stream = opening
        .await
        .map_err(Failure::Final)?
        .map_err(|failure| Failure::Unusable(mux_failure(Phase::Answer, &failure)))?;
    let answer = std::future::poll_fn(|cx| stream.poll_answer(cx));
    let answer = within(Phase::Answer, ANSWER, answer).await.map_err(Failure::Final)?;
    let head = answer.map_err(|error| {
        let failure = mux_failure(Phase::Answer, &error);
        match error {
            Broken::GoAway | Broken::Reset(Reason::REFUSED_STREAM) => Failure::Unusable(failure),
            _ => Failure::Final(failure),
        }
    })?;
    reservation.link.answered.store(true, Ordering::Relaxed);
    if head.status != Some(StatusCode::OK.as_u16()) {
        let flag = told_flag(&head.headers);
        return Err(Failure::Final(DialError::Status { status: head.status.unwrap_or(0), flag }));
    }
    let peer = reservation.link.peer.clone();
    Ok(TunnelStream::new(stream, peer, baggage(&head.headers), Some(reservation)))
}

impl Inner {
    fn connected(&self, key: &Key, link: Arc<Link>) {
        let mut slots = self.slots.lock();
        let slot = slots.entry(key.clone()).or_default();
        slot.connecting = None;
        slot.failed = None;
        slot.links.push(link);
    }

    fn failed(&self, key: &Key, error: &DialError) {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get_mut(key) {
            slot.connecting = None;
            slot.failed =
                matches!(error, DialError::Deadline { .. }).then(|| (Instant::now(), error.clone()));
        }
        slots.retain(|_, slot| {
            slot.failed.take_if(|(at, _)| at.elapsed() >= OPEN_CIRCUIT);
            !slot.is_empty()
        });
    }

    fn retire(&self, key: &Key, link: &Arc<Link>) {
        link.state.lock().retired = true;
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get_mut(key) {
            slot.links.retain(|other| !Arc::ptr_eq(other, link));
            if slot.is_empty() {
                slots.remove(key);
            }
        }
    }

    /// The pool's reference is the last one of an idle connection: without it, HTTP/2 closes by itself.
    fn close_if_idle(&self, key: &Key, link: &Weak<Link>) {
        if let Some(link) = link.upgrade()
            && link.is_idle()
        {
            self.retire(key, &link);
        }
    }
}
