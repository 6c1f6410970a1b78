//! What strangers send, as functions of any bytes: none may panic, hang, or take memory without bound, and each holds
//! what must be true of whatever comes out.
//!
//! libFuzzer calls them (`make fuzz`), and a test calls them with every file of `corpus/`. Inputs are text as far as
//! that goes, so that a person can write one: parts are divided by a line of `===`.

mod api;
mod files;
mod text;

pub use api::{request, stream};
pub use files::{gguf, safetensors};
pub use text::{chat_template, grammar};

const DIVIDER: &[u8] = b"\n===\n";

/// Exactly so many parts: the last takes the rest, those that are not there are empty.
fn parts<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut rest = data;
    std::array::from_fn(|index| {
        let end = match index + 1 == N {
            true => None,
            false => rest.windows(DIVIDER.len()).position(|window| window == DIVIDER),
        };
        let (part, next) = end.map_or((rest, &[][..]), |end| (&rest[..end], &rest[end + DIVIDER.len()..]));
        rest = next;
        part
    })
}

/// What people read of a refusal.
fn check_sentence(sentence: &str) {
    assert!(sentence.len() > 10 && !sentence.contains("bug of its own"), "{sentence}");
}
