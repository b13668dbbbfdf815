//! Listing sockets, and ending one at once: `inet_diag`, inside the namespace of the sockets.
//!
//! A socket is always named by its cookie as well. Without it the kernel would take the listener when the connection
//! has just ended.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
};

use nix::sched::{CloneFlags, setns};

use super::sys;

const SOCK_DESTROY: u16 = 21;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const TCP_LISTEN: u8 = 10;
/// Every state in which a socket is or may become connected, and listening ones.
const STATES: u32 = (1 << 1) | (1 << 2) | (1 << 3) | (1 << 4) | (1 << 5) | (1 << 8) | (1 << TCP_LISTEN);
/// Bytes of one part of an answer: what the kernel makes at most.
const PART_BYTES: usize = 32 << 10;
const MESSAGE_BYTES: usize = 16 + 56;

const LOCAL_PORTS: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// What the kernel starts a namespace with.
const DEFAULT_LOCAL_PORTS: RangeInclusive<u16> = 32768..=60999;

/// (pure) First and last port, as the kernel writes them.
fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let mut ends = text.split_whitespace().map(str::parse);
    let (Some(Ok(first)), Some(Ok(last)), None) = (ends.next(), ends.next(), ends.next()) else {
        return None;
    };
    Some(first..=last)
}

/// A TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TcpSocket {
    /// Its own end.
    pub local: SocketAddr,
    /// The other end; unspecified when it listens.
    pub remote: SocketAddr,
    /// Its cookie.
    pub cookie: u64,
    /// It waits for connections.
    pub listening: bool,
}

/// A socket by which sockets of one namespace are listed and ended.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    netns: u64,
    ephemeral: RangeInclusive<u16>,
}

impl Diag {
    /// Opens one in `netns`, in a thread of its own so that the caller stays where it is.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn open(netns: &File) -> io::Result<Self> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                Self::here()
            });
            inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }

    /// Opens one in the caller's own namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn here() -> io::Result<Self> {
        // SAFETY: plain socket(2), no pointers.
        let fd = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_SOCK_DIAG)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given this descriptor to us alone.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let netns = sys::netns_cookie(socket.as_fd())?;
        // Of the namespace of the thread that reads.
        let range = fs::read_to_string(LOCAL_PORTS).ok().and_then(|text| ports(&text));
        Ok(Self { socket, netns, ephemeral: range.unwrap_or(DEFAULT_LOCAL_PORTS) })
    }

    /// Ports that the namespace gave to clients which did not ask for one, as it was opened.
    pub fn ephemeral(&self) -> &RangeInclusive<u16> {
        &self.ephemeral
    }

    /// Cookie of the namespace.
    pub fn netns(&self) -> u64 {
        self.netns
    }

    /// Ends the TCP socket with these ends and this cookie. False when there is none any more.
    ///
    /// # Errors
    /// When the kernel cannot do this at all.
    pub fn end(&self, local: SocketAddr, remote: SocketAddr, cookie: u64) -> io::Result<bool> {
        let message = request(SOCK_DESTROY, libc::NLM_F_ACK, local, remote, cookie);
        // SAFETY: the buffer is as long as told.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answer = [0_u8; 256];
        // SAFETY: as above; the kernel answers a request with an acknowledgement before send(2) returns.
        let got = unsafe {
            libc::recv(self.socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), libc::MSG_DONTWAIT)
        };
        if got < 20 {
            return Err(io::Error::last_os_error());
        }
        if u16::from_ne_bytes([answer[4], answer[5]]) != NLMSG_ERROR {
            return Err(io::Error::other("inet_diag sent something else than an acknowledgement"));
        }
        match -i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
            0 => Ok(true),
            libc::ENOENT | libc::ESTALE => Ok(false),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Diag {
    /// Every TCP socket of the namespace that is connected, may become so, or listens.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn sockets(&self) -> io::Result<Vec<TcpSocket>> {
        let mut found = Vec::new();
        for any in [SocketAddr::from(([0; 4], 0)), SocketAddr::from(([0_u16; 8], 0))] {
            let mut message = request(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, any, any, 0);
            message[20..24].copy_from_slice(&STATES.to_ne_bytes());
            // SAFETY: the buffer is as long as told.
            let sent =
                unsafe { libc::send(self.socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
            if sent < 0 {
                return Err(io::Error::last_os_error());
            }
            while self.part(&mut found)? {}
        }
        Ok(found)
    }

    /// One part of a list; false when it was the last one.
    fn part(&self, found: &mut Vec<TcpSocket>) -> io::Result<bool> {
        let mut bytes = vec![0_u8; PART_BYTES];
        // SAFETY: as long as told; the kernel has the next part ready when the last one was taken.
        let got = unsafe {
            libc::recv(self.socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT)
        };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        let mut rest = &bytes[..got.min(bytes.len())];
        while let Some((header, _)) = rest.split_first_chunk::<16>() {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let Some(body) = rest.get(16..length) else { break };
            match u16::from_ne_bytes([header[4], header[5]]) {
                NLMSG_DONE => return Ok(false),
                NLMSG_ERROR => {
                    let errno = body.first_chunk::<4>().map_or(0, |bytes| -i32::from_ne_bytes(*bytes));
                    return Err(io::Error::from_raw_os_error(errno));
                }
                _ => found.extend(socket(body)),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(true)
    }
}

/// `struct inet_diag_msg`:
/// ```text
///  0 family u8 | 1 state u8 | 2 timer u8 | 3 retransmits u8
///  4 source port be16 | 6 destination port be16 | 8 source [u8; 16] | 24 destination [u8; 16]
/// 40 interface u32 | 44 cookie [u32; 2] | …
/// ```
fn socket(bytes: &[u8]) -> Option<TcpSocket> {
    let bytes = bytes.first_chunk::<52>()?;
    let v4 = i32::from(bytes[0]) == libc::AF_INET;
    let end = |ip: usize, port: usize| {
        let octets: [u8; 16] = bytes[ip..ip + 16].try_into().ok()?;
        let ip = match v4 {
            true => IpAddr::from([octets[0], octets[1], octets[2], octets[3]]),
            false => IpAddr::from(octets).to_canonical(),
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes([bytes[port], bytes[port + 1]])))
    };
    let half =
        |at: usize| u64::from(u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
    Some(TcpSocket {
        local: end(8, 4)?,
        remote: end(24, 6)?,
        cookie: half(44) | (half(48) << 32),
        listening: bytes[1] == TCP_LISTEN,
    })
}

/// True when the kernel can end sockets; asked with a socket that cannot exist.
pub fn supported() -> bool {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
    Diag::here().and_then(|diag| diag.end(nowhere, nowhere, 0)).is_ok()
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`:
/// ```text
///  0 length u32 | 4 type u16 | 6 flags u16 | 8 sequence u32 | 12 port u32
/// 16 family u8 | 17 protocol u8 | 18 extensions u8 | 19 pad | 20 states u32
/// 24 source port be16 | 26 destination port be16 | 28 source [u8; 16] | 44 destination [u8; 16]
/// 60 interface u32 | 64 cookie [u32; 2]
/// ```
fn request(kind: u16, flags: i32, local: SocketAddr, remote: SocketAddr, cookie: u64) -> [u8; MESSAGE_BYTES] {
    let mut message = [0; MESSAGE_BYTES];
    let mut put = |at: usize, bytes: &[u8]| message[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(MESSAGE_BYTES as u32).to_ne_bytes());
    put(4, &kind.to_ne_bytes());
    put(6, &((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    put(16, &[family as u8, libc::IPPROTO_TCP as u8]);
    put(20, &u32::MAX.to_ne_bytes());
    put(24, &local.port().to_be_bytes());
    put(26, &remote.port().to_be_bytes());
    for (at, ip) in [(28, local.ip()), (44, remote.ip())] {
        match ip {
            IpAddr::V4(ip) => put(at, &ip.octets()),
            IpAddr::V6(ip) => put(at, &ip.octets()),
        }
    }
    put(64, &(cookie as u32).to_ne_bytes());
    put(68, &((cookie >> 32) as u32).to_ne_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_kernel_s_layout() {
        let local: SocketAddr = "10.0.0.1:4660".parse().unwrap();
        let to = "10.0.0.2:80".parse().unwrap();
        let message = request(SOCK_DESTROY, libc::NLM_F_ACK, local, to, 0x1_0000_0002);
        assert_eq!(message[0..4], 72_u32.to_ne_bytes());
        assert_eq!(message[16..18], [2, 6]);
        assert_eq!(message[24..28], [0x12, 0x34, 0, 80]);
        assert_eq!(message[28..32], [10, 0, 0, 1]);
        assert_eq!(message[44..48], [10, 0, 0, 2]);
        assert_eq!(message[64..72], [2_u32.to_ne_bytes(), 1_u32.to_ne_bytes()].concat());
    }

    #[test]
    fn the_sockets_of_this_process_are_listed_as_they_are() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(at).unwrap();
        let here = client.local_addr().unwrap();
        let all = Diag::here().unwrap().sockets().unwrap();
        let of = |local, remote| all.iter().filter(|s| (s.local, s.remote) == (local, remote)).count();
        assert_eq!((of(here, at), of(at, here)), (1, 1));
        let listening = all.iter().find(|socket| socket.local == at && socket.listening).unwrap();
        assert!(listening.cookie != 0 && listening.remote.port() == 0);
        assert_eq!(socket(&[0; 51]), None);
    }

    #[test]
    fn the_range_of_ports_is_read_as_it_is_written() {
        assert_eq!(ports("32768\t60999\n"), Some(32768..=60999));
        for odd in ["", "1", "1 2 3", "1 x", "1 70000"] {
            assert_eq!(ports(odd), None, "{odd}");
        }
    }
}
