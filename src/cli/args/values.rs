//! The values of options: what they may be, and what is said of those that may not.

use std::ops::RangeInclusive;

/// The most bytes one query reads or writes; the manual says so.
const SIZE_MAX: u64 = 1 << 30;
/// The largest offset; the manual says so. With it, offset plus size fits a signed 64-bit file offset.
const FROM_MAX: u64 = 1 << 62;
/// More clients than a process may have descriptors: a larger number is a typing error.
const CLIENTS_MAX: u64 = 1_000_000;
/// A year: a longer time limit would limit nothing.
const LIMIT_MAX_S: u64 = 365 * 24 * 60 * 60;
/// The least memory for what a proxy sends again, in bytes: a few of the largest pieces of a WRITE.
const REPLAY_LIMIT_MIN: u64 = 4 << 20;
/// The most, in bytes: more than a server is likely to flush in time.
const REPLAY_LIMIT_MAX: u64 = 16 << 30;
/// The furthest that a proxy reads ahead, in bytes: more than a client reads in the time to the server and back, one small
/// READ after the other.
const READ_AHEAD_MAX: usize = 4 << 20;
/// The longest name of an export, in bytes: that of any string ("Conventions" in the NBD specification).
pub(crate) const EXPORT_MAX: usize = 4096;
/// The longest pause that a server accepts, in milliseconds.
pub(crate) const PAUSE_MAX_MS: u64 = 60_000;

pub(super) fn listen_port(text: &str) -> Result<u16, String> {
    whole(text, 0..=u64::from(u16::MAX))
}

pub(super) fn remote_port(text: &str) -> Result<u16, String> {
    whole(text, 1..=u64::from(u16::MAX))
}

pub(super) fn client_count(text: &str) -> Result<usize, String> {
    whole(text, 1..=CLIENTS_MAX)
}

pub(super) fn offset(text: &str) -> Result<u64, String> {
    bytes(text, 0..=FROM_MAX)
}

/// Seconds as [`seconds_to_ms`] takes them, or 0.
pub(super) fn seconds_or_none(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    seconds_to_ms(text)
}

pub(super) fn replay_limit(text: &str) -> Result<usize, String> {
    bytes(text, REPLAY_LIMIT_MIN..=REPLAY_LIMIT_MAX)
}

pub(super) fn read_ahead(text: &str) -> Result<usize, String> {
    // The predecessor took as much as one query reads.
    bytes(text, 0..=SIZE_MAX).map(|bytes: usize| bytes.min(READ_AHEAD_MAX))
}

pub(super) fn size(text: &str) -> Result<u32, String> {
    bytes(text, 0..=SIZE_MAX)
}

pub(super) fn speed(text: &str) -> Result<u64, String> {
    bytes(text, 0..=u64::MAX)
}

pub(super) fn export(text: &str) -> Result<String, String> {
    if text.len() <= EXPORT_MAX && !text.contains('\0') {
        return Ok(text.into());
    }
    Err(format!("expected at most {EXPORT_MAX} bytes, none of them NUL"))
}

pub(super) fn pause(text: &str) -> Result<u64, String> {
    whole(text, 0..=PAUSE_MAX_MS)
}

/// Parses decimal digits and nothing else: unlike `str::parse`, no `+`.
fn whole<T: TryFrom<u64>>(text: &str, range: RangeInclusive<u64>) -> Result<T, String> {
    within(digits(text), &range, "")
}

/// Parses a number of bytes: as [`whole`], or with K, M, G or T behind it, in either case, for powers of 1024.
fn bytes<T: TryFrom<u64>>(text: &str, range: RangeInclusive<u64>) -> Result<T, String> {
    within(with_unit(text), &range, ", of bytes or with K, M, G or T (of 1024) behind it")
}

fn within<T: TryFrom<u64>>(number: Option<u64>, range: &RangeInclusive<u64>, unit: &str) -> Result<T, String> {
    number
        .filter(|number| range.contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("expected a whole decimal number from {} to {}{unit}", range.start(), range.end()))
}

fn with_unit(text: &str) -> Option<u64> {
    let units = ["Kk", "Mm", "Gg", "Tt"].iter().zip([10, 20, 30, 40]);
    for (letters, shift) in units {
        if let Some(number) = text.strip_suffix(|last| letters.contains(last)) {
            return digits(number)?.checked_mul(1 << shift);
        }
    }
    digits(text)
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Parses seconds with up to three decimal places, above zero, into milliseconds.
pub(crate) fn seconds_to_ms(text: &str) -> Result<u64, String> {
    let parse = || {
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let fraction_ms = digits(&format!("{fraction:0<3}")).filter(|_| (1..=3).contains(&fraction.len()))?;
        digits(seconds)?.checked_mul(1000)?.checked_add(fraction_ms)
    };
    parse().filter(|ms| (1..=LIMIT_MAX_S * 1000).contains(ms)).ok_or_else(|| {
        format!("expected decimal seconds from 0.001 to {LIMIT_MAX_S}, with at most 3 places after the point")
    })
}
