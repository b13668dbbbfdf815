//! (pure) The configuration that puts our plugin behind the primary's: a file of our own that sorts first, with the
//! primary's chain and ours last. The primary's file is never touched: what is changed in place is lost whenever its
//! owner writes it again, on many nodes at every boot, and pods start unprotected until that is mended.

use serde_json::{Map, Value, json};

/// Our file.
pub const FILE: &str = "00-undermesh.conflist";
/// Name and type of the plugin.
pub const PLUGIN: &str = "undermesh-cni";
/// Endings that a container runtime reads.
const ENDINGS: [&str; 3] = [".conf", ".conflist", ".json"];
/// Versions of the specification in which plugins can be chained.
const CHAINING: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What the plugin is told by its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugin {
    /// The agent's socket, as the host sees it.
    pub socket: String,
    /// Namespaces whose pods start while the agent is down.
    pub exempt: Vec<String>,
    /// So do pods of namespaces that are not in this file; none: only exempt ones.
    pub known: Option<String>,
}

/// Why a primary's configuration cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPrimary {
    /// It is no configuration.
    #[error("{0}")]
    Unreadable(String),
    /// Its version knows no chains.
    #[error("cniVersion {0:?} cannot be chained: 0.3.0 to 1.1.0 can")]
    Version(String),
}

/// Of the files of a directory, the primary's: the first that a runtime would read, ours apart.
///
/// # Errors
/// One that sorts before ours: the runtime reads it first, and never ours.
pub fn primary(names: &[String]) -> Result<Option<&str>, String> {
    let mut read: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| *name != FILE && ENDINGS.iter().any(|ending| name.ends_with(ending)))
        .collect();
    read.sort_unstable();
    match read.first() {
        Some(first) if *first < FILE => Err((*first).to_owned()),
        first => Ok(first.copied()),
    }
}

/// Our configuration for a primary's.
///
/// # Errors
/// The primary's cannot be followed.
pub fn chained(primary: &str, plugin: &Plugin) -> Result<String, BadPrimary> {
    let bad = |text: &str| BadPrimary::Unreadable(text.to_owned());
    let value: Value =
        serde_json::from_str(primary).map_err(|error| BadPrimary::Unreadable(error.to_string()))?;
    let Value::Object(mut fields) = value else { return Err(bad("not an object")) };
    let version = fields.get("cniVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !CHAINING.contains(&version.as_str()) {
        return Err(BadPrimary::Version(version));
    }
    let mut list = match fields.remove("plugins") {
        Some(Value::Array(plugins)) => {
            let mut list = fields;
            list.insert("plugins".to_owned(), Value::Array(plugins));
            list
        }
        Some(_) => return Err(bad("plugins is no list")),
        // One plugin without a list around it.
        None if fields.contains_key("type") => {
            let mut list = Map::new();
            for field in ["cniVersion", "name"] {
                list.extend(fields.remove(field).map(|value| (field.to_owned(), value)));
            }
            list.insert("plugins".to_owned(), json!([Value::Object(fields)]));
            list
        }
        None => return Err(bad("it has neither plugins nor a type")),
    };
    // The name stays: addresses and results of pods that run are kept under it.
    if !list.get("name").is_some_and(Value::is_string) {
        return Err(bad("it has no name"));
    }
    let Some(Value::Array(plugins)) = list.get_mut("plugins") else { return Err(bad("it has no plugins")) };
    plugins.retain(|entry| entry["type"] != PLUGIN);
    if plugins.is_empty() {
        return Err(bad("its list of plugins is empty"));
    }
    plugins.push(ours(plugin));
    let mut text = serde_json::to_string_pretty(&list).map_err(|error| bad(&error.to_string()))?;
    text.push('\n');
    Ok(text)
}

fn ours(plugin: &Plugin) -> Value {
    let mut entry = json!({
        "type": PLUGIN,
        "agentSocket": plugin.socket,
        "exemptNamespaces": plugin.exempt,
    });
    if let Some(known) = &plugin.known {
        entry["whenAgentIsDown"] = "refuse-known".into();
        entry["knownNamespaces"] = known.as_str().into();
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin() -> Plugin {
        Plugin { socket: "/run/s".to_owned(), exempt: vec!["kube-system".to_owned()], known: None }
    }

    #[test]
    fn the_primary_is_what_the_runtime_would_read() {
        let check = |names: &[&str], expected: Result<Option<&str>, &str>| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            assert_eq!(primary(&names), expected.map_err(str::to_owned), "{names:?}");
        };
        check(&[], Ok(None));
        check(&[FILE], Ok(None));
        check(
            &["20-b.conf", "10-a.conflist", FILE, "05-x.tmp", ".00-undermesh.next"],
            Ok(Some("10-a.conflist")),
        );
        check(&["calico.json"], Ok(Some("calico.json")));
        check(&["00-multus.conf", "10-a.conflist", FILE], Err("00-multus.conf"));
    }

    #[test]
    fn ours_comes_last_and_the_rest_stays() {
        let list = json!({
            "cniVersion": "1.0.0", "name": "cbr0", "disableCheck": true,
            "plugins": [{ "type": "bridge", "ipam": { "type": "host-local" } }, { "type": "portmap" }],
        });
        let made: Value = serde_json::from_str(&chained(&list.to_string(), &plugin()).unwrap()).unwrap();
        let mut expected = list.clone();
        let entry = json!({ "type": PLUGIN, "agentSocket": "/run/s", "exemptNamespaces": ["kube-system"] });
        expected["plugins"].as_array_mut().unwrap().push(entry.clone());
        assert_eq!(made, expected);
        // Said twice, it stands there once.
        assert_eq!(
            chained(&made.to_string(), &plugin()).unwrap(),
            chained(&list.to_string(), &plugin()).unwrap()
        );

        let single = json!({ "cniVersion": "0.3.1", "name": "x", "type": "ptp", "mtu": 1400 });
        let made: Value = serde_json::from_str(&chained(&single.to_string(), &plugin()).unwrap()).unwrap();
        let expected = json!({
            "cniVersion": "0.3.1", "name": "x", "plugins": [{ "type": "ptp", "mtu": 1400 }, entry],
        });
        assert_eq!(made, expected);
    }

    #[test]
    fn what_cannot_be_followed_says_why() {
        let check = |text: &str, expected: &str| {
            let error = chained(text, &plugin()).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("", "EOF");
        check("[]", "not an object");
        check(r#"{"cniVersion":"0.2.0","name":"x","type":"ptp"}"#, "\"0.2.0\" cannot be chained");
        check(r#"{"name":"x","type":"ptp"}"#, "\"\" cannot be chained");
        check(r#"{"cniVersion":"1.0.0","name":"x"}"#, "neither");
        check(r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#, "no name");
        check(r#"{"cniVersion":"1.0.0","name":"x","plugins":[]}"#, "empty");
        check(r#"{"cniVersion":"1.0.0","name":"x","plugins":{}}"#, "no list");
    }

    #[test]
    fn the_setting_that_narrows_is_told() {
        let plugin = Plugin { known: Some("/var/lib/k.json".to_owned()), ..plugin() };
        let entry = ours(&plugin);
        assert_eq!(
            (&entry["whenAgentIsDown"], &entry["knownNamespaces"]),
            (&json!("refuse-known"), &json!("/var/lib/k.json"))
        );
    }
}
