//! What `mirror --wait` shows of a migration: a status line in, text for a person out.
//!
//! It reads no clock and touches nothing but the writer.

use std::fmt;
use std::io::Write;

/// How often a line is written where it cannot be redrawn, in milliseconds.
const LINE_EVERY_MS: u64 = 5_000;
/// The units of an amount, each 1024 times the one before.
const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgressForm {
    /// Not at all.
    Silent,
    /// A new line now and then, and at every change of phase.
    Lines,
    /// One line that is drawn over and over.
    Redrawn,
}

/// What a status says about the running migration. Anything may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Report<'a> {
    phase: Option<&'a str>,
    pass: Option<u64>,
    attempts: Option<u64>,
    last_error: Option<&'a str>,
    size: Option<u64>,
    bytes_left: Option<u64>,
    bytes_per_s: Option<u64>,
    seconds_left: Option<u64>,
    write_limit_bytes_per_s: Option<u64>,
}

impl<'a> Report<'a> {
    /// Parses the key=value pairs of a status; `None` if no migration is running. Pairs that are of no use here or make no
    /// sense are ignored.
    pub(super) fn parse(status: &'a str) -> Option<Self> {
        let mut running = false;
        let mut report = Self::default();
        for (key, value) in status.split_ascii_whitespace().filter_map(|pair| pair.split_once('=')) {
            match key {
                "is_mirroring" => running = value == "true",
                "migration_phase" => report.phase = Some(value),
                "migration_pass" => report.pass = value.parse().ok(),
                "migration_attempts" => report.attempts = value.parse().ok(),
                "migration_last_error" => report.last_error = Some(value),
                "size" => report.size = value.parse().ok(),
                "migration_bytes_left" => report.bytes_left = value.parse().ok(),
                "migration_speed" => report.bytes_per_s = value.parse().ok(),
                "migration_seconds_left" => report.seconds_left = value.parse().ok(),
                "migration_write_limit" => report.write_limit_bytes_per_s = value.parse().ok(),
                _ => {}
            }
        }
        running.then_some(report)
    }

    /// The phase. Connecting again counts as retrying: with a destination that is gone, the two alternate for ever.
    fn phase(&self) -> &'a str {
        match self.phase {
            Some("connecting") if self.last_error.is_some() => "retrying",
            Some(phase) => phase,
            None => "migrating",
        }
    }

    /// How much of the image is at the destination, in per cent, rounded down.
    fn percent(&self) -> Option<u128> {
        let size = u128::from(self.size?);
        (size - size.min(self.bytes_left?.into())).checked_mul(100)?.checked_div(size)
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.phase())?;
        if let Some(pass) = self.pass.filter(|&pass| pass > 1) {
            write!(f, ", pass {pass}")?;
        }
        if let Some(attempt) = self.attempts.filter(|&attempts| attempts > 1) {
            write!(f, ", attempt {attempt}")?;
        }
        let facts = match (self.phase(), self.last_error) {
            ("retrying", Some(error)) => error.replace('_', " "),
            _ => [
                self.percent().map(|percent| format!("{percent}%")),
                self.bytes_left.map(|bytes| format!("{} left", amount(bytes))),
                self.bytes_per_s.map(|bytes| format!("{}/s", amount(bytes))),
                // Without a speed, nobody can tell.
                self.seconds_left
                    .filter(|_| self.bytes_per_s != Some(0))
                    .map(|seconds| format!("{} to go", duration(seconds))),
                self.write_limit_bytes_per_s.map(|bytes| format!("writes limited to {}/s", amount(bytes))),
            ]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(", "),
        };
        if facts.is_empty() {
            return Ok(());
        }
        write!(f, ": {facts}")
    }
}

/// An amount in the unit that a person would choose, with one decimal place.
fn amount(bytes: u64) -> String {
    let mut unit = 1;
    let mut name = "B";
    for next in UNITS {
        if bytes / unit < 1024 {
            break;
        }
        unit *= 1024;
        name = next;
    }
    match unit {
        1 => format!("{bytes} B"),
        _ => format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit),
    }
}

fn duration(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// Shows reports. Errors of the writer are ignored: progress is no part of the outcome.
#[derive(Debug)]
pub(super) struct ProgressLine<W> {
    form: ProgressForm,
    out: W,
    /// The phase of the last new line, and when it was written.
    told: Option<(String, u64)>,
    /// A line stands there that is to be drawn over.
    drawn: bool,
}

impl<W: Write> ProgressLine<W> {
    /// Shows nothing yet.
    pub(super) fn new(form: ProgressForm, out: W) -> Self {
        Self { form, out, told: None, drawn: false }
    }

    /// Shows how far the migration is, if a line is due. A line that is drawn over has at most so many columns, because one
    /// that wraps could not be.
    pub(super) fn show(&mut self, report: &Report, now_ms: u64, columns: usize) {
        match self.form {
            ProgressForm::Silent => {}
            ProgressForm::Redrawn => {
                self.write(&format!("\r{:.columns$}\x1b[K", report.to_string()));
                self.drawn = true;
            }
            ProgressForm::Lines => {
                let told = self.told.as_ref().filter(|(phase, _)| phase == report.phase());
                if told.is_none_or(|&(_, at_ms)| now_ms.saturating_sub(at_ms) >= LINE_EVERY_MS) {
                    self.write(&format!("{report}\n"));
                    self.told = Some((report.phase().into(), now_ms));
                }
            }
        }
    }

    /// Wipes a line that was drawn.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            self.write("\r\x1b[K");
        }
    }

    /// Writes in one piece, so that the line does not flicker.
    pub(super) fn write(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: usize = 79;

    const COPYING: &str = "pid=1 is_mirroring=true has_control=true size=1048576 clients_allowed=true num_clients=0 \
                           migration_speed=124780544 migration_duration=3 migration_seconds_left=75 \
                           migration_bytes_left=600000 migration_phase=copying migration_pass=1 migration_attempts=1";
    const RETRYING: &str = "is_mirroring=true size=1024 migration_bytes_left=1024 migration_phase=retrying \
                            migration_attempts=3 migration_last_error=10.0.0.2:4779:_connection_refused";

    fn text(status: &str) -> String {
        Report::parse(status).unwrap().to_string()
    }

    fn shown(form: ProgressForm, reports: &[(&str, u64)]) -> String {
        let mut out = Vec::new();
        let mut progress = ProgressLine::new(form, &mut out);
        for &(status, now_ms) in reports {
            progress.show(&Report::parse(status).unwrap(), now_ms, COLUMNS);
        }
        progress.clear();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_report_reads_well() {
        assert_eq!(text(COPYING), "copying: 42%, 585.9 KiB left, 119.0 MiB/s, 1 min 15 s to go");
        let converging = COPYING.replace("copying", "converging").replace("pass=1", "pass=4");
        assert!(text(&converging).starts_with("converging, pass 4: 42%"), "{converging}");
        let slow = COPYING.replace("speed=124780544", "speed=0 migration_write_limit=131072");
        assert_eq!(text(&slow), "copying: 42%, 585.9 KiB left, 0 B/s, writes limited to 128.0 KiB/s");
        assert_eq!(text(RETRYING), "retrying, attempt 3: 10.0.0.2:4779: connection refused");
        assert_eq!(text(&RETRYING.replace("retrying", "connecting")), text(RETRYING));
        assert_eq!(text(&RETRYING.replace("retrying", "copying")), "copying, attempt 3: 0%, 1.0 KiB left");
    }

    #[test]
    fn a_report_makes_do_with_what_there_is() {
        assert_eq!(Report::parse("pid=1 is_mirroring=false migration_phase=copying"), None);
        assert_eq!(Report::parse(""), None);
        assert_eq!(text("is_mirroring=true"), "migrating");
        assert_eq!(text("is_mirroring=true size=x migration_speed=-1 migration_phase=connecting junk"), "connecting");
        assert_eq!(text("is_mirroring=true size=0 migration_bytes_left=0"), "migrating: 0 B left");
        assert_eq!(text("is_mirroring=true size=1 migration_bytes_left=2"), "migrating: 0%, 2 B left");
        let huge = format!("is_mirroring=true size={} migration_bytes_left=0", u64::MAX);
        assert_eq!(text(&huge), "migrating: 100%, 0 B left");
    }

    #[test]
    fn amounts_and_times_have_units() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_048_575, "1023.9 KiB"),
            (1_048_576, "1.0 MiB"),
            (5 << 40, "5.0 TiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(amount(bytes), expected);
        }
        for (seconds, expected) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min 0 s"),
            (3599, "59 min 59 s"),
            (3600, "1 h 0 min"),
            (90_061, "25 h 1 min"),
        ] {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn lines_come_every_few_seconds_and_with_every_phase() {
        let paused = COPYING.replace("copying", "paused");
        let (copying, pausing) = (format!("{}\n", text(COPYING)), format!("{}\n", text(&paused)));
        let reports = [(COPYING, 1000), (COPYING, 5999), (COPYING, 6000), (&paused, 6001), (&paused, 6002)];
        assert_eq!(shown(ProgressForm::Lines, &reports), [&*copying, &*copying, &*pausing].concat());
        let connecting = RETRYING.replace("retrying", "connecting");
        assert_eq!(
            shown(ProgressForm::Lines, &[(RETRYING, 0), (&connecting, 1), (RETRYING, 2)]),
            text(RETRYING) + "\n"
        );
    }

    #[test]
    fn a_terminal_has_one_line_that_fits_and_goes() {
        let long = RETRYING.replace("refused", &"é".repeat(100));
        let cut: String = text(&long).chars().take(79).collect();
        let expected = format!("\r{}\x1b[K\r{cut}\x1b[K\r\x1b[K", text(COPYING));
        assert_eq!(shown(ProgressForm::Redrawn, &[(COPYING, 0), (&long, 1)]), expected);
        assert_eq!(shown(ProgressForm::Redrawn, &[]), "");
        assert_eq!(shown(ProgressForm::Silent, &[(COPYING, 0)]), "");
    }
}
