//! A directory as the source, tokens and root in directories beside it: local mode.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use mesh_net::{drain::Drain, task::TaskGroup};
use tokio::sync::Notify;

use super::{AppError, Parts, follow};
use crate::{
    ca::root::Root,
    config::Settings,
    credentials::{Callers, Credentials},
    pipeline::Pipeline,
    source::file::{self, Directory},
};

/// Reads the directory for the first time and follows it.
pub(super) fn open(
    settings: &Settings,
    drain: &Drain,
    tasks: &TaskGroup,
    now: SystemTime,
) -> Result<Parts, AppError> {
    let directory = |path: &Option<PathBuf>| {
        let path = path.clone().unwrap_or_default();
        if path.is_dir() { Ok(path) } else { Err(AppError::NoDirectory(path)) }
    };
    let source = directory(&settings.source_dir)?;
    let ca = directory(&settings.ca_dir)?;
    let credentials = directory(&settings.credentials)?;
    let root = Root::open(&ca, now)?;
    let pipeline = Arc::new(Pipeline::new(Box::new(Directory::new(source.clone())), settings.mesh()));
    // Watched before the first reading, so that no edit falls between them.
    let changed = Arc::new(Notify::new());
    let watcher = file::watch(&source, changed.clone())?;
    pipeline.rescan();
    tasks.spawn(follow(pipeline.clone(), changed, watcher, drain.watch()));
    Ok(Parts { pipeline, callers: Callers::Files(Credentials::new(credentials)), root, cluster: None })
}
