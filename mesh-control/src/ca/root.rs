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

/// A root certificate with its key.
pub struct Root {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pem: String,
    pub(super) not_after: SystemTime,
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
        let unusable = |path: &Path, reason: &str| RootError::Unusable {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let key =
            KeyPair::from_pem(&read(&key_path)?).map_err(|error| unusable(&key_path, &error.to_string()))?;
        let pem = read(&certificate_path)?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| unusable(&certificate_path, &error.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&der)
            .map_err(|error| unusable(&certificate_path, &error.to_string()))?;
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return Err(unusable(&certificate_path, "is of another key"));
        }
        if !parsed.is_ca() {
            return Err(unusable(&certificate_path, "is no authority (CA:false)"));
        }
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        if not_after <= now {
            return Err(unusable(&certificate_path, "has expired"));
        }
        let issuer = Issuer::from_ca_cert_der(&der, key)?;
        Ok(Self { issuer, pem, not_after })
    }

    /// The root certificate as PEM.
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
        Ok((vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into())))
    }
}

fn make(certificate_path: &Path, key_path: &Path, now: SystemTime) -> Result<(), RootError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Undermesh");
    params.distinguished_name.push(DnType::CommonName, "Undermesh root");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    let certificate = params.self_signed(&key)?;
    write(key_path, &key.serialize_pem(), 0o600)?;
    write(certificate_path, &certificate.pem(), 0o644)
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
