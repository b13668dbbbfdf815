//! Calls to the admin and enrolment sockets of our own processes.

use std::{path::Path, time::Duration};

/// Agents answer an enrolment when it is in force, which takes as long as their kernel does.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The peer is not there, or broke the connection.
    #[error("{0}")]
    Unreachable(String),
    /// The peer did not answer in time.
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Deadline,
}

/// One request over the Unix socket at `path`; the status and the body of its answer.
///
/// # Errors
/// When there is no answer within [`DEADLINE`].
pub fn call(path: &Path, method: &str, uri: &str, body: Vec<u8>) -> Result<(u16, Vec<u8>), CallError> {
    let unreachable = |error: &dyn std::fmt::Display| CallError::Unreachable(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| unreachable(&error))?;
    runtime.block_on(async {
        match tokio::time::timeout(DEADLINE, exchange(path, method, uri, body)).await {
            Ok(answer) => answer.map_err(|error| unreachable(&error)),
            Err(_) => Err(CallError::Deadline),
        }
    })
}

async fn exchange(path: &Path, method: &str, uri: &str, body: Vec<u8>) -> anyhow::Result<(u16, Vec<u8>)> {
    use http_body_util::{BodyExt as _, Full};
    let stream = tokio::net::UnixStream::connect(path).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await?;
    let request = http::Request::builder()
        .method(method)
        .uri(uri)
        .header("host", "localhost")
        .body(Full::new(hyper::body::Bytes::from(body)))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes().to_vec();
        drop(sender);
        Ok((status, body))
    };
    let (answer, _) = tokio::join!(answer, connection);
    answer
}
