//! Certificate signing (`istio.v1.auth`, `wire-protocol.md` 6).
#![expect(missing_docs, reason = "fields are Istio's, described in wire-protocol.md 6")]

use std::collections::BTreeMap;

#[derive(Clone, PartialEq, prost::Message)]
pub struct IstioCertificateRequest {
    /// PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// Seconds.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<prost_types::Struct>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct IstioCertificateResponse {
    /// Leaf, intermediates, and last the roots.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// Path of the call.
pub const CREATE_CERTIFICATE_PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Metadata key that names the identity which a node asks for.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

impl IstioCertificateRequest {
    /// A request for `identity` (a SPIFFE URI), or for the caller's own identity.
    pub fn new(csr: String, validity_seconds: i64, identity: Option<&str>) -> Self {
        let metadata = identity.map(|identity| prost_types::Struct {
            fields: BTreeMap::from([(
                IMPERSONATED_IDENTITY.to_owned(),
                prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.to_owned())) },
            )]),
        });
        Self { csr, validity_duration: validity_seconds, metadata }
    }

    /// The identity that the caller asks for, when it names one.
    pub fn impersonated_identity(&self) -> Option<&str> {
        match self.metadata.as_ref()?.fields.get(IMPERSONATED_IDENTITY)?.kind.as_ref()? {
            prost_types::value::Kind::StringValue(identity) => Some(identity),
            _ => None,
        }
    }
}
