//! libFuzzer around [`fullbore_fuzz::safetensors`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fullbore_fuzz::safetensors(data));
