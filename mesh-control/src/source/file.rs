//! A directory of YAML as the source.
//!
//! A file counts as a whole: one that cannot be read keeps its last good objects and is reported; one that never was
//! good counts as far as it can be read, so that a mistake in a route does not take away the policies beside it. A
//! deleted file deletes its objects; of an object that stands in two files the first in the order of paths counts.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use notify::Watcher;
use tokio::sync::Notify;

use super::{
    Object, Objects, Problem, Severity, Source,
    document::{MAX_FILE_BYTES, parse},
};

/// Most files that are read: a mistyped path such as `/` must not be walked to its end.
pub const MAX_FILES: usize = 10_000;
/// Deepest folder below the source directory; ends loops of links.
const MAX_DEPTH: usize = 16;

/// The text of one file, or why it could not be read.
pub type Text = Result<String, String>;

/// What is known of one file.
#[derive(Debug, Default)]
struct FileState {
    text: Option<Text>,
    /// It was good as a whole once; `good` is that state from then on.
    whole: bool,
    good: Vec<Arc<Object>>,
    unreadable: Vec<Arc<Object>>,
    problems: Vec<Problem>,
}

/// All files of the directory as they are now.
#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<String, FileState>,
    fault: Option<Problem>,
}

impl Folder {
    /// Takes what is on disk now, `path relative to the directory → text`; says whether anything changed.
    pub fn take(&mut self, texts: BTreeMap<String, Text>) -> bool {
        let mut changed = self.fault.take().is_some();
        self.files.retain(|path, _| {
            let stays = texts.contains_key(path);
            changed |= !stays;
            stays
        });
        for (path, text) in texts {
            let file = self.files.entry(path.clone()).or_default();
            if file.text.as_ref() != Some(&text) {
                file.take(&path, text);
                changed = true;
            }
        }
        changed
    }

    /// The directory as a whole could not be read: everything stays as it was.
    pub fn failed(&mut self, reason: String) -> bool {
        let fault = Problem {
            file: String::new(),
            line: 0,
            object: String::new(),
            field: String::new(),
            reason,
            severity: Severity::Error,
        };
        let changed = self.fault.as_ref() != Some(&fault);
        self.fault = Some(fault);
        changed
    }

    /// The text of a file as it is now.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path)?.text.as_ref()?.as_deref().ok()
    }

    /// The objects and the problems of reading them.
    pub fn objects(&self) -> (Objects, Vec<Problem>) {
        let mut objects = Objects::new();
        let mut problems: Vec<Problem> = self.fault.iter().cloned().collect();
        for file in self.files.values() {
            problems.extend(file.problems.iter().cloned());
            for object in file.good.iter().chain(&file.unreadable) {
                match objects.get(&object.key) {
                    None => {
                        objects.insert(object.key.clone(), object.clone());
                    }
                    Some(first) => {
                        let reason = format!(
                            "the same object stands in {}:{}, which counts",
                            first.origin.file, first.origin.line
                        );
                        problems.push(object.problem(Severity::Error, "", reason));
                    }
                }
            }
        }
        (objects, problems)
    }
}

impl FileState {
    fn take(&mut self, path: &str, text: Text) {
        match &text {
            Ok(content) => {
                let parsed = parse(path, content);
                let broken = parsed.broken();
                if !(broken && self.whole) {
                    self.good = parsed.objects.into_iter().map(Arc::new).collect();
                }
                self.whole |= !broken;
                // A policy that has a good version stays with it; one that never had any denies.
                let known = |object: &Object| self.good.iter().any(|good| good.key == object.key);
                self.unreadable = parsed.unreadable.into_iter().filter(|o| !known(o)).map(Arc::new).collect();
                self.problems = parsed.problems;
            }
            Err(reason) => {
                self.problems = vec![Problem {
                    file: path.to_owned(),
                    line: 1,
                    object: String::new(),
                    field: String::new(),
                    reason: reason.clone(),
                    severity: Severity::Error,
                }];
            }
        }
        self.text = Some(text);
    }
}

/// A directory as the source.
pub struct Directory {
    path: PathBuf,
    folder: Folder,
    read: bool,
}

impl Directory {
    /// The directory at `path`; nothing is read yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, folder: Folder::default(), read: false }
    }
}

impl Source for Directory {
    fn refresh(&mut self) -> bool {
        let changed = match read(&self.path) {
            Ok(texts) => self.folder.take(texts),
            Err(error) => self.folder.failed(format!("{}: {error}", self.path.display())),
        };
        let first = !std::mem::replace(&mut self.read, true);
        changed || first
    }

    fn objects(&self) -> (Objects, Vec<Problem>) {
        self.folder.objects()
    }

    fn text(&self, file: &str) -> Option<&str> {
        self.folder.text(file)
    }
}

/// Reads every object file under `root`, subfolders included; hidden names are left out.
///
/// # Errors
/// When the directory itself or one of its folders cannot be listed, or holds too many files.
pub fn read(root: &Path) -> io::Result<BTreeMap<String, Text>> {
    let mut texts = BTreeMap::new();
    let mut open = vec![(root.to_path_buf(), 0)];
    while let Some((dir, depth)) = open.pop() {
        for entry in fs::read_dir(&dir)? {
            let path: PathBuf = entry?.path();
            let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
            // Follows links, as a mounted ConfigMap is made of them; what vanished meanwhile is not there.
            let Ok(meta) = fs::metadata(&path) else { continue };
            if hidden {
                continue;
            }
            if meta.is_dir() && depth < MAX_DEPTH {
                open.push((path, depth + 1));
            } else if meta.is_file() && is_object_file(&path) {
                if texts.len() >= MAX_FILES {
                    return Err(io::Error::other(format!("more than {MAX_FILES} files")));
                }
                let Some(text) = read_file(&path, meta.len()) else { continue };
                let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
                texts.insert(name, text);
            }
        }
    }
    Ok(texts)
}

fn read_file(path: &Path, len: u64) -> Option<Text> {
    if len > MAX_FILE_BYTES as u64 {
        return Some(Err(format!("the file is larger than {MAX_FILE_BYTES} bytes")));
    }
    match fs::read(path) {
        Ok(bytes) => Some(String::from_utf8(bytes).map_err(|_| "the file is not UTF-8".to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(format!("cannot be read: {error}"))),
    }
}

fn is_object_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

/// Whether an event may mean new content. Reading a file is no change of it, and whoever reads on every event would
/// wake itself for ever; a lost event (an error) may be one.
pub fn is_change(event: &notify::Result<notify::Event>) -> bool {
    !matches!(event, Ok(event) if event.kind.is_access())
}

/// Wakes `changed` whenever something under `root` changes, for as long as the returned watcher lives.
///
/// # Errors
/// When the kernel gives no watch.
pub fn watch(root: &Path, changed: Arc<Notify>) -> notify::Result<impl Watcher + use<>> {
    let mut watcher = notify::recommended_watcher(move |event| {
        if is_change(&event) {
            changed.notify_one();
        }
    })?;
    watcher.watch(root, notify::RecursiveMode::Recursive)?;
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str) -> String {
        format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}}}\n")
    }

    fn texts(files: &[(&str, &str)]) -> BTreeMap<String, Text> {
        files.iter().map(|(path, text)| ((*path).to_owned(), Ok((*text).to_owned()))).collect()
    }

    fn names(folder: &Folder) -> Vec<String> {
        folder.objects().0.keys().map(|key| key.name.to_string()).collect()
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_objects_and_a_deleted_one_loses_them() {
        let mut folder = Folder::default();
        assert!(folder.take(texts(&[("a.yaml", &account("a")), ("b.yaml", &account("b"))])));
        assert!(!folder.take(texts(&[("a.yaml", &account("a")), ("b.yaml", &account("b"))])));
        assert!(folder.take(texts(&[("a.yaml", "kind: ["), ("b.yaml", &account("c"))])));
        assert_eq!(names(&folder), ["a", "c"]);
        assert_eq!(folder.objects().1[0].file, "a.yaml");
        folder.take(texts(&[("b.yaml", &account("c"))]));
        assert_eq!((names(&folder), folder.objects().1), (vec!["c".to_owned()], vec![]));
    }

    #[test]
    fn a_file_that_never_was_good_counts_as_far_as_it_can_be_read() {
        let mut folder = Folder::default();
        let broken = |first: &str| format!("{}---\nkind: [\n", account(first));
        folder.take(texts(&[("a.yaml", &broken("a"))]));
        assert_eq!((names(&folder), folder.objects().1.len()), (vec!["a".to_owned()], 1));
        folder.take(texts(&[("a.yaml", &broken("b"))]));
        assert_eq!(names(&folder), ["b"]);
        folder.take(texts(&[("a.yaml", &account("c"))]));
        folder.take(texts(&[("a.yaml", &broken("d"))]));
        assert_eq!(names(&folder), ["c"]);
    }

    #[test]
    fn of_two_files_with_the_same_object_the_first_counts() {
        let mut folder = Folder::default();
        folder.take(texts(&[("b.yaml", &account("a")), ("a.yaml", &account("a"))]));
        let (objects, problems) = folder.objects();
        assert_eq!(&*objects.values().next().unwrap().origin.file, "a.yaml");
        assert_eq!(
            problems[0].to_string(),
            "b.yaml:1: error: ServiceAccount default/a: the same object stands in a.yaml:1, which counts"
        );
        folder.take(texts(&[("b.yaml", &account("a"))]));
        assert_eq!(folder.objects().1, []);
    }

    #[test]
    fn a_policy_that_was_never_readable_is_there_to_deny() {
        let bad = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec: {mtls: {mod: STRICT}}\n";
        let good = bad.replace("mod:", "mode:");
        let mut folder = Folder::default();
        folder.take(texts(&[("a.yaml", bad)]));
        assert!(matches!(
            folder.objects().0.values().next().unwrap().value,
            super::super::Value::Unreadable { .. }
        ));
        folder.take(texts(&[("a.yaml", &good)]));
        folder.take(texts(&[("a.yaml", bad)]));
        assert!(matches!(
            folder.objects().0.values().next().unwrap().value,
            super::super::Value::PeerAuthentication(_)
        ));
    }

    #[test]
    fn a_directory_that_cannot_be_read_changes_nothing() {
        let mut folder = Folder::default();
        folder.take(texts(&[("a.yaml", &account("a"))]));
        let dir = tempfile::tempdir().unwrap();
        let error = read(&dir.path().join("gone")).unwrap_err();
        assert!(folder.failed(error.to_string()));
        assert_eq!((names(&folder), folder.objects().1.len()), (vec!["a".to_owned()], 1));
    }

    #[test]
    fn object_files_are_found_in_subfolders_and_hidden_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        for name in ["a.yaml", "sub/b.yml", "c.json", ".d.yaml", "e.txt", "f.yaml~"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        fs::write(dir.path().join("g.yaml"), [0xff]).unwrap();
        let read = read(dir.path()).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["a.yaml", "c.json", "g.yaml", "sub/b.yml"]);
        assert!(read["g.yaml"].is_err());
    }
}
