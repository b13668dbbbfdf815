//! Local endpoints: HTTP/1.1 over a Unix socket that only root and the process's own user may use.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::limits::{CONNECT, HOLD};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixStream},
};

use crate::{
    BoxFuture,
    drain::Draining,
    listen::{Accepting, accept_loop},
    task::TaskGroup,
};

pub mod public;

pub use http::Method;
pub use public::{Public, bind_tcp, serve_tcp};

/// Largest body that is accepted or returned by [`call`], bytes.
const BODY_BYTES: usize = 64 << 20;
/// How long [`ask`] waits.
const ASK: Duration = Duration::from_secs(30);
/// Largest body of a request, bytes.
const REQUEST_BYTES: usize = 1 << 20;

/// A request to a local endpoint.
#[derive(Clone, Debug)]
pub struct AdminRequest {
    /// The method.
    pub method: Method,
    /// Path without query, as it was sent.
    pub path: String,
    /// Query without `?`, may be empty.
    pub query: String,
    /// The body.
    pub body: Bytes,
}

impl AdminRequest {
    /// The value of `name` in the query; no percent-decoding, which these endpoints do not need.
    pub fn query_value(&self, name: &str) -> Option<&str> {
        self.query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }
}

/// An answer of a local endpoint.
#[derive(Clone, Debug)]
pub struct AdminResponse {
    /// The HTTP status.
    pub status: u16,
    /// The body's type.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
}

impl AdminResponse {
    /// `value` as JSON.
    pub fn json(status: u16, value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self { status, content_type: "application/json", body: body.into() },
            Err(error) => Self::text(500, format!("cannot be shown as JSON: {error}\n")),
        }
    }

    /// Text for people.
    pub fn text(status: u16, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: body.into().into() }
    }

    /// What Prometheus scrapes.
    pub fn metrics(body: String) -> Self {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        Self { status: 200, content_type, body: body.into() }
    }

    /// No such endpoint.
    pub fn not_found() -> Self {
        Self::text(404, "not found\n")
    }
}

/// What answers the requests of one socket.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request.
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse>;
}

impl<F, Fut> Handler for F
where
    F: Fn(AdminRequest) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = AdminResponse> + Send + 'static,
{
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse> {
        Box::pin(self(request))
    }
}

/// Why a local endpoint cannot be opened or asked.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Somebody answers on that path already.
    #[error("{0} is in use by a running process")]
    InUse(PathBuf),
    /// The socket cannot be made, reached or used.
    #[error("{path}: {doing}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The step.
        doing: &'static str,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The answer is no HTTP, or too long in coming.
    #[error("{path}: {reason}")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Binds a Unix socket of mode 0600 at `path`. A socket that a dead process left is replaced; a live one is not.
///
/// # Errors
/// The path is in use or cannot be bound.
pub fn bind(path: &Path) -> Result<UnixListener, AdminError> {
    let failed = |doing| move |source| AdminError::Io { path: path.to_owned(), doing, source };
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(AdminError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed("cannot remove the old socket"))?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("cannot bind"))?;
    // Between bind and chmod, peers are still checked by their credentials.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(failed("cannot set the mode to 0600"))?;
    Ok(listener)
}

/// Serves `handler` on `listener` until the drain is forced: these endpoints tell about a drain, too.
pub async fn serve(listener: UnixListener, draining: Draining, tasks: TaskGroup, handler: Arc<dyn Handler>) {
    let own_uid = own_uid();
    let (forced, ended) = crate::drain::channel();
    let cx = Accepting { name: "admin", draining: ended, tasks, reserve: None };
    let accepting = accept_loop(listener, cx, move |stream: UnixStream, _| {
        let handler = handler.clone();
        async move {
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == 0 || Some(peer.uid()) == own_uid => {
                    connection(stream, handler).await;
                }
                Ok(peer) => tracing::debug!(uid = peer.uid(), "refused on a local endpoint"),
                Err(error) => tracing::debug!(%error, "no credentials on a local endpoint"),
            }
        }
    });
    tokio::select! {
        () = accepting => {}
        () = draining.forced() => forced.start(),
    }
}

/// Owner of our own `/proc` entry: the effective user, without unsafe code.
fn own_uid() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").ok().map(|meta| meta.uid())
}

async fn connection<S>(stream: S, handler: Arc<dyn Handler>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let handler = handler.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(request, &*handler).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a local endpoint's connection failed");
    }
}

async fn answer(request: hyper::Request<Incoming>, handler: &dyn Handler) -> hyper::Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let body = tokio::time::timeout(HOLD, Limited::new(body, REQUEST_BYTES).collect()).await;
    let answer = match body {
        Ok(Ok(body)) => {
            let request = AdminRequest {
                method: head.method,
                path: head.uri.path().to_owned(),
                query: head.uri.query().unwrap_or_default().to_owned(),
                body: body.to_bytes(),
            };
            handler.handle(request).await
        }
        Ok(Err(_)) => AdminResponse::text(413, "the body is too large or broken\n"),
        Err(_) => AdminResponse::text(408, "the body did not come in time\n"),
    };
    let mut response = hyper::Response::new(Full::new(answer.body));
    *response.status_mut() =
        http::StatusCode::from_u16(answer.status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let content_type = http::HeaderValue::from_static(answer.content_type);
    response.headers_mut().insert(http::header::CONTENT_TYPE, content_type);
    response
}

/// Asks the endpoint at `path`; for the command line and tests. Gives up after `deadline`.
///
/// # Errors
/// Nobody listens, or the answer is broken or late.
pub async fn call(
    path: &Path,
    method: Method,
    uri: &str,
    body: impl Into<Bytes>,
    deadline: Duration,
) -> Result<(u16, Bytes), AdminError> {
    let body = body.into();
    tokio::time::timeout(deadline, exchange(path, method, uri, body)).await.unwrap_or_else(|_| {
        Err(AdminError::Answer { path: path.to_owned(), reason: format!("no answer within {deadline:?}") })
    })
}

/// For `ask PATH` of our programs: prints what the own endpoint answers to a GET; false when that is an error.
///
/// # Errors
/// Nobody listens, or the answer is broken or late.
pub async fn ask(socket: &Path, path: &str) -> Result<bool, AdminError> {
    use std::io::Write as _;
    let (status, body) = call(socket, Method::GET, path, Bytes::new(), ASK).await?;
    let written = std::io::stdout().write_all(&body);
    written.map_err(|source| AdminError::Io { path: socket.to_owned(), doing: "cannot print", source })?;
    Ok((200..300).contains(&status))
}

async fn exchange(path: &Path, method: Method, uri: &str, body: Bytes) -> Result<(u16, Bytes), AdminError> {
    let broken = |reason: String| AdminError::Answer { path: path.to_owned(), reason };
    let stream = UnixStream::connect(path).await.map_err(|source| AdminError::Io {
        path: path.to_owned(),
        doing: "cannot connect",
        source,
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| broken(error.to_string()))?;
    let request = hyper::Request::builder()
        .method(method)
        .uri(uri)
        .header(http::header::HOST, "localhost")
        .body(Full::new(body))
        .map_err(|error| broken(error.to_string()))?;
    let talk = async {
        let response = sender.send_request(request).await.map_err(|error| broken(error.to_string()))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), BODY_BYTES)
            .collect()
            .await
            .map_err(|error| broken(error.to_string()))?;
        Ok((status, body.to_bytes()))
    };
    let mut talk = std::pin::pin!(talk);
    tokio::select! {
        outcome = &mut talk => outcome,
        // The connection may end right after the last byte: what was read is still the answer.
        _ = connection => talk.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain;

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn asks_and_answers_over_a_private_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let listener = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(AdminError::InUse(_))));
        let (drain, draining) = drain::channel();
        let tasks = TaskGroup::new();
        let handler: Arc<dyn Handler> = Arc::new(|request: AdminRequest| async move {
            match (request.method.as_str(), request.path.as_str()) {
                ("POST", "/echo") => AdminResponse::text(
                    201,
                    format!(
                        "{} {}",
                        request.query_value("level").unwrap_or("?"),
                        request.body.escape_ascii()
                    ),
                ),
                _ => AdminResponse::not_found(),
            }
        });
        tasks.spawn(serve(listener, draining, TaskGroup::new(), handler));
        let (status, body) = call(&path, Method::POST, "/echo?a=1&level=debug", "hi", SOON).await.unwrap();
        assert_eq!((status, &body[..]), (201, &b"debug hi"[..]));
        assert_eq!(call(&path, Method::GET, "/", "", SOON).await.unwrap().0, 404);
        drain.force();
        tasks.idle().await;
        assert!(matches!(call(&path, Method::GET, "/", "", SOON).await, Err(AdminError::Io { .. })));
        bind(&path).expect("the socket of a dead process is replaced");
    }
}
