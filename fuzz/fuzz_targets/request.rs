//! libFuzzer around [`fullbore_fuzz::request`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fullbore_fuzz::request(data));
