//! One request from head to trailers: check → route → endpoint → upstream → record.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use http::{
    HeaderValue, Method, Request, Response, StatusCode, header,
    uri::{Authority, PathAndQuery},
};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use mesh_core::{id::Identity, route::RequestHead};
use tokio::time::{Instant, Sleep, sleep_until};

pub mod body;
pub mod filters;
pub mod framing;
pub mod headers;
pub mod server;
pub mod upgrade;
pub mod upstream;
pub mod wire;

use body::{RequestBody, ResponseBody};
use framing::Malformed;
use headers::{BadHead, Ends};
use upstream::{SendError, Sent};
use wire::Judge;

use crate::{
    Waypoint,
    record::{Flag, Record, Seen},
    view::{Choice, Chosen, Redirected, Routed, Unroutable, View},
};

/// One downstream connection: a stream of a tunnel.
pub struct Downstream {
    /// The program.
    pub waypoint: Arc<Waypoint>,
    /// Who is at the other end, from its certificate.
    pub client: Identity,
    /// Its address.
    pub peer: SocketAddr,
    /// What it dialled: VIP and service port.
    pub authority: SocketAddr,
}

/// An answer of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Local {
    status: StatusCode,
    flag: Flag,
    details: &'static str,
    text: &'static str,
    /// The same to a call.
    grpc: u16,
    /// The connection is of no more use.
    close: bool,
}

const fn local(status: StatusCode, flag: Flag, details: &'static str, text: &'static str) -> Local {
    Local { status, flag, details, text, grpc: grpc_code(status), close: false }
}

const NOT_READY: Local =
    local(StatusCode::SERVICE_UNAVAILABLE, Flag::OM, "not_ready", "the waypoint has no configuration yet");
const NO_ROUTE: Local = local(StatusCode::NOT_FOUND, Flag::NR, "route_not_found", "");
/// To a call `UNAVAILABLE` (GRPCRoute, `backendRefs`).
const NO_BACKEND: Local = Local {
    grpc: 14,
    ..local(StatusCode::INTERNAL_SERVER_ERROR, Flag::NC, "no_valid_backend", "the route has no valid backend")
};
const BAD_REWRITE: Local =
    local(StatusCode::INTERNAL_SERVER_ERROR, Flag::NC, "invalid_rewrite", "the route's rewrite is not valid");
const NO_ENDPOINT: Local =
    local(StatusCode::SERVICE_UNAVAILABLE, Flag::UH, "no_healthy_upstream", "no healthy upstream");
const CONNECT_FAILED: Local = local(
    StatusCode::SERVICE_UNAVAILABLE,
    Flag::UF,
    "upstream_reset_before_response_started{connection_failure}",
    "upstream connect error or disconnect/reset before headers. reset reason: connection failure",
);
const CLOSED_EARLY: Local = local(
    StatusCode::SERVICE_UNAVAILABLE,
    Flag::UC,
    "upstream_reset_before_response_started{connection_termination}",
    "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
);
const BROKEN_UPSTREAM: Local =
    local(StatusCode::BAD_GATEWAY, Flag::UPE, "upstream_protocol_error", "upstream protocol error");
const TIMED_OUT: Local =
    local(StatusCode::GATEWAY_TIMEOUT, Flag::UT, "response_timeout", "upstream request timeout");
const CLIENT_BROKE: Local =
    Local { close: true, ..local(StatusCode::BAD_REQUEST, Flag::DPE, "downstream_reset", "") };

fn malformed(why: &Malformed) -> Local {
    let status = match why {
        Malformed::TooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        _ => StatusCode::BAD_REQUEST,
    };
    Local { close: true, ..local(status, Flag::DPE, "http1.codec_error", "malformed request") }
}

const BAD_HEAD: Local =
    Local { close: true, ..local(StatusCode::BAD_REQUEST, Flag::DPE, "bad_request", "malformed request") };

/// What a request asks for, once its head is known to be sound.
struct Asked {
    authority: Authority,
    target: PathAndQuery,
    upgrade: Option<HeaderValue>,
}

fn ask(request: &Request<Incoming>) -> Result<Asked, BadHead> {
    let upgrade = match request.version() {
        http::Version::HTTP_11 => headers::upgrade_of(request.headers()),
        _ => None,
    };
    Ok(Asked { authority: headers::authority(request)?, target: headers::target(request)?, upgrade })
}

fn seen(request: &Request<Incoming>) -> Seen {
    let header = |name: &str| {
        let value = request.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
        value.map(std::borrow::Cow::into_owned).unwrap_or_default()
    };
    Seen {
        method: request.method().to_string(),
        path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
        protocol: match request.version() {
            http::Version::HTTP_2 => "HTTP/2",
            http::Version::HTTP_10 => "HTTP/1.0",
            _ => "HTTP/1.1",
        },
        authority: request.uri().authority().map_or_else(|| header("host"), ToString::to_string),
        user_agent: header("user-agent"),
        request_id: header("x-request-id"),
        forwarded_for: header("x-forwarded-for"),
        grpc: header("content-type").starts_with("application/grpc"),
    }
}

/// Serves one request; whatever happens, there is a response and one record.
pub async fn serve(
    cx: &Downstream,
    request: Request<Incoming>,
    verdict: Result<(), Malformed>,
    judge: &Judge,
) -> Response<ResponseBody> {
    let mut record = Record::open(&cx.waypoint.metrics, &cx.client, cx.peer, cx.authority);
    record.seen = seen(&request);
    let http2 = request.version() == http::Version::HTTP_2;
    let asked = match verdict.map_err(|why| (malformed(&why), why.to_string())) {
        Ok(()) => ask(&request).map_err(|why| (BAD_HEAD, why.to_string())),
        Err(refused) => Err(refused),
    };
    let outcome = match asked {
        Ok(asked) => exchange(cx, request, asked, &mut record).await,
        Err((refused, why)) => Err((refused, why)),
    };
    match outcome {
        Ok(Outcome::Exchanged(exchanged)) => respond(cx, *exchanged, record, judge, http2),
        Ok(Outcome::Redirect(to)) => match filters::redirect::answer(&to, &mut record) {
            Ok(head) => head.map(|()| ResponseBody::local("", record)),
            Err(why) => reply(BAD_REWRITE, &why.to_string(), record, http2),
        },
        Err((answer, why)) => reply(answer, &why, record, http2),
    }
}

/// What came of a request that was understood.
enum Outcome {
    Exchanged(Box<Exchanged>),
    Redirect(Box<Redirected>),
}

/// A response head from upstream and what goes on from there.
struct Exchanged {
    sent: Sent,
    /// The rule whose changes the response gets.
    routed: Option<Routed>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Both ends of an upgrade, when the client asked for one.
    downstream: Option<OnUpgrade>,
}

/// When the exchange must be over, and for the try.
fn deadline(started: Instant, choice: &Choice) -> Option<Instant> {
    let limit = |timeout: Option<std::time::Duration>, from: Instant| {
        timeout.filter(|timeout| !timeout.is_zero()).and_then(|timeout| from.checked_add(timeout))
    };
    let whole = limit(choice.request_timeout, started);
    let one_try = limit(choice.backend_timeout, Instant::now());
    whole.into_iter().chain(one_try).min()
}

async fn exchange(
    cx: &Downstream,
    mut request: Request<Incoming>,
    asked: Asked,
    record: &mut Record,
) -> Result<Outcome, (Local, String)> {
    let started = Instant::now();
    // One view for the whole request: no request sees a half-changed table.
    let view = cx.waypoint.view();
    let choice = match choose(cx, &view, &request, &asked, record)? {
        Chosen::Upstream(choice) => choice,
        Chosen::Redirect(to) => return Ok(Outcome::Redirect(to)),
    };
    let deadline = deadline(started, &choice);
    let downstream = asked.upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
    let client_failed = Arc::new(AtomicBool::new(false));
    let asked = rewritten(asked, choice.routed.as_ref())?;
    let outgoing = prepare(cx, request, &asked, &choice, record, &client_failed)
        .map_err(|why| (BAD_HEAD, why.to_string()))?;
    let sending = cx.waypoint.upstream.send(&choice.endpoint, &cx.client, outgoing);
    let sent = match deadline {
        Some(at) => match tokio::time::timeout_at(at, sending).await {
            Ok(sent) => sent,
            Err(_late) => return Err((TIMED_OUT, String::new())),
        },
        None => sending.await,
    };
    let sent = sent.map_err(|error| (failed(&error, client_failed.load(Relaxed)), error.to_string()))?;
    let deadline = deadline.map(|at| Box::pin(sleep_until(at)));
    Ok(Outcome::Exchanged(Box::new(Exchanged { sent, routed: choice.routed, deadline, downstream })))
}

/// The request as its rule wants it to be addressed.
fn rewritten(asked: Asked, routed: Option<&Routed>) -> Result<Asked, (Local, String)> {
    let Some((change, matched)) = routed.and_then(Routed::rewrite) else { return Ok(asked) };
    let (authority, target) = filters::rewrite::apply(change, matched, &asked.authority, &asked.target)
        .ok_or_else(|| (BAD_REWRITE, format!("{change:?} of {}", asked.target)))?;
    Ok(Asked { authority, target, ..asked })
}

/// Route and endpoint, noted in the record as far as it comes.
fn choose(
    cx: &Downstream,
    view: &View,
    request: &Request<Incoming>,
    asked: &Asked,
    record: &mut Record,
) -> Result<Chosen, (Local, String)> {
    record.subject.source = view.client(&cx.client, cx.peer.ip());
    let head = RequestHead {
        host: asked.authority.host(),
        path: asked.target.path(),
        query: asked.target.query(),
        method: request.method().as_str(),
        client: &cx.client.namespace,
        headers: &|name| {
            request.headers().get(name).and_then(|value| std::str::from_utf8(value.as_bytes()).ok())
        },
    };
    let chosen = view.choose(cx.authority, &head, &cx.waypoint.chance, record);
    chosen.map_err(|why| {
        let answer = match &why {
            Unroutable::NotReady => NOT_READY,
            Unroutable::NoListener | Unroutable::NoRoute => NO_ROUTE,
            Unroutable::NoBackend(_) => NO_BACKEND,
            Unroutable::NoEndpoint(_) => NO_ENDPOINT,
        };
        (answer, why.to_string())
    })
}

/// Makes the request as the upstream gets it.
fn prepare(
    cx: &Downstream,
    mut request: Request<Incoming>,
    asked: &Asked,
    choice: &Choice,
    record: &mut Record,
    client_failed: &Arc<AtomicBool>,
) -> Result<Request<RequestBody>, BadHead> {
    // An upgrade is of HTTP/1.1.
    let http2 = request.version() == http::Version::HTTP_2 || (choice.http2 && asked.upgrade.is_none());
    let ends = Ends { client: &cx.client, own: &cx.waypoint.own };
    headers::towards_upstream(request.headers_mut(), asked.upgrade.as_ref(), http2, &ends, || {
        cx.waypoint.request_id()
    });
    if record.seen.request_id.is_empty() {
        let id = request.headers().get(headers::REQUEST_ID).and_then(|id| id.to_str().ok());
        record.seen.request_id = id.unwrap_or_default().to_owned();
    }
    for filters in choice.routed.iter().flat_map(Routed::filters) {
        filters.request.apply(request.headers_mut());
    }
    headers::address_request(&mut request, &asked.authority, asked.target.clone(), http2)?;
    let counters = record.counters.clone();
    // Not even extensions travel: they hold what hyper knows of the downstream connection.
    request.extensions_mut().clear();
    Ok(request.map(|body| RequestBody::new(body, counters, client_failed.clone())))
}

fn failed(error: &SendError, client_failed: bool) -> Local {
    match error {
        _ if client_failed => CLIENT_BROKE,
        SendError::Dial(_) => CONNECT_FAILED,
        SendError::Exchange(error) if error.is_parse() || error.is_parse_too_large() => BROKEN_UPSTREAM,
        SendError::Exchange(_) => CLOSED_EARLY,
    }
}

fn respond(
    cx: &Downstream,
    exchanged: Exchanged,
    mut record: Record,
    judge: &Judge,
    http2: bool,
) -> Response<ResponseBody> {
    let Exchanged { sent: Sent { mut response, lease }, routed, deadline, downstream } = exchanged;
    record.responded = Some(std::time::Instant::now());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(downstream) = downstream else {
            return reply(BROKEN_UPSTREAM, "switched protocols without being asked", record, http2);
        };
        return upgrade::switch(cx, response, downstream, record, judge);
    }
    headers::strip_hop_by_hop(response.headers_mut());
    for filters in routed.iter().flat_map(Routed::filters) {
        filters.response.apply(response.headers_mut());
    }
    response.extensions_mut().clear();
    *response.version_mut() = if http2 { http::Version::HTTP_2 } else { http::Version::HTTP_11 };
    record.answered(response.status(), response.headers());
    response.map(|body| ResponseBody::upstream(body, record, deadline, lease))
}

/// The gRPC status that stands for an HTTP status of ours, as Envoy maps them.
const fn grpc_code(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 | 431 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

fn reply(answer: Local, why: &str, mut record: Record, http2: bool) -> Response<ResponseBody> {
    record.fail(answer.flag, answer.details, why);
    let mut response = Response::new(());
    if record.seen.grpc {
        record.grpc_status = Some(answer.grpc);
        record.status = Some(StatusCode::OK);
        let fields = response.headers_mut();
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        fields.insert("grpc-status", HeaderValue::from(answer.grpc));
        fields.insert("grpc-message", HeaderValue::from_static(answer.text));
    } else {
        record.status = Some(answer.status);
        *response.status_mut() = answer.status;
        if !answer.text.is_empty() {
            let plain = HeaderValue::from_static("text/plain");
            response.headers_mut().insert(header::CONTENT_TYPE, plain);
        }
    }
    if answer.close && !http2 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let head = record.seen.method == Method::HEAD.as_str();
    let text = if record.seen.grpc || head { "" } else { answer.text };
    response.map(|()| ResponseBody::local(text, record))
}
