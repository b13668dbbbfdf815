use mesh_core::id::Identity;

use super::*;
use crate::telemetry::log::{LogFormat, capture};

#[test]
fn a_line_names_both_ends_in_order() {
    let got = capture::lines(LogFormat::Text, || {
        let mut record = AccessRecord::open(Side::Outbound, "10.0.0.1:5000".parse().ok());
        record.details.src.workload = Some("web-1".into());
        record.details.src.identity = Some(Identity::new("td", "shop", "web"));
        record.details.dst.addr = "10.0.0.2:15008".parse().ok();
        record.details.hbone_addr = Some("10.0.0.2:80".into());
        record.details.path = Some(Path::Tunnel);
        record.counters().add_a_to_b(5);
        record.counters().add_b_to_a(9);
        record.close(Outcome::Complete);
    });
    let (before, after) = got[0].split_once(" duration=\"").unwrap();
    assert_eq!(
        before,
        "T\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:5000 src.workload=\"web-1\" \
         src.identity=\"spiffe://td/ns/shop/sa/web\" dst.addr=10.0.0.2:15008 \
         dst.hbone_addr=\"10.0.0.2:80\" direction=\"outbound\" bytes_sent=5 bytes_recv=9"
    );
    assert!(after.ends_with("ms\" path=\"tunnel\""), "{after}");
}

#[test]
fn the_servers_agent_sends_what_the_server_answered() {
    let got = capture::lines(LogFormat::Text, || {
        let record = AccessRecord::open(Side::Inbound, None);
        record.counters().add_a_to_b(5);
        record.counters().add_b_to_a(9);
        record.fail(Flag::PolicyDenied, "denied by shop/deny-all");
    });
    assert!(got[0].contains("bytes_sent=9 bytes_recv=5"), "{got:?}");
    assert!(got[0].starts_with("T\tinfo\taccess\tconnection complete\t"), "{got:?}");
    assert!(got[0].ends_with("flag=\"POLICY_DENIED\" error=\"denied by shop/deny-all\""), "{got:?}");
}

#[test]
fn a_dropped_record_is_aborted() {
    let metrics = Metrics::new("ztunnel", "test");
    let got = capture::lines(LogFormat::Text, || {
        let mut record = AccessRecord::open(Side::Inbound, None);
        record.count(&metrics, TcpLabels::new(Side::Inbound));
        drop(record);
    });
    assert!(got[0].contains("flag=\"ABORTED\""), "{got:?}");
    let text = metrics.render();
    assert!(text.contains("undermesh_refused_total{flag=\"ABORTED\"} 1"), "{text}");
    assert!(text.contains("istio_tcp_sockets_open{reporter=\"destination\"} 0"), "{text}");
}

#[test]
fn values_of_peers_cannot_write_lines() {
    assert_eq!(clean("plain"), "plain");
    assert_eq!(clean("a\nb\x1b[0m\0"), "a\\nb\\u{1b}[0m\\u{0}");
    let long = "ä".repeat(1000);
    let cut = clean(&long);
    assert!(cut.len() <= LOG_VALUE_BYTES && cut.ends_with("..."), "{}", cut.len());
}
