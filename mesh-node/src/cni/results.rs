//! Pods that ran before us: the container runtime's own record of what its CNI plugins made. The library with which
//! containerd and CRI-O call plugins keeps the result of each call in a file, with the pod's name and UID and the path
//! of its namespace, until the sandbox is removed.
//!
//! Why this and not the runtime's API: its socket would make this agent root on the node, and files need no client. Why
//! not a search for the pod's address in all namespaces: a pod that may configure its network can take the address of
//! another one, and with it its identity. These files only root can write.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

use super::on_node;

/// Where they are.
pub const DIRECTORY: &str = "/var/lib/cni/results";
/// Larger files are not read, bytes.
const FILE_BYTES: u64 = 1 << 20;

/// The place of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

/// One record, as far as it is of use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    namespace: String,
    name: String,
    uid: Option<String>,
    places: Vec<Place>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    kind: String,
    #[serde(default)]
    netns: Option<PathBuf>,
    #[serde(default)]
    cni_args: Vec<(String, String)>,
    #[serde(default)]
    result: Value,
}

/// All records, as they were when they were read.
#[derive(Clone, Debug, Default)]
pub struct Results(Vec<Record>);

impl Results {
    /// Reads them.
    ///
    /// # Errors
    /// The directory cannot be read; one that is not there is empty.
    pub fn read(directory: &Path) -> io::Result<Self> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.metadata().is_ok_and(|meta| !meta.is_file() || meta.len() > FILE_BYTES) {
                continue;
            }
            // Removed between the listing and now, maybe.
            let Ok(bytes) = fs::read(entry.path()) else { continue };
            records.extend(parse(&bytes));
        }
        Ok(Self(records))
    }

    /// The place of a pod; none when there is no record, or its namespace is gone. More than one place is none: it
    /// cannot be told which is the pod's.
    pub fn of(&self, uid: &str, namespace: &str, name: &str) -> Option<Place> {
        let mine = |record: &&Record| {
            let named = record.namespace == namespace && record.name == name;
            named && record.uid.as_ref().is_none_or(|known| known == uid)
        };
        let places = self.0.iter().filter(mine).flat_map(|record| &record.places);
        let mut found: Option<Place> = None;
        for place in places.filter(|place| place.netns.exists()) {
            match &mut found {
                None => found = Some(place.clone()),
                Some(known) if known.netns == place.netns => {
                    let more = place.ips.iter().copied().filter(|ip| !known.ips.contains(ip));
                    let more: Vec<IpAddr> = more.collect();
                    known.ips.extend(more);
                }
                Some(known) => {
                    tracing::warn!(uid, a = ?known.netns, b = ?place.netns, "a pod with two sandboxes");
                    return None;
                }
            }
        }
        found
    }
}

/// (pure) Reads one file; none when it is something else.
fn parse(bytes: &[u8]) -> Option<Record> {
    let Written { kind, netns, cni_args, result } = serde_json::from_slice(bytes).ok()?;
    if !kind.starts_with("cniCache") {
        return None;
    }
    let argument = |key: &str| {
        let found = cni_args.iter().find(|(name, value)| name == key && !value.is_empty());
        found.map(|(_, value)| value.clone())
    };
    let (namespace, name) = (argument("K8S_POD_NAMESPACE")?, argument("K8S_POD_NAME")?);
    let places = match netns.filter(|path| path.is_absolute()) {
        Some(netns) => vec![Place { ips: addresses(&result, |_| true), netns: on_node(&netns) }],
        // Older libraries keep the path only where plugins say it: at the interfaces that they made.
        None => sandboxes(&result),
    };
    Some(Record { namespace, name, uid: argument("K8S_POD_UID"), places })
}

fn sandboxes(result: &Value) -> Vec<Place> {
    let interfaces = result["interfaces"].as_array().map(Vec::as_slice).unwrap_or_default();
    let path = |interface: &Value| interface["sandbox"].as_str().unwrap_or_default().to_owned();
    let mut places: Vec<Place> = Vec::new();
    for sandbox in interfaces.iter().map(path).filter(|path| path.starts_with('/')) {
        let netns = on_node(Path::new(&sandbox));
        if !places.iter().any(|place| place.netns == netns) {
            let inside = |index: Option<usize>| {
                index.is_none_or(|index| interfaces.get(index).map(path).as_ref() == Some(&sandbox))
            };
            places.push(Place { ips: addresses(result, inside), netns });
        }
    }
    places
}

/// The addresses of the interfaces that are wanted; none names none.
fn addresses(result: &Value, wanted: impl Fn(Option<usize>) -> bool) -> Vec<IpAddr> {
    let listed = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    let index = |ip: &Value| ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
    let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse::<IpAddr>().ok();
    let wanted = listed.iter().filter(|ip| wanted(index(ip)));
    wanted.filter_map(address).filter(|ip| !ip.is_loopback()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(uid: Option<&str>, sandbox: &str, netns: Option<&str>) -> Vec<u8> {
        let mut arguments =
            vec![["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web"]];
        arguments.extend(uid.map(|uid| ["K8S_POD_UID", uid]));
        let mut value = json!({
            "kind": "cniCacheV1", "containerId": "c1", "ifName": "eth0", "networkName": "cbr0",
            "cniArgs": arguments,
            "result": {
                "cniVersion": "1.0.0",
                "interfaces": [{ "name": "br0" }, { "name": "eth0", "sandbox": sandbox }],
                "ips": [
                    { "address": "10.0.0.1/24", "interface": 0 },
                    { "address": "10.0.0.2/24", "interface": 1 },
                    { "address": "fd00::2/64", "interface": 1 },
                ],
            },
        });
        if let Some(netns) = netns {
            value["netns"] = netns.into();
        }
        value.to_string().into_bytes()
    }

    fn find(directory: &Path, uid: &str, namespace: &str, name: &str) -> Option<Place> {
        Results::read(directory).unwrap().of(uid, namespace, name)
    }

    #[test]
    fn a_pod_is_found_by_its_uid_where_its_namespace_still_is() {
        let directory = tempfile::tempdir().unwrap();
        let netns = directory.path().join("cni-1");
        fs::write(&netns, "").unwrap();
        let results = directory.path().join("results");
        assert_eq!(find(&results, "u1", "shop", "web"), None, "no directory");
        fs::create_dir(&results).unwrap();
        fs::write(results.join("cbr0-c1-eth0"), written(Some("u1"), &netns.to_string_lossy(), None)).unwrap();
        fs::write(results.join("cbr0-c0-eth0"), written(Some("u1"), "/run/netns/of-another-boot", None))
            .unwrap();
        fs::write(results.join("nonsense"), "{").unwrap();
        let ips: Vec<IpAddr> = vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let place = Place { netns: netns.clone(), ips };
        assert_eq!(find(&results, "u1", "shop", "web"), Some(place.clone()));
        assert_eq!(find(&results, "u2", "shop", "web"), None, "a pod of the same name");
        // Two places for one pod: neither is believed.
        let other = directory.path().join("cni-2");
        fs::write(&other, "").unwrap();
        fs::write(results.join("cbr0-c2-eth0"), written(Some("u1"), &other.to_string_lossy(), None)).unwrap();
        assert_eq!(find(&results, "u1", "shop", "web"), None);
        fs::remove_file(&other).unwrap();
        assert_eq!(find(&results, "u1", "shop", "web"), Some(place));
    }

    #[test]
    fn records_of_both_kinds_are_read() {
        let path = |bytes: &[u8]| {
            parse(bytes).map(|record| record.places.into_iter().map(|p| p.netns).collect::<Vec<_>>())
        };
        let expected = Some(vec![PathBuf::from("/run/netns/cni-1")]);
        assert_eq!(path(&written(None, "/var/run/netns/cni-1", None)), expected);
        assert_eq!(path(&written(None, "", Some("/var/run/netns/cni-1"))), expected);
        assert_eq!(path(&written(None, "", None)), Some(vec![]));
        assert_eq!(path(b"[]"), None);
        assert_eq!(path(br#"{"kind":"other"}"#), None);
    }
}
