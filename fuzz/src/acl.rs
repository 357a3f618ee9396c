//! PURE: the oracle of the access control list.

use super::choices::Choices;
use super::CHOICES;
use flexnbd::acl::{parse_ip, Acl, AddressError, Entry};
use std::net::IpAddr;

/// The address as a number, and how many bits it has.
fn bits(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(ip) => (ip.to_bits().into(), u32::BITS),
        IpAddr::V6(ip) => (ip.to_bits(), u128::BITS),
    }
}

/// The bits above the lowest `beyond`; none when that is all of them.
fn above(bits: u128, beyond: u32) -> u128 {
    bits.checked_shr(beyond).unwrap_or(0)
}

/// Lines of an access control list, each also taken for an address; the choices are the address of a client.
///
/// # Panics
/// When an address or an entry changes by being shown and parsed, or when a list lets in whom it should not, or not
/// whom it should.
pub fn acl(data: &[u8]) {
    let (mut choices, text) = Choices::split(data);
    let visitor = IpAddr::from([(); CHOICES].map(|()| u8::try_from(choices.next()).unwrap_or_default())).to_canonical();
    let mut entries = Vec::new();
    let mut expected = false;
    for line in String::from_utf8_lossy(text).lines() {
        match parse_ip(line) {
            Ok(ip) => assert_eq!(parse_ip(&ip.to_string()), Ok(ip)),
            Err(error) => assert_eq!(error, AddressError::Address),
        }
        let Ok(entry) = line.parse::<Entry>() else { continue };
        let shown = entry.to_string();
        assert_eq!(shown.parse(), Ok(entry), "{shown}");
        let (address, prefix) = shown.split_once('/').unwrap_or((&shown, ""));
        let Ok(address) = address.parse::<IpAddr>() else { continue };
        let (network, length) = bits(address);
        let beyond = prefix.parse().map_or(0, |prefix: u32| length - prefix);
        let (visitor_bits, visitor_length) = bits(visitor);
        let matches = visitor_length == length && above(visitor_bits, beyond) == above(network, beyond);
        assert_eq!(Acl::new(vec![entry], true).allows(visitor), matches, "{shown} {visitor}");
        assert!(Acl::new(vec![entry], true).allows(address), "{shown} holds its own address");
        expected |= matches;
        entries.push(entry);
    }
    expected |= entries.is_empty();
    assert_eq!(Acl::new(entries, false).allows(visitor), expected);
}
