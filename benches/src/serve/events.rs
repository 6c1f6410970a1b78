//! What a streamed answer of an OpenAI-compatible server is made of: server-sent events, and in each a chunk of JSON.
//!
//! Invariant: however the bytes are cut, the same events come out. Fields that are not read here are passed over.

use serde::Deserialize;
use serde_json::Value;

/// Splits a stream into the data of its events, each of which is one line, as all such servers write them.
#[derive(Default)]
pub struct Events {
    /// The beginning of a line that has not ended.
    line: Vec<u8>,
}

/// More than any chunk takes.
const MAX_LINE_BYTES: usize = 4 << 20;

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("a line of the stream has more than {} MiB", MAX_LINE_BYTES >> 20)]
pub struct LineTooLong;

impl Events {
    pub fn push(&mut self, mut bytes: &[u8], mut on_data: impl FnMut(&[u8])) -> Result<(), LineTooLong> {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.line.is_empty() {
                data_of(line).map(&mut on_data);
            } else {
                self.line.extend_from_slice(line);
                data_of(&self.line).map(&mut on_data);
                self.line.clear();
            }
            bytes = rest;
        }
        if self.line.len() + bytes.len() > MAX_LINE_BYTES {
            return Err(LineTooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }
}

fn data_of(line: &[u8]) -> Option<&[u8]> {
    let data = line.strip_prefix(b"data:")?.trim_ascii();
    (!data.is_empty()).then_some(data)
}

/// After this nothing comes.
pub const DONE: &[u8] = b"[DONE]";

#[derive(Debug, Default, Deserialize)]
pub struct Chunk {
    #[serde(default)]
    pub choices: Vec<Choice>,
    #[serde(default)]
    pub usage: Option<Usage>,
    #[serde(default)]
    pub error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
pub struct Choice {
    /// Of a completion.
    #[serde(default)]
    pub text: Option<String>,
    /// Of a chat.
    #[serde(default)]
    pub delta: Option<Delta>,
    /// Where the server was asked for them and knows how.
    #[serde(default)]
    pub token_ids: Option<Vec<u32>>,
    #[serde(default)]
    pub finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
pub struct Delta {
    #[serde(default)]
    pub content: Option<String>,
    #[serde(default)]
    pub reasoning_content: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub struct Usage {
    #[serde(default)]
    pub prompt_tokens: u64,
    #[serde(default)]
    pub completion_tokens: u64,
    #[serde(default)]
    pub prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub struct PromptDetails {
    #[serde(default)]
    pub cached_tokens: Option<u64>,
}

impl Choice {
    /// What it adds to the text.
    pub fn text(&self) -> [&str; 2] {
        let delta = self.delta.as_ref();
        let thought = delta.and_then(|delta| delta.reasoning_content.as_deref()).unwrap_or_default();
        let said = delta.and_then(|delta| delta.content.as_deref()).or(self.text.as_deref()).unwrap_or_default();
        [thought, said]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let stream =
            b": hello\r\n\r\nevent: x\r\ndata: {\"a\":1}\r\n\r\ndata:{\"b\":2}\n\ndata:\n\nid: 7\ndata: [DONE]\n\n";
        for size in 1..=stream.len() {
            let (mut events, mut found) = (Events::default(), Vec::new());
            for bytes in stream.chunks(size) {
                events.push(bytes, |data| found.push(String::from_utf8_lossy(data).into_owned())).expect("short lines");
            }
            assert_eq!(found, ["{\"a\":1}", "{\"b\":2}", "[DONE]"], "cut every {size} bytes");
        }
    }

    #[test]
    fn a_line_without_an_end_is_given_up() {
        let mut events = Events::default();
        let pushed: Result<Vec<()>, _> = (0..5).map(|_| events.push(&vec![b'x'; 1 << 20], |_| {})).collect();
        assert_eq!(pushed, Err(LineTooLong));
    }

    #[test]
    fn chunks_of_both_forms_are_read() {
        let read = |text: &str| serde_json::from_str::<Chunk>(text).expect("a chunk");
        let chat =
            read(r#"{"id":"x","choices":[{"index":0,"delta":{"role":"assistant","content":"hi"},"logprobs":null}]}"#);
        assert_eq!(chat.choices[0].text(), ["", "hi"]);
        let completion = read(r#"{"choices":[{"text":" a","token_ids":[5,6],"finish_reason":"length"}],"usage":null}"#);
        assert_eq!(completion.choices[0].text(), ["", " a"]);
        assert_eq!(completion.choices[0].token_ids.as_deref(), Some(&[5, 6][..]));
        let last = read(
            r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,
            "prompt_tokens_details":{"cached_tokens":2}}}"#,
        );
        let usage = last.usage.expect("usage");
        assert_eq!(
            (usage.completion_tokens, usage.prompt_tokens_details.and_then(|of| of.cached_tokens)),
            (4, Some(2))
        );
    }
}
