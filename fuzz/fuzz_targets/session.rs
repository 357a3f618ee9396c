//! Fuzzes the request stream of a session.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oracles::session(data));
