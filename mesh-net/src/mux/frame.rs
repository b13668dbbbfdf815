//! What frames look like (RFC 9113, sections 4 and 6), and those that we write.

/// Every frame begins with so many bytes: length, type, flags, stream.
pub const HEAD_BYTES: usize = 9;
/// What a client says first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Largest window and largest stream number.
pub const LARGEST: u32 = (1 << 31) - 1;
/// Windows before anybody said otherwise, bytes.
pub const DEFAULT_WINDOW_BYTES: u32 = 65_535;
/// Frame size before anybody said otherwise, bytes: also the smallest that may be said.
pub const DEFAULT_FRAME_BYTES: usize = 16 << 10;

/// Types of frames.
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub mod flags {
    pub const ACK: u8 = 0x1;
    pub const END_STREAM: u8 = 0x1;
    pub const END_HEADERS: u8 = 0x4;
    pub const PADDED: u8 = 0x8;
    pub const PRIORITY: u8 = 0x20;
}

/// An error code.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub u32);

impl Reason {
    pub const NO_ERROR: Self = Self(0);
    pub const PROTOCOL_ERROR: Self = Self(1);
    pub const FLOW_CONTROL_ERROR: Self = Self(3);
    pub const STREAM_CLOSED: Self = Self(5);
    pub const FRAME_SIZE_ERROR: Self = Self(6);
    pub const REFUSED_STREAM: Self = Self(7);
    pub const CANCEL: Self = Self(8);
    pub const COMPRESSION_ERROR: Self = Self(9);
    pub const ENHANCE_YOUR_CALM: Self = Self(11);
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMES: [&str; 14] = [
            "NO_ERROR",
            "PROTOCOL_ERROR",
            "INTERNAL_ERROR",
            "FLOW_CONTROL_ERROR",
            "SETTINGS_TIMEOUT",
            "STREAM_CLOSED",
            "FRAME_SIZE_ERROR",
            "REFUSED_STREAM",
            "CANCEL",
            "COMPRESSION_ERROR",
            "CONNECT_ERROR",
            "ENHANCE_YOUR_CALM",
            "INADEQUATE_SECURITY",
            "HTTP_1_1_REQUIRED",
        ];
        match usize::try_from(self.0).ok().and_then(|code| NAMES.get(code)) {
            Some(name) => f.write_str(name),
            None => write!(f, "error {:#x}", self.0),
        }
    }
}

impl std::fmt::Debug for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// A violation that ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// What the peer is told.
    pub reason: Reason,
    /// What the log says.
    pub what: &'static str,
}

impl Broken {
    /// The peer does not follow the protocol.
    pub const fn protocol(what: &'static str) -> Self {
        Self { reason: Reason::PROTOCOL_ERROR, what }
    }

    /// A frame of the wrong length.
    pub const fn size(what: &'static str) -> Self {
        Self { reason: Reason::FRAME_SIZE_ERROR, what }
    }

    /// The peer makes us work for nothing.
    pub const fn flood(what: &'static str) -> Self {
        Self { reason: Reason::ENHANCE_YOUR_CALM, what }
    }

    /// The peer sends more than it may.
    pub const fn window(what: &'static str) -> Self {
        Self { reason: Reason::FLOW_CONTROL_ERROR, what }
    }
}

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes that follow.
    pub size: usize,
    /// See [`kind`].
    pub kind: u8,
    /// See [`flags`].
    pub flags: u8,
    /// 0 is the connection.
    pub stream: u32,
}

impl Head {
    /// Reads a head.
    pub fn read(bytes: [u8; HEAD_BYTES]) -> Self {
        let [a, b, c, kind, flags, d, e, f, g] = bytes;
        let size = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        Self { size, kind, flags, stream: u32::from_be_bytes([d, e, f, g]) & LARGEST }
    }

    /// The head of a frame of ours; `size` is below 16 MiB.
    pub fn write(self) -> [u8; HEAD_BYTES] {
        #[expect(clippy::cast_possible_truncation, reason = "each byte of three")]
        let [a, b, c] = [(self.size >> 16) as u8, (self.size >> 8) as u8, self.size as u8];
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, d, e, f, g]
    }

    /// Whether `flag` is set.
    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// What either end may say about itself. Absent is as before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Streams that its peer may have open.
    pub streams: Option<u32>,
    /// Window of a new stream, bytes.
    pub window: Option<u32>,
    /// Largest frame that it takes, bytes.
    pub frame: Option<u32>,
    /// Largest list of headers that it takes, bytes.
    pub headers: Option<u32>,
    /// Whether it takes pushed streams.
    pub push: Option<bool>,
}

impl Settings {
    /// Reads the payload of a SETTINGS frame; the last of equal ones counts, unknown ones do not.
    ///
    /// # Errors
    /// A value out of its range, half a setting.
    pub fn read(payload: &[u8]) -> Result<Self, Broken> {
        let (settings, rest) = payload.as_chunks::<6>();
        if !rest.is_empty() {
            return Err(Broken::size("SETTINGS"));
        }
        let mut read = Self::default();
        for [high, low, a, b, c, d] in settings {
            let value = u32::from_be_bytes([*a, *b, *c, *d]);
            match u16::from_be_bytes([*high, *low]) {
                2 if value > 1 => return Err(Broken::protocol("ENABLE_PUSH")),
                2 => read.push = Some(value == 1),
                3 => read.streams = Some(value),
                4 if value > LARGEST => return Err(Broken::window("INITIAL_WINDOW_SIZE")),
                4 => read.window = Some(value),
                5 if !(16_384..=16_777_215).contains(&value) => {
                    return Err(Broken::protocol("MAX_FRAME_SIZE"));
                }
                5 => read.frame = Some(value),
                6 => read.headers = Some(value),
                // The size of the table matters to who uses one, and we do not.
                _ => {}
            }
        }
        Ok(read)
    }

    /// Appends a SETTINGS frame.
    pub fn write(self, out: &mut Vec<u8>) {
        let settings = [
            (2, self.push.map(u32::from)),
            (3, self.streams),
            (4, self.window),
            (5, self.frame),
            (6, self.headers),
        ];
        let said = || settings.iter().filter_map(|(id, value)| value.map(|value| (*id, value)));
        let head = Head { size: 6 * said().count(), kind: kind::SETTINGS, flags: 0, stream: 0 };
        out.extend(head.write());
        for (id, value) in said() {
            out.extend(u16::to_be_bytes(id));
            out.extend(value.to_be_bytes());
        }
    }
}

/// Appends the answer to SETTINGS.
pub fn settings_ack(out: &mut Vec<u8>) {
    out.extend(Head { size: 0, kind: kind::SETTINGS, flags: flags::ACK, stream: 0 }.write());
}

/// Appends a PING, or the answer to one.
pub fn ping(payload: [u8; 8], flags: u8, out: &mut Vec<u8>) {
    out.extend(Head { size: 8, kind: kind::PING, flags, stream: 0 }.write());
    out.extend(payload);
}

/// Appends a RST_STREAM.
pub fn reset(stream: u32, reason: Reason, out: &mut Vec<u8>) {
    out.extend(Head { size: 4, kind: kind::RST_STREAM, flags: 0, stream }.write());
    out.extend(reason.0.to_be_bytes());
}

/// Appends a WINDOW_UPDATE.
pub fn window(stream: u32, increment: u32, out: &mut Vec<u8>) {
    out.extend(Head { size: 4, kind: kind::WINDOW_UPDATE, flags: 0, stream }.write());
    out.extend(increment.to_be_bytes());
}

/// Appends a GOAWAY.
pub fn goaway(last: u32, reason: Reason, out: &mut Vec<u8>) {
    out.extend(Head { size: 8, kind: kind::GOAWAY, flags: 0, stream: 0 }.write());
    out.extend(last.to_be_bytes());
    out.extend(reason.0.to_be_bytes());
}

/// Appends a block of headers in frames of at most `frame` bytes.
pub fn headers(stream: u32, block: &[u8], (end, frame): (bool, usize), out: &mut Vec<u8>) {
    let frame = frame.max(1);
    let (mut kind, mut rest) = (kind::HEADERS, block);
    let mut flags = if end { flags::END_STREAM } else { 0 };
    loop {
        let (now, later) = rest.split_at(rest.len().min(frame));
        if later.is_empty() {
            flags |= flags::END_HEADERS;
        }
        out.extend(Head { size: now.len(), kind, flags, stream }.write());
        out.extend(now);
        if later.is_empty() {
            return;
        }
        (kind, flags, rest) = (kind::CONTINUATION, 0, later);
    }
}
