//! A chat in no dialect's words: messages through the model's template, and what its answer may be. Invariant: what is
//! written in a message, a tool or a variable never becomes a special token; the template sees to that.

use fullbore_engine::grammar::GrammarSource;
use fullbore_engine::text::{ChatInput, ChatMessage, ChatTemplate, Prompt as RenderedChat, TextError};
use serde_json::{Map, Value};

use super::ServedModel;
use super::constraint::{Constraint, Form};
use super::generation::Jobs;
use super::reply::ReplyFormat;
use super::sampling::{Prompt, Sampling};
use super::tools::format::{self, CallFormat, Thought, ThoughtMarks};
use super::tools::parameters::Callee;
use super::tools::{ToolChoice, Tools};
use crate::http::error::ApiError;

/// A chat as a dialect reads it.
pub struct Chat {
    /// The field that they came in.
    pub param: &'static str,
    pub messages: Vec<ChatMessage>,
    pub tools: Tools,
    /// The form of its answer, where that calls nothing.
    pub constraint: Option<Constraint>,
    /// Variables of the template.
    pub variables: Map<String, Value>,
    pub add_generation_prompt: bool,
}

/// What is asked of its answer beside sampling.
#[derive(Default)]
pub struct ChatOptions {
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
}

impl Chat {
    /// Its choices, with places that are taken before anything is tokenized.
    pub fn jobs(
        self,
        model: &ServedModel,
        id: &str,
        sampling: &Sampling,
        asked: ChatOptions,
    ) -> Result<Jobs, ApiError> {
        let ChatOptions { logprobs, prompt_logprobs } = asked;
        let template = self.template(model)?;
        let mut places = sampling.reserve(model, 1)?;
        let RenderedChat { ids, text } = self.render(model, model.max_model_len() as usize)?;
        let thought = thought(template, &text);
        let form = self.form(model, template, thought)?;
        let max_tokens = sampling.max_tokens(|| Sampling::rest_of_context(model, ids.len()))?;
        let reply = Some(self.reply(template, thought)).filter(|reply| *reply != ReplyFormat::default());
        let prompt = Prompt { ids, max_tokens, logprobs, prompt_logprobs, echo: None, reply };
        let jobs = sampling.jobs(model, id, vec![prompt], &mut places)?;
        Ok(Jobs { jobs, places, in_turn: false, form })
    }

    fn template<'m>(&self, model: &'m ServedModel) -> Result<&'m ChatTemplate, ApiError> {
        let missing = || format!("{} has no chat template; use /v1/completions", model.name);
        model.chat_template.as_deref().ok_or_else(|| ApiError::invalid(self.param, missing()))
    }

    /// How the model writes calls in this chat.
    fn call_format(&self, template: &ChatTemplate) -> CallFormat {
        let format = CallFormat::of_template(template.source());
        if self.may_call_or_say() { format.beside_a_form() } else { format }
    }

    /// Whether calls or a text of a form may come, as the model likes.
    fn may_call_or_say(&self) -> bool {
        self.constraint.is_some() && self.tools.are_offered() && !self.tools.are_forced()
    }

    /// As a prompt of `max_tokens` at most.
    pub fn render(&self, model: &ServedModel, max_tokens: usize) -> Result<RenderedChat, ApiError> {
        let template = self.template(model)?;
        let format = self.call_format(template);
        let told = self.tools.are_offered() && format.is_of_template();
        let tools: Vec<Value> = self.tools.functions.iter().map(|function| function.tool.clone()).collect();
        let plain;
        let messages = match format.is_of_template() {
            true => &self.messages,
            false => {
                plain = format::plain_messages(format, &self.tools, self.messages.clone());
                &plain
            }
        };
        let input = ChatInput {
            messages,
            add_generation_prompt: self.add_generation_prompt,
            tools: told.then_some(tools.as_slice()),
            variables: Some(&self.variables),
        };
        let rendered = template.encode_at_most(&model.tokenizer, &input, max_tokens);
        rendered.map_err(|error| match error {
            TextError::TooLong { least_tokens } => model.too_long(self.param, least_tokens, max_tokens),
            // No fault of these messages.
            TextError::TemplateTime { .. } => ApiError::not_yet(&error.to_string()),
            error => ApiError::invalid(self.param, error.to_string()),
        })
    }

    /// What the answer follows.
    fn form(&self, model: &ServedModel, template: &ChatTemplate, thought: Thought) -> Result<Option<Form>, ApiError> {
        let format = self.call_format(template);
        let body: Option<&GrammarSource> = self.constraint.as_ref().map(|constraint| &constraint.source);
        let source = format::grammar(format, &self.tools, body, thought, &model.tokenizer);
        let param = match &self.constraint {
            Some(constraint) if !self.tools.are_forced() => constraint.param.clone(),
            _ => "tools".to_owned(),
        };
        source.map(|source| Constraint { param, source }.check()).transpose()
    }

    fn reply(&self, template: &ChatTemplate, thought: Thought) -> ReplyFormat {
        let functions = self.tools.callable().iter().map(Callee::new);
        match self.tools.are_offered() {
            true => ReplyFormat {
                thought,
                calls: Some(self.call_format(template)),
                functions: functions.collect(),
                calls_alone: self.tools.are_forced(),
                calls_or_text: self.may_call_or_say(),
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
    match ThoughtMarks::of_template(template.source()) {
        Some(marks) if prompt.ends_with(marks.open) => Thought::Begun(marks),
        Some(marks) if !prompt.ends_with(marks.close) => Thought::Possible(marks),
        _ => Thought::Never,
    }
}
