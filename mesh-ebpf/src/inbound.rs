//! sk_lookup, one per pod: who gets a SYN that arrives in the pod's namespace. Addresses stay as they are.

use aya_ebpf::{bindings::BPF_SK_LOOKUP_F_NO_REUSEPORT, programs::SkLookupContext};
use mesh_ebpf_common::{
    HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT,
    map::{
        FLOW_DIRECT, FLOW_PROBE, FLOW_SELF, FLOW_TO_AGENT, FlowKey, SLOT_HBONE, SLOT_OUTBOUND, SLOT_PLAINTEXT,
    },
    reason::Reason,
};

use crate::{
    ctx,
    maps::{self, FLOWS, LISTENERS, OWN_FLOWS},
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// Where an arrival goes.
enum Door {
    /// Whoever listens there.
    Application(Reason),
    /// A listener of the agent, by its slot.
    Agent(u32, Reason),
    Nowhere(Reason),
}

/// Decides about one arrival and returns what the hook returns.
#[inline(always)]
pub fn arrive(cx: &SkLookupContext) -> u32 {
    let Some((ends, six)) = ctx::arrival(cx) else {
        maps::count(Reason::LookupOther);
        return SK_PASS;
    };
    let (netns, first_slot) = maps::this_pod();
    let key = FlowKey {
        netns,
        src: ends.remote.ip,
        dst: ends.local.ip,
        sport: ends.remote.port,
        dport: ends.local.port,
        pad: 0,
    };
    match door(&key) {
        Door::Application(reason) => {
            maps::count(reason);
            SK_PASS
        }
        Door::Nowhere(reason) => {
            maps::count(reason);
            refused!(cx, reason, &key);
            SK_DROP
        }
        Door::Agent(slot, reason) => {
            let slot = first_slot + slot + u32::from(six);
            // Exactly this socket: a process of the pod must not join by SO_REUSEPORT.
            match LISTENERS.redirect_sk_lookup(cx, slot, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT)) {
                Ok(()) => {
                    maps::count(reason);
                    SK_PASS
                }
                Err(_) => {
                    maps::count(Reason::LookupAssignFailed);
                    refused!(cx, Reason::LookupAssignFailed, &key);
                    SK_DROP
                }
            }
        }
    }
}

#[inline(always)]
fn door(key: &FlowKey) -> Door {
    let port = key.dport.host();
    // A record is left in place: a repeated SYN looks it up again.
    // SAFETY: the record repeats its key, which is compared.
    if let Some(record) = unsafe { FLOWS.get(key) } {
        let (kind, generation, accepted) = (record.kind, record.generation, record.server_socket != 0);
        if record.key != *key {
            return Door::Nowhere(Reason::LookupNoRecord);
        }
        return match kind {
            FLOW_TO_AGENT => Door::Agent(SLOT_OUTBOUND, Reason::LookupToAgent),
            FLOW_SELF => Door::Application(Reason::LookupAuthorised),
            FLOW_DIRECT if generation != maps::config().0 => Door::Nowhere(Reason::LookupStale),
            // One connection, one handshake.
            FLOW_DIRECT | FLOW_PROBE if accepted => Door::Nowhere(Reason::LookupRefused),
            FLOW_PROBE => Door::Application(Reason::LookupProbe),
            FLOW_DIRECT => Door::Application(Reason::LookupAuthorised),
            _ => Door::Nowhere(Reason::LookupRefused),
        };
    }
    if port == HBONE_PORT {
        return unrecorded(key, Door::Agent(SLOT_HBONE, Reason::LookupHbone));
    }
    // SAFETY: only one number is read.
    if let Some(record) = unsafe { OWN_FLOWS.get(key) } {
        return match record.server_socket {
            0 => Door::Application(Reason::LookupAuthorised),
            _ => Door::Nowhere(Reason::LookupRefused),
        };
    }
    if port == OUTBOUND_PORT || port == INBOUND_PORT {
        return Door::Nowhere(Reason::LookupIllegalPort);
    }
    unrecorded(key, Door::Agent(SLOT_PLAINTEXT, Reason::LookupPlaintext))
}

/// Only an address of the pod is served without a record, and only from outside: a marked packet that was looped
/// back, or a call to oneself whose record found no room, is neither.
#[inline(always)]
fn unrecorded(key: &FlowKey, door: Door) -> Door {
    if maps::pod(key.netns).is_none() {
        return Door::Nowhere(Reason::LookupUnknownPod);
    }
    if !maps::is_own_address(&key.dst, key.netns) {
        return Door::Nowhere(Reason::LookupNoRecord);
    }
    if maps::is_self(&key.src, key.netns) && OWN_FLOWS.get_ptr(key).is_none() {
        return Door::Nowhere(Reason::LookupSelfUnrecorded);
    }
    door
}
