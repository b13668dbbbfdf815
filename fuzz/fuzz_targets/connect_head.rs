//! What a peer writes into the head of a tunnel: authority, baggage, forwarded, the claimed client.

use mesh_core::{
    id::Identity,
    tunnel::{format_authority, forwarded_host, parse_authority, parse_baggage},
};

pub const TARGET: crate::Target = crate::Target {
    name: "connect_head",
    seeds,
    dictionary: &[
        b":",
        b"[",
        b"]",
        b"::",
        b"::ffff:",
        b"%eth0",
        b"@",
        b"0",
        b"65536",
        b"127.0.0.1",
        b"host=",
        b"for=\"",
        b"k8s.pod.name=",
        b"service.name=",
        b",",
        b";",
        b"\"",
        b"spiffe://",
        b"/ns/",
        b"/sa/",
        b"..",
        b"%2f",
        b"\0",
    ],
    run,
};

fn seeds() -> Vec<Vec<u8>> {
    [
        "10.244.1.2:8080",
        "[fd00:244:1::2]:8080",
        "[::ffff:10.244.1.2]:8080",
        "reviews.default.svc.cluster.local:9080",
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=web,service.name=web,service.version=v1",
        "for=\"10.244.1.2:4000\";host=reviews.default.svc.cluster.local",
        "for=\"[fd00::1]:4000\";host=\"reviews\"",
        "spiffe://cluster.local/ns/shop/sa/web",
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .into()
}

fn run(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(authority) = parse_authority(text) {
            // What is accepted is exactly one spelling of one address.
            assert_eq!(parse_authority(&format_authority(authority)), Ok(authority), "{text:?}");
            assert_ne!(authority.port(), 0, "{text:?}");
            assert!(text.is_ascii() && !text.contains(['%', '@', ' ']), "{text:?}");
        }
        if let Ok(identity) = Identity::parse(text) {
            assert_eq!(identity.to_string(), text);
        }
    }
    if let Some(host) = forwarded_host(data) {
        assert!(host.len() <= data.len());
    }
    let lines: Vec<&[u8]> = data.split(|byte| *byte == b'\n').collect();
    let _hints = parse_baggage(lines);
}
