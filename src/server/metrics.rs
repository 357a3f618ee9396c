//! The facts that are worth collecting over time, in the text format of Prometheus (version 0.0.4): families of samples, whose
//! names have their units, each family behind its HELP and its TYPE.
//!
//! Each sample says which image it is about, so that pages of several servers can be put together.

use super::backend::Backend;
use super::reactor::Reactor;
use super::{status, timings};
use crate::printable;
use std::fmt::{Display, Write};

/// A page in the making.
struct Page {
    text: String,
    /// The label of every sample.
    image: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.text, "# HELP flexnbd_{name} {help}\n# TYPE flexnbd_{name} {kind}\n");
    }

    /// A sample with more labels, which begin with a comma.
    fn sample(&mut self, name: &str, labels: &str, value: &dyn Display) {
        let _ = writeln!(self.text, "flexnbd_{name}{{{}{labels}}} {value}", self.image);
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", help);
        self.sample(name, "", &value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(name, "", &value);
    }
}

/// Microseconds as seconds.
fn seconds(us: u64) -> String {
    format!("{}.{:06}", us / 1_000_000, us % 1_000_000)
}

/// A label, with its value escaped. No control character is left in it, so that the ends of lines are those of samples.
fn label(name: &str, value: &str) -> String {
    let value = printable::escape(value.chars()).replace('\\', "\\\\").replace('"', "\\\"");
    format!("{name}=\"{value}\"")
}

/// The answer to `status prometheus`.
pub(super) fn page(server: &Reactor) -> String {
    let sh = &server.shared;
    let image = match &sh.backend {
        Backend::Disk(_) => label("file", &status::file(server).unwrap_or_default()),
        Backend::Upstream(standby) => label("upstream", &standby.name),
    };
    let mut page = Page { text: String::new(), image };
    page.family("info", "gauge", "What serves the image; always 1.");
    let version = label("version", env!("CARGO_PKG_VERSION"));
    page.sample("info", &format!(",{version}"), &1);
    page.gauge("start_time_seconds", "When the server began, in seconds since 1970.", server.started_s);
    page.gauge("size_bytes", "The size of the image.", sh.backend.export().size);
    page.gauge("clients", "Clients that are connected.", sh.admission.clients() as u64);
    page.gauge("clients_max", "Clients that may be connected.", sh.admission.clients_max() as u64);
    let rates = sh.gate.quota.rates();
    page.gauge("max_iops", "Requests per second that clients may ask for; 0 is no limit.", rates.requests.unwrap_or(0));
    let bytes = rates.bytes.unwrap_or(0);
    page.gauge("max_bytes_per_second", "Bytes per second that clients may ask for; 0 is no limit.", bytes);
    of_requests(&mut page, server);
    of_migration(&mut page, server);
    if let Some((link, standby)) = status::upstream(server) {
        page.gauge("upstream_connected", "Whether the server behind this one is connected.", link.is_open().into());
        page.counter("upstream_reconnects_total", "How often it has come back.", link.outage().reconnects());
        page.gauge("replay_bytes", "Memory of what would be written again.", standby.core.dirty_bytes() as u64);
    }
    // The last line is ended by whoever prints it.
    page.text.pop();
    page.text
}

fn of_requests(page: &mut Page, server: &Reactor) {
    let admission = &server.shared.admission;
    let by_command = || {
        let commands = admission.timings.by_command();
        commands.map(|(command, times)| (format!(",{}", label("command", command)), times))
    };
    page.family("requests_total", "counter", "Requests that were carried out and are answered.");
    for (command, times) in by_command() {
        page.sample("requests_total", &command, &times.buckets.iter().sum::<u64>());
    }
    let name = "request_duration_seconds";
    page.family(name, "histogram", "From the receipt of such a request until its reply was ready to be sent.");
    for (command, times) in by_command() {
        let mut count = 0;
        for (bucket, more) in times.buckets.iter().enumerate() {
            count += more;
            let bound = timings::bound_us(bucket).map_or_else(|| "+Inf".into(), seconds);
            page.sample(&format!("{name}_bucket"), &format!("{command},le=\"{bound}\""), &count);
        }
        page.sample(&format!("{name}_sum"), &command, &seconds(times.all_us));
        page.sample(&format!("{name}_count"), &command, &count);
    }
    page.family("disk_seconds_total", "counter", "Of that, from when the disk was first asked until it was done.");
    for (command, times) in by_command() {
        page.sample("disk_seconds_total", &command, &seconds(times.disk_us));
    }
    let totals = status::totals(server);
    page.counter("errors_total", "Requests that were answered with an error, refused ones included.", totals.errors);
    page.counter("read_bytes_total", "Bytes of good reads.", totals.read_bytes);
    page.counter("written_bytes_total", "Bytes of good writes, zeroes included.", totals.written_bytes);
    if let Some(disk) = server.shared.backend.disk() {
        page.counter("syncs_total", "Calls of fdatasync and fsync, which clients share.", disk.syncs());
    }
    page.family("longest_turn_seconds", "gauge", "The longest turn of the loop since the start; nobody else had one.");
    page.sample("longest_turn_seconds", "", &seconds(admission.timings.longest_turn_us()));
}

fn of_migration(page: &mut Page, server: &Reactor) {
    let migration = status::migration(server);
    page.gauge("migrating", "Whether a migration away from here is running.", migration.is_some().into());
    if let Some((mirror, plan)) = migration {
        let stalled_s = mirror.stalled_ms(server.shared.now_ms) / 1000;
        page.gauge("migration_left_bytes", "Not confirmed yet by the destination.", plan.progress().left_bytes);
        page.gauge("migration_stalled_seconds", "For how long the destination has owed an answer.", stalled_s);
        page.counter("migration_attempts_total", "Attempts of this migration.", mirror.trials().begun().into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_times_are_seconds() {
        assert_eq!(label("file", "/a \"b\"\\n\n\té"), r#"file="/a \"b\"\\n\\n\\té""#);
        assert_eq!([0, 16, 1_000_000, 16_777_216].map(seconds), ["0.000000", "0.000016", "1.000000", "16.777216"]);
    }
}
