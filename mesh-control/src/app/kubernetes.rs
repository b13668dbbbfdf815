//! The Kubernetes API as the source of everything: objects, callers, the root, and who leads.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use kube::{Client, Config};
use mesh_net::{clock::Chance, drain::Drain, task::TaskGroup};
use tokio::sync::watch;

use super::{AppError, Parts, follow};
use crate::{
    ca::secret,
    config::Settings,
    credentials::{Callers, review::Reviews},
    leader::{Election, Say, Told},
    pipeline::Pipeline,
    provision,
    serve::{
        proxies::Proxies,
        replicas::{self, Others},
    },
    source::kubernetes::{Kubernetes, reason},
    write::{self, Writer},
};

/// While something is missing at the start, this often it is said what.
const TELL: Duration = Duration::from_secs(10);
/// Wait between attempts to get the root from an API server that is away.
const AGAIN: Duration = Duration::from_secs(2);
/// Waits are spread by this share.
const JITTER: f64 = 0.3;

/// What the leader needs once the rest serves.
pub(super) struct Leading {
    client: Client,
    me: String,
    namespace: String,
    provisioning: Option<provision::Settings>,
}

/// Waits for the first complete list of every kind, and for the root.
pub(super) async fn open(
    settings: &Settings,
    drain: &Drain,
    tasks: &TaskGroup,
    now: SystemTime,
) -> Result<Parts, AppError> {
    // One provider for every TLS of the process; kube would take the default one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = Config::infer().await.map_err(|error| AppError::Client(reason(&error)))?;
    let client = Client::try_from(config).map_err(|error| AppError::Client(reason(&error)))?;
    let (me, namespace) =
        (settings.pod_name.clone().unwrap_or_default(), settings.pod_namespace.clone().unwrap_or_default());
    let mesh = settings.mesh();
    let source = Kubernetes::start(&client, &mesh.root_namespace, &drain.watch(), tasks);
    let root = root(&client, &namespace, now).await?;
    roots(&client, &namespace, root.pem()).await;

    let (changed, mut complete) = (source.changed(), source.complete());
    while !*complete.borrow_and_update() {
        if tokio::time::timeout(TELL, complete.changed()).await.is_err() {
            let missing: Vec<String> = source.missing().iter().map(ToString::to_string).collect();
            tracing::warn!(missing = missing.join(", "), "the first lists have not come; nothing is served");
        }
    }
    let pipeline = Arc::new(Pipeline::new(Box::new(source), mesh));
    pipeline.rescan();
    tasks.spawn(follow(pipeline.clone(), changed, (), drain.watch()));
    let reviews = Reviews::new(client.clone(), namespace.as_str().into(), pipeline.subscribe());
    let cluster = Some(Leading { client, me, namespace, provisioning: settings.provisioning() });
    Ok(Parts { pipeline, callers: Callers::Reviewed(Box::new(reviews)), root, cluster })
}

/// A root that cannot be used ends the process; an API server that is away does not.
async fn root(client: &Client, namespace: &str, now: SystemTime) -> Result<crate::ca::root::Root, AppError> {
    let chance = Chance::random();
    loop {
        match secret::open(client, namespace, now).await {
            Err(error @ secret::SecretError::Api { .. }) => {
                tracing::warn!(error = reason(&error), "the root cannot be read yet");
            }
            done => return Ok(done?),
        }
        tokio::time::sleep(chance.jitter(AGAIN, JITTER)).await;
    }
}

/// Agents cannot start without the roots: they are there before anything is served.
async fn roots(client: &Client, namespace: &str, pem: &str) {
    let chance = Chance::random();
    while let Err(error) = secret::publish_roots(client, namespace, pem).await {
        tracing::warn!(error = reason(&error), "the roots cannot be published yet");
        tokio::time::sleep(chance.jitter(AGAIN, JITTER)).await;
    }
}

impl Leading {
    /// Takes part in the election, and writes while this replica leads.
    pub(super) fn lead(
        self,
        pipeline: &Arc<Pipeline>,
        proxies: &Arc<Proxies>,
        roots: &str,
        drain: &Drain,
        tasks: &TaskGroup,
    ) -> Others {
        let Self { client, me, namespace, provisioning } = self;
        let election = Election::new(&client, &namespace, me.clone());
        let (refusing, refused) = watch::channel(Arc::default());
        match provisioning {
            Some(settings) => {
                let (published, leads) = (pipeline.subscribe(), election.leads());
                let run = provision::apply::run(
                    client.clone(),
                    settings,
                    published,
                    leads,
                    refusing,
                    drain.watch(),
                );
                tasks.spawn(run);
            }
            None => {
                tracing::warn!("no image of waypoints (UNDERMESH_WAYPOINT_IMAGE): none are made for Gateways")
            }
        }
        let writer = Writer {
            client,
            me,
            namespace: namespace.clone(),
            roots: roots.to_owned(),
            published: pipeline.subscribe(),
            proxies: proxies.clone(),
            told: election.told(),
            refused,
        };
        let others = Others { told: election.told(), namespace: namespace.clone() };
        let leads = election.leads();
        tasks.spawn(write::run(writer, leads, drain.watch()));
        let (published, proxies) = (pipeline.subscribe(), proxies.clone());
        let say = move |told: &Told| {
            let published = published.borrow().clone();
            let text = replicas::tell(&published, &proxies.all());
            let gone = told.keys().filter(|replica| !write::alive(&published, &namespace, replica));
            Say { text, gone: gone.cloned().collect() }
        };
        tasks.spawn(election.run(say, drain.watch()));
        others
    }
}
