//! OpenAI's API without its transport: a JSON body becomes requests, events become JSON.
//!
//! Invariant: a whole answer is the sum of the chunks of the same answer streamed; both come from [`Delta`]s. Text is
//! made and read here, outside the engine thread. Knows no socket.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use fullbore_engine::bundle::SamplingDefaults;
use fullbore_engine::grammar::GrammarCompiler;
use fullbore_engine::memory::capacity::MemoryTable;
use fullbore_engine::request::{Share, TokenId};
use fullbore_engine::text::{ChatTemplate, Tokenizer};
use fullbore_engine::worker::EngineHandle;
use serde_json::Value;

use crate::costs::SavedCosts;
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::http::metrics::RequestMetrics;
use crate::start::StartTimes;

mod chat;
mod completions;
mod constraint;
mod exchange;
mod fields;
mod generation;
pub mod limits;
mod logprobs;
mod messages;
pub mod models;
mod reply;
mod sampling;
mod tenancy;
pub mod texts;
mod tools;

pub use exchange::Exchange;
pub use generation::{Delta, Generation, Job, Jobs};
pub use tenancy::parse_share;

use fields::Fields;

/// A loaded model with its engine, and all that text needs.
pub struct ServedModel {
    /// What clients call it.
    pub name: String,
    pub tokenizer: Arc<Tokenizer>,
    pub chat_template: Option<ChatTemplate>,
    pub grammars: GrammarCompiler,
    /// Of the model's makers; a request's own values come first.
    pub defaults: SamplingDefaults,
    pub stop_ids: Vec<TokenId>,
    pub memory: MemoryTable,
    /// Of tenants that have other shares than most, by name.
    pub shares: HashMap<String, Share>,
    pub metrics: Arc<RequestMetrics>,
    pub costs: Option<SavedCosts>,
    /// What the start took.
    pub times: StartTimes,
    /// Unix seconds.
    pub loaded_at: u64,
    pub engine: EngineHandle,
}

impl ServedModel {
    /// Refuses text of field `param` that cannot fit into the context, before it is tokenized.
    fn check_text(&self, param: &str, text: &str) -> Result<(), ApiError> {
        let (least_tokens, max_model_len) = (self.tokenizer.least_tokens(text.len()), self.max_model_len());
        match least_tokens > max_model_len as usize {
            true => Err(ApiError::too_long(param, least_tokens, max_model_len)),
            false => Ok(()),
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
}

impl ServedModel {
    /// Ends the engine, and keeps what it has found out.
    pub fn end(&self) {
        self.engine.shutdown();
        if let Some(costs) = &self.costs {
            costs.keep(&self.engine);
        }
    }
}

/// Reads a body: how to answer, and what to run. Places are taken before any text is tokenized.
pub fn prepare(
    endpoint: Endpoint,
    model: &ServedModel,
    client: &Client,
    body: &Value,
) -> Result<(Exchange, Jobs), ApiError> {
    let fields = fields_of(model, body)?;
    fields.refuse_unsupported()?;
    let exchange = Exchange::read(endpoint, model, &fields)?;
    let jobs = match endpoint {
        Endpoint::Completions => completions::jobs(model, &exchange.id, client, &fields)?,
        Endpoint::Chat => chat::jobs(model, &exchange.id, client, &fields)?,
    };
    Ok((exchange, jobs))
}

/// The fields of a body that is for this model.
fn fields_of<'a>(model: &ServedModel, body: &'a Value) -> Result<Fields<'a>, ApiError> {
    let object = body.as_object().ok_or_else(|| ApiError::not_json("the request body is not a JSON object"))?;
    let fields = Fields(object);
    match fields.string("model")?.filter(|asked| *asked != model.name) {
        Some(asked) => Err(ApiError::unknown_model(asked, &model.name)),
        None => Ok(fields),
    }
}

pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
