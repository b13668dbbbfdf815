//! Every bound with its unit and reason.

use std::time::Duration;

/// TCP connect to an application or a peer (`wire-protocol.md` H30).
pub const CONNECT: Duration = Duration::from_secs(10);
/// TLS handshake, either role: a peer that completes TCP and nothing else holds one slot this long.
pub const TLS_HANDSHAKE: Duration = Duration::from_secs(10);
/// HTTP/2 preface and settings, and the answer to a CONNECT.
pub const H2_HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a connection waits for a policy or workload that the control plane has named but not yet sent.
pub const HOLD: Duration = Duration::from_secs(5);
/// Streams of one tunnel (`wire-protocol.md` H34).
pub const TUNNEL_STREAMS: usize = 100;
/// A tunnel without streams is closed after this time (`wire-protocol.md` H36).
pub const TUNNEL_IDLE: Duration = Duration::from_secs(300);
/// HTTP/2 stream window to begin with, bytes (`wire-protocol.md` H31).
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// HTTP/2 connection window to begin with, bytes (`wire-protocol.md` H31).
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 frame, bytes (`wire-protocol.md` H31).
pub const FRAME_BYTES: u32 = 1 << 20;
/// Decoded header list of a tunnel stream, bytes.
pub const HEADER_LIST_BYTES: u32 = 16 << 10;
/// HTTP/2 keep-alive PING interval of a tunnel (`wire-protocol.md` H32).
pub const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A PING without answer for this long ends the tunnel (`wire-protocol.md` H32).
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Buffer per direction of a relayed connection, bytes: larger saves no system calls worth the memory.
pub const COPY_BUFFER_BYTES: usize = 64 << 10;
/// First and last wait of an accept loop after an error such as EMFILE.
pub const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));
/// Lifetime asked for a workload certificate (`wire-protocol.md` C7).
pub const CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);
/// First and last wait between attempts to fetch a certificate (`wire-protocol.md` C7).
pub const CERTIFICATE_BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(150));
/// First and last wait between attempts to reach the control plane.
pub const FEED_BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(15));
/// SIGTERM: how long connections may finish before they are cut.
pub const DRAIN: Duration = Duration::from_secs(25);
/// Largest message of the control plane that is accepted, bytes (`wire-protocol.md` X3).
pub const FEED_MESSAGE_BYTES: usize = 200 << 20;
/// Longest value from a peer that reaches a log line, bytes.
pub const LOG_VALUE_BYTES: usize = 256;
