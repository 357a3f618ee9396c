//! Fuzzes a proxy's side of a server: greetings, replies, and connections that end.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oracles::upstream(data));
