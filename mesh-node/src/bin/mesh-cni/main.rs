//! The CNI plugin of Undermesh, last in the chain: a sandbox that the agent has to capture starts only once it is
//! captured. It changes nothing itself; the result of the plugins before it goes on as it is.
//!
//! Small on purpose: it runs on the host for every pod that starts or stops, from a static binary.

mod ask;
mod decide;
mod spec;

use std::{
    io::{Read as _, Write as _},
    process::ExitCode,
    time::Duration,
};

use mesh_core::flag::Flag;
use mesh_node::cni::wire::{SANDBOXES, Sandbox, Valid};

use ask::{Patience, ask};
use decide::{Verdict, decide};
use spec::{Call, CniError, Code, Command, NetConf, PodName, SUPPORTED};

/// Largest configuration that is read, bytes.
const STDIN_BYTES: u64 = 4 << 20;
/// The sandbox goes anyway; this only spares the agent the wait until it notices by itself.
const GOODBYE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let mut input = Vec::new();
    let read = std::io::stdin().take(STDIN_BYTES).read_to_end(&mut input);
    let outcome = read
        .map_err(|error| CniError::new(Code::Io, format!("read the configuration: {error}")))
        .and_then(|_| run(&|name| std::env::var(name).ok(), &input));
    let (text, code) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (error.json(&spec::version_of(&input)), ExitCode::FAILURE),
    };
    // Whoever called has gone if this fails; the status still tells.
    let _ = std::io::stdout().write_all(text.as_bytes());
    code
}

/// Serves one call; the answer goes to the standard output.
fn run(env: &dyn Fn(&str) -> Option<String>, input: &[u8]) -> Result<String, CniError> {
    let command = Command::read(env)?;
    match command {
        Command::Version => Ok(spec::versions(&spec::version_of(input))),
        Command::Add => add(&Call::read(env)?, &NetConf::read(input)?),
        Command::Check => check(&Call::read(env)?, &NetConf::read(input)?),
        Command::Del => {
            // A sandbox that cannot be removed blocks its pod for ever: whatever is wrong here, the agent notices the
            // end of a namespace by itself.
            if let (Ok(call), Ok(conf)) = (Call::read(env), NetConf::read(input)) {
                let path = format!("{SANDBOXES}/{}", call.container);
                let _ = ask(&conf.agent_socket, "DELETE", &path, b"", Patience::once(GOODBYE));
            }
            Ok(String::new())
        }
        Command::Gc => {
            let conf = NetConf::read(input)?;
            let valid = Valid { containers: conf.valid.clone() };
            let body = serde_json::to_vec(&valid)
                .map_err(|error| CniError::new(Code::Io, format!("write the request: {error}")))?;
            let _ = ask(&conf.agent_socket, "POST", SANDBOXES, &body, Patience::once(GOODBYE));
            Ok(String::new())
        }
        // A runtime makes the whole node not ready when this fails, which takes its pods out of their services. While
        // the agent is away they are served as before; only new ones do not start, and each says why.
        Command::Status => NetConf::read(input).map(|_| String::new()),
    }
}

fn add(call: &Call, conf: &NetConf) -> Result<String, CniError> {
    if !SUPPORTED.contains(&conf.version.as_str()) {
        let text = format!("version {:?} is not supported, only {}", conf.version, SUPPORTED.join(", "));
        return Err(CniError::new(Code::Version, text));
    }
    let result = conf.prev_result.as_ref().ok_or_else(|| {
        CniError::new(
            Code::Config,
            "undermesh-cni must stand in a chain, after a plugin that gives addresses",
        )
    })?;
    // Containers that are no pods use the same configuration: they are not the mesh's.
    let Some(pod) = &call.pod else { return Ok(result.text.clone()) };
    let exempt = conf.exempt.contains(&pod.namespace);
    let patience = if exempt { Patience::brief(conf.timeout) } else { Patience::full(conf.timeout) };
    match about(call, conf, pod, ("PUT", patience))? {
        Verdict::Start => Ok(result.text.clone()),
        Verdict::Refuse(code, why) => {
            let text = format!("pod {}/{} does not start: {why}", pod.namespace, pod.name);
            Err(CniError::new(code, text))
        }
    }
}

/// What the agent says of the sandbox of a call.
fn about(
    call: &Call,
    conf: &NetConf,
    pod: &PodName,
    (method, patience): (&str, Patience),
) -> Result<Verdict, CniError> {
    let sandbox = Sandbox {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        netns: call.netns.clone().ok_or_else(|| CniError::new(Code::Environment, "CNI_NETNS is missing"))?,
        ips: conf.prev_result.as_ref().map(|result| result.addresses.clone()).unwrap_or_default(),
        exempt: conf.exempt.contains(&pod.namespace),
    };
    let body = serde_json::to_vec(&sandbox)
        .map_err(|error| CniError::new(Code::Io, format!("write the request: {error}")))?;
    let path = format!("{SANDBOXES}/{}", call.container);
    let asked = ask(&conf.agent_socket, method, &path, &body, patience);
    Ok(decide(&asked, conf, &pod.namespace))
}

fn check(call: &Call, conf: &NetConf) -> Result<String, CniError> {
    let Some(pod) = &call.pod else { return Ok(String::new()) };
    match about(call, conf, pod, ("POST", Patience::brief(conf.timeout)))? {
        Verdict::Start => Ok(String::new()),
        Verdict::Refuse(code, why) => {
            Err(CniError::new(code, format!("pod {}/{}: {why}", pod.namespace, pod.name)))
        }
    }
}

/// The code at the end of a message, by which people look it up.
fn coded(why: &str, flag: Flag) -> String {
    format!("{why} [{}]", flag.code())
}
