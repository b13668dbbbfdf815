//! One request to the agent over its Unix socket, with an end to every wait.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use mesh_core::flag::Flag;
use mesh_node::cni::wire::Refused;

/// Between two attempts to reach an agent that is not there.
const AGAIN: Duration = Duration::from_millis(100);
/// An agent that is restarted is back by then.
const RESTART: Duration = Duration::from_secs(10);
/// What starts without the agent does not wait for it this long.
const BRIEF: Duration = Duration::from_secs(1);
/// Largest answer, bytes.
const ANSWER_BYTES: usize = 64 << 10;

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For an agent that is not there.
    absent: Duration,
    /// For everything.
    total: Duration,
}

impl Patience {
    /// A restart of the agent is waited for.
    pub fn full(total: Duration) -> Self {
        Self { absent: RESTART.min(total), total }
    }

    /// An agent that is not there is hardly waited for, one that is gets its time.
    pub fn brief(total: Duration) -> Self {
        Self { absent: BRIEF.min(total), total }
    }

    /// One attempt.
    pub fn once(total: Duration) -> Self {
        Self { absent: Duration::ZERO, total }
    }
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The agent answered.
    Answer {
        /// The HTTP status.
        status: u16,
        /// The body.
        body: Vec<u8>,
    },
    /// It did not; in words.
    Silence(String),
}

/// Asks. Tries again as long as nobody is there, or whoever was there went away without an answer.
pub fn ask(socket: &Path, method: &str, path: &str, body: &[u8], patience: Patience) -> Asked {
    let begin = Instant::now();
    let end = begin + patience.total;
    loop {
        let why = match exchange(socket, method, path, body, end) {
            // Its successor will answer.
            Ok((503, body)) if is_leaving(&body) => io::Error::other("it is shutting down"),
            Ok((status, body)) => return Asked::Answer { status, body },
            Err(error) if is_late(&error) => {
                let seconds = patience.total.as_secs();
                return Asked::Silence(format!("no answer within {seconds} s"));
            }
            Err(error) => error,
        };
        if begin.elapsed() + AGAIN > patience.absent || Instant::now() + AGAIN > end {
            return Asked::Silence(why.to_string());
        }
        thread::sleep(AGAIN);
    }
}

fn is_leaving(body: &[u8]) -> bool {
    serde_json::from_slice::<Refused>(body).is_ok_and(|refused| refused.reason == Flag::Drain.code())
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn exchange(
    socket: &Path,
    method: &str,
    path: &str,
    body: &[u8],
    end: Instant,
) -> io::Result<(u16, Vec<u8>)> {
    // Connecting to a Unix socket never waits, unless its queue is full; then it is refused, and tried again.
    let mut stream = UnixStream::connect(socket)?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.set_write_timeout(Some(left(end)?))?;
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left(end)?))?;
        match stream.read(&mut buffer)? {
            0 => break,
            n => answer.extend_from_slice(&buffer[..n]),
        }
        if answer.len() > ANSWER_BYTES {
            return Err(io::Error::other("the answer is too long"));
        }
    }
    parse(&answer)
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the agent broke off its answer"))
}

fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// (pure) Status and body of an answer that is complete.
fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let split = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..split)?).ok()?;
    let body = answer.get(split + 4..)?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    match length {
        Some(length) if body.len() == length => Some((status, body.to_vec())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_answer_is_one() {
        let check = |text: &str, expected: Option<(u16, &str)>| {
            let got = parse(text.as_bytes());
            assert_eq!(got, expected.map(|(status, body)| (status, body.as_bytes().to_vec())), "{text:?}");
        };
        check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", Some((200, "{}")));
        check("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", Some((503, "")));
        check("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}", None);
        check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n", None);
        check("HTTP/1.1 200 OK\r\n\r\n{}", None);
        check("HTTP/2 200\r\ncontent-length: 0\r\n\r\n", None);
        check("", None);
    }
}
