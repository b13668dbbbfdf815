//! Builds everything in the order in which bytes meet it, and takes it down in reverse.

use std::{sync::Arc, time::Duration};

use mesh_core::{
    delta::{Change, Rejected},
    proto::{TYPE_ADDRESS, TYPE_WAYPOINT},
    snapshot::Snapshot,
};
use mesh_net::{
    BoxFuture,
    admin::{self, AdminError, Public},
    clock::{Chance, Clock},
    drain::{self, Drain},
    feed::{self, Apply, Feed, FeedConfig, FeedHandle},
    grpc::{ChannelConfig, GrpcError, channel},
    identity::{
        CertificateManager, Means,
        request::{Asking, CaClient},
    },
    listen::Reserve,
    task::TaskGroup,
    telemetry::{self, LogControl},
    tls::Ciphers,
    tunnel::{DirectConnector, Handshakes, Pool},
};
use parking_lot::Mutex;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    Waypoint,
    admin::Admin,
    config::{ConfigError, Settings},
    dial::hbone::Hbone,
    http::upstream::Upstream,
    limits,
    listeners::{self, Tunnels},
    metrics::Metrics,
    view::{Gateway, View},
};

/// How often unused upstream connections are looked for.
const SWEEP: Duration = Duration::from_secs(10);

/// Why the waypoint cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings are wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The control plane cannot be addressed.
    #[error("--control")]
    Control(#[from] GrpcError),
    /// The admin socket.
    #[error("--admin-socket")]
    Admin(#[from] AdminError),
    /// The tunnel port.
    #[error("--listen {at}")]
    Listen {
        /// The address.
        at: std::net::SocketAddr,
        /// Why it cannot be bound.
        #[source]
        source: std::io::Error,
    },
    /// The operating system refuses something else that is needed.
    #[error("the operating system refuses {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Turns every new world into a [`View`].
struct Views {
    gateway: Gateway,
    sender: watch::Sender<Arc<View>>,
    /// What is wrong with the configuration in force; goes into the NACK of it.
    problems: Mutex<Vec<String>>,
}

impl Views {
    fn put_in_force(&self, world: Arc<Snapshot>) {
        let (view, problems) = View::new(world, &self.gateway, &self.sender.borrow());
        self.sender.send_replace(Arc::new(view));
        *self.problems.lock() = problems;
    }

    /// The gateway's own configuration, if it is among `changes` and has problems. What is right in it is in force.
    fn refused(&self, changes: &[Change]) -> Option<Rejected> {
        let own = changes.iter().any(|change| {
            matches!(change, Change::Waypoint(config)
                if config.namespace == self.gateway.namespace && config.name == self.gateway.name)
        });
        let problems = self.problems.lock();
        (own && !problems.is_empty()).then(|| Rejected {
            name: format!("{}/{}", self.gateway.namespace, self.gateway.name),
            reason: problems.join("; "),
        })
    }
}

impl Apply for Views {
    fn apply(&self, world: Arc<Snapshot>) -> BoxFuture<'_, Result<(), String>> {
        self.put_in_force(world);
        Box::pin(std::future::ready(Ok(())))
    }

    fn not_in_force<'a>(
        &'a self,
        _: Arc<Snapshot>,
        _: &'static str,
        changes: &'a [Change],
    ) -> BoxFuture<'a, Vec<Rejected>> {
        Box::pin(std::future::ready(self.refused(changes).into_iter().collect()))
    }
}

/// The parts that outlive connections.
struct Running {
    waypoint: Arc<Waypoint>,
    background: TaskGroup,
    drain: Drain,
}

/// Runs the waypoint until it is told to stop.
///
/// # Errors
/// [`StartError`]; once started, it ends only by a signal.
pub async fn run(settings: Settings, log: LogControl) -> Result<(), StartError> {
    settings.check()?;
    let running = start(&settings, log)?;
    stop_signal().await?;
    tracing::info!("draining");
    let cut = running.drain.run(&running.waypoint.tasks, limits::DRAIN).await;
    // Nothing in the background has work left once the connections are gone.
    running.background.shutdown(Duration::ZERO).await;
    tracing::info!(cut, "stopped");
    Ok(())
}

async fn stop_signal() -> Result<(), StartError> {
    let catch = |kind| signal(kind).map_err(|source| StartError::System { what: "signal handlers", source });
    let (mut terminate, mut interrupt) = (catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn start(settings: &Settings, log: LogControl) -> Result<Running, StartError> {
    let (drain, draining) = drain::channel();
    let (tasks, background) = (TaskGroup::new(), TaskGroup::new());
    let shared = telemetry::Metrics::new("proxy", env!("CARGO_PKG_VERSION"));
    let own = settings.identity();

    // Who we are.
    let control = control_of(settings);
    let ca = CaClient::new(channel(&control)?, Asking::ForItself);
    let means = Means {
        source: Arc::new(ca),
        ciphers: Ciphers::default(),
        clock: Clock::system(),
        chance: Chance::random(),
    };
    let certificates = CertificateManager::new(means, &background);
    certificates.want(&own);

    // What we serve.
    let gateway = gateway_of(settings);
    let (sender, views) = watch::channel(Arc::new(View::not_ready()));
    let apply = Arc::new(Views { gateway, sender, problems: Mutex::default() });
    let config =
        FeedConfig { channel: control, node: node_of(settings), types: vec![TYPE_ADDRESS, TYPE_WAYPOINT] };
    let (feed, handle) = Feed::new(config, apply, shared.clone(), Chance::random())?;

    // How we reach endpoints.
    let pool = Pool::new(Arc::new(certificates.clone()), background.clone(), draining.clone());
    let dial =
        Arc::new(Hbone::new(pool.clone(), own.clone(), Arc::new(DirectConnector), baggage_of(settings)));
    let waypoint = Arc::new(Waypoint {
        views,
        dial: dial.clone(),
        upstream: Upstream::new(dial, background.clone()),
        metrics: Arc::new(Metrics::new(shared)),
        chance: Chance::random(),
        own,
        tasks,
        draining: draining.clone(),
    });

    // Who may look inside.
    let socket = admin::bind(&settings.admin_socket)?;
    let inside = Admin {
        waypoint: waypoint.clone(),
        feed: handle.clone(),
        certificates: certificates.clone(),
        pool,
        drain: drain.clone(),
        log,
    };
    let inside: Arc<dyn admin::Handler> = Arc::new(inside);
    for (at, what) in [(settings.ready_listen, Public::Ready), (settings.metrics_listen, Public::Metrics)] {
        let Some(at) = at else { continue };
        let (listener, handler) = (admin::bind_tcp(at)?, inside.clone());
        background.spawn(admin::serve_tcp(listener, what, draining.clone(), background.clone(), handler));
    }
    background.spawn(admin::serve(socket, draining.clone(), background.clone(), inside));

    // Who comes in.
    let tunnels = Tunnels {
        waypoint: waypoint.clone(),
        certificates: Arc::new(certificates),
        handshakes: Handshakes::default(),
    };
    let reserve = Reserve::new().map_err(|source| StartError::System { what: "a descriptor", source })?;
    let sockets = listeners::bind(settings.listen)
        .map_err(|source| StartError::Listen { at: settings.listen, source })?;
    for socket in sockets {
        waypoint.tasks.spawn(listeners::run(tunnels.clone(), socket, Some(reserve.clone())));
    }

    background.spawn(feed.run(draining));
    background.spawn(announce(handle));
    background.spawn(sweep(waypoint.clone()));
    tracing::info!(identity = %waypoint.own, listen = %settings.listen, "started");
    Ok(Running { waypoint, background, drain })
}

fn control_of(settings: &Settings) -> ChannelConfig {
    ChannelConfig {
        server_name: Some(settings.control_name.clone()),
        cluster: settings.cluster.clone(),
        ..ChannelConfig::new(
            settings.control.clone(),
            settings.control_roots.clone(),
            Some(settings.credential.clone()),
        )
    }
}

fn gateway_of(settings: &Settings) -> Gateway {
    Gateway {
        namespace: settings.namespace.as_str().into(),
        name: settings.gateway.as_str().into(),
        node: settings.node.as_str().into(),
    }
}

/// How the control plane knows us (`wire-protocol.md` X6).
fn node_of(settings: &Settings) -> mesh_core::proto::discovery::Node {
    let metadata = [
        ("NAME", settings.pod.as_str()),
        ("NAMESPACE", &settings.namespace),
        ("NODE_NAME", &settings.node),
        ("CLUSTER_ID", &settings.cluster),
        ("SERVICE_ACCOUNT", &settings.service_account),
        ("GATEWAY", &settings.gateway),
    ];
    let mut node = feed::node("0.0.0.0", &settings.pod, &settings.namespace, &metadata);
    node.id = node.id.replacen("ztunnel~", "waypoint~", 1);
    node.cluster = format!("{}.{}", settings.gateway, settings.namespace);
    node
}

/// Describes this waypoint to the telemetry of endpoints.
fn baggage_of(settings: &Settings) -> Option<String> {
    let Settings { cluster, namespace, gateway, .. } = settings;
    Some(format!(
        "k8s.cluster.name={cluster},k8s.namespace.name={namespace},k8s.deployment.name={gateway},service.name={gateway},service.version=latest"
    ))
}

/// Tells once when configuration has come.
async fn announce(handle: FeedHandle) {
    handle.ready().await;
    tracing::info!("configuration received");
}

async fn sweep(waypoint: Arc<Waypoint>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        waypoint.upstream.sweep();
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        id::ServiceKey,
        model::{Filters, Listener, PathMatch, RequestMatch, Route, RouteKind, RouteRule, WaypointConfig},
    };

    use super::*;

    fn config(gateway: &str, service: &str, pattern: &str) -> Change {
        let path = PathMatch::Regex(pattern.into());
        let rule = RouteRule {
            name: None,
            filters: Filters::default(),
            matches: vec![RequestMatch { path, method: None, headers: Vec::new(), query: Vec::new() }],
            backends: Vec::new(),
            request_timeout: None,
            backend_timeout: None,
        };
        let route = Route {
            kind: RouteKind::Http,
            namespace: "shop".into(),
            name: "r".into(),
            created: 0,
            hostnames: Vec::new(),
            rules: vec![rule],
        };
        let listener = |service: &str, last: u8, routes| Listener {
            service: ServiceKey::new("shop", service),
            vips: vec![[10, 0, 0, last].into()],
            port: 80,
            http: true,
            routes,
        };
        let listeners = vec![listener("web", 1, vec![route]), listener(service, 2, Vec::new())];
        Change::Waypoint(Arc::new(WaypointConfig {
            namespace: "shop".into(),
            name: gateway.into(),
            listeners,
        }))
    }

    #[test]
    fn its_own_configuration_is_refused_for_as_long_as_it_has_problems() {
        let gateway = Gateway { namespace: "shop".into(), name: "gw".into(), node: "a".into() };
        let (sender, _) = watch::channel(Arc::new(View::not_ready()));
        let views = Views { gateway, sender, problems: Mutex::default() };
        let mut world = Snapshot::default();
        let mut refused = |change: Change| {
            world = world.with([change.clone()]);
            views.put_in_force(Arc::new(world.clone()));
            views.refused(&[change]).map(|rejected| rejected.to_string())
        };
        assert_eq!(refused(config("gw", "api", "/v[0-9]+")), None);
        let said = refused(config("gw", "api", "/v[0-9")).unwrap();
        assert!(said.starts_with("shop/gw: ") && said.contains("web") && said.contains("port 80"), "{said}");
        // Another's is none of its business, and what it did not change is still broken.
        assert_eq!(refused(config("other", "api", "/v[0-9")), None);
        assert!(refused(config("gw", "else", "/v[0-9")).is_some());
        assert_eq!(refused(config("gw", "else", "/v[0-9]+")), None);
    }
}
