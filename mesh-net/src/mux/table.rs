//! The streams of a connection, and how far it is on its way to its end.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    task::Waker,
};

use super::{
    Cause,
    cell::Core,
    frame::{Broken, LARGEST},
};

/// Streams whose late frames mean nothing: we have reset them. As many as we may reset before the peer hears of it.
const FORGOTTEN: usize = 2 * super::HELD_STREAMS;

/// Which end we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We open streams.
    Client,
    /// The peer opens streams.
    Server,
}

/// How far we are with leaving.
///
/// ```text
/// Staying ──drain──► Announced (GOAWAY 2^31-1, PING) ──answer──► Leaving (GOAWAY of the last stream)
///     └───────────────nobody will open another (client)──────────────▲
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Not at all.
    Staying,
    /// The peer was told; what it has sent meanwhile is still served.
    Announced,
    /// What runs is the last.
    Leaving,
}

/// The streams of one connection.
#[derive(Debug)]
pub struct Table {
    role: Role,
    open: HashMap<u32, Arc<Core>>,
    /// The next stream of ours, or the last one of the peer.
    number: u32,
    /// Reset by us, while the peer may still send on them.
    forgotten: VecDeque<u32>,
    /// Streams that somebody holds, open or not.
    pub held: usize,
    /// Streams that the peer permits us.
    pub permitted: usize,
    /// What the peer takes on a new stream, bytes.
    pub window: u32,
    /// Who waits to open one.
    opening: Vec<Waker>,
    /// Our leaving.
    pub stage: Stage,
    /// The peer leaves: the last stream that it acts on.
    pub peer_leaves: Option<u32>,
    /// Nobody can open another one.
    pub abandoned: bool,
    /// The end.
    pub ended: Option<Cause>,
}

/// What a stream number means to the reader.
pub enum Found {
    /// A stream that is open at least one way.
    Open(Arc<Core>),
    /// One that we have reset, or that came too late: ignored.
    Late,
    /// One that was closed.
    Closed,
}

impl Table {
    /// No streams; we may have `permitted` open.
    pub fn new(role: Role, permitted: usize) -> Self {
        Self {
            role,
            open: HashMap::new(),
            number: if role == Role::Client { 1 } else { 0 },
            forgotten: VecDeque::new(),
            held: 0,
            permitted,
            window: super::frame::DEFAULT_WINDOW_BYTES,
            opening: Vec::new(),
            stage: Stage::Staying,
            peer_leaves: None,
            abandoned: false,
            ended: None,
        }
    }

    /// Streams that are open.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// All that are open.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Core>> {
        self.open.values()
    }

    /// A number for a stream of ours, unless there are too many of them: then `waker` is woken when there may not be.
    /// None if there are no more numbers.
    pub fn next_number(&mut self, waker: &Waker) -> Option<Option<u32>> {
        if self.number > LARGEST {
            return Some(None);
        }
        if self.open.len() >= self.permitted {
            if !self.opening.iter().any(|other| other.will_wake(waker)) {
                self.opening.push(waker.clone());
            }
            return None;
        }
        let number = self.number;
        self.number += 2;
        Some(Some(number))
    }

    /// A stream that begins.
    pub fn insert(&mut self, core: Arc<Core>) {
        self.open.insert(core.id, core);
    }

    /// The last stream of the peer.
    pub fn last_of_peer(&self) -> u32 {
        if self.role == Role::Server { self.number } else { 0 }
    }

    /// The peer opens `stream`, which is not open. Whether it is new, and not one of the past.
    pub fn is_new(&mut self, stream: u32) -> Result<bool, Broken> {
        if self.role == Role::Client || stream.is_multiple_of(2) {
            return Err(Broken::protocol("a stream that the peer may not open"));
        }
        if stream <= self.number {
            return Ok(false);
        }
        if self.stage != Stage::Leaving {
            self.number = stream;
        }
        Ok(true)
    }

    /// The stream that a frame is about.
    ///
    /// # Errors
    /// It has never been one.
    pub fn find(&self, stream: u32) -> Result<Found, Broken> {
        if let Some(core) = self.open.get(&stream) {
            return Ok(Found::Open(core.clone()));
        }
        if self.forgotten.contains(&stream) {
            return Ok(Found::Late);
        }
        let past = match self.role {
            Role::Client => stream < self.number,
            Role::Server => stream <= self.number,
        };
        match (!stream.is_multiple_of(2), past) {
            (true, true) => Ok(Found::Closed),
            (true, false) if self.role == Role::Server && self.stage == Stage::Leaving => Ok(Found::Late),
            _ => Err(Broken::protocol("a frame on an idle stream")),
        }
    }

    /// The stream is over; `reset` if by us. Returns whom to wake: who waits for a place.
    pub fn remove(&mut self, stream: u32, reset: bool) -> Vec<Waker> {
        if reset {
            self.forget(stream);
        }
        if self.open.remove(&stream).is_none() {
            return Vec::new();
        }
        if self.open.is_empty() {
            self.open = HashMap::new();
        }
        std::mem::take(&mut self.opening)
    }

    /// Late frames of `stream` mean nothing.
    pub fn forget(&mut self, stream: u32) {
        if self.forgotten.len() >= FORGOTTEN {
            self.forgotten.pop_front();
        }
        self.forgotten.push_back(stream);
    }

    /// Who waits to open one.
    pub fn opening(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.opening)
    }

    /// Takes all streams beyond `last`.
    pub fn beyond(&mut self, last: u32) -> Vec<Arc<Core>> {
        let gone: Vec<_> = self.open.values().filter(|core| core.id > last).cloned().collect();
        self.open.retain(|id, _| *id <= last);
        gone
    }

    /// Whether the connection has done all it is there for.
    pub fn is_done(&self) -> bool {
        let leaving = self.stage == Stage::Leaving || self.peer_leaves.is_some() || self.abandoned;
        leaving && self.open.is_empty()
    }
}
