//! What a machine can see of the house rules: edges between crates, sizes, headers, words, links.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::shell;

/// Which of our crates a crate may use, in code, tests and build scripts. A new edge needs a reason: see the table in
/// `docs/STYLE.md`.
const EDGES: &[(&str, &[&str])] = &[
    ("mesh-ebpf-common", &[]),
    ("mesh-ebpf", &["mesh-ebpf-common"]),
    ("mesh-core", &[]),
    ("mesh-net", &["mesh-core"]),
    ("mesh-control", &["mesh-core", "mesh-net"]),
    ("mesh-node", &["mesh-core", "mesh-net", "mesh-ebpf-common"]),
    ("mesh-waypoint", &["mesh-core", "mesh-net"]),
    ("mesh-cli", &["mesh-core", "mesh-net", "mesh-control"]),
    ("bookinfo", &[]),
    ("xtask", &[]),
    ("undermesh-fuzz", &["mesh-control", "mesh-core", "mesh-net", "mesh-waypoint"]),
    // The suites may use anything.
    (
        "mesh-tests",
        &[
            "bookinfo",
            "mesh-cli",
            "mesh-control",
            "mesh-core",
            "mesh-ebpf-common",
            "mesh-net",
            "mesh-node",
            "mesh-waypoint",
        ],
    ),
];

/// Crates that outside crates must not reach: what would make a pure crate impure, or a process know too much.
const FORBIDDEN: &[(&str, &[&str])] = &[
    (
        "mesh-core",
        &["tokio", "aya", "k8s-openapi", "kube", "hyper", "rustls", "rand", "time", "nix", "socket2"],
    ),
    ("mesh-ebpf-common", &["tokio", "mesh-core", "std"]),
    ("mesh-net", &["aya", "k8s-openapi", "kube"]),
    ("mesh-node", &["k8s-openapi", "kube"]),
    ("mesh-waypoint", &["aya", "k8s-openapi", "kube", "nix"]),
    ("mesh-control", &["aya"]),
    ("mesh-cli", &["aya"]),
];

/// A file near this length holds a second concept.
const LINES: usize = 800;

/// Words that must not stand in our files, and what to do instead.
const WORDS: &[(&str, &str)] = &[
    (concat!("FIX", "ME"), "mend it, or open an issue and write TODO(#number)"),
    (concat!("XX", "X"), "open an issue and write TODO(#number)"),
    (concat!("HA", "CK:"), "say which constraint makes it necessary"),
    (concat!("black", "list"), "say what it does: denied, refused"),
    (concat!("white", "list"), "say what it does: allowed"),
];

/// Runs all of it over the files that git knows.
///
/// # Errors
/// When a rule is broken; with every place.
pub fn run() -> anyhow::Result<()> {
    let mut problems = edges(&members()?);
    let root = shell::root();
    for file in files()? {
        // Deleted, but not yet in the index.
        let Ok(bytes) = fs::read(root.join(&file)) else { continue };
        let Ok(text) = String::from_utf8(bytes) else { continue };
        problems.extend(source(&file, &text));
        if file.extension().is_some_and(|extension| extension == "md") {
            problems.extend(dead_links(&root, &file, &text));
        }
    }
    for problem in &problems {
        eprintln!("tidy: {problem}");
    }
    if !problems.is_empty() {
        bail!("{} places to tidy", problems.len());
    }
    Ok(())
}

/// A member of the workspace and what it names as dependencies of any kind.
struct Member {
    name: String,
    uses: Vec<String>,
}

fn members() -> anyhow::Result<Vec<Member>> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(shell::root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata")?;
    let member = |package: cargo_metadata::Package| Member {
        name: package.name.to_string(),
        uses: package.dependencies.into_iter().map(|dependency| dependency.name).collect(),
    };
    Ok(metadata.packages.into_iter().map(member).collect())
}

/// (pure) Edges that the tables do not have.
fn edges(members: &[Member]) -> Vec<String> {
    let mut problems = Vec::new();
    for member in members {
        let Some((_, allowed)) = EDGES.iter().find(|(name, _)| *name == member.name) else {
            problems.push(format!("{}: a crate that xtask/src/tidy.rs does not know", member.name));
            continue;
        };
        let ours = member.uses.iter().filter(|name| members.iter().any(|member| member.name == **name));
        for used in ours.filter(|name| !allowed.contains(&name.as_str())) {
            problems.push(format!("{} must not use {used}: see EDGES in xtask/src/tidy.rs", member.name));
        }
        let row = FORBIDDEN.iter().find(|(name, _)| *name == member.name);
        let forbidden = row.map(|(_, names)| *names).unwrap_or_default();
        for used in member.uses.iter().filter(|name| forbidden.contains(&name.as_str())) {
            problems
                .push(format!("{} must not know {used}: see FORBIDDEN in xtask/src/tidy.rs", member.name));
        }
    }
    problems
}

/// What git tracks or would track.
fn files() -> anyhow::Result<Vec<PathBuf>> {
    let mut git = shell::command("git");
    let listed = shell::output(git.args(["ls-files", "--cached", "--others", "--exclude-standard"]))?;
    Ok(listed.lines().map(PathBuf::from).collect())
}

/// (pure) What is wrong with one file's text.
fn source(file: &Path, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let own_words = matches!(file.file_name().and_then(|name| name.to_str()), Some("Cargo.lock" | "LICENSE"));
    if file.extension().is_some_and(|extension| extension == "rs") {
        // A module of tests belongs to the file that it tests.
        let tests = file.file_stem().is_some_and(|name| name == "tests");
        if !tests && !text.starts_with("//!") {
            problems.push(format!("{}:1: no `//!` line that says what the file is", file.display()));
        }
        let lines = text.lines().count();
        if lines > LINES {
            problems.push(format!("{}: {lines} lines: find the second concept in it", file.display()));
        }
    }
    for (number, line) in text.lines().enumerate().filter(|_| !own_words) {
        for (word, instead) in WORDS.iter().filter(|(word, _)| line.contains(word)) {
            problems.push(format!("{}:{}: {word}: {instead}", file.display(), number + 1));
        }
        if open_todo(line) {
            problems.push(format!("{}:{}: a to-do without an issue number", file.display(), number + 1));
        }
    }
    problems
}

/// (pure) Whether a comment holds a to-do that names no issue.
fn open_todo(line: &str) -> bool {
    let word = concat!("TO", "DO");
    let Some((before, after)) = line.split_once(word) else { return false };
    let comment =
        before.contains("//") || before.trim_start().starts_with(['#', '*']) || before.contains("<!--");
    let numbered = after
        .strip_prefix("(#")
        .and_then(|rest| rest.split_once(')'))
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
    comment && !numbered && !before.ends_with('`')
}

/// Relative links of a Markdown file that lead nowhere.
fn dead_links(root: &Path, file: &Path, text: &str) -> Vec<String> {
    let folder = root.join(file.parent().unwrap_or(Path::new("")));
    let mut problems = Vec::new();
    for (number, link) in links(text) {
        let path = link.split(['#', '?']).next().unwrap_or_default();
        if !path.is_empty() && !folder.join(path).exists() {
            problems.push(format!("{}:{number}: {link} leads nowhere", file.display()));
        }
    }
    problems
}

/// (pure) Relative link targets, with their lines.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut code = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        if code {
            continue;
        }
        let mut rest = line;
        while let Some((_, after)) = rest.split_once("](") {
            let Some((target, after)) = after.split_once(')') else { break };
            rest = after;
            if !target.contains("://") && !target.starts_with("mailto:") {
                found.push((number + 1, target));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, uses: &[&str]) -> Member {
        Member { name: name.into(), uses: uses.iter().map(|name| (*name).into()).collect() }
    }

    #[test]
    fn the_workspace_keeps_its_edges() {
        assert_eq!(edges(&members().expect("metadata")), Vec::<String>::new());
    }

    #[test]
    fn a_new_edge_is_seen() {
        let members = [
            member("mesh-core", &["serde", "mesh-net", "tokio"]),
            member("mesh-net", &["mesh-core", "tokio"]),
            member("mesh-new", &[]),
        ];
        assert_eq!(
            edges(&members),
            [
                "mesh-core must not use mesh-net: see EDGES in xtask/src/tidy.rs",
                "mesh-core must not know tokio: see FORBIDDEN in xtask/src/tidy.rs",
                "mesh-new: a crate that xtask/src/tidy.rs does not know",
            ]
        );
    }

    #[test]
    fn every_edge_of_the_table_leads_to_a_member() {
        for (_, allowed) in EDGES {
            for name in *allowed {
                assert!(EDGES.iter().any(|(known, _)| known == name), "{name}");
            }
        }
    }

    #[test]
    fn to_dos_need_a_number() {
        let word = concat!("TO", "DO");
        for (line, open) in [
            (format!("// {word}: later"), true),
            (format!("let x = 1; // {word}(me) later"), true),
            (format!("# {word} later"), true),
            (format!("// {word}(#12): later"), false),
            (format!("`{word}` needs a number"), false),
            ("nothing".to_owned(), false),
        ] {
            assert_eq!(open_todo(&line), open, "{line}");
        }
    }

    #[test]
    fn files_need_a_header_and_an_end() {
        let long = "//! x\n".to_owned() + &"\n".repeat(LINES);
        assert_eq!(source(Path::new("a.rs"), "fn main() {}").len(), 1);
        assert_eq!(source(Path::new("a.rs"), &long).len(), 1);
        assert_eq!(source(Path::new("a.rs"), "//! A file.\n").len(), 0);
        assert_eq!(source(Path::new("a.md"), WORDS[0].0).len(), 1);
    }

    #[test]
    fn links_that_count_are_relative_and_outside_code() {
        let text = "[a](docs/a.md#x) and [b](https://x/y)\n```\n[c](none.md)\n```\n[d](#here)\n";
        assert_eq!(links(text), [(1, "docs/a.md#x"), (5, "#here")]);
        let dead = dead_links(&shell::root(), Path::new("README.md"), "[a](docs/nothing-here.md) [b](#x)");
        assert_eq!(dead, ["README.md:1: docs/nothing-here.md leads nowhere"]);
    }
}
