//! Tables, and every combination of facts against a second, naive statement of the rules.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use super::*;

#[derive(Default)]
struct Maps {
    services: HashMap<ServiceKey, Service>,
    endpoints: HashMap<EndpointKey, Endpoint>,
    local: HashMap<Ip, LocalPod>,
    verdicts: HashMap<VerdictKey, VerdictEntry>,
    probes: HashSet<ProbeKey>,
    chance: Cell<u32>,
}

impl World for Maps {
    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }
    fn endpoint(&self, key: &EndpointKey) -> Option<&Endpoint> {
        self.endpoints.get(key)
    }
    fn local(&self, ip: &Ip) -> Option<&LocalPod> {
        self.local.get(ip)
    }
    fn verdict(&self, key: &VerdictKey) -> Option<&VerdictEntry> {
        self.verdicts.get(key)
    }
    fn probed(&self, key: &ProbeKey) -> bool {
        self.probes.contains(key)
    }
    fn chance(&self) -> u32 {
        self.chance.get()
    }
}

fn target(text: &str) -> Target {
    text.parse::<SocketAddr>().unwrap().into()
}

const ME: Caller = Caller { enrolled: true, kubelet: false, exhausted: false, pod: 1, netns: 100, config: 0 };
/// The kubelet, in the node's own namespace.
const KUBELET: Caller = Caller { enrolled: false, kubelet: true, pod: 0, netns: 1, ..ME };

impl Maps {
    /// Pod 1 (the caller) and pod 2 are local, one address of each family.
    fn new() -> Self {
        let mut maps = Self::default();
        for (ip, netns, pod) in
            [("10.0.0.1", 100, 1), ("fd00::1", 100, 1), ("10.0.0.2", 200, 2), ("fd00::2", 200, 2)]
        {
            let ip: std::net::IpAddr = ip.parse().unwrap();
            maps.local.insert(ip.into(), LocalPod { netns, pod, pad: 0 });
        }
        maps
    }

    fn verdict(mut self, port: u16, verdict: u32) -> Self {
        let key = VerdictKey::new(1, 2, PortBe::from_host(port));
        self.verdicts.insert(key, VerdictEntry { key, verdict });
        self
    }

    fn service(mut self, vip: &str, flags: u32, endpoints: &[(&str, u32)]) -> Self {
        let id = self.services.len() as u32 + 1;
        let mut weight = 0;
        for (index, (to, share)) in endpoints.iter().enumerate() {
            weight += share;
            let key = EndpointKey { service: id, index: index as u32 };
            self.endpoints.insert(key, Endpoint { to: target(to), cumulative: weight });
        }
        let count = endpoints.len() as u32;
        self.services.insert(ServiceKey(target(vip)), Service { id, count, weight, flags });
        self
    }

    fn way(&self, to: &str) -> (Way, Reason) {
        let verdict = self.decide(to);
        (verdict.way, verdict.reason)
    }

    fn decide(&self, to: &str) -> Verdict {
        decide(&Call { to: target(to), transport: Transport::Tcp, own: false }, &ME, self)
    }
}

const AGENT: (Way, Reason) = (Way::Agent, Reason::ToAgent);
const DIRECT: (Way, Reason) = (Way::Direct, Reason::Direct);
const MYSELF: (Way, Reason) = (Way::SelfCall, Reason::SelfCall);
const DENIED: (Way, Reason) = (Way::Deny, Reason::PolicyDenied);
const ILLEGAL: (Way, Reason) = (Way::Deny, Reason::IllegalPort);

#[test]
fn who_is_left_alone() {
    let maps = Maps::new().verdict(0, VERDICT_DENY);
    let to = target("10.0.0.2:80");
    let reason = |transport, own, enrolled| {
        let verdict = decide(&Call { to, transport, own }, &Caller { enrolled, ..ME }, &maps);
        (verdict.way, verdict.reason)
    };
    for transport in [Transport::Tcp, Transport::OtherStream, Transport::Other] {
        for own in [false, true] {
            assert_eq!(reason(transport, own, false), (Way::Alone, Reason::NotOurs));
        }
    }
    assert_eq!(reason(Transport::Other, false, true), (Way::Alone, Reason::Uncaptured));
    assert_eq!(reason(Transport::OtherStream, false, true), (Way::Deny, Reason::UnsupportedSocket));
    assert_eq!(reason(Transport::Tcp, true, true), (Way::Alone, Reason::Own));
    assert_eq!(reason(Transport::Tcp, false, true), DENIED);
}

#[test]
fn a_pod_calls_itself_without_policy_but_never_the_agent() {
    let maps = Maps::new();
    for host in
        ["127.0.0.1", "127.8.8.8", "[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", "10.0.0.1", "[fd00::1]"]
    {
        assert_eq!(maps.way(&format!("{host}:80")), MYSELF, "{host}");
        for port in [15001, 15006, 15008] {
            assert_eq!(maps.way(&format!("{host}:{port}")), ILLEGAL, "{host}:{port}");
        }
    }
}

#[test]
fn the_verdict_of_the_port_wins_over_that_of_any_other() {
    let check = |maps: Maps, expected: [(Way, Reason); 2]| {
        assert_eq!([maps.way("10.0.0.2:80"), maps.way("[fd00::2]:81")], expected);
    };
    check(Maps::new(), [AGENT, AGENT]);
    check(Maps::new().verdict(0, VERDICT_ALLOW), [DIRECT, DIRECT]);
    check(Maps::new().verdict(0, VERDICT_DENY), [DENIED, DENIED]);
    check(Maps::new().verdict(0, VERDICT_ALLOW).verdict(80, VERDICT_DENY), [DENIED, DIRECT]);
    check(Maps::new().verdict(0, VERDICT_DENY).verdict(80, VERDICT_ALLOW), [DIRECT, DENIED]);
    check(Maps::new().verdict(0, VERDICT_ALLOW).verdict(80, 3), [AGENT, DIRECT]);
    check(Maps::new().verdict(80, VERDICT_ALLOW), [DIRECT, AGENT]);
    // Not a number that means anything.
    check(Maps::new().verdict(0, 77), [AGENT, AGENT]);
}

#[test]
fn a_verdict_that_was_given_to_another_pair_while_read_is_not_believed() {
    let mut maps = Maps::new().verdict(0, VERDICT_ALLOW).verdict(80, VERDICT_ALLOW);
    for entry in maps.verdicts.values_mut() {
        entry.key.src = 7;
    }
    assert_eq!(maps.way("10.0.0.2:80"), AGENT);
    assert_eq!(maps.way("10.0.0.2:81"), AGENT);
}

#[test]
fn the_agent_s_ports_of_another_pod_and_port_zero_are_never_direct() {
    let maps = Maps::new().verdict(0, VERDICT_ALLOW);
    for port in [15001, 15006, 15008, 0] {
        assert_eq!(maps.way(&format!("10.0.0.2:{port}")), AGENT, "{port}");
    }
}

#[test]
fn without_direct_only_refusals_are_the_kernel_s() {
    let maps = Maps::new().verdict(80, VERDICT_ALLOW).verdict(81, VERDICT_DENY);
    let way = |port| {
        let call = Call { to: target(&format!("10.0.0.2:{port}")), transport: Transport::Tcp, own: false };
        decide(&call, &Caller { config: CONFIG_NO_DIRECT, ..ME }, &maps).way
    };
    assert_eq!([way(80), way(81), way(82)], [Way::Agent, Way::Deny, Way::Agent]);
}

#[test]
fn a_service_is_translated_only_where_it_is_direct_or_oneself() {
    let maps = || Maps::new().verdict(0, VERDICT_ALLOW);
    let verdict = maps().service("10.96.0.1:80", 0, &[("10.0.0.2:8080", 1)]).decide("10.96.0.1:80");
    assert_eq!((verdict.way, verdict.to, verdict.translated()), (Way::Direct, target("10.0.0.2:8080"), true));
    assert_eq!(verdict.local, LocalPod { netns: 200, pod: 2, pad: 0 });
    let verdict = maps().service("10.96.0.1:80", 0, &[("10.0.0.1:8080", 1)]).decide("10.96.0.1:80");
    assert_eq!(
        (verdict.way, verdict.to, verdict.translated()),
        (Way::SelfCall, target("10.0.0.1:8080"), true)
    );
    // Not local: the agent gets the address as dialled, and the choice.
    let verdict = maps().service("10.96.0.1:80", 0, &[("10.9.9.9:8080", 1)]).decide("10.96.0.1:80");
    assert_eq!((verdict.way, verdict.to, verdict.translated()), (Way::Agent, target("10.96.0.1:80"), false));
    assert_eq!(verdict.choice, target("10.9.9.9:8080"));
    // Another family cannot be had on this socket.
    let verdict = maps().service("10.96.0.1:80", 0, &[("[fd00::2]:8080", 1)]).decide("10.96.0.1:80");
    assert_eq!(
        (verdict.way, verdict.to, verdict.choice),
        (Way::Agent, target("10.96.0.1:80"), target("[fd00::2]:8080"))
    );
    // A waypoint, no endpoints, a list that is being replaced: the agent.
    for maps in [
        maps().service("10.96.0.1:80", SERVICE_AGENT, &[("10.0.0.2:8080", 1)]),
        maps().service("10.96.0.1:80", 0, &[]),
        {
            let mut maps = maps().service("10.96.0.1:80", 0, &[("10.0.0.2:8080", 1)]);
            maps.endpoints.clear();
            maps
        },
    ] {
        let verdict = maps.decide("10.96.0.1:80");
        assert_eq!((verdict.way, verdict.choice.port.host()), (Way::Agent, 0));
    }
    // The agent's port behind a service of oneself.
    assert_eq!(maps().service("10.96.0.1:80", 0, &[("10.0.0.1:15006", 1)]).way("10.96.0.1:80"), ILLEGAL);
    // Another port of the VIP is no service.
    assert_eq!(maps().service("10.96.0.1:80", 0, &[("10.0.0.2:8080", 1)]).way("10.96.0.1:81"), AGENT);
}

#[test]
fn endpoints_get_exactly_their_weight_wherever_they_are() {
    for count in [1, 2, 3, 7, 64, 1000] {
        let names: Vec<String> = (0..count).map(|i| format!("10.7.{}.{}:80", i / 256, i % 256)).collect();
        let weights: Vec<u32> = (0..count).map(|i| 1 + i % 5).collect();
        let endpoints: Vec<_> = names.iter().map(String::as_str).zip(weights.iter().copied()).collect();
        let maps = Maps::new().service("10.96.0.1:80", 0, &endpoints);
        let mut hits: HashMap<Target, u32> = HashMap::new();
        for chance in 0..weights.iter().sum() {
            maps.chance.set(chance);
            *hits.entry(maps.decide("10.96.0.1:80").choice).or_default() += 1;
        }
        for (name, weight) in endpoints {
            assert_eq!(hits[&target(name)], weight, "{name} of {count}");
        }
    }
}

#[test]
fn only_the_kubelet_and_only_a_declared_port_of_a_local_pod_is_a_probe() {
    let mut maps = Maps::new().verdict(0, VERDICT_DENY).service("10.96.0.1:8080", 0, &[("10.0.0.2:8080", 1)]);
    for port in [8080, 15008] {
        maps.probes.insert(ProbeKey { pod: 2, port: PortBe::from_host(port), pad: 0 });
    }
    let way = |caller: Caller, to, transport| {
        let verdict = decide(&Call { to: target(to), transport, own: false }, &caller, &maps);
        (verdict.way, verdict.reason, verdict.translated())
    };
    let alone = (Way::Alone, Reason::NotOurs, false);
    let probe = (Way::Probe, Reason::Probe, false);
    for to in ["10.0.0.2:8080", "[fd00::2]:8080", "[::ffff:10.0.0.2]:8080"] {
        assert_eq!(way(KUBELET, to, Transport::Tcp), probe, "{to}");
        assert_eq!(way(KUBELET, to, Transport::Other), alone, "{to}");
        assert_eq!(way(KUBELET, to, Transport::OtherStream), alone, "{to}");
        assert_eq!(way(Caller { kubelet: false, ..KUBELET }, to, Transport::Tcp), alone, "{to}");
        // A pod is a pod, whoever runs in it.
        assert_eq!(way(Caller { kubelet: true, ..ME }, to, Transport::Tcp).0, Way::Deny, "{to}");
    }
    // Another port, another pod, an address that is no pod's, a service, a port of the agent.
    for to in ["10.0.0.2:80", "10.0.0.1:8080", "10.9.9.9:8080", "10.96.0.1:8080", "10.0.0.2:15008"] {
        assert_eq!(way(KUBELET, to, Transport::Tcp), alone, "{to}");
    }
}

#[test]
fn a_pod_with_too_many_connections_gets_no_more() {
    let maps = Maps::new().verdict(0, VERDICT_ALLOW);
    let way = |to, own, transport| {
        let caller = Caller { exhausted: true, ..ME };
        let verdict = decide(&Call { to: target(to), transport, own }, &caller, &maps);
        (verdict.way, verdict.reason)
    };
    for to in ["10.0.0.2:80", "10.3.3.3:80", "127.0.0.1:80", "10.0.0.1:80"] {
        assert_eq!(way(to, false, Transport::Tcp), (Way::Deny, Reason::PodQuota), "{to}");
        // What takes no record is not concerned.
        assert_eq!(way(to, true, Transport::Tcp), (Way::Alone, Reason::Own), "{to}");
        assert_eq!(way(to, false, Transport::Other), (Way::Alone, Reason::Uncaptured), "{to}");
    }
}

/// The rules again, as a reader of the architecture would write them down.
fn naive(dst: &str, port: u16, own: bool, verdict: Option<u32>, no_direct: bool) -> Way {
    let oneself = dst == "127.0.0.1" || dst == "10.0.0.1" || dst == "fd00::1";
    let illegal = [15001, 15006, 15008].contains(&port);
    match (own, oneself, dst == "10.0.0.2", verdict) {
        (true, ..) => Way::Alone,
        (_, true, ..) if illegal => Way::Deny,
        (_, true, ..) => Way::SelfCall,
        (_, _, true, Some(VERDICT_DENY)) => Way::Deny,
        (_, _, true, Some(VERDICT_ALLOW)) if !no_direct && !illegal => Way::Direct,
        _ => Way::Agent,
    }
}

#[test]
fn every_combination_of_facts_is_decided_as_the_rules_say() {
    for dst in ["127.0.0.1", "10.0.0.1", "fd00::1", "10.0.0.2", "10.3.3.3"] {
        for port in [80, 15001, 15006, 15008] {
            for own in [false, true] {
                for verdict in [None, Some(VERDICT_ALLOW), Some(VERDICT_DENY), Some(3)] {
                    for no_direct in [false, true] {
                        let maps = verdict.map_or_else(Maps::new, |verdict| Maps::new().verdict(0, verdict));
                        let caller = Caller { config: u32::from(no_direct), ..ME };
                        let to = Target::new(
                            dst.parse::<std::net::IpAddr>().unwrap().into(),
                            PortBe::from_host(port),
                        );
                        let got = decide(&Call { to, transport: Transport::Tcp, own }, &caller, &maps).way;
                        assert_eq!(
                            got,
                            naive(dst, port, own, verdict, no_direct),
                            "{dst}:{port} {own} {verdict:?} {no_direct}"
                        );
                    }
                }
            }
        }
    }
}
