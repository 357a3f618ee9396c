//! PURE: who may connect: the entries of the access control list, and the addresses that users write.
//!
//! It looks up no names, so no answer depends on a name server. A client that reaches an IPv6 socket over IPv4 has the
//! address `::ffff:a.b.c.d` there and counts as the IPv4 client that it is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// The prefix length of `::ffff:0:0/96`, which holds the IPv4 addresses within IPv6.
const MAPPED_PREFIX: u8 = 96;

/// What is wrong with an address or an entry that does not parse. Its text goes behind a message that has named the value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressError {
    /// It is not an IP address.
    Address,
    /// What follows the slash is not a number from `least` to `most`.
    Mask {
        /// The shortest mask for this kind of address, in bits.
        least: u8,
        /// The longest, in bits: a single address.
        most: u8,
    },
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address => f.write_str("not an IP address"),
            Self::Mask { least, most } => write!(f, "the mask must be a number from {least} to {most}"),
        }
    }
}

impl std::error::Error for AddressError {}

/// Parses an address to listen on, to connect to or to bind to: IPv4, IPv6, `[IPv6]`, or `0` for all IPv4 addresses.
pub fn parse_ip(text: &str) -> Result<IpAddr, AddressError> {
    if text == "0" {
        return Ok(Ipv4Addr::UNSPECIFIED.into());
    }
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').and_then(|inner| inner.parse::<Ipv6Addr>().ok()).map(IpAddr::from),
        None => text.parse().ok(),
    }
    .ok_or(AddressError::Address)
}

/// One entry of the list: an address (`10.0.0.1`, `2001:db8::1`) or all addresses that share its first bits
/// (`10.0.0.0/8`, `2001:db8::/32`).
///
/// Invariant 1: `network` has no bit set beyond `prefix`, and is no IPv4-mapped address.
/// Invariant 2: `prefix` is 0 to 32 for IPv4, 0 to 128 for IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    network: IpAddr,
    prefix: u8,
}

impl Entry {
    /// True when `address` is the entry's or shares its first bits. `address` is in canonical form.
    fn matches(self, address: IpAddr) -> bool {
        masked(address, self.prefix) == self.network
    }
}

impl FromStr for Entry {
    type Err = AddressError;

    /// Bits beyond the mask are ignored. An IPv4-mapped IPv6 address stands for the IPv4 address in it; a mask shorter than
    /// the mapped part is refused, because no client would match the entry.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (address, mask) = match text.split_once('/') {
            Some((address, mask)) => (address, Some(mask)),
            None => (text, None),
        };
        let written = if address == "0" { Err(AddressError::Address) } else { parse_ip(address) }?;
        let address = written.to_canonical();
        let (outer, most) = match (written, address) {
            (IpAddr::V6(_), IpAddr::V4(_)) => (MAPPED_PREFIX, 128),
            (IpAddr::V6(_), IpAddr::V6(_)) => (0, 128),
            (IpAddr::V4(_), _) => (0, 32),
        };
        let mask = match mask {
            None => most,
            Some(mask) => parse_mask(mask)
                .filter(|&mask| mask >= outer && mask <= most)
                .ok_or(AddressError::Mask { least: outer, most })?,
        };
        let prefix = mask - outer;
        Ok(Self { network: masked(address, prefix), prefix })
    }
}

/// As it is parsed, without a mask that covers the whole address.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.network, self.prefix) {
            (IpAddr::V4(_), 32) | (IpAddr::V6(_), 128) => self.network.fmt(f),
            (network, prefix) => write!(f, "{network}/{prefix}"),
        }
    }
}

/// A number of at most three digits, and nothing else: no sign, no white space.
fn parse_mask(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The address with every bit beyond the first `prefix` cleared.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & !u32::MAX.checked_shr(prefix.into()).unwrap_or(0)).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::MAX.checked_shr(prefix.into()).unwrap_or(0)).into(),
    }
}

/// The access control list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Acl {
    entries: Vec<Entry>,
    default_deny: bool,
}

impl Acl {
    /// A list of `entries`. `default_deny` is what an empty list means: nobody (true) or everybody (false).
    pub fn new(entries: Vec<Entry>, default_deny: bool) -> Self {
        Self { entries, default_deny }
    }

    /// Replaces the entries. What an empty list means stays as it is.
    pub fn replace(&mut self, entries: Vec<Entry>) {
        self.entries = entries;
    }

    /// The entries.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What an empty list means: nobody (true) or everybody (false).
    pub fn default_deny(&self) -> bool {
        self.default_deny
    }

    /// True when a client with this address may connect.
    pub fn allows(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if self.entries.is_empty() {
            !self.default_deny
        } else {
            self.entries.iter().any(|entry| entry.matches(address))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn acl(entries: &[&str]) -> Acl {
        Acl::new(entries.iter().map(|entry| entry.parse().unwrap()).collect(), true)
    }

    #[test]
    fn addresses_parse_as_users_write_them() {
        assert_eq!(parse_ip("0"), Ok(ip("0.0.0.0")));
        assert_eq!(parse_ip("127.0.0.1"), Ok(ip("127.0.0.1")));
        assert_eq!(parse_ip("::"), Ok(ip("::")));
        assert_eq!(parse_ip("[2001:db8::1]"), Ok(ip("2001:db8::1")));
        let bad = ["", "00", "1", "1.2.3", "1.2.3.4.5", "256.0.0.1", "[1.2.3.4]", "[::", "::]", "[]", "[[::]]"];
        for bad in bad.into_iter().chain(["localhost", " ::", "::%1", "-1", "1.2.3.4/8", "01.2.3.4", "[::]:1"]) {
            assert_eq!(parse_ip(bad), Err(AddressError::Address), "{bad:?}");
        }
    }

    #[test]
    fn entries_display_as_what_they_match() {
        for (text, shown) in [
            ("10.1.2.3", "10.1.2.3"),
            ("10.1.2.3/32", "10.1.2.3"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("255.255.255.255/1", "128.0.0.0/1"),
            ("10.1.2.3/0", "0.0.0.0/0"),
            ("ffff::/0", "::/0"),
            ("::ffff:10.0.0.1/96", "0.0.0.0/0"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]/32", "2001:db8::/32"),
            ("2001:db8::1", "2001:db8::1"),
            ("2001:db8::1/128", "2001:db8::1"),
            ("2001:db8:ffff::1/32", "2001:db8::/32"),
            ("ffff::/1", "8000::/1"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
            ("::ffff:10.0.0.1/128", "10.0.0.1"),
            ("::ffff:10.0.0.1/104", "10.0.0.0/8"),
            ("::ffff:200.0.0.1/97", "128.0.0.0/1"),
        ] {
            let entry: Entry = text.parse().unwrap();
            assert_eq!(entry.to_string(), shown);
            assert_eq!(shown.parse(), Ok(entry));
        }
    }

    #[test]
    fn bad_entries_are_told_what_is_wrong() {
        for bad in
            ["", "/", "/8", "x", "10.0.0/8", "0", "[::1", "[10.0.0.1]", "localhost", "10.0.0.1 ", "\u{661}0.0.0.1"]
        {
            assert_eq!(bad.parse::<Entry>(), Err(AddressError::Address), "{bad:?}");
        }
        for (bad, least, most) in [
            ("10.0.0.0/", 0, 32),
            ("10.0.0.0/33", 0, 32),
            ("10.0.0.0/+8", 0, 32),
            ("10.0.0.0/-8", 0, 32),
            ("10.0.0.0/8/8", 0, 32),
            ("10.0.0.0/255.0.0.0", 0, 32),
            ("10.0.0.0/99999999999999999999", 0, 32),
            ("::/129", 0, 128),
            ("::/257", 0, 128),
            ("::ffff:10.0.0.1/32", 96, 128),
            ("::ffff:10.0.0.1/129", 96, 128),
        ] {
            assert_eq!(bad.parse::<Entry>(), Err(AddressError::Mask { least, most }), "{bad:?}");
        }
        let error = "1.2.3.4/64".parse::<Entry>().unwrap_err();
        assert_eq!(error.to_string(), "the mask must be a number from 0 to 32");
    }

    #[test]
    fn every_mask_matches_its_bits_and_no_others() {
        let base = ip("170.85.170.85");
        for prefix in 0..=32_u8 {
            let list = acl(&[&format!("{base}/{prefix}")]);
            for bit in 0..32_u8 {
                let IpAddr::V4(v4) = base else { unreachable!() };
                let flipped = Ipv4Addr::from_bits(v4.to_bits() ^ (1 << (31 - bit)));
                assert_eq!(list.allows(flipped.into()), bit >= prefix, "{flipped} in /{prefix}");
                assert_eq!(list.allows(flipped.to_ipv6_mapped().into()), bit >= prefix);
            }
        }
        let base: Ipv6Addr = "2001:db8:aaaa:5555:f0f0:0f0f:1234:8765".parse().unwrap();
        for prefix in 0..=128_u8 {
            let list = acl(&[&format!("{base}/{prefix}")]);
            for bit in 0..128_u8 {
                let flipped = Ipv6Addr::from_bits(base.to_bits() ^ (1 << (127 - bit)));
                assert_eq!(list.allows(flipped.into()), bit >= prefix, "{flipped} in /{prefix}");
            }
        }
    }

    #[test]
    fn families_are_apart_and_mapped_clients_are_ipv4() {
        let list = acl(&["127.0.0.1", "2001:db8::/32"]);
        assert!(list.allows(ip("::ffff:127.0.0.1")));
        assert!(list.allows(ip("2001:db8::5")));
        assert!(!list.allows(ip("::127.0.0.1")));
        assert!(!list.allows(ip("::1")));
        assert!(!acl(&["::/1"]).allows(ip("10.0.0.1")));
        assert!(!acl(&["0.0.0.0/1"]).allows(ip("::1")));
    }

    #[test]
    fn an_empty_list_means_what_the_default_says() {
        let anyone = ip("192.0.2.1");
        assert!(Acl::new(Vec::new(), false).allows(anyone));
        let mut list = Acl::new(Vec::new(), true);
        assert!(!list.allows(anyone));
        list.replace(vec!["192.0.2.0/24".parse().unwrap()]);
        assert!(list.allows(anyone));
        list.replace(Vec::new());
        assert!(!list.allows(anyone));
    }
}
