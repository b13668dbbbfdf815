//! The certificate authority: signs only what the caller may have, and writes every name itself.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use mesh_core::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use parking_lot::Mutex;

use crate::{compile::World, credentials::Principal};

pub mod authorize;
pub mod root;
pub mod secret;
pub mod sign;

use authorize::Refused;
use root::Root;
use sign::Unsignable;

/// Certificates that one caller may ask for at once: the pods of a full node, twice.
const BURST: f64 = 220.0;
/// And then per second.
const PER_SECOND: f64 = 5.0;
/// Callers whose requests are counted before those that have asked nothing for a while are forgotten.
const REMEMBERED: usize = 1024;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The caller may not have it.
    #[error("not allowed")]
    Refused(#[from] Refused),
    /// The request cannot be signed.
    #[error("the request cannot be signed")]
    Unsignable(#[from] Unsignable),
    /// Too many requests of this caller.
    #[error("too many requests")]
    TooMany,
}

/// The authority.
pub struct Authority {
    root: Root,
    max_ttl: Duration,
    buckets: Mutex<HashMap<Principal, (f64, Instant)>>,
}

impl Authority {
    /// An authority that signs with `root`, for at most `max_ttl`.
    pub fn new(root: Root, max_ttl: Duration) -> Self {
        Self { root, max_ttl, buckets: Mutex::new(HashMap::new()) }
    }

    /// The root.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Answers one request of `caller`.
    ///
    /// # Errors
    /// The caller may not have it, asks too often, or sent something that cannot be signed.
    pub fn create(
        &self,
        world: &World,
        trust_domain: &str,
        caller: &Principal,
        request: &IstioCertificateRequest,
        (now, instant): (SystemTime, Instant),
    ) -> Result<IstioCertificateResponse, CaError> {
        // Checked first: a refused caller must not be able to make us work either.
        self.take(caller, instant)?;
        let identity = authorize::authorize(world, trust_domain, caller, request.impersonated_identity())?;
        let asked = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
        let ttl = asked.map_or(self.max_ttl, Duration::from_secs).min(self.max_ttl);
        let leaf = sign::sign(&self.root, &request.csr, &identity, ttl, now)?;
        let mut cert_chain = vec![leaf];
        cert_chain.extend(self.root.intermediates());
        cert_chain.push(self.root.pem().to_owned());
        Ok(IstioCertificateResponse { cert_chain })
    }

    fn take(&self, caller: &Principal, now: Instant) -> Result<(), CaError> {
        let mut buckets = self.buckets.lock();
        if buckets.len() >= REMEMBERED && !buckets.contains_key(caller) {
            // A bucket that has filled up again says no more than none.
            let full = BURST / PER_SECOND;
            buckets.retain(|_, (_, at)| now.saturating_duration_since(*at).as_secs_f64() < full);
        }
        let (left, at) = buckets.entry(caller.clone()).or_insert((BURST, now));
        *left = (*left + now.saturating_duration_since(*at).as_secs_f64() * PER_SECOND).min(BURST);
        *at = now;
        if *left < 1.0 {
            return Err(CaError::TooMany);
        }
        *left -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_that_ask_no_more_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let authority =
            Authority::new(Root::open(dir.path(), SystemTime::now()).unwrap(), Duration::from_secs(60));
        let mut now = Instant::now();
        for number in 0..10 * REMEMBERED {
            now += Duration::from_secs(60);
            authority.take(&Principal::Node(format!("n{number}").into()), now).unwrap();
            assert!(authority.buckets.lock().len() <= REMEMBERED);
        }
    }

    #[test]
    fn a_caller_that_asks_too_often_waits_and_others_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let authority =
            Authority::new(Root::open(dir.path(), SystemTime::now()).unwrap(), Duration::from_secs(60));
        let (a, b) = (Principal::Node("a".into()), Principal::Node("b".into()));
        let start = Instant::now();
        let granted = (0..10_000).filter(|_| authority.take(&a, start).is_ok()).count();
        assert_eq!(granted, 220);
        assert!(authority.take(&b, start).is_ok());
        assert!(authority.take(&a, start + Duration::from_secs(1)).is_ok());
    }
}
