//! HTTP/1.1 and HTTP/2 on one accepted stream, told apart by the client's first bytes.

use std::{convert::Infallible, future::Future, pin::pin, sync::Arc};

use http::{Request, Response, StatusCode};
use hyper::{
    body::Incoming,
    rt,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_net::{drain::Draining, task::TaskGroup};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::{
    Downstream,
    body::ResponseBody,
    wire::{Judge, Version, Wire},
};
use crate::{
    limits,
    record::{Flag, Record},
};

/// Runs hyper's tasks inside the waypoint's group.
#[derive(Clone)]
pub struct Executor(pub TaskGroup);

impl<F> rt::Executor<F> for Executor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// Serves one connection to its end. Infallible: the records of its requests tell how it went.
pub async fn serve<S>(cx: Arc<Downstream>, io: S, draining: Draining)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // A connection that never sent a whole first message asked for nothing: there is nothing to record.
    let opened = tokio::select! {
        biased;
        opened = Wire::open(io) => opened,
        () = draining.started() => return,
    };
    let Ok((version, wire)) = opened else { return };
    let ended = match version {
        Version::Http1 => serve_http1(&cx, wire, draining).await,
        Version::Http2 => serve_http2(&cx, wire, draining).await,
    };
    if let Err(error) = ended {
        note_protocol_error(&cx, version, &error);
    }
}

/// What the HTTP library refused by itself never reached the service, but it is seen.
fn note_protocol_error(cx: &Downstream, version: Version, error: &hyper::Error) {
    if !error.is_parse() && !error.is_parse_too_large() {
        return;
    }
    let mut record = Record::open(&cx.waypoint.metrics, &cx.client, cx.peer, cx.authority);
    record.seen.protocol = if version == Version::Http1 { "HTTP/1.1" } else { "HTTP/2" };
    record.status = Some(if error.is_parse_too_large() {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    } else {
        StatusCode::BAD_REQUEST
    });
    record.fail(Flag::DPE, "http1.codec_error", error);
    record.close();
}

async fn answer(
    cx: Arc<Downstream>,
    judge: Judge,
    version: Version,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let busy = judge.busy();
    let verdict = if version == Version::Http1 { judge.next() } else { Ok(()) };
    let response = super::serve(&cx, request, verdict, &judge).await;
    Ok(response.map(|body| body.keep_busy(busy)))
}

async fn serve_http1<S>(cx: &Arc<Downstream>, wire: Wire<S>, draining: Draining) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let judge = wire.judge();
    let service = service_fn(|request| answer(cx.clone(), judge.clone(), Version::Http1, request));
    let connection = http1::Builder::new()
        // `Wire` has the deadlines: hyper's would also run between requests.
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(limits::HEADER_BYTES)
        .max_header_size(limits::HEADER_BYTES)
        .max_headers(limits::HEADERS)
        .serve_connection(TokioIo::new(wire), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        ended = connection.as_mut() => return ended,
        () = draining.started() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

async fn serve_http2<S>(cx: &Arc<Downstream>, wire: Wire<S>, draining: Draining) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    enum Event {
        Ended(hyper::Result<()>),
        Drain,
        Look,
    }
    let judge = wire.judge();
    let idle = judge.clone();
    let service = service_fn(move |request| answer(cx.clone(), judge.clone(), Version::Http2, request));
    let connection = http2::Builder::new(Executor(cx.waypoint.tasks.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(limits::WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(limits::STREAMS)
        .max_header_list_size(limits::HEADER_BYTES as u32)
        .max_local_error_reset_streams(limits::RESETS)
        .max_send_buf_size(limits::WINDOW_BYTES as usize)
        .serve_connection(TokioIo::new(wire), service);
    let mut connection = pin!(connection);
    let (mut quiet_since, mut begun) = (Instant::now(), 0);
    let mut finishing = false;
    loop {
        let event = tokio::select! {
            biased;
            ended = connection.as_mut() => Event::Ended(ended),
            () = draining.started(), if !finishing => Event::Drain,
            () = tokio::time::sleep(limits::IDLE / 12), if !finishing => Event::Look,
        };
        match event {
            Event::Ended(ended) => return ended,
            Event::Look if idle.in_flight() > 0 || idle.begun() != begun => {
                (quiet_since, begun) = (Instant::now(), idle.begun());
            }
            Event::Look if quiet_since.elapsed() < limits::IDLE => {}
            Event::Drain | Event::Look => {
                finishing = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}
