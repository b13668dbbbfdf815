//! Source → objects → fragments → World → published: the one writer of what is published.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    compile::{Fragments, World, compile},
    publish::Published,
    source::{
        Objects, Problem, Source,
        document::line_in,
        file::{Folder, Text},
    },
    translate::{Mesh, translate},
};

/// Everything between the source and the proxies.
pub struct Pipeline {
    mesh: Mesh,
    state: Mutex<State>,
    published: watch::Sender<Arc<Published>>,
}

struct State {
    source: Box<dyn Source>,
    /// Translations by object, each with the digest of what it was made from: an object that did not change is not
    /// translated again.
    fragments: BTreeMap<crate::source::ObjectKey, (u64, Arc<crate::translate::Translated>)>,
}

impl Pipeline {
    /// A pipeline from `source`; nothing is read yet.
    pub fn new(source: Box<dyn Source>, mesh: Mesh) -> Self {
        let (published, _) = watch::channel(Arc::new(Published::default()));
        let state = State { source, fragments: BTreeMap::new() };
        Self { mesh, state: Mutex::new(state), published }
    }

    /// What is published, now and from now on.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Published>> {
        self.published.subscribe()
    }

    /// What is the same for the whole mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Looks at the source and publishes what it says now; says whether anything changed. May block on files.
    pub fn rescan(&self) -> bool {
        let mut state = self.state.lock();
        if !state.source.refresh() {
            return false;
        }
        let (objects, read_problems) = state.source.objects();
        state.translate(&objects, &self.mesh);
        let fragments = state.fragments.iter().map(|(key, (_, made))| (key.clone(), made.clone())).collect();
        let world = finish(&fragments, &self.mesh, read_problems, &|file| state.source.text(file));
        let next = Arc::new(self.published.borrow().next(world));
        let revision = next.revision;
        let problems = next.world.problems.len();
        if self.published.send_replace(next).revision != revision {
            tracing::info!(revision, problems, "configuration published");
        }
        true
    }
}

impl State {
    fn translate(&mut self, objects: &Objects, mesh: &Mesh) {
        self.fragments.retain(|key, _| objects.contains_key(key));
        for (key, object) in objects {
            if self.fragments.get(key).is_none_or(|(digest, _)| *digest != object.digest) {
                let made = Arc::new(translate(object, mesh));
                self.fragments.insert(key.clone(), (object.digest, made));
            }
        }
    }
}

/// Compiles, adds the problems of reading, and gives every problem the line of its field.
fn finish<'a>(
    fragments: &Fragments,
    mesh: &Mesh,
    read_problems: Vec<Problem>,
    text_of: &dyn Fn(&str) -> Option<&'a str>,
) -> World {
    let mut world = compile(fragments, mesh);
    for problem in &mut world.problems {
        if let Some(text) = text_of(&problem.file).filter(|_| !problem.field.is_empty()) {
            problem.line = line_in(text, problem.line, &problem.field);
        }
    }
    world.problems.extend(read_problems);
    world.problems.sort();
    world
}

/// What is wrong with a set of files (`path → text`), by the very code that would put them in force.
pub fn analyze(files: &BTreeMap<String, String>, mesh: &Mesh) -> Vec<Problem> {
    let mut folder = Folder::default();
    let texts: BTreeMap<String, Text> =
        files.iter().map(|(path, text)| (path.clone(), Ok(text.clone()))).collect();
    folder.take(texts);
    let (objects, problems) = folder.objects();
    let fragments =
        objects.iter().map(|(key, object)| (key.clone(), Arc::new(translate(object, mesh)))).collect();
    finish(&fragments, mesh, problems, &|file| files.get(file).map(String::as_str)).problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Severity, file::Directory};

    const ROUTE: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata:\n  name: r\nspec:\n  parentRefs:\n  - group: ''\n    kind: Service\n    name: nowhere\n";

    #[test]
    fn problems_name_the_line_of_their_field() {
        let files = BTreeMap::from([("r.yaml".to_owned(), format!("# head\n---\n{ROUTE}"))]);
        let problems = analyze(&files, &Mesh::default());
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!((problems[0].line, problems[0].severity), (9, Severity::Error));
        assert_eq!(problems[0].field, "spec.parentRefs[0]");
    }

    #[test]
    fn edits_of_the_directory_are_published_and_breaking_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: []}\nstatus: {phase: Running, podIP: 10.0.0.1}\n";
        std::fs::write(&path, pod).unwrap();
        let pipeline = Pipeline::new(Box::new(Directory::new(dir.path().to_owned())), Mesh::default());
        assert!(pipeline.rescan());
        let now = pipeline.subscribe();
        assert_eq!((now.borrow().revision, now.borrow().world.workloads.len()), (1, 1));
        assert!(!pipeline.rescan());
        std::fs::write(&path, format!("{pod}---\nkind: [\n")).unwrap();
        assert!(pipeline.rescan());
        assert_eq!((now.borrow().revision, now.borrow().world.workloads.len()), (1, 1));
        assert_eq!(now.borrow().world.problems.len(), 1);
        std::fs::write(&path, pod.replace("10.0.0.1", "10.0.0.2")).unwrap();
        assert!(pipeline.rescan());
        assert_eq!((now.borrow().revision, now.borrow().world.problems.len()), (2, 0));
        std::fs::remove_file(&path).unwrap();
        assert!(pipeline.rescan());
        assert_eq!((now.borrow().revision, now.borrow().world.workloads.len()), (3, 0));
    }

    /// What an API server says, once.
    struct Said(crate::source::cluster::Cluster);

    impl Source for Said {
        fn refresh(&mut self) -> bool {
            self.0.take_changed()
        }

        fn objects(&self) -> (Objects, Vec<Problem>) {
            self.0.objects()
        }

        fn text(&self, _: &str) -> Option<&str> {
            None
        }
    }

    #[test]
    fn a_folder_and_a_cluster_that_hold_the_same_publish_the_same() {
        const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: reviews-1, namespace: bookinfo, uid: u1, labels: {app: reviews}}\nspec: {nodeName: node-1, serviceAccountName: reviews, containers: [{name: c, image: i}]}\nstatus: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}], conditions: [{type: Ready, status: 'True'}]}\n";
        let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bookinfo");
        let mut files: Vec<_> =
            std::fs::read_dir(examples.join("mesh")).unwrap().map(|entry| entry.unwrap().path()).collect();
        for step in ["4-strict", "4-details-productpage", "5-waypoint", "5-route-jason"] {
            files.push(examples.join("steps").join(step).with_extension("yaml"));
        }
        let mut texts: Vec<String> =
            files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
        texts.push(POD.to_owned());
        texts.push(format!(
            "{ROUTE}---\n{}",
            ROUTE.replace("parentRefs", "parentRef").replace("name: r", "name: s")
        ));
        let folder = tempfile::tempdir().unwrap();
        let mut cluster = crate::source::cluster::Cluster::default();
        for (number, text) in texts.iter().enumerate() {
            std::fs::write(folder.path().join(format!("{number}.yaml")), text).unwrap();
            for document in serde_yaml_ng::Deserializer::from_str(text) {
                let json: serde_json::Value = serde::Deserialize::deserialize(document).unwrap();
                let text = |field: &str| json[field].as_str().unwrap_or_default();
                if let Some(kind) = crate::source::Kind::of(text("apiVersion"), text("kind")) {
                    cluster.set(kind, json);
                }
            }
        }
        let published = |source: Box<dyn Source>| {
            let pipeline = Pipeline::new(source, Mesh::default());
            assert!(pipeline.rescan());
            pipeline.subscribe().borrow().clone()
        };
        let of_folder = published(Box::new(Directory::new(folder.path().to_owned())));
        let of_cluster = published(Box::new(Said(cluster)));
        let problems = |published: &Published| -> Vec<_> {
            let all = published.world.problems.iter();
            all.map(|problem| (problem.object.clone(), problem.field.clone(), problem.reason.clone()))
                .collect()
        };
        assert_eq!(problems(&of_folder), problems(&of_cluster));
        assert!(!of_folder.world.problems.is_empty() && !of_folder.world.policies.is_empty());
        assert!(!of_folder.world.workloads.is_empty() && !of_folder.world.services.is_empty());
        assert_eq!(of_folder.digest, of_cluster.digest, "{:#?}\n{:#?}", of_folder.world, of_cluster.world);
    }
}
