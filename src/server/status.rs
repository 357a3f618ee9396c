//! The status: what this server says of itself and of its clients, as key=value pairs or as JSON.
//!
//! The facts are listed once, in [`of_server`] and [`of_client`]; both forms show the same list.

use super::backend::{Backend, Standby};
use super::client::Client;
use super::config::Dialect;
use super::life::Life;
use super::mirror::Mirror;
use super::reactor::Reactor;
use super::slot::Slot;
use super::timings::{self, Timings};
use super::upstream::Link;
use crate::command::{Notation, StatusForm};
use crate::disk::Disk;
use crate::migrate::{Plan, Progress};
use crate::printable;
use crate::proto::server::Tally;
use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::path;
use std::time::{Duration, SystemTime};

/// The most clients that are listed: a record is at most 400 bytes long, and whoever asks reads 4 MiB.
const RECORDS_MAX: usize = 10_000;

/// How long a destination may owe an answer, in milliseconds, before what was measured says nothing of it any more.
const STALLED_MS: u64 = 2_000;

/// What a fact may be.
#[derive(Debug)]
enum Value {
    Number(u64),
    Flag(bool),
    Text(String),
    /// A name that users gave. Unlike of [`Value::Text`], nothing of it may get lost.
    Name(String),
}

/// Facts in their order, by the names that users see. No name holds a space or needs to be escaped.
type Facts = Vec<(&'static str, Value)>;

/// The answer to `status`: one line.
pub(super) fn answer(server: &Reactor, form: StatusForm) -> String {
    let mut facts = of_server(server);
    let records: Option<Vec<Facts>> = form.clients.then(|| {
        let mut clients: Vec<_> = server.slots.iter().filter_map(|(_, slot)| client(slot)).collect();
        clients.sort_unstable_by_key(|client| client.id());
        if let Some(more @ 1..) = clients.len().checked_sub(RECORDS_MAX) {
            facts.push(("clients_left_out", Value::Number(more as u64)));
        }
        let unix_now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now_ms = server.shared.now_ms;
        clients.into_iter().take(RECORDS_MAX).map(|client| of_client(client, now_ms, unix_now)).collect()
    });
    match form.notation {
        Notation::Json => {
            let times = json_of_times(&server.shared.admission.timings);
            json(&facts, records.as_deref(), Some(times))
        }
        Notation::Pairs | Notation::Prometheus => text(&facts, records.as_deref().unwrap_or_default()),
    }
}

impl Reactor {
    /// Tells the supervisor, if there is one, what the server does, unless that is what it has been told.
    pub(super) fn report(&mut self) {
        let Some(key) = self.supervisor else { return };
        if !matches!(self.slots.get(key), Some(Slot::Supervisor(supervisor)) if supervisor.wants_status(&self.shared)) {
            return;
        }
        let line = line(self);
        if let Some(Slot::Supervisor(supervisor)) = self.slots.get_mut(key) {
            supervisor.tell_status(&line, key, &mut self.shared);
        }
    }
}

/// What the server does, in a line for people.
fn line(server: &Reactor) -> String {
    let sh = &server.shared;
    if let Some((mirror, plan)) = migration(server) {
        let progress = plan.progress();
        let left_mib = data_left(server, plan, &progress) >> 20;
        return format!("{mirror}: {}, pass {}, {left_mib} MiB left", mirror.phase(plan), progress.pass);
    }
    let doing = match &sh.life {
        Life::Receiving { .. } | Life::Sealing { .. } => "awaiting a migration to",
        Life::Relaying => "relaying to",
        Life::Snapshot => "making a snapshot and serving",
        Life::Serving | Life::Sending { .. } | Life::Over => "serving",
    };
    format!("{doing} {} on {}", sh.backend.name(), server.places())
}

fn client(slot: &Slot) -> Option<&Client> {
    match slot {
        Slot::Client(client) => Some(client),
        _ => None,
    }
}

/// The path of the image, where it is one, from the root on.
pub(super) fn file(server: &Reactor) -> Option<String> {
    let path = server.shared.backend.disk()?.path();
    Some(path::absolute(path).unwrap_or_default().display().to_string())
}

/// What was done for all clients since the start.
pub(super) fn totals(server: &Reactor) -> Tally {
    let mut tally = server.shared.admission.closed();
    server.slots.iter().filter_map(|(_, slot)| client(slot)).for_each(|client| tally += client.tally());
    tally
}

fn of_server(server: &Reactor) -> Facts {
    let sh = &server.shared;
    let tally = totals(server);
    let mut facts = Facts::new();
    let mut put = |name, value| facts.push((name, value));
    put("pid", Value::Number(std::process::id().into()));
    put("is_mirroring", Value::Flag(matches!(sh.life, Life::Sending { .. })));
    put("has_control", Value::Flag(!sh.life.awaits_image()));
    put("size", Value::Number(sh.backend.export().size));
    put("clients_allowed", Value::Flag(sh.admission.has_room(sh.life.awaits_image())));
    put("num_clients", Value::Number(sh.admission.clients() as u64));
    if let Some((mirror, plan)) = migration(server) {
        let progress = plan.progress();
        let duration_ms = sh.now_ms.saturating_sub(mirror.started_ms());
        let stalled_ms = mirror.stalled_ms(sh.now_ms);
        let bytes_per_s = if stalled_ms < STALLED_MS { progress.bytes_per_s } else { 0 };
        let seconds_left = data_left(server, plan, &progress).checked_div(bytes_per_s).unwrap_or(0);
        put("migration_speed", Value::Number(bytes_per_s));
        put("migration_duration", Value::Number(duration_ms / 1000));
        put("migration_seconds_left", Value::Number(seconds_left));
        put("migration_bytes_left", Value::Number(progress.left_bytes));
        if let Some(limit) = progress.limit_bytes_per_s {
            put("migration_speed_limit", Value::Number(limit));
        }
        put("migration_destination", Value::Text(mirror.destination().to.to_string()));
        put("migration_stalled_seconds", Value::Number(stalled_ms / 1000));
        put("migration_phase", Value::Text(mirror.phase(plan).into()));
        put("migration_pass", Value::Number(progress.pass.into()));
        put("migration_attempts", Value::Number(mirror.trials().begun().into()));
        put("migration_dirty_bytes", Value::Number(progress.dirty_bytes));
        if let Some(limit) = progress.write_limit_bytes_per_s {
            put("migration_write_limit", Value::Number(limit));
        }
        if mirror.lacks_flush(plan) {
            put("migration_durability", Value::Text("destination".into()));
        }
        if let Some(error) = mirror.trials().last_error() {
            put("migration_last_error", Value::Text(error.into()));
        }
    }
    if let Some((link, standby)) = upstream(server) {
        let outage = link.outage();
        let since = outage.connected_ms().map_or(0, |ms| unix_seconds(ms, sh.now_ms));
        let counts = standby.core.counts();
        if matches!(sh.life, Life::Relaying) {
            put("relaying", Value::Flag(true));
        }
        put("upstream", Value::Text(link.server().to_string()));
        put("upstream_style", Value::Text(link.style().into()));
        put("upstream_state", Value::Text(link.state(standby).into()));
        put("upstream_since", Value::Number(since));
        put("reconnects", Value::Number(outage.reconnects()));
        put("outage_ms", Value::Number(outage.on_for_ms(sh.now_ms)));
        put("last_outage_ms", Value::Number(outage.last_ms()));
        put("replay_bytes", Value::Number(standby.core.dirty_bytes() as u64));
        put("replay_limit", Value::Number(standby.core.limit() as u64));
        put("in_flight", Value::Number(standby.core.len() as u64));
        put("own_flushes", Value::Number(counts.own_flushes));
        put("replayed_bytes", Value::Number(counts.replayed_bytes));
        put("reads_ahead", Value::Number(counts.reads_ahead));
        put("last_error", Value::Text(outage.last_error().unwrap_or("none").into()));
    }
    put("reads", Value::Number(tally.reads));
    put("writes", Value::Number(tally.writes));
    put("trims", Value::Number(tally.trims));
    put("read_only", Value::Flag(sh.backend.export().read_only));
    if let Some(disk) = sh.backend.disk() {
        put("disk_engine", Value::Text(disk.engine().into()));
        put("syncs", Value::Number(disk.syncs()));
    }
    put("flushes", Value::Number(tally.flushes));
    put("read_bytes", Value::Number(tally.read_bytes));
    put("written_bytes", Value::Number(tally.written_bytes));
    put("errors", Value::Number(tally.errors));
    for name in ["address", "newstyle_address", "newstyle_socket"] {
        let places: Vec<&str> = server
            .addresses
            .iter()
            .filter(|(dialect, address)| name == place_name(*dialect, address))
            .map(|(_, address)| address.as_str())
            .collect();
        if !places.is_empty() {
            put(name, Value::Text(places.join(",")));
        }
    }
    put("sync", Value::Flag(sh.limits.sync));
    if let Some(file) = file(server) {
        put("file", Value::Name(file));
    }
    put("version", Value::Text(env!("CARGO_PKG_VERSION").into()));
    put("uptime", Value::Number(sh.now_ms.saturating_sub(server.started_ms) / 1000));
    put("killswitch", Value::Text(sh.limits.killswitch_ms.map_or_else(|| "none".into(), seconds)));
    put("max_clients", Value::Number(sh.admission.clients_max() as u64));
    put("default_deny", Value::Flag(sh.admission.acl.default_deny()));
    let entries: Vec<_> = sh.admission.acl.entries().iter().map(ToString::to_string).collect();
    put("acl", Value::Text(if entries.is_empty() { "none".into() } else { entries.join(",") }));
    let rates = sh.gate.quota.rates();
    put("max_iops", Value::Number(rates.requests.unwrap_or(0)));
    put("max_bytes_per_second", Value::Number(rates.bytes.unwrap_or(0)));
    put("longest_turn_us", Value::Number(sh.admission.timings.longest_turn_us()));
    facts
}

/// Under which name a place to connect to is listed.
fn place_name(dialect: Dialect, address: &str) -> &'static str {
    match dialect {
        Dialect::Oldstyle => "address",
        Dialect::Newstyle if address.parse::<SocketAddr>().is_ok() => "newstyle_address",
        Dialect::Newstyle => "newstyle_socket",
    }
}

/// The connection to the server that has the image, where that is another one.
pub(super) fn upstream(server: &Reactor) -> Option<(&Link, &Standby)> {
    match (server.slots.get(server.link?)?, &server.shared.backend) {
        (Slot::Upstream(link), Backend::Upstream(standby)) => Some((link, standby)),
        _ => None,
    }
}

/// Milliseconds as seconds, without zeroes at the end: `120`, `0.5`.
fn seconds(ms: u64) -> String {
    match ms % 1000 {
        0 => (ms / 1000).to_string(),
        rest => format!("{}.{rest:03}", ms / 1000).trim_end_matches('0').into(),
    }
}

/// A time of the server's clock, in seconds since 1970.
fn unix_seconds(at_ms: u64, now_ms: u64) -> u64 {
    let unix_now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    unix_now.saturating_sub(Duration::from_millis(now_ms.saturating_sub(at_ms))).as_secs()
}

/// The migration that is running.
pub(super) fn migration(server: &Reactor) -> Option<(&Mirror, &Plan)> {
    let Life::Sending { mirror, plan } = &server.shared.life else { return None };
    match server.slots.get(*mirror)? {
        Slot::Mirror(mirror) => Some((mirror, plan)),
        _ => None,
    }
}

fn of_client(client: &Client, now_ms: u64, unix_now: Duration) -> Facts {
    let tally = client.tally();
    let connected = Duration::from_millis(now_ms.saturating_sub(client.opened_ms()));
    let requests = tally.reads + tally.writes + tally.trims + tally.flushes;
    vec![
        ("client", Value::Number(client.id())),
        ("address", Value::Text(client.peer().to_string())),
        ("style", Value::Text(client.style().into())),
        ("since", Value::Number(unix_now.saturating_sub(connected).as_secs())),
        ("requests", Value::Number(requests)),
        ("bytes", Value::Number(tally.read_bytes.saturating_add(tally.written_bytes))),
        ("in_flight", Value::Number(client.in_flight() as u64)),
        ("reads", Value::Number(tally.reads)),
        ("writes", Value::Number(tally.writes)),
        ("errors", Value::Number(tally.errors)),
        ("oldest_request_ms", Value::Number(client.oldest_ms().map_or(0, |ms| now_ms.saturating_sub(ms)))),
    ]
}

/// `key=value` pairs, separated by spaces. No value holds one. The records of clients follow each other, each beginning
/// with its `client`.
fn text(facts: &Facts, records: &[Facts]) -> String {
    let pairs = facts.iter().chain(records.iter().flatten()).map(|(name, value)| format!("{name}={value}"));
    pairs.collect::<Vec<_>>().join(" ")
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Flag(flag) => flag.fmt(f),
            Self::Name(name) => name.chars().try_for_each(|c| match c {
                '\\' => f.write_str("\\\\"),
                _ if c.is_whitespace() || c.is_control() => write!(f, "\\u{:04x}", u32::from(c)),
                _ => f.write_char(c),
            }),
            Self::Text(text) => {
                text.chars().try_for_each(|c| f.write_char(if c.is_whitespace() || c.is_control() { '_' } else { c }))
            }
        }
    }
}

/// One JSON object (RFC 8259), the records of clients in an array of it, and what else there is.
fn json(facts: &Facts, records: Option<&[Facts]>, more: Option<String>) -> String {
    let mut members: Vec<String> = facts.iter().map(json_member).chain(more).collect();
    if let Some(records) = records {
        let objects: Vec<_> = records.iter().map(|record| json(record, None, None)).collect();
        members.push(format!("\"clients\":[{}]", objects.join(",")));
    }
    format!("{{{}}}", members.join(","))
}

/// What the requests of each command took: how many took as many microseconds at the most as the name of a bucket says, and
/// longer than that of the one before.
fn json_of_times(timings: &Timings) -> String {
    let commands = timings.by_command().map(|(name, times)| {
        let counts = times.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        let buckets = counts.map(|(bucket, count)| match timings::bound_us(bucket) {
            Some(bound_us) => format!("\"{bound_us}\":{count}"),
            None => format!("\"more\":{count}"),
        });
        let (all_us, disk_us, requests) = (times.all_us, times.disk_us, times.buckets.iter().sum::<u64>());
        let buckets = buckets.collect::<Vec<_>>().join(",");
        format!(
            "\"{name}\":{{\"requests\":{requests},\"us\":{all_us},\"disk_us\":{disk_us},\"buckets\":{{{buckets}}}}}"
        )
    });
    format!("\"commands\":{{{}}}", commands.collect::<Vec<_>>().join(","))
}

fn json_member((name, value): &(&str, Value)) -> String {
    match value {
        Value::Number(_) | Value::Flag(_) => format!("\"{name}\":{value}"),
        Value::Text(text) | Value::Name(text) => {
            let mut member = format!("\"{name}\":\"");
            for c in text.chars() {
                if matches!(c, '"' | '\\') {
                    member.push('\\');
                }
                printable::push(&mut member, c);
            }
            member + "\""
        }
    }
}

/// About how many bytes have to be sent yet. The first pass meets every hole of the file, and those cost next to nothing
/// where the destination can make holes itself.
fn data_left(server: &Reactor, plan: &Plan, progress: &Progress) -> u64 {
    if progress.pass == 1 && plan.can().zero {
        let data = server.shared.backend.disk().map_or(0, Disk::allocated).saturating_sub(progress.sent_bytes);
        return progress.left_bytes.min(data);
    }
    progress.left_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        vec![
            ("pid", Value::Number(u64::MAX)),
            ("is_mirroring", Value::Flag(true)),
            ("address", Value::Text("/a b\t\"\\\u{7f}\u{85}é\u{2003}🦀".into())),
        ]
    }

    #[test]
    fn names_stay_one_word_and_whole() {
        let name = Value::Name("/a b\n\\u0020\u{2003}é".into());
        assert_eq!(name.to_string(), r"/a\u0020b\u000a\\u0020\u2003é");
        assert_eq!(json(&vec![("file", name)], None, None), "{\"file\":\"/a b\\n\\\\u0020\u{2003}é\"}");
    }

    #[test]
    fn times_are_short() {
        assert_eq!([120_000, 500, 1_050, 1].map(seconds), ["120", "0.5", "1.05", "0.001"]);
    }

    fn record(id: u64) -> Facts {
        vec![("client", Value::Number(id)), ("style", Value::Text("oldstyle".into()))]
    }

    #[test]
    fn text_is_words() {
        let server = "pid=18446744073709551615 is_mirroring=true address=/a_b_\"\\__é_🦀";
        assert_eq!(text(&facts(), &[]), server);
        let records = [record(1), record(9)];
        assert_eq!(text(&facts(), &records), format!("{server} client=1 style=oldstyle client=9 style=oldstyle"));
    }

    #[test]
    fn json_has_types_and_escapes() {
        let server = r#""pid":18446744073709551615,"is_mirroring":true,"address":"/a b\t\"\\\u007f\u0085é\u{2003}🦀""#
            .replace(r"\u{2003}", "\u{2003}");
        assert_eq!(json(&facts(), None, None), format!("{{{server}}}"));
        assert_eq!(json(&facts(), Some(&[]), None), format!("{{{server},\"clients\":[]}}"));
        let clients = r#""clients":[{"client":1,"style":"oldstyle"},{"client":9,"style":"oldstyle"}]"#;
        assert_eq!(json(&facts(), Some(&[record(1), record(9)]), None), format!("{{{server},{clients}}}"));
    }
}
