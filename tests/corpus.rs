//! Every file of the fuzzers' corpora through what is fuzzed: shapes of attacks that others suffered, and all that a
//! fuzzer has found here. Needs nothing.

use std::fs;
use std::path::Path;

use crate::fuzzed;

fn check(target: &str, function: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut num_files = 0;
    for entry in fs::read_dir(&folder).expect("a corpus").flatten() {
        println!("{}", entry.path().display());
        function(&fs::read(entry.path()).expect("a file of the corpus"));
        num_files += 1;
    }
    assert!(num_files > 10, "{num_files} files in {}", folder.display());
}

#[test]
fn gguf() {
    check("gguf", fuzzed::gguf);
}

#[test]
fn safetensors() {
    check("safetensors", fuzzed::safetensors);
}

#[test]
fn chat_template() {
    check("chat_template", fuzzed::chat_template);
}

#[test]
fn grammar() {
    check("grammar", fuzzed::grammar);
}

#[test]
fn request() {
    check("request", fuzzed::request);
}

#[test]
fn stream() {
    check("stream", fuzzed::stream);
}
