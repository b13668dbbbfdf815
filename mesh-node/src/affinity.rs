//! Which endpoint a client pod keeps (`sessionAffinity: ClientIP`), as kube-proxy remembers it: for some time after its
//! last new connection. Where nothing is remembered the choice is a function of client and endpoints
//! ([`mesh_core::balance::kept`]), so a restart of the agent moves nobody whose endpoints are the same.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Addresses of which one pod's endpoint is remembered.
const MAX_REMEMBERED: usize = 1024;

/// What one pod keeps.
#[derive(Debug, Default)]
pub struct Affinity(Mutex<HashMap<SocketAddr, (SocketAddr, Instant)>>);

impl Affinity {
    /// The endpoint that is kept of the service at `dialled`.
    pub fn of(&self, dialled: SocketAddr, now: Instant) -> Option<SocketAddr> {
        self.0.lock().get(&dialled).filter(|(_, until)| *until > now).map(|(endpoint, _)| *endpoint)
    }

    /// Keeps `endpoint` for `time` from now on; with too many others only as long as the choice stays the same.
    pub fn keep(&self, dialled: SocketAddr, endpoint: SocketAddr, time: Duration, now: Instant) {
        let mut kept = self.0.lock();
        if kept.len() >= MAX_REMEMBERED && !kept.contains_key(&dialled) {
            kept.retain(|_, (_, until)| *until > now);
            if kept.len() >= MAX_REMEMBERED {
                return;
            }
        }
        kept.insert(dialled, (endpoint, now + time));
    }

    /// The service there keeps nothing any more.
    pub fn forget(&self, dialled: SocketAddr) {
        self.0.lock().remove(&dialled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_ends_some_time_after_its_last_use() {
        let affinity = Affinity::default();
        let at = |last: u16| SocketAddr::from(([10, 0, 0, 1], last));
        let (now, time) = (Instant::now(), Duration::from_secs(10));
        let later = |seconds| now + Duration::from_secs(seconds);
        affinity.keep(at(80), at(1), time, now);
        assert_eq!(affinity.of(at(80), later(9)), Some(at(1)));
        affinity.keep(at(80), at(1), time, later(9));
        assert_eq!((affinity.of(at(80), later(18)), affinity.of(at(80), later(19))), (Some(at(1)), None));
        for port in 1000..3000 {
            affinity.keep(at(port), at(1), time, later(9));
        }
        assert_eq!(affinity.0.lock().len(), MAX_REMEMBERED);
        assert_eq!(affinity.of(at(80), later(10)), Some(at(1)), "pushed out by others");
        affinity.keep(at(2999), at(1), time, later(30));
        assert_eq!(affinity.of(at(2999), later(31)), Some(at(1)), "what has ended makes room");
        affinity.forget(at(2999));
        assert_eq!(affinity.of(at(2999), later(31)), None);
    }
}
