//! Where a server is: a host and a port. A name is resolved again for each connection, since the address behind it
//! changes while we run.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

use crate::tunnel::Connector;

/// Most addresses of one name that are tried.
const ADDRESSES: usize = 8;

/// Host and port of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

/// A text that is no `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not host:port: {reason}")]
pub struct NotAnEndpoint {
    text: String,
    reason: &'static str,
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        Self { host: Host::Ip(addr.ip()), port: addr.port() }
    }
}

impl FromStr for Endpoint {
    type Err = NotAnEndpoint;

    fn from_str(text: &str) -> Result<Self, NotAnEndpoint> {
        let no = |reason| NotAnEndpoint { text: text.to_owned(), reason };
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return if addr.port() == 0 { Err(no("port 0")) } else { Ok(addr.into()) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| no("no port"))?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(|| no("the port is no number"))?;
        match ServerName::try_from(host) {
            Ok(ServerName::DnsName(_)) => Ok(Self { host: Host::Name(host.to_owned()), port }),
            _ => Err(no("the host is neither a name nor an address (IPv6 stands in brackets)")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl Endpoint {
    /// The name that its certificate has when no other is given.
    ///
    /// # Errors
    /// The host is no name that a certificate can have.
    pub fn server_name(&self) -> Result<ServerName<'static>, NotAnEndpoint> {
        match &self.host {
            Host::Ip(ip) => Ok(ServerName::IpAddress((*ip).into())),
            Host::Name(name) => ServerName::try_from(name.clone())
                .map_err(|_| NotAnEndpoint { text: name.clone(), reason: "not a server name" }),
        }
    }

    /// Connects to the first of its addresses that answers, each within `deadline`.
    ///
    /// # Errors
    /// The name is not known, or no address answers: the last failure.
    pub(super) async fn connect(&self, by: &dyn Connector, deadline: Duration) -> io::Result<TcpStream> {
        let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("{self}: the name has no address"));
        for addr in self.addresses(deadline).await? {
            match tokio::time::timeout(deadline, by.connect(addr)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failure = io::Error::new(error.kind(), format!("{addr}: {error}")),
                Err(_) => {
                    failure =
                        io::Error::new(io::ErrorKind::TimedOut, format!("{addr}: TCP connect deadline"));
                }
            }
        }
        Err(failure)
    }

    async fn addresses(&self, deadline: Duration) -> io::Result<Vec<SocketAddr>> {
        let name = match &self.host {
            Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, self.port)]),
            Host::Name(name) => name,
        };
        let looked =
            tokio::time::timeout(deadline, tokio::net::lookup_host((name.as_str(), self.port))).await;
        let told = |kind, why: &dyn fmt::Display| io::Error::new(kind, format!("resolve {name}: {why}"));
        match looked {
            Ok(Ok(found)) => Ok(found.take(ADDRESSES).collect()),
            Ok(Err(error)) => Err(told(error.kind(), &error)),
            Err(_) => Err(told(io::ErrorKind::TimedOut, &"no answer in time")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::DirectConnector;

    #[test]
    fn host_and_port_are_read_and_written() {
        let check = |text: &str, expected: Option<&str>| {
            let got = text.parse::<Endpoint>();
            assert_eq!(got.as_ref().ok().map(ToString::to_string).as_deref(), expected, "{text}: {got:?}");
        };
        for good in ["10.0.0.1:15012", "[fd00::1]:15012", "undermesh-control.undermesh-system.svc:15012"] {
            check(good, Some(good));
        }
        for bad in ["", "control", "control:", "control:0", "10.0.0.1:0", "fd00::1:15012x", ":1", "a b:1"] {
            check(bad, None);
        }
        assert_eq!("a.b:1".parse::<Endpoint>().unwrap().server_name().unwrap().to_str(), "a.b");
    }

    #[tokio::test]
    async fn a_name_is_resolved_when_it_is_dialled() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let soon = Duration::from_secs(5);
        let by_name: Endpoint = format!("localhost:{port}").parse().unwrap();
        by_name.connect(&DirectConnector, soon).await.unwrap();
        let nowhere: Endpoint = "undermesh.invalid:1".parse().unwrap();
        let error = nowhere.connect(&DirectConnector, soon).await.unwrap_err();
        assert!(error.to_string().contains("undermesh.invalid"), "{error}");
    }
}
