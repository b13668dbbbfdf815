//! A miniature certificate authority for tests, here and in other crates (feature `testing`).

#![expect(clippy::unwrap_used, reason = "only tests run this")]

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::{flag::Flag, id::Identity};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::{
    BoxFuture,
    identity::{CertificateSource, FetchError, Issued, WorkloadCertificate},
    tls::Ciphers,
    tunnel::Certificates,
};

/// Signs whatever a test asks for.
pub struct MiniCa {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    generation: Mutex<u64>,
}

/// A leaf to mint. Start from [`Leaf::of`] and bend what the test is about.
pub struct Leaf {
    /// Subject alternative names.
    pub names: Vec<SanType>,
    /// Extended key usages.
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl Leaf {
    /// A good one for `identity`, valid from two minutes ago for a day.
    pub fn of(identity: &Identity) -> Self {
        Self::with_names(&[&identity.to_string()])
    }

    /// One with these URI names.
    pub fn with_names(uris: &[&str]) -> Self {
        Self {
            names: uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect(),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            not_before: SystemTime::now() - Duration::from_secs(120),
            not_after: SystemTime::now() + Duration::from_secs(24 * 3600),
        }
    }
}

impl Default for MiniCa {
    fn default() -> Self {
        Self::new()
    }
}

impl MiniCa {
    /// A fresh root.
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        // Another subject than those of the leaves: who has the name of its issuer is taken for a root.
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "test root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), root, generation: Mutex::new(0) }
    }

    /// The root certificate.
    pub fn root(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    /// The root certificate as PEM.
    pub fn root_pem(&self) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", self.root.to_vec()))
    }

    /// Signs a leaf with a fresh key.
    pub fn issue(&self, leaf: Leaf) -> Issued {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = leaf.names;
        params.extended_key_usages = leaf.usages;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.not_before = leaf.not_before.into();
        params.not_after = leaf.not_after.into();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            roots: vec![self.root.clone()],
        }
    }

    /// Signs a request as the real CA does: the names are the given ones, never those of the request.
    pub fn sign(&self, csr_pem: &str, leaf: Leaf) -> CertificateDer<'static> {
        let request = rcgen::CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = leaf.names;
        params.extended_key_usages = leaf.usages;
        params.not_before = leaf.not_before.into();
        params.not_after = leaf.not_after.into();
        params.signed_by(&request.public_key, &self.issuer).unwrap().der().clone()
    }

    /// A good certificate for `identity`, each of its own generation.
    pub fn certificate(&self, identity: &Identity) -> Arc<WorkloadCertificate> {
        let mut generation = self.generation.lock();
        *generation += 1;
        let issued = self.issue(Leaf::of(identity));
        Arc::new(WorkloadCertificate::new(issued, *generation, Ciphers::default()).unwrap())
    }

    /// Chain and key of a server with DNS names, for gRPC.
    pub fn server(&self, dns: &[&str]) -> Issued {
        let mut leaf = Leaf::with_names(&[]);
        leaf.names = dns.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())).collect();
        self.issue(leaf)
    }
}

/// Issues at once for everyone.
impl CertificateSource for MiniCa {
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, FetchError>> {
        Box::pin(async { Ok(self.issue(Leaf::of(identity))) })
    }
}

/// Certificates that are simply there.
#[derive(Default)]
pub struct FixedCertificates(Mutex<Vec<Arc<WorkloadCertificate>>>);

impl FixedCertificates {
    /// These.
    pub fn new(certificates: impl IntoIterator<Item = Arc<WorkloadCertificate>>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(certificates.into_iter().collect())))
    }

    /// Replaces the certificate of the same identity.
    pub fn replace(&self, certificate: Arc<WorkloadCertificate>) {
        let mut held = self.0.lock();
        held.retain(|other| other.identity != certificate.identity);
        held.push(certificate);
    }
}

impl Certificates for FixedCertificates {
    fn get<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Arc<WorkloadCertificate>, Flag>> {
        let found = self.0.lock().iter().find(|c| c.identity == *identity).cloned();
        Box::pin(async move { found.ok_or(Flag::CertificateMissing) })
    }
}
