//! Dialling the application of a pod, from the client's own address, without NAT.
//!
//! The socket binds the client's IP with a free port and carries the mark; rule and table of the pod's namespace bring
//! the replies back (`pods/route.rs`). The client's own port cannot be kept: the agent's accepted socket owns that
//! 4-tuple, and a SYN from the same port would reach that socket instead of the application. For the same reason no
//! port may be chosen from which the client has another live connection to the same port of the pod.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    os::fd::AsFd,
};

use mesh_core::{flag::Flag, limits};
use mesh_net::socket;
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

use crate::pods::netns::{Netns, NetnsError};

/// Ports tried first: outside of what operating systems choose from by default, so that a later connection of the
/// client itself will not meet a port in use.
const FIRST: RangeInclusive<u16> = 1024..=32767;
/// Tried when all of those are taken.
const REST: RangeInclusive<u16> = 32768..=65535;

/// Why the application was not reached.
#[derive(Debug, Error)]
pub enum AppError {
    /// The client's address cannot be the source of a connection to this destination.
    #[error("{client} cannot be used as the source towards {to}")]
    Source {
        /// The client.
        client: IpAddr,
        /// The application.
        to: SocketAddr,
        /// Why; absent if no port was free.
        #[source]
        source: Option<io::Error>,
    },
    /// The pod's namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The socket could not be exempted from capture.
    #[error("exempt the socket from capture: {0}")]
    Exempt(String),
    /// No answer in time.
    #[error("{to} did not answer in time")]
    Timeout {
        /// The application.
        to: SocketAddr,
    },
    /// Nothing listens there.
    #[error("{to} refused the connection")]
    Refused {
        /// The application.
        to: SocketAddr,
    },
    /// Anything else.
    #[error("connect to {to}")]
    Io {
        /// The application.
        to: SocketAddr,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

impl AppError {
    /// The stable code.
    pub fn flag(&self) -> Flag {
        match self {
            Self::Source { .. } => Flag::SourceBind,
            Self::Netns(_) => Flag::Internal,
            Self::Exempt(_) => Flag::KernelFault,
            Self::Timeout { .. } => Flag::UpstreamTimeout,
            Self::Refused { .. } => Flag::UpstreamRefused,
            Self::Io { .. } => Flag::UpstreamIo,
        }
    }

    /// Sorts a failed connect.
    pub fn connect(to: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused { to },
            io::ErrorKind::TimedOut => Self::Timeout { to },
            _ => Self::Io { to, source },
        }
    }
}

/// What a dial needs beside its addresses.
pub struct Dialling<'a> {
    /// The pod's namespace.
    pub netns: &'a Netns,
    /// The mark that brings replies back.
    pub mark: u32,
    /// Exempts a socket from capture; before it connects.
    pub exempt: &'a (dyn Fn(&Socket) -> Result<(), String> + Sync),
    /// Whether the client has a live connection from this port of its to the destination.
    pub taken: &'a (dyn Fn(SocketAddr) -> bool + Sync),
    /// Where to start looking for a port.
    pub pick: u64,
}

/// Connects to `to` inside the pod with `client` as the source address. Never with another one.
///
/// # Errors
/// [`AppError`]; its flag goes to the client.
pub async fn dial(cx: &Dialling<'_>, client: IpAddr, to: SocketAddr) -> Result<TcpStream, AppError> {
    let deadline = Instant::now() + limits::CONNECT;
    // A pod's connection to itself: its own address needs no port of ours and no detour.
    if client == to.ip() {
        let socket = cx.netns.run(|| open(to))?.map_err(|source| AppError::Io { to, source })?;
        (cx.exempt)(&socket).map_err(AppError::Exempt)?;
        return connect(socket, to, deadline).await.map_err(|source| AppError::connect(to, source));
    }
    let refused = |source| AppError::Source { client, to, source };
    if client.is_ipv4() != to.is_ipv4() || !may_be_source(client) {
        return Err(refused(None));
    }
    for port in ports(cx.pick) {
        let source = SocketAddr::new(client, port);
        if (cx.taken)(source) {
            continue;
        }
        let socket = match cx.netns.run(|| bound(source, cx.mark))? {
            Ok(socket) => socket,
            Err(error) if is_taken(&error) => continue,
            Err(error) => return Err(refused(Some(error))),
        };
        (cx.exempt)(&socket).map_err(AppError::Exempt)?;
        match connect(socket, to, deadline).await {
            Ok(stream) => return Ok(stream),
            Err(error) if is_taken(&error) => {}
            Err(error) => return Err(AppError::connect(to, error)),
        }
    }
    Err(refused(None))
}

/// Bind: a listener of the pod has the port. Connect: the 4-tuple is in use or in TIME_WAIT.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

fn may_be_source(client: IpAddr) -> bool {
    !(client.is_loopback() || client.is_unspecified() || client.is_multicast())
}

fn open(like: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(like), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn bound(source: SocketAddr, mark: u32) -> io::Result<Socket> {
    let socket = open(source)?;
    // Other connections from the same source port go elsewhere; the 4-tuple as a whole is checked by connect.
    socket.set_reuse_address(true)?;
    socket::set_transparent(&socket.as_fd(), source.is_ipv6())?;
    socket.set_mark(mark)?;
    socket.bind(&source.into())?;
    Ok(socket)
}

/// Connects within what is left of the deadline.
async fn connect(socket: Socket, to: SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
    let left = deadline.saturating_duration_since(Instant::now());
    match timeout_at(deadline, socket::connect(socket, to, left)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Every usable port once: the preferred range from a random start, then the rest from a random start.
fn ports(pick: u64) -> impl Iterator<Item = u16> + Send {
    let round = |range: RangeInclusive<u16>, pick: u64| {
        let (first, count) = (u64::from(*range.start()), range.len() as u64);
        (0..count).map(move |step| {
            let port = first + (pick % count + step) % count;
            // `first + count - 1` is the end of a range of u16.
            u16::try_from(port).unwrap_or(*REST.end())
        })
    };
    round(FIRST, pick).chain(round(REST, pick >> 32))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_port_comes_once_and_the_ephemeral_range_comes_last() {
        for pick in [0, 1, 31_743, 31_744, u64::MAX, 0x1234_5678_9abc_def0] {
            let all: Vec<u16> = ports(pick).collect();
            assert_eq!(all.len(), 65536 - 1024, "{pick}");
            assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len(), "{pick}");
            assert!(all[..FIRST.len()].iter().all(|port| FIRST.contains(port)), "{pick}");
            assert!(all[FIRST.len()..].iter().all(|port| REST.contains(port)), "{pick}");
        }
        assert_eq!(ports(0).next(), Some(1024));
        assert_eq!(ports(31_743).take(2).collect::<Vec<_>>(), [32767, 1024]);
    }

    #[test]
    fn only_addresses_of_clients_are_sources() {
        for (address, expected) in
            [("10.0.0.1", true), ("fd00::1", true), ("127.0.0.1", false), ("::", false), ("ff02::1", false)]
        {
            assert_eq!(may_be_source(address.parse().unwrap()), expected, "{address}");
        }
    }
}
