//! Calls to the admin and enrolment sockets of our own processes, from threads without a runtime.

use std::{path::Path, time::Duration};

use mesh_net::admin::{self, Method};

/// Agents answer an enrolment when it is in force, which takes as long as their kernel does.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// One request over the Unix socket at `path`; the status and the body of its answer.
///
/// # Errors
/// When there is no answer within [`DEADLINE`]; in words, as it goes into the status.
pub fn call(path: &Path, method: Method, uri: &str, body: Vec<u8>) -> Result<(u16, Vec<u8>), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("make a runtime: {error}"))?;
    match runtime.block_on(admin::call(path, method, uri, body, DEADLINE)) {
        Ok((status, body)) => Ok((status, body.to_vec())),
        Err(error) => Err(told(&error)),
    }
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
