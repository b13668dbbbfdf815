//! A packet capture on one namespace's interfaces, asserted instead of looked at.

use std::{
    io::Read as _,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns;

/// `ETH_P_ALL` in network byte order.
const ALL_PROTOCOLS: i32 = 0x0300;
/// Receive buffer of the capture socket, bytes: bursts of a test must fit.
const CAPTURE_BUFFER_BYTES: usize = 64 << 20;
/// Most bytes kept of one capture.
const KEPT_BYTES: usize = 256 << 20;

/// A running capture; the frames are kept in memory.
pub struct Wire {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Wire {
    /// Captures every frame that any interface of the namespace sees from now on.
    ///
    /// # Errors
    /// When the capture socket cannot be made there.
    pub fn tap(netns_path: &Path) -> anyhow::Result<Self> {
        let socket = netns::within(netns_path, || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS)))
                .context("packet socket")?;
            socket.set_recv_buffer_size(CAPTURE_BUFFER_BYTES)?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            Ok(socket)
        })?;
        let frames = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (kept, ended) = (frames.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let (mut socket, mut buffer, mut total) = (socket, vec![0; 128 << 10], 0);
            while !ended.load(Ordering::Acquire) {
                let Ok(n) = socket.read(&mut buffer) else { continue };
                total += n;
                assert!(total <= KEPT_BYTES, "the capture is larger than its bound");
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(buffer[..n].to_vec());
            }
        });
        Ok(Self { frames, stop, thread: Some(thread) })
    }

    /// Ends the capture and gives its frames, link-layer header included.
    ///
    /// # Panics
    /// When the capture outgrew its bound.
    pub fn finish(mut self) -> Frames {
        // One more read timeout drains what the kernel has queued.
        thread::sleep(Duration::from_millis(150));
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the capture thread must not fail");
        }
        Frames(std::mem::take(&mut self.frames.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// What a capture saw.
pub struct Frames(Vec<Vec<u8>>);

/// One TCP segment of a capture.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// TCP payload.
    pub payload: &'a [u8],
}

impl Frames {
    /// Number of frames that hold `needle` anywhere.
    pub fn holding(&self, needle: &[u8]) -> usize {
        self.0.iter().filter(|frame| frame.windows(needle.len()).any(|window| window == needle)).count()
    }

    /// TCP segments with payload.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        self.0.iter().filter_map(|frame| segment(frame)).filter(|segment| !segment.payload.is_empty())
    }
}

/// Reads Ethernet, IPv4 or IPv6 (without extension headers), TCP.
fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let (ethertype, packet) = (frame.get(12..14)?, frame.get(14..)?);
    let tcp = match ethertype {
        [0x08, 0x00] if packet.get(9) == Some(&6) => {
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            packet.get(usize::from(packet.first()? & 0x0f) * 4..total.max(20))?
        }
        [0x86, 0xdd] if packet.get(6) == Some(&6) => packet.get(40..)?,
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    Some(Segment {
        source_port: port(0)?,
        destination_port: port(2)?,
        payload: tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?,
    })
}
