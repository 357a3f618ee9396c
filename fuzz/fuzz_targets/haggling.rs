//! Fuzzes the client's half of a newstyle negotiation.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oracles::haggling(data));
