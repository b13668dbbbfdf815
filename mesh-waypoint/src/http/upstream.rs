//! Connections to endpoints: HTTP/1.1 ones kept alive one request at a time, HTTP/2 ones shared.
//!
//! A connection belongs to one endpoint and one client identity, because the tunnel that carries it states the client
//! in its head.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
};

use futures_util::{FutureExt, future::Shared};
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::{
    id::{Identity, WorkloadKey},
    model::TunnelProtocol,
};
use mesh_net::task::TaskGroup;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use super::{body::RequestBody, server::Executor};
use crate::{
    dial::{BoxFuture, Dial, DialFailure, Endpoint},
    limits,
};

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection to the endpoint.
    #[error(transparent)]
    Dial(DialFailure),
    /// The endpoint's HTTP handshake or the exchange failed.
    #[error("upstream failed: {0}")]
    Exchange(#[source] hyper::Error),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    endpoint: WorkloadKey,
    address: SocketAddr,
    /// A pod that is enrolled meanwhile is not spoken to in the clear any longer, nor one of another account as before.
    tunnel: TunnelProtocol,
    server: Identity,
    client: Identity,
}

type Sender1 = http1::SendRequest<RequestBody>;
type Sender2 = http2::SendRequest<RequestBody>;
type Dialling = Shared<BoxFuture<Result<Sender2, DialFailure>>>;

struct Idle {
    sender: Sender1,
    since: Instant,
}

#[derive(Default)]
struct Kept {
    http1: HashMap<Key, Vec<Idle>>,
    http2: HashMap<Key, (Dialling, Instant)>,
}

/// The pool.
pub struct Upstream {
    dial: Arc<dyn Dial>,
    tasks: TaskGroup,
    kept: Mutex<Kept>,
}

/// A connection in use; goes back to the pool when its response was read to the end.
pub struct Lease {
    pool: Weak<Upstream>,
    key: Key,
    sender: Sender1,
}

/// A response head, and its connection where that is to be given back.
pub struct Sent {
    /// The response, its body still to be read.
    pub response: Response<Incoming>,
    /// HTTP/1.1 only.
    pub lease: Option<Lease>,
}

impl Upstream {
    /// An empty pool that dials with `dial`.
    pub fn new(dial: Arc<dyn Dial>, tasks: TaskGroup) -> Arc<Self> {
        Arc::new(Self { dial, tasks, kept: Mutex::default() })
    }

    /// Sends one request and waits for the response head. The caller bounds the time.
    ///
    /// # Errors
    /// [`SendError`]; nothing is sent twice: only a request of which no byte left is put on another connection.
    pub async fn send(
        self: &Arc<Self>,
        to: &Endpoint,
        client: &Identity,
        request: Request<RequestBody>,
    ) -> Result<Sent, SendError> {
        let key = Key {
            endpoint: to.workload.uid.clone(),
            address: to.address,
            tunnel: to.workload.tunnel,
            server: to.workload.identity(),
            client: client.clone(),
        };
        if request.version() == http::Version::HTTP_2 {
            self.send_http2(key, to, request).await
        } else {
            self.send_http1(key, to, request).await
        }
    }

    async fn send_http1(
        self: &Arc<Self>,
        key: Key,
        to: &Endpoint,
        mut request: Request<RequestBody>,
    ) -> Result<Sent, SendError> {
        while let Some(mut sender) = self.take(&key) {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(self.sent(response, key, sender)),
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(SendError::Exchange(failed.into_error())),
                },
            }
        }
        let stream = self.dial.dial(to, &key.client).await.map_err(SendError::Dial)?;
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(limits::HEADER_BYTES)
            .max_headers(limits::HEADERS)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(SendError::Exchange)?;
        self.tasks.spawn(async move {
            // How it ends is told to the exchange that is using it.
            let _ended = connection.with_upgrades().await;
        });
        let response = sender.send_request(request).await.map_err(SendError::Exchange)?;
        Ok(self.sent(response, key, sender))
    }

    fn sent(self: &Arc<Self>, response: Response<Incoming>, key: Key, sender: Sender1) -> Sent {
        Sent { response, lease: Some(Lease { pool: Arc::downgrade(self), key, sender }) }
    }

    async fn send_http2(
        &self,
        key: Key,
        to: &Endpoint,
        mut request: Request<RequestBody>,
    ) -> Result<Sent, SendError> {
        // One more attempt for a shared connection that was closing when we took it.
        let mut spare = true;
        loop {
            let dialling = self.shared(&key, to);
            let mut sender = match dialling.clone().await {
                Ok(sender) => sender,
                Err(failure) => {
                    self.forget(&key, &dialling);
                    return Err(SendError::Dial(failure));
                }
            };
            let mut failed = match sender.try_send_request(request).await {
                Ok(response) => return Ok(Sent { response, lease: None }),
                Err(failed) => failed,
            };
            if sender.is_closed() {
                self.forget(&key, &dialling);
            }
            match failed.take_message() {
                Some(unsent) if std::mem::take(&mut spare) => request = unsent,
                _ => return Err(SendError::Exchange(failed.into_error())),
            }
        }
    }

    /// The connection of this key, or the one dial that everyone waits for.
    fn shared(&self, key: &Key, to: &Endpoint) -> Dialling {
        let mut kept = self.kept.lock();
        if let Some((dialling, used)) = kept.http2.get_mut(key) {
            let usable = match dialling.peek() {
                Some(Ok(sender)) => !sender.is_closed(),
                Some(Err(_)) => false,
                None => true,
            };
            if usable {
                *used = Instant::now();
                return dialling.clone();
            }
        }
        let dialled = self.dial.dial(to, &key.client);
        let tasks = self.tasks.clone();
        let future: BoxFuture<Result<Sender2, DialFailure>> = Box::pin(async move {
            let stream = dialled.await?;
            let mut builder = http2::Builder::new(Executor(tasks.clone()));
            builder
                .timer(TokioTimer::new())
                .initial_stream_window_size(limits::WINDOW_BYTES)
                .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
                .max_header_list_size(limits::HEADER_BYTES as u32);
            let (sender, connection) = timeout(limits::CONNECT, builder.handshake(TokioIo::new(stream)))
                .await
                .map_err(late)?
                .map_err(|error| DialFailure {
                    flag: mesh_core::flag::Flag::UpstreamIo,
                    text: error.to_string(),
                })?;
            tasks.spawn(async move {
                let _ended = connection.await;
            });
            Ok(sender)
        });
        let dialling = future.shared();
        if kept.http2.len() >= limits::POOL_KEYS {
            let oldest = kept.http2.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                kept.http2.remove(&oldest);
            }
        }
        kept.http2.insert(key.clone(), (dialling.clone(), Instant::now()));
        dialling
    }

    fn forget(&self, key: &Key, dialling: &Dialling) {
        let mut kept = self.kept.lock();
        if kept.http2.get(key).is_some_and(|(current, _)| current.ptr_eq(dialling)) {
            kept.http2.remove(key);
        }
    }

    /// A kept connection that can take a request now.
    fn take(&self, key: &Key) -> Option<Sender1> {
        let mut kept = self.kept.lock();
        let idle = kept.http1.get_mut(key)?;
        while let Some(Idle { sender, since }) = idle.pop() {
            if sender.is_ready() && since.elapsed() < limits::UPSTREAM_IDLE {
                return Some(sender);
            }
        }
        kept.http1.remove(key);
        None
    }

    fn put(&self, key: Key, sender: Sender1) {
        if sender.is_closed() {
            return;
        }
        let mut kept = self.kept.lock();
        if kept.http1.len() >= limits::POOL_KEYS && !kept.http1.contains_key(&key) {
            let oldest = kept
                .http1
                .iter()
                .min_by_key(|(_, idle)| idle.last().map(|idle| idle.since))
                .map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                kept.http1.remove(&oldest);
            }
        }
        let idle = kept.http1.entry(key).or_default();
        if idle.len() < limits::IDLE_PER_KEY {
            idle.push(Idle { sender, since: Instant::now() });
        }
    }

    /// Closes what was not used for long; called from time to time.
    pub fn sweep(&self) {
        let mut kept = self.kept.lock();
        kept.http1.retain(|_, idle| {
            idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < limits::UPSTREAM_IDLE);
            !idle.is_empty()
        });
        // Dropping the last sender lets running streams finish, then closes.
        kept.http2.retain(|_, (dialling, used)| {
            let closed = matches!(dialling.peek(), Some(Ok(sender)) if sender.is_closed());
            !closed && used.elapsed() < limits::UPSTREAM_IDLE
        });
    }

    /// How many connections are kept, HTTP/1.1 and HTTP/2.
    pub fn kept(&self) -> (usize, usize) {
        let kept = self.kept.lock();
        (kept.http1.values().map(Vec::len).sum(), kept.http2.len())
    }
}

fn late(_: tokio::time::error::Elapsed) -> DialFailure {
    DialFailure {
        flag: mesh_core::flag::Flag::UpstreamTimeout,
        text: "HTTP/2 handshake took too long".into(),
    }
}

impl Lease {
    /// The response was read to its end. The connection is usable at once, or when the rest of the request was sent.
    pub fn give_back(self) {
        let Some(pool) = self.pool.upgrade() else { return };
        let Self { key, mut sender, .. } = self;
        if sender.is_ready() {
            return pool.put(key, sender);
        }
        if sender.is_closed() {
            return;
        }
        let tasks = pool.tasks.clone();
        let pool = Arc::downgrade(&pool);
        tasks.spawn(async move {
            let settled = timeout(limits::UPSTREAM_SETTLE, sender.ready()).await;
            if let (Ok(Ok(())), Some(pool)) = (settled, pool.upgrade()) {
                pool.put(key, sender);
            }
        });
    }
}
