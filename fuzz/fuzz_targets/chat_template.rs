//! libFuzzer around [`fullbore_fuzz::chat_template`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fullbore_fuzz::chat_template(data));
