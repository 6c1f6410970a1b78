//! Every file of the fuzzers' corpora through what is fuzzed: shapes of attacks that others suffered, and all that a
//! fuzzer has found here; then each of them changed at random, seeded, for a second or two. That is no fuzzing: no
//! coverage guides it. It finds what is near to what is known, on every change. Needs nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::fuzzed;
use crate::random::Random;

/// For each target.
const CHANGED_FOR: Duration = Duration::from_millis(1600);
const MAX_BYTES: usize = 8192;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn check(target: &str, dictionary: &str, function: fn(&[u8])) {
    let folder = fuzz().join("corpus").join(target);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&folder).expect("a corpus").flatten().map(|entry| entry.path()).collect();
    paths.sort();
    assert!(paths.len() > 10, "{} files in {}", paths.len(), folder.display());
    let mut files = Vec::new();
    for path in paths {
        println!("{}", path.display());
        let bytes = fs::read(&path).expect("a file of the corpus");
        function(&bytes);
        files.push(bytes);
    }
    let words = words(dictionary);
    files.retain(|bytes| !bytes.is_empty() && bytes.len() <= MAX_BYTES);
    let mut random = Random::new(1);
    let (begun, mut num_changed) = (Instant::now(), 0);
    while begun.elapsed() < CHANGED_FOR {
        let of = |random: &mut Random| random.below(files.len() as u32) as usize;
        let (file, other) = (of(&mut random), of(&mut random));
        let mut bytes = files[file].clone();
        for _ in 0..random.between(1, 4) {
            change(&mut bytes, &files[other], &words, &mut random);
        }
        // Shown where the test fails: to be kept in the corpus.
        println!("change {num_changed}: \"{}\"", bytes.escape_ascii());
        function(&bytes);
        num_changed += 1;
    }
    assert!(num_changed > 10, "{num_changed} changes in {CHANGED_FOR:?}");
}

/// What libFuzzer's dictionary of this name has.
fn words(dictionary: &str) -> Vec<Vec<u8>> {
    let text = fs::read_to_string(fuzz().join("dictionaries").join(dictionary).with_extension("dict"));
    let text = text.expect("a dictionary");
    let quoted = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
    let words: Vec<Vec<u8>> = quoted.map(unescape).collect();
    assert!(words.len() > 10, "{} words in {dictionary}", words.len());
    words
}

fn unescape(word: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let [first, ..] = rest {
        let (byte, length) = match rest {
            [b'\\', b'x', high, low, ..] => {
                let digit = |byte: &u8| (*byte as char).to_digit(16).expect("a hexadecimal digit") as u8;
                (digit(high) * 16 + digit(low), 4)
            }
            [b'\\', escaped, ..] => (*escaped, 2),
            _ => (*first, 1),
        };
        bytes.push(byte);
        rest = &rest[length..];
    }
    bytes
}

/// One change such as fuzzers make: a byte, a bit, a number, a word, some bytes left out, said twice, or of another.
fn change(bytes: &mut Vec<u8>, other: &[u8], words: &[Vec<u8>], random: &mut Random) {
    if bytes.is_empty() {
        bytes.push(b' ');
    }
    let mut range = |length: usize| {
        let start = random.below(length as u32) as usize;
        start..(start + random.between(1, 32) as usize).min(length)
    };
    let (own, theirs) = (range(bytes.len()), range(other.len()));
    let at = own.start;
    match random.below(8) {
        0 => bytes[at] = random.next() as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        2 => drop(bytes.drain(own)),
        3 => bytes.extend_from_within(own),
        4 => drop(bytes.splice(at..at, words[random.below(words.len() as u32) as usize].iter().copied())),
        5 => drop(bytes.splice(own, other[theirs].iter().copied())),
        6 => {
            let numbers = ["0", "-1", "1e999", "4294967296", "18446744073709551615", "9223372036854775808"];
            let number = numbers[random.below(numbers.len() as u32) as usize];
            drop(bytes.splice(own.start..own.end.min(at + 2), number.bytes()));
        }
        _ => bytes.truncate(at),
    }
}

#[test]
fn gguf() {
    check("gguf", "gguf", fuzzed::gguf);
}

#[test]
fn safetensors() {
    check("safetensors", "safetensors", fuzzed::safetensors);
}

#[test]
fn chat_template() {
    check("chat_template", "chat_template", fuzzed::chat_template);
}

#[test]
fn grammar() {
    check("grammar", "grammar", fuzzed::grammar);
}

#[test]
fn request() {
    check("request", "api", fuzzed::request);
}

#[test]
fn stream() {
    check("stream", "api", fuzzed::stream);
}
