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
    let mut line = format!("pid={} is_mirroring=false has_control=true", std::process::id());
    let mut put = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a String cannot fail.
        let _ = write!(line, " {key}={value}");
    };
    put("size", &sh.disk.size());
    put("clients_allowed", &(sh.clients < sh.limits.max_clients));
    put("num_clients", &sh.clients);
    put("reads", &tally.reads);
    put("writes", &tally.writes);
    put("trims", &tally.trims);
    put("flushes", &tally.flushes);
    put("read_bytes", &tally.read_bytes);
    put("written_bytes", &tally.written_bytes);
    put("errors", &tally.errors);
    put("address", &server.address.replace(|c: char| c.is_whitespace() || c.is_control(), "_"));
    line
}
