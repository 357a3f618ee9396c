//! PURE: what the mark on an image says: whether it may be served here, and where it is if not.
//!
//! ```text
//!  source:       (none) ── sends ADDR:PORT TIME ──> moved ADDR:PORT TIME ── DISC
//!  destination:  (any)  ── incoming ──> every byte, FLUSH, DISC ──> (none)
//! ```
//!
//! A mark is durable before what it speaks of begins, and cleared after what it speaks of is durable. So a process or a
//! machine that dies between the two marks leaves two images that both refuse, and never two that both serve.

use crate::endpoint::Endpoint;
use std::fmt;

/// The last second of the year 9999, in seconds since 1970: the last that is written with four digits.
const LAST: u64 = 253_402_300_799;

/// What a mark says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// A sender has begun to write this image, and it is not known to be complete.
    Incoming,
    /// A migration of it has begun; it is the image. This is as long as the mark with which the migration ends, so that a
    /// disk that is full says so at the beginning.
    Sends(Where),
    /// The image is somewhere else.
    Moved(Where),
}

/// Where an image goes or has gone, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Where {
    /// The server that takes it.
    pub to: Endpoint,
    /// `2026-11-30T08:15:00Z`.
    pub time: String,
}

impl Where {
    /// So many seconds after the beginning of 1970.
    pub fn at(to: Endpoint, seconds: u64) -> Self {
        Self { to, time: utc(seconds) }
    }

    fn parse(text: &str) -> Option<Self> {
        let (to, time) = text.rsplit_once(' ')?;
        let is_time = time.len() == 20
            && time.bytes().zip(*b"0000-00-00T00:00:00Z").all(|(byte, like)| match like {
                b'0' => byte.is_ascii_digit(),
                _ => byte == like,
            });
        let to = if to.starts_with('/') { Endpoint::Unix(to.into()) } else { Endpoint::Tcp(to.parse().ok()?) };
        is_time.then_some(Self { to, time: time.into() })
    }
}

impl Mark {
    /// Reads a mark. `None`: it is none that this version writes.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        match text.split_once(' ') {
            None if text == "incoming" => Some(Self::Incoming),
            Some(("sends", rest)) => Where::parse(rest).map(Self::Sends),
            Some(("moved", rest)) => Where::parse(rest).map(Self::Moved),
            _ => None,
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Incoming => f.write_str("incoming"),
            Self::Sends(Where { to, time }) => write!(f, "sends {to} {time}"),
            Self::Moved(Where { to, time }) => write!(f, "moved {to} {time}"),
        }
    }
}

/// A moment in UTC, to the second.
fn utc(seconds: u64) -> String {
    let seconds = seconds.min(LAST);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March have the odd day at their end; 400 of them have 146 097 days, and 1970-01-01 is the day
    // 719 468 of the year 0.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let of_era_year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * of_era_year + of_era_year / 4 - of_era_year / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + of_era_year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(text: &str) -> Endpoint {
        Endpoint::Tcp(text.parse().unwrap())
    }

    #[test]
    fn moments_are_those_of_date() {
        // date -u -d @N +%FT%TZ
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (1_796_000_461, "2026-11-30T01:01:01Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (LAST, "9999-12-31T23:59:59Z"),
            (u64::MAX, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let path = Endpoint::Unix("/run/a disk.nbd".into());
        for to in ["10.0.0.2:4779", "[::1]:65535", "[2001:db8::7]:1"].map(to).into_iter().chain([path]) {
            let at = Where::at(to, 1_800_000_000);
            for mark in [Mark::Incoming, Mark::Sends(at.clone()), Mark::Moved(at)] {
                assert_eq!(Mark::parse(mark.to_string().as_bytes()), Some(mark));
            }
        }
    }

    #[test]
    fn the_mark_at_the_beginning_is_as_long_as_the_one_at_the_end() {
        let (first, last) = (Where::at(to("[2001:db8::7]:4779"), 0), Where::at(to("[2001:db8::7]:4779"), u64::MAX));
        assert_eq!(Mark::Sends(first).to_string().len(), Mark::Moved(last).to_string().len());
    }

    #[test]
    fn anything_else_is_unknown() {
        let good = "moved 10.0.0.2:4779 2026-11-30T08:15:00Z";
        assert!(Mark::parse(good.as_bytes()).is_some());
        let cut = (0..good.len()).map(|at| good.get(..at).unwrap().to_owned());
        let longer = ["x", " ", "\n", "\0"].map(|end| format!("{good}{end}"));
        let odd = [
            "Incoming",
            "incoming ",
            "moved",
            "moved  10.0.0.2:4779 2026-11-30T08:15:00Z",
            "moved 10.0.0.2 2026-11-30T08:15:00Z",
            "moved host:4779 2026-11-30T08:15:00Z",
            "moved 10.0.0.2:4779 2026-11-30 08:15:00Z",
            "moved 10.0.0.2:4779 1234567890",
            "gone 10.0.0.2:4779 2026-11-30T08:15:00Z",
        ]
        .map(str::to_owned);
        for text in cut.chain(longer).chain(odd) {
            assert_eq!(Mark::parse(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(Mark::parse(b"moved \xff 2026-11-30T08:15:00Z"), None);
    }
}
