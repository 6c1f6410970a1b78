//! How an HTTP request is answered, whatever dialect it speaks. Invariant: a dialect makes a whole answer and the
//! events of a stream from the same [`Delta`]s, and knows no socket.

use serde::Serialize;
use serde_json::{Value, json};

use super::ServedModel;
use super::generation::{Delta, Generation, Usage};
use crate::http::error::ApiError;

/// An event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// JSON.
    Data(String),
    /// The type of its data, which is an object, is its name too.
    Named(Value),
    /// OpenAI's older streams end with it.
    Done,
    /// Nobody reads it.
    Comment(&'static str),
}

/// What a dialect makes of the choices of one request. A stream is `begin`, `more` for each piece, then `end` or
/// `fail`; what is never streamed has none of them.
pub trait Answer: Send + Sync {
    fn is_streamed(&self) -> bool;

    fn begin(&mut self, _generation: &Generation) -> Vec<Event> {
        Vec::new()
    }

    fn more(&mut self, _model: &ServedModel, _delta: Delta, _usage: Usage) -> Vec<Event> {
        Vec::new()
    }

    fn end(&mut self, _usage: Usage) -> Vec<Event> {
        Vec::new()
    }

    fn fail(&mut self, _error: &ApiError, _usage: Usage) -> Vec<Event> {
        Vec::new()
    }

    /// What a stream says when there is nothing to say.
    fn keep_alive(&self) -> Event {
        Event::KEEP_ALIVE
    }

    /// Not streamed: takes the next piece; what it does not keep itself goes to its choice.
    fn gather(&mut self, _model: &ServedModel, delta: Delta, choices: &mut [Delta]) {
        choices[delta.index].append(delta);
    }

    /// Not streamed: all of it, from what was gathered of each choice.
    fn whole(&mut self, model: &ServedModel, choices: Vec<Delta>, usage: Usage) -> Value;
}

impl Event {
    /// Says that somebody is there.
    pub const KEEP_ALIVE: Event = Event::Comment("keep-alive");

    /// `kind` as the type of `data`.
    pub fn named(kind: &str, data: Value) -> Event {
        let mut named = json!({"type": kind});
        if let (Some(fields), Value::Object(data)) = (named.as_object_mut(), data) {
            fields.extend(data);
        }
        Event::Named(named)
    }

    pub fn data(data: &impl Serialize) -> Event {
        Event::Data(serde_json::to_string(data).expect("answers have keys that are strings"))
    }

    /// Appends it as it is sent. JSON as serde writes it has no line breaks, so one `data:` line holds it.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut put = |parts: &[&str]| parts.iter().for_each(|part| out.extend_from_slice(part.as_bytes()));
        match self {
            Event::Data(data) => put(&["data: ", data, "\n\n"]),
            Event::Named(data) => {
                let name = data["type"].as_str().unwrap_or_default();
                put(&["event: ", name, "\ndata: ", &data.to_string(), "\n\n"]);
            }
            Event::Done => put(&["data: [DONE]\n\n"]),
            Event::Comment(comment) => put(&[": ", comment, "\n\n"]),
        }
    }
}

/// Waits for all choices.
pub async fn collect(answer: &mut dyn Answer, model: &ServedModel, generation: Generation) -> Result<Value, ApiError> {
    let gather = |delta, choices: &mut [Delta]| answer.gather(model, delta, choices);
    let (choices, usage) = gathered(generation, gather).await?;
    Ok(answer.whole(model, choices, usage))
}

/// Each choice in one piece.
pub async fn collect_choices(generation: Generation) -> Result<(Vec<Delta>, Usage), ApiError> {
    gathered(generation, |delta, choices| choices[delta.index].append(delta)).await
}

async fn gathered(
    mut generation: Generation,
    mut gather: impl FnMut(Delta, &mut [Delta]),
) -> Result<(Vec<Delta>, Usage), ApiError> {
    let empty = |index| Delta { index, ..Delta::default() };
    let mut choices: Vec<Delta> = (0..generation.num_choices()).map(empty).collect();
    while let Some(delta) = generation.next().await {
        gather(delta?, &mut choices);
    }
    Ok((choices, generation.usage()))
}
