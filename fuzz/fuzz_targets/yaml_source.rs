//! Kubernetes YAML as users write it.

use mesh_control::source::parse;

pub const TARGET: crate::Target = crate::Target {
    name: "yaml_source",
    seeds,
    dictionary: &[
        b"\n---\n",
        b"apiVersion: ",
        b"kind: ",
        b"metadata:\n  name: ",
        b"spec:\n",
        b"- ",
        b"  ",
        b": ",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!binary ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\"",
        b"|\n",
        b"\t",
        b"#",
        b"? ",
        b"null",
        b"1e999",
        b"kind: List\nitems:\n",
    ],
    run,
};

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = [
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}\nspec: {serviceAccountName: web}\nstatus: {phase: Running, podIP: 10.244.1.2}\n",
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  clusterIP: 10.96.0.1\n  selector: {app: web}\n  ports: [{port: 80, targetPort: http}]\n",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec:\n  parentRefs: [{kind: Service, name: web, group: ''}]\n  rules:\n  - matches: [{path: {type: PathPrefix, value: /a}}]\n    backendRefs: [{name: web, port: 80, weight: 9}]\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n  action: DENY\n  rules:\n  - from: [{source: {principals: [cluster.local/ns/a/sa/b]}}]\n",
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n# empty\n---\n{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {\"name\": \"n\"}}\n",
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .into();
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/bookinfo/mesh");
    let files = std::fs::read_dir(examples).into_iter().flatten().flatten();
    seeds.extend(files.filter_map(|file| std::fs::read(file.path()).ok()));
    seeds
}

fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let parsed = parse("fuzz.yaml", &text);
    // Everything that YAML takes for the end of a line.
    let lines = 1 + text.matches(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count();
    for problem in &parsed.problems {
        assert!(!problem.reason.is_empty());
        assert!(problem.line <= lines + 1, "line {} of {lines}: {problem:?}", problem.line);
    }
}
