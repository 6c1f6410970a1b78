//! libFuzzer around [`fullbore_fuzz::stream`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fullbore_fuzz::stream(data));
