//! libFuzzer around [`fullbore_fuzz::gguf`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fullbore_fuzz::gguf(data));
