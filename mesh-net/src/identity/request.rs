//! Asking the CA: a fresh key, a request for one identity, and a distrustful look at the answer.

use mesh_core::{
    id::Identity,
    limits::CERTIFICATE_TTL,
    proto::ca::{CREATE_CERTIFICATE_PATH, IstioCertificateRequest, IstioCertificateResponse},
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tonic::{Code, Request, client::Grpc};
use tonic_prost::ProstCodec;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{CertificateSource, FetchError, Issued};
use crate::{
    BoxFuture,
    grpc::{AuthorizedChannel, certificates},
    tls::verify::identity_of,
};

/// Whose certificate a caller of the CA wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// A node asks for the pods that run on it.
    ForPods,
    /// A pod asks for itself: the identity follows from its token.
    ForItself,
}

/// The CA of the control plane (`wire-protocol.md` 6).
#[derive(Clone)]
pub struct CaClient {
    channel: AuthorizedChannel,
    asking: Asking,
}

impl CaClient {
    /// A client over `channel`.
    pub fn new(channel: AuthorizedChannel, asking: Asking) -> Self {
        Self { channel, asking }
    }

    async fn create(&self, identity: &Identity) -> Result<Issued, FetchError> {
        let (key, csr) = signing_request(identity)?;
        let uri = identity.to_string();
        let named = match self.asking {
            Asking::ForPods => Some(uri.as_str()),
            Asking::ForItself => None,
        };
        let seconds = i64::try_from(CERTIFICATE_TTL.as_secs()).unwrap_or(i64::MAX);
        let request = IstioCertificateRequest::new(csr, seconds, named);
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| FetchError::Unavailable(chain_of(&error)))?;
        let path = http::uri::PathAndQuery::from_static(CREATE_CERTIFICATE_PATH);
        let codec = ProstCodec::<IstioCertificateRequest, IstioCertificateResponse>::default();
        let answer = grpc.unary(Request::new(request), path, codec).await.map_err(|status| {
            let text = format!("{}: {}", status.code(), status.message());
            match status.code() {
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
                    FetchError::Unavailable(text)
                }
                _ => FetchError::Refused(text),
            }
        })?;
        check(&answer.into_inner().cert_chain, &key, identity)
    }
}

impl CertificateSource for CaClient {
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, FetchError>> {
        Box::pin(self.create(identity))
    }
}

fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A fresh P-256 key and a request with an empty subject and one critical URI name.
fn signing_request(identity: &Identity) -> Result<(KeyPair, String), FetchError> {
    let failed = |error: rcgen::Error| FetchError::Unusable(format!("own request: {error}"));
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    // An empty subject makes rcgen mark the name as critical, as RFC 5280 wants it.
    params.distinguished_name = DistinguishedName::new();
    let name = identity.to_string().as_str().try_into().map_err(failed)?;
    params.subject_alt_names = vec![SanType::URI(name)];
    let csr = params.serialize_request(&key).and_then(|request| request.pem()).map_err(failed)?;
    Ok((key, csr))
}

/// Takes the answer apart: leaf, intermediates, and last the roots.
fn check(chain: &[String], key: &KeyPair, identity: &Identity) -> Result<Issued, FetchError> {
    let unusable = |what: &str| FetchError::Unusable(what.to_owned());
    let ([leaf, between @ ..], Some(roots)) =
        (chain.get(..chain.len().saturating_sub(1)).unwrap_or_default(), chain.last())
    else {
        return Err(unusable("it has no leaf and root"));
    };
    let parse = |pem: &String| certificates(pem).map_err(|error| FetchError::Unusable(error.to_string()));
    let mut sent = parse(leaf)?;
    let certificate = sent.first().ok_or_else(|| unusable("it has no leaf"))?;
    let got = identity_of(certificate).map_err(|error| FetchError::Unusable(error.to_string()))?;
    if got != *identity {
        return Err(FetchError::Unusable(format!("it is for {got}, not for {identity}")));
    }
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|_| unusable("the leaf cannot be read"))?;
    let spki = rcgen::PublicKeyData::subject_public_key_info(key);
    if parsed.public_key().raw != spki {
        return Err(unusable("the leaf is for another key"));
    }
    for pem in between {
        sent.extend(parse(pem)?);
    }
    let roots: Vec<CertificateDer<'static>> = parse(roots)?;
    Ok(Issued { chain: sent, key: PrivateKeyDer::Pkcs8(key.serialize_der().into()), roots })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Leaf, MiniCa};

    fn id(sa: &str) -> Identity {
        Identity::new("cluster.local", "shop", sa)
    }

    #[test]
    fn the_request_names_the_identity_and_nothing_else() {
        use x509_parser::prelude::*;
        let (_, csr) = signing_request(&id("web")).unwrap();
        let der = ::pem::parse(csr).unwrap();
        let (_, request) = X509CertificationRequest::from_der(der.contents()).unwrap();
        request.verify_signature().unwrap();
        assert_eq!(request.certification_request_info.subject.iter().count(), 0);
        let names: Vec<_> = request.requested_extensions().unwrap().collect();
        assert!(matches!(names[..], [ParsedExtension::SubjectAlternativeName(_)]), "{names:?}");
    }

    #[test]
    fn answers_are_checked() {
        let ca = MiniCa::new();
        let (key, csr) = signing_request(&id("web")).unwrap();
        let (_, other_csr) = signing_request(&id("web")).unwrap();
        let pem_of = |der: &CertificateDer<'_>| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()));
        let leaf = pem_of(&ca.sign(&csr, Leaf::of(&id("web"))));
        let root = ca.root_pem();
        let good = check(&[leaf.clone(), root.clone()], &key, &id("web")).unwrap();
        assert_eq!((good.chain.len(), good.roots.len()), (1, 1));
        let two_roots = format!("{root}{}", MiniCa::new().root_pem());
        let chain = [leaf.clone(), root.clone(), two_roots];
        let long = check(&chain, &key, &id("web")).unwrap();
        assert_eq!((long.chain.len(), long.roots.len()), (2, 2));
        let foreign = pem_of(&ca.sign(&csr, Leaf::of(&id("cart"))));
        let stolen = pem_of(&ca.sign(&other_csr, Leaf::of(&id("web"))));
        for (chain, expected) in [
            (vec![], "no leaf and root"),
            (vec![leaf.clone()], "no leaf and root"),
            (vec![leaf.clone(), "garbage".into()], "PEM"),
            (vec!["garbage".into(), root.clone()], "PEM"),
            (vec![foreign, root.clone()], "it is for"),
            (vec![stolen, root], "another key"),
        ] {
            let error = check(&chain, &key, &id("web")).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
