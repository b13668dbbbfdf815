//! The supervisor's socket: one JSON line asks, one answers.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::mpsc::{SyncSender, sync_channel},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{expand::Key, layout::Layout, status::Status, supervisor::Event};

/// A client that sends nothing, and a supervisor that does not answer, are waited for this long: longer than any
/// deadline that an answer itself waits for.
const DEADLINE: Duration = Duration::from_secs(60);
/// A request is a few words.
const MAX_REQUEST_BYTES: u64 = 4096;

/// What can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Read the folder again and say how things are.
    Status,
    /// Where a pod's programs run.
    Place(Key),
    /// End the mesh.
    Down,
}

/// Where a pod's programs run, and with which environment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Place {
    /// The holder of its namespaces.
    pub holder: u32,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// The environment of its first container.
    pub env: BTreeMap<String, String>,
}

/// Serves requests on threads of their own until the process ends.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(layout: &Layout, events: SyncSender<Event>) -> io::Result<()> {
    let listener = UnixListener::bind(layout.socket())?;
    thread::spawn(move || {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    let events = events.clone();
                    // Only root reaches this socket, so their number needs no bound of ours.
                    thread::spawn(move || {
                        if let Err(error) = answer(&stream, &events) {
                            tracing::debug!(%error, "a request was not answered");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept requests");
                    thread::sleep(Duration::from_millis(200));
                }
            }
        }
    });
    Ok(())
}

fn answer(stream: &UnixStream, events: &SyncSender<Event>) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_REQUEST_BYTES)).read_line(&mut line)?;
    match serde_json::from_str(&line)? {
        Request::Down => {
            events.send(Event::Down).map_err(io::Error::other)?;
            writeln!(&*stream, "null")
        }
        Request::Place(pod) => {
            let (reply, inbox) = sync_channel(1);
            events.send(Event::Place(pod, reply)).map_err(io::Error::other)?;
            let place = inbox.recv_timeout(DEADLINE).map_err(io::Error::other)?;
            writeln!(&*stream, "{}", serde_json::to_string(&place)?)
        }
        Request::Status => {
            let (reply, inbox) = sync_channel(1);
            events.send(Event::Status(reply)).map_err(io::Error::other)?;
            let draft = inbox.recv_timeout(DEADLINE).map_err(io::Error::other)?;
            writeln!(&*stream, "{}", serde_json::to_string(&draft.complete())?)
        }
    }
}

/// Asks the supervisor behind `socket` for the status.
///
/// # Errors
/// When there is no answer.
pub fn status(socket: &Path) -> io::Result<Status> {
    Ok(serde_json::from_str(&ask(socket, &Request::Status)?)?)
}

/// Asks it where the programs of a pod run; a workload's name stands for its first pod.
///
/// # Errors
/// When there is no answer. The answer itself may be that there is no such pod.
pub fn place(socket: &Path, pod: Key) -> io::Result<Result<Place, String>> {
    Ok(serde_json::from_str(&ask(socket, &Request::Place(pod))?)?)
}

/// Asks it to end the mesh.
///
/// # Errors
/// When it does not answer.
pub fn down(socket: &Path) -> io::Result<()> {
    ask(socket, &Request::Down).map(drop)
}

fn ask(socket: &Path, request: &Request) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    writeln!(stream, "{}", serde_json::to_string(request)?)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line)
}
