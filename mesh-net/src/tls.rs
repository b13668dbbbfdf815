//! TLS of the mesh: 1.3 only, AES-GCM only, no resumption, no server name, ALPN `h2`, identity both ways.
//!
//! Configurations are built once per certificate (`identity::WorkloadCertificate` owns them) and are cheap to clone.

mod handshake;
mod stream;
pub mod verify;

use std::{io, sync::Arc};

use mesh_core::{flag::Flag, id::Identity};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    client::{Resumption, UnbufferedClientConnection},
    crypto::CryptoProvider,
    server::UnbufferedServerConnection,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};

pub use self::stream::TlsStream;
use self::{
    handshake::Handshaking,
    verify::{PeerRefused, VerifyClient, VerifyServer},
};
use crate::record;

const VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13];
const ALPN: &[u8] = b"h2";

/// Why a TLS handshake or a configuration failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// The peer's certificate is valid, but names nobody that we expect.
    #[error("{0}")]
    Peer(PeerRefused),
    /// The protocol or the chain of certificates failed.
    #[error("TLS failed")]
    Protocol(#[source] rustls::Error),
    /// The connection failed underneath.
    #[error("the connection failed during the TLS handshake")]
    Io(#[source] Arc<io::Error>),
    /// Certificate, key or roots that cannot be used.
    #[error("unusable certificate, key or roots")]
    Configuration(#[source] rustls::Error),
    /// The peer did not agree on HTTP/2.
    #[error("the peer did not choose ALPN h2")]
    Alpn,
}

impl TlsError {
    /// The stable code.
    pub fn flag(&self) -> Flag {
        match self {
            Self::Peer(_) => Flag::PeerIdentity,
            Self::Protocol(_) | Self::Io(_) | Self::Alpn => Flag::TlsFailure,
            Self::Configuration(_) => Flag::Internal,
        }
    }

    /// Sorts what rustls returned.
    fn of_rustls(error: rustls::Error) -> Self {
        match PeerRefused::of(&error) {
            Some(refused) => Self::Peer(refused.clone()),
            None => Self::Protocol(error),
        }
    }
}

/// Which of the mesh's suites a tunnel may use. ChaCha20 is left out on purpose (`wire-protocol.md` H1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ciphers {
    /// AES-128 first: 3–8 % more throughput, and either end is free to choose.
    #[default]
    Aes,
    /// AES-256 alone: an end that has it not is refused.
    Aes256,
}

/// The one crypto provider: aws-lc-rs cut down to the mesh's suites.
pub fn provider(ciphers: Ciphers) -> Arc<CryptoProvider> {
    use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
    let aes256 = cipher_suite::TLS13_AES_256_GCM_SHA384;
    let cipher_suites = match ciphers {
        Ciphers::Aes => vec![cipher_suite::TLS13_AES_128_GCM_SHA256, aes256],
        Ciphers::Aes256 => vec![aes256],
    };
    Arc::new(CryptoProvider { cipher_suites, ..default_provider() })
}

/// Certificates as a store of roots.
///
/// # Errors
/// None at all, or one that is no certificate.
pub fn root_store(roots: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(TlsError::Configuration)?;
    }
    if store.is_empty() {
        return Err(TlsError::Configuration(rustls::Error::General("no root certificate".into())));
    }
    Ok(Arc::new(store))
}

/// What either end of a tunnel is built of.
#[derive(Clone, Copy, Debug)]
pub struct Material<'a> {
    /// Its certificate, leaf first.
    pub chain: &'a [CertificateDer<'static>],
    /// The key of the leaf.
    pub key: &'a PrivateKeyDer<'static>,
    /// Whom it trusts.
    pub roots: &'a Arc<RootCertStore>,
    /// What it may use.
    pub ciphers: Ciphers,
}

/// A server that proves one workload and insists on clients of its trust domain.
#[derive(Clone, Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    identity: Identity,
}

impl ServerTls {
    /// Builds the configuration.
    ///
    /// # Errors
    /// Certificate, key or roots that cannot be used.
    pub fn new(identity: &Identity, of: Material<'_>) -> Result<Self, TlsError> {
        let provider = provider(of.ciphers);
        let verifier = VerifyClient::new(of.roots.clone(), &provider, identity.trust_domain.clone())?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Configuration)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(of.chain.to_vec(), of.key.clone_key())
            .map_err(TlsError::Configuration)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.enable_secret_extraction = true;
        Ok(Self { config: Arc::new(config), identity: identity.clone() })
    }

    /// Whom this server proves to be.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The server's side of a handshake; the peer's identity is proven. No deadline of its own: the caller has one.
    ///
    /// # Errors
    /// The handshake fails, or the peer is not of our trust domain.
    pub async fn accept<T>(&self, io: T) -> Result<(TlsStream<T>, Identity), TlsError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let connection = UnbufferedServerConnection::new(self.config.clone()).map_err(TlsError::of_rustls)?;
        establish(connection, io, |connection| (connection.peer_certificates(), connection.alpn_protocol()))
            .await
    }
}

/// A client that proves one workload; whom it expects is said per connection.
#[derive(Clone, Debug)]
pub struct ClientTls {
    base: Arc<ClientConfig>,
    roots: Arc<RootCertStore>,
}

impl ClientTls {
    /// Builds the configuration.
    ///
    /// # Errors
    /// Certificate or key that cannot be used.
    pub fn new(of: Material<'_>) -> Result<Self, TlsError> {
        let provider = provider(of.ciphers);
        let nobody = VerifyServer::new(of.roots.clone(), provider.clone(), Vec::new());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Configuration)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(nobody))
            .with_client_auth_cert(of.chain.to_vec(), of.key.clone_key())
            .map_err(TlsError::Configuration)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.enable_secret_extraction = true;
        Ok(Self { base: Arc::new(config), roots: of.roots.clone() })
    }

    /// The client's side of a handshake with one of `expect`; returns who it is. An empty list never succeeds. No
    /// deadline of its own: the caller has one.
    ///
    /// # Errors
    /// The handshake fails, or the peer is somebody else.
    pub async fn connect<T>(&self, io: T, expect: Vec<Identity>) -> Result<(TlsStream<T>, Identity), TlsError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        // Everything costly in the base is behind an Arc.
        let mut config = (*self.base).clone();
        let verifier = VerifyServer::new(self.roots.clone(), config.crypto_provider().clone(), expect);
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        // Never sent (no SNI) and never compared (identity is the URI); rustls wants some name.
        let name = ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into());
        let connection =
            UnbufferedClientConnection::new(Arc::new(config), name).map_err(TlsError::of_rustls)?;
        establish(connection, io, |connection| (connection.peer_certificates(), connection.alpn_protocol()))
            .await
    }
}

/// What rustls tells of the peer: its chain and the protocol that was agreed on.
type Agreed<'c> = (Option<&'c [CertificateDer<'static>]>, Option<&'c [u8]>);

async fn establish<C: Handshaking, T>(
    mut connection: C,
    mut io: T,
    agreed: impl Fn(&C) -> Agreed<'_>,
) -> Result<(TlsStream<T>, Identity), TlsError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let incoming = handshake::run(&mut connection, &mut io).await?;
    let (chain, alpn) = agreed(&connection);
    let peer = proven(chain)?;
    if alpn != Some(ALPN) {
        return Err(TlsError::Alpn);
    }
    let (keys, secrets) = connection.finish().map_err(TlsError::of_rustls)?;
    let (sealer, opener) = record::take_over(keys, secrets)
        .map_err(|error| TlsError::Protocol(rustls::Error::General(error.to_string())))?;
    Ok((TlsStream::new(io, sealer, opener, incoming), peer))
}

fn proven(chain: Option<&[CertificateDer<'_>]>) -> Result<Identity, TlsError> {
    let leaf =
        chain.and_then(<[_]>::first).ok_or(TlsError::Protocol(rustls::Error::NoCertificatesPresented))?;
    verify::identity_of(leaf).map_err(|error| TlsError::Peer(PeerRefused::NoIdentity(error)))
}

#[cfg(test)]
mod interop;
#[cfg(test)]
mod openssl;
#[cfg(test)]
mod tests;
