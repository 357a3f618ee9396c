//! Fuzzes a whole newstyle session: haggling, then requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oracles::newstyle_session(data));
