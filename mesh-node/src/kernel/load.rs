//! The object, its programs and their links: loaded, attached once, pinned, and replaced in place when the object is
//! another one.

use std::{
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::fd::AsFd as _,
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        CgroupSockAddr, ProgramFd, SkLookup, SockOps,
        links::{CgroupAttachMode, FdLink},
    },
};
use mesh_ebpf_common::map::{EVENTS, LOGS, MAP_NAMES};

use super::{maps::chain, pins::Pins, sys, types::KernelError};

/// The object that `cargo xtask build-ebpf` made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// The same with log lines.
#[cfg(kernel_log)]
static WITH_LOG_LINES: Option<&[u8]> =
    Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf-log.o")));
#[cfg(not(kernel_log))]
static WITH_LOG_LINES: Option<&[u8]> = None;

/// The object to load; the second is true when its programs log.
pub fn object(log: bool) -> (&'static [u8], bool) {
    match WITH_LOG_LINES.filter(|_| log) {
        Some(object) => (object, true),
        None => (OBJECT, false),
    }
}

/// Programs at the cgroup root, in the order of attachment: nothing may mark a socket before its records are written.
pub const CGROUP_PROGRAMS: [&str; 5] =
    ["established", "getpeername4", "getpeername6", "connect4", "connect6"];

/// Tells objects apart.
pub fn object_hash(object: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    for (i, part) in hash.chunks_exact_mut(8).enumerate() {
        let mut hasher = DefaultHasher::new();
        (i, object).hash(&mut hasher);
        part.copy_from_slice(&hasher.finish().to_ne_bytes());
    }
    hash
}

fn fault(what: impl Into<String>) -> impl FnOnce(&dyn std::error::Error) -> KernelError {
    let what = what.into();
    move |error| KernelError::Program { what, why: chain(error) }
}

/// Loads the object over the pinned maps; maps that are not there yet are made. `pod`: constants of one `inbound`.
fn load(pins: &Pins, object: &[u8], pod: (u64, u32)) -> Result<Ebpf, KernelError> {
    let mut loader = EbpfLoader::new();
    for name in MAP_NAMES.into_iter().chain([EVENTS, LOGS]) {
        loader.map_pin_path(name, pins.maps().join(name));
    }
    loader
        .override_global("POD_NETNS", &pod.0, true)
        .override_global("POD_SLOT", &pod.1, true)
        .load(object)
        .map_err(|error| fault("load the BPF object")(&error))
}

/// Makes the maps that are not pinned yet, and nothing else.
pub fn make_maps(pins: &Pins, object: &[u8]) -> Result<(), KernelError> {
    load(pins, object, (0, 0)).map(drop)
}

/// Attaches every program of the cgroup root, or replaces those that a former process left.
pub fn attach_cgroup(pins: &Pins, object: &[u8], cgroup: &Path) -> Result<(), KernelError> {
    let mut object = load(pins, object, (0, 0))?;
    let root = File::open(cgroup).map_err(KernelError::io(format!("open {}", cgroup.display())))?;
    for name in CGROUP_PROGRAMS {
        if name == "established" {
            let program: &mut SockOps = typed(&mut object, name)?;
            program.load().map_err(|error| fault(format!("load {name}"))(&error))?;
            let fd = clone_fd(program.fd(), name)?;
            if replaced(pins, name, &fd)? {
                continue;
            }
            let id = program
                .attach(&root, CgroupAttachMode::Single)
                .map_err(|error| fault(format!("attach {name}"))(&error))?;
            let link = program.take_link(id).map_err(|error| fault(format!("keep {name}"))(&error))?;
            pin(pins, name, link.try_into())?;
        } else {
            let program: &mut CgroupSockAddr = typed(&mut object, name)?;
            program.load().map_err(|error| fault(format!("load {name}"))(&error))?;
            let fd = clone_fd(program.fd(), name)?;
            if replaced(pins, name, &fd)? {
                continue;
            }
            let id = program
                .attach(&root, CgroupAttachMode::Single)
                .map_err(|error| fault(format!("attach {name}"))(&error))?;
            let link = program.take_link(id).map_err(|error| fault(format!("keep {name}"))(&error))?;
            pin(pins, name, link.try_into())?;
        }
    }
    Ok(())
}

/// Name of the link of one pod.
pub fn inbound_link(netns: u64) -> String {
    format!("inbound-{netns}")
}

/// Attaches `inbound` with the constants of one pod in its namespace, or replaces the one that is there.
pub fn attach_inbound(
    pins: &Pins,
    object: &[u8],
    netns: u64,
    slot: u32,
    namespace: Option<&File>,
) -> Result<(), KernelError> {
    let mut object = load(pins, object, (netns, slot))?;
    let program: &mut SkLookup = typed(&mut object, "inbound")?;
    program.load().map_err(|error| fault("load inbound")(&error))?;
    let name = inbound_link(netns);
    let fd = clone_fd(program.fd(), "inbound")?;
    if replaced(pins, &name, &fd)? {
        return Ok(());
    }
    let Some(namespace) = namespace else { return Ok(()) };
    let id = program.attach(namespace).map_err(|error| fault("attach inbound")(&error))?;
    let link = program.take_link(id).map_err(|error| fault("keep inbound")(&error))?;
    pin(pins, &name, Ok::<FdLink, aya::programs::links::LinkError>(link.into()))
}

fn typed<'a, P>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    let missing =
        || KernelError::Program { what: format!("program {name}"), why: "not in the object".into() };
    object
        .program_mut(name)
        .ok_or_else(missing)?
        .try_into()
        .map_err(|error| fault(format!("program {name}"))(&error))
}

fn clone_fd(
    fd: Result<&ProgramFd, aya::programs::ProgramError>,
    name: &str,
) -> Result<ProgramFd, KernelError> {
    let fd = fd.map_err(|error| fault(format!("program {name}"))(&error))?;
    fd.try_clone().map_err(KernelError::io(format!("program {name}")))
}

/// Puts `program` behind the pinned link of this name; false when there is none.
fn replaced(pins: &Pins, name: &str, program: &ProgramFd) -> Result<bool, KernelError> {
    let path = pins.link(name);
    if !path.exists() {
        return Ok(false);
    }
    let link = sys::object(&path).map_err(KernelError::io(format!("open {}", path.display())))?;
    sys::replace(link.as_fd(), program.as_fd()).map_err(KernelError::io(format!("replace {name}")))?;
    Ok(true)
}

fn pin<E: std::error::Error + 'static>(
    pins: &Pins,
    name: &str,
    link: Result<FdLink, E>,
) -> Result<(), KernelError> {
    let link = link.map_err(|error| fault(format!("keep {name}"))(&error))?;
    link.pin(pins.link(name)).map(drop).map_err(|error| fault(format!("pin {name}"))(&error))
}
