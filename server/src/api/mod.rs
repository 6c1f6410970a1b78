//! The API without its transport: a JSON body becomes requests, events become JSON.
//!
//! A dialect is a module that reads a body and is an [`Answer`]: [`completions`] and [`chat_completions`], whose
//! answers are [`openai`]'s, [`responses`], [`anthropic`], and [`embeddings`], whose answers are no text. What they
//! read becomes the same [`chat`], [`sampling`] and [`constraint`].
//!
//! Invariant: a whole answer is the sum of the chunks of the same answer streamed; both come from [`Delta`]s. Text is
//! made and read here, outside the engine thread but for stop strings. Knows no socket.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use fullbore_engine::bundle::SamplingDefaults;
use fullbore_engine::fleet::Fleet;
use fullbore_engine::grammar::GrammarCompiler;
use fullbore_engine::memory::capacity::MemoryTable;
use fullbore_engine::model::ModelConfig;
use fullbore_engine::request::{Pooling, Share, TokenId};
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::text::{ChatTemplate, Tokenizer};
use serde_json::Value;

use crate::costs::SavedCosts;
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::http::metrics::RequestMetrics;
use crate::live::History;
use crate::start::{StartTimes, random};

mod answer;
mod anthropic;
mod chat;
mod chat_completions;
mod completions;
mod constraint;
mod embeddings;
mod fields;
mod generation;
pub(crate) mod json;
pub mod limits;
pub mod live;
mod logprobs;
mod messages;
pub mod models;
mod openai;
pub mod openapi;
mod parts;
mod render;
mod reply;
mod responses;
mod sampling;
mod tenancy;
mod text_parts;
pub mod texts;
mod tools;
pub mod worker;

pub use answer::{Answer, Event, collect, collect_choices};
pub use constraint::{Constraint, Form};
pub(crate) use fields::unsupported;
pub use generation::{Delta, Generation, Job, Jobs, Usage};
pub(crate) use sampling::MAX_STOPS;
pub use tenancy::parse_share;

use anthropic::MessageAnswer;
use embeddings::EmbeddingAnswer;
use fields::Fields;
use openai::OpenAiAnswer;
use responses::ResponseAnswer;

/// A loaded model with its engine, and all that text needs.
pub struct ServedModel {
    /// What clients call it.
    pub name: String,
    /// The format that most bytes of its weights have.
    pub dtype: WeightFormat,
    pub tokenizer: Arc<Tokenizer>,
    pub chat_template: Option<Arc<ChatTemplate>>,
    pub grammars: GrammarCompiler,
    /// Of the model's makers; a request's own values come first.
    pub defaults: SamplingDefaults,
    pub stop_ids: Vec<TokenId>,
    /// How it embeds; `None` where it was not made to.
    pub pooling: Option<Pooling>,
    pub shape: ModelConfig,
    /// Where its files are, if they are a folder as Hugging Face has it.
    pub folder: Option<PathBuf>,
    /// Of its weights; none where those are made up.
    pub weight_files: Vec<PathBuf>,
    /// By device.
    pub memory: Vec<MemoryTable>,
    /// Of tenants that have other shares than most, by name.
    pub shares: HashMap<String, Share>,
    pub metrics: Arc<RequestMetrics>,
    /// Of its last minutes.
    pub history: History,
    /// By device.
    pub costs: Vec<Option<SavedCosts>>,
    /// What the start took.
    pub times: StartTimes,
    /// Unix seconds.
    pub loaded_at: u64,
    pub engine: Fleet,
}

impl ServedModel {
    /// Refuses text in field `param` that has so many tokens or more, where that is over `max_tokens`.
    fn check_tokens(&self, param: &str, least_tokens: usize, max_tokens: usize) -> Result<(), ApiError> {
        match least_tokens > max_tokens {
            true => Err(self.too_long(param, least_tokens, max_tokens)),
            false => Ok(()),
        }
    }

    fn too_long(&self, param: &str, least_tokens: usize, max_tokens: usize) -> ApiError {
        match max_tokens > self.max_model_len() as usize {
            true => ApiError::too_long_to_count(param, least_tokens, max_tokens),
            false => ApiError::too_long(param, least_tokens, self.max_model_len()),
        }
    }

    fn max_model_len(&self) -> u32 {
        self.engine.config().max_model_len
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Completions,
    Chat,
    Responses,
    Messages,
    Embeddings,
}

impl Endpoint {
    pub fn is_ever_streamed(self) -> bool {
        self != Endpoint::Embeddings
    }

    /// The field that a prompt comes in.
    pub fn prompt_param(self) -> &'static str {
        match self {
            Endpoint::Completions => "prompt",
            Endpoint::Chat | Endpoint::Messages => "messages",
            Endpoint::Responses | Endpoint::Embeddings => "input",
        }
    }
}

impl ServedModel {
    /// Why it cannot serve now, if it cannot.
    pub fn check_serving(&self) -> Result<(), ApiError> {
        if let Some(reason) = self.engine.stopped() {
            return Err(ApiError::unavailable(&format!("the engine has stopped: {reason}")));
        }
        self.engine.recovering().map_or(Ok(()), |reason| Err(ApiError::not_yet(&reason)))
    }

    /// Ends the engine, and keeps what it has found out.
    pub fn end(&self) {
        self.engine.shutdown();
        for (costs, engine) in self.costs.iter().zip(self.engine.engines()) {
            costs.iter().for_each(|costs| costs.keep(engine));
        }
    }
}

/// Reads a body that is for `model`: how to answer, and what to run. Places are taken before any text is tokenized.
pub fn prepare(
    endpoint: Endpoint,
    model: &ServedModel,
    client: &Client,
    body: &Value,
) -> Result<(Box<dyn Answer>, Jobs), ApiError> {
    let fields = fields_of(body)?;
    let id = |prefix: &str| format!("{prefix}{:016x}", random());
    match endpoint {
        Endpoint::Completions => {
            let id = id("cmpl-");
            let answer = OpenAiAnswer::read(endpoint, &id, model, &fields)?;
            Ok((Box::new(answer), completions::jobs(model, &id, client, &fields)?))
        }
        Endpoint::Chat => {
            let id = id("chatcmpl-");
            let answer = OpenAiAnswer::read(endpoint, &id, model, &fields)?;
            Ok((Box::new(answer), chat_completions::jobs(model, &id, client, &fields)?))
        }
        Endpoint::Responses => {
            let id = id("resp_");
            let answer = ResponseAnswer::read(&id, model, &fields)?;
            Ok((Box::new(answer), responses::jobs(model, &id, client, &fields)?))
        }
        Endpoint::Embeddings => {
            let answer = EmbeddingAnswer::read(model, &fields)?;
            Ok((Box::new(answer), embeddings::jobs(model, &id("embd-"), client, &fields)?))
        }
        Endpoint::Messages => {
            let id = id("msg_");
            let answer = MessageAnswer::read(&id, model, &fields)?;
            Ok((Box::new(answer), anthropic::jobs(model, &id, client, &fields)?))
        }
    }
}

/// Reads a body of `/v1/completions` whose answer is told token by token, under the name `id`.
pub fn prepare_tokens(model: &ServedModel, id: &str, client: &Client, body: &Value) -> Result<Jobs, ApiError> {
    let mut jobs = completions::jobs(model, id, client, &fields_of(body)?)?;
    jobs.jobs.iter_mut().for_each(|job| job.is_told_at_once = true);
    Ok(jobs)
}

/// The name of the model that a body asks for, where it says one.
pub fn model_asked(body: &Value) -> Result<Option<&str>, ApiError> {
    fields_of(body)?.string("model")
}

fn fields_of(body: &Value) -> Result<Fields<'_>, ApiError> {
    body.as_object().map(Fields).ok_or_else(|| ApiError::not_json("the request body is not a JSON object"))
}

pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
