//! (pure) A YAML file cut into its documents, each with the line at which it begins.

use serde::Serialize;
use serde_json::Value;

/// Something wrong in the user's folder, named so that it can be found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Problem {
    /// The file, relative to the folder.
    pub file: String,
    /// The line, counted from 1; the document's first line where nothing nearer is known.
    pub line: usize,
    /// The object as `Kind namespace/name`, empty when the file could not be read that far.
    #[serde(default)]
    pub object: String,
    /// Path of the field, for example `spec.containers[0].command`.
    #[serde(default)]
    pub field: String,
    /// What is wrong, for people.
    pub reason: String,
    /// `error` or `warning`.
    #[serde(default)]
    pub severity: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}: ", self.file, self.line, self.severity)?;
        if !self.object.is_empty() {
            write!(f, "{}: ", self.object)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.reason)
    }
}

/// One object as it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The file, relative to the folder.
    pub file: String,
    /// First line of the document, counted from 1.
    pub line: usize,
    /// Last line of the document, counted from 1.
    pub last_line: usize,
    /// `kind`.
    pub kind: String,
    /// `metadata.namespace`, `default` when none is written.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// The whole object.
    pub value: Value,
}

impl Document {
    /// The object's name for people.
    pub fn object(&self) -> String {
        format!("{} {}/{}", self.kind, self.namespace, self.name)
    }

    /// A problem of this object.
    pub fn problem(&self, field: &str, reason: impl Into<String>) -> Problem {
        Problem {
            file: self.file.clone(),
            line: self.line,
            object: self.object(),
            field: field.to_owned(),
            reason: reason.into(),
            severity: "error".to_owned(),
        }
    }

    /// A label of the object.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.value.pointer("/metadata/labels")?.get(key)?.as_str()
    }
}

/// Cuts `text` at its `---` lines and reads every document.
///
/// # Errors
/// The first document that is no YAML or no object: the file as a whole then counts as broken, so that its last good
/// content stays in force.
pub fn parse(file: &str, text: &str) -> Result<Vec<Document>, Box<Problem>> {
    let mut documents = Vec::new();
    for (line, last_line, part) in split(text) {
        let broken = |line: usize, reason: String| {
            Box::new(Problem {
                file: file.to_owned(),
                line,
                object: String::new(),
                field: String::new(),
                reason,
                severity: "error".to_owned(),
            })
        };
        let value: Value = serde_yaml_ng::from_str(&part).map_err(|error| {
            let at = error.location().map_or(line, |place| line + place.line().saturating_sub(1));
            broken(at, error.to_string())
        })?;
        if value.is_null() {
            continue;
        }
        let text_at = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let (Some(kind), Some(name)) = (text_at("/kind"), text_at("/metadata/name")) else {
            return Err(broken(
                line,
                "not a Kubernetes object: kind and metadata.name are required".to_owned(),
            ));
        };
        let namespace = text_at("/metadata/namespace").unwrap_or_else(|| "default".to_owned());
        documents.push(Document { file: file.to_owned(), line, last_line, kind, namespace, name, value });
    }
    Ok(documents)
}

/// `text` with the given documents blanked line by line, so that every other line keeps its number.
pub fn without(text: &str, gone: &[&Document]) -> String {
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if gone.iter().any(|document| (document.line..=document.last_line).contains(&number)) {
            out.push('#');
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

/// The documents' first line, last line and text. A `---` line belongs to no document.
fn split(text: &str) -> Vec<(usize, usize, String)> {
    let mut parts = Vec::new();
    let mut first = 1;
    let mut part = String::new();
    let mut last = 0;
    for (index, line) in text.lines().enumerate() {
        last = index + 1;
        if line == "---" || line.starts_with("--- ") {
            parts.push((first, last.saturating_sub(1), std::mem::take(&mut part)));
            first = last + 1;
        } else {
            part.push_str(line);
            part.push('\n');
        }
    }
    parts.push((first, last, part));
    parts.retain(|(_, _, part)| part.lines().any(|line| !line.trim().is_empty() && !line.starts_with('#')));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "# head\n---\nkind: Pod\nmetadata:\n  name: a\n---\n\nkind: Service\nmetadata:\n  name: b\n  namespace: shop\n";

    #[test]
    fn documents_know_their_lines() {
        let documents = parse("x.yaml", TWO).unwrap();
        let seen: Vec<_> = documents.iter().map(|d| (d.object(), d.line, d.last_line)).collect();
        assert_eq!(seen, [("Pod default/a".to_owned(), 3, 5), ("Service shop/b".to_owned(), 7, 11)]);
    }

    #[test]
    fn blanking_keeps_the_numbers_of_the_other_lines() {
        let documents = parse("x.yaml", TWO).unwrap();
        let rest = without(TWO, &[&documents[0]]);
        assert_eq!(rest.lines().count(), TWO.lines().count());
        assert_eq!(parse("x.yaml", &rest).unwrap(), [documents[1].clone()]);
    }

    #[test]
    fn a_broken_document_is_named_by_line() {
        let problem = parse("x.yaml", "kind: Pod\nmetadata:\n  name: a\n---\nkind: [\n").unwrap_err();
        assert!(problem.line >= 5, "{problem}");
        let problem = parse("x.yaml", "kind: Pod\nmetadata:\n  name: a\n---\nspec: {}\n").unwrap_err();
        assert_eq!((problem.line, problem.file.as_str()), (5, "x.yaml"));
    }
}
