//! What the kernel holds for this node: programs, maps and pins, and the only code that writes them.
//!
//! Start: [`Kernel::open`]. A pod: [`Kernel::enrol`] … [`Kernel::release`]. Policy: [`lower::lower`] tells what the
//! maps should hold, [`Kernel::sync`] writes the difference and cuts what is no longer allowed.

mod types;

pub use types::*;

use std::{net::SocketAddr, os::fd::BorrowedFd};

/// The kernel's side of one node agent. Cheap to share by reference; every method may be called from any thread.
pub struct Kernel {}

impl Kernel {
    /// Probes the kernel, loads the programs or takes over the pinned ones, and attaches them at the cgroup root.
    ///
    /// # Errors
    /// One line that says what is missing.
    pub fn open(_config: &KernelConfig) -> Result<(Self, ProbeReport), KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// Puts a pod in force: listeners, then its `sk_lookup` program, then its addresses, then capture. Enrolling a
    /// pod again (after a restart) replaces its listeners.
    ///
    /// # Errors
    /// When a map is full or the kernel refuses; nothing of the pod is in force then.
    pub fn enrol(&self, _pod: &PodIdentity, _listeners: &PodListeners<'_>) -> Result<PodSlot, KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// Takes a pod out of force.
    ///
    /// # Errors
    /// When the pod is not enrolled, or the kernel refuses.
    pub fn release(&self, _pod: PodSlot, _how: Release) -> Result<(), KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// The pods that the maps hold, those of a former process included.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pods(&self) -> Result<Vec<HeldPod>, KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// Marks a socket of the agent as its own, before it connects.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn exempt(&self, _socket: BorrowedFd<'_>) -> Result<(), KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// The record of a connection that the outbound listener of `pod` accepted from `src`, dialled to `dst`; `None`
    /// when there is none, and then the connection must be refused.
    pub fn flow(&self, _pod: PodSlot, _src: SocketAddr, _dst: SocketAddr) -> Option<Flow> {
        None
    }

    /// Brings services, verdicts and options to `want`; raises the generation when a permission was taken away and
    /// cuts the direct flows that it had let through.
    ///
    /// # Errors
    /// When a map is full or the kernel refuses; what permits less has been written then.
    pub fn sync(&self, _want: &KernelState) -> Result<SyncReport, KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// Live direct flows.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn direct_flows(&self) -> Result<Vec<DirectFlow>, KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// Ends both sockets of a direct flow at once.
    ///
    /// # Errors
    /// When the kernel refuses; a flow that has ended already is no error.
    pub fn destroy(&self, _flow: &DirectFlow) -> Result<(), KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// Counters by reason, since the maps were made.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }

    /// The events of the programs; once per process.
    ///
    /// # Errors
    /// When taken already, outside of a tokio runtime, or the kernel refuses.
    pub fn events(&self) -> Result<Events, KernelError> {
        Err(KernelError::Unsupported { what: "not yet" })
    }
}
