//! The network between the machines of a cluster: a bridge in the control machine, a link to each node, and one to this
//! machine.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};

use super::{
    machine::Machine,
    plan::{Place, Plan},
};

/// Connects the machines, given in the order of the plan's places.
///
/// # Errors
/// When a link cannot be made.
pub fn connect(plan: Plan, machines: &[Machine]) -> anyhow::Result<()> {
    let places = plan.places();
    let control = machines.first().context("no control machine")?;
    batch(None, &root_lines(plan, control.pid))?;
    let pids: Vec<_> = machines.iter().map(|machine| machine.pid).collect();
    batch(Some(control), &control_lines(plan, &places, &pids))?;
    for (place, machine) in places.iter().zip(machines).skip(1) {
        batch(Some(machine), &node_lines(plan, &places, place))?;
    }
    Ok(())
}

/// (pure) On this machine: the way to the cluster.
fn root_lines(plan: Plan, control: i32) -> Vec<String> {
    let link = plan.link();
    vec![
        format!("link add {link} type veth peer name root0 netns {control}"),
        format!("addr add {}/24 dev {link}", plan.root_v4()),
        format!("link set {link} up"),
    ]
}

/// (pure) In the control machine: the bridge, a port per machine, and the routes to the pods.
fn control_lines(plan: Plan, places: &[Place], pids: &[i32]) -> Vec<String> {
    let control = plan.control();
    let mut lines = vec![
        "link set lo up".to_owned(),
        "link add br0 type bridge".to_owned(),
        "link set root0 master br0 up".to_owned(),
    ];
    for (place, pid) in places.iter().zip(pids).skip(1) {
        let name = place.name;
        lines.push(format!("link add {name} type veth peer name eth0 netns {pid}"));
        lines.push(format!("link set {name} master br0 up"));
    }
    lines.push(format!("addr add {}/24 dev br0", control.v4));
    lines.push(format!("addr add {}/64 dev br0 nodad", control.v6));
    lines.push("link set br0 up".to_owned());
    lines.extend(pod_routes(plan, places, &control));
    lines
}

/// (pure) In a node: its address, and the routes to the pods of the others. What is nowhere goes to the control machine,
/// which has no way out either.
fn node_lines(plan: Plan, places: &[Place], own: &Place) -> Vec<String> {
    let control = plan.control();
    let mut lines = vec![
        "link set lo up".to_owned(),
        format!("addr add {}/24 dev eth0", own.v4),
        format!("addr add {}/64 dev eth0 nodad", own.v6),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", control.v4),
        format!("route add default via {}", control.v6),
    ];
    lines.extend(pod_routes(plan, places, own));
    lines
}

/// (pure) The way to the pods of every node but the own.
fn pod_routes(plan: Plan, places: &[Place], own: &Place) -> Vec<String> {
    let others = places.iter().filter(|place| *place != own);
    others
        .filter_map(|place| Some((place, plan.pods(place.node?))))
        .flat_map(|(place, [v4, v6])| {
            [format!("route add {v4} via {}", place.v4), format!("route add {v6} via {}", place.v6)]
        })
        .collect()
}

fn batch(machine: Option<&Machine>, lines: &[String]) -> anyhow::Result<()> {
    let mut command = match machine {
        Some(machine) => {
            let mut nsenter = Command::new("nsenter");
            nsenter.arg(format!("--net={}", machine.netns.display())).arg("ip");
            nsenter
        }
        None => Command::new("ip"),
    };
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut ip = command.spawn().context("start ip (package iproute2)")?;
    if let Some(mut stdin) = ip.stdin.take() {
        stdin.write_all((lines.join("\n") + "\n").as_bytes())?;
    }
    let output = ip.wait_with_output()?;
    let place = machine.map_or("this machine", |machine| machine.name.as_str());
    ensure!(
        output.status.success(),
        "the network of {place}: {} in:\n{}",
        String::from_utf8_lossy(&output.stderr).trim(),
        lines.join("\n")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_routes_to_the_pods_of_the_other_only() {
        let plan = Plan { index: 1 };
        let lines = node_lines(plan, &plan.places(), &plan.places()[1]);
        assert!(lines.contains(&"route add 10.101.2.0/24 via 198.19.1.12".to_owned()), "{lines:?}");
        assert!(lines.contains(&"route add fd44:1:2::/64 via fd53:1::c".to_owned()), "{lines:?}");
        assert!(!lines.iter().any(|line| line.contains("10.101.1.0")), "{lines:?}");
    }
}
