//! The CNI specification's side (0.3.0 to 1.1.0): environment and configuration in, result or error out. Pure.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use serde::Deserialize;
use serde_json::{Value, json};

/// Versions of the specification whose results go through here unchanged.
pub const SUPPORTED: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// What is answered to a caller that names no version.
const NEWEST: &str = "1.1.0";
/// As long as a pod's start may take here, unless the configuration says otherwise: a failed attempt costs the
/// kubelet's back-off and another address.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Codes of errors; below 100 they are the specification's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The version of the configuration is not supported.
    Version = 1,
    /// The environment lacks a variable or has a wrong one.
    Environment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// What was read is not what it should be.
    Decode = 6,
    /// The configuration cannot be used.
    Config = 7,
    /// It may work later.
    TryAgain = 11,
    /// The agent refuses this sandbox.
    Refused = 100,
}

/// An error as the runtime is told of it; it ends up in an event of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    code: Code,
    text: String,
}

impl CniError {
    /// An error.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// As the specification wants it.
    pub fn json(&self, version: &str) -> String {
        json!({ "cniVersion": version, "code": self.code as u32, "msg": format!("undermesh: {}", self.text) })
            .to_string()
    }
}

/// What the runtime wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A sandbox starts.
    Add,
    /// A sandbox is looked at.
    Check,
    /// A sandbox ends.
    Del,
    /// Which versions are supported?
    Version,
    /// Forget what is no longer there.
    Gc,
    /// Can sandboxes be added?
    Status,
}

impl Command {
    /// From `CNI_COMMAND`.
    pub fn read(env: &dyn Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        match env("CNI_COMMAND").as_deref() {
            Some("ADD") => Ok(Self::Add),
            Some("CHECK") => Ok(Self::Check),
            Some("DEL") => Ok(Self::Del),
            Some("VERSION") => Ok(Self::Version),
            Some("GC") => Ok(Self::Gc),
            Some("STATUS") => Ok(Self::Status),
            Some(other) => Err(CniError::new(Code::Environment, format!("unknown CNI_COMMAND {other:?}"))),
            None => Err(CniError::new(Code::Environment, "CNI_COMMAND is missing")),
        }
    }
}

/// The pod, from `CNI_ARGS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID, where the runtime tells it.
    pub uid: Option<String>,
}

/// The environment of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The container: becomes part of a path.
    pub container: String,
    /// The network namespace.
    pub netns: Option<PathBuf>,
    /// The pod; none when this is no pod.
    pub pod: Option<PodName>,
}

impl Call {
    /// Reads it.
    pub fn read(env: &dyn Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let container = env("CNI_CONTAINERID").unwrap_or_default();
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        let starts = container.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !starts || container.len() > 256 || !container.bytes().all(legal) {
            let text = format!("CNI_CONTAINERID {container:?} is not usable");
            return Err(CniError::new(Code::Environment, text));
        }
        let netns = env("CNI_NETNS").filter(|path| !path.is_empty()).map(PathBuf::from);
        let arguments = env("CNI_ARGS").unwrap_or_default();
        let value = |key: &str| {
            let mut pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
            pairs.find(|(name, value)| *name == key && !value.is_empty()).map(|(_, value)| value.to_owned())
        };
        let pod = match (value("K8S_POD_NAMESPACE"), value("K8S_POD_NAME")) {
            (Some(namespace), Some(name)) => Some(PodName { namespace, name, uid: value("K8S_POD_UID") }),
            _ => None,
        };
        Ok(Self { container, netns, pod })
    }
}

/// What happens to pods while the agent does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenAgentIsDown {
    /// Only those of exempt namespaces start.
    #[default]
    Refuse,
    /// Those of namespaces that had no pods in the mesh when the agent was last there start too.
    RefuseKnown,
}

/// The result of the plugins before this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrevResult {
    /// As it goes on.
    pub text: String,
    /// The addresses inside the sandbox.
    pub addresses: Vec<IpAddr>,
}

/// The plugin's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConf {
    /// Version of the specification.
    pub version: String,
    /// The agent's socket.
    pub agent_socket: PathBuf,
    /// Namespaces that start whatever the agent does.
    pub exempt: Vec<String>,
    /// What else starts while it is down.
    pub when_down: WhenAgentIsDown,
    /// File with the namespaces that were in the mesh.
    pub known: Option<PathBuf>,
    /// As long as a start may take.
    pub timeout: Duration,
    /// The result of the plugins before.
    pub prev_result: Option<PrevResult>,
    /// Containers that still exist; in a GC.
    pub valid: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    #[serde(default)]
    cni_version: Option<String>,
    agent_socket: PathBuf,
    #[serde(default)]
    exempt_namespaces: Vec<String>,
    #[serde(default)]
    when_agent_is_down: WhenAgentIsDown,
    #[serde(default)]
    known_namespaces: Option<PathBuf>,
    #[serde(default)]
    timeout_seconds: Option<u64>,
    #[serde(default)]
    prev_result: Option<Value>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid: Vec<Attachment>,
}

#[derive(Deserialize)]
struct Attachment {
    #[serde(rename = "containerID")]
    container: String,
}

impl NetConf {
    /// Reads it.
    pub fn read(input: &[u8]) -> Result<Self, CniError> {
        let written: Written = serde_json::from_slice(input)
            .map_err(|error| CniError::new(Code::Decode, format!("the configuration: {error}")))?;
        let version = written.cni_version.unwrap_or_else(|| "0.1.0".to_owned());
        let prev_result = written.prev_result.map(|value| prev_result(value, &version)).transpose()?;
        Ok(Self {
            version,
            agent_socket: written.agent_socket,
            exempt: written.exempt_namespaces,
            when_down: written.when_agent_is_down,
            known: written.known_namespaces,
            timeout: written.timeout_seconds.map_or(TIMEOUT, Duration::from_secs),
            prev_result,
            valid: written.valid.into_iter().map(|attachment| attachment.container).collect(),
        })
    }
}

fn prev_result(mut value: Value, version: &str) -> Result<PrevResult, CniError> {
    let bad = |text: String| CniError::new(Code::Decode, format!("prevResult: {text}"));
    let addresses = addresses(&value).map_err(bad)?;
    let fields = value.as_object_mut().ok_or_else(|| bad("not an object".to_owned()))?;
    fields.entry("cniVersion").or_insert_with(|| version.into());
    Ok(PrevResult { text: value.to_string(), addresses })
}

/// Addresses of interfaces in the sandbox; an address that names no interface is the sandbox's too.
fn addresses(result: &Value) -> Result<Vec<IpAddr>, String> {
    let interfaces = result["interfaces"].as_array();
    let on_host = |ip: &Value| {
        let index = ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
        let named = index.and_then(|index| interfaces?.get(index));
        named.is_some_and(|interface| interface["sandbox"].as_str().unwrap_or_default().is_empty())
    };
    let listed = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    let address = |ip: &Value| {
        let text = ip["address"].as_str().unwrap_or_default();
        let host = text.split('/').next().unwrap_or_default();
        host.parse().map_err(|_| format!("{text:?} is no address"))
    };
    listed.iter().filter(|ip| !on_host(ip)).map(address).collect()
}

/// The version that the caller speaks, for answers to whatever it sent.
pub fn version_of(input: &[u8]) -> String {
    let value: Value = serde_json::from_slice(input).unwrap_or_default();
    let asked = value["cniVersion"].as_str().filter(|version| SUPPORTED.contains(version));
    asked.unwrap_or(NEWEST).to_owned()
}

/// The answer to VERSION.
pub fn versions(asked: &str) -> String {
    json!({ "cniVersion": asked, "supportedVersions": SUPPORTED }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_read_from_the_arguments() {
        let check = |arguments: &str, expected: Option<(&str, &str, Option<&str>)>| {
            let env = |name: &str| match name {
                "CNI_CONTAINERID" => Some("0123abc".to_owned()),
                "CNI_ARGS" => Some(arguments.to_owned()),
                _ => None,
            };
            let pod = Call::read(&env).unwrap().pod;
            let pod = pod.as_ref().map(|pod| (&*pod.namespace, &*pod.name, pod.uid.as_deref()));
            assert_eq!(pod, expected, "{arguments}");
        };
        check("", None);
        check("IgnoreUnknown=1;K8S_POD_NAME=web", None);
        check(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=1;K8S_POD_UID=u",
            Some(("shop", "web", Some("u"))),
        );
        check("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=", Some(("shop", "web", None)));
    }

    #[test]
    fn a_container_cannot_lead_to_another_path() {
        for bad in ["", "../x", "a/b", ".a", "a b", "a?b", &"a".repeat(300)] {
            let env = |name: &str| (name == "CNI_CONTAINERID").then(|| bad.to_owned());
            assert!(Call::read(&env).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn addresses_of_the_host_are_not_the_pods() {
        let check = |result: Value, expected: &[&str]| {
            let expected: Vec<IpAddr> = expected.iter().map(|text| text.parse().unwrap()).collect();
            assert_eq!(addresses(&result).unwrap(), expected, "{result}");
        };
        check(json!({}), &[]);
        check(json!({ "ips": [{ "address": "10.0.0.2/24" }] }), &["10.0.0.2"]);
        let interfaces = json!([{ "name": "br0" }, { "name": "eth0", "sandbox": "/run/netns/x" }]);
        check(
            json!({ "interfaces": interfaces, "ips": [
                { "address": "10.0.0.1/24", "interface": 0 },
                { "address": "10.0.0.2/24", "interface": 1 },
                { "version": "6", "address": "fd00::2/64", "interface": 1 },
            ] }),
            &["10.0.0.2", "fd00::2"],
        );
        assert!(addresses(&json!({ "ips": [{ "address": "x" }] })).is_err());
    }

    #[test]
    fn the_result_goes_on_as_it_came() {
        let conf = |prev: Value| {
            let text = json!({ "cniVersion": "1.0.0", "agentSocket": "/s", "prevResult": prev }).to_string();
            NetConf::read(text.as_bytes()).unwrap().prev_result.unwrap().text
        };
        let full = json!({ "cniVersion": "1.0.0", "dns": { "search": ["a"] }, "ips": [], "extra": [1, 2.5] });
        assert_eq!(serde_json::from_str::<Value>(&conf(full.clone())).unwrap(), full);
        assert_eq!(
            serde_json::from_str::<Value>(&conf(json!({}))).unwrap(),
            json!({ "cniVersion": "1.0.0" })
        );
    }

    #[test]
    fn errors_and_versions_have_the_specifications_form() {
        let error = CniError::new(Code::TryAgain, "later").json("0.4.0");
        assert_eq!(
            serde_json::from_str::<Value>(&error).unwrap(),
            json!({ "cniVersion": "0.4.0", "code": 11, "msg": "undermesh: later" })
        );
        assert_eq!(version_of(br#"{"cniVersion":"0.3.1"}"#), "0.3.1");
        assert_eq!(version_of(b"nonsense"), "1.1.0");
        assert!(versions("1.0.0").contains("\"0.3.1\""));
    }
}
