//! Promise: when a part of the mesh is missing, what was permitted on one node goes on, everything else is refused,
//! nothing is sent in the clear, and all of it heals without a hand.

use std::{net::TcpStream, process::ExitCode};

use anyhow::{Context as _, ensure};
use mesh_tests::{
    Pod, Suite, World,
    peer::{Outcome, Server, ended, greet_and_echo, ping, talk},
    wait,
    wire::Wire,
    world::{ENROLLED, Family, signal, sleeper, two_nodes},
};
use nix::sys::signal::Signal;

const PORT: u16 = 8080;
const CANARY: &[u8] = b"PLAINTEXT-CANARY";
const PODS: &[(&str, &str, &str)] =
    &[("mesh", "client", "n1"), ("mesh", "near", "n1"), ("mesh", "far", "n2"), ("plain", "outsider", "n1")];
const DENY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: mesh}
spec:
  action: DENY
  rules:
  - to: [{operation: {ports: ['8080']}}]
";

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: mesh}
spec: {mtls: {mode: STRICT}}
";

struct Fixture {
    world: World,
    _servers: Vec<Server>,
    client: Pod,
    outsider: Pod,
    near: Pod,
    far: Pod,
}

impl Fixture {
    fn up() -> anyhow::Result<Self> {
        let text = two_nodes(PODS, PORT);
        let world = World::up("faults", &[("mesh.yaml", &text)])?;
        let (near, far) = (world.pod("mesh/near")?, world.pod("mesh/far")?);
        let servers = [&near, &far]
            .into_iter()
            .map(|pod| Server::start(pod, PORT, greet_and_echo()))
            .collect::<Result<_, _>>()?;
        let (client, outsider) = (world.pod("mesh/client")?, world.pod("plain/outsider")?);
        Ok(Self { world, _servers: servers, client, outsider, near, far })
    }

    fn open(&self, from: &Pod, to: &Pod, family: Family) -> anyhow::Result<TcpStream> {
        match talk(from, to.at(family, PORT)?) {
            Outcome::Greeted { stream, .. } => Ok(stream),
            Outcome::Refused(why) => anyhow::bail!("{} to {} {family:?}: {why}", from.name, to.name),
        }
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::over(Fixture::up);
    suite.case("a_policy_change_cuts_live_connections_on_every_path_and_no_other", policy_change);
    suite.case("a_killed_agent_leaves_same_node_calls_alone_and_the_rest_closed", agent_killed);
    suite.case("without_the_control_plane_everything_permitted_goes_on", control_killed);
    suite.case("a_policy_file_that_breaks_goes_on_denying_also_after_a_restart", broken_file);
    suite.case("leaving_the_mesh_keeps_direct_connections", leaving);
    suite.case("what_was_open_before_enrolment_goes_on_until_strict_applies", earlier);
    suite.case("a_deleted_pod_ends_its_connections", deleted);
    suite.case("a_pod_that_is_deleted_while_its_agent_drains_ends_its_connections", deleted_in_drain);
    suite.leaves_nothing(|fixture: &Fixture| &fixture.world);
    suite.run()
}

fn policy_change(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("policy.yaml", "")])?;
    let mut cut = Vec::new();
    for family in [Family::V4, Family::V6] {
        cut.push(("direct", fixture.open(&fixture.client, &fixture.near, family)?));
        cut.push(("tunnel", fixture.open(&fixture.client, &fixture.far, family)?));
        cut.push(("plaintext", fixture.open(&fixture.outsider, &fixture.near, family)?));
    }
    let _other_port = Server::start(&fixture.near, PORT + 1, greet_and_echo())?;
    let Outcome::Greeted { stream: mut kept, .. } =
        talk(&fixture.client, fixture.near.at(Family::V4, PORT + 1)?)
    else {
        anyhow::bail!("the other port is refused");
    };
    fixture.world.apply(&[("policy.yaml", DENY)])?;
    for (path, stream) in &mut cut {
        ensure!(ended(stream), "a {path} connection outlived the policy that denies it");
    }
    ping(&mut kept, b"not denied, not cut")?;
    ensure!(
        !talk(&fixture.client, fixture.near.at(Family::V4, PORT)?).greeted(),
        "a new connection is accepted"
    );
    fixture.world.apply(&[("policy.yaml", "")])?;
    fixture.open(&fixture.client, &fixture.near, Family::V4)?;
    Ok(())
}

fn agent_killed(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("policy.yaml", "")])?;
    let mut direct = fixture.open(&fixture.client, &fixture.near, Family::V4)?;
    let mut tunnel = fixture.open(&fixture.client, &fixture.far, Family::V4)?;
    let wire = Wire::tap(&fixture.world.node("n2")?.netns)?;
    fixture.world.kill_agent("n1")?;
    ensure!(ended(&mut tunnel), "a tunnelled connection outlived its agent");
    // Until the restart nothing new may pass between the nodes; afterwards everything must again.
    ping(&mut direct, b"the kernel carries it alone")?;
    let healed = wait::until("cross-node calls to work again", || {
        match talk(&fixture.client, fixture.near.at(Family::V6, PORT).map_err(|e| e.to_string())?) {
            Outcome::Greeted { .. } => {}
            Outcome::Refused(why) => panic!("a same-node call was refused while the agent was away: {why}"),
        }
        match talk(&fixture.client, fixture.far.at(Family::V4, PORT).map_err(|e| e.to_string())?) {
            Outcome::Greeted { stream, .. } => Ok(stream),
            Outcome::Refused(why) => Err(why),
        }
    });
    let mut healed = healed?;
    ping(&mut healed, CANARY)?;
    ping(&mut direct, b"and still does")?;
    fixture.world.in_force()?;
    let frames = wire.finish();
    ensure!(frames.segments().count() > 0, "the capture saw nothing");
    let clear =
        frames.segments().filter(|segment| between_nodes(segment.destination_port, segment.payload)).count();
    ensure!(clear == 0, "{clear} segments with the canary towards port {PORT}");
    // The agent that is told of its end has not seen its beginning.
    let client = direct.local_addr()?.to_string();
    drop(direct);
    wait::until("the access record of the connection that outlived its agent", || {
        let log = fixture.world.log("n1").map_err(|error| format!("{error:#}"))?;
        let is_it =
            |line: &&str| line.contains(&client) && line.contains("direct") && line.contains("access");
        log.lines().find(is_it).map(drop).ok_or_else(|| format!("none of {client}"))
    })
}

/// A segment addressed to the application's port that holds the marker. Inside the destination's node the last hop
/// is the pod's own loopback, which the node's interfaces do not see.
fn between_nodes(destination_port: u16, payload: &[u8]) -> bool {
    destination_port == PORT && payload.windows(CANARY.len()).any(|window| window == CANARY)
}

fn control_killed(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("policy.yaml", "")])?;
    let mut open = fixture.open(&fixture.client, &fixture.far, Family::V4)?;
    fixture.world.kill_control()?;
    ping(&mut open, b"goes on")?;
    fixture.open(&fixture.client, &fixture.far, Family::V6)?;
    fixture.open(&fixture.client, &fixture.near, Family::V6)?;
    // It is started again, and a change is in force again.
    fixture.world.apply(&[("policy.yaml", DENY)])?;
    ensure!(ended(&mut open), "the change did not reach the agents after the restart");
    fixture.world.apply(&[("policy.yaml", "")])?;
    Ok(())
}

fn broken_file(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("policy.yaml", DENY)])?;
    let refused = || -> anyhow::Result<()> {
        for server in [&fixture.near, &fixture.far] {
            let greeted = talk(&fixture.client, server.at(Family::V4, PORT)?).greeted();
            ensure!(!greeted, "{} is reached past the policy that broke", server.name);
        }
        Ok(())
    };
    refused()?;
    fixture.world.write("policy.yaml", &DENY.replace("spec:", "spec: ["))?;
    // Told, and the only thing that is told.
    let told = || {
        wait::until("the broken file to be the only thing that waits", || {
            let status = fixture.world.status().map_err(|error| format!("{error:#}"))?;
            let only =
                !status.waiting.is_empty() && status.waiting.iter().all(|line| line.contains("policy.yaml"));
            if only { Ok(status) } else { Err(format!("{:?}", status.waiting)) }
        })
    };
    let restarts = told()?.control.restarts;
    refused()?;
    fixture.world.kill_control()?;
    wait::until_true("the control plane to be started again", || {
        fixture.world.status().is_ok_and(|status| status.control.restarts > restarts)
    })?;
    told()?;
    refused()?;
    fixture.world.apply(&[("policy.yaml", "")])?;
    fixture.open(&fixture.client, &fixture.far, Family::V4)?;
    Ok(())
}

fn leaving(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("policy.yaml", "")])?;
    let mut direct = fixture.open(&fixture.client, &fixture.near, Family::V4)?;
    let mut plain = fixture.open(&fixture.outsider, &fixture.near, Family::V4)?;
    let enrolled = two_nodes(PODS, PORT);
    let text = enrolled.replace(ENROLLED, "");
    let status = fixture.world.apply(&[("mesh.yaml", &text)])?;
    ensure!(status.pods.iter().all(|pod| !pod.enrolled), "a pod is still enrolled: {:?}", status.pods);
    ping(&mut direct, b"direct, kept").context("direct")?;
    ping(&mut plain, b"plain, kept").context("plain")?;
    fixture.open(&fixture.client, &fixture.far, Family::V4)?;
    let status = fixture.world.apply(&[("mesh.yaml", &enrolled)])?;
    ensure!(
        status.pods.iter().filter(|pod| pod.enrolled).count() == 3,
        "not enrolled again: {:?}",
        status.pods
    );
    fixture.open(&fixture.client, &fixture.far, Family::V4)?;
    Ok(())
}

fn earlier(fixture: &Fixture) -> anyhow::Result<()> {
    let world = &fixture.world;
    let enrolled = two_nodes(PODS, PORT);
    let before = enrolled.replace(ENROLLED, "");
    world.apply(&[("policy.yaml", ""), ("mesh.yaml", &before)])?;
    let mut open = Vec::new();
    for family in [Family::V4, Family::V6] {
        open.push(fixture.open(&fixture.outsider, &fixture.near, family)?);
        open.push(fixture.open(&fixture.client, &fixture.far, family)?);
        open.push(fixture.open(&fixture.client, &fixture.near, family)?);
    }
    world.apply(&[("mesh.yaml", &enrolled)])?;
    for stream in &mut open {
        ping(stream, b"as before")?;
    }
    let listed = |node: &str| -> anyhow::Result<Vec<_>> {
        let all = world.connections(node)?;
        Ok(all.into_iter().filter(|one| one.path.as_deref() == Some("earlier")).collect())
    };
    // n1: two of the outsider, four of the client, and the two of those that arrive at `near`.
    let (on_n1, on_n2) = (listed("n1")?, listed("n2")?);
    ensure!((on_n1.len(), on_n2.len()) == (8, 2), "listed: {on_n1:?}, {on_n2:?}");
    for stream in &open {
        let source = stream.local_addr()?;
        ensure!(on_n1.iter().any(|one| one.src.addr == source), "{source} is not listed");
    }
    let pods = world.admin("n1", "/pods")?;
    let near = pods.as_array().context("pods")?.iter().find(|pod| pod["name"] == "near").context("near")?;
    ensure!(near["earlier_connections"] == 4, "counted: {near}");
    world.apply(&[("strict.yaml", STRICT)])?;
    for stream in &mut open {
        ensure!(ended(stream), "{:?} outlived STRICT", stream.local_addr());
    }
    world.apply(&[("strict.yaml", "")])?;
    fixture.open(&fixture.outsider, &fixture.near, Family::V4)?;
    wait::until_true("nothing of before to be listed", || {
        listed("n1").is_ok_and(|all| all.is_empty()) && listed("n2").is_ok_and(|all| all.is_empty())
    })
}

fn deleted(fixture: &Fixture) -> anyhow::Result<()> {
    fixture.world.apply(&[("extra.yaml", &sleeper("mesh", "extra", "n2"))])?;
    let extra = fixture.world.pod("mesh/extra")?;
    let server = Server::start(&extra, PORT, greet_and_echo())?;
    let mut open = fixture.open(&fixture.client, &extra, Family::V4)?;
    drop(server);
    fixture.world.apply(&[("extra.yaml", "")])?;
    ensure!(ended(&mut open), "a connection outlived its pod");
    Ok(())
}

/// Of the log of an agent, what came after it began to drain.
fn in_drain(log: &str) -> Option<&str> {
    Some(log.rsplit_once("draining")?.1)
}

fn deleted_in_drain(fixture: &Fixture) -> anyhow::Result<()> {
    let world = &fixture.world;
    world.apply(&[("policy.yaml", ""), ("extra.yaml", &sleeper("mesh", "extra", "n2"))])?;
    let extra = world.pod("mesh/extra")?;
    let server = Server::start(&extra, PORT, greet_and_echo())?;
    let mut open = fixture.open(&fixture.client, &extra, Family::V4)?;
    let mut other = fixture.open(&fixture.client, &fixture.far, Family::V4)?;
    drop(server);
    let agent = world.agent_pid("n2")?;
    signal(agent, Signal::SIGTERM)?;
    wait::until_true("the drain to start", || world.log("n2").is_ok_and(|log| in_drain(&log).is_some()))?;
    world.write("extra.yaml", "")?;
    wait::until_true("the pod to be released", || {
        world.log("n2").is_ok_and(|log| in_drain(&log).is_some_and(|log| log.contains("pod released")))
    })?;
    ensure!(ended(&mut open), "a connection outlived its pod");
    // Not because the drain was over.
    ping(&mut other, b"goes on while the agent drains")?;
    drop(other);
    wait::until_true("another agent", || world.agent_pid("n2").is_ok_and(|pid| pid != agent))?;
    world.in_force()?;
    fixture.open(&fixture.client, &fixture.far, Family::V4)?;
    Ok(())
}
