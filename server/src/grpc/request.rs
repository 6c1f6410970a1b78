//! What a message asks for, in the words of `/v1/completions`, so that one parser reads both and refuses both in the
//! same sentences. Invariant: a field that would change the answer and is not there is refused by its name; what only
//! hints is passed over.

use serde_json::{Map, Value, json};
use vllm_proto::candidate_tokens::Select;
use vllm_proto::decoding_parameters::StructuredOutput;
use vllm_proto::generate_request::Prompt;
use vllm_proto::{CandidateTokens, GenerateRequest, ResponseOptions};

use crate::api::{MAX_STOPS, ServedModel, unsupported};
use crate::http::error::ApiError;

/// What of an answer is told.
#[derive(Clone, Debug)]
pub struct Told {
    pub text: bool,
    pub token_ids: bool,
    pub prompt_token_ids: bool,
    pub prompt_logprobs: bool,
    /// Ids that end the text because the request says so.
    pub stop_ids: Vec<u32>,
    /// Whether the model's own do not.
    pub ignores_eos: bool,
}

impl Told {
    pub fn of(message: &GenerateRequest) -> Told {
        let response = message.response.clone().unwrap_or_default();
        let stopping = message.stopping.clone().unwrap_or_default();
        Told {
            text: response.output_text.unwrap_or(true),
            token_ids: response.output_token_ids,
            prompt_token_ids: response.prompt_token_ids,
            prompt_logprobs: response.prompt_logprobs
                || response.prompt_candidates.is_some_and(|found| found.select.is_some()),
            stop_ids: stopping.stop_token_ids,
            ignores_eos: stopping.ignore_eos,
        }
    }
}

/// As the contract has it, where the request does not say.
const DEFAULT_MAX_TOKENS: u32 = 20;

/// The body that asks `model` for the same.
pub fn body(model: &ServedModel, message: GenerateRequest) -> Result<Value, ApiError> {
    refuse_unsupported(&message)?;
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
    let num_prompt_tokens = match message.prompt {
        Some(Prompt::Text(text)) => {
            put("prompt", text.into());
            0
        }
        Some(Prompt::TokenIds(tokens)) => {
            // As JSON each takes some times as much.
            let (num_tokens, most) = (tokens.ids.len(), model.engine.config().max_model_len);
            if num_tokens > most as usize {
                return Err(ApiError::too_long("prompt", num_tokens, most));
            }
            let num_tokens = num_tokens as u32;
            put("prompt", tokens.ids.into());
            num_tokens
        }
        None => 0,
    };
    // Without one a draw is only what was asked for.
    let temperature = message.temperature.or(model.defaults.temperature).unwrap_or(0.0);
    put("temperature", number("temperature", temperature)?);
    put("priority", message.priority.into());
    let sampling = message.sampling.unwrap_or_default();
    put("n", sampling.num_sequences.max(1).into());
    put("top_k", json!(sampling.top_k));
    put("top_p", sampling.top_p.map_or(Ok(Value::Null), |top_p| number("top_p", top_p))?);
    put("min_p", sampling.min_p.map_or(Ok(Value::Null), |min_p| number("min_p", min_p))?);
    put("seed", json!(sampling.seed));
    let decoding = message.decoding.unwrap_or_default();
    put("presence_penalty", number("presence_penalty", decoding.presence_penalty)?);
    put("frequency_penalty", number("frequency_penalty", decoding.frequency_penalty)?);
    let repetition_penalty = decoding.repetition_penalty;
    let repetition_penalty = if repetition_penalty == 0.0 { 1.0 } else { repetition_penalty };
    put("repetition_penalty", number("repetition_penalty", repetition_penalty)?);
    if !decoding.logit_bias.is_empty() {
        let biases = decoding.logit_bias.iter();
        let biases = biases.map(|(id, bias)| Ok((id.to_string(), number("logit_bias", *bias)?)));
        put("logit_bias", biases.collect::<Result<Map<_, _>, ApiError>>()?.into());
    }
    if !decoding.allowed_token_ids.is_empty() {
        put("allowed_token_ids", at_most(decoding.allowed_token_ids, model.shape.vocab_size as usize).into());
    }
    put("structured_outputs", decoding.structured_output.map_or(Value::Null, structured_outputs));
    let stopping = message.stopping.unwrap_or_default();
    let rest = model.engine.config().max_model_len.saturating_sub(num_prompt_tokens).max(1);
    let max_tokens = if stopping.max_new_tokens == 0 { DEFAULT_MAX_TOKENS.min(rest) } else { stopping.max_new_tokens };
    put("max_tokens", max_tokens.into());
    put("min_tokens", stopping.min_new_tokens.into());
    put("stop_token_ids", at_most(stopping.stop_token_ids, MAX_STOPS).into());
    put("stop", stopping.stop_strings.into_iter().take(MAX_STOPS + 1).collect::<Vec<_>>().into());
    put("ignore_eos", stopping.ignore_eos.into());
    let response = message.response.unwrap_or_default();
    put("logprobs", logprobs(response.output_logprobs, response.output_candidates.as_ref()));
    put("prompt_logprobs", logprobs(response.prompt_logprobs, response.prompt_candidates.as_ref()));
    let salt = message.kv.unwrap_or_default().cache_salt;
    put("cache_salt", if salt.is_empty() { Value::Null } else { salt.into() });
    Ok(body.into())
}

/// Each id once, and of those beyond `most`, with which they are refused, the first.
fn at_most(mut ids: Vec<u32>, most: usize) -> Vec<u32> {
    ids.sort_unstable();
    ids.dedup();
    ids.truncate(most + 1);
    ids
}

/// JSON has no others than finite ones.
fn number(name: &str, value: f32) -> Result<Value, ApiError> {
    match value.is_finite() {
        true => Ok(value.into()),
        false => {
            Err(ApiError::invalid(name, format!("{name} has {value}, which is no number; send one, or leave it out")))
        }
    }
}

/// How many of the most likely tokens are told of each.
fn logprobs(is_wanted: bool, candidates: Option<&CandidateTokens>) -> Value {
    match candidates.and_then(|candidates| candidates.select.as_ref()) {
        Some(Select::TopN(num_top)) => json!(num_top),
        _ if is_wanted => json!(0),
        _ => Value::Null,
    }
}

fn structured_outputs(output: StructuredOutput) -> Value {
    match output {
        StructuredOutput::Json(schema) => json!({"json": schema}),
        StructuredOutput::Regex(regex) => json!({"regex": regex}),
        StructuredOutput::Choice(choices) => json!({"choice": choices.choices}),
        StructuredOutput::Grammar(grammar) => json!({"grammar": grammar}),
        StructuredOutput::JsonObject(is_wanted) => json!({"json_object": is_wanted}),
        StructuredOutput::StructuralTag(tag) => json!({"structural_tag": tag}),
    }
}

fn refuse_unsupported(message: &GenerateRequest) -> Result<(), ApiError> {
    let decoding = message.decoding.as_ref();
    let stopping = message.stopping.as_ref();
    let response = message.response.clone().unwrap_or_default();
    let kv = message.kv.as_ref();
    let ResponseOptions { prompt_candidates, output_candidates, output_text, skip_special_tokens, .. } = response;
    let is_other = |candidates: Option<CandidateTokens>| {
        let select = candidates.and_then(|candidates| candidates.select);
        matches!(select, Some(Select::TokenIds(_) | Select::All(true)))
    };
    let asked = [
        ("truncate_prompt_tokens", message.truncate_prompt_tokens != 0),
        ("media", !message.media.is_empty()),
        ("lora_name", !message.lora_name.is_empty()),
        ("bad_words_token_ids", decoding.is_some_and(|decoding| !decoding.bad_words_token_ids.is_empty())),
        ("include_stop_strings", stopping.is_some_and(|stopping| stopping.include_stop_strings)),
        (
            "thinking_token_budget",
            stopping.and_then(|stopping| stopping.thinking_token_budget).is_some_and(|budget| budget != -1),
        ),
        ("prompt_candidates other than top_n", is_other(prompt_candidates)),
        ("output_candidates other than top_n", is_other(output_candidates)),
        ("skip_special_tokens = false", output_text.unwrap_or(true) && skip_special_tokens == Some(false)),
        ("bypass_prefix_cache", kv.is_some_and(|kv| kv.bypass_prefix_cache)),
        ("kv_transfer_params", kv.is_some_and(|kv| kv.kv_transfer_params.is_some())),
        ("ec_transfer_params", kv.is_some_and(|kv| kv.ec_transfer_params.is_some())),
    ];
    match asked.iter().find(|(_, is_asked)| *is_asked) {
        Some((name, _)) => Err(unsupported(name)),
        None => Ok(()),
    }
}
