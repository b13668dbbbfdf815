//! A gRPC server and client for pods: HTTP/2 with prior knowledge, `grpc-status` in trailers. What a call carries is
//! text, not protobuf: a proxy does not look inside.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::{
    netns,
    peer::{Behaviour, PEER_DEADLINE, dial},
    world::Pod,
};

/// A server that answers every call with `name` and the header fields that it got, and status 0.
pub fn grpc_echo(name: &str) -> Behaviour {
    let name = name.to_owned();
    serving(move |request| {
        let mut text = format!("{name} {}\n", request.uri().path());
        for (key, value) in request.headers() {
            text.push_str(&format!("{key}: {}\n", String::from_utf8_lossy(value.as_bytes())));
        }
        Bytes::from(text)
    })
}

/// A server of `grpc.health.v1` that is always healthy: `HealthCheckResponse { status: SERVING }` in its frame.
pub fn grpc_health() -> Behaviour {
    serving(|_| Bytes::from_static(b"\0\0\0\0\x02\x08\x01"))
}

fn serving(message: impl Fn(&Request<Incoming>) -> Bytes + Send + Sync + 'static) -> Behaviour {
    let message: Arc<Message> = Arc::new(message);
    Arc::new(move |stream, _| {
        let _ = serve(&message, stream);
    })
}

/// What a call is answered with.
type Message = dyn Fn(&Request<Incoming>) -> Bytes + Send + Sync;

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn serve(message: &Arc<Message>, stream: std::net::TcpStream) -> anyhow::Result<()> {
    stream.set_nonblocking(true)?;
    runtime()?.block_on(async {
        let io = TokioIo::new(tokio::net::TcpStream::from_std(stream)?);
        let service = service_fn(|request| answer(message.clone(), request));
        // A client that does not speak HTTP/2 is refused by the library: nothing else is spoken here.
        hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await?;
        Ok(())
    })
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

async fn answer(message: Arc<Message>, request: Request<Incoming>) -> Result<Response<Body>, hyper::Error> {
    let message = message(&request);
    let _body = request.into_body().collect().await?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok(Frame::data(message)), Ok(Frame::trailers(trailers))];
    let body = StreamBody::new(futures_util::stream::iter(frames)).boxed();
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// What [`call`] does.
#[derive(Debug)]
pub struct Calls<'a> {
    /// The authority.
    pub authority: &'a str,
    /// `/service/method`.
    pub method: &'a str,
    /// How often, one after the other.
    pub count: usize,
    /// Metadata.
    pub headers: &'a [(&'a str, &'a str)],
}

/// What came back of one call.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub http: u16,
    /// `grpc-status`, from trailers or head.
    pub status: Option<u16>,
    /// The message.
    pub body: String,
}

/// Calls from inside `pod`, all on one connection.
///
/// # Errors
/// When the connection fails or takes longer than the deadline of a peer.
pub fn call(pod: &Pod, to: SocketAddr, calls: &Calls<'_>) -> anyhow::Result<Vec<Answer>> {
    let stream = dial(pod, to)?;
    stream.set_nonblocking(true)?;
    netns::within(&pod.netns, || {
        runtime()?.block_on(async {
            let deadline: Duration = PEER_DEADLINE * 2;
            tokio::time::timeout(deadline, exchange(stream, calls))
                .await
                .context("the calls took too long")?
        })
    })
}

async fn exchange(stream: std::net::TcpStream, calls: &Calls<'_>) -> anyhow::Result<Vec<Answer>> {
    let Calls { authority, method, count, headers } = calls;
    let io = TokioIo::new(tokio::net::TcpStream::from_std(stream)?);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
    // Ends with the runtime.
    let mut driver = tokio::task::JoinSet::new();
    driver.spawn(connection);
    let mut answers = Vec::with_capacity(*count);
    for _ in 0..*count {
        let mut request = Request::post(format!("http://{authority}{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in *headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from_static(b"\0\0\0\0\0")))?;
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        let (parts, body) = response.into_parts();
        let collected = body.collect().await?;
        let of = |fields: &HeaderMap| fields.get("grpc-status")?.to_str().ok()?.parse().ok();
        answers.push(Answer {
            http: parts.status.as_u16(),
            status: collected.trailers().and_then(of).or_else(|| of(&parts.headers)),
            body: String::from_utf8_lossy(&collected.to_bytes()).into_owned(),
        });
    }
    Ok(answers)
}
