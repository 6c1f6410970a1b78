//! How an HTTP request is answered, whatever dialect it speaks. Invariant: a dialect makes a whole answer and the
//! events of a stream from the same [`Delta`]s, and knows no socket.

use bytes::Bytes;
use serde_json::{Value, json};

use super::ServedModel;
use super::generation::{Delta, Generation, Usage};
use crate::http::error::ApiError;

/// An event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Data(Value),
    /// The type of its data, which is an object, is its name too.
    Named(Value),
    /// OpenAI's older streams end with it.
    Done,
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
    fn keep_alive(&self) -> Bytes {
        Bytes::from_static(b": keep-alive\n\n")
    }

    /// Not streamed: one piece for each choice.
    fn whole(&mut self, model: &ServedModel, choices: Vec<Delta>, usage: Usage) -> Value;
}

impl Event {
    /// `kind` as the type of `data`.
    pub fn named(kind: &str, data: Value) -> Event {
        let mut named = json!({"type": kind});
        if let (Some(fields), Value::Object(data)) = (named.as_object_mut(), data) {
            fields.extend(data);
        }
        Event::Named(named)
    }

    /// JSON as serde writes it has no line breaks, so one `data:` line holds it.
    pub fn frame(&self) -> Bytes {
        match self {
            Event::Data(data) => Bytes::from(format!("data: {data}\n\n")),
            Event::Named(data) => {
                Bytes::from(format!("event: {}\ndata: {data}\n\n", data["type"].as_str().unwrap_or_default()))
            }
            Event::Done => Bytes::from_static(b"data: [DONE]\n\n"),
        }
    }
}

/// Waits for all choices.
pub async fn collect(
    answer: &mut dyn Answer,
    model: &ServedModel,
    mut generation: Generation,
) -> Result<Value, ApiError> {
    let empty = |index| Delta { index, ..Delta::default() };
    let mut choices: Vec<Delta> = (0..generation.num_choices()).map(empty).collect();
    while let Some(delta) = generation.next().await {
        let delta = delta?;
        choices[delta.index].append(delta);
    }
    Ok(answer.whole(model, choices, generation.usage()))
}
