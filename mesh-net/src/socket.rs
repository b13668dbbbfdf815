//! Socket options that the standard library does not know: the crate's one unsafe island.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Idle time and probe interval of TCP keep-alive (`wire-protocol.md` H30).
pub const KEEPALIVE: Duration = Duration::from_secs(180);
/// Probes without answer that end a connection (`wire-protocol.md` H30).
pub const KEEPALIVE_PROBES: u32 = 9;
/// Length of a listen queue; the kernel clamps it to `net.core.somaxconn`.
pub const BACKLOG: i32 = 1024;

/// How an outgoing socket differs from an ordinary one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DialOptions {
    /// Local address to bind; the port stays free until connect, so that ports are shared between destinations.
    pub source: Option<IpAddr>,
    /// `IP_TRANSPARENT`: the source need not be an address of this machine. Needs CAP_NET_ADMIN.
    pub transparent: bool,
    /// `SO_MARK`. Needs CAP_NET_ADMIN.
    pub mark: Option<u32>,
}

/// How a listening socket differs from an ordinary one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenOptions {
    /// `IP_TRANSPARENT`: accepts connections to addresses that are not local. Needs CAP_NET_ADMIN.
    pub transparent: bool,
    /// `IP_FREEBIND`: the address need not exist yet.
    pub freebind: bool,
    /// `SO_MARK`, inherited by accepted sockets. Needs CAP_NET_ADMIN.
    pub mark: Option<u32>,
}

/// A TCP socket in the calling thread's network namespace, non-blocking, with `options` set, not connected. The
/// caller may exempt it (by descriptor) before [`connect`].
///
/// # Errors
/// The option or address that the kernel refuses.
pub fn for_dial(to: SocketAddr, options: &DialOptions) -> io::Result<Socket> {
    let socket = stream_socket(to)?;
    if options.transparent {
        set_transparent(&socket, to.is_ipv6())?;
    }
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    if let Some(source) = options.source {
        set_bind_address_no_port(&socket)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(socket)
}

/// Connects `socket` within `deadline`; Nagle off and keep-alive on.
///
/// # Errors
/// `TimedOut` at the deadline, else the kernel's error.
pub async fn connect(socket: Socket, to: SocketAddr, deadline: Duration) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(socket.into());
    let stream = tokio::time::timeout(deadline, socket.connect(to))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "connect deadline"))??;
    tune(&stream)?;
    Ok(stream)
}

/// A listening TCP socket in the calling thread's network namespace. Never `SO_REUSEPORT`: a process of the same user
/// could take a share of the connections.
///
/// # Errors
/// The option or address that the kernel refuses.
pub fn listener(at: SocketAddr, options: &ListenOptions) -> io::Result<std::net::TcpListener> {
    let socket = stream_socket(at)?;
    socket.set_reuse_address(true)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if options.transparent {
        set_transparent(&socket, at.is_ipv6())?;
    }
    if options.freebind {
        set_freebind(&socket, at.is_ipv6())?;
    }
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Makes a listener of [`listener`] usable by the runtime.
///
/// # Errors
/// The runtime cannot register it.
pub fn into_tokio(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

fn stream_socket(for_address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(for_address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// `IP_TRANSPARENT`, or its v6 twin.
///
/// # Errors
/// CAP_NET_ADMIN is missing.
pub fn set_transparent(socket: &impl AsFd, v6: bool) -> io::Result<()> {
    let socket = SockRef::from(socket);
    if v6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

/// `IP_FREEBIND`, or its v6 twin.
///
/// # Errors
/// The kernel refuses.
pub fn set_freebind(socket: &impl AsFd, v6: bool) -> io::Result<()> {
    let socket = SockRef::from(socket);
    if v6 { socket.set_freebind_v6(true) } else { socket.set_freebind_v4(true) }
}

/// `SO_MARK`.
///
/// # Errors
/// CAP_NET_ADMIN is missing.
pub fn set_mark(socket: &impl AsFd, mark: u32) -> io::Result<()> {
    SockRef::from(socket).set_mark(mark)
}

/// What every carried connection gets, either end: Nagle off, keep-alive on.
///
/// # Errors
/// The socket is already dead.
pub fn tune(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// The next close sends RST instead of FIN: for connections that are cut.
///
/// # Errors
/// The socket is already dead.
pub fn reset_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// `SO_COOKIE`: the kernel's unique number of this socket.
///
/// # Errors
/// The kernel refuses.
pub fn socket_cookie(socket: &impl AsFd) -> io::Result<u64> {
    SockRef::from(socket).cookie()
}

/// `SO_NETNS_COOKIE`: the kernel's unique number of the network namespace that this socket lives in (Linux 5.14+).
///
/// # Errors
/// The kernel is too old.
pub fn netns_cookie(socket: &impl AsFd) -> io::Result<u64> {
    /// `asm-generic/socket.h`; the libc crate has it for some targets only.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut length = libc_len::<u64>();
    // SAFETY: `cookie` and `length` live through the call and `length` is the size of `cookie`, which may hold any
    // bit pattern.
    let code = unsafe {
        libc::getsockopt(
            raw(socket.as_fd()),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if code == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// `IP_BIND_ADDRESS_NO_PORT`: bind takes no port, connect does, so that one port serves many destinations. The option
/// is of level IP for v6 sockets too.
///
/// # Errors
/// The kernel refuses.
pub fn set_bind_address_no_port(socket: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `on` lives through the call and its size is given.
    let code = unsafe {
        libc::setsockopt(
            raw(socket.as_fd()),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            libc_len::<libc::c_int>(),
        )
    };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn raw(fd: BorrowedFd<'_>) -> libc::c_int {
    fd.as_raw_fd()
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of the integers above")]
const fn libc_len<T>() -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

/// The address without v4-in-v6 mapping.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The wildcard address of the same family.
pub fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_know_their_namespace_and_themselves() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let listener =
                into_tokio(listener(at.parse().unwrap(), &ListenOptions::default()).unwrap()).unwrap();
            let to = listener.local_addr().unwrap();
            let options = DialOptions { source: Some(to.ip()), ..DialOptions::default() };
            let socket = for_dial(to, &options).unwrap();
            let cookie = netns_cookie(&socket).unwrap();
            assert_ne!(cookie, 0);
            assert_eq!(cookie, netns_cookie(&listener).unwrap());
            assert_ne!(socket_cookie(&socket).unwrap(), socket_cookie(&listener).unwrap());
            let stream = connect(socket, to, Duration::from_secs(5)).await.unwrap();
            assert_eq!(stream.local_addr().unwrap().ip(), to.ip());
            assert!(stream.nodelay().unwrap());
            set_freebind(&stream, to.is_ipv6()).unwrap();
        }
    }

    #[tokio::test]
    async fn a_refused_connect_is_not_a_timeout() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let socket = for_dial(free, &DialOptions::default()).unwrap();
        let error = connect(socket, free, Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
