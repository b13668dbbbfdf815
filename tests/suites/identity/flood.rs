//! Frames of a peer with a valid certificate that means harm (`reliability.md` T-26, T-29).

use std::{
    io,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use mesh_core::{
    id::Identity,
    tunnel::{HBONE_PORT, format_authority},
};
use mesh_net::tunnel::Connector as _;
use mesh_tests::{peer::talk, world::Family};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{Fixture, Here, PORT, inside};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Frame types and flags of RFC 9113, section 6.
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const CANCEL: u32 = 8;
/// A flood that is still taken after so many rounds is not bounded. Many more than are taken: what is on its way when the
/// peer makes an end counts as sent, seconds of it on a slow machine.
const ROUNDS: u32 = 200_000;
/// For the peer to act; it needs far less.
const DEADLINE: Duration = Duration::from_secs(60);

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// `:method: CONNECT` and `:authority`, as literals over names of the static table (RFC 7541, 6.2.2).
fn connect(authority: &str) -> Vec<u8> {
    let length = u8::try_from(authority.len()).unwrap_or(u8::MAX);
    [&[0x02, 7], &b"CONNECT"[..], &[0x01, length], authority.as_bytes()].concat()
}

/// One round: its number and the block of a good request to its bytes.
type Round = fn(u32, &[u8]) -> Vec<u8>;

fn opened_and_reset(round: u32, block: &[u8]) -> Vec<u8> {
    let stream = 2 * round + 1;
    [frame(HEADERS, END_HEADERS, stream, block), frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())].concat()
}

fn headers_without_end(round: u32, block: &[u8]) -> Vec<u8> {
    match round {
        0 => frame(HEADERS, 0, 1, block),
        // A field that is not kept in any table.
        _ => frame(CONTINUATION, 0, 1, &[0x00, 1, b'x', 1, b'y']),
    }
}

/// Nothing is sent, as often as one likes.
fn silence(_: u32, _: &[u8]) -> Vec<u8> {
    Vec::new()
}

const FLOODS: &[(&str, &[u8], Round)] = &[
    ("streams that are opened and reset", PREFACE, opened_and_reset),
    ("a header block that does not end", PREFACE, headers_without_end),
    ("no preface", b"", silence),
];

/// Each ends its own connection, and disturbs nobody else's.
pub fn floods(fixture: &Fixture) -> anyhow::Result<()> {
    let to = fixture.far.at(Family::V4, PORT)?;
    for (name, preface, round) in FLOODS {
        let sent =
            flood(fixture, preface, *round, &format_authority(to)).with_context(|| (*name).to_owned())?;
        ensure!(sent + 1 < ROUNDS, "{name}: {sent} were taken");
        ensure!(talk(&fixture.client, to).greeted(), "after {name} a good client is refused");
    }
    Ok(())
}

/// The number of rounds that were sent until the peer ended the connection.
fn flood(fixture: &Fixture, preface: &[u8], round: Round, authority: &str) -> anyhow::Result<u32> {
    let certificate = fixture.stolen()?;
    let dial = fixture.far.at(Family::V4, HBONE_PORT)?;
    let expected = Identity::new("cluster.local", &fixture.far.namespace, &fixture.far.name);
    let block = connect(authority);
    inside(&fixture.outsider.netns, async move {
        let tcp = Here.connect(dial).await?;
        let (tls, _) = certificate.client_tls().connect(tcp, vec![expected]).await?;
        let (mut reader, mut writer) = tokio::io::split(tls);
        let sent = AtomicU32::new(0);
        let writing = async {
            if !preface.is_empty() {
                writer.write_all(preface).await?;
                writer.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
            }
            let rounds = if preface.is_empty() { 0 } else { ROUNDS };
            for number in 0..rounds {
                writer.write_all(&round(number, &block)).await?;
                writer.flush().await?;
                sent.store(number, Ordering::Relaxed);
            }
            Ok::<_, io::Error>(())
        };
        // Whatever becomes of the writer, the end is what the reader sees.
        let writing = async {
            let _ = writing.await;
            std::future::pending::<()>().await;
        };
        let reading = async {
            let mut buffer = vec![0; 16 << 10];
            while reader.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        };
        tokio::select! {
            () = reading => Ok(sent.load(Ordering::Relaxed)),
            () = writing => bail!("the writer does not end"),
            () = tokio::time::sleep(DEADLINE) => bail!("the connection is still open after {DEADLINE:?}"),
        }
    })
}
