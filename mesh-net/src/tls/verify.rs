//! Who the peer is: a chain to our roots, and exactly one URI SAN, which is a SPIFFE identity that we expect.
//!
//! Exactly one, because a certificate with several invites that one is checked and another is used (T-17).

use std::sync::Arc;

use mesh_core::id::Identity;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::TlsError;

/// Why a certificate has no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    /// Not an X.509 certificate that can be read.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// None, or several.
    #[error("the certificate has {0} URI names; exactly one is required")]
    UriNames(usize),
    /// The one that is there is not a SPIFFE identity of ours.
    #[error("the certificate's URI name is not a workload identity")]
    Malformed,
    /// Not made for this role.
    #[error("the certificate lacks the extended key usage {0}")]
    KeyUsage(&'static str),
}

/// Why a peer with a valid chain was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    /// It names nobody.
    #[error("{0}")]
    NoIdentity(NoIdentity),
    /// It names somebody else.
    #[error("the peer is {got}, expected {}", list(.expected))]
    Unexpected {
        /// Who it is.
        got: Identity,
        /// Who would have been right.
        expected: Vec<Identity>,
    },
    /// It is of another trust domain.
    #[error("the peer {got} is not of trust domain {own}")]
    TrustDomain {
        /// Who it is.
        got: Identity,
        /// Ours.
        own: Arc<str>,
    },
}

fn list(identities: &[Identity]) -> String {
    match identities {
        [] => "nobody".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "),
    }
}

impl PeerRefused {
    fn into_rustls(self) -> rustls::Error {
        CertificateError::Other(OtherError(Arc::new(self))).into()
    }

    /// Finds the refusal in what rustls returned.
    pub(super) fn of(error: &rustls::Error) -> Option<&Self> {
        match error {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
                inner.downcast_ref::<Self>()
            }
            _ => None,
        }
    }
}

/// The role a certificate is used in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Client,
    Server,
}

/// The one identity of a certificate. Says nothing about who signed it.
///
/// # Errors
/// Not exactly one URI SAN, or one that is not a SPIFFE identity of ours.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, NoIdentity> {
    read(certificate, None)
}

fn read(certificate: &CertificateDer<'_>, role: Option<Role>) -> Result<Identity, NoIdentity> {
    let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| NoIdentity::Unreadable)?;
    if !rest.is_empty() {
        return Err(NoIdentity::Unreadable);
    }
    if let Some(role) = role {
        // webpki lets a certificate without the extension pass; ours all carry it.
        let usage = parsed.extended_key_usage().map_err(|_| NoIdentity::Unreadable)?.map(|e| e.value);
        let (fits, name) = match role {
            Role::Client => (usage.is_some_and(|u| u.client_auth), "clientAuth"),
            Role::Server => (usage.is_some_and(|u| u.server_auth), "serverAuth"),
        };
        if !fits {
            return Err(NoIdentity::KeyUsage(name));
        }
    }
    let names = parsed.subject_alternative_name().map_err(|_| NoIdentity::Unreadable)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris[..] {
        [uri] => Identity::parse(uri).map_err(|_| NoIdentity::Malformed),
        _ => Err(NoIdentity::UriNames(uris.len())),
    }
}

/// Client's check of a server: our roots, and one of the expected identities.
#[derive(Debug)]
pub(super) struct VerifyServer {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    expected: Vec<Identity>,
}

impl VerifyServer {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
        expected: Vec<Identity>,
    ) -> Self {
        Self { roots, provider, expected }
    }
}

impl ServerCertVerifier for VerifyServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let got = read(end_entity, Some(Role::Server))
            .map_err(|error| PeerRefused::NoIdentity(error).into_rustls())?;
        if !self.expected.contains(&got) {
            return Err(PeerRefused::Unexpected { got, expected: self.expected.clone() }.into_rustls());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Server's check of a client: our roots, and our trust domain.
#[derive(Debug)]
pub(super) struct VerifyClient {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: Arc<str>,
}

impl VerifyClient {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        provider: &Arc<CryptoProvider>,
        trust_domain: Arc<str>,
    ) -> Result<Self, TlsError> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| TlsError::Configuration(rustls::Error::General(error.to_string())))?;
        Ok(Self { chain, trust_domain })
    }
}

impl ClientCertVerifier for VerifyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: they would tell an unauthenticated peer about our roots, and nobody selects by them.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let got = read(end_entity, Some(Role::Client))
            .map_err(|error| PeerRefused::NoIdentity(error).into_rustls())?;
        if got.trust_domain != self.trust_domain {
            return Err(PeerRefused::TrustDomain { got, own: self.trust_domain.clone() }.into_rustls());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
