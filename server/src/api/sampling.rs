//! What all dialects ask of the engine in the same words. Invariant: a request made here is within the ranges
//! that `request.rs` states; that it fits the model's context is the engine's to say.

use std::sync::Arc;

use fullbore_engine::fleet::Place;
use fullbore_engine::request::{self, MAX_LOGIT_BIASES, Request, SamplingParams, TokenId, token_mask};
use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use super::generation::{Echo, Job};
use super::reply::ReplyFormat;
use super::tenancy::Tenancy;
use super::{ServedModel, fields};
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::start::random;

/// Choices of one HTTP request at most, over all its prompts.
pub const MAX_CHOICES: usize = 128;
/// Alternatives of one token at most.
pub const MAX_LOGPROBS: i64 = request::MAX_LOGPROBS as i64;
pub const MAX_STOPS: usize = 16;
pub const MAX_STOP_BYTES: usize = 256;

/// Ways to choose that others have and we do not.
const UNSUPPORTED: [&str; 8] = [
    "dry_multiplier",
    "dynatemp_range",
    "logits_processors",
    "mirostat",
    "repeat_penalty",
    "top_n_sigma",
    "typical_p",
    "xtc_probability",
];

/// What not all dialects have, or call the same.
#[derive(Clone, Debug, Default)]
pub struct Own<'a> {
    pub max_tokens: Option<u32>,
    /// Choices of each prompt; 0 is 1.
    pub n: u32,
    pub stops: Vec<String>,
    pub user: Option<&'a str>,
}

/// How tokens are chosen, and whom for.
pub struct Sampling {
    max_tokens: Option<u32>,
    n: u32,
    params: SamplingParams,
    stops: Vec<String>,
    stop_ids: Vec<TokenId>,
    tenancy: Tenancy,
}

/// A prompt, and what its choices do beside sampling.
pub struct Prompt {
    pub ids: Vec<TokenId>,
    pub max_tokens: u32,
    pub logprobs: Option<u32>,
    /// Alternatives of each of its own tokens, where those are asked for.
    pub prompt_logprobs: Option<u32>,
    /// Where it is to be repeated.
    pub echo: Option<Echo>,
    /// What there is in its texts; `None` for text alone.
    pub reply: Option<ReplyFormat>,
}

impl Sampling {
    pub fn read(model: &ServedModel, client: &Client, fields: &Fields, own: Own) -> Result<Sampling, ApiError> {
        fields.refuse(&UNSUPPORTED)?;
        let top_p = fields.number("top_p", 0.0..=1.0)?.or(model.defaults.top_p).unwrap_or(1.0);
        if top_p <= 0.0 {
            return Err(ApiError::invalid("top_p", "top_p is 0; it must be above 0 and at most 1"));
        }
        // -1 is vLLM's way to say all.
        let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|top_k| u32::try_from(top_k).unwrap_or(0));
        let defaults = &model.defaults;
        let min_tokens = fields.integer("min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0) as u32;
        let stop_ids = stop_ids(model, fields)?;
        let allowed_tokens = allowed_tokens(model, fields)?;
        let params = SamplingParams {
            temperature: fields.number("temperature", 0.0..=2.0)?.or(defaults.temperature).unwrap_or(1.0),
            top_p,
            top_k: top_k.or(defaults.top_k).unwrap_or(0),
            min_p: fields.number("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or(0.0),
            seed: seed(fields)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            repetition_penalty: fields
                .number("repetition_penalty", 0.01..=100.0)?
                .or(defaults.repetition_penalty)
                .unwrap_or(1.0),
            logit_bias: logit_bias(model, fields)?,
            early_tokens: (min_tokens > 0)
                .then(|| early_tokens(model, allowed_tokens.as_deref(), &stop_ids))
                .transpose()?,
            min_tokens,
            allowed_tokens,
        };
        Ok(Sampling {
            max_tokens: own.max_tokens,
            n: own.n.max(1),
            params,
            stops: own.stops,
            stop_ids,
            tenancy: Tenancy::read(model, client, fields, own.user)?,
        })
    }

    /// What a prompt's choices have at most: what was asked for, or else `default`.
    pub fn max_tokens(&self, default: impl FnOnce() -> u32) -> Result<u32, ApiError> {
        let max_tokens = self.max_tokens.unwrap_or_else(default);
        match self.params.min_tokens {
            min_tokens if min_tokens > max_tokens => {
                let message = format!("min_tokens is {min_tokens}, and the answer has at most {max_tokens}; lower it");
                Err(ApiError::invalid("min_tokens", message))
            }
            _ => Ok(max_tokens),
        }
    }

    /// What is left of the model's context after a prompt; at least 1, so that a prompt that fills it is refused.
    pub fn rest_of_context(model: &ServedModel, num_prompt_tokens: usize) -> u32 {
        let num_prompt_tokens = u32::try_from(num_prompt_tokens).unwrap_or(u32::MAX);
        model.engine.config().max_model_len.saturating_sub(num_prompt_tokens).max(1)
    }

    /// What was asked for, with what stands where nothing was, in vLLM's words.
    pub fn told(&self, max_tokens: u32) -> Value {
        let params = &self.params;
        json!({
            "n": self.n,
            "max_tokens": max_tokens,
            "min_tokens": params.min_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": params.seed,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "stop": self.stops,
            "stop_token_ids": self.stop_ids.iter().map(|id| id.0).collect::<Vec<_>>(),
        })
    }

    pub fn priority(&self) -> i32 {
        self.tenancy.priority
    }

    /// A place for each choice of `num_prompts` prompts.
    pub fn reserve(&self, model: &ServedModel, num_prompts: usize) -> Result<Vec<Place>, ApiError> {
        let num_choices = num_prompts * self.n as usize;
        if num_choices > MAX_CHOICES {
            let n = self.n;
            let message = format!(
                "{num_prompts} prompts with n = {n} make {num_choices} choices; at most {MAX_CHOICES} are made at once"
            );
            return Err(ApiError::invalid("n", message));
        }
        Ok(model.engine.reserve(self.tenancy.tenant, self.tenancy.share, num_choices as u32)?)
    }

    /// `n` choices for each prompt, each with a seed of its own, in `places` that have room for its tokens.
    pub fn jobs(
        &self,
        model: &ServedModel,
        id: &str,
        prompts: Vec<Prompt>,
        places: &mut [Place],
    ) -> Result<Vec<Job>, ApiError> {
        // Before there is a copy of a prompt for each of its choices.
        let num_tokens = |index: usize| prompts[index / self.n as usize].ids.len() as u64;
        model.engine.hold_tokens(places, num_tokens)?;
        let pairs = prompts.iter().flat_map(|prompt| (0..self.n).map(move |nth| (prompt, nth)));
        let job = |(prompt, nth): (&Prompt, u32)| {
            let seed = self.params.seed.wrapping_add(u64::from(nth));
            let echoed = prompt.echo.as_ref().and_then(|echo| echo.logprobs);
            let request = Request {
                id: id.to_owned(),
                prompt: prompt.ids.clone(),
                generated: Vec::new(),
                max_tokens: prompt.max_tokens,
                stop_ids: self.stop_ids.clone(),
                sampling: SamplingParams { seed, ..self.params.clone() },
                grammar: None,
                logprobs: prompt.logprobs,
                prompt_logprobs: prompt.prompt_logprobs.max(echoed),
                pooling: None,
                cache_salt: self.tenancy.cache_salt,
                salt_name: self.tenancy.salt_name.clone(),
                tenant: self.tenancy.tenant,
                share: self.tenancy.share,
                priority: self.tenancy.priority,
            };
            let Prompt { echo, prompt_logprobs, reply, .. } = prompt;
            let (echo, reply) = (echo.clone(), reply.clone());
            let (stops, prompt_logprobs) = (self.stops.clone(), *prompt_logprobs);
            Job { request: Arc::new(request), nth, stops, echo, prompt_logprobs, reply, is_told_at_once: false }
        };
        Ok(pairs.map(job).collect())
    }
}

/// A number of the client's, of any sign, or one of ours.
fn seed(fields: &Fields) -> Result<u64, ApiError> {
    let Some(value) = fields.get("seed") else { return Ok(random()) };
    let seed = value.as_u64().or(fields::integer(value).map(|seed| seed as u64));
    seed.ok_or_else(|| wrong("seed", value, "an integer of 64 bits"))
}

/// Of field `name`, from `least_tokens` on.
pub fn max_tokens(fields: &Fields, name: &str, least_tokens: u32) -> Result<Option<u32>, ApiError> {
    let asked = fields.integer(name, i64::from(least_tokens)..=i64::from(u32::MAX))?;
    Ok(asked.map(|max_tokens| max_tokens as u32))
}

/// Stop strings in field `name`.
pub fn stops(fields: &Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let Some(value) = fields.get(name) else { return Ok(Vec::new()) };
    let expected = || format!("a string, or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_BYTES} bytes each");
    let refuse = || wrong(name, value, expected());
    let texts = match value {
        Value::String(_) => std::slice::from_ref(value),
        Value::Array(items) if items.len() <= MAX_STOPS => items.as_slice(),
        _ => return Err(refuse()),
    };
    let text = |item: &Value| {
        let text = item.as_str().filter(|text| (1..=MAX_STOP_BYTES).contains(&text.len()));
        text.map(str::to_owned).ok_or_else(refuse)
    };
    texts.iter().map(text).collect()
}

fn stop_ids(model: &ServedModel, fields: &Fields) -> Result<Vec<TokenId>, ApiError> {
    let mut stop_ids = match fields.bool("ignore_eos")?.unwrap_or(false) {
        true => Vec::new(),
        false => model.stop_ids.clone(),
    };
    if let Some(value) = fields.get("stop_token_ids") {
        let items = value.as_array().filter(|items| items.len() <= MAX_STOPS);
        let expected = format!("a list of at most {MAX_STOPS} token ids");
        let items = items.ok_or_else(|| wrong("stop_token_ids", value, expected))?;
        for item in items {
            stop_ids.push(token_id(model, "stop_token_ids", item)?);
        }
    }
    Ok(stop_ids)
}

/// By ascending token.
fn logit_bias(model: &ServedModel, fields: &Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(value) = fields.get("logit_bias") else { return Ok(Vec::new()) };
    let vocab_size = model.engine.vocab_size();
    let expected =
        || format!("a map of at most {MAX_LOGIT_BIASES} token ids below {vocab_size} to numbers from -100 to 100");
    let map = value.as_object().filter(|map| map.len() <= MAX_LOGIT_BIASES as usize);
    let map = map.ok_or_else(|| wrong("logit_bias", value, expected()))?;
    let mut biases = Vec::with_capacity(map.len());
    for (key, bias) in map {
        let id = key.parse::<u32>().ok().filter(|id| *id < vocab_size && id.to_string() == *key);
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let (Some(id), Some(bias)) = (id, bias) else {
            return Err(wrong("logit_bias", &json!({ key: map[key] }), expected()));
        };
        biases.push((TokenId(id), bias as f32));
    }
    biases.sort_unstable_by_key(|(id, _)| *id);
    Ok(biases)
}

fn allowed_tokens(model: &ServedModel, fields: &Fields) -> Result<Option<Arc<[u32]>>, ApiError> {
    const NAME: &str = "allowed_token_ids";
    let Some(value) = fields.get(NAME) else { return Ok(None) };
    let items = value.as_array().filter(|items| !items.is_empty());
    let items = items.ok_or_else(|| wrong(NAME, value, "a list of at least one token id"))?;
    let ids = items.iter().map(|item| token_id(model, NAME, item)).collect::<Result<Vec<_>, _>>()?;
    Ok(Some(token_mask(ids, model.engine.vocab_size())))
}

/// What `min_tokens` leaves of the allowed tokens: none that ends the text.
fn early_tokens(model: &ServedModel, allowed: Option<&[u32]>, stop_ids: &[TokenId]) -> Result<Arc<[u32]>, ApiError> {
    let vocab_size = model.engine.vocab_size();
    let mut mask = match allowed {
        Some(allowed) => allowed.to_vec(),
        None => token_mask((0..vocab_size).map(TokenId), vocab_size).to_vec(),
    };
    for id in stop_ids.iter().chain(&model.stop_ids) {
        mask[id.0 as usize / 32] &= !(1 << (id.0 % 32));
    }
    match mask.iter().all(|word| *word == 0) {
        true => Err(ApiError::invalid("min_tokens", "min_tokens leaves nothing of the allowed tokens; set it to 0")),
        false => Ok(mask.into()),
    }
}

/// One token id of a list in field `name`.
pub fn token_id(model: &ServedModel, name: &str, value: &Value) -> Result<TokenId, ApiError> {
    let vocab_size = model.engine.vocab_size();
    let id = fields::integer(value).filter(|id| (0..i64::from(vocab_size)).contains(id));
    let expected = || format!("token ids below {vocab_size}, or text");
    id.map(|id| TokenId(id as u32)).ok_or_else(|| fields::wrong(name, value, expected()))
}
