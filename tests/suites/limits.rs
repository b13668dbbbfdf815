//! Promise: nobody takes what all share. A pod, a peer or a flood that wants too much is refused with a reason, and the
//! others go on.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, ensure};
use mesh_core::tunnel::HBONE_PORT;
use mesh_tests::{
    Pod, Suite, World,
    peer::{Outcome, Server, dial, greet_and_echo, ping, talk},
    wait,
    world::{Family, signal, two_nodes},
};
use nix::{libc, sys::signal::Signal};

const PORT: u16 = 8080;
/// Connections that one pod may have here.
const MOST: usize = 24;
/// Peers that begin a handshake and say no more.
const HALF_OPEN: usize = 150;

struct Fixture {
    world: World,
    _servers: Vec<Server>,
    client: Pod,
    other: Pod,
    near: Pod,
    far: Pod,
    outsider: Pod,
}

impl Fixture {
    fn up() -> anyhow::Result<Self> {
        let pods = [
            ("mesh", "client", "n1"),
            ("mesh", "other", "n1"),
            ("mesh", "near", "n1"),
            ("mesh", "far", "n2"),
            ("plain", "outsider", "n1"),
        ];
        let most = MOST.to_string();
        let environment = [
            ("UNDERMESH_POD_CONNECTIONS", most.as_str()),
            ("UNDERMESH_LOG", "info,mesh_node::kernel::log=debug"),
        ];
        let text = two_nodes(&pods, PORT);
        let world = World::up_with("limits", &[("mesh.yaml", &text)], &environment)?;
        let pod = |name: &str| world.pod(name);
        let (near, far) = (pod("mesh/near")?, pod("mesh/far")?);
        let servers = [&near, &far]
            .into_iter()
            .map(|pod| Server::start(pod, PORT, greet_and_echo()))
            .collect::<Result<_, _>>()?;
        let (client, other, outsider) = (pod("mesh/client")?, pod("mesh/other")?, pod("plain/outsider")?);
        Ok(Self { _servers: servers, client, other, near, far, outsider, world })
    }

    /// Opens connections until one is refused; those that were not, and why it was.
    fn exhaust(&self, from: &Pod, to: SocketAddr) -> anyhow::Result<(Vec<TcpStream>, String)> {
        let mut held = Vec::new();
        for _ in 0..4 * MOST {
            match talk(from, to) {
                Outcome::Greeted { stream, .. } => held.push(stream),
                Outcome::Refused(why) => return Ok((held, format!("{why:?}"))),
            }
        }
        anyhow::bail!("{} connections and none refused", held.len())
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::over(Fixture::up);
    suite.case("a_pod_with_too_many_connections_is_refused_while_others_go_on", pod_quota);
    suite.case("a_pod_that_is_called_too_much_is_refused_while_others_go_on", called_too_much);
    suite.case("an_agent_without_descriptors_turns_clients_away_and_recovers", out_of_descriptors);
    suite.case("peers_that_begin_a_handshake_and_say_no_more_hold_nobody_up", half_open);
    suite.case("peers_that_wait_for_an_agent_without_a_world_are_bounded", waiting);
    suite.case("a_debug_build_forwards_what_the_programs_log", programs_log);
    suite.leaves_nothing(|fixture: &Fixture| &fixture.world);
    suite.run()
}

fn pod_quota(fixture: &Fixture) -> anyhow::Result<()> {
    // Directly: through the agent they would take the called pod's room as well.
    let to = fixture.near.at(Family::V4, PORT)?;
    let (mut held, _) = fixture.exhaust(&fixture.client, to)?;
    ensure!(held.len() == MOST, "{} instead of {MOST}", held.len());
    wait::until("the reason to be told", || {
        let log = fixture.world.log("n1").map_err(|error| format!("{error:#}"))?;
        if log.contains("POD_QUOTA") { Ok(()) } else { Err("not in the log".to_owned()) }
    })?;
    for to in [to, fixture.far.at(Family::V6, PORT)?] {
        ensure!(talk(&fixture.other, to).greeted(), "another pod of the node is refused");
    }
    ping(&mut held[0], b"those that are open go on")?;
    drop(held);
    wait::until_true("room again", || talk(&fixture.client, to).greeted())
}

fn called_too_much(fixture: &Fixture) -> anyhow::Result<()> {
    // The caller is not in the mesh: nothing bounds it but the called pod's room in the agent.
    let to = fixture.far.at(Family::V4, PORT)?;
    let (held, _) = fixture.exhaust(&fixture.outsider, to)?;
    ensure!(held.len() == MOST, "{} instead of {MOST}", held.len());
    let refused = fixture.world.admin_text("n2", "/metrics")?;
    ensure!(refused.contains("POD_QUOTA"), "no such refusal in the metrics");
    ensure!(talk(&fixture.outsider, fixture.near.at(Family::V4, PORT)?).greeted(), "another pod is refused");
    drop(held);
    wait::until_true("room again", || talk(&fixture.outsider, to).greeted())
}

/// Bounds the descriptors of a process; what the bound was.
fn bound_descriptors(pid: u32, most: u64) -> anyhow::Result<u64> {
    let pid = i32::try_from(pid)?;
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit`.
    let read = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut before) };
    ensure!(read == 0, "read the bound: {}", std::io::Error::last_os_error());
    let wanted = libc::rlimit { rlim_cur: most, rlim_max: before.rlim_max };
    // SAFETY: the kernel reads one `rlimit`.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const wanted, std::ptr::null_mut()) };
    ensure!(set == 0, "set the bound: {}", std::io::Error::last_os_error());
    Ok(before.rlim_cur)
}

fn out_of_descriptors(fixture: &Fixture) -> anyhow::Result<()> {
    let pid = fixture.world.agent_pid("n2")?;
    let now = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
    let to = fixture.far.at(Family::V4, PORT)?;
    let before = bound_descriptors(pid, now + 12)?;
    let exhausted = fixture.exhaust(&fixture.outsider, to);
    let outcome = exhausted.and_then(|(mut held, _)| {
        ensure!(!held.is_empty() && held.len() < MOST, "{} connections", held.len());
        ping(&mut held[0], b"those that are open go on")?;
        drop(held);
        // By itself, with the bound as it is.
        wait::until_true("clients to be served again", || talk(&fixture.outsider, to).greeted())
    });
    bound_descriptors(pid, before)?;
    outcome?;
    ensure!(fixture.world.agent_pid("n2")? == pid, "the agent was started again");
    Ok(())
}

fn half_open(fixture: &Fixture) -> anyhow::Result<()> {
    let tunnels = fixture.far.at(Family::V4, 15008)?;
    let begin = |n: usize| -> anyhow::Result<TcpStream> {
        let mut stream = dial(&fixture.outsider, tunnels)?;
        match n % 3 {
            // Nothing; the head of a record; a record that never ends.
            0 => {}
            1 => stream.write_all(&[22, 3, 1])?,
            _ => stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3])?,
        }
        Ok(stream)
    };
    let mut slow = Vec::new();
    for n in 0..HALF_OPEN {
        // Turned away at once is as good as held for a while.
        slow.extend(begin(n).ok());
        if n % 10 == 0 {
            let to = fixture.far.at(Family::V4, PORT)?;
            ensure!(talk(&fixture.client, to).greeted(), "a good client is refused after {n} bad ones");
        }
    }
    for mut stream in slow {
        // An end or a reset; a timeout of the read is neither.
        let read = stream.read(&mut [0; 64]);
        let ended = match &read {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        };
        ensure!(ended, "a peer that says nothing is held: {read:?}");
    }
    Ok(())
}

/// More than one address may have handshakes.
const WAITING: usize = 300;

fn waiting(fixture: &Fixture) -> anyhow::Result<()> {
    let (agent, control) = (fixture.world.agent_pid("n2")?, fixture.world.control_pid()?);
    signal(control, Signal::SIGSTOP)?;
    let outcome = overload(fixture, agent);
    signal(control, Signal::SIGCONT)?;
    outcome?;
    fixture.world.in_force()?;
    let to = fixture.far.at(Family::V4, PORT)?;
    wait::until_true("a good client to be served again", || talk(&fixture.client, to).greeted())
}

/// An agent that is started while the control plane is away has neither a world nor certificates.
fn overload(fixture: &Fixture, agent: u32) -> anyhow::Result<()> {
    let tunnels = fixture.far.at(Family::V4, HBONE_PORT)?;
    signal(agent, Signal::SIGKILL)?;
    wait::until_true("another agent to listen", || {
        !Path::new(&format!("/proc/{agent}")).exists() && dial(&fixture.outsider, tunnels).is_ok()
    })?;
    let held: Vec<_> = (0..WAITING).map(|_| dial(&fixture.outsider, tunnels)).collect::<Result<_, _>>()?;
    wait::until("the first of them to be turned away", || {
        let log = fixture.world.log("n2").map_err(|error| format!("{error:#}"))?;
        if log.contains("too many handshakes") { Ok(()) } else { Err("none is".to_owned()) }
    })?;
    drop(held);
    Ok(())
}

fn programs_log(fixture: &Fixture) -> anyhow::Result<()> {
    // Nobody but the agent may reach its own ports.
    let refused = dial(&fixture.client, "127.0.0.1:15001".parse().context("an address")?);
    ensure!(refused.is_err(), "a port of the agent is reached");
    wait::until("the line of the program", || {
        let log = fixture.world.log("n1").map_err(|error| format!("{error:#}"))?;
        let line = log.lines().find(|line| line.contains("refused reason=illegal_port"));
        line.map(drop).ok_or_else(|| "no line".to_owned())
    })
}
