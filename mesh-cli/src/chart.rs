//! What is installed: the Helm chart in `deploy/helm/undermesh`, which is the one source of the manifests, rendered
//! without Helm. The chart is not generated from code because Helm's users need its templates as they are, and a
//! renderer for the few constructs that these use is smaller than a generator of templates.

mod template;
pub mod values;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde_json::{Value, json};

use values::{Values, layer, overlay};

/// Version of this program, of the chart and of the images.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

macro_rules! chart {
    ($path:literal) => {
        include_str!(concat!("../../deploy/helm/undermesh/", $path))
    };
}

/// Templates in the order in which objects are needed.
const TEMPLATES: &[(&str, &str)] = &[
    ("templates/namespace.yaml", chart!("templates/namespace.yaml")),
    ("templates/accounts.yaml", chart!("templates/accounts.yaml")),
    ("templates/roles.yaml", chart!("templates/roles.yaml")),
    ("templates/options.yaml", chart!("templates/options.yaml")),
    ("templates/gatewayclasses.yaml", chart!("templates/gatewayclasses.yaml")),
    ("templates/control.yaml", chart!("templates/control.yaml")),
    ("templates/node.yaml", chart!("templates/node.yaml")),
];

/// Named sets of values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// For clusters that work: two replicas of the control plane.
    #[default]
    Default,
    /// The least that makes a mesh.
    Minimal,
    /// For a small cluster that one looks at.
    Demo,
}

impl Profile {
    fn yaml(self) -> &'static str {
        match self {
            Self::Default => chart!("profiles/default.yaml"),
            Self::Minimal => chart!("profiles/minimal.yaml"),
            Self::Demo => chart!("profiles/demo.yaml"),
        }
    }
}

/// (pure) The layers of one installation laid over the defaults. The namespace is one of the objects.
///
/// # Errors
/// What is wrong in a layer.
pub fn values(profile: Profile, layers: Vec<Value>) -> anyhow::Result<Values> {
    let mut merged = layer("values.yaml", chart!("values.yaml"))?;
    overlay(&mut merged, json!({"namespace": {"create": true}}));
    overlay(&mut merged, layer("profile", profile.yaml())?);
    for above in layers {
        overlay(&mut merged, above);
    }
    Ok(Values::decode(&merged)?)
}

/// (pure) The objects of an installation, in the order in which they are needed.
///
/// # Errors
/// A fault of the chart, or a value that makes no object.
pub fn objects(values: &Values, namespace: &str) -> anyhow::Result<Vec<Value>> {
    let context = json!({
        "Values": values,
        "Release": {"Namespace": namespace},
        "Chart": {"AppVersion": VERSION},
    });
    let mut objects = Vec::new();
    for (name, text) in TEMPLATES {
        let yaml = template::render(text, &context).with_context(|| (*name).to_owned())?;
        for object in documents(&yaml).with_context(|| (*name).to_owned())? {
            if object["kind"].as_str().is_none() || object["metadata"]["name"].as_str().is_none() {
                bail!("{name}: an object without kind or name");
            }
            objects.push(object);
        }
    }
    Ok(objects)
}

/// (pure) The documents of a YAML text that are not empty.
///
/// # Errors
/// When it is no YAML.
pub fn documents(yaml: &str) -> anyhow::Result<Vec<Value>> {
    use serde::Deserialize as _;
    let mut documents = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(yaml) {
        let value = Value::deserialize(document)?;
        if !value.is_null() {
            documents.push(value);
        }
    }
    Ok(documents)
}

/// (pure) Objects as a YAML stream.
///
/// # Errors
/// None that is known of.
pub fn stream(objects: &[Value]) -> anyhow::Result<String> {
    let mut out = String::new();
    for object in objects {
        out += "---\n";
        out += &serde_yaml_ng::to_string(object)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_makes_objects() {
        for profile in Profile::value_variants() {
            let values = values(*profile, Vec::new()).unwrap();
            let objects = objects(&values, "mesh").unwrap();
            let named = |kind: &str, name: &str| {
                let found = objects
                    .iter()
                    .filter(|object| object["kind"] == kind && object["metadata"]["name"] == name)
                    .collect::<Vec<_>>();
                assert_eq!(found.len(), 1, "{profile:?}: {kind} {name}");
                found[0].clone()
            };
            assert_eq!(objects[0], named("Namespace", "mesh"));
            let image = named("DaemonSet", "undermesh-node");
            let image = &image["spec"]["template"]["spec"]["containers"][0]["image"];
            assert_eq!(*image, format!("docker.io/undermesh/node:{VERSION}"));
            // No object lies outside of the namespace that was asked for.
            for object in &objects {
                let namespace = &object["metadata"]["namespace"];
                assert!(namespace.is_null() || namespace == "mesh", "{object}");
            }
        }
    }

    /// What a change of the chart does to the objects is to be read in its diff: `UNDERMESH_GOLDEN=write cargo test -p
    /// mesh-cli` writes it.
    #[test]
    fn the_default_objects_are_as_reviewed() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/chart/default.golden.yaml");
        let made =
            stream(&objects(&values(Profile::Default, Vec::new()).unwrap(), "undermesh-system").unwrap());
        let made = made.unwrap().replace(VERSION, "VERSION");
        if std::env::var_os("UNDERMESH_GOLDEN").is_some() {
            std::fs::write(path, &made).unwrap();
        }
        let reviewed = std::fs::read_to_string(path).unwrap();
        let differs =
            made.lines().zip(reviewed.lines()).enumerate().find(|(_, (made, reviewed))| made != reviewed);
        assert_eq!(differs, None);
        assert_eq!(made.len(), reviewed.len());
    }

    /// Who may do what is to be changed knowingly: the agent nothing, a waypoint nothing, and no wildcard for anybody.
    #[test]
    fn rights_are_least() {
        for profile in Profile::value_variants() {
            let objects = objects(&values(*profile, Vec::new()).unwrap(), "mesh").unwrap();
            for binding in
                objects.iter().filter(|object| object["kind"].as_str().unwrap().ends_with("Binding"))
            {
                for subject in binding["subjects"].as_array().unwrap() {
                    assert_eq!(subject["name"], "undermesh-control", "{binding}");
                }
            }
            for role in objects.iter().filter(|object| object["kind"].as_str().unwrap().ends_with("Role")) {
                let rules = role["rules"].to_string();
                assert!(!rules.contains('*'), "{rules}");
                let secrets = role["rules"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|rule| rule["resources"].as_array().unwrap().contains(&"secrets".into()));
                for rule in secrets {
                    let named = !rule["resourceNames"].is_null();
                    assert!(
                        role["kind"] == "Role" && (named || rule["verbs"] == json!(["create"])),
                        "{rule}"
                    );
                }
            }
        }
    }

    #[test]
    fn settings_reach_the_objects() {
        let set = |argument: &str| values(Profile::Minimal, vec![values::set(argument).unwrap()]);
        let values =
            set("image.tag=x,image.registry=r,control.replicas=3,gatewayClasses.istio=true").unwrap();
        let text = stream(&objects(&values, "mesh").unwrap()).unwrap();
        for expected in ["image: r/node:x", "image: r/control:x", "replicas: 3", "name: istio-waypoint"] {
            assert!(text.contains(expected), "{expected}");
        }
        let refused = |argument: &str| set(argument).unwrap_err().to_string();
        assert!(refused("control.replica=3").starts_with("control.replica: unknown field"));
        assert!(refused("control.replicas=many").starts_with("control.replicas: invalid type"));
        assert!(refused("image.pullPolicy=never").starts_with("image.pullPolicy: unknown variant"));
        assert!(refused("control.replicas=null").starts_with("control: missing field"));
    }

    #[test]
    fn the_chart_has_the_version_of_the_workspace() {
        let chart = layer("Chart.yaml", chart!("Chart.yaml")).unwrap();
        assert_eq!((&chart["version"], &chart["appVersion"]), (&VERSION.into(), &VERSION.into()));
    }
}
