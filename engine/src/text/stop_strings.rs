//! Stop strings over a stream of text.
//!
//! Invariant: what is held back is exactly the longest end of the text that could begin a stop string; how the text is
//! cut into chunks changes nothing. The stop string that ends first stops; of those that end together, the longest.

#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    needles: Vec<Needle>,
    /// The end of the text so far that some needle has matched.
    held: String,
    found: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Safe to send: no stop string begins in it.
    pub text: String,
    pub stopped: bool,
}

#[derive(Clone, Debug)]
struct Needle {
    bytes: Vec<u8>,
    /// For each matched length, the next shorter one that also matches there (Knuth, Morris and Pratt).
    fallback: Vec<usize>,
    matched: usize,
}

impl Needle {
    fn new(text: String) -> Needle {
        let mut needle = Needle { fallback: vec![0; text.len() + 1], bytes: text.into_bytes(), matched: 0 };
        for length in 1..needle.bytes.len() {
            needle.advance(needle.bytes[length]);
            needle.fallback[length + 1] = needle.matched;
        }
        Needle { matched: 0, ..needle }
    }

    fn advance(&mut self, byte: u8) {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
    }

    fn is_found(&self) -> bool {
        self.matched == self.bytes.len()
    }
}

impl StopStrings {
    /// Empty strings stop nothing.
    pub fn new(strings: Vec<String>) -> StopStrings {
        let needles = strings.into_iter().filter(|text| !text.is_empty()).map(Needle::new).collect();
        StopStrings { needles, ..StopStrings::default() }
    }

    /// Takes the next text. After a stop there is no more to send.
    pub fn push(&mut self, text: &str) -> Scan {
        if self.found.is_some() {
            return Scan { text: String::new(), stopped: true };
        }
        let scanned = self.held.len();
        self.held.push_str(text);
        for at in scanned..self.held.len() {
            let byte = self.held.as_bytes()[at];
            self.needles.iter_mut().for_each(|needle| needle.advance(byte));
            let found = self.needles.iter().filter(|needle| needle.is_found()).max_by_key(|needle| needle.bytes.len());
            if let Some(needle) = found {
                self.held.truncate(at + 1 - needle.bytes.len());
                self.found = Some(String::from_utf8_lossy(&needle.bytes).into_owned());
                return Scan { text: std::mem::take(&mut self.held), stopped: true };
            }
        }
        Scan { text: self.release(), stopped: false }
    }

    /// Takes text in which nothing stops, and gives what is safe to send: a stop string may begin in it and end in what
    /// follows.
    pub fn pass(&mut self, text: &str) -> String {
        self.held.push_str(text);
        for byte in text.bytes() {
            for needle in &mut self.needles {
                needle.advance(byte);
                if needle.is_found() {
                    needle.matched = needle.fallback[needle.matched];
                }
            }
        }
        self.release()
    }

    /// All but what a stop string may begin in.
    fn release(&mut self) -> String {
        let num_held = self.needles.iter().map(|needle| needle.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - num_held);
        std::mem::replace(&mut self.held, rest)
    }

    /// The stop string that ended the text.
    pub fn found(&self) -> Option<&str> {
        self.found.as_deref()
    }

    /// What was held back, once no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
