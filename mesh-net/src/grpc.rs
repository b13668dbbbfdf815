//! gRPC between proxies and control plane, over TLS that we set up ourselves: 1.3 only, roots from a file that is read
//! again at each connect, the bearer token from a file that is read again for each request.

mod endpoint;

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_core::limits::TLS_HANDSHAKE;
use rustls::{ClientConfig, ServerConfig, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{
        self, Channel,
        server::{Connected, Router},
    },
};

pub use self::endpoint::{Endpoint, NotAnEndpoint};
use crate::{
    drain::Draining,
    listen::{Accepting, Reserve, accept_loop},
    task::TaskGroup,
    tls,
    tunnel::{Connector, DirectConnector, Handshakes},
};

/// TCP connect to one address of the control plane (`wire-protocol.md` X3); a name gets as long to be resolved, and a
/// second address its turn.
const CONNECT: Duration = Duration::from_secs(5);
/// HTTP/2 PING to the control plane (`wire-protocol.md` X3).
const PING: Duration = Duration::from_secs(30);
/// Without an answer to a PING the connection is lost (`wire-protocol.md` X3).
const PING_ANSWER: Duration = Duration::from_secs(10);
/// Connections that are through TLS and wait to be taken by the server.
const ACCEPTED: usize = 64;

/// Where PEM text comes from.
#[derive(Clone, Debug)]
pub enum PemSource {
    /// Read again for each use, so that it may be rotated.
    File(PathBuf),
    /// Literal.
    Text(String),
}

impl PemSource {
    /// The text as it is now.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self) -> io::Result<String> {
        match self {
            // Small local files: not worth a trip to the blocking pool.
            Self::File(path) => std::fs::read_to_string(path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
            Self::Text(text) => Ok(text.clone()),
        }
    }
}

/// How to reach and trust the control plane.
#[derive(Clone)]
pub struct ChannelConfig {
    /// Where it is.
    pub addr: Endpoint,
    /// Roots that its certificate must lead to.
    pub roots: PemSource,
    /// The name that its certificate must have; none: the host of its address.
    pub server_name: Option<String>,
    /// Bearer token of the caller.
    pub token: Option<PemSource>,
    /// Value of the header `clusterid`.
    pub cluster: String,
    /// Makes the TCP connection; none: ordinarily.
    pub connector: Option<Arc<dyn Connector>>,
}

impl ChannelConfig {
    /// The usual: roots and token in files, name checked against the address.
    pub fn new(addr: impl Into<Endpoint>, roots: PathBuf, token: Option<PathBuf>) -> Self {
        Self {
            addr: addr.into(),
            roots: PemSource::File(roots),
            server_name: None,
            token: token.map(PemSource::File),
            cluster: "Kubernetes".to_owned(),
            connector: None,
        }
    }
}

/// What is wrong with the configuration of a channel or server.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// A name or address that cannot be used.
    #[error("{0}")]
    Name(String),
    /// Certificate, key or roots that cannot be used.
    #[error("unusable certificate, key or roots")]
    Tls(#[source] rustls::Error),
    /// A PEM text without what it should hold.
    #[error("PEM: {0}")]
    Pem(String),
}

/// A channel whose requests carry the caller's token.
pub type AuthorizedChannel = InterceptedService<Channel, Authorize>;

/// A channel to the control plane. Connects when it is first used, and again whenever the connection is lost.
///
/// # Errors
/// A server name that is none.
pub fn channel(config: &ChannelConfig) -> Result<AuthorizedChannel, GrpcError> {
    let name = match &config.server_name {
        Some(name) => ServerName::try_from(name.clone())
            .map_err(|_| GrpcError::Name(format!("{name:?} is not a server name")))?,
        None => config.addr.server_name().map_err(|error| GrpcError::Name(error.to_string()))?,
    };
    let uri = format!("http://{}", config.addr);
    let endpoint = transport::Endpoint::from_shared(uri)
        .map_err(|error| GrpcError::Name(error.to_string()))?
        .connect_timeout(CONNECT * 3 + TLS_HANDSHAKE)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING_ANSWER)
        .keep_alive_while_idle(true);
    let dialer = Arc::new(Dialer {
        addr: config.addr.clone(),
        roots: config.roots.clone(),
        name,
        connector: config.connector.clone().unwrap_or_else(|| Arc::new(DirectConnector)),
    });
    let connector = tower::service_fn(move |_: http::Uri| {
        let dialer = dialer.clone();
        async move { dialer.dial().await.map(TokioIo::new) }
    });
    let channel = endpoint.connect_with_connector_lazy(connector);
    let cluster = AsciiMetadataValue::try_from(config.cluster.as_str())
        .map_err(|_| GrpcError::Name(format!("{:?} is not a cluster id", config.cluster)))?;
    Ok(InterceptedService::new(channel, Authorize { token: config.token.clone(), cluster }))
}

struct Dialer {
    addr: Endpoint,
    roots: PemSource,
    name: ServerName<'static>,
    connector: Arc<dyn Connector>,
}

impl Dialer {
    async fn dial(&self) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let config = Arc::new(client_config(&self.roots.read()?).map_err(io::Error::other)?);
        let tcp = self.addr.connect(&*self.connector, CONNECT).await?;
        let handshake = tokio_rustls::TlsConnector::from(config).connect(self.name.clone(), tcp);
        tokio::time::timeout(TLS_HANDSHAKE, handshake)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "TLS handshake deadline"))?
    }
}

fn client_config(roots: &str) -> Result<ClientConfig, GrpcError> {
    let store = tls::root_store(&certificates(roots)?).map_err(|error| GrpcError::Pem(error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(tls::provider(tls::Ciphers::Aes))
        .with_protocol_versions(&[&TLS13])
        .map_err(GrpcError::Tls)?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// The certificates of a PEM text.
///
/// # Errors
/// A block that cannot be read, or none.
pub fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, GrpcError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(GrpcError::Pem("no certificate".to_owned())),
        Err(error) => Err(GrpcError::Pem(error.to_string())),
    }
}

/// Adds the caller's token to each request.
#[derive(Clone)]
pub struct Authorize {
    token: Option<PemSource>,
    cluster: AsciiMetadataValue,
}

impl Interceptor for Authorize {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("clusterid", self.cluster.clone());
        if let Some(source) = &self.token {
            let token =
                source.read().map_err(|error| Status::unauthenticated(format!("own token: {error}")))?;
            let value = format!("Bearer {}", token.trim());
            let mut value = AsciiMetadataValue::try_from(value)
                .map_err(|_| Status::unauthenticated("own token: not a header value"))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

/// TLS of a gRPC server: no client certificate, callers prove themselves by token.
#[derive(Clone)]
pub struct GrpcTls(Arc<ServerConfig>);

impl GrpcTls {
    /// Builds the configuration.
    ///
    /// # Errors
    /// Certificate or key that cannot be used.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, GrpcError> {
        let mut config = ServerConfig::builder_with_provider(tls::provider(tls::Ciphers::Aes))
            .with_protocol_versions(&[&TLS13])
            .map_err(GrpcError::Tls)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(GrpcError::Tls)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    /// From PEM texts.
    ///
    /// # Errors
    /// Certificate or key that cannot be used.
    pub fn from_pem(chain: &str, key: &str) -> Result<Self, GrpcError> {
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|error| GrpcError::Pem(error.to_string()))?;
        Self::new(certificates(chain)?, key)
    }
}

/// Who called: in the extensions of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// The caller's address.
    pub addr: SocketAddr,
}

/// A connection that is through TLS.
pub struct ServerStream {
    io: tokio_rustls::server::TlsStream<TcpStream>,
    peer: PeerInfo,
}

impl Connected for ServerStream {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer
    }
}

impl AsyncRead for ServerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Serves `router` on `listener`. At the first step of the drain nothing new is accepted and streams are told to end;
/// at the second they are dropped.
///
/// # Errors
/// The server failed.
pub async fn serve(
    listener: TcpListener,
    tls: GrpcTls,
    router: Router,
    draining: Draining,
    tasks: TaskGroup,
) -> Result<(), tonic::transport::Error> {
    let (sender, receiver) = mpsc::channel::<io::Result<ServerStream>>(ACCEPTED);
    let acceptor = tokio_rustls::TlsAcceptor::from(tls.0);
    let handshakes = Handshakes::default();
    let cx = Accepting {
        name: "grpc",
        draining: draining.clone(),
        tasks: tasks.clone(),
        reserve: Reserve::new().ok(),
    };
    tasks.spawn(accept_loop(listener, cx, move |tcp: TcpStream, addr| {
        let (acceptor, sender, slot) = (acceptor.clone(), sender.clone(), handshakes.begin(addr.ip()));
        async move {
            let Some(_slot) = slot else { return };
            if crate::socket::tune(&tcp).is_err() {
                return;
            }
            match tokio::time::timeout(TLS_HANDSHAKE, acceptor.accept(tcp)).await {
                Ok(Ok(io)) => {
                    let stream = ServerStream { io, peer: PeerInfo { addr } };
                    // The server is gone when this fails: so is the connection.
                    let _ = sender.send(Ok(stream)).await;
                }
                Ok(Err(error)) => tracing::debug!(peer = %addr, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(peer = %addr, "TLS handshake deadline"),
            }
        }
    }));
    let started = draining.clone();
    let served = router
        .serve_with_incoming_shutdown(ReceiverStream::new(receiver), async move { started.started().await });
    tokio::select! {
        outcome = served => outcome,
        () = draining.forced() => Ok(()),
    }
}
