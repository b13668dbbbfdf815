//! (pure) Which node a pod runs on: where it was, else the fitting node with the fewest pods.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::PodSpec;

use super::expand::{Key, WantedNode};

/// The label that every node carries without being written.
const HOSTNAME: &str = "kubernetes.io/hostname";

/// Nodes as they fill.
pub struct Placement<'a> {
    nodes: &'a [WantedNode],
    placed: &'a BTreeMap<Key, String>,
    /// Pods per node, all of them and per workload.
    total: HashMap<String, usize>,
    of_workload: HashMap<(Key, String), usize>,
}

impl<'a> Placement<'a> {
    /// Empty nodes; `placed` is where existing pods run.
    pub fn new(nodes: &'a [WantedNode], placed: &'a BTreeMap<Key, String>) -> Self {
        Self { nodes, placed, total: HashMap::new(), of_workload: HashMap::new() }
    }

    /// The nodes that `nodeName` and `nodeSelector` permit.
    pub fn fitting(&self, spec: &PodSpec) -> Vec<String> {
        let fits = |node: &&WantedNode| {
            spec.node_name.as_ref().is_none_or(|name| *name == node.name)
                && spec.node_selector.iter().flatten().all(|(key, value)| {
                    node.labels.get(key) == Some(value) || (key == HOSTNAME && *value == node.name)
                })
        };
        self.nodes.iter().filter(fits).map(|node| node.name.clone()).collect()
    }

    /// Chooses and counts; `fixed` is a choice that was made already.
    pub fn place(
        &mut self,
        pod: &Key,
        workload: &Key,
        spec: &PodSpec,
        fixed: Option<String>,
    ) -> Option<String> {
        let fitting = self.fitting(spec);
        let stays = self.placed.get(pod).filter(|node| fitting.contains(node)).cloned();
        let node = fixed.or(stays).or_else(|| {
            let load = |node: &String| {
                let of_workload = self.of_workload.get(&(workload.clone(), node.clone())).copied();
                (of_workload.unwrap_or_default(), self.total.get(node).copied().unwrap_or_default())
            };
            fitting.into_iter().min_by_key(load)
        })?;
        *self.total.entry(node.clone()).or_default() += 1;
        *self.of_workload.entry((workload.clone(), node.clone())).or_default() += 1;
        Some(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_stay_where_they_are_and_selectors_hold() {
        let nodes = ["a", "b"].map(|name| WantedNode {
            name: name.to_owned(),
            labels: [("disk".to_owned(), name.to_owned())].into(),
            written: true,
        });
        let placed = [(Key::new("d", "old"), "b".to_owned())].into();
        let mut placement = Placement::new(&nodes, &placed);
        let work = Key::new("d", "w");
        let spec = |selector: &[(&str, &str)]| PodSpec {
            node_selector: Some(selector.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()),
            ..PodSpec::default()
        };
        let mut place = |name: &str, selector: &[(&str, &str)]| {
            placement.place(&Key::new("d", name), &work, &spec(selector), None)
        };
        assert_eq!(place("old", &[]).as_deref(), Some("b"));
        assert_eq!(place("new", &[]).as_deref(), Some("a"));
        assert_eq!(place("x", &[("disk", "b")]).as_deref(), Some("b"));
        assert_eq!(place("y", &[(HOSTNAME, "b")]).as_deref(), Some("b"));
        assert_eq!(place("z", &[(HOSTNAME, "c")]), None);
    }
}
