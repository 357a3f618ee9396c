//! Fuzzes access control list entries and addresses.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oracles::acl(data));
