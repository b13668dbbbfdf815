//! What the programs tell, from the ring buffer to a value per event.

use std::{io, net::SocketAddr, sync::Arc};

use aya::maps::{MapData, RingBuf};
use mesh_ebpf_common::{
    event::{EVENT_CLOSED, EVENT_CUT, EVENT_OPENED, EVENT_REFUSED, Event},
    map::{FLOW_OTHER, FlowRecord},
    reason::Reason,
    wire::Target,
};
use tokio::io::unix::AsyncFd;

use super::{
    Inner, direct,
    types::{KernelError, KernelEvent, PodSlot, flag_of},
};

/// The programs' events as they come.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    kernel: Arc<Inner>,
}

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>, kernel: Arc<Inner>) -> Result<Self, KernelError> {
        // SAFETY: the ring keeps its descriptor open and the same for as long as it lives.
        let ring = unsafe { AsyncFd::register(ring) };
        let ring = ring.map_err(|error| KernelError::io("wait for events of the kernel")(error.into()))?;
        Ok(Self { ring, kernel })
    }

    /// The next event. A connection that has to be cut has been cut when its event is returned.
    ///
    /// # Errors
    /// When the ring cannot be waited for.
    ///
    /// # Cancel safety
    /// Dropping the future loses no event.
    pub async fn next(&mut self) -> io::Result<KernelEvent> {
        loop {
            let mut ready = self.ring.readable_mut().await?;
            let event = ready.get_inner_mut().next().map(|item| read(&item));
            match event {
                Some(Some(event)) => {
                    if let Some(told) = self.kernel.tell(&event) {
                        return Ok(told);
                    }
                }
                Some(None) => {}
                None => ready.clear_ready(),
            }
        }
    }
}

/// One record; `None` when it has another size, which a layout version rules out.
fn read(bytes: &[u8]) -> Option<Event> {
    (bytes.len() == size_of::<Event>()).then(|| {
        // SAFETY: the length is checked, any bit pattern is valid, and the read needs no alignment.
        unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() }
    })
}

impl Inner {
    /// It may have ended by itself.
    fn end(&self, netns: u64, local: SocketAddr, remote: SocketAddr, cookie: u64) {
        if let Some(diag) = self.pods.lock().get(&netns) {
            let _ = diag.end(local, remote, cookie);
        }
    }

    fn tell(&self, event: &Event) -> Option<KernelEvent> {
        let record = &event.record;
        let reason = Reason::from_number(event.reason)?;
        match event.kind {
            EVENT_OPENED => Some(KernelEvent::DirectOpened(direct(record))),
            EVENT_CLOSED => Some(KernelEvent::DirectClosed {
                flow: direct(record),
                sent_bytes: event.sent_bytes,
                received_bytes: event.received_bytes,
                rtt_us: event.rtt_us,
                retransmits: event.retransmits,
            }),
            EVENT_REFUSED => {
                let (src, dst) = ends(record);
                // Refused after connect(2) had let it go on: it would only time out.
                if record.socket != 0 {
                    self.end(record.client_netns, src, dst, record.socket);
                }
                Some(refused(reason, record))
            }
            EVENT_CUT => {
                let (src, dst) = ends(record);
                self.end(record.key.netns, dst, src, record.socket);
                Some(KernelEvent::Cut { reason, netns: record.key.netns, src, dst })
            }
            _ => None,
        }
    }
}

fn refused(reason: Reason, record: &FlowRecord) -> KernelEvent {
    let (src, dst) = ends(record);
    KernelEvent::Refused {
        reason,
        flag: flag_of(reason),
        src_pod: PodSlot { netns: record.client_netns, id: record.src_pod },
        dst_pod: record.dst_pod,
        src,
        dst,
        dialled: (record.flags & FLOW_OTHER != 0).then(|| record.other.to_socket()),
    }
}

fn ends(record: &FlowRecord) -> (SocketAddr, SocketAddr) {
    let key = &record.key;
    (Target::new(key.src, key.sport).to_socket(), Target::new(key.dst, key.dport).to_socket())
}
