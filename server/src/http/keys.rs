//! API keys: who has one, and what it is worth.
//!
//! Invariant: a key itself is kept nowhere, only its SHA-256; the digest of what a client shows is compared with every
//! one there is, in constant time, so that no answer's time tells how much of a key was right.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use fullbore_engine::request::Share;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::rates::{Meter, Rate};
use crate::api::parse_share;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read the keys of --api-key-file {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("line {line} of {}: {message}; a line is KEY, then NAME or NAME=WEIGHT[:MAX], \
         then rpm=N and tpm=N, of which all but KEY may be left out", path.display())]
    Line { path: PathBuf, line: usize, message: String },
    #[error("{0} of the API keys has fewer than 8 characters; take a longer one")]
    Short(String),
    #[error("one API key is given to both {0} and {1}; give each a key of its own")]
    Twice(String, String),
    #[error("the API keys of {0} have unlike rates; give each the same rpm and tpm")]
    TwoRates(String),
    #[error("--api-key-file {} has no key", .0.display())]
    Empty(PathBuf),
}

/// Whom a key stands for. Keys with one name are one tenant, so that a key can be replaced while the old one still
/// works.
#[derive(Clone, Debug)]
pub struct Holder {
    pub name: Arc<str>,
    /// What the key file says; `None` leaves it to `--share`.
    pub share: Option<Share>,
    /// Where the key file bounds its rate.
    pub meter: Option<Arc<Meter>>,
}

impl Holder {
    fn rate(&self) -> Rate {
        self.meter.as_ref().map(|meter| meter.rate()).unwrap_or_default()
    }
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
            all.add(key, None, None, Rate::default())?;
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

    /// Those whose rates stay as they are go on from where they are in `before`.
    pub fn with_meters_of(mut self, before: &Keys) -> Keys {
        for (_, holder) in &mut self.0 {
            let same = |(_, old): &&([u8; 32], Holder)| old.name == holder.name && old.rate() == holder.rate();
            if let Some((_, old)) = before.0.iter().find(same) {
                holder.meter.clone_from(&old.meter);
            }
        }
        self
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
        let is_rate = |word: &&str| word.starts_with("rpm=") || word.starts_with("tpm=");
        let (rates, words): (Vec<&str>, Vec<&str>) = words.into_iter().partition(is_rate);
        let mut rate = Rate::default();
        rates.into_iter().try_for_each(|word| rate.set(word))?;
        match words[..] {
            [] if rate.is_any() => Ok(Ok(())),
            [] => Err("a rate is of a key, and there is none".to_owned()),
            [key] => Ok(self.add(key, None, None, rate)),
            [key, name] if !name.contains('=') => Ok(self.add(key, Some(name), None, rate)),
            [key, named] => {
                let (name, share) = parse_share(named)?;
                Ok(self.add(key, Some(&name), Some(share), rate))
            }
            _ => Err(format!("{} words are too many", words.len())),
        }
    }

    fn add(&mut self, key: &str, name: Option<&str>, share: Option<Share>, rate: Rate) -> Result<(), KeyError> {
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
        // Keys of one name fill and empty the same buckets.
        let others = self.0.iter().find(|(_, holder)| *holder.name == *name).map(|(_, holder)| holder);
        let meter = match others {
            Some(other) if other.rate() != rate => return Err(KeyError::TwoRates(name)),
            Some(other) => other.meter.clone(),
            None => (!rate.is_any()).then(|| Arc::new(Meter::new(rate, Instant::now()))),
        };
        self.0.push((digest, Holder { name: name.into(), share, meter }));
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
        let keys = lines(
            "# ours\nsecret-of-alice alice=4:8 rpm=60\n\nsecret-of-bob bob # his\nnew-secret-of-bob bob\nnobody-s-key",
        )
        .expect("lines");
        let share = Some(Share { weight: 4, max_num_seqs: 8 });
        let holder = |key: &str| keys.holder(key).map(|holder| (&*holder.name, holder.share, holder.rate()));
        let rate = Rate { requests: Some(60), tokens: None };
        assert_eq!(holder("secret-of-alice"), Some(("alice", share, rate)));
        let bob = Some(("bob", None, Rate::default()));
        assert_eq!((holder("secret-of-bob"), holder("new-secret-of-bob")), (bob, bob));
        let anonymous = keys.holder("nobody-s-key").expect("a key").name.clone();
        assert!(anonymous.starts_with("key-") && !anonymous.contains("nobody"), "{anonymous}");
        for wrong in ["", "secret-of-alic", "secret-of-alice ", "SECRET-OF-ALICE", "alice"] {
            assert!(keys.holder(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn keys_of_one_name_share_a_rate_and_keep_it_when_they_are_read_again() {
        let meter = |keys: &Keys, key: &str| keys.holder(key).and_then(|holder| holder.meter.clone()).expect("a rate");
        let text = "first-key alice rpm=2 tpm=50\nsecond-key alice rpm=2 tpm=50\nthird-key tpm=50";
        let keys = lines(text).expect("lines");
        assert!(Arc::ptr_eq(&meter(&keys, "first-key"), &meter(&keys, "second-key")));
        assert!(!Arc::ptr_eq(&meter(&keys, "first-key"), &meter(&keys, "third-key")));
        let again = lines(text).expect("lines").with_meters_of(&keys);
        assert!(Arc::ptr_eq(&meter(&keys, "first-key"), &meter(&again, "second-key")));
        let other = lines("first-key alice rpm=3 tpm=50").expect("lines").with_meters_of(&keys);
        assert_eq!(meter(&other, "first-key").rate().requests, Some(3));
    }

    #[test]
    fn what_is_no_key_is_said() {
        let wrong = [
            ("short", "8 characters"),
            ("long-enough alice=", "NAME=WEIGHT"),
            ("long-enough alice=0", "NAME=WEIGHT"),
            ("long-enough alice bob", "too many"),
            ("long-enough alice\nlong-enough bob", "both alice and bob"),
            ("long-enough alice rpm=0", "rpm=0"),
            ("long-enough alice\nother-enough alice rpm=5", "alice have unlike rates"),
            ("rpm=5", "there is none"),
        ];
        for (text, part) in wrong {
            let message = lines(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
            assert!(!message.contains("long-enough"), "{message} gives a key away");
        }
    }
}
