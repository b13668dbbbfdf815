//! The difference between what the maps hold and what they should hold, written so that at every moment they permit
//! no more than both: takings first, then the generation, then the sweep of live flows, then givings.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use mesh_ebpf_common::{
    map::{
        CONFIG_NO_DIRECT, Endpoint, EndpointKey, FLOW_DIRECT, MAX_ENDPOINTS_OF_ONE, ProbeKey, Probed,
        SERVICE_AGENT, Service, ServiceKey, VERDICT_AGENT, VERDICT_ALLOW, VERDICT_DENY, VerdictEntry,
        VerdictKey,
    },
    wire::{PortBe, Target},
};

use super::{
    Inner, direct,
    maps::Maps,
    pods::{Served, end},
    types::{DirectFlow, KernelError, KernelState, PairVerdict, ServiceState, SyncReport},
};

type Verdicts = BTreeMap<(u32, u32, u16), PairVerdict>;

/// What the maps hold, as far as this process knows.
#[derive(Default)]
pub struct Held {
    verdicts: Verdicts,
    /// `None`: a former process wrote it, so it is written again.
    services: BTreeMap<SocketAddr, Option<ServiceState>>,
    probes: BTreeSet<(u32, u16)>,
}

impl Held {
    /// Reads what a former process left.
    pub fn read(maps: &Maps) -> Result<Self, KernelError> {
        let verdicts = maps.verdicts.entries()?.into_iter().map(|(key, entry)| {
            let verdict = match entry.verdict {
                VERDICT_ALLOW => PairVerdict::Allow,
                VERDICT_DENY => PairVerdict::Deny,
                _ => PairVerdict::Agent,
            };
            ((key.src, key.dst, key.port.host()), verdict)
        });
        let services = maps.services.entries()?.into_iter().map(|(key, _)| (key.0.to_socket(), None));
        let probes = maps.probes.entries()?.into_iter().map(|(key, _)| (key.pod, key.port.host()));
        Ok(Self { verdicts: verdicts.collect(), services: services.collect(), probes: probes.collect() })
    }
}

impl Inner {
    pub fn sync(&self, want: &KernelState) -> Result<SyncReport, KernelError> {
        // In this order everywhere.
        let served = self.pods.lock();
        let mut held = self.held.lock();
        let mut report = SyncReport::default();
        let no_direct = want.no_direct || !self.can_destroy;
        let before = self.maps.config()?.flags & CONFIG_NO_DIRECT != 0;
        if no_direct && !before {
            self.maps.configure(|config| config.flags |= CONFIG_NO_DIRECT)?;
        }
        let (gone, new) = difference(&held.verdicts, &want.verdicts);
        let (denials, permissions): (Vec<_>, Vec<_>) =
            new.into_iter().partition(|(_, verdict)| *verdict != PairVerdict::Allow);
        let mut took = !gone.is_empty() || !denials.is_empty() || (no_direct && !before);
        // A port of its own overrides what any other port had.
        took |= permissions.iter().any(|(key, _)| held.verdicts.contains_key(key));
        // Denials first: a port's own denial may go only when the one of any other port is there.
        let mut taken = self.take_probes(&mut held, want, &mut report);
        for (key, verdict) in denials {
            taken = taken.and_then(|()| self.write_verdict(&mut held, key, verdict, &mut report));
        }
        for key in gone {
            taken = taken.and_then(|()| self.take_verdict(&mut held, key, &mut report));
        }
        if taken.is_err() {
            // What is to be refused could not be written: nothing goes directly until it can.
            self.maps.configure(|config| config.flags |= CONFIG_NO_DIRECT)?;
        }
        if took {
            self.raise_generation()?;
            // Twice: what was between its record and its handshake at the first look is seen by the second.
            for _ in 0..2 {
                report.cut.extend(self.sweep(want, no_direct, &served)?);
            }
        }
        taken?;
        for (key, verdict) in permissions {
            self.write_verdict(&mut held, key, verdict, &mut report)?;
        }
        self.give_probes(&mut held, want, &mut report)?;
        self.sync_services(&mut held, want, &mut report)?;
        if !no_direct && before {
            self.maps.configure(|config| config.flags &= !CONFIG_NO_DIRECT)?;
        }
        report.generation = self.maps.config()?.generation;
        Ok(report)
    }

    fn take_verdict(
        &self,
        held: &mut Held,
        key: (u32, u32, u16),
        report: &mut SyncReport,
    ) -> Result<(), KernelError> {
        self.maps.verdicts.remove(&verdict_key(key))?;
        held.verdicts.remove(&key);
        report.removed += 1;
        Ok(())
    }

    fn write_verdict(
        &self,
        held: &mut Held,
        key: (u32, u32, u16),
        verdict: PairVerdict,
        report: &mut SyncReport,
    ) -> Result<(), KernelError> {
        let number = match verdict {
            PairVerdict::Allow => VERDICT_ALLOW,
            PairVerdict::Deny => VERDICT_DENY,
            PairVerdict::Agent => VERDICT_AGENT,
        };
        let map_key = verdict_key(key);
        self.maps.verdicts.set(&map_key, &VerdictEntry { key: map_key, verdict: number })?;
        held.verdicts.insert(key, verdict);
        report.written += 1;
        Ok(())
    }

    /// Ends the direct flows that `want` does not permit; an error when one could not be ended. Flows of pods that have
    /// left go on.
    fn sweep(
        &self,
        want: &KernelState,
        no_direct: bool,
        served: &Served,
    ) -> Result<Vec<DirectFlow>, KernelError> {
        let (mut cut, mut refused) = (Vec::new(), None);
        let enrolled = |netns| self.maps.pods.get(&netns).map(|pod| pod.is_some());
        for (_, record) in self.maps.flows.entries()? {
            if record.kind != FLOW_DIRECT {
                continue;
            }
            let flow = direct(&record);
            let pair = (flow.src_pod.id, flow.dst_pod.id);
            let exact = want.verdicts.get(&(pair.0, pair.1, flow.dst.port()));
            let verdict = exact.or_else(|| want.verdicts.get(&(pair.0, pair.1, 0)));
            if !no_direct && verdict == Some(&PairVerdict::Allow) {
                continue;
            }
            if !enrolled(flow.src_pod.netns)? || !enrolled(flow.dst_pod.netns)? {
                continue;
            }
            match end(served, &flow) {
                Ok(true) => cut.push(flow),
                Ok(false) => {}
                // One that stays does not keep the others.
                Err(error) => refused = Some(error),
            }
        }
        refused.map_or(Ok(cut), Err)
    }

    fn sync_services(
        &self,
        held: &mut Held,
        want: &KernelState,
        report: &mut SyncReport,
    ) -> Result<(), KernelError> {
        let gone: Vec<SocketAddr> =
            held.services.keys().filter(|at| !want.services.contains_key(at)).copied().collect();
        for at in gone {
            let key = ServiceKey(at.into());
            if let Some(old) = self.maps.services.get(&key)? {
                self.maps.services.remove(&key)?;
                self.drop_endpoints(old)?;
            }
            held.services.remove(&at);
            report.removed += 1;
        }
        for (at, state) in &want.services {
            if held.services.get(at).is_some_and(|now| now.as_ref() == Some(state)) {
                continue;
            }
            self.write_service(*at, state)?;
            held.services.insert(*at, Some(state.clone()));
            report.written += 1;
        }
        Ok(())
    }

    /// A new list under a new number, then the service points to it, then the old list goes.
    fn write_service(&self, at: SocketAddr, state: &ServiceState) -> Result<(), KernelError> {
        let key = ServiceKey(at.into());
        let old = self.maps.services.get(&key)?;
        let new = match state {
            ServiceState::Endpoints(endpoints) if fits(endpoints) => self.write_endpoints(endpoints)?,
            _ => Service { flags: SERVICE_AGENT, ..Service::default() },
        };
        if let Err(error) = self.maps.services.set(&key, &new) {
            self.drop_endpoints(new)?;
            return Err(error);
        }
        old.map_or(Ok(()), |old| self.drop_endpoints(old))
    }

    fn write_endpoints(&self, endpoints: &[(SocketAddr, u32)]) -> Result<Service, KernelError> {
        let id = self.maps.config()?.next_service;
        self.maps.configure(|config| config.next_service = config.next_service.wrapping_add(1))?;
        let mut service = Service { id, count: 0, weight: 0, flags: 0 };
        for (to, weight) in endpoints.iter().filter(|(_, weight)| *weight > 0) {
            let key = EndpointKey { service: id, index: service.count };
            let cumulative = service.weight + weight;
            if let Err(error) = self.maps.endpoints.set(&key, &Endpoint { to: Target::from(*to), cumulative })
            {
                self.drop_endpoints(service)?;
                return Err(error);
            }
            service.count += 1;
            service.weight = cumulative;
        }
        Ok(service)
    }

    fn drop_endpoints(&self, service: Service) -> Result<(), KernelError> {
        for index in 0..service.count {
            self.maps.endpoints.remove(&EndpointKey { service: service.id, index })?;
        }
        Ok(())
    }

    fn take_probes(
        &self,
        held: &mut Held,
        want: &KernelState,
        report: &mut SyncReport,
    ) -> Result<(), KernelError> {
        let gone: Vec<_> = held.probes.difference(&want.probes).copied().collect();
        for key in gone {
            self.maps.probes.remove(&probe_key(key))?;
            held.probes.remove(&key);
            report.removed += 1;
        }
        Ok(())
    }

    fn give_probes(
        &self,
        held: &mut Held,
        want: &KernelState,
        report: &mut SyncReport,
    ) -> Result<(), KernelError> {
        let new: Vec<_> = want.probes.difference(&held.probes).copied().collect();
        for key in new {
            self.maps.probes.set(&probe_key(key), &Probed(1))?;
            held.probes.insert(key);
            report.written += 1;
        }
        Ok(())
    }

    /// Probe ports of a pod that goes.
    pub fn forget_probes(&self, pod: u32) -> Result<(), KernelError> {
        let mut held = self.held.lock();
        let gone: Vec<_> = held.probes.range((pod, 0)..=(pod, u16::MAX)).copied().collect();
        for key in gone {
            self.maps.probes.remove(&probe_key(key))?;
            held.probes.remove(&key);
        }
        Ok(())
    }

    /// Verdicts of a pod that goes.
    pub fn forget_verdicts(&self, pod: u32) -> Result<(), KernelError> {
        let mut held = self.held.lock();
        let gone: Vec<_> =
            held.verdicts.keys().filter(|(src, dst, _)| *src == pod || *dst == pod).copied().collect();
        for key in gone {
            self.maps.verdicts.remove(&verdict_key(key))?;
            held.verdicts.remove(&key);
        }
        Ok(())
    }

    /// From now on no authorisation of before is honoured.
    pub fn raise_generation(&self) -> Result<(), KernelError> {
        self.maps.configure(|config| config.generation += 1).map(drop)
    }
}

/// More than the bounded search reaches, or than the sum can hold, is the agent's business.
fn fits(endpoints: &[(SocketAddr, u32)]) -> bool {
    let sum: u64 = endpoints.iter().map(|(_, weight)| u64::from(*weight)).sum();
    endpoints.len() <= MAX_ENDPOINTS_OF_ONE as usize && u32::try_from(sum).is_ok()
}

fn probe_key((pod, port): (u32, u16)) -> ProbeKey {
    ProbeKey { pod, port: PortBe::from_host(port), pad: 0 }
}

fn verdict_key((src, dst, port): (u32, u32, u16)) -> VerdictKey {
    VerdictKey::new(src, dst, PortBe::from_host(port))
}

/// Keys to remove, entries to write.
#[expect(clippy::type_complexity, reason = "two lists of map entries, named by the comment")]
fn difference(
    held: &Verdicts,
    want: &Verdicts,
) -> (Vec<(u32, u32, u16)>, Vec<((u32, u32, u16), PairVerdict)>) {
    let gone = held.keys().filter(|key| !want.contains_key(key)).copied().collect();
    let new =
        want.iter().filter(|(key, verdict)| held.get(key) != Some(verdict)).map(|(k, v)| (*k, *v)).collect();
    (gone, new)
}
