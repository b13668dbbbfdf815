//! Every way out of every program: its number is the index in `COUNTERS`, its name the label of the metric.

macro_rules! reasons {
    ($($variant:ident $name:literal $text:literal;)*) => {
        /// How a program ended.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $(#[doc = $text] $variant,)* }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Reason] = &[$(Reason::$variant,)*];

            /// The label.
            pub const fn name(self) -> &'static str { match self { $(Reason::$variant => $name,)* } }

            /// One sentence for people.
            pub const fn text(self) -> &'static str { match self { $(Reason::$variant => $text,)* } }

            /// The reason of this number.
            pub fn from_number(number: u32) -> Option<Self> { Self::ALL.get(number as usize).copied() }
        }
    };
}

reasons! {
    NotOurs "not_ours" "connect: the namespace is not enrolled.";
    Uncaptured "uncaptured" "connect: not TCP, left alone.";
    Own "own" "connect: a socket of the agent.";
    SelfCall "self_call" "connect: the pod calls itself.";
    Direct "direct" "connect: permitted, straight to a pod of this node.";
    ToAgent "to_agent" "connect: handed to the agent.";
    PolicyDenied "policy_denied" "connect: refused by policy.";
    IllegalPort "illegal_port" "connect: one of the mesh's own ports.";
    UnsupportedSocket "unsupported_socket" "connect: a stream socket that is not TCP.";
    KernelFault "kernel_fault" "connect: a helper of the kernel failed.";
    AgentAbsent "agent_absent" "connect: the agent would have to carry it and does not listen.";
    Recorded "recorded" "SYN: the record is written.";
    Undecided "undecided" "SYN: connect decided nothing for this socket.";
    DestinationChanged "destination_changed" "SYN: not the destination that was decided about.";
    IllegalSource "illegal_source" "SYN: the local address is not the pod's.";
    StaleGeneration "stale_generation" "SYN: policy changed since connect.";
    MapFull "map_full" "SYN: no room for the record.";
    Opened "opened" "handshake: a recorded connection reached its application.";
    OpenedAgent "opened_agent" "handshake: the agent accepted.";
    OpenedUnrecorded "opened_unrecorded" "handshake: an application accepted what has no record; cut.";
    OpenedStale "opened_stale" "handshake: policy changed since the SYN; cut.";
    OpenedForged "opened_forged" "handshake: completed by something else than the recorded socket; cut.";
    Closed "closed" "close: the record is removed.";
    LookupToAgent "lookup_to_agent" "arrival: recorded outbound flow, to the agent.";
    LookupAuthorised "lookup_authorised" "arrival: authorised, to the application.";
    LookupHbone "lookup_hbone" "arrival: tunnel, to the agent.";
    LookupPlaintext "lookup_plaintext" "arrival: plaintext, to the agent.";
    LookupNoRecord "lookup_no_record" "arrival: for an address that is not the pod's and without a record; dropped.";
    LookupSelfUnrecorded "lookup_self_unrecorded" "arrival: from the pod itself without a record; dropped.";
    LookupIllegalPort "lookup_illegal_port" "arrival: one of the mesh's own ports; dropped.";
    LookupRefused "lookup_refused" "arrival: its record refuses it; dropped.";
    LookupStale "lookup_stale" "arrival: its authorisation is of an older policy; dropped.";
    LookupUnknownPod "lookup_unknown_pod" "arrival: the pod is not in the map; dropped.";
    LookupAssignFailed "lookup_assign_failed" "arrival: the agent's listener is gone; dropped.";
    LookupOther "lookup_other" "arrival: not TCP, left alone.";
    EventLost "event_lost" "the ring buffer of events was full.";
    PodQuota "pod_quota" "connect: the pod has as many live connections as one pod may have.";
    Probe "probe" "connect: the kubelet probes a declared port.";
    LookupProbe "lookup_probe" "arrival: a probe of the kubelet, to the application.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions_and_names_are_unique() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            assert_eq!(Reason::from_number(i as u32), Some(*reason));
            assert_eq!(Reason::ALL.iter().filter(|other| other.name() == reason.name()).count(), 1);
        }
        assert_eq!(Reason::from_number(Reason::ALL.len() as u32), None);
    }
}
