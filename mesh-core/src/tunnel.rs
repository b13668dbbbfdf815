//! HBONE on paper: ports, the CONNECT authority, and the headers that describe the two ends (`wire-protocol.md` 2).
//! Parsers take a peer's bytes: they refuse, they never panic.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::model::Workload;

/// HBONE, in every pod.
pub const HBONE_PORT: u16 = 15008;
/// Outbound capture, in every pod.
pub const OUTBOUND_PORT: u16 = 15001;
/// Inbound plaintext, in every pod.
pub const INBOUND_PORT: u16 = 15006;
/// Ports that no connection may be made to on behalf of a peer (`wire-protocol.md` P12).
pub const ILLEGAL_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT];
/// The original client, stated by a waypoint; believed only from the bound waypoint's certificate.
pub const CLIENT_HEADER: &str = "x-undermesh-client";
/// Longest authority that is read: `[v6]:port` has at most 47 characters.
const MAX_AUTHORITY_BYTES: usize = 64;
/// Longest baggage or forwarded header that is read, bytes.
const MAX_HEADER_BYTES: usize = 4096;
/// Baggage members that are read.
const MAX_BAGGAGE_MEMBERS: usize = 32;

/// A peer's value that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an address and port")]
pub struct MalformedAuthority;

/// Reads `ip:port` or `[v6]:port` strictly: canonical decimal port other than 0, no user part, no scope id, no zeros in
/// front. A v4-mapped address is folded.
///
/// # Errors
/// [`MalformedAuthority`] for anything else, host names included.
pub fn parse_authority(text: &str) -> Result<SocketAddr, MalformedAuthority> {
    if text.len() > MAX_AUTHORITY_BYTES {
        return Err(MalformedAuthority);
    }
    let (host, port) = text.rsplit_once(':').ok_or(MalformedAuthority)?;
    let ip: IpAddr = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(Some(inner)) => inner.parse::<Ipv6Addr>().map_err(|_| MalformedAuthority)?.into(),
        Some(None) => return Err(MalformedAuthority),
        None => host.parse::<Ipv4Addr>().map_err(|_| MalformedAuthority)?.into(),
    };
    let canonical = !port.starts_with('0') && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| canonical).ok_or(MalformedAuthority)?;
    Ok(SocketAddr::new(ip.to_canonical(), port))
}

/// Writes what [`parse_authority`] reads.
pub fn format_authority(address: SocketAddr) -> String {
    SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
}

/// What `baggage` tells about a workload: for telemetry only, never for a decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: Option<String>,
    /// `k8s.namespace.name`.
    pub namespace: Option<String>,
    /// `k8s.<type>.name`: the controller's name.
    pub workload: Option<String>,
    /// `service.name`.
    pub service: Option<String>,
    /// `service.version`.
    pub version: Option<String>,
    /// `cloud.region`.
    pub region: Option<String>,
    /// `cloud.availability_zone`.
    pub zone: Option<String>,
}

/// Describes a workload (`wire-protocol.md` 2.4).
pub fn baggage_of(workload: &Workload) -> String {
    let pairs = [
        ("k8s.cluster.name", &workload.cluster),
        ("k8s.namespace.name", &workload.namespace),
        ("k8s.pod.name", &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ];
    let mut text = String::new();
    for (key, value) in pairs {
        // Names of Kubernetes objects need no escapes; anything else is left out rather than misread.
        let plain = value.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b',' | b'=' | b';'));
        if !value.is_empty() && plain {
            let comma = if text.is_empty() { "" } else { "," };
            let _ = write!(text, "{comma}{key}={value}");
        }
    }
    text
}

/// Reads baggage header lines: any order, unknown keys and members without `=` are ignored, the last value wins, one
/// line that is not ASCII or too long voids all (H25).
pub fn parse_baggage<'a>(lines: impl IntoIterator<Item = &'a [u8]>) -> Baggage {
    let mut baggage = Baggage::default();
    let mut members = 0;
    for line in lines {
        if line.len() > MAX_HEADER_BYTES || !line.is_ascii() {
            return Baggage::default();
        }
        let Ok(text) = str::from_utf8(line) else { return Baggage::default() };
        for member in text.split(',') {
            members += 1;
            if members > MAX_BAGGAGE_MEMBERS {
                return Baggage::default();
            }
            let Some((key, value)) = member.trim().split_once('=') else { continue };
            let field = match key {
                "k8s.cluster.name" => &mut baggage.cluster,
                "k8s.namespace.name" => &mut baggage.namespace,
                "k8s.deployment.name" | "k8s.cronjob.name" | "k8s.pod.name" | "k8s.job.name" => {
                    &mut baggage.workload
                }
                "service.name" => &mut baggage.service,
                "service.version" => &mut baggage.version,
                "cloud.region" => &mut baggage.region,
                "cloud.availability_zone" => &mut baggage.zone,
                _ => continue,
            };
            *field = Some(value.to_owned());
        }
    }
    baggage
}

/// The `forwarded` header of a CONNECT: the client, and the service's host name if it is known (H16).
pub fn forwarded(client: SocketAddr, service: Option<&str>) -> String {
    match service {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    }
}

/// The `host=` parameter of a `forwarded` header: a hint for telemetry (H19).
pub fn forwarded_host(line: &[u8]) -> Option<&str> {
    if line.len() > MAX_HEADER_BYTES {
        return None;
    }
    let text = str::from_utf8(line).ok()?;
    let host = text.split(';').find_map(|part| {
        let (name, value) = part.trim().split_once('=')?;
        name.eq_ignore_ascii_case("host").then_some(value)
    })?;
    let host = host.trim_matches('"');
    let plain = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'*'));
    (!host.is_empty() && plain).then_some(host)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn authorities_are_read_strictly() {
        for (text, expected) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[fd00::1]:8080", "[fd00::1]:8080"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ] {
            assert_eq!(parse_authority(text), Ok(expected.parse().unwrap()), "{text}");
        }
        for text in [
            "",
            ":",
            "10.0.0.1",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "10.0.0.1:080",
            "10.0.0.1:+80",
            "10.0.0.1.:80",
            "010.0.0.1:80",
            "user@10.0.0.1:80",
            "fd00::1:80",
            "[fe80::1%eth0]:80",
            "[10.0.0.1]:80",
            "[fd00::1]:",
            "[fd00::1]80",
            "localhost:80",
            "10.0.0.1:80 ",
            "10.0.0.1:80\0",
            "10.0.0.1:80/",
            "10.0.0.1,10.0.0.2:80",
        ] {
            assert_eq!(parse_authority(text), Err(MalformedAuthority), "{text:?}");
        }
        assert!(parse_authority(&format!("{}:80", "1".repeat(65_536))).is_err());
    }

    #[test]
    fn baggage_is_a_hint_that_never_fails() {
        let read =
            parse_baggage([b"k8s.namespace.name=shop,junk, service.name=a".as_slice(), b"service.name=b"]);
        assert_eq!((read.namespace.as_deref(), read.service.as_deref()), (Some("shop"), Some("b")));
        assert_eq!(parse_baggage([b"service.name=a".as_slice(), b"\xff=x"]), Baggage::default());
        assert_eq!(parse_baggage([b",".repeat(5000).as_slice()]), Baggage::default());
    }

    #[test]
    fn only_the_host_of_forwarded_is_read() {
        let line = forwarded("10.0.0.1:5".parse().unwrap(), Some("a.shop.svc.cluster.local"));
        assert_eq!(line, "for=\"10.0.0.1:5\";host=a.shop.svc.cluster.local");
        assert_eq!(forwarded_host(line.as_bytes()), Some("a.shop.svc.cluster.local"));
        assert_eq!(forwarded_host(b"host=\"quoted.example\""), Some("quoted.example"));
        for bad in [&b"host=a b"[..], b"for=x", b"host=", b"\xff", b"host=a\r\nx"] {
            assert_eq!(forwarded_host(bad), None);
        }
    }

    proptest! {
        #[test]
        fn authorities_round_trip(ip: IpAddr, port in 1_u16..) {
            let address = SocketAddr::new(ip.to_canonical(), port);
            prop_assert_eq!(parse_authority(&format_authority(address)), Ok(address));
        }

        #[test]
        fn no_bytes_make_the_parsers_panic(text: String, bytes: Vec<u8>) {
            let _ = parse_authority(&text);
            let _ = parse_baggage([bytes.as_slice()]);
            let _ = forwarded_host(&bytes);
        }
    }
}
