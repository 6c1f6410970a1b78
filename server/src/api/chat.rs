//! `/v1/chat/completions`: messages through the model's template, and what its answer may be. Invariant: what is
//! written in a message, a tool or a variable never becomes a special token; the template sees to that.

use fullbore_engine::grammar::GrammarSource;
use fullbore_engine::text::{ChatInput, ChatMessage, ChatTemplate, Prompt as RenderedChat, TextError};
use serde_json::{Map, Value};

use super::constraint::Constraint;
use super::fields::{Fields, wrong};
use super::generation::Jobs;
use super::reply::ReplyFormat;
use super::sampling::{MAX_LOGPROBS, Prompt, Sampling};
use super::tools::format::{self, CallFormat, Thought};
use super::tools::{ToolChoice, Tools};
use super::{ServedModel, messages};
use crate::http::access::Client;
use crate::http::error::ApiError;

const MAX_VARIABLES: usize = 64;
const MAX_VARIABLES_BYTES: usize = 16 << 10;

/// A chat as far as its template goes.
pub struct Chat {
    messages: Vec<ChatMessage>,
    tools: Tools,
    format: CallFormat,
    variables: Map<String, Value>,
    add_generation_prompt: bool,
}

pub fn jobs(model: &ServedModel, id: &str, client: &Client, fields: &Fields) -> Result<Jobs, ApiError> {
    let sampling = Sampling::read(model, client, fields, 1)?;
    let logprobs = logprobs(fields)?;
    let constraint = Constraint::read(fields)?;
    let (chat, template) = Chat::read(model, fields)?;
    let places = sampling.reserve(model, 1)?;
    let RenderedChat { ids, text } = chat.render(model, template)?;
    let thought = thought(template, &text);
    let grammar = chat.grammar(model, constraint.as_ref(), thought)?;
    let max_tokens = sampling.max_tokens.unwrap_or_else(|| Sampling::rest_of_context(model, ids.len()));
    let reply = Some(chat.reply(thought)).filter(|reply| *reply != ReplyFormat::default());
    let prompt = Prompt { ids, max_tokens, logprobs, echo: None, grammar, reply };
    Ok(Jobs { jobs: sampling.jobs(id, vec![prompt]), places })
}

impl Chat {
    pub fn read<'m>(model: &'m ServedModel, fields: &Fields) -> Result<(Chat, &'m ChatTemplate), ApiError> {
        let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
        let messages = messages::read(fields.get("messages"))?;
        let tools = Tools::read(fields)?;
        let variables = variables(fields)?;
        let Some(template) = &model.chat_template else {
            let message = format!("{} has no chat template; use /v1/completions", model.name);
            return Err(ApiError::invalid("messages", message));
        };
        let format = CallFormat::of_template(template.source());
        let messages = match format.is_of_template() {
            true => messages,
            false => format::plain_messages(format, &tools, messages),
        };
        Ok((Chat { messages, tools, format, variables, add_generation_prompt }, template))
    }

    pub fn render(&self, model: &ServedModel, template: &ChatTemplate) -> Result<RenderedChat, ApiError> {
        let max_model_len = model.max_model_len();
        let told = self.tools.are_offered() && self.format.is_of_template();
        let tools: Vec<Value> = self.tools.functions.iter().map(|function| function.tool.clone()).collect();
        let input = ChatInput {
            messages: &self.messages,
            add_generation_prompt: self.add_generation_prompt,
            tools: told.then_some(tools.as_slice()),
            variables: Some(&self.variables),
        };
        let rendered = template.encode_at_most(&model.tokenizer, &input, max_model_len as usize);
        rendered.map_err(|error| match error {
            TextError::TooLong { least_tokens } => ApiError::too_long("messages", least_tokens, max_model_len),
            // No fault of these messages.
            TextError::TemplateTime { .. } => ApiError::not_yet(&error.to_string()),
            error => ApiError::invalid("messages", error.to_string()),
        })
    }

    /// What the answer follows, compiled.
    fn grammar(
        &self,
        model: &ServedModel,
        constraint: Option<&Constraint>,
        thought: Thought,
    ) -> Result<Option<fullbore_engine::grammar::Grammar>, ApiError> {
        let body: Option<&GrammarSource> = constraint.map(|constraint| &constraint.source);
        let source = format::grammar(self.format, &self.tools, body, thought, &model.tokenizer);
        let param = match constraint {
            Some(constraint) if !self.tools.are_forced() => constraint.param.clone(),
            _ => "tools".to_owned(),
        };
        source.map(|source| Constraint { param, source }.compile(model)).transpose()
    }

    fn reply(&self, thought: Thought) -> ReplyFormat {
        let functions = self.tools.callable().iter().map(|function| function.name.clone());
        match self.tools.are_offered() {
            true => ReplyFormat {
                thought,
                calls: Some(self.format),
                functions: functions.collect(),
                // As OpenAI has it.
                ends_as_text: matches!(self.tools.choice, ToolChoice::Named(_)),
            },
            false => ReplyFormat { thought, ..ReplyFormat::default() },
        }
    }
}

/// Whether the answer to a prompt begins with a thought.
fn thought(template: &ChatTemplate, prompt: &str) -> Thought {
    let prompt = prompt.trim_end();
    match () {
        _ if !template.source().contains("</think>") || prompt.ends_with("</think>") => Thought::Never,
        _ if prompt.ends_with("<think>") => Thought::Begun,
        _ => Thought::Possible,
    }
}

fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let num_top = fields.integer("top_logprobs", 0..=MAX_LOGPROBS)?;
    match (wanted, num_top) {
        (true, num_top) => Ok(Some(num_top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

/// What the request adds to the template's variables: vLLM's `chat_template_kwargs`, and OpenAI's `reasoning_effort`.
fn variables(fields: &Fields) -> Result<Map<String, Value>, ApiError> {
    const NAME: &str = "chat_template_kwargs";
    const RESERVED: [&str; 7] =
        ["messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt", "chat_template"];
    let mut variables = Map::new();
    if let Some(effort) = fields.string("reasoning_effort")? {
        variables.insert("reasoning_effort".to_owned(), effort.into());
    }
    let Some(asked) = fields.object(NAME)? else { return Ok(variables) };
    if let Some(name) = RESERVED.iter().find(|name| asked.0.contains_key(**name)) {
        return Err(ApiError::invalid(NAME, format!("{NAME} has {name}, which is not for requests to set")));
    }
    let value = fields.get(NAME).unwrap_or(&Value::Null);
    if asked.0.len() > MAX_VARIABLES || value.to_string().len() > MAX_VARIABLES_BYTES {
        let expected = format!("at most {MAX_VARIABLES} values of {MAX_VARIABLES_BYTES} bytes together");
        return Err(wrong(NAME, value, expected));
    }
    variables.extend(asked.0.iter().map(|(name, value)| (name.clone(), value.clone())));
    Ok(variables)
}
