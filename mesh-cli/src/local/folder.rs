//! The user's folder as it is now, file by file; a file that does not parse keeps its last good objects.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::document::{Document, Problem, parse};

/// Between two readings of a folder that is being written.
const SETTLE: Duration = Duration::from_millis(30);
/// A folder that is written without end is taken as it is after so many readings.
const SETTLE_LOOKS: usize = 20;

/// One file of the folder.
#[derive(Clone, Debug, Default)]
pub struct UserFile {
    /// The text as it is on disk.
    pub text: String,
    /// The last text that parsed.
    pub good: Option<String>,
    /// Its objects.
    pub documents: Vec<Document>,
    /// Why the present text does not parse.
    pub broken: Option<Problem>,
}

/// Everything that the user wrote.
#[derive(Clone, Debug, Default)]
pub struct Folder {
    /// Files by their path relative to the folder, `/`-separated.
    pub files: BTreeMap<String, UserFile>,
}

impl Folder {
    /// Takes the texts that are on disk now; says whether anything differs from before.
    pub fn take(&mut self, texts: BTreeMap<String, String>) -> bool {
        let mut changed = false;
        self.files.retain(|path, _| {
            let stays = texts.contains_key(path);
            changed |= !stays;
            stays
        });
        for (path, text) in texts {
            if self.files.get(&path).is_some_and(|file| file.text == text) {
                continue;
            }
            let file = self.files.entry(path.clone()).or_default();
            changed = true;
            match parse(&path, &text) {
                Ok(documents) => {
                    (file.documents, file.broken, file.good) = (documents, None, Some(text.clone()));
                }
                Err(problem) => file.broken = Some(*problem),
            }
            file.text = text;
        }
        changed
    }

    /// Whether these texts are what it was made of.
    fn is(&self, texts: &BTreeMap<String, String>) -> bool {
        texts.len() == self.files.len()
            && texts.iter().all(|(path, text)| self.files.get(path).is_some_and(|file| file.text == *text))
    }

    /// All objects, in the order of files and lines.
    pub fn documents(&self) -> impl Iterator<Item = &Document> {
        self.files.values().flat_map(|file| &file.documents)
    }

    /// The files that do not parse.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.files.values().filter_map(|file| file.broken.as_ref())
    }
}

/// Whether a file of this name holds objects: editors' temporary and hidden files do not.
pub fn is_object_file(path: &Path) -> bool {
    let hidden = path.file_name().and_then(|name| name.to_str()).is_none_or(|name| name.starts_with('.'));
    !hidden && path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml" || ext == "json")
}

/// Reads the folder as [`read`] does, and where it differs from `known` reads until two readings agree: many programs
/// write a file by emptying it first, and an empty file would end everything that it asked for.
///
/// # Errors
/// As [`read`].
pub fn read_settled(root: &Path, known: &Folder) -> io::Result<BTreeMap<String, String>> {
    let mut texts = read(root)?;
    for _ in 0..SETTLE_LOOKS {
        if known.is(&texts) {
            break;
        }
        std::thread::sleep(SETTLE);
        let again = read(root)?;
        if again == texts {
            break;
        }
        texts = again;
    }
    Ok(texts)
}

/// Reads every object file under `root`, subfolders included.
///
/// # Errors
/// When the folder or one of its files cannot be read.
pub fn read(root: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut texts = BTreeMap::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir)? {
            let path: PathBuf = entry?.path();
            // Links to files are followed, links to folders are not: they may form a circle.
            let Ok(link) = fs::symlink_metadata(&path) else { continue };
            let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
            if link.is_dir() && !hidden {
                open.push(path);
            } else if is_object_file(&path) && fs::metadata(&path).is_ok_and(|meta| meta.is_file()) {
                match fs::read(&path) {
                    Ok(bytes) => {
                        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
                        texts.insert(name, String::from_utf8_lossy(&bytes).into_owned());
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(texts)
}

/// Whether an event may mean new content. Reading a file is no change of it, and whoever reads on every event would
/// wake itself for ever; a lost event (an error) may be one.
pub fn is_change(event: &notify::Result<notify::Event>) -> bool {
    !matches!(event, Ok(event) if event.kind.is_access())
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "kind: Pod\nmetadata: {name: a}\n";

    fn texts(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_objects_and_a_deleted_one_does_not() {
        let mut folder = Folder::default();
        assert!(folder.take(texts(&[("a.yaml", POD)])));
        assert!(!folder.take(texts(&[("a.yaml", POD)])));
        assert!(folder.take(texts(&[("a.yaml", "kind: [")])));
        assert_eq!((folder.documents().count(), folder.problems().count()), (1, 1));
        assert!(folder.take(texts(&[])));
        assert_eq!((folder.documents().count(), folder.problems().count()), (0, 0));
    }

    #[test]
    fn a_file_that_is_being_written_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        fs::write(&path, POD).unwrap();
        let mut known = Folder::default();
        known.take(read_settled(dir.path(), &known).unwrap());
        fs::write(&path, "").unwrap();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(SETTLE / 3);
            fs::write(&path, POD).unwrap();
        });
        assert_eq!(read_settled(dir.path(), &known).unwrap(), texts(&[("a.yaml", POD)]));
        writer.join().unwrap();
    }

    #[test]
    fn editors_leftovers_are_no_objects() {
        for (name, is) in [
            ("a.yaml", true),
            ("a.yml", true),
            (".a.yaml.swp", false),
            (".a.yaml", false),
            ("a.yaml~", false),
        ] {
            assert_eq!(is_object_file(Path::new(name)), is, "{name}");
        }
    }
}
