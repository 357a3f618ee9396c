//! Fuzzes control commands.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oracles::control(data));
