//! `/v1/embeddings` as OpenAI has it: the hidden states of each input, as the output layer gets them, pooled to one
//! vector of length 1. Invariant: a model that was not made to embed is not asked to.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::sync::Arc;

use fullbore_engine::request::{Request, SamplingParams, TokenId};
use serde_json::{Value, json};

use super::ServedModel;
use super::answer::Answer;
use super::completions::{self, Input};
use super::fields::{Fields, wrong};
use super::generation::{Delta, Job, Jobs, Usage};
use super::tenancy::Tenancy;
use crate::http::access::Client;
use crate::http::error::ApiError;

/// As OpenAI has it.
pub const MAX_INPUTS: usize = 2048;
/// Of the requests that may wait, a batch of inputs takes at most this part at a time; the others follow.
const PART_OF_QUEUE: u32 = 4;

pub struct EmbeddingAnswer {
    model: String,
    as_base64: bool,
    /// Numbers that are kept, from the first; all without it.
    dimensions: Option<usize>,
}

pub fn jobs(model: &ServedModel, id: &str, client: &Client, fields: &Fields) -> Result<Jobs, ApiError> {
    let unfit = || {
        let message = format!(
            "{} was not made to embed: its files name no pooling; to have it embed all the same, start the server with \
             --pooling last or mean",
            model.name
        );
        ApiError::invalid("model", message)
    };
    let pooling = model.pooling.ok_or_else(unfit)?;
    fields.refuse(&["truncate_prompt_tokens"])?;
    let tenancy = Tenancy::read(model, client, fields, fields.string("user")?)?;
    let inputs = completions::inputs(fields, "input", MAX_INPUTS)?;
    let window = (model.engine.config().max_queued_requests / PART_OF_QUEUE).max(1);
    let num_places = window.min(inputs.len() as u32);
    let places = model.engine.reserve(tenancy.tenant, tenancy.share, num_places)?;
    let job = |input: Input| {
        let mut prompt = completions::ids(model, "input", &input)?;
        let is_text = matches!(input, Input::Text(_));
        let ending = |id: &TokenId| is_text && prompt.last() != Some(id);
        prompt.extend(model.tokenizer.ending().filter(ending));
        let request = Request {
            id: id.to_owned(),
            prompt,
            pooling: Some(pooling),
            sampling: SamplingParams::default(),
            cache_salt: tenancy.cache_salt,
            salt_name: tenancy.salt_name.clone(),
            tenant: tenancy.tenant,
            share: tenancy.share,
            priority: tenancy.priority,
            ..Request::default()
        };
        let stops = Vec::new();
        Ok(Job {
            request: Arc::new(request),
            nth: 0,
            stops,
            echo: None,
            prompt_logprobs: None,
            reply: None,
            is_told_at_once: false,
        })
    };
    let jobs = inputs.into_iter().map(job).collect::<Result<_, ApiError>>()?;
    Ok(Jobs { jobs, places, in_turn: true, form: None })
}

impl EmbeddingAnswer {
    pub fn read(model: &ServedModel, fields: &Fields) -> Result<EmbeddingAnswer, ApiError> {
        let as_base64 = match fields.string("encoding_format")? {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => {
                let value = fields.get("encoding_format").unwrap_or(&Value::Null);
                return Err(wrong("encoding_format", value, "float or base64"));
            }
        };
        let dimensions = fields.integer("dimensions", 1..=i64::from(model.shape.dim))?;
        let dimensions = dimensions.map(|dimensions| dimensions as usize);
        Ok(EmbeddingAnswer { model: model.name.clone(), as_base64, dimensions })
    }
}

impl Answer for EmbeddingAnswer {
    fn is_streamed(&self) -> bool {
        false
    }

    fn whole(&mut self, _: &ServedModel, choices: Vec<Delta>, usage: Usage) -> Value {
        let entry = |choice: Delta| {
            let mut vector = choice.pooled;
            vector.truncate(self.dimensions.unwrap_or(usize::MAX));
            normalize(&mut vector);
            let embedding = if self.as_base64 { base64(&vector).into() } else { json!(vector) };
            json!({"object": "embedding", "index": choice.index, "embedding": embedding})
        };
        json!({
            "object": "list",
            "data": choices.into_iter().map(entry).collect::<Vec<_>>(),
            "model": self.model,
            "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
        })
    }
}

/// To length 1; a vector of zeros stays.
fn normalize(vector: &mut [f32]) {
    let length = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
}

/// Of the numbers' bytes, as OpenAI has it.
fn base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_base64() {
        // As Python's base64.b64encode(struct.pack("<2f", 1.0, -0.5)) writes them, and of one number.
        assert_eq!(base64(&[1.0, -0.5]), "AACAPwAAAL8=");
        assert_eq!(base64(&[1.0]), "AACAPw==");
        assert_eq!(base64(&[1.0, 2.0, 3.0]), "AACAPwAAAEAAAEBA");
        assert_eq!(base64(&[]), "");
    }

    #[test]
    fn vectors_have_length_1() {
        let mut vector = [3.0, -4.0];
        normalize(&mut vector);
        assert_eq!(vector, [0.6, -0.8]);
        let mut zeros = [0.0; 3];
        normalize(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }
}
