//! A control plane that names a policy and does not send it.

use std::{
    net::SocketAddr,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use mesh_control::{
    ca::{Authority, root::Root},
    compile::World,
    credentials::{Callers, Credentials},
    pipeline::Pipeline,
    publish::Published,
    serve::{Certificates, Discovery, Server, proxies::Proxies},
    source::file::Directory,
    translate::Mesh,
};
use mesh_net::{
    drain::{self, Drain},
    grpc::{self, GrpcTls},
    task::TaskGroup,
};
use mesh_tests::netns;
use tokio::sync::watch;
use tonic::transport;

use crate::bed::{Bed, CONTROL, echoes, until};

/// What an agent expects to be called by whom it asks.
const NAME: &str = "undermesh-control.undermesh-system.svc";

/// One of ours, served from this process, so that the test decides what is published.
struct Control {
    published: watch::Sender<Arc<Published>>,
    drain: Drain,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves what the bed's folder says, after `edit`.
    fn start(bed: &Bed, edit: fn(World) -> World) -> Self {
        let now = SystemTime::now();
        let root = Root::open(&bed.at("ca"), now).unwrap();
        let addr: SocketAddr = CONTROL.parse().unwrap();
        let (chain, key) = root.serving(&[NAME.to_owned()], &[addr.ip()], now).unwrap();
        let tls = GrpcTls::new(chain, key).unwrap();
        let (published, receiver) = watch::channel(Arc::new(Published::default()));
        let (drain, draining) = drain::channel();
        let host = bed.host();
        let credentials = Credentials::new(bed.at("credentials"));
        let thread = thread::spawn(move || {
            let run = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    let tasks = TaskGroup::new();
                    let server = Arc::new(Server {
                        published: receiver,
                        credentials: Arc::new(Callers::Files(credentials)),
                        authority: Arc::new(Authority::new(root, Duration::from_secs(3600))),
                        trust_domain: Mesh::default().trust_domain,
                        proxies: Arc::new(Proxies::default()),
                        tasks: tasks.clone(),
                    });
                    let router = transport::Server::builder()
                        .add_service(Discovery(server.clone()))
                        .add_service(Certificates(server));
                    let listener = tokio::net::TcpListener::bind(addr).await?;
                    grpc::serve(listener, tls, router, draining, tasks).await?;
                    Ok(())
                })
            };
            netns::within(&host, run).unwrap();
        });
        let control = Self { published, drain, thread: Some(thread) };
        control.publish(bed, edit);
        control
    }

    fn publish(&self, bed: &Bed, edit: fn(World) -> World) {
        let pipeline = Pipeline::new(Box::new(Directory::new(bed.at("source"))), Mesh::default());
        assert!(pipeline.rescan(), "the folder says nothing");
        let world = World::clone(&pipeline.subscribe().borrow().world);
        assert_eq!(world.problems, []);
        let next = self.published.borrow().next(edit(world));
        self.published.send_replace(Arc::new(next));
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.drain.force();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: anybody, namespace: shop}
spec:
  selector: {matchLabels: {app: b}}
  action: ALLOW
  rules:
  - from: [{source: {namespaces: [shop]}}]
";

/// On one node, where the kernel could let the connection through without asking anybody.
#[test]
fn a_policy_that_is_named_and_not_sent_denies_until_it_comes() {
    let mut bed = Bed::new();
    bed.primary();
    let (client, server) = (bed.sandbox("a", 2), bed.sandbox("b", 3));
    for sandbox in [&client, &server] {
        bed.pod(sandbox, true);
        std::fs::write(bed.at("results").join(format!("net-{}-eth0", sandbox.name)), sandbox.cached())
            .unwrap();
    }
    bed.write("policy.yaml", POLICY);
    let control = Control::start(&bed, |world| World { policies: Default::default(), ..world });
    bed.agent();
    for sandbox in [&client, &server] {
        bed.until_state(sandbox, "enrolled");
    }
    bed.until_ready();
    let _echo = bed.serve(Some(&server), 8080);
    let to = SocketAddr::new(server.ip, 8080);
    let reached = || client.dial(to).is_ok_and(|mut stream| echoes(&mut stream));
    until("the connection to be held, then refused with its reason", || {
        assert!(!reached(), "a policy that was not received was taken for none");
        let records = bed.logs();
        if records.contains("POLICY_PENDING") { Ok(()) } else { Err(records) }
    });
    assert!(!reached(), "it is let through the second time");

    control.publish(&bed, |world| world);
    until("the policy to be in force", || if reached() { Ok(()) } else { Err("refused".to_owned()) });
}
