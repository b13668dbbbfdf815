//! Our records against rustls's own, in both roles, with every cipher.

use std::io::{Read, Write};

use bytes::BytesMut;
use futures_util::FutureExt;
use mesh_core::id::Identity;
use proptest::prelude::*;
use rustls::{
    Connection, SupportedCipherSuite, crypto::aws_lc_rs::cipher_suite, server::WebPkiClientVerifier,
};
use tokio::io::{AsyncReadExt, duplex};

use super::*;
use crate::{
    record::{HEADER_BYTES, Opened, Opener, Outgoing, PLAINTEXT_BYTES, RecordError, Sealer},
    testing::{Leaf, MiniCa},
};

const SUITES: [SupportedCipherSuite; 3] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

fn id(sa: &str) -> Identity {
    Identity::new("cluster.local", "shop", sa)
}

fn with_suite(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider { cipher_suites: vec![suite], ..rustls::crypto::aws_lc_rs::default_provider() })
}

/// One connection: our end, and theirs as rustls makes it.
struct Pair {
    sealer: Sealer,
    opener: Opener,
    incoming: BytesMut,
    theirs: Connection,
}

fn server_config(ca: &MiniCa, suite: SupportedCipherSuite) -> ServerConfig {
    let issued = ca.issue(Leaf::of(&id("cart")));
    let roots = root_store(&issued.roots).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, with_suite(suite)).build().unwrap();
    let mut config = ServerConfig::builder_with_provider(with_suite(suite))
        .with_protocol_versions(VERSIONS)
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(issued.chain, issued.key)
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_secret_extraction = true;
    config
}

fn client_config(ca: &MiniCa, suite: SupportedCipherSuite) -> ClientConfig {
    let issued = ca.issue(Leaf::of(&id("web")));
    let roots = root_store(&issued.roots).unwrap();
    let verifier = VerifyServer::new(roots, with_suite(suite), vec![id("cart")]);
    let mut config = ClientConfig::builder_with_provider(with_suite(suite))
        .with_protocol_versions(VERSIONS)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(issued.chain, issued.key)
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_secret_extraction = true;
    config
}

fn name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into())
}

/// The handshake, small pieces at a time.
async fn pair(client_is_ours: bool, suite: SupportedCipherSuite) -> Pair {
    let ca = MiniCa::new();
    let (server, client) = (Arc::new(server_config(&ca, suite)), Arc::new(client_config(&ca, suite)));
    let (a, b) = duplex(if client_is_ours { 700 } else { 64 << 10 });
    let (ours, (theirs, io)) = if client_is_ours {
        let connection = UnbufferedClientConnection::new(client, name()).unwrap();
        let ours = establish(connection, a, |c| (c.peer_certificates(), c.alpn_protocol()));
        let acceptor = tokio_rustls::TlsAcceptor::from(server);
        let (ours, theirs) = tokio::join!(ours, async move {
            let mut theirs = acceptor.accept(b).await.unwrap();
            // Tickets, which our end has to stand.
            tokio::io::AsyncWriteExt::flush(&mut theirs).await.unwrap();
            let (io, theirs) = theirs.into_inner();
            (Connection::Server(theirs), io)
        });
        (ours, theirs)
    } else {
        let connection = UnbufferedServerConnection::new(server).unwrap();
        let ours = establish(connection, a, |c| (c.peer_certificates(), c.alpn_protocol()));
        let connector = tokio_rustls::TlsConnector::from(client);
        let (ours, theirs) = tokio::join!(ours, async move {
            let (io, theirs) = connector.connect(name(), b).await.unwrap().into_inner();
            (Connection::Client(theirs), io)
        });
        (ours, theirs)
    };
    let (stream, _) = ours.unwrap();
    let (mut ours, sealer, opener, mut incoming) = stream.into_parts();
    // Tickets may be on their way to either end.
    while let Some(Ok(1..)) = ours.read_buf(&mut incoming).now_or_never() {}
    let (mut io, mut theirs, mut late) = (io, theirs, Vec::new());
    drop(ours);
    io.read_to_end(&mut late).await.unwrap();
    let mut late = &late[..];
    while !late.is_empty() {
        theirs.read_tls(&mut late).unwrap();
        theirs.process_new_packets().unwrap();
    }
    Pair { sealer, opener, incoming, theirs }
}

impl Pair {
    /// Hands `sealed` to rustls in pieces; returns what it made of them.
    fn they_read(&mut self, sealed: &[u8], piece: usize) -> Result<Vec<u8>, rustls::Error> {
        let mut plain = Vec::new();
        for mut part in sealed.chunks(piece) {
            while !part.is_empty() {
                self.theirs.read_tls(&mut part).unwrap();
                self.theirs.process_new_packets()?;
                let _ = self.theirs.reader().read_to_end(&mut plain);
            }
        }
        Ok(plain)
    }

    /// Takes `sealed` in pieces, and answers as we have to.
    fn we_read(&mut self, sealed: &[u8], piece: usize, out: &mut Outgoing) -> Result<Vec<u8>, RecordError> {
        let mut plain = Vec::new();
        let mut pieces = sealed.chunks(piece);
        loop {
            match self.opener.open(&mut self.incoming)? {
                Opened::Data(data) => plain.extend_from_slice(&data),
                Opened::KeyAsked => self.sealer.update_key(false, out)?,
                Opened::Nothing => {}
                Opened::Closed => return Ok(plain),
                Opened::Short => {
                    assert!(Opener::lacks(&self.incoming) > 0);
                    let Some(part) = pieces.next() else { return Ok(plain) };
                    self.incoming.extend_from_slice(part);
                }
            }
        }
    }

    fn they_write(&mut self, plain: &[u8]) -> Vec<u8> {
        self.theirs.set_buffer_limit(None);
        self.theirs.writer().write_all(plain).unwrap();
        let mut sealed = Vec::new();
        while self.theirs.wants_write() {
            self.theirs.write_tls(&mut sealed).unwrap();
        }
        sealed
    }
}

#[derive(Clone, Debug)]
enum Act {
    WeSend(Vec<usize>),
    TheySend(usize),
    WeUpdate(bool),
    TheyUpdate,
}

fn act() -> impl Strategy<Value = Act> {
    let size = prop_oneof![0..40usize, Just(PLAINTEXT_BYTES - 9), Just(PLAINTEXT_BYTES), 0..70_000usize];
    prop_oneof![
        4 => prop::collection::vec(size.clone(), 1..5).prop_map(Act::WeSend),
        4 => size.prop_map(Act::TheySend),
        1 => any::<bool>().prop_map(Act::WeUpdate),
        1 => Just(Act::TheyUpdate),
    ]
}

fn pattern(size: usize, seed: u8) -> Vec<u8> {
    (0..size).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed).collect()
}

fn perform(pair: &mut Pair, acts: &[Act], piece: usize) {
    let mut out = Outgoing::default();
    for (step, act) in acts.iter().enumerate() {
        match act {
            Act::WeSend(sizes) => {
                let parts: Vec<Vec<u8>> =
                    sizes.iter().enumerate().map(|(n, size)| pattern(*size, (step + n) as u8)).collect();
                let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                pair.sealer.seal(&parts, &mut out).unwrap();
                let sealed = out.pending().to_vec();
                out.consume(sealed.len());
                assert_eq!(pair.they_read(&sealed, piece).unwrap(), parts.concat());
            }
            Act::TheySend(size) => {
                let plain = pattern(*size, step as u8);
                let sealed = pair.they_write(&plain);
                assert_eq!(pair.we_read(&sealed, piece, &mut out).unwrap(), plain);
            }
            Act::WeUpdate(request) => pair.sealer.update_key(*request, &mut out).unwrap(),
            Act::TheyUpdate => pair.theirs.refresh_traffic_keys().unwrap(),
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_said_in_whatever_pieces_is_understood(
        suite in 0..SUITES.len(),
        client_is_ours: bool,
        acts in prop::collection::vec(act(), 1..12),
        piece in prop_oneof![1..64usize, 1..40_000usize],
    ) {
        let mut pair = block_on(pair(client_is_ours, SUITES[suite]));
        perform(&mut pair, &acts, piece);
    }
}

/// Every bit of a record matters, its header's too.
#[test]
fn a_changed_bit_is_refused() {
    for suite in SUITES {
        let mut pair = block_on(pair(false, suite));
        let sealed = pair.they_write(b"pay 100 to alice");
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            pair.opener.worn_by(0);
            let outcome = pair.opener.open(&mut BytesMut::from(&changed[..]));
            match outcome {
                Err(_) => {}
                // A length that grew: the record waits for bytes that the peer never sealed.
                Ok(Opened::Short) => assert!((3..HEADER_BYTES).contains(&(bit / 8)), "bit {bit}"),
                Ok(other) => panic!("bit {bit}: {other:?}"),
            }
        }
        pair.opener.worn_by(0);
        let whole = pair.opener.open(&mut BytesMut::from(&sealed[..])).unwrap();
        assert_eq!(whole, Opened::Data("pay 100 to alice".into()));
        // Nor a second time.
        assert!(matches!(pair.opener.open(&mut BytesMut::from(&sealed[..])), Err(RecordError::Tampered)));
    }
}

/// Both ends ours, so that both can be made to look old.
async fn ours() -> ((Sealer, Opener), (Sealer, Opener)) {
    let ca = MiniCa::new();
    let (web, cart) = (ca.certificate(&id("web")), ca.certificate(&id("cart")));
    let (a, b) = duplex(64 << 10);
    let tls = cart.server_tls();
    let (client, server) = tokio::join!(web.client_tls().connect(a, vec![id("cart")]), tls.accept(b));
    let parts = |stream: TlsStream<_>| {
        let (_, sealer, opener, incoming) = stream.into_parts();
        assert!(incoming.is_empty());
        (sealer, opener)
    };
    (parts(client.unwrap().0), parts(server.unwrap().0))
}

#[test]
fn a_worn_key_is_replaced_before_its_limit() {
    let ((mut sealer, _), (_, mut opener)) = block_on(ours());
    let mut out = Outgoing::default();
    sealer.worn_by((1 << 23) - 1);
    opener.worn_by((1 << 23) - 1);
    sealer.seal(&[&[1; PLAINTEXT_BYTES], &[2; 10]], &mut out).unwrap();
    let mut incoming = BytesMut::from(out.pending());
    assert_eq!(opener.open(&mut incoming).unwrap(), Opened::Data(vec![1; PLAINTEXT_BYTES].into()));
    assert_eq!(opener.open(&mut incoming).unwrap(), Opened::Nothing, "the new key is announced");
    assert_eq!(opener.open(&mut incoming).unwrap(), Opened::Data(vec![2; 10].into()));
    assert_eq!(opener.open(&mut incoming).unwrap(), Opened::Short);
    // A peer that never replaces its key is asked to, once, and is understood all the same.
    assert!(!opener.wants_key());
    opener.worn_by(1 << 24);
    assert_eq!([opener.wants_key(), opener.wants_key()], [true, false]);
    out.consume(out.len());
    sealer.update_key(false, &mut out).unwrap();
    let late = opener.open(&mut BytesMut::from(out.pending()));
    assert!(matches!(late, Err(RecordError::Tampered)), "it is looked at: {late:?}");
}

#[test]
fn close_notify_is_the_end_and_an_alert_is_a_reason() {
    let mut pair = block_on(pair(true, SUITES[0]));
    let mut out = Outgoing::default();
    pair.sealer.close(&mut out).unwrap();
    assert!(pair.sealer.seal(&[b"more"], &mut out).is_err());
    pair.theirs.read_tls(&mut out.pending()).unwrap();
    assert!(pair.theirs.process_new_packets().unwrap().peer_has_closed());
    pair.theirs.send_close_notify();
    let mut sealed = Vec::new();
    pair.theirs.write_tls(&mut sealed).unwrap();
    pair.we_read(&sealed, 7, &mut out).unwrap();
    assert_eq!(pair.opener.open(&mut BytesMut::from("anything")).unwrap(), Opened::Closed);

    let mut pair = block_on(super::interop::pair(false, SUITES[1]));
    let mut out = Outgoing::default();
    pair.sealer.abort(&RecordError::Tampered, &mut out);
    let told = pair.they_read(out.pending(), 100).unwrap_err();
    assert_eq!(told, rustls::Error::AlertReceived(rustls::AlertDescription::BadRecordMac));
}

#[test]
fn a_peer_that_only_replaces_keys_is_cut() {
    let ((mut sealer, _), (_, mut opener)) = block_on(ours());
    let mut out = Outgoing::default();
    for _ in 0..40 {
        sealer.update_key(false, &mut out).unwrap();
    }
    let mut incoming = BytesMut::from(out.pending());
    let end = loop {
        match opener.open(&mut incoming) {
            Ok(Opened::Nothing) => {}
            other => break other,
        }
    };
    assert!(matches!(end, Err(RecordError::Unexpected(_))), "{end:?}");
}

#[test]
fn what_is_not_protected_is_refused() {
    let mut pair = block_on(pair(false, SUITES[0]));
    for (header, why) in [
        ([21, 3, 3, 0, 2], "an alert in the clear"),
        ([22, 3, 3, 0, 40], "a handshake message in the clear"),
        ([20, 3, 3, 0, 1], "change cipher spec"),
        ([23, 2, 3, 0, 40], "another protocol"),
        ([23, 3, 3, 0xff, 0xff], "too long"),
        ([23, 3, 3, 0, 16], "too short"),
        ([23, 3, 3, 0, 0], "empty"),
    ] {
        let outcome = pair.opener.open(&mut BytesMut::from(&header[..]));
        assert!(outcome.is_err(), "{why}: {outcome:?}");
    }
}

/// A peer that asks for new keys between its bytes and reads nothing: what we owe it stays one answer.
#[test]
fn wishes_for_keys_that_are_not_read_do_not_pile_up() {
    block_on(async {
        let ca = MiniCa::new();
        let (web, cart) = (ca.certificate(&id("web")), ca.certificate(&id("cart")));
        // Their direction has room; ours ends after a few bytes.
        let (a, b) = duplex(4 << 10);
        let tls = cart.server_tls();
        let (client, server) = tokio::join!(web.client_tls().connect(a, vec![id("cart")]), tls.accept(b));
        let (mut io, mut sealer, _, _) = client.unwrap().0.into_parts();
        let mut server = server.unwrap().0;
        let mut full = 0;
        let mut byte = [0; 1];
        for _ in 0..1000 {
            let mut out = Outgoing::default();
            sealer.update_key(true, &mut out).unwrap();
            sealer.seal(&[b"x"], &mut out).unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut io, out.pending()).await.unwrap();
            server.read_exact(&mut byte).await.unwrap();
            full = full.max(server.waiting());
        }
        assert!(full > 0, "the answers were all taken: the test shows nothing");
        assert!(full < 100, "{full} bytes of answers wait");
    });
}

/// A stream that broke stays broken: what follows a record that was changed is not read.
#[test]
fn nothing_is_read_after_a_record_that_was_changed() {
    block_on(async {
        let ca = MiniCa::new();
        let (web, cart) = (ca.certificate(&id("web")), ca.certificate(&id("cart")));
        let (a, b) = duplex(64 << 10);
        let tls = cart.server_tls();
        let (client, server) = tokio::join!(web.client_tls().connect(a, vec![id("cart")]), tls.accept(b));
        let (mut io, mut sealer, _, _) = client.unwrap().0.into_parts();
        let mut server = server.unwrap().0;
        let mut out = Outgoing::default();
        sealer.seal(&[b"one"], &mut out).unwrap();
        let mut first = out.pending().to_vec();
        *first.last_mut().unwrap() ^= 1;
        out.consume(out.len());
        sealer.seal(&[b"two"], &mut out).unwrap();
        first.extend_from_slice(out.pending());
        tokio::io::AsyncWriteExt::write_all(&mut io, &first).await.unwrap();
        let mut got = [0; 3];
        assert!(server.read(&mut got).await.is_err());
        assert!(server.read(&mut got).await.is_err(), "{got:?}");
    });
}
