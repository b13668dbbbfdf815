use std::sync::atomic::AtomicUsize;

use super::*;
use crate::testing::{Leaf, MiniCa};

/// A CA whose clock is the test's, which may be down, and which counts.
struct Scripted {
    ca: MiniCa,
    clock: Clock,
    down: std::sync::atomic::AtomicBool,
    asked: AtomicUsize,
    running: AtomicUsize,
    most: AtomicUsize,
}

const LIFE: Duration = Duration::from_secs(24 * 3600);

impl CertificateSource for Scripted {
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, FetchError>> {
        Box::pin(async {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(running, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(10)).await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            if self.down.load(Ordering::SeqCst) {
                return Err(FetchError::Unavailable("on purpose".into()));
            }
            let now = self.clock.now();
            Ok(self.ca.issue(Leaf { not_before: now, not_after: now + LIFE, ..Leaf::of(identity) }))
        })
    }
}

struct World {
    source: Arc<Scripted>,
    manager: CertificateManager,
    _tasks: TaskGroup,
}

fn manager(source: Arc<dyn CertificateSource>, clock: Clock, tasks: &TaskGroup) -> CertificateManager {
    CertificateManager::new(
        Means { source, ciphers: Ciphers::default(), clock, chance: Chance::seeded(3) },
        tasks,
    )
}

fn world() -> World {
    let clock = Clock::following_tokio(SystemTime::now());
    let source = Arc::new(Scripted {
        ca: MiniCa::new(),
        clock: clock.clone(),
        down: false.into(),
        asked: 0.into(),
        running: 0.into(),
        most: 0.into(),
    });
    let tasks = TaskGroup::new();
    let manager = manager(source.clone(), clock, &tasks);
    World { source, manager, _tasks: tasks }
}

fn id(n: usize) -> Identity {
    Identity::new("cluster.local", "shop", &format!("sa{n}"))
}

#[tokio::test(start_paused = true)]
async fn renewed_at_half_life_without_a_gap() {
    let w = world();
    w.manager.want(&id(0));
    let first = w.manager.get(&id(0)).await.unwrap();
    let mut changes = w.manager.changes();
    let begin = Instant::now();
    changes.changed().await.unwrap();
    let after = begin.elapsed().as_secs_f64() / LIFE.as_secs_f64();
    assert!((0.449..=0.551).contains(&after), "{after}");
    let second = w.manager.get(&id(0)).await.unwrap();
    assert!(second.generation > first.generation && second.not_after > first.not_after);
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_bridged_until_expiry_and_then_fails_closed() {
    let w = world();
    w.manager.want(&id(0));
    let first = w.manager.get(&id(0)).await.unwrap();
    w.source.down.store(true, Ordering::SeqCst);
    tokio::time::sleep(LIFE - Duration::from_secs(60)).await;
    assert_eq!(w.manager.get(&id(0)).await.unwrap().generation, first.generation, "the old one serves");
    let status = w.manager.status();
    assert!(status[0].failures > 3 && status[0].error.is_some(), "{status:?}");
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(w.manager.current(&id(0)).is_none());
    assert_eq!(w.manager.get(&id(0)).await.unwrap_err(), Flag::IdentityExpired);
    // Half a day of retries at no less than 150 s - 20 %.
    assert!(w.source.asked.load(Ordering::SeqCst) < 400, "{:?}", w.source.asked);
    w.source.down.store(false, Ordering::SeqCst);
    let mut changes = w.manager.changes();
    let begin = Instant::now();
    changes.changed().await.unwrap();
    assert!(begin.elapsed() <= Duration::from_secs(181), "{:?}", begin.elapsed());
    assert!(w.manager.get(&id(0)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn the_first_one_is_waited_for_but_not_for_ever() {
    let w = world();
    w.source.down.store(true, Ordering::SeqCst);
    let begin = Instant::now();
    assert_eq!(w.manager.get(&id(0)).await.unwrap_err(), Flag::CertificateMissing);
    assert_eq!(begin.elapsed(), HOLD);
    w.source.down.store(false, Ordering::SeqCst);
    assert!(w.manager.get(&id(0)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn at_most_eight_requests_at_a_time() {
    let w = world();
    for n in 0..40 {
        w.manager.want(&id(n));
    }
    for n in 0..40 {
        w.manager.get(&id(n)).await.unwrap();
    }
    assert_eq!(w.source.most.load(Ordering::SeqCst), schedule::PARALLEL);
    assert_eq!(w.source.asked.load(Ordering::SeqCst), 40);
}

#[tokio::test(start_paused = true)]
async fn forgotten_with_the_last_pod() {
    let w = world();
    w.manager.want(&id(0));
    w.manager.want(&id(0));
    w.manager.get(&id(0)).await.unwrap();
    w.manager.forget(&id(0));
    assert!(w.manager.current(&id(0)).is_some());
    w.manager.forget(&id(0));
    assert!(w.manager.current(&id(0)).is_none());
    tokio::time::sleep(LIFE).await;
    assert_eq!(w.source.asked.load(Ordering::SeqCst), 1, "nobody renews it");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_for_somebody_else_is_not_installed() {
    struct Liar(MiniCa);
    impl CertificateSource for Liar {
        fn fetch<'a>(&'a self, _: &'a Identity) -> BoxFuture<'a, Result<Issued, FetchError>> {
            Box::pin(async { Ok(self.0.issue(Leaf::of(&id(9)))) })
        }
    }
    let tasks = TaskGroup::new();
    let manager = manager(Arc::new(Liar(MiniCa::new())), Clock::system(), &tasks);
    manager.want(&id(0));
    assert_eq!(manager.get(&id(0)).await.unwrap_err(), Flag::CertificateMissing);
    let error = manager.status()[0].error.clone().unwrap();
    assert!(error.contains("it is for spiffe://cluster.local/ns/shop/sa/sa9"), "{error}");
}
