//! Bounds of the L7 proxy beside those of the mesh.

use std::time::Duration;

pub use mesh_core::limits::{CONNECT, COPY_BUFFER_BYTES, DRAIN, LOG_VALUE_BYTES};

/// A connection without requests is closed after this time (`semantics.md` D4).
pub const IDLE: Duration = Duration::from_secs(3600);
/// From the first byte to the last of an HTTP/2 preface (`reliability.md` T-29).
pub const PREFACE: Duration = Duration::from_secs(5);
/// From the first byte of a request to the end of its head (`reliability.md` T-29).
pub const HEAD: Duration = Duration::from_secs(15);
/// Decoded head of a request or response, bytes (`reliability.md` T-27).
pub const HEADER_BYTES: usize = 64 << 10;
/// Header lines of one message.
pub const HEADERS: usize = 200;
/// Concurrent requests of one downstream HTTP/2 connection (`reliability.md` T-26).
pub const STREAMS: u32 = 100;
/// Streams that a peer may reset before its connection is closed (`reliability.md` T-26).
pub const RESETS: usize = 200;
/// HTTP/2 stream window towards a client or application, bytes: what a slow reader can hold.
pub const WINDOW_BYTES: u32 = 256 << 10;
/// HTTP/2 connection window, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// Idle HTTP/1.1 connections kept per endpoint and client.
pub const IDLE_PER_KEY: usize = 16;
/// Keys of the upstream pool; the least recently used one gives way.
pub const POOL_KEYS: usize = 1024;
/// An unused upstream connection is closed after this time: below the keep-alive of common servers would race less,
/// but a lost race is repaired by a safe re-dial.
pub const UPSTREAM_IDLE: Duration = Duration::from_secs(60);
/// How long an HTTP/1.1 connection may take to become reusable after its response (unread request body).
pub const UPSTREAM_SETTLE: Duration = Duration::from_secs(5);
