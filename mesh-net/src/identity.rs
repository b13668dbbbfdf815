//! Certificates of our workloads: want → fetch → renew → forget.
//!
//! One certificate per identity, shared by pods. Renewed at half-life; the old one serves until it expires, whatever
//! happens to the CA meanwhile. Without a valid one, handshakes fail closed.

pub mod request;
pub mod schedule;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use mesh_core::{
    flag::Flag,
    id::Identity,
    limits::{CONNECT, HOLD},
};
use parking_lot::{Mutex, RwLock};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use self::schedule::Schedule;
use crate::{
    BoxFuture,
    clock::{Chance, Clock},
    task::TaskGroup,
    tls::{self, Ciphers, ClientTls, Material, ServerTls, TlsError, verify},
};

/// A certificate with its key and the roots that its owner trusts, and the TLS configurations made of them.
pub struct WorkloadCertificate {
    /// Leaf and intermediates; the root is not sent.
    pub chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// What peers' chains must lead to.
    pub roots: Vec<CertificateDer<'static>>,
    /// Whom it proves.
    pub identity: Identity,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Counts certificates of this process; part of the tunnel pool's key.
    pub generation: u64,
    server: Arc<ServerTls>,
    client: ClientTls,
}

impl std::fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// What a certificate source answers.
pub struct Issued {
    /// Leaf first, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Key of the leaf.
    pub key: PrivateKeyDer<'static>,
    /// Roots to trust.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Why an issued certificate cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UnusableCertificate {
    /// No leaf in the chain.
    #[error("the chain is empty")]
    Empty,
    /// The leaf names nobody.
    #[error("the leaf has no identity")]
    NoIdentity(#[source] verify::NoIdentity),
    /// Key, chain or roots do not fit.
    #[error("TLS cannot use it")]
    Tls(#[source] TlsError),
}

impl WorkloadCertificate {
    /// Checks what was issued and builds both TLS configurations.
    ///
    /// # Errors
    /// No leaf, no identity in it, or a key that does not fit.
    pub fn new(issued: Issued, generation: u64, ciphers: Ciphers) -> Result<Self, UnusableCertificate> {
        let Issued { chain, key, roots } = issued;
        let leaf = chain.first().ok_or(UnusableCertificate::Empty)?;
        let identity = verify::identity_of(leaf).map_err(UnusableCertificate::NoIdentity)?;
        let (_, parsed) = X509Certificate::from_der(leaf)
            .map_err(|_| UnusableCertificate::NoIdentity(verify::NoIdentity::Unreadable))?;
        let validity = parsed.validity();
        let (not_before, not_after) =
            (wall(validity.not_before.timestamp()), wall(validity.not_after.timestamp()));
        let store = tls::root_store(&roots).map_err(UnusableCertificate::Tls)?;
        let material = Material { chain: &chain, key: &key, roots: &store, ciphers };
        let server = ServerTls::new(&identity, material).map_err(UnusableCertificate::Tls)?;
        let client = ClientTls::new(material).map_err(UnusableCertificate::Tls)?;
        let server = Arc::new(server);
        Ok(Self { chain, key, roots, identity, not_before, not_after, generation, server, client })
    }

    /// `like`, but speaking TLS with other configurations: what a broken peer would do.
    #[cfg(test)]
    pub(crate) fn assembled(like: &Self, server: ServerTls, client: ClientTls) -> Self {
        Self {
            chain: like.chain.clone(),
            key: like.key.clone_key(),
            roots: like.roots.clone(),
            identity: like.identity.clone(),
            not_before: like.not_before,
            not_after: like.not_after,
            generation: like.generation,
            server: Arc::new(server),
            client,
        }
    }

    /// Configuration for accepting as this workload.
    pub fn server_tls(&self) -> Arc<ServerTls> {
        self.server.clone()
    }

    /// Configuration for dialling as this workload.
    pub fn client_tls(&self) -> &ClientTls {
        &self.client
    }

    /// The private key, for those who speak TLS in another way than [`crate::tls`].
    pub fn key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }
}

fn wall(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Where certificates come from: the CA, or a script in tests.
pub trait CertificateSource: Send + Sync + 'static {
    /// Asks for a certificate of `identity` with a fresh key.
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, FetchError>>;
}

/// Why a certificate could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The CA did not answer, or not in time.
    #[error("the CA is not reachable: {0}")]
    Unavailable(String),
    /// The CA answered no.
    #[error("the CA refused: {0}")]
    Refused(String),
    /// The answer breaks the protocol, or is for somebody else.
    #[error("the CA's answer is unusable: {0}")]
    Unusable(String),
}

/// One identity as status shows it.
#[derive(Clone, Debug, Serialize)]
pub struct IdentityStatus {
    /// Whose certificate.
    pub identity: Identity,
    /// End of validity in seconds since the epoch; none while there is no certificate.
    pub not_after: Option<u64>,
    /// Counts certificates of this process.
    pub generation: Option<u64>,
    /// Attempts that failed since the last success.
    pub failures: u32,
    /// The last failure since the last success.
    pub error: Option<String>,
}

/// Keeps the certificates of all identities that this process proves. Clones are the same manager.
#[derive(Clone)]
pub struct CertificateManager {
    inner: Arc<Inner>,
}

/// What a [`CertificateManager`] works with.
pub struct Means {
    /// Where certificates come from.
    pub source: Arc<dyn CertificateSource>,
    /// What their tunnels may use.
    pub ciphers: Ciphers,
    /// The time.
    pub clock: Clock,
    /// Spreads renewals.
    pub chance: Chance,
}

struct Inner {
    by: Means,
    certificates: RwLock<HashMap<Identity, Arc<WorkloadCertificate>>>,
    schedule: Mutex<Schedule>,
    errors: Mutex<HashMap<Identity, String>>,
    rescheduled: Notify,
    changes: watch::Sender<u64>,
    generation: AtomicU64,
}

impl CertificateManager {
    /// Starts the manager as a task of `tasks`.
    pub fn new(by: Means, tasks: &TaskGroup) -> Self {
        let inner = Arc::new(Inner {
            by,
            certificates: RwLock::default(),
            schedule: Mutex::default(),
            errors: Mutex::default(),
            rescheduled: Notify::new(),
            changes: watch::Sender::new(0),
            generation: AtomicU64::new(0),
        });
        tasks.spawn(run(inner.clone()));
        Self { inner }
    }

    /// Fetches and keeps a certificate of `identity` until [`forget`](Self::forget) was called as often.
    pub fn want(&self, identity: &Identity) {
        self.inner.schedule.lock().want(identity, Instant::now());
        self.inner.rescheduled.notify_one();
    }

    /// Takes one [`want`](Self::want) back.
    pub fn forget(&self, identity: &Identity) {
        if self.inner.schedule.lock().forget(identity) {
            self.inner.drop_certificate(identity);
        }
    }

    /// The certificate of `identity`, if there is a valid one now.
    pub fn current(&self, identity: &Identity) -> Option<Arc<WorkloadCertificate>> {
        let held = self.inner.certificates.read().get(identity).cloned()?;
        (held.not_after > self.inner.by.clock.now()).then_some(held)
    }

    /// The certificate of `identity`; waits up to [`HOLD`] for the first. One that nobody wants is fetched all the
    /// same, but not renewed.
    ///
    /// # Errors
    /// `IDENTITY_EXPIRED` or `CERTIFICATE_MISSING`.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<WorkloadCertificate>, Flag> {
        let mut changes = self.inner.changes.subscribe();
        let deadline = Instant::now() + HOLD;
        loop {
            if let Some(certificate) = self.current(identity) {
                return Ok(certificate);
            }
            self.inner.schedule.lock().live(identity, Instant::now());
            self.inner.rescheduled.notify_one();
            if !matches!(tokio::time::timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                let expired = self.inner.certificates.read().contains_key(identity);
                return Err(if expired { Flag::IdentityExpired } else { Flag::CertificateMissing });
            }
        }
    }

    /// Changes whenever any certificate does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// All identities that are kept.
    pub fn status(&self) -> Vec<IdentityStatus> {
        let certificates = self.inner.certificates.read();
        let errors = self.inner.errors.lock();
        let mut status: Vec<_> = self
            .inner
            .schedule
            .lock()
            .identities()
            .map(|(identity, failures)| {
                let held = certificates.get(identity);
                let not_after = held.and_then(|c| c.not_after.duration_since(SystemTime::UNIX_EPOCH).ok());
                IdentityStatus {
                    identity: identity.clone(),
                    not_after: not_after.map(|d| d.as_secs()),
                    generation: held.map(|c| c.generation),
                    failures,
                    error: errors.get(identity).cloned(),
                }
            })
            .collect();
        status.sort_by(|a, b| a.identity.cmp(&b.identity));
        status
    }
}

enum Event {
    Rescheduled,
    Due,
    Fetched(Identity, Result<Issued, FetchError>),
}

async fn run(inner: Arc<Inner>) {
    let mut running = FuturesUnordered::new();
    loop {
        let (start, next) = {
            let mut schedule = inner.schedule.lock();
            let now = Instant::now();
            (schedule.start(now), schedule.next_due())
        };
        for identity in start {
            running.push(fetch(&*inner.by.source, identity));
        }
        let due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            Some((identity, outcome)) = running.next() => Event::Fetched(identity, outcome),
            () = inner.rescheduled.notified() => Event::Rescheduled,
            () = due => Event::Due,
        };
        if let Event::Fetched(identity, outcome) = event {
            inner.fetched(&identity, outcome);
        }
    }
}

async fn fetch(source: &dyn CertificateSource, identity: Identity) -> (Identity, Result<Issued, FetchError>) {
    let outcome = tokio::time::timeout(CONNECT, source.fetch(&identity))
        .await
        .unwrap_or_else(|_| Err(FetchError::Unavailable("no answer in time".to_owned())));
    (identity, outcome)
}

impl Inner {
    fn fetched(&self, identity: &Identity, outcome: Result<Issued, FetchError>) {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        let usable = outcome.and_then(|issued| {
            let certificate = WorkloadCertificate::new(issued, generation, self.by.ciphers)
                .map_err(|error| unusable(&error))?;
            match &certificate.identity {
                got if got == identity => Ok(certificate),
                got => Err(FetchError::Unusable(format!("it is for {got}, not for {identity}"))),
            }
        });
        match usable {
            Ok(certificate) => self.install(identity, certificate),
            Err(error) => self.failed(identity, &error),
        }
    }

    fn install(&self, identity: &Identity, certificate: WorkloadCertificate) {
        let renew = schedule::renew_in(
            certificate.not_before,
            certificate.not_after,
            self.by.clock.now(),
            self.by.chance.fraction(),
        );
        let now = Instant::now();
        let kept = self.schedule.lock().succeeded(identity, now, now + renew);
        self.errors.lock().remove(identity);
        if kept {
            tracing::info!(%identity, generation = certificate.generation, "certificate installed");
            self.certificates.write().insert(identity.clone(), Arc::new(certificate));
            self.changes.send_modify(|n| *n += 1);
        }
    }

    fn failed(&self, identity: &Identity, error: &FetchError) {
        let wait = self.schedule.lock().failed(identity, Instant::now(), self.by.chance.fraction());
        self.errors.lock().insert(identity.clone(), error.to_string());
        let held = self.certificates.read().get(identity).cloned();
        let left = held.as_ref().map(|c| c.not_after.duration_since(self.by.clock.now()).unwrap_or_default());
        // The back-off bounds these to one line per identity and second, and soon far fewer.
        match left {
            Some(left) if left > Duration::ZERO => {
                tracing::warn!(%identity, %error, ?wait, expires_in = ?left, "certificate not renewed");
            }
            _ => tracing::error!(%identity, %error, ?wait, "no valid certificate; connections are refused"),
        }
    }

    fn drop_certificate(&self, identity: &Identity) {
        self.errors.lock().remove(identity);
        if self.certificates.write().remove(identity).is_some() {
            self.changes.send_modify(|n| *n += 1);
        }
    }
}

fn unusable(error: &UnusableCertificate) -> FetchError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    FetchError::Unusable(text)
}

#[cfg(test)]
mod tests;
