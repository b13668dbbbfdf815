//! Records of an authenticated connection that somebody in the middle changes: what is read is what was written, up to
//! the first change, and nothing else.

use std::sync::{Arc, LazyLock};

use mesh_core::id::Identity;
use mesh_net::{identity::WorkloadCertificate, testing::MiniCa};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, copy_bidirectional, duplex};

pub const TARGET: crate::Target = crate::Target {
    name: "records",
    seeds,
    dictionary: &[
        b"\x17\x03\x03",
        b"\x15\x03\x03",
        b"\x16\x03\x03",
        b"\x14\x03\x03",
        b"\0\0",
        b"\xff\xff",
        b"\x40\x00",
    ],
    run,
};

/// The first two bytes say what is written, then each four bytes are one change.
fn seeds() -> Vec<Vec<u8>> {
    vec![
        vec![0, 1],
        vec![4, 255],
        vec![2, 10, 0, 0, 5, 1],
        vec![2, 10, 1, 0, 5, 0, 2, 0, 9, 7],
        vec![9, 200, 3, 10, 0, 0],
    ]
}

/// Bytes in transit, of both directions at most.
const PIPE: usize = 1 << 20;

static PEERS: LazyLock<(Arc<WorkloadCertificate>, Arc<WorkloadCertificate>, Identity)> =
    LazyLock::new(|| {
        let ca = MiniCa::new();
        let id = |sa| Identity::new("cluster.local", "shop", sa);
        (ca.certificate(&id("web")), ca.certificate(&id("cart")), id("cart"))
    });

fn run(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(changed(data));
}

async fn changed(data: &[u8]) {
    let [pieces, size, edits @ ..] = data else { return };
    let sent: Vec<Vec<u8>> = (0..=pieces % 8).map(|n| vec![n; 1 + usize::from(*size) * 131]).collect();
    let (client_io, mut near) = duplex(PIPE);
    let (mut far, server_io) = duplex(PIPE);
    let (web, cart, expected) = &*PEERS;
    let tls = cart.server_tls();
    let handshakes = async {
        tokio::join!(web.client_tls().connect(client_io, vec![expected.clone()]), tls.accept(server_io))
    };
    let (client, server) = tokio::select! {
        done = handshakes => done,
        _ = copy_bidirectional(&mut near, &mut far) => unreachable!("both ends are open"),
    };
    let ((mut client, _), (mut server, _)) = (client.expect("the client"), server.expect("the server"));
    for piece in &sent {
        client.write_all(piece).await.expect("room in the pipe");
    }
    client.shutdown().await.expect("room in the pipe");
    drop(client);
    let sealed = taken(&mut near).await;
    let mut bytes = sealed.clone();
    for edit in edits.chunks_exact(4) {
        change(&mut bytes, edit);
    }
    far.write_all(&bytes).await.expect("room in the pipe");
    drop(far);
    let mut got = Vec::new();
    let read = server.read_to_end(&mut got).await;
    let sent = sent.concat();
    assert!(sent.starts_with(&got), "what was not written is read");
    match read {
        // An end that the peer did not say is none.
        Ok(_) => assert!(got == sent && bytes.starts_with(&sealed), "an end that was not said"),
        Err(_) => assert!(bytes != sealed, "nothing was changed, and it is refused"),
    }
}

async fn taken(from: &mut DuplexStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).await.expect("a pipe has no errors");
    bytes
}

fn change(bytes: &mut Vec<u8>, edit: &[u8]) {
    let [what, high, low, value] = edit else { return };
    let place = usize::from(u16::from_be_bytes([*high, *low])) % (bytes.len() + 1);
    match what % 4 {
        0 if place < bytes.len() => bytes[place] ^= value,
        1 if place < bytes.len() => drop(bytes.remove(place)),
        2 => bytes.insert(place, *value),
        3 => bytes.truncate(place),
        _ => {}
    }
}
