//! HTTP/1.1 as all four services need it: a server for one application, a client with one connection per call.

use std::{
    convert::Infallible, future::Future, io, net::Ipv6Addr, net::SocketAddr, sync::Arc, time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    select,
    task::JoinSet,
    time,
};

use crate::settings::Target;

/// A whole answer.
pub type Answer = Response<Full<Bytes>>;

/// Requests and answers of Bookinfo are small; more is a mistake.
const BODY_LIMIT_BYTES: usize = 256 * 1024;
/// A client that does not finish its request head is not waited for.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// Connections waiting to be accepted.
const BACKLOG: i32 = 1024;
/// Pause after a failed accept, so that a full table of descriptors is not a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An application: a whole request in, a whole answer out.
pub trait App: Send + Sync + 'static {
    /// Answers one request.
    fn answer(&self, request: Request<Bytes>) -> impl Future<Output = Answer> + Send;
}

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The time is over.
    #[error("no answer within {0:?}")]
    Deadline(Duration),
    /// The name did not resolve, or nobody accepted.
    #[error("connect to {host}:{port}")]
    Connect {
        /// Host.
        host: String,
        /// Port.
        port: u16,
        /// Cause.
        source: io::Error,
    },
    /// The connection broke or what came is not HTTP.
    #[error("HTTP exchange")]
    Exchange(#[source] hyper::Error),
    /// The answer is too long or broke off.
    #[error("read the answer: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
}

/// Listens on `[::]:port` for both families.
///
/// # Errors
/// When the port is taken.
pub fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves an application for as long as the future lives.
pub async fn serve<A: App>(listener: TcpListener, app: Arc<A>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, app.clone()));
            }
            Err(error) => {
                eprintln!("accept: {error}");
                time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<A: App>(stream: TcpStream, app: Arc<A>) {
    let service = service_fn(|request| {
        let app = app.clone();
        async move { Ok::<_, Infallible>(exchange(request, app.as_ref()).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        eprintln!("connection: {error}");
    }
}

async fn exchange<A: App>(request: Request<Incoming>, app: &A) -> Answer {
    let (head, body) = request.into_parts();
    let line = format!("{} {}", head.method, head.uri);
    let answer = match Limited::new(body, BODY_LIMIT_BYTES).collect().await {
        Ok(body) => app.answer(Request::from_parts(head, body.to_bytes())).await,
        Err(error) => json(StatusCode::BAD_REQUEST, &serde_json::json!({"error": error.to_string()})),
    };
    println!("{line} {}", answer.status().as_u16());
    answer
}

/// Calls a service over a connection of its own and waits for the whole answer.
///
/// # Errors
/// When there is no whole answer in time.
pub async fn call(
    to: &Target,
    request: Request<Full<Bytes>>,
    within: Duration,
) -> Result<Response<Bytes>, CallError> {
    time::timeout(within, call_unbounded(to, request)).await.unwrap_or(Err(CallError::Deadline(within)))
}

async fn call_unbounded(
    to: &Target,
    mut request: Request<Full<Bytes>>,
) -> Result<Response<Bytes>, CallError> {
    let stream = TcpStream::connect((to.host.as_str(), to.port))
        .await
        .map_err(|source| CallError::Connect { host: to.host.clone(), port: to.port, source })?;
    let headers = request.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    if !headers.contains_key(header::HOST)
        && let Ok(host) = HeaderValue::from_str(&authority(to))
    {
        headers.insert(header::HOST, host);
    }
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(CallError::Exchange)?;
    let answer = async move {
        let answer = sender.send_request(request).await.map_err(CallError::Exchange)?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, BODY_LIMIT_BYTES).collect().await.map_err(CallError::Body)?;
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    // The connection moves the bytes; its own error says less than the answer's.
    let (answer, _) = tokio::join!(answer, connection);
    answer
}

fn authority(to: &Target) -> String {
    match to.host.contains(':') {
        true => format!("[{}]:{}", to.host, to.port),
        false => format!("{}:{}", to.host, to.port),
    }
}

/// A JSON answer.
pub fn json(status: StatusCode, value: &serde_json::Value) -> Answer {
    answer(status, "application/json", value.to_string())
}

/// An HTML page.
pub fn html(text: String) -> Answer {
    answer(StatusCode::OK, "text/html; charset=utf-8", text)
}

/// Plain text.
pub fn text(status: StatusCode, text: impl Into<String>) -> Answer {
    answer(status, "text/plain; charset=utf-8", text.into())
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// What stands for a path that the service does not have.
pub fn not_found() -> Answer {
    json(StatusCode::NOT_FOUND, &serde_json::json!({"error": "not found"}))
}
