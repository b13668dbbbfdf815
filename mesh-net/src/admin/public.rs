//! Readiness and metrics over TCP, where the kubelet and Prometheus ask; nothing else is told there.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use super::{AdminError, AdminRequest, AdminResponse, Handler, Method, connection};
use crate::{
    BoxFuture,
    drain::Draining,
    listen::{Accepting, accept_loop},
    task::TaskGroup,
};

/// Connections at a time: whoever reaches the port must not be able to hold more of our descriptors.
const CONNECTIONS: usize = 64;

/// The one thing that a port tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Public {
    /// `GET /healthz/ready`.
    Ready,
    /// `GET /metrics`.
    Metrics,
}

impl Public {
    fn path(self) -> &'static str {
        match self {
            Self::Ready => "/healthz/ready",
            Self::Metrics => "/metrics",
        }
    }
}

/// Binds `at`; the v6 wildcard takes both families, and where there is no v6 it means the v4 one.
///
/// # Errors
/// The address cannot be bound.
pub fn bind_tcp(at: SocketAddr) -> Result<TcpListener, AdminError> {
    let failed =
        |source| AdminError::Io { path: PathBuf::from(at.to_string()), doing: "cannot bind", source };
    let bound = match std::net::TcpListener::bind(at) {
        // EAFNOSUPPORT, EADDRNOTAVAIL.
        Err(error)
            if at.is_ipv6() && at.ip().is_unspecified() && matches!(error.raw_os_error(), Some(97 | 99)) =>
        {
            std::net::TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], at.port())))
        }
        bound => bound,
    };
    let listener = bound.map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    TcpListener::from_std(listener).map_err(failed)
}

/// Serves the one path of `what` from `handler` until the drain is forced.
pub async fn serve_tcp(
    listener: TcpListener,
    what: Public,
    draining: Draining,
    tasks: TaskGroup,
    handler: Arc<dyn Handler>,
) {
    let only: Arc<dyn Handler> = Arc::new(Only { what, handler });
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let (forced, ended) = crate::drain::channel();
    let cx = Accepting { name: "public", draining: ended, tasks, reserve: None };
    let accepting = accept_loop(listener, cx, move |stream: TcpStream, _| {
        let (only, place) = (only.clone(), places.clone().try_acquire_owned());
        async move {
            // Without a place the connection is closed at once.
            if let Ok(_place) = place {
                connection(stream, only).await;
            }
        }
    });
    tokio::select! {
        () = accepting => {}
        () = draining.forced() => forced.start(),
    }
}

/// A handler of which one path is seen.
struct Only {
    what: Public,
    handler: Arc<dyn Handler>,
}

impl Handler for Only {
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse> {
        if request.method == Method::GET && request.path == self.what.path() {
            return self.handler.handle(request);
        }
        Box::pin(std::future::ready(AdminResponse::not_found()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::drain;

    fn get(at: SocketAddr, line: &str) -> String {
        let mut stream = std::net::TcpStream::connect(at).unwrap();
        stream
            .write_all(format!("{line} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes())
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_path_is_told_and_no_other() {
        let handler: Arc<dyn Handler> = Arc::new(|request: AdminRequest| async move {
            AdminResponse::text(200, format!("told {} {}", request.method, request.path))
        });
        let (drain, draining) = drain::channel();
        let tasks = TaskGroup::new();
        let listener = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let at = listener.local_addr().unwrap();
        tasks.spawn(serve_tcp(listener, Public::Ready, draining, TaskGroup::new(), handler));
        let told = tokio::task::spawn_blocking(move || {
            ["GET /healthz/ready", "GET /metrics", "POST /healthz/ready", "GET /config_dump", "POST /drain"]
                .map(|line| get(at, line))
        })
        .await
        .unwrap();
        assert!(told[0].ends_with("told GET /healthz/ready"), "{}", told[0]);
        for other in &told[1..] {
            assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
        }
        drain.force();
        tasks.idle().await;
        assert!(std::net::TcpStream::connect(at).is_err());
    }
}
