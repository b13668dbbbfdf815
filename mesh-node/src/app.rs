//! Builds the agent in the order in which bytes meet it: kernel → pods with their listeners → feed; and takes it down
//! in reverse. What is pinned in the kernel stays in force.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use mesh_core::limits;
use mesh_net::{
    admin::{self as endpoint, Public},
    clock::{Chance, Clock},
    drain::{self, Draining},
    grpc::{self, ChannelConfig},
    identity::{
        CertificateManager, Means,
        request::{Asking, CaClient},
    },
    listen::Reserve,
    task::TaskGroup,
    telemetry::{LogControl, Metrics},
    tunnel::Handshakes,
};
use nix::sys::resource::{Resource, getrlimit};
use parking_lot::Mutex;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc, watch},
};

use crate::{
    admin::Admin,
    agent::{Agent, Dismissal, Problems, sweep_again},
    cni::{answer::CniAnswer, install},
    config::{
        Config,
        enrolment::{Enrol, FromFeed},
    },
    connections::Connections,
    direct, feed,
    kernel::{Kernel, KernelConfig},
    kubelet,
    pods::{
        Keeper, Pods, Strays, Table,
        enrol::Enrolment,
        follow::{FollowConfig, Follower},
        record::Store,
    },
    world::World,
};

/// What remains of a forced drain.
const GOODBYE: Duration = Duration::from_secs(1);

/// Resources of the feed that wait to be asked for once more; others are tried again.
const ASKED_AGAIN: usize = 64;

/// Runs the agent until it has drained.
///
/// # Errors
/// It cannot start; the message says what to do.
pub async fn run(config: Config, log: LogControl) -> anyhow::Result<()> {
    let (drain, draining) = drain::channel();
    let tasks = TaskGroup::new();
    let metrics = Metrics::new("ztunnel", env!("CARGO_PKG_VERSION"));

    let (kernel, probe) = Kernel::open(&KernelConfig {
        node: config.node.clone(),
        bpffs: config.bpffs.clone(),
        mount_bpffs: matches!(config.enrol, Enrol::Socket(_)),
        cgroup: config.cgroup.clone(),
        pod_flows: config.pod_connections,
        log: tracing::enabled!(target: "mesh_node::kernel::log", tracing::Level::DEBUG),
    })?;
    let events = kernel.events().context("read the kernel's events")?;

    let credential = Some(config.control.credential.clone());
    let control = ChannelConfig {
        server_name: Some(config.control.name.clone()),
        ..ChannelConfig::new(config.control.address.clone(), config.control.roots.clone(), credential)
    };
    let ca = Arc::new(CaClient::new(grpc::channel(&control)?, Asking::ForPods));
    let chance = Chance::random();
    let means = Means { source: ca, ciphers: config.ciphers, clock: Clock::system(), chance: chance.clone() };
    let certificates = CertificateManager::new(means, &tasks);

    let table = watch::Sender::new(Arc::new(Table::default()));
    let agent = Arc::new(Agent {
        node: config.node.as_str().into(),
        proc: config.proc.clone(),
        problems: Problems::default(),
        dismissal: watch::Sender::new(Dismissal::No),
        trust_domain: config.trust_domain.as_str().into(),
        kernel,
        world: World::default(),
        connections: Connections::default(),
        direct: direct::Direct::default(),
        certificates,
        metrics,
        handshakes: Handshakes::default(),
        reserve: Some(Reserve::new().context("keep a descriptor back")?),
        chance,
        tasks: tasks.clone(),
        draining: draining.clone(),
        pods: table.subscribe(),
        again: watch::Sender::new(None),
        enforcing: Mutex::default(),
        kubelet: Mutex::default(),
        out_of_line: Mutex::default(),
        pod_connections: pod_connections(config.pod_connections)?,
    });
    tasks.spawn(direct::listen(agent.clone(), events, draining.clone()));
    tasks.spawn(sweep_again(agent.clone(), draining.clone()));
    tasks.spawn(forward_log(agent.clone(), draining.clone()));
    let (given, root) = (config.kubelet_cgroup.clone(), probe.cgroup.clone());
    tasks.spawn(kubelet::follow(agent.clone(), given, root, draining.clone()));

    let (mut keeper, pods) = Keeper::new(agent.clone(), Store::new(&config.state_dir), table);
    let strays = match config.enrol {
        Enrol::Socket(_) => Strays::Release,
        Enrol::Feed(_) => Strays::Keep,
    };
    keeper.adopt(strays).await.context("take up the pods that were enrolled before")?;
    tasks.spawn(keeper.run(draining.clone()));
    let enrolling = match &config.enrol {
        Enrol::Socket(socket) => {
            let enrolment = Arc::new(Enrolment { agent: agent.clone(), pods });
            tasks.spawn(endpoint::serve(endpoint::bind(socket)?, draining.clone(), tasks.clone(), enrolment));
            None
        }
        Enrol::Feed(from) => Some(follow(&agent, pods, from, &config.state_dir)?),
    };
    let following = enrolling.as_ref().map(|enrolling| enrolling.following.clone());

    let feed = feed::start(&agent, control, enrolling)?;

    let asked_to_drain = watch::Sender::new(false);
    let admin = endpoint::bind(&config.admin_socket)?;
    let handler: Arc<dyn endpoint::Handler> = Arc::new(Admin {
        agent: agent.clone(),
        probe,
        feed: feed.status,
        following,
        log,
        drain: asked_to_drain.clone(),
    });
    let public = [(config.ready_listen, Public::Ready), (config.metrics_listen, Public::Metrics)];
    for (at, what) in public.into_iter().filter_map(|(at, what)| Some((at?, what))) {
        let (listener, handler) = (endpoint::bind_tcp(at)?, handler.clone());
        tasks.spawn(endpoint::serve_tcp(listener, what, draining.clone(), tasks.clone(), handler));
    }
    tasks.spawn(endpoint::serve(admin, draining.clone(), tasks.clone(), handler));

    tracing::info!(node = config.node, "the agent runs");

    told_to_stop(asked_to_drain.subscribe()).await?;
    tracing::info!("draining");
    drain.start();
    tokio::select! {
        () = drained(&agent) => {}
        () = tokio::time::sleep(limits::DRAIN) => tracing::info!("drain deadline: cutting what is left"),
        stop = told_to_stop(watch::Sender::new(false).subscribe()) => stop?,
    }
    drain.force();
    for pod in served(&agent) {
        pod.shutdown(GOODBYE).await;
    }
    // Some of these never end by themselves; tunnels say goodbye in a tenth of a second.
    tasks.shutdown(GOODBYE / 4).await;
    agent.direct.stop();
    for socket in [config.enrol.socket(), &config.admin_socket] {
        let _ = std::fs::remove_file(socket);
    }
    tracing::info!("stopped; what is pinned in the kernel stays in force");
    Ok(())
}

/// Enrolment as the control plane wants it: the task that follows the feed, the plugin's socket, then the plugin itself,
/// which finds somebody there from its first call on.
fn follow(
    agent: &Arc<Agent>,
    pods: Pods,
    from: &FromFeed,
    state_dir: &Path,
) -> anyhow::Result<feed::Enrolling> {
    let (tasks, draining) = (&agent.tasks, &agent.draining);
    let (again, asked_again) = mpsc::channel(ASKED_AGAIN);
    let config = FollowConfig {
        state_dir: state_dir.to_owned(),
        results: from.results.clone(),
        known: from.known.clone(),
        again,
    };
    let (follower, following) =
        Follower::new(agent.clone(), pods, config).context("read the sandboxes that were told of before")?;
    tasks.spawn(follower.run(draining.clone()));
    let answer = Arc::new(CniAnswer { agent: agent.clone(), following: following.clone() });
    let socket = endpoint::bind(&from.cni_socket)?;
    tasks.spawn(endpoint::serve(socket, draining.clone(), tasks.clone(), answer));
    match &from.install {
        Some(wanted) => {
            agent.problems.set(install::CONCERN, Some("not installed yet".to_owned()));
            tasks.spawn(install::keep(wanted.clone(), agent.clone(), draining.clone()));
        }
        None => tracing::warn!("no --cni-plugin: new pods are captured only after they have started"),
    }
    Ok(feed::Enrolling { following, again: asked_again })
}

/// Lines of the programs, where they have them.
async fn forward_log(agent: Arc<Agent>, draining: Draining) {
    tokio::select! {
        () = draining.forced() => {}
        ended = agent.kernel.forward_log() => if let Err(error) = ended {
            tracing::warn!(%error, "the programs' log is not read");
        },
    }
}

/// Connections of one pod that may pass through the agent at the same time. Each takes two descriptors, and no pod may
/// have more than a quarter of them.
fn pod_connections(wanted: u32) -> anyhow::Result<usize> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).context("read RLIMIT_NOFILE")?;
    let most = usize::try_from(soft / 2 / 4).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
    Ok(usize::try_from(wanted).unwrap_or(usize::MAX).min(most))
}

/// SIGTERM, SIGINT or a request.
async fn told_to_stop(mut asked: watch::Receiver<bool>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let asked = async {
        // Without a sender nobody will ever ask.
        if asked.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = asked => {}
    }
    Ok(())
}

fn served(agent: &Agent) -> Vec<TaskGroup> {
    let table = agent.pods.borrow().clone();
    table.serving.values().chain(&table.leaving).map(|pod| pod.tasks.clone()).collect()
}

async fn drained(agent: &Agent) {
    for tasks in served(agent) {
        tasks.idle().await;
    }
}
