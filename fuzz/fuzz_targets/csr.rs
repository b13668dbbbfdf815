//! Certificate requests, as anyone who may talk to the CA can send them.

use std::{
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use mesh_control::ca::{root::Root, sign::sign};
use mesh_core::id::Identity;
use mesh_net::tls::verify::identity_of;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SanType};
use rustls_pki_types::{CertificateDer, pem::PemObject};

pub const TARGET: crate::Target = crate::Target {
    name: "csr",
    seeds,
    dictionary: &[
        b"-----BEGIN CERTIFICATE REQUEST-----\n",
        b"-----END CERTIFICATE REQUEST-----\n",
        b"\n",
        b"\x30\x82",
        b"\x03\x42\x00\x04",
        b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07",
        b"\x02\x01\x00",
        b"\xa0\x00",
    ],
    run,
};

fn request(
    names: &[&str],
    algorithm: &'static rcgen::SignatureAlgorithm,
) -> rcgen::CertificateSigningRequest {
    let key = KeyPair::generate_for(algorithm).expect("a key can be made");
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        names.iter().map(|name| SanType::URI((*name).try_into().expect("ASCII"))).collect();
    params.serialize_request(&key).expect("it can be signed")
}

fn seeds() -> Vec<Vec<u8>> {
    let ours = request(&["spiffe://cluster.local/ns/shop/sa/web"], &PKCS_ECDSA_P256_SHA256);
    let greedy = request(&["spiffe://cluster.local/ns/admin/sa/root"], &PKCS_ECDSA_P256_SHA256);
    let other_key = request(&[], &PKCS_ED25519);
    vec![
        ours.pem().expect("PEM").into_bytes(),
        ours.der().to_vec(),
        greedy.der().to_vec(),
        other_key.der().to_vec(),
    ]
}

fn root() -> &'static Root {
    static ROOT: OnceLock<Root> = OnceLock::new();
    ROOT.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("undermesh-fuzz-ca-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("the temporary folder can be written");
        let root = Root::open(&dir, SystemTime::now()).expect("a root can be made");
        std::fs::remove_dir_all(&dir).expect("it was just made");
        root
    })
}

fn run(data: &[u8]) {
    // Text as it is; anything else is the inside of a PEM block, or mutations would hardly ever decode.
    let text = match std::str::from_utf8(data) {
        Ok(text) if text.starts_with("-----") => text.to_owned(),
        _ => pem(data),
    };
    let identity = Identity::new("cluster.local", "shop", "web");
    if let Ok(signed) = sign(root(), &text, &identity, Duration::from_secs(3600), SystemTime::now()) {
        // Whatever the request says, the certificate names the one identity that was granted.
        let leaf = CertificateDer::from_pem_slice(signed.as_bytes()).expect("what we sign is PEM");
        assert_eq!(identity_of(&leaf).ok(), Some(identity));
    }
}

fn pem(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE REQUEST-----\n");
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let word =
                group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
            for position in 0..4 {
                let sextet = (word >> (18 - 6 * position) & 63) as usize;
                text.push(if position <= group.len() { char::from(ALPHABET[sextet]) } else { '=' });
            }
        }
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE REQUEST-----\n");
    text
}
