//! Records of the ring buffer.

use crate::map::FlowRecord;

/// A direct flow reached its application.
pub const EVENT_OPENED: u32 = 1;
/// A direct flow ended; the figures count.
pub const EVENT_CLOSED: u32 = 2;
/// A connection was refused.
pub const EVENT_REFUSED: u32 = 3;
/// A connection reached an application and has to be cut: `record.socket` and `record.key.netns` are the accepted
/// socket's.
pub const EVENT_CUT: u32 = 4;

/// One event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Event {
    /// `EVENT_OPENED` and so on.
    pub kind: u32,
    /// Number of the [`crate::reason::Reason`].
    pub reason: u32,
    /// The flow.
    pub record: FlowRecord,
    /// Bytes of the application that the client's peer has acknowledged.
    pub sent_bytes: u64,
    /// Bytes of the application that the client has received.
    pub received_bytes: u64,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u32,
    /// Retransmitted segments.
    pub retransmits: u32,
}
const _: () = assert!(size_of::<Event>() == 160);
