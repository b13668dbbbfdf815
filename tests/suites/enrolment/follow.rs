//! Agent, plugin and control plane together.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use mesh_core::tunnel::HBONE_PORT;
use mesh_ebpf_common::{
    LAYOUT,
    map::{MAX_SERVICES, Service, ServiceKey},
    wire::{Ip, PortBe, Target},
};
use mesh_tests::netns;
use serde_json::Value;

use crate::bed::{Bed, Sandbox, Server, call, echoes, until};

/// A pod may start within this time in the dark; less than the plugin's own patience.
const HELD: Duration = Duration::from_millis(500);

/// Pods that are started one after the other.
const PODS: u8 = 9;

#[test]
fn a_pod_starts_when_it_is_captured_and_not_before_it_is_known() {
    let mut bed = Bed::new();
    bed.primary();
    let sandbox = bed.sandbox("a", 2);
    bed.control();
    bed.agent();
    bed.until_ready();
    thread::scope(|scope| {
        let adding = scope.spawn(|| bed.add(&sandbox));
        thread::sleep(HELD);
        assert!(!adding.is_finished(), "a pod that nobody knows was let through: {:?}", adding.join());
        bed.pod(&sandbox, false);
        let called = adding.join().unwrap();
        assert!(called.ok && called.json() == bed.conf(&sandbox)["prevResult"], "{called:?}");
        // In force when the answer comes, not soon after.
        assert_eq!(bed.captured(&sandbox), Ok(true));
    });
    assert!(call("CHECK", &bed.conf(&sandbox), &sandbox, "shop").ok);
    // The status that comes later says the same.
    bed.pod(&sandbox, true);
    bed.until_state(&sandbox, "enrolled");
    // Of another sandbox of this pod nothing is captured; of a pod that started without the agent nothing is wanted.
    let mut other = bed.sandbox_like(&sandbox, "a");
    other.uid.clone_from(&sandbox.uid);
    other.netns = "/run/netns/none".into();
    let refused = call("CHECK", &bed.conf(&other), &other, "shop");
    assert!(!refused.ok && refused.text.contains("another sandbox"), "{refused:?}");
    let stranger = bed.sandbox_like(&other, "stranger");
    let fine = call("CHECK", &bed.conf(&stranger), &stranger, "kube-system");
    assert!(fine.ok, "{fine:?}");
    assert!(call("DEL", &bed.conf(&sandbox), &sandbox, "shop").ok);
    assert_eq!(bed.captured(&sandbox), Ok(false));
}

/// While the agent is down, the plugin starts pods of namespaces that it says are not in the mesh: it must know of those
/// whose pods are all on other nodes.
#[test]
fn namespaces_of_other_nodes_are_known_to_the_plugin() {
    let mut bed = Bed::new();
    bed.primary();
    bed.control();
    bed.agent_with(&["--cni-when-down=refuse-known"]);
    bed.until_ready();
    let known = || fs::read_to_string(bed.at("state").join("namespaces.json")).unwrap_or_default();
    until("the file of namespaces", || if known().starts_with('[') { Ok(()) } else { Err(known()) });
    assert!(!known().contains("elsewhere"));
    bed.write(
        "elsewhere.yaml",
        "apiVersion: v1\nkind: Namespace\n\
         metadata: {name: elsewhere, labels: {istio.io/dataplane-mode: ambient}}\n---\n\
         apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: elsewhere, uid: uid-elsewhere}\n\
         spec: {nodeName: n2, serviceAccountName: p, containers: [{name: c, image: c}]}\n\
         status: {phase: Running, podIPs: [{ip: 10.45.1.9}]}\n",
    );
    until("the other namespace to be known", || match known().contains("\"elsewhere\"") {
        true => Ok(()),
        false => Err(known()),
    });
}

#[test]
fn the_label_of_a_running_pod_takes_effect_and_is_taken_back() {
    let mut bed = Bed::new();
    bed.label(false);
    let (mut sandbox, outside) = (bed.sandbox("a", 2), bed.serve(None, 8081));
    fs::write(bed.at("results").join("net-c-eth0"), sandbox.cached()).unwrap();
    bed.pod(&sandbox, true);
    bed.control();
    bed.agent();
    let why = bed.until_state(&sandbox, "outside");
    assert!(why.starts_with("NotLabelled"), "{why}");
    assert_eq!(bed.captured(&sandbox), Ok(false));
    let to = SocketAddr::new([10, 45, 0, 1].into(), 8081);
    let mut before = sandbox.dial(to).unwrap();
    assert!(echoes(&mut before));

    bed.label(true);
    bed.until_state(&sandbox, "enrolled");
    assert_eq!(bed.captured(&sandbox), Ok(true));
    assert!(echoes(&mut before), "a connection from before goes on");
    let mut during = sandbox.dial(to).unwrap();
    assert!(echoes(&mut during));

    // Another address, while it is served: nothing that is open ends, and the new one is known.
    fs::remove_file(bed.at("results").join("net-c-eth0")).unwrap();
    bed.move_to(&mut sandbox, 3);
    let moved = bed.add(&sandbox);
    assert!(moved.ok, "{moved:?}");
    let pods = bed.ask("/pods").unwrap();
    assert_eq!(pods[0]["ips"], serde_json::json!(["10.45.0.3"]), "{pods}");
    assert!(echoes(&mut during), "an open connection does not see the change");
    assert_eq!(bed.captured(&sandbox), Ok(true));

    bed.label(false);
    bed.until_state(&sandbox, "outside");
    assert_eq!(bed.captured(&sandbox), Ok(false));
    assert!(echoes(&mut sandbox.dial(to).unwrap()));
    drop(outside);
}

#[test]
fn what_cannot_be_found_is_told_and_tried_again() {
    let mut bed = Bed::new();
    let sandbox = bed.sandbox("a", 2);
    bed.pod(&sandbox, true);
    bed.control();
    bed.agent();
    let why = bed.until_state(&sandbox, "failed");
    assert!(why.starts_with("NETNS_UNKNOWN: "), "{why}");
    let told = |expected: bool| {
        until("the control plane to be told", || {
            let status = control_status(&bed)?;
            let nacks = status["proxies"][0]["nacks"].as_array().cloned().unwrap_or_default();
            let mine = nacks.iter().any(|nack| nack.to_string().contains("NETNS_UNKNOWN"));
            if mine == expected { Ok(()) } else { Err(status.to_string()) }
        });
    };
    told(true);
    fs::write(bed.at("results").join("net-c-eth0"), sandbox.cached()).unwrap();
    bed.until_state(&sandbox, "enrolled");
    assert_eq!(bed.captured(&sandbox), Ok(true));
    told(false);
}

fn control_status(bed: &Bed) -> Result<Value, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (socket, deadline) = (bed.at("control.sock"), Duration::from_secs(5));
    let asked = mesh_net::admin::call(&socket, mesh_net::admin::Method::GET, "/status", "", deadline);
    let (_, body) = runtime.block_on(asked).map_err(|error| error.to_string())?;
    serde_json::from_slice(&body).map_err(|error| error.to_string())
}

/// A pod that was started with the mesh, and what it may dial outside of it.
fn started() -> (Bed, Sandbox, Server, SocketAddr) {
    let mut bed = Bed::new();
    let sandbox = bed.sandbox("a", 2);
    let outside = bed.serve(None, 8081);
    bed.pod(&sandbox, false);
    bed.control();
    bed.agent();
    assert!(bed.add(&sandbox).ok);
    bed.pod(&sandbox, true);
    (bed, sandbox, outside, SocketAddr::new([10, 45, 0, 1].into(), 8081))
}

fn until_served(sandbox: &Sandbox, to: SocketAddr) {
    until("the pod to be served", || {
        let mut stream = sandbox.dial(to).map_err(|error| error.to_string())?;
        if echoes(&mut stream) { Ok(()) } else { Err("no echo".to_owned()) }
    });
}

#[test]
fn an_agent_that_lost_everything_lets_nothing_out_before_it_knows() {
    let (mut bed, sandbox, _outside, to) = started();
    fs::write(bed.at("results").join("net-c-eth0"), sandbox.cached()).unwrap();
    until_served(&sandbox, to);
    bed.kill("mesh-node");
    assert!(sandbox.dial(to).is_err(), "without its agent it reaches nothing");
    let refused = bed.add(&bed.sandbox_like(&sandbox, "b"));
    assert!(refused.error().1.contains("AGENT_UNAVAILABLE"), "{refused:?}");

    // What the agent kept is gone, the control plane is away: it knows nothing, and releases nothing.
    bed.kill("mesh-control");
    for file in ["pods.json", "sandboxes.json"] {
        fs::remove_file(bed.at("state").join(file)).unwrap();
    }
    bed.agent();
    until("the agent to answer", || bed.ask("/kernel").map(drop).ok_or_else(|| "no answer".to_owned()));
    assert!(sandbox.dial(to).is_err(), "an agent that knows nothing let it out");
    bed.control();
    bed.until_state(&sandbox, "enrolled");
    until_served(&sandbox, to);
    // Its end is noticed also without a call of the plugin.
    bed.remove(&sandbox);
    until("the pod to be gone", || match bed.captured(&sandbox)? {
        true => Err("still captured".to_owned()),
        false => Ok(()),
    });
}

#[test]
fn a_static_pod_is_the_one_that_its_mirror_names() {
    let mut bed = Bed::new();
    let sandbox = bed.sandbox("a", 2);
    bed.static_pod(&sandbox, &sandbox.uid);
    bed.control();
    bed.agent();
    assert!(bed.add(&sandbox).ok);
    let mirror = Sandbox { uid: format!("mirror-{}", sandbox.name), ..sandbox.clone() };
    bed.until_state(&mirror, "enrolled");
    assert_eq!(bed.captured(&mirror), Ok(true));
    // Somebody else's pod that claims to be it is not.
    let thief = Sandbox { name: "thief".to_owned(), uid: "mirror-thief".to_owned(), ..sandbox.clone() };
    bed.static_pod(&thief, &sandbox.uid);
    until("the other pod to be told of", || bed.followed(&thief));
    assert_eq!((bed.captured(&mirror), bed.captured(&thief)), (Ok(true), Ok(false)));
}

/// While an agent is away, whoever is in the pod may bind the ports that the next one needs.
#[test]
fn a_pod_whose_ports_are_taken_from_its_agent_has_no_connection_around_it() {
    let (mut bed, sandbox, _outside, to) = started();
    bed.until_state(&sandbox, "enrolled");
    bed.kill("mesh-node");
    let taken = netns::within(&sandbox.netns, || Ok(TcpListener::bind(("0.0.0.0", HBONE_PORT))?)).unwrap();
    bed.agent();
    let why = bed.until_state(&sandbox, "failed");
    assert!(why.contains("in use"), "{why}");
    // With every change that it is told of it tries again.
    for number in 0..5 {
        assert!(sandbox.dial(to).is_err(), "it has a connection around its agent");
        let told = bed.sandbox_like(&sandbox, &format!("b{number}"));
        bed.pod(&told, false);
        until("the agent to be told of another pod", || bed.followed(&told));
    }
    assert!(sandbox.dial(to).is_err(), "it has a connection around its agent");
    drop(taken);
    bed.until_state(&sandbox, "enrolled");
    until_served(&sandbox, to);
}

#[test]
fn the_plugin_comes_and_goes_with_the_mesh() {
    let mut bed = Bed::new();
    let sandbox = bed.sandbox("a", 2);
    bed.pod(&sandbox, false);
    bed.control();
    bed.agent();
    until("the agent to miss the primary", || {
        let (socket, deadline) = (bed.at("agent.sock"), Duration::from_secs(5));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let asked =
            mesh_net::admin::call(&socket, mesh_net::admin::Method::GET, "/healthz/ready", "", deadline);
        let (status, body) = runtime.block_on(asked).map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&body).into_owned();
        if status == 503 && said.contains("cni: no network configuration") { Ok(()) } else { Err(said) }
    });
    bed.primary();
    bed.until_ready();
    let ours = bed.at("conf").join("00-undermesh.conflist");
    let conf: Value = serde_json::from_slice(&fs::read(&ours).unwrap()).unwrap();
    assert_eq!(
        (&conf["plugins"][0]["type"], &conf["plugins"][1]["type"]),
        (&"bridge".into(), &"undermesh-cni".into())
    );
    fs::remove_file(&ours).unwrap();
    until("our configuration to be back", || if ours.exists() { Ok(()) } else { Err(String::new()) });

    assert!(bed.add(&sandbox).ok);
    assert_eq!(bed.captured(&sandbox), Ok(true));
    let released = bed.release();
    assert!(released.status.success(), "{released:?}");
    assert_eq!(bed.captured(&sandbox), Ok(false));
    assert!(!ours.exists() && !bed.at("bin").join("undermesh-cni").exists());
    // Whoever still calls the plugin is let through.
    assert!(bed.add(&sandbox).ok);
    assert_eq!(bed.captured(&sandbox), Ok(false));

    bed.kill("mesh-node");
    let cleaned = bed.clean();
    assert!(cleaned.status.success(), "{cleaned:?}");
    assert!(!bed.at("state").exists(), "{:?}", fs::read_dir(bed.at("state")).map(Iterator::count));
    let left = fs::read_dir(bed.bpffs()).unwrap().count();
    assert_eq!(left, 0, "pins are left");
}

#[test]
fn the_first_packet_of_a_pod_never_gets_out_whatever_the_agent_does() {
    let mut bed = Bed::new();
    // Nothing of the mesh may go to where the mesh knows nobody: whatever arrives there was not captured.
    bed.registry_only();
    let to = SocketAddr::new([10, 45, 0, 1].into(), 8081);
    let outside = bed.listen(8081);
    bed.control();
    bed.agent();
    let mut started = 0;
    for number in 0..PODS {
        let sandbox = bed.sandbox(&format!("p{number}"), number + 2);
        bed.pod(&sandbox, false);
        match number % 3 {
            // The agent is there, is just starting, or dies while it is asked.
            1 => {
                bed.kill("mesh-node");
                bed.agent();
            }
            2 => {
                bed.kill_soon("mesh-node", Duration::from_millis(u64::from(number) * 7));
            }
            _ => {}
        }
        let called = bed.add(&sandbox);
        if called.ok {
            started += 1;
            // As the pod's first process would.
            if let Ok(mut stream) = sandbox.dial(to) {
                let _ = echoes(&mut stream);
            }
        } else {
            let (code, text) = called.error();
            assert!(code == 11 && text.ends_with("[AGENT_UNAVAILABLE]"), "{text}");
        }
        if number % 3 == 2 {
            bed.restarted("mesh-node");
        }
    }
    assert!(started >= PODS / 2, "only {started} of {PODS} pods started");
    let arrived = outside.arrived();
    assert!(arrived.is_empty(), "in the clear, from {arrived:?}");
}

/// The map of services is filled by somebody else, so that the next one has no room.
#[test]
fn a_kernel_that_takes_no_more_is_told_and_tried_again() {
    let mut bed = Bed::new();
    bed.primary();
    let sandbox = bed.sandbox("a", 2);
    bed.pod(&sandbox, true);
    fs::write(bed.at("results").join("net-a-eth0"), sandbox.cached()).unwrap();
    bed.control();
    bed.agent();
    bed.until_state(&sandbox, "enrolled");
    bed.until_ready();
    let pin = bed.bpffs().join("undermesh").join(LAYOUT).join("n1/maps/SERVICES");
    let pinned = Map::from_map_data(MapData::from_pin(pin).unwrap()).unwrap();
    let mut services = HashMap::<_, ServiceKey, Service>::try_from(pinned).unwrap();
    let foreign =
        |number| ServiceKey(Target::new(Ip::from_v6_be([0xfd, 0, 0, number]), PortBe::from_host(1)));
    for number in 0..MAX_SERVICES {
        services.insert(foreign(number), Service::default(), 0).unwrap();
    }
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n\
                   spec: {clusterIP: 10.96.0.9, selector: {app: a}, ports: [{port: 80, targetPort: 8080}]}\n";
    bed.write("service.yaml", service);
    let full = "kernel: the kernel map SERVICES is full";
    until("the agent to say what is missing", || match bed.ready() {
        Ok(()) => Err("ready".to_owned()),
        Err(pending) if pending.contains(full) => Ok(()),
        Err(pending) => Err(pending),
    });

    for number in 0..MAX_SERVICES {
        services.remove(&foreign(number)).unwrap();
    }
    // Nobody changes anything more: it tries again by itself.
    bed.until_ready();
}
