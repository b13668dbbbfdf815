//! One certificate: of the request only the key counts, and that it is the caller's.

use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use mesh_core::id::Identity;
use rand::Rng;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
    SerialNumber, SubjectPublicKeyInfo,
};
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256},
    prelude::FromDer,
};

use super::root::{BACKDATE, Root};

/// Largest request, bytes: ours have 400.
pub const MAX_REQUEST_BYTES: usize = 16 << 10;

/// Why a request cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum Unsignable {
    /// Larger than [`MAX_REQUEST_BYTES`].
    #[error("the request is too large")]
    TooLarge,
    /// Not one PEM block with one PKCS #10 request.
    #[error("the request is malformed")]
    Malformed,
    /// Not a P-256 key with SHA-256.
    #[error("only P-256 keys with SHA-256 are signed")]
    Key,
    /// The caller does not hold the key.
    #[error("the request is not signed with its own key")]
    Possession,
    /// The certificate cannot be made.
    #[error("cannot make the certificate")]
    Make(#[from] rcgen::Error),
}

/// Signs a certificate for `identity` with the key of the request; subject, names and extensions of the request are
/// not even read.
///
/// # Errors
/// [`Unsignable`] says why not.
pub fn sign(
    root: &Root,
    csr: &str,
    identity: &Identity,
    ttl: Duration,
    now: SystemTime,
) -> Result<String, Unsignable> {
    let key = proven_key(csr)?;
    let mut params = CertificateParams::default();
    // With an empty subject the name is critical, as RFC 5280 wants it.
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().as_str().try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + ttl).min(root.not_after).into();
    Ok(params.signed_by(&key, &root.issuer)?.pem())
}

/// 126 random bits: positive, never zero, 16 bytes in DER.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::rng().random();
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn proven_key(csr: &str) -> Result<SubjectPublicKeyInfo, Unsignable> {
    if csr.len() > MAX_REQUEST_BYTES {
        return Err(Unsignable::TooLarge);
    }
    let blocks = pem::parse_many(csr).map_err(|_| Unsignable::Malformed)?;
    let [block] = &blocks[..] else { return Err(Unsignable::Malformed) };
    if block.tag() != "CERTIFICATE REQUEST" && block.tag() != "NEW CERTIFICATE REQUEST" {
        return Err(Unsignable::Malformed);
    }
    let (rest, request) =
        X509CertificationRequest::from_der(block.contents()).map_err(|_| Unsignable::Malformed)?;
    if !rest.is_empty() {
        return Err(Unsignable::Malformed);
    }
    let info = &request.certification_request_info;
    let algorithm = &info.subject_pki.algorithm;
    let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY
        || curve != Some(OID_EC_P256)
        || request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256
    {
        return Err(Unsignable::Key);
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &info.subject_pki.subject_public_key.data)
        .verify(info.raw, &request.signature_value.data)
        .map_err(|_| Unsignable::Possession)?;
    Ok(SubjectPublicKeyInfo::from_der(info.subject_pki.raw)?)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};
    use x509_parser::{extensions::GeneralName, prelude::X509Certificate};

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path(), SystemTime::now()).unwrap();
        (dir, root)
    }

    fn signed(csr: &str) -> Result<String, Unsignable> {
        let identity = Identity::new("cluster.local", "shop", "web");
        sign(&root().1, csr, &identity, Duration::from_secs(3600), SystemTime::now())
    }

    fn request(params: &CertificateParams, key: &KeyPair) -> String {
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    #[test]
    fn the_certificate_says_what_we_say_whatever_the_request_says() {
        let key = KeyPair::generate().unwrap();
        let mut greedy = CertificateParams::new(vec!["*.bank.example".to_owned()]).unwrap();
        greedy
            .subject_alt_names
            .push(SanType::URI("spiffe://cluster.local/ns/bank/sa/vault".try_into().unwrap()));
        greedy.subject_alt_names.push(SanType::IpAddress(IpAddr::from([10, 0, 0, 1])));
        greedy.distinguished_name.push(rcgen::DnType::CommonName, "root");
        greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        greedy.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]));
        // basicConstraints CA:TRUE, written by hand as rcgen does not put it into requests.
        let authority = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 3, 1, 1, 0xff]);
        greedy.custom_extensions.push(authority);
        for params in [CertificateParams::default(), greedy] {
            let leaf = pem::parse(signed(&request(&params, &key)).unwrap()).unwrap();
            let (_, parsed) = X509Certificate::from_der(leaf.contents()).unwrap();
            let names = parsed.subject_alternative_name().unwrap().unwrap();
            assert!(names.critical);
            assert_eq!(
                names.value.general_names,
                [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")]
            );
            assert!(!parsed.is_ca() && parsed.basic_constraints().unwrap().is_some());
            let usage = parsed.extended_key_usage().unwrap().unwrap().value;
            assert!(usage.server_auth && usage.client_auth && !usage.any);
            assert!(!parsed.key_usage().unwrap().unwrap().value.key_cert_sign());
            assert_eq!(parsed.subject().iter().count(), 0);
            assert_eq!(parsed.public_key().raw, rcgen::PublicKeyData::subject_public_key_info(&key));
            let validity = parsed.validity();
            assert_eq!(validity.not_after.timestamp() - validity.not_before.timestamp(), 3900);
        }
    }

    #[test]
    fn serial_numbers_are_random_and_positive() {
        let serials: std::collections::BTreeSet<_> = (0..100).map(|_| serial().to_bytes()).collect();
        assert_eq!(serials.len(), 100);
        assert!(serials.iter().all(|serial| serial.len() == 16 && serial[0] & 0x80 == 0));
    }

    #[test]
    fn keys_other_than_p256_are_refused() {
        for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let outcome = signed(&request(&CertificateParams::default(), &key));
            assert!(matches!(outcome, Err(Unsignable::Key)), "{outcome:?}");
        }
        let key = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
        let outcome = signed(&request(&CertificateParams::default(), &key));
        assert!(matches!(outcome, Err(Unsignable::Key)), "{outcome:?}");
    }

    #[test]
    fn broken_requests_are_refused() {
        let key = KeyPair::generate().unwrap();
        let good = request(&CertificateParams::default(), &key);
        let der = pem::parse(&good).unwrap().into_contents();
        let armour = |der: &[u8]| pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der.to_vec()));
        let mut trailing = der.clone();
        trailing.push(0);
        let mut forged = der.clone();
        *forged.last_mut().unwrap() ^= 1;
        for bad in [
            String::new(),
            "x".repeat(MAX_REQUEST_BYTES + 1),
            format!("{good}{good}"),
            good.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
            armour(&trailing),
            armour(&forged),
            armour(&der[..der.len() - 1]),
            armour(&[]),
        ] {
            assert!(signed(&bad).is_err(), "{bad:.60}");
        }
        assert!(matches!(signed(&armour(&forged)), Err(Unsignable::Possession)));
        // Any single byte changed: refused, or (a byte that is neither signed nor read) signed for the same key.
        for index in 0..der.len() {
            let mut changed = der.clone();
            changed[index] ^= 0x55;
            let Ok(leaf) = signed(&armour(&changed)) else { continue };
            let leaf = pem::parse(leaf).unwrap();
            let (_, parsed) = X509Certificate::from_der(leaf.contents()).unwrap();
            assert_eq!(
                parsed.public_key().raw,
                rcgen::PublicKeyData::subject_public_key_info(&key),
                "byte {index}"
            );
        }
    }

    #[test]
    fn a_certificate_never_outlives_the_root() {
        let (_dir, root) = root();
        let key = KeyPair::generate().unwrap();
        let csr = request(&CertificateParams::default(), &key);
        let identity = Identity::new("cluster.local", "shop", "web");
        let late = root.not_after - Duration::from_secs(60);
        let leaf =
            pem::parse(sign(&root, &csr, &identity, Duration::from_secs(3600), late).unwrap()).unwrap();
        let (_, parsed) = X509Certificate::from_der(leaf.contents()).unwrap();
        let not_after =
            SystemTime::UNIX_EPOCH + Duration::from_secs(parsed.validity().not_after.timestamp() as u64);
        assert!(not_after <= root.not_after);
    }
}
