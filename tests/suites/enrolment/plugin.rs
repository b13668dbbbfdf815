//! The plugin as a container runtime meets it, with an agent that is played, broken or absent.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixListener,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::bed::{call, call_with, nowhere, until};

fn conf(socket: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "net", "type": "undermesh-cni",
        "agentSocket": socket, "exemptNamespaces": ["kube-system"], "timeoutSeconds": 1,
        "prevResult": { "cniVersion": "1.0.0", "ips": [{ "address": "10.0.0.9/24" }], "dns": { "domain": "x" } },
    })
}

/// Answers every connection with `answer`, once a request has come; gives back the first request.
fn played(socket: &Path, answer: &'static str) -> thread::JoinHandle<String> {
    let listener = UnixListener::bind(socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let asked = || listener.accept().map_err(|error| error.to_string());
        let (mut stream, _) = until("the plugin to ask", asked);
        stream.set_nonblocking(false).unwrap();
        let mut request = String::new();
        let mut buffer = [0; 4096];
        while !request.ends_with('}') {
            let n = stream.read(&mut buffer).unwrap();
            request.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
        }
        stream.write_all(answer.as_bytes()).unwrap();
        request
    })
}

#[test]
fn versions_are_told_without_anything_else() {
    let answer = call_with("VERSION", r#"{"cniVersion":"0.4.0"}"#, &nowhere(), "");
    assert!(answer.ok);
    assert_eq!(answer.json()["cniVersion"], "0.4.0");
    let supported = answer.json()["supportedVersions"].clone();
    assert!(
        ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
            .iter()
            .all(|v| supported.as_array().unwrap().contains(&json!(v)))
    );
    assert_eq!(call_with("DANCE", "{}", &nowhere(), "").error().0, 4);
}

#[test]
fn without_an_agent_nothing_starts_but_what_must() {
    let directory = tempfile::tempdir().unwrap();
    let conf = conf(&directory.path().join("cni.sock"));
    let (code, text) = call("ADD", &conf, &nowhere(), "shop").error();
    assert_eq!(code, 11);
    assert!(
        text.starts_with("undermesh: pod shop/web does not start: the mesh's agent of this node"),
        "{text}"
    );
    assert!(text.ends_with("[AGENT_UNAVAILABLE]") && text.contains("No such file"), "{text}");
    let exempt = call("ADD", &conf, &nowhere(), "kube-system");
    assert!(exempt.ok && exempt.json() == conf["prevResult"], "{exempt:?}");
    let no_pod = call_with("ADD", &conf.to_string(), &nowhere(), "");
    assert!(no_pod.ok && no_pod.json() == conf["prevResult"], "{no_pod:?}");
    // A removal that fails would keep the pod for ever; a status that fails would take the node out of service.
    for command in ["DEL", "GC", "STATUS"] {
        let called = call(command, &conf, &nowhere(), "shop");
        assert!(called.ok && called.text.is_empty(), "{command}: {called:?}");
    }
    assert!(call_with("DEL", "nonsense", &nowhere(), "").ok);
    assert!(!call("CHECK", &conf, &nowhere(), "shop").ok);
}

#[test]
fn it_stands_in_a_chain_of_a_version_it_knows() {
    let mut alone = conf(Path::new("/none"));
    alone.as_object_mut().unwrap().remove("prevResult");
    assert_eq!(call("ADD", &alone, &nowhere(), "shop").error().0, 7);
    let mut old = conf(Path::new("/none"));
    old["cniVersion"] = "0.2.0".into();
    assert_eq!(call("ADD", &old, &nowhere(), "shop").error().0, 1);
    assert_eq!(call_with("ADD", "{", &nowhere(), "").error().0, 6);
}

#[test]
fn an_agent_that_is_silent_is_not_waited_for_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let begin = Instant::now();
    let (code, text) = call("ADD", &conf(&socket), &nowhere(), "shop").error();
    assert!(code == 11 && text.contains("no answer within 1 s"), "{text}");
    assert!(begin.elapsed() < Duration::from_secs(30), "it waited");
}

#[test]
fn what_the_agent_says_counts() {
    let directory = tempfile::tempdir().unwrap();
    let check = |name: &str, answer: &'static str, namespace: &str| {
        let socket = directory.path().join(name);
        let agent = played(&socket, answer);
        let called = call("ADD", &conf(&socket), &nowhere(), namespace);
        (called, agent.join().unwrap())
    };
    let (called, request) =
        check("a", "HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"enrolled\":true}", "shop");
    assert!(called.ok && called.json() == conf(Path::new("/"))["prevResult"], "{called:?}");
    assert!(request.starts_with("PUT /sandboxes/container-web HTTP/1.1\r\n"), "{request}");
    let body: Value = serde_json::from_str(request.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(
        body,
        json!({ "namespace": "shop", "name": "web", "uid": "u", "netns": "/run/netns/none",
                "ips": ["10.0.0.9"], "exempt": false })
    );
    let refusal =
        "HTTP/1.1 500 No\r\ncontent-length: 39\r\n\r\n{\"error\":\"no room\",\"reason\":\"MAP_FULL\"}";
    let (called, _) = check("b", refusal, "kube-system");
    let (code, text) = called.error();
    assert_eq!(
        (code, text.as_str()),
        (100, "undermesh: pod kube-system/web does not start: the mesh's agent: no room [MAP_FULL]")
    );
    // Whoever shuts down is not who decides.
    let leaving =
        "HTTP/1.1 503 No\r\ncontent-length: 37\r\n\r\n{\"error\":\"shutdown\",\"reason\":\"DRAIN\"}";
    let (called, _) = check("d", leaving, "shop");
    assert!(called.error().1.ends_with("[AGENT_UNAVAILABLE]"), "{called:?}");
    // An answer that breaks off is none: asked again, and in the end nobody is there.
    let (called, _) = check("c", "HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"enro", "shop");
    assert_eq!(called.error().0, 11);
}
