//! The one rule, the one table and the one sysctl in a pod's namespace.
//!
//! A marked packet is delivered locally, whatever its address: that carries captured connections to the agent's
//! listeners, and the application's replies to a client whose address the agent used back to the agent.
//! `tcp_fwmark_accept` makes the accepted socket inherit the mark of the SYN.

use std::{fs, io, net::IpAddr, path::Path};

use mesh_ebpf_common::{CAPTURE_MARK, CAPTURE_TABLE};
use rtnetlink::{
    Handle, RouteMessageBuilder, new_connection,
    packet_route::{
        AddressFamily,
        route::{RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use thiserror::Error;

use super::netns::{Netns, NetnsError};

/// Before the main table and whatever rules the pod's owner wrote, after the kernel's own table.
const PRIORITY: u32 = 1000;
/// Below a `proc` file system.
const FWMARK_ACCEPT: &str = "sys/net/ipv4/tcp_fwmark_accept";

/// The mark that is looked up and the table that it is looked up in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marking {
    /// M.
    pub mark: u32,
    /// T.
    pub table: u32,
}

/// Those that the programs in the kernel know.
pub const MARKING: Marking = Marking { mark: CAPTURE_MARK, table: CAPTURE_TABLE };

/// Why a pod's namespace could not be prepared.
#[derive(Debug, Error)]
pub enum RouteError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No netlink socket.
    #[error("open a netlink socket")]
    Netlink(#[source] io::Error),
    /// The kernel refused a rule or route.
    #[error("{what} for {address}")]
    Refused {
        /// Which one.
        what: &'static str,
        /// Of which address.
        address: IpAddr,
        /// Why.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// The loopback interface is missing.
    #[error("find the loopback interface")]
    Loopback(#[source] io::Error),
    /// The setting cannot be written.
    #[error("write {FWMARK_ACCEPT}")]
    Sysctl(#[source] io::Error),
}

/// Puts rule, route and setting in force for these addresses. Says the same a second time: nothing changes. The setting
/// is written below `proc`, which shows the namespace that its reader is in: in a container its own is read-only, the
/// host's is not.
///
/// # Errors
/// The first step that the kernel refuses; nothing is undone.
pub fn ensure(netns: &Netns, addresses: &[IpAddr], marking: Marking, proc: &Path) -> Result<(), RouteError> {
    inside(netns, |handle, loopback| async move {
        write_setting(proc, "1").map_err(RouteError::Sysctl)?;
        for &address in one_per_family(addresses).iter() {
            let refused = |what, source| RouteError::Refused { what, address, source: Box::new(source) };
            let route = handle.route().add(local_route(address, loopback, marking)).replace().execute();
            route.await.map_err(|source| refused("add the local route", source))?;
            let mut request = handle.rule().add();
            *request.message_mut() = rule(address, marking);
            match request.execute().await {
                Err(source) if !says(&source, libc::EEXIST) => return Err(refused("add the rule", source)),
                _ => {}
            }
        }
        Ok(())
    })
}

/// Takes rule, route and setting away again; what is not there is no error.
///
/// # Errors
/// The first step that the kernel refuses.
pub fn undo(netns: &Netns, addresses: &[IpAddr], marking: Marking, proc: &Path) -> Result<(), RouteError> {
    inside(netns, |handle, loopback| async move {
        for &address in one_per_family(addresses).iter() {
            let refused = |what, source| RouteError::Refused { what, address, source: Box::new(source) };
            let gone = |error: &rtnetlink::Error| says(error, libc::ENOENT) || says(error, libc::ESRCH);
            match handle.rule().del(rule(address, marking)).execute().await {
                Err(source) if !gone(&source) => return Err(refused("remove the rule", source)),
                _ => {}
            }
            match handle.route().del(local_route(address, loopback, marking)).execute().await {
                Err(source) if !gone(&source) => return Err(refused("remove the local route", source)),
                _ => {}
            }
        }
        write_setting(proc, "0").map_err(RouteError::Sysctl)
    })
}

/// A pod has one address of each family that counts here: the preferred source of what is delivered locally.
fn one_per_family(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let first = |v6: bool| addresses.iter().copied().find(|address| address.is_ipv6() == v6);
    [first(false), first(true)].into_iter().flatten().collect()
}

/// Runs netlink work inside the namespace: on a thread of its own, since the socket belongs to the namespace in which
/// it was opened, and a runtime cannot run inside another one.
fn inside<F, Fut>(netns: &Netns, work: F) -> Result<(), RouteError>
where
    F: FnOnce(Handle, u32) -> Fut + Send,
    Fut: Future<Output = Result<(), RouteError>>,
{
    netns.on_thread(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(RouteError::Netlink)?;
        runtime.block_on(async {
            let loopback = nix::net::if_::if_nametoindex("lo")
                .map_err(|error| RouteError::Loopback(io::Error::from(error)))?;
            let (connection, handle, _messages) = new_connection().map_err(RouteError::Netlink)?;
            tokio::select! {
                outcome = work(handle, loopback) => outcome,
                () = connection => Err(RouteError::Netlink(io::ErrorKind::ConnectionAborted.into())),
            }
        })
    })?
}

fn local_route(address: IpAddr, loopback: u32, marking: Marking) -> RouteMessage {
    match address {
        IpAddr::V4(address) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .table_id(marking.table)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .output_interface(loopback)
            .pref_source(address)
            .build(),
        IpAddr::V6(address) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .table_id(marking.table)
            .kind(RouteType::Local)
            .output_interface(loopback)
            .pref_source(address)
            .build(),
    }
}

fn rule(address: IpAddr, marking: Marking) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.action = RuleAction::ToTable;
    message.attributes.push(RuleAttribute::Priority(PRIORITY));
    message.attributes.push(RuleAttribute::FwMark(marking.mark));
    message.attributes.push(RuleAttribute::FwMask(u32::MAX));
    message.attributes.push(RuleAttribute::Table(marking.table));
    message
}

fn says(error: &rtnetlink::Error, code: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -code)
}

fn write_setting(proc: &Path, value: &str) -> io::Result<()> {
    let path = proc.join(FWMARK_ACCEPT);
    if fs::read_to_string(&path)?.trim() == value {
        return Ok(());
    }
    fs::write(path, value)
}
