//! The status line: what this server says of itself.

use super::{Server, Slot};
use std::fmt::Write;

/// The answer to `status`: key=value pairs, separated by spaces; no key and no value holds a space.
pub fn line(server: &Server) -> String {
    let sh = &server.shared;
    let mut tally = sh.closed;
    for (_, slot) in server.slots.iter() {
        if let Slot::Client(client) = slot {
            tally += client.tally();
        }
    }
    let pid = std::process::id();
    let mut line = format!("pid={pid} is_mirroring={} has_control={}", server.mirror.is_some(), sh.inbound.is_none());
    let mut put = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a String cannot fail.
        let _ = write!(line, " {key}={value}");
    };
    put("size", &sh.disk.size());
    put("clients_allowed", &(sh.clients < sh.clients_max()));
    put("num_clients", &sh.clients);
    if let (Some(Slot::Mirror(mirror)), Some(plan)) = (server.mirror.and_then(|key| server.slots.get(key)), &sh.plan) {
        let progress = plan.progress();
        let duration_ms = sh.now_ms.saturating_sub(mirror.started_ms());
        put("migration_speed", &progress.bytes_per_s);
        put("migration_duration", &(duration_ms / 1000));
        put("migration_seconds_left", &progress.left_bytes.div_ceil(progress.bytes_per_s.max(1)));
        put("migration_bytes_left", &progress.left_bytes);
        if let Some(limit) = progress.limit_bytes_per_s {
            put("migration_speed_limit", &limit);
        }
        put("migration_phase", &mirror.phase(plan));
        put("migration_pass", &progress.pass);
        put("migration_attempts", &mirror.attempts());
        put("migration_dirty_bytes", &progress.dirty_bytes);
        if let Some(limit) = progress.write_limit_bytes_per_s {
            put("migration_write_limit", &limit);
        }
        if let Some(error) = mirror.last_error() {
            put("migration_last_error", &one_word(error));
        }
    }
    put("reads", &tally.reads);
    put("writes", &tally.writes);
    put("trims", &tally.trims);
    put("flushes", &tally.flushes);
    put("read_bytes", &tally.read_bytes);
    put("written_bytes", &tally.written_bytes);
    put("errors", &tally.errors);
    for (n, address) in server.addresses.iter().enumerate() {
        let key = match (n, address.starts_with('/')) {
            (0, _) => "address",
            (_, true) => "newstyle_socket",
            (_, false) => "newstyle_address",
        };
        put(key, &one_word(address));
    }
    line
}

/// A value without spaces.
fn one_word(text: &str) -> String {
    text.replace(|c: char| c.is_whitespace() || c.is_control(), "_")
}
