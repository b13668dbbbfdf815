//! What a request about a pod means, given what is already there (pure).
//!
//! ```text
//!            PUT                    DELETE leave
//! (unknown) ─────► Serving ───────────────────────► Leaving ──last connection ended──► (unknown)
//!     ▲              │  │ PUT with other addresses: Serving, with those
//!     │              │  │ PUT with another namespace or account: DELETE deleted, then PUT
//!     │              │  └────────────────────────────────────────────────────────────► Serving
//!     └──────────────┘
//!      DELETE deleted, or the namespace's name vanished; from every state
//!
//! At restart what was kept is adopted: Serving, or Failed and tried again until it works or the name vanishes. A pod
//! that failed stays captured, and so without connections: it never gets any around the mesh.
//! ```

use std::net::IpAddr;

use super::{
    netns::NetnsId,
    record::{Kept, PodRecord},
};

/// How a pod is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// It is gone: everything of it is cut and freed at once.
    Deleted,
    /// It lives on outside the mesh: direct and plain connections stay, tunnelled ones drain.
    Leave,
}

impl Release {
    /// The value of `mode` in a request.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "deleted" => Some(Self::Deleted),
            "leave" => Some(Self::Leave),
            _ => None,
        }
    }
}

/// What holds a pod now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Captured and served.
    Serving,
    /// Kept from before a restart, not served yet.
    Failed,
}

/// What to do about a request to enrol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: it is as wanted.
    Already,
    /// Enrol it.
    Start,
    /// It is served, and only its addresses are others: give it these.
    Readdress,
    /// Release what goes by this uid as deleted, then enrol.
    Replace,
    /// Another pod has what this one claims.
    Conflict {
        /// Its uid.
        uid: String,
        /// Namespace or address.
        what: String,
    },
}

/// Decides about a request to enrol `wanted`, whose namespace is `netns`.
pub fn on_put<'a>(held: impl Iterator<Item = (&'a Kept, Held)>, wanted: &PodRecord, netns: NetnsId) -> Step {
    let mut step = Step::Start;
    for (kept, state) in held {
        if kept.pod.uid == wanted.uid {
            step = match state {
                Held::Serving if kept.netns == netns && kept.pod == *wanted => Step::Already,
                Held::Serving if kept.netns == netns && differs_in_addresses(&kept.pod, wanted) => {
                    Step::Readdress
                }
                // As it is wanted now, and captured all the while.
                Held::Failed if kept.netns == netns => Step::Start,
                Held::Serving | Held::Failed => Step::Replace,
            };
        } else if let Some(what) = claims_the_same(kept, wanted, netns) {
            return Step::Conflict { uid: kept.pod.uid.clone(), what };
        }
    }
    step
}

fn differs_in_addresses(kept: &PodRecord, wanted: &PodRecord) -> bool {
    *kept == PodRecord { ips: kept.ips.clone(), ..wanted.clone() }
}

/// One namespace is one pod, and an address reaches one pod: the kernel's maps are keyed by both.
fn claims_the_same(kept: &Kept, wanted: &PodRecord, netns: NetnsId) -> Option<String> {
    if kept.netns == netns {
        return Some("the network namespace".to_owned());
    }
    let shared: Option<&IpAddr> = wanted.ips.iter().find(|address| kept.pod.ips.contains(address));
    shared.map(|address| format!("the address {address}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::record::tests::record;

    const HERE: NetnsId = NetnsId { device: 4, inode: 1 };
    const THERE: NetnsId = NetnsId { device: 4, inode: 2 };

    fn kept(uid: &str, netns: NetnsId) -> Kept {
        Kept { pod: record(uid), netns }
    }

    #[test]
    fn a_request_is_judged_by_what_is_there() {
        let other_account = PodRecord { service_account: "other".to_owned(), ..record("a") };
        let elsewhere = PodRecord { ips: vec!["10.9.9.9".parse().unwrap()], ..record("a") };
        let check = |held: &[(Kept, Held)], wanted: &PodRecord, netns, expected: &str| {
            let step = on_put(held.iter().map(|(kept, state)| (kept, *state)), wanted, netns);
            let said = match step {
                Step::Conflict { uid, what } => format!("{uid} has {what}"),
                other => format!("{other:?}"),
            };
            assert_eq!(said, expected);
        };
        check(&[], &record("a"), HERE, "Start");
        check(&[(kept("a", HERE), Held::Serving)], &record("a"), HERE, "Already");
        check(&[(kept("a", HERE), Held::Serving)], &record("a"), THERE, "Replace");
        check(&[(kept("a", HERE), Held::Serving)], &other_account, HERE, "Replace");
        check(&[(kept("a", HERE), Held::Failed)], &record("a"), HERE, "Start");
        check(&[(kept("a", HERE), Held::Failed)], &record("a"), THERE, "Replace");
        check(&[(kept("b", HERE), Held::Serving)], &record("a"), HERE, "b has the network namespace");
        check(&[(kept("b", THERE), Held::Failed)], &record("a"), HERE, "b has the address 10.0.0.2");
        check(&[(kept("b", THERE), Held::Serving)], &elsewhere, HERE, "Start");
        let moved = PodRecord { uid: "a".to_owned(), ..elsewhere.clone() };
        check(&[(kept("a", HERE), Held::Serving)], &moved, HERE, "Readdress");
        check(&[(kept("a", HERE), Held::Serving)], &moved, THERE, "Replace");
        check(&[(kept("a", HERE), Held::Failed)], &moved, HERE, "Start");
        check(
            &[(kept("a", HERE), Held::Serving), (kept("b", THERE), Held::Serving)],
            &record("a"),
            HERE,
            "b has the address 10.0.0.2",
        );
    }

    #[test]
    fn modes_have_two_names() {
        assert_eq!(Release::parse("deleted"), Some(Release::Deleted));
        assert_eq!(Release::parse("leave"), Some(Release::Leave));
        assert_eq!(Release::parse(""), None);
    }
}
