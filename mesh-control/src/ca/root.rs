//! The root: read from its directory, or made when there is none.

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

/// File of the root certificate, also what clients are given as their roots.
pub const CERTIFICATE_FILE: &str = "root-cert.pem";
/// File of the root key, mode 0600.
pub const KEY_FILE: &str = "root-key.pem";

/// Lifetime of a root that we make.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Lifetime of the control plane's own serving certificate, made anew at each start.
const SERVING_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Clocks of other machines may be behind by this much.
pub(super) const BACKDATE: Duration = Duration::from_secs(300);

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A file cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// How.
        #[source]
        source: io::Error,
    },
    /// Key or certificate alone: making the other anew would silently replace the trust of the whole mesh.
    #[error("{} is there without {}", present.display(), absent.display())]
    Half {
        /// What is there.
        present: PathBuf,
        /// What is not.
        absent: PathBuf,
    },
    /// The key can be read by others.
    #[error("{} has mode {mode:04o}: must be 0600", path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The pair cannot be used.
    #[error("{}: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Key or certificate cannot be made.
    #[error("cannot make key or certificate")]
    Make(#[from] rcgen::Error),
}

/// An authority with its key: a root, or one that a root certified.
pub struct Root {
    pub(super) issuer: Issuer<'static, KeyPair>,
    /// The roots that clients are to trust.
    pem: String,
    /// From the certificate that signs to the one below the root; empty where the root itself signs.
    chain: Vec<CertificateDer<'static>>,
    pub(super) not_after: SystemTime,
}

/// The PEM texts of an authority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// Certificate of the key that signs.
    pub certificate: String,
    /// That key.
    pub key: String,
    /// Certificates from the signing one towards the root; may be empty, may begin with the signing one.
    pub chain: String,
    /// The roots; empty where the signing certificate is the root.
    pub roots: String,
}

impl Root {
    /// Reads the root in `dir`, or makes one when neither certificate nor key is there.
    ///
    /// # Errors
    /// Half a root, one that cannot be used, or one whose key others can read.
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, RootError> {
        let (certificate_path, key_path) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
        match (certificate_path.exists(), key_path.exists()) {
            (true, true) => {}
            (false, false) => make(&certificate_path, &key_path, now)?,
            (true, false) => return Err(RootError::Half { present: certificate_path, absent: key_path }),
            (false, true) => return Err(RootError::Half { present: key_path, absent: certificate_path }),
        }
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|source| RootError::Io { path: path.to_owned(), source })
        };
        let meta =
            fs::metadata(&key_path).map_err(|source| RootError::Io { path: key_path.clone(), source })?;
        if meta.mode() & 0o077 != 0 {
            return Err(RootError::Exposed { path: key_path, mode: meta.mode() & 0o7777 });
        }
        let texts =
            Texts { certificate: read(&certificate_path)?, key: read(&key_path)?, ..Texts::default() };
        Self::from_texts(&texts, now).map_err(|reason| RootError::Unusable { path: certificate_path, reason })
    }

    /// The authority of PEM texts.
    ///
    /// # Errors
    /// What makes them unusable.
    pub fn from_texts(texts: &Texts, now: SystemTime) -> Result<Self, String> {
        let key = KeyPair::from_pem(&texts.key).map_err(|error| format!("key: {error}"))?;
        let own = CertificateDer::from_pem_slice(texts.certificate.as_bytes())
            .map_err(|error| format!("certificate: {error}"))?;
        let (_, parsed) = X509Certificate::from_der(&own).map_err(|error| format!("certificate: {error}"))?;
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return Err("the certificate is of another key".to_owned());
        }
        if !parsed.is_ca() {
            return Err("the certificate is no authority (CA:false)".to_owned());
        }
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        if not_after <= now {
            return Err("the certificate has expired".to_owned());
        }
        let pem = if texts.roots.trim().is_empty() { &texts.certificate } else { &texts.roots };
        let roots = certificates(pem).map_err(|error| format!("root: {error}"))?;
        let chain = chain(&own, &texts.chain, &roots).map_err(|error| format!("chain: {error}"))?;
        let issuer = Issuer::from_ca_cert_der(&own, key).map_err(|error| error.to_string())?;
        Ok(Self { issuer, pem: pem.clone(), chain, not_after })
    }

    /// A new root, self-signed.
    ///
    /// # Errors
    /// Key or certificate cannot be made.
    pub fn generate(now: SystemTime) -> Result<Texts, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Undermesh");
        params.distinguished_name.push(DnType::CommonName, "Undermesh root");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ROOT_LIFETIME).into();
        let certificate = params.self_signed(&key)?.pem();
        Ok(Texts { certificate, key: key.serialize_pem(), ..Texts::default() })
    }

    /// The certificates that come between a leaf and the root, as PEM, in order.
    pub fn intermediates(&self) -> Vec<String> {
        let encode = |der: &CertificateDer<'_>| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()));
        self.chain.iter().map(encode).collect()
    }

    /// The roots as PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for the control plane's own server.
    ///
    /// # Errors
    /// A name that cannot stand in a certificate.
    pub fn serving(
        &self,
        names: &[String],
        addresses: &[IpAddr],
        now: SystemTime,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), RootError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(names.to_vec())?;
        params.subject_alt_names.extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + SERVING_LIFETIME).min(self.not_after).into();
        let certificate = params.signed_by(&key, &self.issuer)?;
        let chain = std::iter::once(certificate.der().clone()).chain(self.chain.iter().cloned());
        Ok((chain.collect(), PrivateKeyDer::Pkcs8(key.serialize_der().into())))
    }
}

fn make(certificate_path: &Path, key_path: &Path, now: SystemTime) -> Result<(), RootError> {
    let made = Root::generate(now)?;
    write(key_path, &made.key, 0o600)?;
    write(certificate_path, &made.certificate, 0o644)
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let read = read.map_err(|error| error.to_string())?;
    if read.is_empty() { Err("no certificate".to_owned()) } else { Ok(read) }
}

/// What a leaf is sent with: the signing certificate and what is between it and the roots. Each must be signed by the
/// next and the last by a root, or every peer would refuse every leaf.
fn chain(
    own: &CertificateDer<'static>,
    text: &str,
    roots: &[CertificateDer<'static>],
) -> Result<Vec<CertificateDer<'static>>, String> {
    if roots.contains(own) {
        return Ok(Vec::new());
    }
    let mut chain = vec![own.clone()];
    if !text.trim().is_empty() {
        chain.extend(certificates(text)?.into_iter().filter(|der| der != own && !roots.contains(der)));
    }
    let signed = |child: &CertificateDer<'_>, parent: &CertificateDer<'_>| {
        let (Ok((_, child)), Ok((_, parent))) =
            (X509Certificate::from_der(child), X509Certificate::from_der(parent))
        else {
            return false;
        };
        child.issuer() == parent.subject() && child.verify_signature(Some(parent.public_key())).is_ok()
    };
    let linked = chain.windows(2).all(|pair| signed(&pair[0], &pair[1]));
    let rooted = chain.last().is_some_and(|last| roots.iter().any(|root| signed(last, root)));
    if linked && rooted { Ok(chain) } else { Err("does not lead from the certificate to a root".to_owned()) }
}

/// Whole or not at all, and never readable by others in between.
fn write(path: &Path, content: &str, mode: u32) -> Result<(), RootError> {
    let failed = |source| RootError::Io { path: path.to_owned(), source };
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).map_err(failed)?;
    file.write_all(content.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_root_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let first = Root::open(dir.path(), now).unwrap().pem().to_owned();
        assert_eq!(Root::open(dir.path(), now).unwrap().pem(), first);
        let mode = fs::metadata(dir.path().join(KEY_FILE)).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o600);
    }

    #[test]
    fn an_authority_below_a_root_sends_its_chain() {
        let now = SystemTime::now();
        let top = Root::generate(now).unwrap();
        // Made by hand, as a user would: the root of ours allows none below it.
        let root_key = KeyPair::from_pem(&top.key).unwrap();
        let authority = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
        };
        let root = authority("root").self_signed(&root_key).unwrap();
        let issuer = Issuer::from_ca_cert_der(root.der(), root_key).unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let below = authority("below").signed_by(&key, &issuer).unwrap();
        let texts = |chain: String, roots: String| Texts {
            certificate: below.pem(),
            key: key.serialize_pem(),
            chain,
            roots,
        };
        for chain in [String::new(), below.pem(), format!("{}{}", below.pem(), root.pem())] {
            let read = Root::from_texts(&texts(chain, root.pem()), now).unwrap();
            assert_eq!((read.intermediates().len(), read.pem()), (1, root.pem().as_str()));
            let (serving, _) = read.serving(&["control.svc".to_owned()], &[], now).unwrap();
            assert_eq!((serving.len(), &serving[1]), (2, below.der()));
        }
        let other = Root::generate(now).unwrap().certificate;
        assert!(Root::from_texts(&texts(String::new(), other.clone()), now).is_err());
        assert!(Root::from_texts(&texts(other, root.pem()), now).is_err());
    }

    #[test]
    fn a_root_that_cannot_be_trusted_is_refused_and_never_replaced() {
        let now = SystemTime::now();
        let fresh = || {
            let dir = tempfile::tempdir().unwrap();
            Root::open(dir.path(), now).unwrap();
            dir
        };
        let dir = fresh();
        fs::set_permissions(dir.path().join(KEY_FILE), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Root::open(dir.path(), now), Err(RootError::Exposed { .. })));
        for file in [KEY_FILE, CERTIFICATE_FILE] {
            let dir = fresh();
            fs::remove_file(dir.path().join(file)).unwrap();
            assert!(matches!(Root::open(dir.path(), now), Err(RootError::Half { .. })), "{file}");
        }
        let (one, other) = (fresh(), fresh());
        fs::copy(other.path().join(CERTIFICATE_FILE), one.path().join(CERTIFICATE_FILE)).unwrap();
        assert!(matches!(Root::open(one.path(), now), Err(RootError::Unusable { .. })));
        assert!(matches!(
            Root::open(fresh().path(), now + ROOT_LIFETIME * 2),
            Err(RootError::Unusable { .. })
        ));
    }
}
