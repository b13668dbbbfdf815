//! The wire between the nodes, captured by tcpdump and asserted instead of looked at.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    mesh::{Node, Pod},
    tls::{self, Hello},
};
use crate::shell;

/// So much of each direction of a connection is kept: hellos are shorter.
const HEAD_BYTES: usize = 8 * 1024;

/// A running capture.
pub struct Capture {
    tcpdump: Child,
    /// Held, or tcpdump's last words would end it early.
    _said: BufReader<ChildStderr>,
    file: tempfile::NamedTempFile,
    /// As one would type it.
    pub shown: String,
}

impl Capture {
    /// Captures what leaves `node` towards `peer`.
    ///
    /// # Errors
    /// When tcpdump does not start.
    pub fn start(node: &Node, peer: &Pod) -> anyhow::Result<Self> {
        let address = peer.ips.first().context("the peer has no address")?.to_string();
        let interface = interface(&node.netns, &address)?;
        let file = tempfile::NamedTempFile::new()?;
        let mut command = within(&node.netns, "tcpdump");
        command.args(["-i", &interface, "-s", "0", "-U", "--immediate-mode", "-w", "-"]);
        let shown = shell::shown(&command);
        command.stdin(Stdio::null()).stdout(file.reopen()?).stderr(Stdio::piped());
        let mut tcpdump = command.spawn().context("start tcpdump")?;
        let mut said = BufReader::new(tcpdump.stderr.take().context("tcpdump's standard error")?);
        let mut words = String::new();
        while !words.contains("listening on") {
            if said.read_line(&mut words)? == 0 {
                tcpdump.wait()?;
                bail!("tcpdump did not start: {words}");
            }
        }
        Ok(Self { tcpdump, _said: said, file, shown })
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn finish(mut self) -> anyhow::Result<Wire> {
        // Immediate mode hands packets over as they come; this is for the last ones to be written.
        std::thread::sleep(Duration::from_millis(300));
        kill(Pid::from_raw(i32::try_from(self.tcpdump.id())?), Signal::SIGINT)?;
        self.tcpdump.wait()?;
        Wire::read(&fs::read(self.file.path())?)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
    }
}

fn within(netns: &Path, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg(program);
    command
}

/// The interface that leads to an address.
fn interface(netns: &Path, address: &str) -> anyhow::Result<String> {
    let text = shell::output(within(netns, "ip").args(["-j", "route", "get", address]))?;
    let routes: serde_json::Value = serde_json::from_str(&text).context("ip -j route get")?;
    let name = routes[0]["dev"].as_str().with_context(|| format!("no route to {address}: {text}"))?;
    Ok(name.to_owned())
}

/// What a capture holds.
#[derive(Debug, Default)]
pub struct Wire {
    /// Number of packets.
    pub packets: usize,
    /// Number of TCP segments with payload, by the lower port of each: the server's.
    pub by_port: BTreeMap<u16, usize>,
    frames: Vec<Vec<u8>>,
    heads: BTreeMap<Flow, Vec<u8>>,
}

/// Addresses, then ports, source first.
type Flow = (Vec<u8>, u16, u16);

/// Hellos on a port.
#[derive(Debug, Default)]
pub struct Hellos {
    /// Client hellos that offer TLS 1.3 and nothing else.
    pub clients: usize,
    /// Server hellos that choose it.
    pub servers: usize,
    /// Everything else that a stream on the port begins with.
    pub others: usize,
}

impl Wire {
    fn read(pcap: &[u8]) -> anyhow::Result<Self> {
        const ETHERNET: u32 = 1;
        ensure!(word(pcap, 0) == Some(0xa1b2_c3d4), "no pcap file of this machine's byte order");
        ensure!(word(pcap, 20) == Some(ETHERNET), "the capture is not of Ethernet");
        let mut wire = Self::default();
        let mut rest = &pcap[24..];
        while let Some(length) = word(rest, 8).and_then(|length| usize::try_from(length).ok()) {
            let Some(frame) = rest.get(16..16 + length) else { break };
            wire.frame(frame);
            rest = &rest[16 + length..];
        }
        Ok(wire)
    }

    fn frame(&mut self, frame: &[u8]) {
        self.packets += 1;
        self.frames.push(frame.to_vec());
        let Some((flow, payload, syn)) = segment(frame) else { return };
        if syn {
            self.heads.insert(flow, Vec::new());
        } else if !payload.is_empty() {
            *self.by_port.entry(flow.1.min(flow.2)).or_default() += 1;
            // A connection that is older than the capture has no head to look at.
            if let Some(head) = self.heads.get_mut(&flow).filter(|head| head.len() < HEAD_BYTES) {
                head.extend(payload);
            }
        }
    }

    /// Number of packets that hold these bytes.
    pub fn holding(&self, needle: &str) -> usize {
        let needle = needle.as_bytes();
        self.frames.iter().filter(|frame| frame.windows(needle.len()).any(|window| window == needle)).count()
    }

    /// The hellos of connections to a port.
    pub fn hellos(&self, port: u16) -> Hellos {
        let mut hellos = Hellos::default();
        let heads = self
            .heads
            .iter()
            .filter(|((_, from, to), head)| (*from == port || *to == port) && !head.is_empty());
        for (_, head) in heads {
            match tls::hello(head) {
                Some(Hello::Client(versions)) if versions == [tls::TLS13] => hellos.clients += 1,
                Some(Hello::Server(tls::TLS13)) => hellos.servers += 1,
                _ => hellos.others += 1,
            }
        }
        hellos
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// (pure) Ethernet, IPv4 or IPv6 without extension headers, TCP: flow, payload, and whether it is a SYN.
fn segment(frame: &[u8]) -> Option<(Flow, &[u8], bool)> {
    let packet = frame.get(14..)?;
    let (addresses, tcp) = match frame.get(12..14)? {
        [0x08, 0x00] if packet.get(9) == Some(&6) => {
            let total = usize::from(number(packet, 2)?);
            (packet.get(12..20)?, packet.get(usize::from(packet.first()? & 0x0f) * 4..total)?)
        }
        [0x86, 0xdd] if packet.get(6) == Some(&6) => {
            let total = 40 + usize::from(number(packet, 4)?);
            (packet.get(8..40)?, packet.get(40..total)?)
        }
        _ => return None,
    };
    let flow = (addresses.to_vec(), number(tcp, 0)?, number(tcp, 2)?);
    let syn = tcp.get(13)? & 0x02 != 0;
    Some((flow, tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?, syn))
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame from port 4000 to `port`.
    fn frame(port: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(40 + payload.len()).expect("short").to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(4000_u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut file = 0xa1b2_c3d4_u32.to_le_bytes().to_vec();
        file.extend([0; 16]);
        file.extend(1_u32.to_le_bytes());
        for frame in frames {
            let length = u32::try_from(frame.len()).expect("short").to_le_bytes();
            file.extend([0; 8]);
            file.extend(length);
            file.extend(length);
            file.extend(frame);
        }
        file
    }

    #[test]
    fn plaintext_on_the_tunnel_port_is_seen() {
        let frames = [frame(15008, 0x02, b""), frame(15008, 0x18, b"GET /secret HTTP/1.1")];
        let wire = Wire::read(&pcap(&frames)).expect("a capture");
        assert_eq!((wire.packets, wire.holding("/secret"), wire.holding("absent")), (2, 1, 0));
        assert_eq!(wire.by_port.get(&4000), Some(&1));
        let hellos = wire.hellos(15008);
        assert_eq!((hellos.clients, hellos.servers, hellos.others), (0, 0, 1));
        assert!(Wire::read(b"no pcap").is_err());
    }
}
