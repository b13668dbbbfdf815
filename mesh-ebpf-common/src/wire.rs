//! Addresses and ports as the kernel has them, byte order in the type.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An address of either family in 16 bytes, in network order; IPv4 in its v4-mapped form, so that there is one path.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ip {
    words: [u32; 4],
}

const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Ip {
    /// From a context's IPv4 field, which holds network order.
    #[inline(always)]
    pub const fn from_v4_be(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// From a context's IPv6 field, which holds network order.
    #[inline(always)]
    pub const fn from_v6_be(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The four words in network order; the last one alone is the IPv4 address where [`Ip::is_v4`].
    #[inline(always)]
    pub const fn words_be(&self) -> [u32; 4] {
        self.words
    }

    /// True for IPv4.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// True for `127.0.0.0/8` and `::1`, and for the unspecified addresses, which connect to the loopback.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let last = u32::from_be(self.words[3]);
        if self.is_v4() {
            return last >> 24 == 127 || last == 0;
        }
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && last <= 1
    }

    /// The address in the form of the standard library, v4-mapped folded.
    pub const fn to_ip(self) -> IpAddr {
        let [a, b, c, d] = self.words;
        if self.is_v4() {
            return IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(d)));
        }
        let high = ((u32::from_be(a) as u128) << 96) | ((u32::from_be(b) as u128) << 64);
        let low = ((u32::from_be(c) as u128) << 32) | u32::from_be(d) as u128;
        IpAddr::V6(Ipv6Addr::from_bits(high | low))
    }
}

impl From<IpAddr> for Ip {
    fn from(ip: IpAddr) -> Self {
        let bits = match ip {
            IpAddr::V4(v4) => return Self::from_v4_be(v4.to_bits().to_be()),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let word = |shift: u32| ((bits >> shift) as u32).to_be();
        Self { words: [word(96), word(64), word(32), word(0)] }
    }
}

/// A port as the wire has it; in and out by name only.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortBe(u16);

impl PortBe {
    /// From host order.
    #[inline(always)]
    pub const fn from_host(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From network order.
    #[inline(always)]
    pub const fn from_be(port: u16) -> Self {
        Self(port)
    }

    /// In host order.
    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be(self.0)
    }

    /// In network order.
    #[inline(always)]
    pub const fn be(self) -> u16 {
        self.0
    }
}

/// An address and a port: where a connection goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// The address.
    pub ip: Ip,
    /// The port.
    pub port: PortBe,
    /// Always zero.
    pub pad: u16,
}

const _: () = assert!(size_of::<Ip>() == 16 && size_of::<PortBe>() == 2 && size_of::<Target>() == 20);

impl Target {
    /// Puts the two together.
    #[inline(always)]
    pub const fn new(ip: Ip, port: PortBe) -> Self {
        Self { ip, port, pad: 0 }
    }

    /// In the form of the standard library.
    pub const fn to_socket(self) -> SocketAddr {
        match self.ip.to_ip() {
            IpAddr::V4(ip) => SocketAddr::V4(core::net::SocketAddrV4::new(ip, self.port.host())),
            IpAddr::V6(ip) => SocketAddr::V6(core::net::SocketAddrV6::new(ip, self.port.host(), 0, 0)),
        }
    }
}

impl From<SocketAddr> for Target {
    fn from(at: SocketAddr) -> Self {
        Self::new(at.ip().into(), PortBe::from_host(at.port()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip_and_mapped_ones_are_v4() {
        for (text, v4) in
            [("10.1.2.3", true), ("fd00::1:2", false), ("::ffff:10.1.2.3", true), ("::2", false)]
        {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(Ip::from(ip).to_ip(), ip.to_canonical(), "{text}");
            assert_eq!(Ip::from(ip).is_v4(), v4, "{text}");
        }
        let octets = |ip: Ip| ip.words_be().map(u32::to_ne_bytes).concat();
        assert_eq!(octets(Ip::from("1.2.3.4".parse::<IpAddr>().unwrap()))[10..], [0xff, 0xff, 1, 2, 3, 4]);
    }

    #[test]
    fn loopback_is_told_in_every_form() {
        for (text, expected) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("::", true),
            ("0.0.0.0", true),
            ("::ffff:127.0.0.1", true),
            ("::ffff:0.0.0.0", true),
            ("128.0.0.1", false),
            ("::2", false),
            ("0.0.0.1", false),
            ("fe80::1", false),
            ("::7f00:1", false),
        ] {
            assert_eq!(Ip::from(text.parse::<IpAddr>().unwrap()).is_loopback(), expected, "{text}");
        }
    }

    #[test]
    fn ports_keep_their_order() {
        assert_eq!(PortBe::from_host(0x1234).be().to_ne_bytes(), [0x12, 0x34]);
        assert_eq!(PortBe::from_be(0x1234_u16.to_be()).host(), 0x1234);
    }
}
