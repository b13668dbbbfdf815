//! Frames of an authenticated peer: HTTP/2 as a tunnel's server reads it. The connection ends in order, whatever comes.

use std::sync::{Arc, LazyLock};

use mesh_core::id::Identity;
use mesh_net::{
    drain::Draining,
    identity::WorkloadCertificate,
    task::TaskGroup,
    testing::MiniCa,
    tunnel::{Ended, Handshakes, Incoming, Serving, serve_connection},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

pub const TARGET: crate::Target = crate::Target {
    name: "frames",
    seeds,
    dictionary: &[
        b"\0\0\0\0\0\0\0\0\x01",
        b"\0\0\x05\0\x01\0\0\0\x01",
        b"\0\0\x08\0\x08\0\0\0\x01\x02",
        b"\0\0\x10\x01\x04\0\0\0\x03",
        b"\0\0\x10\x01\0\0\0\0\x05",
        b"\0\0\x04\x09\x04\0\0\0\x05",
        b"\0\0\x05\x02\0\0\0\0\x01",
        b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08",
        b"\0\0\x06\x04\0\0\0\0\0\0\x04\x7f\xff\xff\xff",
        b"\0\0\0\x04\x01\0\0\0\0",
        b"\0\0\x08\x06\0\0\0\0\0pingping",
        b"\0\0\x08\x07\0\0\0\0\0\x7f\xff\xff\xff\0\0\0\0",
        b"\0\0\x04\x08\0\0\0\0\0\x7f\xff\xff\xff",
        b"\0\0\x04\x08\0\0\0\0\x01\0\0\xff\xff",
        b"\x02\x07CONNECT",
        b"\x01\x0b10.0.0.2:80",
        b"\x40\x01a\x01b",
        b"\xbe",
        b"\x20",
        b"\x3f\xe1\x1f",
        b"\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff",
    ],
    run,
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
const CONNECT: &[u8] = b"\0\0\x16\x01\x04\0\0\0\x01\x02\x07CONNECT\x01\x0b10.0.0.2:80";

/// The first byte says whether preface, settings and a stream come first, and how large the pieces are.
fn seeds() -> Vec<Vec<u8>> {
    vec![
        [&[0], PREFACE, SETTINGS, CONNECT, b"\0\0\x05\0\x01\0\0\0\x01hello"].concat(),
        b"\xff\0\0\x05\0\0\0\0\0\x01hello\0\0\0\0\x01\0\0\0\x01".to_vec(),
        b"\x7f\0\0\x08\0\x08\0\0\0\x01\x02hello\0\0\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08".to_vec(),
        b"\x81\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0\0\0\x08\x06\0\0\0\0\0pingping".to_vec(),
        b"\xf1\0\0\x04\x01\x05\0\0\0\x01\x40\x01a\0".to_vec(),
    ]
}

static PEERS: LazyLock<(Arc<WorkloadCertificate>, Arc<WorkloadCertificate>, Identity)> =
    LazyLock::new(|| {
        let ca = MiniCa::new();
        let id = |sa| Identity::new("cluster.local", "shop", sa);
        (ca.certificate(&id("web")), ca.certificate(&id("cart")), id("cart"))
    });

fn run(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(spoken(data));
}

async fn echo(incoming: Incoming) {
    let Ok(stream) = incoming.accept(None) else { return };
    let (mut read, mut write) = tokio::io::split(stream);
    let _ = tokio::io::copy(&mut read, &mut write).await;
    let _ = write.shutdown().await;
}

async fn spoken(data: &[u8]) {
    let [how, frames @ ..] = data else { return };
    let begin = if how & 1 == 1 { [PREFACE, SETTINGS, CONNECT].concat() } else { Vec::new() };
    let bytes = [&begin, frames].concat();
    let (near, far) = duplex(1 << 20);
    let (web, cart, expected) = &*PEERS;
    let tasks = TaskGroup::new();
    let cx = Serving { tls: cart.server_tls(), draining: Draining::never(), tasks: tasks.clone() };
    let carrier = Handshakes::default().admit(far, ([10, 0, 0, 1], 5).into()).expect("a slot");
    let client = async {
        let (tls, _) = web.client_tls().connect(near, vec![expected.clone()]).await.expect("the client");
        let (mut read, mut write) = tokio::io::split(tls);
        let speak = async {
            for piece in bytes.chunks(1 + usize::from(how >> 1) * 3) {
                if write.write_all(piece).await.is_err() {
                    break;
                }
                let _ = write.flush().await;
            }
            let _ = write.shutdown().await;
        };
        let listen = async {
            let mut heard = Vec::new();
            let _ = read.read_to_end(&mut heard).await;
            heard
        };
        tokio::join!(speak, listen).1
    };
    let (ended, heard) = tokio::join!(serve_connection(carrier, cx, echo), client);
    assert!(matches!(ended, Ended::Closed { .. } | Ended::H2(_)), "{ended:?}");
    assert!(heard.starts_with(&[0, 0]), "settings come first");
    tasks.idle().await;
    assert_eq!(tasks.panics(), 0);
}
