//! The gRPC side: delta ADS and the certificate authority, both behind a bearer token.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use mesh_core::proto::{
    ca::{CREATE_CERTIFICATE_PATH, IstioCertificateRequest, IstioCertificateResponse},
    discovery::{DELTA_PATH, DeltaDiscoveryRequest, DeltaDiscoveryResponse},
};
use mesh_net::{grpc::PeerInfo, task::TaskGroup};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codegen::{BoxFuture, Context, Poll, Service},
    metadata::MetadataMap,
    server::{Grpc, NamedService, StreamingService, UnaryService},
};
use tonic_prost::ProstCodec;

use crate::{
    ca::{Authority, CaError},
    credentials::{Callers, Principal, Unauthenticated},
    publish::Published,
};

pub mod proxies;
pub mod replicas;
mod stream;

use proxies::Proxies;

/// Largest request: the names and versions that a reconnecting proxy holds, 100 bytes each.
const MAX_REQUEST_BYTES: usize = 32 << 20;

/// What both services share.
pub struct Server {
    /// What is published.
    pub published: watch::Receiver<Arc<Published>>,
    /// Who may call.
    pub credentials: Arc<Callers>,
    /// Signs certificates.
    pub authority: Arc<Authority>,
    /// Trust domain of every identity.
    pub trust_domain: Arc<str>,
    /// What each proxy has.
    pub proxies: Arc<Proxies>,
    /// Parent of the streams.
    pub tasks: TaskGroup,
}

impl Server {
    async fn caller(&self, token: Option<&str>) -> Result<Principal, Status> {
        self.credentials.authenticate(token, Instant::now()).await.map_err(|error| {
            self.proxies.count_refused();
            tracing::debug!(%error, "caller refused");
            match error {
                Unauthenticated::Unavailable(reason) => {
                    tracing::warn!(reason, "tokens cannot be reviewed");
                    Status::unavailable("tokens cannot be reviewed now")
                }
                // Opaque: who is refused learns nothing about why.
                _ => Status::unauthenticated("authentication failed"),
            }
        })
    }

    /// Whether the caller of an open feed may go on; one that cannot be asked about may.
    async fn still(&self, token: &str, caller: &Principal) -> bool {
        match self.credentials.authenticate(Some(token), Instant::now()).await {
            Ok(now) => now == *caller,
            Err(Unauthenticated::Unavailable(_)) => true,
            Err(_) => false,
        }
    }

    async fn open(
        self: Arc<Self>,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<ReceiverStream<Result<DeltaDiscoveryResponse, Status>>>, Status> {
        let token = bearer(request.metadata()).unwrap_or_default().to_owned();
        let caller = self.caller(Some(&token)).await?;
        let peer = request.extensions().get::<PeerInfo>().map(|peer| peer.addr);
        tracing::info!(proxy = %caller, ?peer, "feed opened");
        Ok(Response::new(stream::open(&self, caller, token, request.into_inner())))
    }

    async fn create(
        &self,
        request: &Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let caller = self.caller(bearer(request.metadata())).await?;
        let world = self.published.borrow().world.clone();
        let now = (SystemTime::now(), Instant::now());
        match self.authority.create(&world, &self.trust_domain, &caller, request.get_ref(), now) {
            Ok(response) => {
                self.proxies.count_certificate(true);
                Ok(Response::new(response))
            }
            Err(error) => {
                self.proxies.count_certificate(false);
                // A caller can cause this at its own rate, so it is no warning; the counter is what alarms.
                let why = std::error::Error::source(&error).map(ToString::to_string);
                tracing::info!(%caller, %error, why, "certificate refused");
                Err(match error {
                    CaError::Refused(_) => Status::unauthenticated("request authenticate failure"),
                    CaError::Unsignable(reason) => Status::invalid_argument(reason.to_string()),
                    CaError::TooMany => Status::resource_exhausted("too many requests"),
                })
            }
        }
    }
}

fn bearer(metadata: &MetadataMap) -> Option<&str> {
    metadata.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ")
}

/// The discovery service.
#[derive(Clone)]
pub struct Discovery(pub Arc<Server>);

/// The certificate service.
#[derive(Clone)]
pub struct Certificates(pub Arc<Server>);

impl NamedService for Discovery {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl NamedService for Certificates {
    const NAME: &'static str = "istio.v1.auth.IstioCertificateService";
}

impl StreamingService<DeltaDiscoveryRequest> for Discovery {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let server = self.0.clone();
        Box::pin(async move { server.open(request).await })
    }
}

impl UnaryService<IstioCertificateRequest> for Certificates {
    type Response = IstioCertificateResponse;
    type Future = BoxFuture<Response<IstioCertificateResponse>, Status>;

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        let server = self.0.clone();
        Box::pin(async move { server.create(&request).await })
    }
}

impl Service<http::Request<Body>> for Discovery {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            if request.uri().path() != DELTA_PATH {
                return Ok(Status::unimplemented("only the delta stream is served").into_http());
            }
            let codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
            let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(MAX_REQUEST_BYTES), None);
            Ok(grpc.streaming(this, request).await)
        })
    }
}

impl Service<http::Request<Body>> for Certificates {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            if request.uri().path() != CREATE_CERTIFICATE_PATH {
                return Ok(Status::unimplemented("no such call").into_http());
            }
            let codec = ProstCodec::<IstioCertificateResponse, IstioCertificateRequest>::default();
            let limit = crate::ca::sign::MAX_REQUEST_BYTES * 2;
            let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(limit), None);
            Ok(grpc.unary(this, request).await)
        })
    }
}
