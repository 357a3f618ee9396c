//! Fuzzes the client's side: greeting and replies.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oracles::client(data));
