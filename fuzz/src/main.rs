//! Runs fuzz targets on the stable toolchain: see README.md.

use std::{
    env, fs,
    io::{Seek, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

mod mutate;

#[path = "../fuzz_targets/connect_head.rs"]
mod connect_head;
#[path = "../fuzz_targets/csr.rs"]
mod csr;
#[path = "../fuzz_targets/frames.rs"]
mod frames;
#[path = "../fuzz_targets/http_framing.rs"]
mod http_framing;
#[path = "../fuzz_targets/records.rs"]
mod records;
#[path = "../fuzz_targets/spiffe_san.rs"]
mod spiffe_san;
#[path = "../fuzz_targets/xds_resource.rs"]
mod xds_resource;
#[path = "../fuzz_targets/yaml_source.rs"]
mod yaml_source;

/// One parser of bytes that come from outside.
pub struct Target {
    /// As named on the command line.
    pub name: &'static str,
    /// Valid and nearly valid inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the language.
    pub dictionary: &'static [&'static [u8]],
    /// Must neither panic nor hang, and asserts what else must hold.
    pub run: fn(&[u8]),
}

const TARGETS: &[Target] = &[
    connect_head::TARGET,
    csr::TARGET,
    frames::TARGET,
    http_framing::TARGET,
    records::TARGET,
    spiffe_san::TARGET,
    xds_resource::TARGET,
    yaml_source::TARGET,
];

/// One input may take this long: a parser that needs more can be used to stall a proxy.
const HANG: Duration = Duration::from_secs(10);

struct Options {
    seconds: u64,
    seed: u64,
    only: Vec<String>,
    /// Set in the process that runs one target.
    child: bool,
    replay: Option<PathBuf>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { seconds: 5, seed: 1, only: Vec::new(), child: false, replay: None };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--seconds" => options.seconds = value()?.parse().map_err(|e| format!("--seconds: {e}"))?,
            "--seed" => options.seed = value()?.parse().map_err(|e| format!("--seed: {e}"))?,
            "--replay" => options.replay = Some(value()?.into()),
            "--child" => options.child = true,
            name if TARGETS.iter().any(|target| target.name == name) => options.only.push(arg),
            _ => {
                let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
                return Err(format!("unknown argument {arg:?}; targets: {}", names.join(" ")));
            }
        }
    }
    Ok(options)
}

fn artifacts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts")
}

fn main() -> ExitCode {
    match options().and_then(|options| start(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(usage) => {
            eprintln!("{usage}\nusage: [--seconds N] [--seed N] [--replay FILE] [TARGET...]");
            ExitCode::from(2)
        }
    }
}

fn start(options: &Options) -> Result<bool, String> {
    let chosen: Vec<_> = TARGETS
        .iter()
        .filter(|target| options.only.is_empty() || options.only.iter().any(|name| name == target.name))
        .collect();
    if let Some(file) = &options.replay {
        let input = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
        chosen.iter().for_each(|target| (target.run)(&input));
        println!("{} bytes replayed on {} targets", input.len(), chosen.len());
        return Ok(true);
    }
    fs::create_dir_all(artifacts()).map_err(|error| error.to_string())?;
    if options.child {
        chosen.iter().for_each(|target| fuzz(target, options));
        return Ok(true);
    }
    let mut sound = true;
    for target in chosen {
        sound &= supervise(target, options).map_err(|error| format!("{}: {error}", target.name))?;
    }
    Ok(sound)
}

/// Where the input of the moment is kept: in memory if possible, because it is written before every run.
fn current(target: &Target) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { memory.to_owned() } else { artifacts() };
    // Named after the supervisor, which the child shares.
    folder.join(format!("undermesh-fuzz-{}-{}", supervisor(), target.name))
}

fn supervisor() -> String {
    env::var(SUPERVISOR).unwrap_or_else(|_| std::process::id().to_string())
}

/// Tells a child the process id of its supervisor.
const SUPERVISOR: &str = "UNDERMESH_FUZZ_SUPERVISOR";

/// Runs the target in a process of its own, so that an abort, a stack overflow or a hang is a finding as well.
fn supervise(target: &Target, options: &Options) -> std::io::Result<bool> {
    let (seconds, seed) = (options.seconds.to_string(), options.seed.to_string());
    let mut child = Command::new(env::current_exe()?)
        .args(["--child", "--seconds", &seconds, "--seed", &seed, target.name])
        .env(SUPERVISOR, supervisor())
        .spawn()?;
    let give_up = Instant::now() + Duration::from_secs(options.seconds) + HANG;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > give_up {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    if status.is_some_and(|status| status.success()) {
        let _ = fs::remove_file(current(target));
        return Ok(true);
    }
    let kind = if status.is_some() { "crash" } else { "hang" };
    let stamp = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis();
    let saved = artifacts().join(format!("{}-{kind}-{stamp}", target.name));
    fs::copy(current(target), &saved)?;
    let _ = fs::remove_file(current(target));
    eprintln!("{}: {kind}; replay with: --replay {} {}", target.name, saved.display(), target.name);
    Ok(false)
}

fn fuzz(target: &Target, options: &Options) {
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "{} has no seeds", target.name);
    let mut chance = mutate::Chance::seeded(options.seed);
    let mut input = Vec::new();
    let mut kept = fs::File::create(current(target)).expect("the artifacts folder was just made");
    let until = Instant::now() + Duration::from_secs(options.seconds);
    let mut runs = 0u64;
    let mut once = |input: &[u8]| {
        // On disk before the run: whatever ends this process, the input is there.
        kept.set_len(0)
            .and_then(|()| kept.rewind())
            .and_then(|()| kept.write_all(input))
            .expect("disk space");
        (target.run)(input);
    };
    for seed in &seeds {
        once(seed);
    }
    while Instant::now() < until {
        mutate::mutate(&mut chance, &seeds, target.dictionary, &mut input);
        once(&input);
        runs += 1;
    }
    println!("{}: {runs} inputs, seed {}, no finding", target.name, options.seed);
}
