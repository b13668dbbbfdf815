//! `cargo xtask bench l4`: what a connection costs, against plain TCP and an Envoy pair that does the same job, all
//! in one run, interleaved. Ratios are medians of per-round ratios with a bootstrap 95 % interval.

mod envoy;
mod load;
mod report;
mod usage;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use mesh_tests::{
    Pod, World,
    world::{Family, program, two_nodes},
};

use crate::{
    envoy::EnvoyPair,
    load::{Sample, Target},
    report::Report,
    usage::Processes,
};

/// Pods: clients on n1, servers beside them and on n2; the plain ones carry Envoy too.
const PODS: &[(&str, &str, &str)] = &[
    ("mesh", "client", "n1"),
    ("mesh", "near", "n1"),
    ("mesh", "far", "n2"),
    ("plain", "client", "n1"),
    ("plain", "near", "n1"),
    ("plain", "far", "n2"),
];

struct Options {
    json: Option<PathBuf>,
    rounds: usize,
    envoy: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options { json: None, rounds: 7, envoy: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "l4" => {}
            "--json" => options.json = Some(value()?.into()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
            "--envoy" => options.envoy = Some(value()?.into()),
            other => {
                anyhow::bail!("unknown argument {other}: l4 [--json FILE] [--rounds N] [--envoy PROGRAM]")
            }
        }
    }
    Ok(options)
}

fn run() -> anyhow::Result<()> {
    let options = options()?;
    let text = two_nodes(PODS, load::PORT);
    eprintln!("bench: starting a local mesh");
    let world = World::up("bench", &[("mesh.yaml", &text)])?;
    let pod = |key| world.pod(key);
    let (client, near, far) = (pod("mesh/client")?, pod("mesh/near")?, pod("mesh/far")?);
    let (plain_client, plain_near, plain_far) = (pod("plain/client")?, pod("plain/near")?, pod("plain/far")?);
    let _servers = load::serve(&[&near, &far, &plain_near, &plain_far])?;
    let agents = Processes::new(vec![world.agent_pid("n1")?, world.agent_pid("n2")?]);
    let envoy = match &options.envoy {
        Some(path) => Some(EnvoyPair::start(path, &plain_client, &plain_far)?),
        None => {
            eprintln!("bench: no --envoy PROGRAM: the ratios against it are left out");
            None
        }
    };
    let to = |pod: &Pod| pod.at(Family::V4, load::PORT);
    let mut targets = vec![
        Target::new("plain same node", &plain_client, to(&plain_near)?, Processes::default()),
        Target::new("undermesh same node", &client, to(&near)?, agents.clone()),
        Target::new("plain cross node", &plain_client, to(&plain_far)?, Processes::default()),
        Target::new("undermesh cross node", &client, to(&far)?, agents),
    ];
    if let Some(envoy) = &envoy {
        targets.push(Target::new("envoy cross node", &plain_client, envoy.entry(), envoy.processes()));
    }
    for target in &targets {
        load::warm_up(target).with_context(|| target.name.to_owned())?;
    }
    let mut rounds: Vec<Vec<Sample>> = Vec::new();
    for round in 0..options.rounds {
        eprintln!("bench: round {} of {}", round + 1, options.rounds);
        // There and back again, so that a drift of the machine falls on all alike.
        let mut there = targets.iter().map(load::measure).collect::<anyhow::Result<Vec<_>>>()?;
        let back = targets.iter().rev().map(load::measure).collect::<anyhow::Result<Vec<_>>>()?;
        for (sample, other) in there.iter_mut().zip(back.into_iter().rev()) {
            sample.merge(&other);
        }
        rounds.push(there);
    }
    eprintln!("bench: idle connections");
    let idle = targets.iter().map(load::idle_bytes).collect::<anyhow::Result<Vec<_>>>()?;
    let names: Vec<_> = targets.iter().map(|target| target.name).collect();
    let report = Report::new(&names, &rounds, &idle);
    println!("{}", report.markdown());
    if let Some(path) = &options.json {
        std::fs::write(path, report.json()).with_context(|| format!("write {}", path.display()))?;
    }
    // The agents' programs must be the ones of this build.
    program("mesh-node").map(drop)
}
