//! Bodies on their way through: streamed frame by frame, counted, timed, never collected.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use mesh_net::copy::TransferCounters;
use tokio::time::Sleep;

use super::{upstream::Lease, wire::Busy};
use crate::record::{Flag, Record};

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The peer's side failed.
    #[error("the peer broke off")]
    Peer(#[from] hyper::Error),
    /// The exchange took longer than the route allows.
    #[error("request timeout")]
    Timeout,
}

/// The body of a request, towards the upstream.
pub struct RequestBody {
    inner: Incoming,
    counters: Arc<TransferCounters>,
    client_failed: Arc<AtomicBool>,
}

impl RequestBody {
    /// Counts into `counters`; `client_failed` tells afterwards whose fault a failed exchange was.
    pub fn new(inner: Incoming, counters: Arc<TransferCounters>, client_failed: Arc<AtomicBool>) -> Self {
        Self { inner, counters, client_failed }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        Poll::Ready(match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.counters.add_a_to_b(data.len() as u64);
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                self.client_failed.store(true, Relaxed);
                Some(Err(error.into()))
            }
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

enum Source {
    Local(Full<Bytes>),
    Upstream(Incoming),
}

/// The body of a response, towards the client; it carries the record of the exchange to its end.
pub struct ResponseBody {
    source: Source,
    record: Option<Record>,
    deadline: Option<Pin<Box<Sleep>>>,
    lease: Option<Lease>,
    _busy: Option<Busy>,
}

impl ResponseBody {
    /// An answer of our own.
    pub fn local(text: &'static str, record: Record) -> Self {
        let source = Source::Local(Full::new(Bytes::from_static(text.as_bytes())));
        Self { source, record: Some(record), deadline: None, lease: None, _busy: None }
    }

    /// No body: the record goes on elsewhere (after `101 Switching Protocols`).
    pub fn switching() -> Self {
        let source = Source::Local(Full::default());
        Self { source, record: None, deadline: None, lease: None, _busy: None }
    }

    /// The application's answer.
    pub fn upstream(
        inner: Incoming,
        record: Record,
        deadline: Option<Pin<Box<Sleep>>>,
        lease: Option<Lease>,
    ) -> Self {
        Self { source: Source::Upstream(inner), record: Some(record), deadline, lease, _busy: None }
    }

    /// Keeps the connection from counting as idle until this body has ended.
    pub fn keep_busy(mut self, busy: Busy) -> Self {
        self._busy = Some(busy);
        self
    }

    /// Carried to its end.
    fn finish(&mut self) {
        if let Some(record) = &mut self.record {
            record.close();
        }
        if let Some(lease) = self.lease.take() {
            lease.give_back();
        }
    }

    /// Broke off: the connection to the application is not used again.
    fn fail(&mut self, flag: Flag, details: &'static str, why: impl std::fmt::Display) {
        if let Some(record) = &mut self.record {
            record.fail(flag, details, why);
            record.close();
        }
        self.lease = None;
    }

    fn inner_ended(&self) -> bool {
        match &self.source {
            Source::Local(body) => body.is_end_stream(),
            Source::Upstream(body) => body.is_end_stream(),
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = &mut *self;
        if this.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            this.fail(Flag::UT, "response_timeout", "");
            return Poll::Ready(Some(Err(Broken::Timeout)));
        }
        let polled = match &mut this.source {
            Source::Local(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Source::Upstream(body) => Pin::new(body).poll_frame(cx),
        };
        Poll::Ready(match ready!(polled) {
            Some(Ok(frame)) => {
                if let Some(record) = &mut this.record {
                    record.passed(&frame);
                }
                if this.inner_ended() {
                    this.finish();
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                this.fail(Flag::UC, "upstream_reset_after_response_started", &error);
                Some(Err(error.into()))
            }
            None => {
                this.finish();
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner_ended()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Local(body) => body.size_hint(),
            Source::Upstream(body) => body.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    /// A body that has ended (or never had a byte: HEAD, 204, 304) is dropped without being polled to its end.
    fn drop(&mut self) {
        let bodyless = self.record.as_ref().is_some_and(Record::expects_no_body);
        if self.inner_ended() || bodyless {
            self.finish();
        }
    }
}
