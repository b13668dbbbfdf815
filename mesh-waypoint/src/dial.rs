//! The seam between HTTP and the mesh: how a byte stream to an endpoint comes to be.

pub mod hbone;

use std::{future::Future, net::SocketAddr, pin::Pin, sync::Arc};

use mesh_core::{
    flag::Flag,
    id::{Identity, ServiceKey},
    model::Workload,
};
use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream with half-close.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Any byte stream.
pub type BoxStream = Box<dyn Stream>;

/// A future that owns what it needs.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// One endpoint, chosen for one request or connection.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its address and target port.
    pub address: SocketAddr,
    /// The service that it was chosen for; `None` where the client dialled the workload itself.
    pub service: Option<ServiceKey>,
    /// Identities accepted beside its own.
    pub subject_alt_names: Vec<Identity>,
}

/// Why there is no stream.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct DialFailure {
    /// The mesh's code for it.
    pub flag: Flag,
    /// For the log.
    pub text: String,
}

/// Opens streams to endpoints on behalf of a client; it bounds its own time.
pub trait Dial: Send + Sync {
    /// Opens one stream; `client` is told to the endpoint's agent.
    fn dial(&self, to: &Endpoint, client: &Identity) -> BoxFuture<Result<BoxStream, DialFailure>>;
}
