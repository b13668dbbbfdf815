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
}
