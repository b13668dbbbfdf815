//! OCI archives without a container engine: one layer, the same bytes for the same content.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// What an image holds and how it starts.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Full name with registry and tag.
    pub name: String,
    /// Program and first arguments, absolute.
    pub entrypoint: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// `uid:gid`; none is root.
    pub user: Option<String>,
    /// Files by absolute path.
    pub files: BTreeMap<String, Content>,
}

/// Where a file's bytes come from.
#[derive(Clone, Debug)]
pub enum Content {
    /// Copied; executable.
    Program(PathBuf),
    /// Copied; only read.
    Data(PathBuf),
    /// Written as it stands here; only read.
    Text(String),
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

impl Image {
    /// Writes the archive and gives the digest of the image.
    ///
    /// # Errors
    /// When a file cannot be read or the archive cannot be written.
    pub fn write(&self, archive: &Path) -> anyhow::Result<String> {
        let layer = self.layer()?;
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let mut run = json!({"Entrypoint": self.entrypoint, "Env": self.env, "WorkingDir": "/"});
        if let Some(user) = &self.user {
            run["User"] = json!(user);
        }
        let config = serde_json::to_vec(&json!({
            "architecture": architecture, "os": "linux", "config": run,
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config), "layers": [descriptor(LAYER, &layer)],
        }))?;
        let mut entry = descriptor(MANIFEST, &manifest);
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        entry["annotations"] =
            json!({"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag});
        let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]}))?;

        let partial = archive.with_extension("partial");
        let file = fs::File::create(&partial).with_context(|| format!("create {}", partial.display()))?;
        let mut tar = tar::Builder::new(std::io::BufWriter::new(file));
        let mut blobs = BTreeMap::from([
            ("index.json".to_owned(), index),
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ]);
        let done = digest(&manifest);
        for blob in [layer, config, manifest] {
            blobs.insert(format!("blobs/sha256/{}", hex(&blob)), blob);
        }
        for (name, bytes) in &blobs {
            append(&mut tar, name, bytes, 0o644)?;
        }
        tar.into_inner()?.flush()?;
        fs::rename(&partial, archive)?;
        Ok(done)
    }

    /// The root file system: folders before what is in them, all in order of name, all of one time and owner.
    fn layer(&self) -> anyhow::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (folder, mode) in self.folders() {
            let mut header = header(0, mode);
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, format!("{folder}/"), std::io::empty())?;
        }
        for (path, content) in &self.files {
            let read = |file: &Path| fs::read(file).with_context(|| format!("read {}", file.display()));
            let (bytes, mode) = match content {
                Content::Program(file) => (read(file)?, 0o755),
                Content::Data(file) => (read(file)?, 0o644),
                Content::Text(text) => (text.clone().into_bytes(), 0o644),
            };
            append(&mut tar, path.trim_start_matches('/'), &bytes, mode)?;
        }
        Ok(tar.into_inner()?)
    }

    /// (pure) Every folder that a file needs, and the two that programs expect.
    fn folders(&self) -> BTreeMap<String, u32> {
        let mut names = BTreeSet::from(["etc".to_owned()]);
        for path in self.files.keys() {
            let ancestors = Path::new(path.trim_start_matches('/')).ancestors().skip(1);
            let named = ancestors.map(|folder| folder.to_string_lossy().into_owned());
            names.extend(named.filter(|folder| !folder.is_empty()));
        }
        let mut folders: BTreeMap<_, _> = names.into_iter().map(|name| (name, 0o755)).collect();
        folders.insert("tmp".to_owned(), 0o1777);
        folders
    }
}

fn append<W: std::io::Write>(
    tar: &mut tar::Builder<W>,
    name: &str,
    bytes: &[u8],
    mode: u32,
) -> anyhow::Result<()> {
    Ok(tar.append_data(&mut header(bytes.len(), mode), name, bytes)?)
}

fn header(size: usize, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn descriptor(media_type: &str, bytes: &[u8]) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(bytes))
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(text: &str) -> Image {
        Image {
            name: "docker.io/undermesh/x:1".into(),
            entrypoint: vec!["/usr/local/bin/x".into()],
            files: BTreeMap::from([
                ("/usr/local/bin/x".into(), Content::Text(text.into())),
                ("/etc/passwd".into(), Content::Text("root:x:0:0::/:\n".into())),
            ]),
            ..Image::default()
        }
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, image: &Image| {
            let file = folder.path().join(name);
            let digest = image.write(&file).expect("written");
            (digest, fs::read(file).expect("read"))
        };
        let first = write("a.tar", &image("1"));
        assert_eq!(first, write("b.tar", &image("1")));
        assert_ne!(first.0, write("c.tar", &image("2")).0);
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let bytes = image("1").layer().expect("a layer");
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names: Vec<_> = archive
            .entries()
            .expect("entries")
            .map(|entry| entry.expect("an entry").path().expect("a path").to_string_lossy().into_owned())
            .collect();
        assert_eq!(
            names,
            ["etc/", "tmp/", "usr/", "usr/local/", "usr/local/bin/", "etc/passwd", "usr/local/bin/x"]
        );
    }
}
