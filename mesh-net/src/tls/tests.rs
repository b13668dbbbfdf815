use mesh_core::id::Identity;
use rcgen::{ExtendedKeyUsagePurpose, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    clock::{Chance, Clock},
    identity::{CertificateManager, Means, WorkloadCertificate},
    task::TaskGroup,
    testing::{Leaf, MiniCa},
};

fn id(sa: &str) -> Identity {
    Identity::new("cluster.local", "shop", sa)
}

fn io_failed(error: io::Error) -> TlsError {
    TlsError::Io(Arc::new(error))
}

/// Both ends' results of one handshake.
async fn handshake(
    client: &WorkloadCertificate,
    expect: Vec<Identity>,
    server: &WorkloadCertificate,
) -> (Result<Identity, TlsError>, Result<Identity, TlsError>) {
    let (a, b) = duplex(64 << 10);
    let tls = server.server_tls();
    let connect = async {
        let (mut stream, peer) = client.client_tls().connect(a, expect).await?;
        // The server's verdict on our certificate comes with the first bytes that it sends.
        let mut byte = [0];
        stream.read_exact(&mut byte).await.map_err(io_failed)?;
        Ok(peer)
    };
    let accept = async {
        let (mut stream, peer) = tls.accept(b).await?;
        stream.write_all(b"!").await.map_err(io_failed)?;
        stream.flush().await.map_err(io_failed)?;
        Ok(peer)
    };
    tokio::join!(connect, accept)
}

/// A certificate with a bent leaf, owned by `sa` as far as its own process is concerned.
fn bent(ca: &MiniCa, leaf: Leaf) -> WorkloadCertificate {
    let issued = ca.issue(leaf);
    let store = root_store(&issued.roots).unwrap();
    let good = ca.certificate(&id("bent"));
    let material = Material { chain: &issued.chain, key: &issued.key, roots: &store, ciphers: Ciphers::Aes };
    WorkloadCertificate::assembled(
        &good,
        ServerTls::new(&id("bent"), material).unwrap(),
        ClientTls::new(material).unwrap(),
    )
}

#[tokio::test]
async fn both_ends_learn_who_the_other_is() {
    let ca = MiniCa::new();
    let (web, cart) = (ca.certificate(&id("web")), ca.certificate(&id("cart")));
    let (client, server) = handshake(&web, vec![id("other"), id("cart")], &cart).await;
    assert_eq!((client.unwrap(), server.unwrap()), (id("cart"), id("web")));
}

#[tokio::test]
async fn somebody_else_is_refused() {
    let ca = MiniCa::new();
    let (web, cart) = (ca.certificate(&id("web")), ca.certificate(&id("cart")));
    for expect in [vec![id("reviews")], vec![]] {
        let (client, server) = handshake(&web, expect.clone(), &cart).await;
        let error = client.unwrap_err();
        assert_eq!(error.flag(), mesh_core::flag::Flag::PeerIdentity);
        assert!(
            matches!(&error, TlsError::Peer(PeerRefused::Unexpected { got, expected })
                if *got == id("cart") && *expected == expect),
            "{error}"
        );
        assert!(server.is_err());
    }
}

#[tokio::test]
async fn another_ca_is_refused_by_both_ends() {
    let (ours, theirs) = (MiniCa::new(), MiniCa::new());
    let (web, cart) = (ours.certificate(&id("web")), theirs.certificate(&id("cart")));
    let (client, server) = handshake(&web, vec![id("cart")], &cart).await;
    assert!(matches!(client, Err(TlsError::Protocol(_))), "{client:?}");
    assert!(server.is_err());
}

#[tokio::test]
async fn another_trust_domain_is_refused_by_the_server() {
    let ca = MiniCa::new();
    let foreign = ca.certificate(&Identity::new("other.domain", "shop", "web"));
    let (client, server) = handshake(&foreign, vec![id("cart")], &ca.certificate(&id("cart"))).await;
    let error = server.unwrap_err();
    assert!(matches!(error, TlsError::Peer(PeerRefused::TrustDomain { .. })), "{error}");
    assert!(client.is_err());
}

/// T-17: as a client, as a server, both refused.
#[tokio::test]
async fn bent_certificates_are_refused_in_both_roles() {
    let ca = MiniCa::new();
    let good = ca.certificate(&id("cart"));
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let web = id("web").to_string();
    let client_only = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let server_only = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let names = |names: Vec<SanType>| Leaf { names, ..Leaf::of(&id("web")) };
    let usages = |usages: Vec<ExtendedKeyUsagePurpose>| Leaf { usages, ..Leaf::of(&id("web")) };
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    let cases = [
        ("no name", names(vec![]), true, true),
        ("only an address", names(vec![SanType::IpAddress([127, 0, 0, 1].into())]), true, true),
        ("two names", names(vec![uri(&web), uri(&id("cart").to_string())]), true, true),
        ("the same name twice", names(vec![uri(&web), uri(&web)]), true, true),
        ("path tricks", names(vec![uri("spiffe://cluster.local/ns/shop/sa/web/../cart")]), true, true),
        ("escapes", names(vec![uri("spiffe://cluster.local/ns/shop/sa/%77eb")]), true, true),
        ("slash at the end", names(vec![uri("spiffe://cluster.local/ns/shop/sa/web/")]), true, true),
        ("upper case domain", names(vec![uri("spiffe://Cluster.local/ns/shop/sa/web")]), true, true),
        ("NUL", names(vec![uri("spiffe://cluster.local/ns/shop/sa/web\0")]), true, true),
        ("for servers only", usages(server_only), true, false),
        ("for clients only", usages(client_only), false, true),
        ("for nothing", usages(vec![]), true, true),
        ("expired", Leaf { not_after: old, ..Leaf::of(&id("web")) }, true, true),
        ("good", Leaf::of(&id("web")), false, false),
    ];
    for (case, leaf, as_client, as_server) in cases {
        let leaf_copy = Leaf {
            names: leaf.names.clone(),
            usages: leaf.usages.clone(),
            not_before: leaf.not_before,
            not_after: leaf.not_after,
        };
        let (_, server) = handshake(&bent(&ca, leaf), vec![id("cart")], &good).await;
        assert_eq!(server.is_err(), as_client, "{case} as a client: {server:?}");
        let (client, _) = handshake(&good, vec![id("web")], &bent(&ca, leaf_copy)).await;
        assert_eq!(client.is_err(), as_server, "{case} as a server: {client:?}");
    }
}

#[tokio::test]
async fn plaintext_is_refused() {
    let ca = MiniCa::new();
    let (mut a, b) = duplex(64 << 10);
    let tls = ca.certificate(&id("cart")).server_tls();
    a.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n").await.unwrap();
    let error = tls.accept(b).await.map(drop).unwrap_err();
    assert_eq!(error.flag(), mesh_core::flag::Flag::TlsFailure);
}

#[tokio::test]
async fn no_client_certificate_no_entry() {
    let ca = MiniCa::new();
    let (a, b) = duplex(64 << 10);
    let tls = ca.certificate(&id("cart")).server_tls();
    let anonymous = ClientConfig::builder_with_provider(provider(Ciphers::Aes))
        .with_protocol_versions(VERSIONS)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(VerifyServer::new(
            root_store(&[ca.root()]).unwrap(),
            provider(Ciphers::Aes),
            vec![id("cart")],
        )))
        .with_no_client_auth();
    let name = ServerName::try_from("cart").unwrap();
    let connector = TlsConnector::from(Arc::new(anonymous));
    let (_, server) = tokio::join!(connector.connect(name, a), tls.accept(b));
    assert!(matches!(server.map(drop), Err(TlsError::Protocol(rustls::Error::NoCertificatesPresented))));
}

#[tokio::test]
async fn an_end_that_requires_aes_256_gets_it_or_nothing() {
    let tasks = TaskGroup::new();
    let ca = Arc::new(MiniCa::new());
    let of = async |sa: &str, ciphers| {
        let (clock, chance) = (Clock::system(), Chance::seeded(1));
        let manager = CertificateManager::new(Means { source: ca.clone(), ciphers, clock, chance }, &tasks);
        manager.want(&id(sa));
        manager.get(&id(sa)).await.unwrap()
    };
    for (client, server) in [(Ciphers::Aes256, Ciphers::Aes), (Ciphers::Aes, Ciphers::Aes256)] {
        let (client, server) = (of("web", client).await, of("cart", server).await);
        let (at_client, at_server) = handshake(&client, vec![id("cart")], &server).await;
        assert_eq!((at_client.unwrap(), at_server.unwrap()), (id("cart"), id("web")));
    }
    // A client that has only AES-128.
    let (a, b) = duplex(64 << 10);
    let tls = of("cart", Ciphers::Aes256).await.server_tls();
    let weak = CryptoProvider {
        cipher_suites: vec![rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..(*provider(Ciphers::Aes)).clone()
    };
    let config = ClientConfig::builder_with_provider(Arc::new(weak))
        .with_protocol_versions(VERSIONS)
        .unwrap()
        .with_root_certificates(root_store(&[ca.root()]).unwrap())
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("cart").unwrap();
    let (client, server) = tokio::join!(connector.connect(name, a), tls.accept(b));
    assert!(client.is_err());
    // That, and not that it has no certificate either.
    let none = rustls::PeerIncompatible::NoCipherSuitesInCommon;
    let error = server.map(drop).unwrap_err();
    assert!(
        matches!(&error, TlsError::Protocol(rustls::Error::PeerIncompatible(why)) if *why == none),
        "{error:?}"
    );
}

#[test]
fn only_tls13_and_aes_gcm_are_offered() {
    let suites: Vec<String> =
        provider(Ciphers::Aes).cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect();
    assert_eq!(suites, ["TLS13_AES_128_GCM_SHA256", "TLS13_AES_256_GCM_SHA384"]);
    let alone = provider(Ciphers::Aes256);
    assert_eq!(format!("{:?}", alone.cipher_suites[0].suite()), "TLS13_AES_256_GCM_SHA384");
    assert_eq!(alone.cipher_suites.len(), 1);
}
