//! API keys: who has one, and what it is worth.
//!
//! Invariant: a key itself is kept nowhere, only its SHA-256; the digest of what a client shows is compared with every
//! one there is, in constant time, so that no answer's time tells how much of a key was right.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fullbore_engine::request::Share;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::api::parse_share;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read the keys of --api-key-file {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("line {line} of {}: {message}; a line is KEY, KEY NAME or KEY NAME=WEIGHT[:MAX]", path.display())]
    Line { path: PathBuf, line: usize, message: String },
    #[error("{0} of the API keys has fewer than 8 characters; take a longer one")]
    Short(String),
    #[error("one API key is given to both {0} and {1}; give each a key of its own")]
    Twice(String, String),
    #[error("--api-key-file {} has no key", .0.display())]
    Empty(PathBuf),
}

/// Whom a key stands for. Keys with one name are one tenant, so that a key can be replaced while the old one still
/// works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub name: Arc<str>,
    /// What the key file says; `None` leaves it to `--share`.
    pub share: Option<Share>,
}

/// All keys that are accepted; none accepts everybody.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<([u8; 32], Holder)>);

/// Shorter ones are guessed.
const MIN_KEY_CHARS: usize = 8;

impl Keys {
    /// Those of the command line, and those of a file.
    pub fn new(keys: &[String], file: Option<&Path>) -> Result<Keys, KeyError> {
        let mut all = Keys::default();
        for key in keys {
            all.add(key, None, None)?;
        }
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|source| KeyError::Read { path: path.into(), source })?;
            let before = all.0.len();
            for (index, line) in text.lines().enumerate() {
                let line_error = |message| KeyError::Line { path: path.into(), line: index + 1, message };
                all.add_line(line).map_err(line_error)??;
            }
            if all.0.len() == before {
                return Err(KeyError::Empty(path.into()));
            }
        }
        Ok(all)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn holder(&self, key: &str) -> Option<&Holder> {
        let shown = digest(key);
        // Every key is looked at, also after the right one.
        self.0.iter().fold(None, |found, (known, holder)| {
            let same = bool::from(known.as_slice().ct_eq(&shown));
            same.then_some(holder).or(found)
        })
    }

    /// `Err` outside: the line is none; inside: its key is not taken.
    fn add_line(&mut self, line: &str) -> Result<Result<(), KeyError>, String> {
        let words: Vec<&str> = line.split_whitespace().take_while(|word| !word.starts_with('#')).collect();
        match words[..] {
            [] => Ok(Ok(())),
            [key] => Ok(self.add(key, None, None)),
            [key, name] if !name.contains('=') => Ok(self.add(key, Some(name), None)),
            [key, named] => {
                let (name, share) = parse_share(named)?;
                Ok(self.add(key, Some(&name), Some(share)))
            }
            _ => Err(format!("{} words are too many", words.len())),
        }
    }

    fn add(&mut self, key: &str, name: Option<&str>, share: Option<Share>) -> Result<(), KeyError> {
        let digest = digest(key);
        // A name that gives nothing of the key away.
        let anonymous = || format!("key-{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3]);
        let name = name.map_or_else(anonymous, str::to_owned);
        if key.chars().count() < MIN_KEY_CHARS {
            return Err(KeyError::Short(name));
        }
        if let Some((_, holder)) = self.0.iter().find(|(known, _)| *known == digest) {
            return Err(KeyError::Twice(holder.name.to_string(), name));
        }
        self.0.push((digest, Holder { name: name.into(), share }));
        Ok(())
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Result<Keys, String> {
        let mut keys = Keys::default();
        text.lines().try_for_each(|line| keys.add_line(line)?.map_err(|error| error.to_string()))?;
        Ok(keys)
    }

    #[test]
    fn a_file_names_its_keys() {
        let keys =
            lines("# ours\nsecret-of-alice alice=4:8\n\nsecret-of-bob bob # his\nnew-secret-of-bob bob\nnobody-s-key")
                .expect("lines");
        let share = Some(Share { weight: 4, max_num_seqs: 8 });
        assert_eq!(keys.holder("secret-of-alice"), Some(&Holder { name: "alice".into(), share }));
        let bob = Some(&Holder { name: "bob".into(), share: None });
        assert_eq!((keys.holder("secret-of-bob"), keys.holder("new-secret-of-bob")), (bob, bob));
        let anonymous = keys.holder("nobody-s-key").expect("a key").name.clone();
        assert!(anonymous.starts_with("key-") && !anonymous.contains("nobody"), "{anonymous}");
        for wrong in ["", "secret-of-alic", "secret-of-alice ", "SECRET-OF-ALICE", "alice"] {
            assert_eq!(keys.holder(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_key_is_said() {
        let wrong = [
            ("short", "8 characters"),
            ("long-enough alice=", "NAME=WEIGHT"),
            ("long-enough alice=0", "NAME=WEIGHT"),
            ("long-enough alice bob", "too many"),
            ("long-enough alice\nlong-enough bob", "both alice and bob"),
        ];
        for (text, part) in wrong {
            let message = lines(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
            assert!(!message.contains("long-enough"), "{message} gives a key away");
        }
    }
}
