//! The few system calls that the libraries do not offer: replacing the program of a link, reading a map in batches,
//! cookies, and ending a socket by `inet_diag`.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::Pod;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Calls `bpf(2)`.
fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is a `repr(C)` prefix of `union bpf_attr` of that command and its size is told; whatever
    // it points to outlives the call (each caller below).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, mem::size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

/// Opens what is pinned at `path`.
pub fn object(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes { path: name.as_ptr() as u64, fd: 0, flags: 0 };
    let fd = bpf(BPF_OBJ_GET, &mut attributes)?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts another program behind a link, without a moment in between.
pub fn replace(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: i32,
        program: i32,
        flags: u32,
        old_program: i32,
    }
    let (link, program) = (link.as_raw_fd(), program.as_raw_fd());
    bpf(BPF_LINK_UPDATE, &mut Attributes { link, program, flags: 0, old_program: 0 }).map(drop)
}

/// Ends a link now. Closing its last descriptor, or removing its pin, ends it some time later.
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut link.as_raw_fd()).map(drop)
}

/// Elements asked for at a time.
const BATCH: usize = 4096;

/// Every element of a hash map. By batches, because walking key by key starts again whenever the key at hand is
/// removed, which live flows do all the time.
pub fn entries<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    #[repr(C)]
    struct Attributes {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: i32,
        element_flags: u64,
        flags: u64,
    }
    let (mut all, mut at, mut first, mut room) = (Vec::new(), [0_u32; 4], true, BATCH);
    loop {
        let mut keys = Vec::<K>::with_capacity(room);
        let mut values = Vec::<V>::with_capacity(room);
        let mut next = [0_u32; 4];
        let mut attributes = Attributes {
            in_batch: if first { 0 } else { at.as_mut_ptr() as u64 },
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room as u32,
            map: map.as_raw_fd(),
            element_flags: 0,
            flags: 0,
        };
        let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes);
        let ended = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // One bucket holds more than there is room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = (attributes.count as usize).min(room);
        // SAFETY: the kernel has written this many elements of exactly these sizes (asserted where they are
        // declared), and any bit pattern is valid for them.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        all.extend(keys.into_iter().zip(values));
        if ended {
            return Ok(all);
        }
        (at, first) = (next, false);
    }
}

/// Cookie of the network namespace of a socket.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let (mut cookie, mut length) = (0_u64, mem::size_of::<u64>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `length` bytes into `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Nanoseconds of the monotonic clock, which is the programs' too.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`. The clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
