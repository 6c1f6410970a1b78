//! Compiled grammars that may be asked for again, by their source.
//!
//! Invariant: one source is compiled once, however many ask for it at the same time; what is kept is bounded in number
//! and in bytes, and the longest unused goes first. Knows not what it keeps.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

/// Entries at most, and bytes of all of them.
const MAX_ENTRIES: usize = 256;
const MAX_BYTES: usize = 64 << 20;

pub(super) struct Cache<T> {
    entries: HashMap<String, Entry<T>>,
    num_uses: u64,
}

struct Entry<T> {
    slot: Arc<OnceLock<T>>,
    /// The source's own, then with what was made of it.
    num_bytes: usize,
    last_use: u64,
}

impl<T> Default for Cache<T> {
    fn default() -> Cache<T> {
        Cache { entries: HashMap::new(), num_uses: 0 }
    }
}

impl<T> Cache<T> {
    /// Where what is made of `source` is, or will be: whoever comes first makes it.
    pub fn slot(&mut self, source: &str) -> Arc<OnceLock<T>> {
        self.num_uses += 1;
        let last_use = self.num_uses;
        if let Some(entry) = self.entries.get_mut(source) {
            entry.last_use = last_use;
            return entry.slot.clone();
        }
        let slot = Arc::new(OnceLock::new());
        self.entries.insert(source.to_owned(), Entry { slot: slot.clone(), num_bytes: source.len(), last_use });
        self.evict();
        slot
    }

    /// What was made of `source`, where it is there.
    pub fn known(&mut self, source: &str) -> Option<T>
    where
        T: Clone,
    {
        let entry = self.entries.get_mut(source)?;
        let made = entry.slot.get()?.clone();
        self.num_uses += 1;
        entry.last_use = self.num_uses;
        Some(made)
    }

    /// Says what the thing made of `source` takes.
    pub fn measured(&mut self, source: &str, num_bytes: usize) {
        if let Some(entry) = self.entries.get_mut(source) {
            entry.num_bytes = source.len() + num_bytes;
        }
        self.evict();
    }

    /// Has `source` tried again the next time.
    pub fn forget(&mut self, source: &str) {
        self.entries.remove(source);
    }

    fn evict(&mut self) {
        while self.entries.len() > MAX_ENTRIES || self.num_bytes() > MAX_BYTES {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use);
            let Some(source) = oldest.map(|(source, _)| source.clone()) else { return };
            self.entries.remove(&source);
        }
    }

    fn num_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.num_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_the_longest_unused_goes() {
        let mut cache = Cache::default();
        let _ = cache.slot("first").set(1);
        let _ = cache.slot("second").set(2);
        for index in 0..MAX_ENTRIES - 1 {
            assert_eq!(cache.slot("first").get(), Some(&1), "in use");
            cache.slot(&index.to_string());
        }
        assert_eq!(cache.entries.len(), MAX_ENTRIES);
        assert_eq!(cache.slot("first").get(), Some(&1));
        assert_eq!(cache.slot("second").get(), None, "the longest unused");
        cache.measured("first", MAX_BYTES / 2);
        cache.measured("second", MAX_BYTES / 2);
        assert!(cache.num_bytes() <= MAX_BYTES);
        assert_eq!(cache.slot("first").get(), None, "too much with the other");
    }

    #[test]
    fn what_is_forgotten_is_made_again() {
        let mut cache = Cache::default();
        let _ = cache.slot("a").set(1);
        cache.forget("a");
        assert_eq!(cache.slot("a").get(), None);
    }
}
