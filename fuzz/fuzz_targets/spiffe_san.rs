//! Who a peer's certificate says it is.

use mesh_core::id::Identity;
use mesh_net::tls::verify::identity_of;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls_pki_types::CertificateDer;

pub const TARGET: crate::Target = crate::Target {
    name: "spiffe_san",
    seeds,
    dictionary: &[
        b"spiffe://cluster.local/ns/a/sa/b",
        b"spiffe://",
        b"/ns/",
        b"/sa/",
        b"..",
        b"%2f",
        b"\0",
        b"\x86",
        b"\x82",
        b"\x30",
        b"\x06\x03\x55\x1d\x11",
        b"\x04",
        b"\x81\xff",
        b"\x82\xff\xff",
        b"\x84\x7f\xff\xff\xff",
        b"\x80",
    ],
    run,
};

fn certificate(names: &[&str]) -> Vec<u8> {
    let key = KeyPair::generate().expect("a key can be made");
    let mut params = CertificateParams::default();
    params.subject_alt_names = names
        .iter()
        .map(|name| match name.strip_prefix("dns:") {
            Some(dns) => SanType::DnsName(dns.try_into().expect("a DNS name")),
            None => SanType::URI((*name).try_into().expect("ASCII")),
        })
        .collect();
    params.self_signed(&key).expect("it can be signed").der().to_vec()
}

fn seeds() -> Vec<Vec<u8>> {
    vec![
        certificate(&["spiffe://cluster.local/ns/shop/sa/web"]),
        certificate(&["spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/admin"]),
        certificate(&["spiffe://cluster.local/ns/shop/sa/web", "dns:web.shop"]),
        certificate(&["https://example.org/"]),
        certificate(&[]),
    ]
}

fn run(data: &[u8]) {
    if let Ok(identity) = identity_of(&CertificateDer::from(data)) {
        assert_eq!(Identity::parse(&identity.to_string()), Ok(identity));
    }
}
