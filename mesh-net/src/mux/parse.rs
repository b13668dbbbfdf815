//! Bytes into frames. Payload of DATA is handed on as it comes, slice by slice; blocks of headers are put together.
//!
//! ```text
//! Preface ──► Head ──► Payload (control frames, blocks) ──► Head
//!              ├─────► Padding (DATA: its first byte) ──┐
//!              ├─────► Data ◄──────────────────────────┘──► Skip (the padding itself) ──► Head
//!              └─────► Skip (what we do not know)
//! ```

use bytes::{Buf, Bytes, BytesMut};
use mesh_core::limits::FRAME_BYTES;

use super::frame::{Broken, HEAD_BYTES, Head, LARGEST, PREFACE, Reason, Settings, flags, kind};

/// A block of headers, bytes: twice what its headers may count.
pub const BLOCK_BYTES: usize = 2 * mesh_core::limits::HEADER_LIST_BYTES as usize;
/// Frames that a block may come in.
const BLOCK_FRAMES: usize = 16;
/// A SETTINGS frame: several times what there are.
const SETTINGS_BYTES: usize = 64 * 6;
/// A GOAWAY with its explanation.
const GOAWAY_BYTES: usize = 16 << 10;

/// What the peer said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes of a stream, or a part of them.
    Data(Data),
    /// A whole block.
    Headers {
        /// Of this stream.
        stream: u32,
        /// Still compressed.
        block: Bytes,
        /// The stream ends with it.
        end: bool,
    },
    /// The stream is over.
    Reset {
        /// Which.
        stream: u32,
        /// Why.
        reason: Reason,
    },
    /// What it can.
    Settings(Settings),
    /// It has seen what we can.
    SettingsAck,
    /// It wants an answer.
    Ping([u8; 8]),
    /// The answer.
    Pong([u8; 8]),
    /// It takes no more streams.
    GoAway {
        /// The last one that it has acted on.
        last: u32,
        /// Why.
        reason: Reason,
    },
    /// We may send more.
    Window {
        /// On this stream, or on the connection.
        stream: u32,
        /// So many bytes.
        increment: u32,
    },
    /// Only its stream is broken.
    BadStream {
        /// Which.
        stream: u32,
        /// Why.
        reason: Reason,
    },
    /// What means nothing to us.
    Ignored,
}

/// Bytes of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Of this stream.
    pub stream: u32,
    /// What it carries.
    pub payload: Bytes,
    /// The frame begins: what it takes from the windows, and how much of that is padding.
    pub charge: Option<(u32, u32)>,
    /// The stream ends behind them.
    pub end: bool,
}

#[derive(Debug)]
enum Stage {
    Preface(&'static [u8]),
    Head,
    Payload(Head),
    Padding(Head),
    Data { head: Head, left: usize, padding: usize, charge: Option<(u32, u32)> },
    Skip(usize),
}

#[derive(Debug)]
struct Block {
    stream: u32,
    end: bool,
    fragments: BytesMut,
    frames: usize,
}

/// Takes the bytes of one direction.
#[derive(Debug)]
pub struct Parser {
    stage: Stage,
    /// A head or payload whose end has not come.
    partial: Vec<u8>,
    block: Option<Block>,
}

impl Parser {
    /// For what a client sends.
    pub fn of_client() -> Self {
        Self { stage: Stage::Preface(PREFACE), ..Self::of_server() }
    }

    /// For what a server sends.
    pub fn of_server() -> Self {
        Self { stage: Stage::Head, partial: Vec::new(), block: None }
    }

    /// Takes one frame from the front of `input`, or all of it and none.
    ///
    /// # Errors
    /// The connection must end.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Frame>, Broken> {
        loop {
            match self.stage {
                Stage::Preface(expected) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let size = input.len().min(expected.len());
                    let (now, later) = expected.split_at(size);
                    if input.split_to(size) != now {
                        return Err(Broken::protocol("preface"));
                    }
                    self.stage = if later.is_empty() { Stage::Head } else { Stage::Preface(later) };
                }
                Stage::Head => {
                    let Some(bytes) = self.collect(input, HEAD_BYTES) else { return Ok(None) };
                    let Some(bytes) = bytes.first_chunk() else { return Ok(None) };
                    if let Some(frame) = self.begin(Head::read(*bytes))? {
                        return Ok(Some(frame));
                    }
                }
                Stage::Payload(head) => {
                    let Some(payload) = self.collect(input, head.size) else { return Ok(None) };
                    self.stage = Stage::Head;
                    if let Some(frame) = self.control(head, payload)? {
                        return Ok(Some(frame));
                    }
                }
                Stage::Padding(head) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let padding = usize::from(input.get_u8());
                    let left = head.size.checked_sub(1 + padding).ok_or(Broken::protocol("padding"))?;
                    let charge = charge(head.size, 1 + padding);
                    self.stage = Stage::Data { head, left, padding, charge };
                }
                Stage::Data { head, left, padding, charge } => {
                    if left > 0 && input.is_empty() {
                        return Ok(None);
                    }
                    let payload = input.split_to(left.min(input.len()));
                    let left = left - payload.len();
                    self.stage = match (left, padding) {
                        (0, 0) => Stage::Head,
                        (0, padding) => Stage::Skip(padding),
                        _ => Stage::Data { head, left, padding, charge: None },
                    };
                    let end = left == 0 && head.has(flags::END_STREAM);
                    return Ok(Some(Frame::Data(Data { stream: head.stream, payload, charge, end })));
                }
                Stage::Skip(left) => {
                    let size = left.min(input.len());
                    input.advance(size);
                    if size < left {
                        self.stage = Stage::Skip(left - size);
                        return Ok(None);
                    }
                    self.stage = Stage::Head;
                }
            }
        }
    }

    /// `size` bytes in one piece, once they are there.
    fn collect(&mut self, input: &mut Bytes, size: usize) -> Option<Bytes> {
        if self.partial.is_empty() && input.len() >= size {
            return Some(input.split_to(size));
        }
        let lacks = size.saturating_sub(self.partial.len());
        self.partial.extend_from_slice(&input.split_to(lacks.min(input.len())));
        (self.partial.len() >= size).then(|| std::mem::take(&mut self.partial).into())
    }

    /// Looks at a head before anything of its payload is kept.
    fn begin(&mut self, head: Head) -> Result<Option<Frame>, Broken> {
        if head.size > usize::try_from(FRAME_BYTES).unwrap_or(usize::MAX) {
            return Err(Broken::size("longer than we take"));
        }
        match &self.block {
            Some(block) if head.kind != kind::CONTINUATION || head.stream != block.stream => {
                return Err(Broken::protocol("inside a block of headers"));
            }
            None if head.kind == kind::CONTINUATION => {
                return Err(Broken::protocol("CONTINUATION of nothing"));
            }
            _ => {}
        }
        let of_stream = head.stream != 0;
        let sized = |fits: bool, what| if fits { Ok(()) } else { Err(Broken::size(what)) };
        let placed = |fits: bool| if fits { Ok(()) } else { Err(Broken::protocol("stream of a frame")) };
        self.stage = Stage::Payload(head);
        match head.kind {
            kind::DATA => {
                placed(of_stream)?;
                self.stage = if head.has(flags::PADDED) {
                    sized(head.size > 0, "DATA")?;
                    Stage::Padding(head)
                } else {
                    Stage::Data { head, left: head.size, padding: 0, charge: charge(head.size, 0) }
                };
            }
            kind::HEADERS | kind::CONTINUATION => {
                placed(of_stream)?;
                let so_far = self.block.as_ref().map_or(0, |block| block.fragments.len());
                if so_far + head.size > BLOCK_BYTES {
                    return Err(Broken::flood("headers too long"));
                }
            }
            kind::PRIORITY => {
                placed(of_stream)?;
                self.stage = Stage::Skip(head.size);
                let reason = Reason::FRAME_SIZE_ERROR;
                return Ok(Some(match head.size {
                    5 => Frame::Ignored,
                    _ => Frame::BadStream { stream: head.stream, reason },
                }));
            }
            kind::RST_STREAM => placed(of_stream).and(sized(head.size == 4, "RST_STREAM"))?,
            kind::WINDOW_UPDATE => sized(head.size == 4, "WINDOW_UPDATE")?,
            kind::PING => placed(!of_stream).and(sized(head.size == 8, "PING"))?,
            kind::SETTINGS => {
                placed(!of_stream)?;
                sized(!head.has(flags::ACK) || head.size == 0, "SETTINGS")?;
                if head.size > SETTINGS_BYTES {
                    return Err(Broken::flood("too many settings"));
                }
            }
            kind::GOAWAY => {
                placed(!of_stream)?;
                sized((8..=GOAWAY_BYTES).contains(&head.size), "GOAWAY")?;
            }
            kind::PUSH_PROMISE => return Err(Broken::protocol("PUSH_PROMISE")),
            _ => {
                self.stage = Stage::Skip(head.size);
                return Ok(Some(Frame::Ignored));
            }
        }
        Ok(None)
    }

    /// A frame that is whole.
    fn control(&mut self, head: Head, payload: Bytes) -> Result<Option<Frame>, Broken> {
        let stream = head.stream;
        let number = |at: usize| {
            let bytes = payload.get(at..).and_then(|rest| rest.first_chunk());
            bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or(Broken::size("short"))
        };
        let ack = head.has(flags::ACK);
        Ok(Some(match head.kind {
            kind::HEADERS | kind::CONTINUATION => return self.fragment(head, payload),
            kind::RST_STREAM => Frame::Reset { stream, reason: Reason(number(0)?) },
            kind::SETTINGS if ack => Frame::SettingsAck,
            kind::SETTINGS => Frame::Settings(Settings::read(&payload)?),
            kind::PING => {
                let payload = *payload.first_chunk().ok_or(Broken::size("PING"))?;
                if ack { Frame::Pong(payload) } else { Frame::Ping(payload) }
            }
            kind::GOAWAY => Frame::GoAway { last: number(0)? & LARGEST, reason: Reason(number(4)?) },
            kind::WINDOW_UPDATE => match (number(0)? & LARGEST, stream) {
                (0, 0) => return Err(Broken::protocol("WINDOW_UPDATE by nothing")),
                (0, stream) => Frame::BadStream { stream, reason: Reason::PROTOCOL_ERROR },
                (increment, stream) => Frame::Window { stream, increment },
            },
            _ => Frame::Ignored,
        }))
    }

    /// One frame of a block of headers.
    fn fragment(&mut self, head: Head, mut payload: Bytes) -> Result<Option<Frame>, Broken> {
        let last = head.has(flags::END_HEADERS);
        if let Some(mut block) = self.block.take() {
            block.frames += 1;
            if block.frames > BLOCK_FRAMES {
                return Err(Broken::flood("too many CONTINUATION frames"));
            }
            block.fragments.extend_from_slice(&payload);
            if last {
                let Block { stream, end, fragments, .. } = block;
                return Ok(Some(Frame::Headers { stream, block: fragments.freeze(), end }));
            }
            self.block = Some(block);
            return Ok(None);
        }
        if head.has(flags::PADDED) {
            let padding = usize::from(payload.try_get_u8().map_err(|_| Broken::size("HEADERS"))?);
            let kept = payload.len().checked_sub(padding).ok_or(Broken::protocol("padding"))?;
            payload.truncate(kept);
        }
        if head.has(flags::PRIORITY) {
            if payload.len() < 5 {
                return Err(Broken::size("HEADERS"));
            }
            payload.advance(5);
        }
        let (stream, end) = (head.stream, head.has(flags::END_STREAM));
        if last {
            return Ok(Some(Frame::Headers { stream, block: payload, end }));
        }
        self.block = Some(Block { stream, end, fragments: BytesMut::from(payload), frames: 1 });
        Ok(None)
    }
}

/// What a DATA frame of `size` bytes takes, `padding` of them for nothing.
fn charge(size: usize, padding: usize) -> Option<(u32, u32)> {
    Some((u32::try_from(size).ok()?, u32::try_from(padding).ok()?))
}
