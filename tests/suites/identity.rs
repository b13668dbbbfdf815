//! Promise: an identity is what a certificate of the CA proves, given only to the node that runs the pod; it is renewed
//! without anybody noticing, and a tunnel leads only where its destination's owner says. Whoever has one can do harm only
//! to its own connections.

#[path = "identity/flood.rs"]
mod flood;

use std::{
    fs::File,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use mesh_core::{
    id::Identity,
    outbound::Hop,
    tunnel::{HBONE_PORT, format_authority},
};
use mesh_net::{
    BoxFuture,
    drain::Draining,
    grpc::{ChannelConfig, PemSource, channel},
    identity::{
        CertificateSource as _, FetchError, WorkloadCertificate,
        request::{Asking, CaClient},
    },
    task::TaskGroup,
    testing::{FixedCertificates, MiniCa},
    tls::Ciphers,
    tunnel::{Connector, Dial, DialError, Pool, TunnelHeaders},
};
use mesh_tests::{
    Pod, Suite, World, netns,
    peer::{Outcome, Server, greet_and_echo, ping, talk},
    wait,
    world::{Family, two_nodes},
};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpSocket, TcpStream},
};

const PORT: u16 = 8080;
/// Lifetime of certificates in this suite: several renewals fit into a case.
const CERTIFICATE_TTL: Duration = Duration::from_secs(12);
struct Fixture {
    world: World,
    server: Server,
    neighbour_server: Server,
    client: Pod,
    outsider: Pod,
    far: Pod,
    far2: Pod,
}

impl Fixture {
    fn up() -> anyhow::Result<Self> {
        let pods = [
            ("mesh", "client", "n1"),
            ("mesh", "far", "n2"),
            ("mesh", "far2", "n2"),
            ("plain", "outsider", "n1"),
        ];
        let text = two_nodes(&pods, PORT);
        let ttl = format!("{}s", CERTIFICATE_TTL.as_secs());
        let world =
            World::up_with("identity", &[("mesh.yaml", &text)], &[("UNDERMESH_MAX_CERTIFICATE_TTL", &ttl)])?;
        let (far, far2) = (world.pod("mesh/far")?, world.pod("mesh/far2")?);
        Ok(Self {
            server: Server::start(&far, PORT, greet_and_echo())?,
            neighbour_server: Server::start(&far2, PORT, greet_and_echo())?,
            client: world.pod("mesh/client")?,
            outsider: world.pod("plain/outsider")?,
            far,
            far2,
            world,
        })
    }

    /// Asks the CA from a node's namespace, with the credential of `caller`.
    fn ask(
        &self,
        node: &str,
        credential: Option<&str>,
        account: &str,
    ) -> anyhow::Result<Result<WorkloadCertificate, FetchError>> {
        let status = self.world.status()?;
        let address: SocketAddr = status.control.address.parse()?;
        let state = self.world.state();
        let config = ChannelConfig {
            token: credential.map(|name| PemSource::File(state.join("credentials").join(name))),
            ..ChannelConfig::new(address, state.join("ca/root-cert.pem"), None)
        };
        let identity = Identity::new("cluster.local", "mesh", account);
        inside(&self.world.node(node)?.netns, async move {
            let issued = CaClient::new(channel(&config)?, Asking::ForPods).fetch(&identity).await;
            Ok(match issued {
                Ok(issued) => Ok(WorkloadCertificate::new(issued, 1, Ciphers::default())?),
                Err(refused) => Err(refused),
            })
        })
    }

    /// The certificate of the client's identity, as a compromised agent of n1 could have it.
    fn stolen(&self) -> anyhow::Result<Arc<WorkloadCertificate>> {
        Ok(Arc::new(self.ask("n1", Some("node-n1"), "client")??))
    }
}

/// Runs async work in a namespace, on a runtime of its own.
fn inside<T: Send>(
    netns_path: &Path,
    work: impl Future<Output = anyhow::Result<T>> + Send,
) -> anyhow::Result<T> {
    netns::within(netns_path, || {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
    })
}

/// Dials from the namespace of the running thread.
struct Here;

impl Connector for Here {
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(async move {
            let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.connect(to).await
        })
    }
}

/// Opens a tunnel from outside the mesh with a certificate, and reads the server's first word.
fn tunnel(
    from: &Pod,
    certificate: Arc<WorkloadCertificate>,
    to: &Pod,
    authority: &str,
    headers: TunnelHeaders,
) -> anyhow::Result<Result<String, DialError>> {
    let identity = certificate.identity.clone();
    let expected = Identity::new("cluster.local", &to.namespace, &to.name);
    let hop = Hop { dial: to.at(Family::V4, HBONE_PORT)?, expect: vec![expected] };
    let (source, authority) = (Family::V4.of(&from.ips)?, authority.to_owned());
    inside(&from.netns, async move {
        let draining = Draining::never();
        let pool = Pool::new(FixedCertificates::new([certificate]), TaskGroup::new(), draining);
        let dial = Dial { identity, hop, source, authority, headers, connect: Arc::new(Here) };
        match pool.open(dial).await {
            Err(refused) => Ok(Err(refused)),
            Ok(mut stream) => {
                let mut word = [0; 5];
                stream.read_exact(&mut word).await?;
                Ok(Ok(String::from_utf8_lossy(&word).into_owned()))
            }
        }
    })
}

fn main() -> ExitCode {
    let mut suite = Suite::over(Fixture::up);
    suite.case("the_ca_gives_a_node_only_identities_of_its_own_pods", authorised_only);
    suite.case("credentials_are_readable_by_root_only", credential_files);
    suite.case("a_tunnel_leads_only_to_the_pod_that_was_reached", foreign_authority);
    suite.case("a_certificate_of_another_authority_opens_nothing", foreign_root);
    suite.case("a_stated_client_is_not_believed", stated_client);
    suite.case("a_flood_ends_its_own_connection_and_no_other", flood::floods);
    suite.case("certificates_rotate_under_traffic_without_an_error", rotation);
    suite.case("without_the_ca_identities_expire_closed_and_come_back", ca_down);
    suite.leaves_nothing(|fixture: &Fixture| &fixture.world);
    suite.run()
}

fn authorised_only(fixture: &Fixture) -> anyhow::Result<()> {
    let given = |node: &str, credential, account: &str| {
        fixture.ask(node, credential, account).map(|answer| answer.is_ok())
    };
    ensure!(given("n1", Some("node-n1"), "client")?, "a node is refused its own pod");
    ensure!(given("n2", Some("node-n2"), "far")?, "a node is refused its own pod");
    for (credential, account, why) in [
        (Some("node-n1"), "far", "a pod of another node"),
        (Some("node-n2"), "client", "a pod of another node"),
        (Some("node-n1"), "nobody", "a pod that does not exist"),
        (None, "client", "a caller without credential"),
    ] {
        ensure!(!given("n1", credential, account)?, "the CA signs for {why}");
    }
    Ok(())
}

fn credential_files(fixture: &Fixture) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let state = fixture.world.state();
    let mut files: Vec<PathBuf> = vec![state.join("ca/root-key.pem")];
    files.extend(
        std::fs::read_dir(state.join("credentials"))?
            .map(|entry| Ok::<_, io::Error>(entry?.path()))
            .collect::<Result<Vec<_>, _>>()?,
    );
    ensure!(files.len() >= 3, "only {files:?}");
    for file in files {
        let metadata = File::open(&file).and_then(|file| file.metadata())?;
        ensure!(
            metadata.mode() & 0o777 == 0o600 && metadata.uid() == 0,
            "{}: {:o}",
            file.display(),
            metadata.mode()
        );
    }
    Ok(())
}

fn foreign_authority(fixture: &Fixture) -> anyhow::Result<()> {
    let certificate = fixture.stolen()?;
    let open = |authority: &str| {
        tunnel(&fixture.outsider, certificate.clone(), &fixture.far, authority, TunnelHeaders::default())
    };
    let own = fixture.far.at(Family::V4, PORT)?;
    let word = open(&format_authority(own))??;
    ensure!(word == "hello", "the pod's own authority answers {word:?}");
    let before = fixture.neighbour_server.accepted();
    for (authority, status) in [
        (format_authority(fixture.far2.at(Family::V4, PORT)?), 400),
        (format_authority(fixture.outsider.at(Family::V4, PORT)?), 400),
        ("127.0.0.1:8080".to_owned(), 400),
        ("169.254.169.254:80".to_owned(), 400),
        ("localhost:8080".to_owned(), 400),
        (format!("{}:0", own.ip()), 400),
        (format!("{}:15008", own.ip()), 503),
        (format!("{}:15001", own.ip()), 503),
    ] {
        match open(&authority)? {
            Err(DialError::Status { status: got, .. }) => {
                ensure!(got == status, "{authority}: {got} instead of {status}")
            }
            Err(DialError::Request(_)) => {}
            other => bail!("{authority}: {other:?}"),
        }
    }
    ensure!(
        fixture.neighbour_server.accepted() == before,
        "a neighbour was reached through a foreign tunnel"
    );
    Ok(())
}

fn foreign_root(fixture: &Fixture) -> anyhow::Result<()> {
    let before = fixture.server.accepted();
    let forged = MiniCa::new().certificate(&Identity::new("cluster.local", "mesh", "client"));
    let authority = format_authority(fixture.far.at(Family::V4, PORT)?);
    let outcome = tunnel(&fixture.outsider, forged, &fixture.far, &authority, TunnelHeaders::default())?;
    ensure!(outcome.is_err(), "a forged certificate got {outcome:?}");
    ensure!(fixture.server.accepted() == before, "the application was reached");
    Ok(())
}

/// The header that only a bound waypoint may use, from somebody else.
fn stated_client(fixture: &Fixture) -> anyhow::Result<()> {
    const ONLY_ADMIN: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-admin, namespace: mesh}
spec:
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/mesh/sa/admin]}}]
";
    fixture.world.apply(&[("policy.yaml", ONLY_ADMIN)])?;
    let authority = format_authority(fixture.far.at(Family::V4, PORT)?);
    let admin = Identity::new("cluster.local", "mesh", "admin");
    let headers = TunnelHeaders {
        baggage: Some("k8s.namespace.name=mesh,service.name=admin".into()),
        forwarded: None,
        client_claim: Some(admin),
    };
    let outcome = tunnel(&fixture.outsider, fixture.stolen()?, &fixture.far, &authority, headers);
    fixture.world.apply(&[("policy.yaml", "")])?;
    match outcome? {
        Err(DialError::Status { status: 401, .. }) => Ok(()),
        other => bail!("a stated client got {other:?}"),
    }
}

fn rotation(fixture: &Fixture) -> anyhow::Result<()> {
    let to = fixture.far.at(Family::V4, PORT)?;
    let generation = || -> anyhow::Result<u64> {
        let pods = fixture.world.admin("n1", "/pods")?;
        let own = pods
            .as_array()
            .context("a list")?
            .iter()
            .find(|pod| pod["name"] == "client")
            .context("the client")?;
        own["certificate"]["generation"].as_u64().with_context(|| format!("no generation in {own}"))
    };
    let (first, began) = (generation()?, Instant::now());
    let Outcome::Greeted { stream: mut long, .. } = talk(&fixture.client, to) else { bail!("refused") };
    let mut count = 0;
    // Until two certificates later; every connection on the way must work, old and new.
    while generation()? < first + 2 {
        ensure!(began.elapsed() < 10 * CERTIFICATE_TTL, "no new certificate after {:?}", began.elapsed());
        match talk(&fixture.client, to) {
            Outcome::Greeted { mut stream, .. } => ping(&mut stream, b"new connection")?,
            Outcome::Refused(why) => bail!("connection {count} was refused: {why}"),
        }
        ping(&mut long, b"old connection")?;
        count += 1;
    }
    Ok(())
}

fn ca_down(fixture: &Fixture) -> anyhow::Result<()> {
    let to = fixture.far.at(Family::V4, PORT)?;
    let state = fixture.world.state();
    let (credentials, hidden) = (state.join("credentials"), state.join("hidden-credentials"));
    // The CA refuses everybody: the same to an agent as if it were away.
    std::fs::rename(&credentials, &hidden)?;
    std::fs::create_dir(&credentials)?;
    let expired = wait::until("identities to expire", || match talk(&fixture.client, to) {
        Outcome::Refused(_) => Ok(()),
        Outcome::Greeted { .. } => Err("still served".into()),
    });
    std::fs::remove_dir(&credentials)?;
    std::fs::rename(&hidden, &credentials)?;
    expired?;
    wait::until_true("identities to come back", || talk(&fixture.client, to).greeted())?;
    Ok(())
}
